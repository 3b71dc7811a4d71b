"""A trace of JAX's profiler on request: what the devices and the host did for a few seconds."""

import asyncio
import datetime
import math
import pathlib
from collections.abc import Callable

from nitsum_jax.errors import InvalidInputError, PreconditionError

MAX_SECONDS = 60.0


class Profiler:
    """Records one trace at a time into a folder that the operator has named; requests choose nothing but the length."""

    def __init__(
        self,
        folder: str | None,
        start: Callable[[str], None] | None = None,
        stop: Callable[[], None] | None = None,
    ) -> None:
        """Records nothing yet.

        Args:
          folder: gets a folder per trace; None: no traces.
          start: begins a trace into a folder; JAX's own if None.
          stop: ends it and writes the files; JAX's own if None.
        """
        self._folder = folder
        self._start = start or _start
        self._stop = stop or _stop
        self._busy = False

    async def record(self, seconds: float) -> pathlib.Path:
        """Records for so long and returns the folder of the trace (open it with TensorBoard or xprof).

        Raises:
          InvalidInputError: the length is out of range.
          PreconditionError: the server was started without --profile_dir, or another trace is being recorded.
        """
        if self._folder is None:
            raise PreconditionError("no folder for traces: start the server with --profile_dir=FOLDER")
        if not (math.isfinite(seconds) and 0 < seconds <= MAX_SECONDS):
            raise InvalidInputError(f"seconds={seconds:g} is out of range: give more than 0, at most {MAX_SECONDS:g}")
        if self._busy:
            raise PreconditionError("another trace is being recorded: try again when it is done")
        self._busy = True
        try:
            stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
            folder = pathlib.Path(self._folder) / stamp
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise PreconditionError(
                    f"--profile_dir={self._folder} cannot be written: {error.strerror or error}"
                ) from None
            await asyncio.to_thread(self._start, str(folder))
            try:
                await asyncio.sleep(seconds)
            finally:
                # Also when the caller has left: a trace that is never stopped would take all memory.
                await asyncio.shield(asyncio.to_thread(self._stop))
            return folder
        finally:
            self._busy = False


def _start(folder: str) -> None:
    import jax

    jax.profiler.start_trace(folder)


def _stop() -> None:
    import jax

    jax.profiler.stop_trace()
