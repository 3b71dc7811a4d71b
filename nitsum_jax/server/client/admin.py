"""nitsum-admin: explains and pauses the controller, forces a layout, takes devices out of use, has keys read again."""

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from absl import flags
from google.protobuf import json_format

from nitsum_jax.errors import InvalidInputError, NitsumError, one_line
from nitsum_jax.runtime.progress import ProgressLine
from nitsum_jax.server import cli
from nitsum_jax.server.client import identity_flags
from nitsum_jax.server.client.channel import open_channel
from nitsum_jax.server.client.explanation import explanation_text
from nitsum_jax.server.client.progress import compiling, watched
from nitsum_jax.server.proto import admin_pb2, admin_pb2_grpc, nitsum_pb2_grpc

_NAME = "nitsum-admin"
USAGE = """nitsum-admin COMMAND [VALUE] [flags]: looks after a running server.

  explain           the controller's last decision: what it saw, what it considered, what it chose and why
  pause             no decisions until resume; the layout stays
  resume            decides again
  force LAYOUT      pauses the controller and changes the layout: tp2x4, tp4:prefill+tp1x4:decode, tp4/chat+tp1x4; while
                    its executables are compiled, how far that is comes on stderr
  lose DEVICE       takes a device out of use: its requests are computed anew elsewhere, their streams go on
  restore DEVICE    takes it back into use
  profile SECONDS   records a trace of JAX's profiler
  reload_keys       reads the file of --api_keys again; keys that are not in it any more are refused at once

Exit status: 0 done; 2 wrong command, or refused by the server; 3 the server cannot be reached."""
_WITH_VALUE = ("force", "lose", "restore", "profile")
_COMMANDS = ("explain", "pause", "resume", "reload_keys", *_WITH_VALUE)


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs the tool and returns its exit status."""
    try:
        return asyncio.run(main_async(argv))
    except KeyboardInterrupt:
        return cli.EXIT_INTERRUPTED


async def main_async(argv: Sequence[str]) -> int:
    """Like `main`, on a loop that is running."""
    values = flags.FlagValues()
    identity_flags.define(values)
    flags.DEFINE_bool("json", False, "print the server's answer as JSON", flag_values=values)
    words = [argument for argument in argv[1:] if not argument.startswith("-")]
    try:
        cli.parse(values, [argv[0], *(argument for argument in argv[1:] if argument.startswith("-"))], USAGE)
        command, value = _command(words)
        async with open_channel(values.server, identity_flags.read(values)) as channel:
            answer = await _call(channel, command, value)
    except (cli.HelpRequested, NitsumError) as why:
        return cli.ended(_NAME, why)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            cli.err(f"{_NAME}: no server answers at {values.server}: {one_line(error.details() or '')}")
            return cli.EXIT_UNAVAILABLE
        cli.err(f"{_NAME}: {error.code().name}: {one_line(error.details() or '')}")
        return cli.EXIT_USAGE
    cli.out(json.dumps(_plain(answer)) if values.json else _told(answer))
    return cli.EXIT_OK


def _command(words: Sequence[str]) -> tuple[str, str]:
    if not words or words[0] not in _COMMANDS:
        raise InvalidInputError(f"give one of {', '.join(_COMMANDS)} (--help describes them)")
    wanted = 2 if words[0] in _WITH_VALUE else 1
    if len(words) != wanted:
        raise InvalidInputError(f"{words[0]} takes {'one value' if wanted == 2 else 'no value'} (--help)")
    return words[0], words[1] if wanted == 2 else ""


async def _call(channel: grpc.aio.Channel, command: str, value: str) -> Any:
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    if command == "explain":
        return await stub.GetControl(admin_pb2.GetControlRequest())
    if command in ("pause", "resume"):
        return await stub.SetControl(admin_pb2.SetControlRequest(paused=command == "pause"))
    if command == "reload_keys":
        return await stub.ReloadKeys(admin_pb2.ReloadKeysRequest())
    if command == "force":
        look = compiling(nitsum_pb2_grpc.GenerationServiceStub(channel), value)
        call = stub.ForceLayout(admin_pb2.ForceLayoutRequest(layout=value))
        return await watched(call, f"switching to {value}", look, ProgressLine(_NAME))
    try:
        number = float(value) if command == "profile" else int(value)
    except ValueError:
        raise InvalidInputError(f"{command} {value}: give a number") from None
    if command == "profile":
        return await stub.Profile(admin_pb2.ProfileRequest(seconds=number))
    return await stub.SetDevice(admin_pb2.SetDeviceRequest(device=int(number), lost=command == "lose"))


def _plain(answer: Any) -> dict[str, Any]:
    values: dict[str, Any] = json_format.MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    text = values.pop("decision_json", None)
    if text is not None:
        values["decision"] = json.loads(text) if text else None
    return values


def _told(answer: Any) -> str:
    values = _plain(answer)
    if isinstance(answer, admin_pb2.ControlState):
        return explanation_text(values)
    if isinstance(answer, admin_pb2.ForceLayoutResponse):
        return (
            f"{answer.from_layout} -> {answer.to_layout}: {answer.sequences} sequences moved, "
            f"a stall of {answer.stall_ms:.1f} ms; the controller is paused"
        )
    if isinstance(answer, admin_pb2.SetDeviceResponse):
        return "out of use: " + (", ".join(map(str, answer.lost)) or "none")
    if isinstance(answer, admin_pb2.ReloadKeysResponse):
        changes = [f"{word} {', '.join(values[word])}" for word in ("added", "removed", "changed") if values[word]]
        return f"API keys read again, {answer.keys} in force: " + ("; ".join(changes) or "nothing changed")
    return f"trace in {answer.folder} on the server's machine"


if __name__ == "__main__":
    run()
