"""The gRPC methods of administration."""

import asyncio
import json

from grpc.aio import ServicerContext

from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.runtime.backend import Backend
from nitsum_jax.runtime.control.control_loop import ControlLoop
from nitsum_jax.server.grpc.layout_change import outcome
from nitsum_jax.server.grpc.status import reported
from nitsum_jax.server.operations.profiling import Profiler
from nitsum_jax.server.proto import admin_pb2, admin_pb2_grpc
from nitsum_jax.server.security.key_file import KeyFile
from nitsum_jax.server.state import ServerState

SERVICE_NAME = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """nitsum.v1.AdminService; the guard has seen to it that an administrator calls."""

    def __init__(self, profiler: Profiler, state: ServerState, keys: KeyFile | None = None) -> None:
        self._profiler = profiler
        self._state = state
        self._keys = keys

    async def Profile(self, message: admin_pb2.ProfileRequest, context: ServicerContext) -> admin_pb2.ProfileResponse:
        """Records a trace of the profiler; see admin.proto."""
        async with reported(context, "Profile", lambda: 1.0):
            return admin_pb2.ProfileResponse(folder=str(await self._profiler.record(message.seconds)))
        raise AssertionError("unreachable: reported() ends the call")

    async def GetControl(
        self, message: admin_pb2.GetControlRequest, context: ServicerContext
    ) -> admin_pb2.ControlState:
        """Explains the last decision; see admin.proto."""
        async with reported(context, "GetControl", lambda: 1.0):
            return _state(self._control())
        raise AssertionError("unreachable: reported() ends the call")

    async def SetControl(
        self, message: admin_pb2.SetControlRequest, context: ServicerContext
    ) -> admin_pb2.ControlState:
        """Pauses or resumes the controller; see admin.proto."""
        async with reported(context, "SetControl", lambda: 1.0):
            control = self._control()
            (control.pause if message.paused else control.resume)()
            return _state(control)
        raise AssertionError("unreachable: reported() ends the call")

    async def ForceLayout(
        self, message: admin_pb2.ForceLayoutRequest, context: ServicerContext
    ) -> admin_pb2.ForceLayoutResponse:
        """Changes the layout and keeps the controller from changing it back; see admin.proto."""
        async with reported(context, "ForceLayout", lambda: 1.0):
            backend = self._backend()
            future = backend.engine.set_layout(message.layout)  # refuses first what cannot be
            if backend.control is not None and backend.control.mode != "off":
                backend.control.pause()
            report = await outcome(future)
            return admin_pb2.ForceLayoutResponse(
                from_layout=report.from_layout,
                to_layout=report.to_layout,
                stall_ms=report.stall_ms,
                sequences=report.sequences,
            )
        raise AssertionError("unreachable: reported() ends the call")

    async def SetDevice(
        self, message: admin_pb2.SetDeviceRequest, context: ServicerContext
    ) -> admin_pb2.SetDeviceResponse:
        """Takes a device out of use, or back into it; see admin.proto."""
        async with reported(context, "SetDevice", lambda: 1.0):
            engine = self._backend().engine
            if message.lost:
                engine.lose_device(message.device)
            else:
                engine.restore_device(message.device)
            # The engine's thread does it at its next turn.
            for _ in range(100):
                if (message.device in engine.lost_devices()) == message.lost:
                    break
                await asyncio.sleep(0.01)
            return admin_pb2.SetDeviceResponse(lost=engine.lost_devices())
        raise AssertionError("unreachable: reported() ends the call")

    async def ReloadKeys(
        self, message: admin_pb2.ReloadKeysRequest, context: ServicerContext
    ) -> admin_pb2.ReloadKeysResponse:
        """Reads the file of API keys again; see admin.proto."""
        del message
        async with reported(context, "ReloadKeys", lambda: 1.0):
            if self._keys is None:
                raise PreconditionError("this server has no API keys: start it with --api_keys")
            try:
                change = self._keys.reload()
            except InvalidInputError as error:  # the call was right
                raise PreconditionError(f"the API keys in force stay: {error}") from None
            return admin_pb2.ReloadKeysResponse(
                keys=change.keys, added=change.added, removed=change.removed, changed=change.changed
            )
        raise AssertionError("unreachable: reported() ends the call")

    def _backend(self) -> Backend:
        return self._state.present()

    def _control(self) -> ControlLoop:
        control = self._backend().control
        if control is None:
            raise PreconditionError("this server has no controller")
        return control


def _state(control: ControlLoop) -> admin_pb2.ControlState:
    told = control.explain()
    return admin_pb2.ControlState(
        mode=str(told.mode),
        paused=told.paused,
        decision_json="" if told.decision is None else json.dumps(told.decision),
        applied=told.applied,
        plan_ms=0.0 if told.plan_s is None else 1000 * told.plan_s,
        failures=told.failures,
    )
