"""How the figures look, and how they become part of a page."""

import base64
import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nitsum_jax.errors import PreconditionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
MUTED = "#7b8794"
RULE = "#d5dbe1"
ACCENT = "#c8334d"
GOOD = "#2a9d8f"

# The degree is an order, so its colours are one as well: the darker, the wider.
_TP = {1: "#c9e7c3", 2: "#86cfbd", 4: "#44b3c6", 8: "#2385bb", 16: "#2a57a0", 32: "#1b2f78", 64: "#0d1848"}
# Names have no order.
_NAMES = ("#c8334d", "#2f6f9f", "#e0932f", "#4a8f5b", "#7d5ba6", "#8c6d46", "#3aa6a6", "#b0568a", "#5c6b7a", "#a3a838")
_HATCH = {"mixed": "", "prefill": "////", "decode": "\\\\\\\\"}

_RC: Mapping[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#e8ecf0",
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",  # looks the same wherever it is read
    "svg.hashsalt": "nitsum",  # the same figure gives the same bytes
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Figures made and saved inside look alike.

    Raises:
      PreconditionError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise PreconditionError("a report needs matplotlib, which is not installed: pip install matplotlib") from None
    settings: Any = _RC  # typed as names of all settings there are
    with mpl.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, inches; not known to any window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tp_colour(tp: int) -> str:
    """Colour of a TP."""
    return _TP.get(tp, _TP[max(known for known in _TP if known <= max(tp, 1))])


def hatch(role: str) -> str:
    """Pattern of a role."""
    return _HATCH[role]


def name_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in order."""
    return {name: _NAMES[i % len(_NAMES)] for i, name in enumerate(names)}


def percent_axis(axes: "Axes") -> None:
    """A vertical axis from 0 to 100 %."""
    axes.set_ylim(-0.02, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])


def svg_uri(figure: "Figure") -> str:
    """The figure as a data: address."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode("ascii")
