"""The workload that --trace, --seconds, --rate_scale and --seed of a command line describe."""

from collections.abc import Callable, Sequence

from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.workloads.stand_ins import open_trace
from nitsum_jax.sim.workloads.traces import parse_trace_flag
from nitsum_jax.sim.workloads.workload import Workload, mix, scale_rate, window


def workload_of(
    traces: Sequence[str],
    tiers: TierSet,
    tiers_source: str,
    *,
    seconds: float | None,
    rate_scale: float,
    seed: int,
    note: Callable[[str], None],
) -> Workload:
    """Reads and mixes traces.

    Args:
      traces: values of --trace: TIER:FILE or TIER:FILE:FORMAT, or a stand-in's name in the file's place.
      tiers: that may be named.
      tiers_source: what error messages call them.
      seconds: length; the traces' own if None.
      rate_scale: factor on the rate.
      seed: seed of everything that is random.
      note: called with a line about what was left out.

    Raises:
      InvalidInputError: a trace is wrong or names an unknown tier.
    """
    parts = []
    for text in traces:
        flag = parse_trace_flag(text)
        found = open_trace(flag, seed=seed, seconds=seconds)
        for name in found.workload.tiers:
            if name not in tiers:
                raise InvalidInputError(
                    f"--trace={text}: {tiers_source} have no tier {name!r}, only {', '.join(tiers.names)}: add"
                    f" [tiers.{name}] to a tiers file"
                )
        if found.skipped:
            note(f"{flag.source}: {found.skipped} requests without output left out")
        parts.append(found.workload)
    whole = mix(parts)
    if seconds is not None:
        whole = window(whole, 0.0, min(seconds, whole.seconds))
    return scale_rate(whole, rate_scale, seed) if rate_scale != 1 else whole
