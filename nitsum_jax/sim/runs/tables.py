"""Logs as columns, for what is computed over all requests or all steps."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nitsum_jax.control.tiers import TierSet
from nitsum_jax.sim.runs.records import RequestRecord, StepRecord

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

# A target is met up to rounding: times are sums of thousands of steps.  The same bound as control/job.py.
_ROUNDING = 1 + 1e-9


@dataclasses.dataclass(frozen=True, slots=True)
class RequestTable:
    """All requests of a run, one row each, in the order of the log.

    Attributes:
      records: as they were read.
      names: names of the tiers, in the order of first use.
      tier: index into names.
      arrival_s, first_token_s, finish_s: nan where a request did not come so far.
      prompt_tokens, output_tokens: lengths.
      met: as the log has it.
    """

    records: tuple[RequestRecord, ...]
    names: tuple[str, ...]
    tier: _Ints
    arrival_s: _Floats
    first_token_s: _Floats
    finish_s: _Floats
    prompt_tokens: _Ints
    output_tokens: _Ints
    met: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, records: Iterable[RequestRecord]) -> "RequestTable":
        """The table of these records."""
        rows = tuple(records)
        names: dict[str, int] = {}
        tier = [names.setdefault(r.tier, len(names)) for r in rows]
        return cls(
            rows,
            tuple(names),
            np.array(tier, np.int64),
            np.array([r.arrival_s for r in rows], np.float64),
            np.array([np.nan if r.first_token_s is None else r.first_token_s for r in rows], np.float64),
            np.array([np.nan if r.finish_s is None else r.finish_s for r in rows], np.float64),
            np.array([r.prompt_tokens for r in rows], np.int64),
            np.array([r.output_tokens for r in rows], np.int64),
            np.array([r.met for r in rows], np.bool_),
        )

    def __len__(self) -> int:
        return len(self.records)

    @property
    def ttft_s(self) -> _Floats:
        """Time to the first token, `[requests]`; nan without one."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> _Floats:
        """Time per output token after the first, `[requests]`; nan for outputs of one token and unfinished ones."""
        gaps = self.output_tokens - 1
        return np.where(gaps > 0, self.finish_s - self.first_token_s, np.nan) / np.maximum(gaps, 1)

    def of_tier(self, name: str) -> npt.NDArray[np.bool_]:
        """Which rows are of this tier, `[requests]`."""
        if name not in self.names:
            return np.zeros(len(self), np.bool_)
        return self.tier == self.names.index(name)

    def recomputed_met(self, tiers: TierSet) -> npt.NDArray[np.bool_]:
        """Which requests met both targets, worked out from their times, `[requests]`.

        Raises:
          InvalidInputError: a request's tier is not among the tiers.
        """
        targets = np.array([(tiers.get(n).ttft_ms, tiers.get(n).tpot_ms) for n in self.names]).reshape(-1, 2)
        ttft_ms, tpot_ms = targets[self.tier, 0], targets[self.tier, 1]
        gaps = self.output_tokens - 1
        # nan compares as false: what did not finish did not meet anything.
        in_time = self.ttft_s * 1000 <= ttft_ms * _ROUNDING
        steady = (self.finish_s - self.first_token_s) * 1000 <= tpot_ms * gaps * _ROUNDING
        return in_time & ~np.isnan(self.finish_s) & (steady | (gaps < 1))


@dataclasses.dataclass(frozen=True, slots=True)
class StepTable:
    """All steps of a run, one row each, in the order of the log.

    Attributes:
      instance, tp, decode_sequences, context_tokens: as in the log.
      start_s, end_s: seconds.
      groups: the groups of devices that occur.
      group: index into groups.
      chunk_at: `[steps + 1]`; the chunks of step i are those from chunk_at[i] to chunk_at[i + 1].
      chunk_tokens, chunk_context: `[chunks]`.
    """

    instance: _Ints
    tp: _Ints
    decode_sequences: _Ints
    context_tokens: _Ints
    start_s: _Floats
    end_s: _Floats
    groups: tuple[tuple[int, ...], ...]
    group: _Ints
    chunk_at: _Ints
    chunk_tokens: _Ints
    chunk_context: _Ints

    @classmethod
    def of(cls, records: Iterable[StepRecord]) -> "StepTable":
        """The table of these records, which are read one by one.

        Raises:
          ValueError: a step has not as many chunk contexts as chunks.
        """
        numbers: list[tuple[int, int, int, int, int]] = []
        times: list[tuple[float, float]] = []
        groups: dict[tuple[int, ...], int] = {}
        at = [0]
        tokens: list[int] = []
        context: list[int] = []
        for r in records:
            group = groups.setdefault(r.devices, len(groups))
            numbers.append((r.instance, r.tp, r.decode_sequences, r.context_tokens, group))
            times.append((r.start_s, r.end_s))
            if r.prefill_tokens or r.prefill_context:
                if len(r.prefill_tokens) != len(r.prefill_context):
                    raise ValueError(f"step {len(numbers)} has not one context for each prefill chunk: {r}")
                tokens += r.prefill_tokens
                context += r.prefill_context
            at.append(len(tokens))
        instance, tp, decode, held, group_of = np.array(numbers, np.int64).reshape(-1, 5).T.copy()
        start_s, end_s = np.array(times, np.float64).reshape(-1, 2).T.copy()
        return cls(
            instance,
            tp,
            decode,
            held,
            start_s,
            end_s,
            tuple(groups),
            group_of,
            np.array(at, np.int64),
            np.array(tokens, np.int64),
            np.array(context, np.int64),
        )

    def __len__(self) -> int:
        return len(self.start_s)

    @property
    def prefill_tokens(self) -> _Ints:
        """New prompt tokens of each step, `[steps]`."""
        total = np.concatenate([[0], np.cumsum(self.chunk_tokens)])
        return total[self.chunk_at[1:]] - total[self.chunk_at[:-1]]

    def busy_device_s(self, edges_s: npt.ArrayLike) -> _Floats:
        """Device seconds spent in steps between neighbouring edges, `[edges - 1]`.

        Args:
          edges_s: `[edges]`, ascending.
        """
        edges = np.asarray(edges_s, np.float64)
        devices = np.array([len(g) for g in self.groups], np.float64)[self.group] if len(self) else np.zeros(0)
        # Work done by time t: all of the steps that ended, a part of those under way; summed as two ramps.
        done = _ramps(self.start_s, devices, edges) - _ramps(self.end_s, devices, edges)
        return np.diff(done)

    def chunks(self) -> Sequence[tuple[tuple[int, int], ...]]:
        """The chunks of each step as (new tokens, context before)."""
        pairs = list(zip(self.chunk_tokens.tolist(), self.chunk_context.tolist(), strict=True))
        at = self.chunk_at.tolist()
        return [tuple(pairs[a:b]) for a, b in itertools.pairwise(at)]

    def roles(self) -> Mapping[int, str]:
        """Role of each instance, inferred from its steps: prefill, decode or mixed."""
        prefills = self.prefill_tokens > 0
        decodes = self.decode_sequences > 0
        found = {}
        for instance, mine in rows_by(self.instance).items():
            does = bool(prefills[mine].any()), bool(decodes[mine].any())
            found[instance] = {(True, False): "prefill", (False, True): "decode"}.get(does, "mixed")
        return found


def rows_by(keys: _Ints) -> dict[int, _Ints]:
    """For each value of keys, ascending, the rows that have it, ascending."""
    order = np.argsort(keys, kind="stable")
    values, starts = np.unique(keys[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True)) if len(keys) else {}


def _ramps(begin_s: _Floats, weight: _Floats, at_s: _Floats) -> _Floats:
    """Sum of weight * max(0, t - begin) over all, at each t."""
    order = np.argsort(begin_s, kind="stable")
    begin, w = begin_s[order], weight[order]
    count = np.searchsorted(begin, at_s, side="right")
    total = np.concatenate([[0.0], np.cumsum(w)])[count]
    moment = np.concatenate([[0.0], np.cumsum(w * begin)])[count]
    return total * at_s - moment
