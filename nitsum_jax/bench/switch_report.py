"""The table and the picture of nitsum-bench switch."""

from collections.abc import Sequence

from nitsum_jax.bench.switch_rows import Measured
from nitsum_jax.errors import PreconditionError

_COLUMNS = (
    *(
        "switch",
        "live",
        "context",
        "weights moved",
        "KV moved, MB",
        "ahead, MB",
        "of minimum",
        "stall p50, ms",
        "stall p99, ms",
    ),
    *(
        "in steps",
        "gap p99, ms",
        "old step, ms",
        "new step, ms",
        "host, ms",
        "copy, ms",
        "copy, GB/s",
        "memcpy, GB/s",
        "device_put, ms",
        "recompute, ms",
    ),
    "rebuild, ms",
)


def table(items: Sequence[Measured]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for item in items:
        row, other = item.row, item.row.alternatives
        cells = (
            f"{row.from_layout} -> {row.to_layout}",
            str(row.live_sequences),
            str(row.context_tokens),
            str(row.weight_bytes_moved),
            f"{row.kv_bytes_moved / 1e6:.1f}",
            f"{item.kv_bytes_ahead / 1e6:.1f}",
            f"{row.kv_bytes_moved / row.kv_bytes_minimum:.3f}" if row.kv_bytes_minimum else "-",
            f"{row.stall_ms_p50:.1f}",
            f"{row.stall_ms_p99:.1f}",
            # Of the slower layout: some streams wait for the last step of the old one.
            f"{row.stall_ms_p99 / max(item.decode_step_before_ms, row.decode_step_ms):.2f}",
            f"{item.gap_ms_p99:.1f}",
            f"{item.decode_step_before_ms:.1f}",
            f"{row.decode_step_ms:.1f}",
            f"{item.host_ms:.1f}",
            f"{item.transfer_ms:.1f}",
            f"{row.transfer_gbps:.1f}",
            f"{row.memcpy_gbps:.1f}",
            *(f"{other[name]:.0f}" if name in other else "-" for name in ("device_put", "recompute", "rebuild")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(items: Sequence[Measured], path: str) -> None:
    """Stalls beside a decode step and the alternatives, on a logarithmic axis.

    Raises:
      PreconditionError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise PreconditionError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib, or leave --plot out"
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [item.row for item in items]
    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(rows) + 1.5), layout="constrained")
    labels = [f"{r.from_layout} → {r.to_layout}\n{r.live_sequences} of {r.context_tokens} tokens" for r in rows]
    series: list[tuple[str, str, list[float]]] = [
        ("stall, 99th percentile", "o", [max(row.stall_ms_p99, 0.1) for row in rows]),
        ("one decode step", "|", [row.decode_step_ms for row in rows]),
    ]
    for name in dict.fromkeys(name for row in rows for name in row.alternatives):
        series.append((name, "x", [row.alternatives.get(name, float("nan")) for row in rows]))
    for name, marker, values in series:
        axes.plot(values, range(len(rows)), marker, label=name, markersize=8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25 if len(rows) < 6 else 1.1), ncols=3)
    figure.savefig(path)
    pyplot.close(figure)
