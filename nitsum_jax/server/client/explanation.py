"""The state of a controller as text for people."""

from collections.abc import Mapping
from typing import Any


def explanation_text(state: Mapping[str, Any]) -> str:
    """Lines about what was decided last.

    Args:
      state: of a ControlState message, with `decision` as an object or None.
    """
    paused = ", paused" if state["paused"] else ""
    lines = [f"planner {state['mode']}{paused}; {state['failures']} decisions failed"]
    decision = state["decision"]
    if decision is None:
        return "\n".join([*lines, "no decision so far"])
    done = "carried out" if state["applied"] else "not carried out" if decision["switch"] else "nothing to change"
    lines += [
        f"at {decision['time_s']:.1f} s, in {state['plan_ms']:.0f} ms: {decision['choice_text']} ({done})",
        f"because {decision['reason']}",
        "load:",
    ]
    loads = [load for load in decision["inputs"]["loads"] if load["rate"] > 0]
    for load in loads:
        prompts = load["prompts"]
        mean = sum(prompts) / max(1, len(prompts))
        lines.append(
            f"  {load['tier']}: {load['rate']:.2f} requests/s, prompts of {mean:.0f} tokens, "
            f"outputs of {load['output']:.0f}"
        )
    rows = [("plan", "goodput/s", "score", "load", "replayed", "attainment")]
    for candidate in decision["candidates"]:
        replayed = candidate["replayed"]
        met = ", ".join(f"{tier} {share:.0%}" for tier, share in candidate["attainment"].items())
        rows.append(
            (
                candidate["plan"],
                f"{candidate['goodput']:.2f}",
                f"{candidate['score']:.3f}",
                f"{candidate['load']:.2f}",
                "-" if replayed is None else f"{replayed:.1%}",
                met,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines.append("candidates, as predicted:")
    lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
