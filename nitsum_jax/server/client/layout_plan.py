"""The client's layout plan: switches asked for while its streams run, by the number of tokens that have come."""

import asyncio
import dataclasses
import re
from collections.abc import Awaitable, Callable

from nitsum_jax.errors import InvalidInputError

_EXAMPLE = '"0:tp1x4,16:tp2x2,32:tp4"'
_BORDER = re.compile(r",(?=\s*\d+\s*:\s*tp)")  # layouts may hold commas and colons of their own: tp2@2,3:decode


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedSwitch:
    """Asks for `layout` once `tokens` tokens have come, counted over all streams of the client."""

    tokens: int
    layout: str


def parse_plan(text: str) -> tuple[PlannedSwitch, ...]:
    """Reads `tokens:layout,tokens:layout,...`; the layouts themselves are for the server to judge.

    Raises:
      InvalidInputError: an entry is malformed, or the token counts do not ascend.
    """
    switches = []
    for entry in _BORDER.split(text):
        count, colon, layout = entry.strip().partition(":")
        if not colon or not count.strip().isdecimal() or not layout.strip():
            raise InvalidInputError(
                f"layout plan entry {entry!r} is not TOKENS:LAYOUT: write a plan such as {_EXAMPLE}"
            )
        switches.append(PlannedSwitch(int(count), layout.strip()))
    counts = [switch.tokens for switch in switches]
    if counts != sorted(set(counts)):
        raise InvalidInputError(f"the token counts of a layout plan must ascend: write a plan such as {_EXAMPLE}")
    return tuple(switches)


class PlanRunner:
    """Carries out a plan: `begin` before the streams, `count` with every token, `end` after them."""

    def __init__(self, plan: tuple[PlannedSwitch, ...], switch: Callable[[str], Awaitable[None]]) -> None:
        """`switch` asks the server for a layout and returns when it has it; it may not raise."""
        self._waiting = list(plan)
        self._switch = switch
        self._tokens = 0
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Does the switch planned for token 0, if there is one, and watches the count from then on."""
        await self._do_due()
        self._task = asyncio.create_task(self._watch())

    def count(self, tokens: int) -> None:
        """Notes that so many tokens have come."""
        self._tokens += tokens
        self._more.set()

    async def end(self) -> tuple[PlannedSwitch, ...]:
        """Waits for switches that are due, and returns those whose tokens never came."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._do_due()
        return tuple(self._waiting)

    async def _watch(self) -> None:
        while self._waiting:
            await self._more.wait()
            self._more.clear()
            # Not to be torn by the cancel in end(): the server would finish the switch, and its report would be lost.
            switching = asyncio.ensure_future(self._do_due())
            try:
                await asyncio.shield(switching)
            except asyncio.CancelledError:
                await switching
                raise

    async def _do_due(self) -> None:
        while self._waiting and self._waiting[0].tokens <= self._tokens:
            await self._switch(self._waiting.pop(0).layout)
