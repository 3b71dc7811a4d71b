"""The gRPC methods of administration."""

from grpc.aio import ServicerContext

from nitsum_jax.server.profiling import Profiler
from nitsum_jax.server.proto import admin_pb2, admin_pb2_grpc
from nitsum_jax.server.status import reported

SERVICE_NAME = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """nitsum.v1.AdminService; the guard has seen to it that an administrator calls."""

    def __init__(self, profiler: Profiler) -> None:
        self._profiler = profiler

    async def Profile(self, message: admin_pb2.ProfileRequest, context: ServicerContext) -> admin_pb2.ProfileResponse:
        """Records a trace of the profiler; see admin.proto."""
        async with reported(context, "Profile", lambda: 1.0):
            return admin_pb2.ProfileResponse(folder=str(await self._profiler.record(message.seconds)))
        raise AssertionError("unreachable: reported() ends the call")
