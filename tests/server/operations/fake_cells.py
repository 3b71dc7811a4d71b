"""An engine that says to be several cells, for what operators see."""

from collections.abc import Sequence

from nitsum_jax.runtime.backend import OneCell
from nitsum_jax.runtime.control.layout_log import LayoutChoice, SwitchNote
from tests.server.fake_engine import FakeEngine, FakeStats


class FakeCells(FakeEngine):
    """An engine that says to be two cells of two devices, of which one does not answer to everything."""

    def cell_views(self) -> Sequence[OneCell]:
        stats = FakeStats(1, 3, 8, 25, 100, 1234, 10, 0)
        return (
            OneCell("left", "serving", "tp2", (0, 1), stats, {"interactive": (4, 3), "standard": (2, 2)}),
            OneCell("right", "serving", "tp1x2", (2, 3), FakeStats(0, 0, 8, 100, 100, 66, 5, 0), {}),
            OneCell("new", "joining", "", (), None, {}),
        )

    def cell_notes(self) -> tuple[Sequence[LayoutChoice], Sequence[SwitchNote]]:
        return (
            (LayoutChoice(5.0, "tp2", "chat needs it", cell="left"), LayoutChoice(2.0, "tp1x2", "first", cell="right")),
            (SwitchNote(5.1, "tp1x2", "tp2", cell="left"),),
        )
