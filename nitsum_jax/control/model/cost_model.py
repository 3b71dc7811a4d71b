"""What a step, a transfer and a switch take, read from a profile.

The simulator asks for millions of steps, so the way to a step time is short: plain floats, a binary search in a row
that was worked out once for each (TP, number of sequences), and one multiplication.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence

from nitsum_jax.control.model.grids import Plane
from nitsum_jax.control.model.profile import Profile, TpProfile
from nitsum_jax.errors import InvalidInputError

NO_LIMIT = sys.maxsize
"""The last context of a line that never ends."""


class CostModel:
    """Times predicted from a profile; the same question always has the same answer.

    Between the points of the profile's tables times are interpolated linearly, beyond their ends the last two points
    are drawn on.  More work never takes less.

    Attributes:
      profile: what it reads.
      tps: TPs that the profile has, ascending.
      page_size: tokens in a KV block.
      version: grows when predictions have changed so much that what was worked out from them is stale; here never.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.tps = tuple(profile.tps)
        self.page_size = profile.page_size
        self._steps = _ByTp(profile)
        self._mixed = profile.mixed_steps
        self.version = 0

    def observe(
        self, tp: int, seconds: float, sequences: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Takes note of the time of a step.  This model ignores it and keeps to its profile (see `CorrectedCost`)."""

    def learnt(self) -> dict[int, tuple[float, float]]:
        """Per TP, measured over predicted seconds of decoding and of prompts; empty here, where nothing is learnt."""
        return {}

    def step_s(self, tp: int, sequences: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ()) -> float:
        """Seconds of one step; 0 if there is nothing to do.

        Where the profile says that decode and prefill do not share a step, it is the sum of several: one that decodes,
        and one for each chunk.

        Args:
          tp: TP of the instance.
          sequences: sequences that decode one token each.
          context_tokens: tokens of KV cache that they hold together.
          chunks: prefill chunks, each (new tokens, at least 1; context before them).

        Raises:
          InvalidInputError: the profile does not have this TP.
        """
        steps = self._steps[tp]
        if not chunks:
            return steps.decode_s(sequences, context_tokens) if sequences else 0.0
        if self._mixed:
            return steps.mixed_s(sequences, context_tokens, chunks)
        seconds = steps.decode_s(sequences, context_tokens) if sequences else 0.0
        for chunk in chunks:
            seconds += steps.mixed_s(0, 0, (chunk,))
        return seconds

    def chunk_line(
        self, tp: int, sequences: int, context_tokens: int, before: int, chunks: Sequence[tuple[int, int]] = ()
    ) -> Callable[[int], float]:
        """step_s as a function of the size of one more prefill chunk, to search for the size that fits.

        Args:
          tp: TP of the instance.
          sequences: sequences that decode in the step.
          context_tokens: tokens of KV cache that they hold together.
          before: context before the chunk.
          chunks: other chunks of the step, as for step_s.

        Returns:
          New tokens of the chunk, at least 1, to seconds: `step_s(tp, sequences, context_tokens, [*chunks, (new,
          before)])`, to the bit.

        Raises:
          InvalidInputError: the profile does not have this TP.
        """
        steps = self._steps[tp]
        if self._mixed:
            return steps.chunk_line(sequences, context_tokens, before, chunks)
        fixed_s = CostModel.step_s(self, tp, sequences, context_tokens, chunks)  # a subclass corrects the sum
        return lambda new: fixed_s + steps.mixed_s(0, 0, ((new, before),))

    def decode_segment(self, tp: int, sequences: int, context_tokens: int) -> tuple[float, float, int]:
        """The straight piece of step_s, without chunks, that begins at this context.

        Returns:
          (seconds of the step at this context, seconds for each further token of context, the last context_tokens up to
          which that holds).  The last is above context_tokens.

        Raises:
          InvalidInputError: the profile does not have this TP.
        """
        if not sequences:
            return 0.0, 0.0, NO_LIMIT
        knots, values, slopes, base = self._steps[tp].row(sequences)
        i = bisect_right(knots, context_tokens) - 1
        last = len(slopes) - 1
        if i >= last:
            i, limit = last, NO_LIMIT
        else:
            limit = knots[i + 1]
        return base + values[i] + slopes[i] * (context_tokens - knots[i]), slopes[i], limit

    def max_chunk(
        self,
        tp: int,
        sequences: int,
        context_tokens: int,
        context_before: int,
        limit: int,
        budget_s: float,
        chunks: Sequence[tuple[int, int]] = (),
    ) -> int:
        """The most new tokens of one more prefill chunk with which a step stays within a budget; 0 if none do.

        Args:
          tp: TP of the instance.
          sequences: sequences that decode in the step.
          context_tokens: tokens of KV cache that they hold together.
          context_before: context before the chunk.
          limit: most tokens that are wanted.
          budget_s: seconds that the step may take.
          chunks: other chunks of the step, as for step_s.
        """
        step_s = self.chunk_line(tp, sequences, context_tokens, context_before, chunks)
        if limit < 1 or step_s(1) > budget_s:
            return 0
        if step_s(limit) <= budget_s:
            return limit
        low, high = 1, limit  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            if step_s(middle) <= budget_s:
                low = middle
            else:
                high = middle
        return low

    def prefill_s(self, tp: int, prompt_tokens: int, chunk: int = 2048) -> float:
        """Seconds to prefill a prompt in chunks on an instance that does nothing else."""
        starts = range(0, prompt_tokens, chunk)
        return sum(self.step_s(tp, 0, 0, ((min(chunk, prompt_tokens - start), start),)) for start in starts)

    def kv_capacity_tokens(self, tp: int, resident_tp: int | None = None) -> int:
        """Tokens of KV cache that an instance holds.

        Args:
          tp: TP of the instance.
          resident_tp: the least TP whose weights its devices keep beside those of tp, so that a switch moves no
            weights; None if they keep those of tp only.

        Raises:
          InvalidInputError: the profile does not have this TP.
        """
        capacity = self._steps[tp].kv_capacity_tokens
        if resident_tp is None or resident_tp >= tp:
            return capacity
        more = self.profile.weight_bytes * (tp - resident_tp) // resident_tp  # bytes of weights, all devices together
        return max(0, capacity - -(-more // self.profile.kv_bytes_per_token))

    def transfer_s(self, tokens: int, from_tp: int, to_tp: int, pairs: int = 1) -> float:
        """Seconds to move the KV cache of so many tokens from one group of devices to another.

        Each device of a group holds its share of the heads, so the group with fewer devices limits the rate.

        Args:
          tokens: tokens to move, all pairs of groups together; nothing takes no time.
          from_tp: devices in the group that gives.
          to_tp: devices in the group that takes.
          pairs: disjoint pairs of such groups that share the tokens evenly and move them at the same time.
        """
        if tokens <= 0:
            return 0.0
        links = min(from_tp, to_tp) * pairs
        bytes_per_link = tokens * self.profile.kv_bytes_per_token / links
        return self.profile.transfer_latency_s + bytes_per_link / self.profile.link_bytes_per_s

    def switch_s(self, kv_bytes_per_link: float) -> float:
        """Seconds of a layout switch: the host's part, and the copies over the link that carries most bytes."""
        if kv_bytes_per_link <= 0:
            return self.profile.switch_host_s
        copies = self.profile.transfer_latency_s + kv_bytes_per_link / self.profile.link_bytes_per_s
        return self.profile.switch_host_s + copies


_Row = tuple[list[int], list[float], list[float], float]
"""Decode steps of one number of sequences: total contexts, seconds of attention there, slopes after them, and the
seconds of the rest."""


class _Steps:
    """Step times of one TP."""

    def __init__(self, times: TpProfile, host_overhead_s: float) -> None:
        self.kv_capacity_tokens = times.kv_capacity_tokens
        self._times = times
        self._host_s = host_overhead_s
        self._prefill = _Patches(times.prefill_attention)
        # No larger than the sizes that steps have.
        self._rows: dict[int, _Row] = {}
        self._dense_s: dict[int, float] = {}
        self._head_s: dict[int, float] = {}

    def row(self, sequences: int) -> _Row:
        """What decode steps of so many sequences take over their total context."""
        found = self._rows.get(sequences)
        if found is None:
            found = self._rows[sequences] = self._make_row(sequences)
        return found

    def decode_s(self, sequences: int, context_tokens: int) -> float:
        """A step that only decodes."""
        knots, values, slopes, base = self._rows.get(sequences) or self.row(sequences)
        i = bisect_right(knots, context_tokens, 0, len(slopes)) - 1
        return base + values[i] + slopes[i] * (context_tokens - knots[i])

    def mixed_s(self, sequences: int, context_tokens: int, chunks: Sequence[tuple[int, int]]) -> float:
        """A step with at least one chunk."""
        *others, (new, before) = chunks
        return self.chunk_line(sequences, context_tokens, before, others)(new)

    def chunk_line(
        self, sequences: int, context_tokens: int, before: int, chunks: Sequence[tuple[int, int]]
    ) -> Callable[[int], float]:
        """`mixed_s` as a function of one more chunk's size."""
        others = sequences
        first_s = self._host_s
        for new, context in chunks:
            others += new
            first_s += self._prefill.at(new, context)
        rows = sequences + len(chunks) + 1
        head_s = self._head_s.get(rows)
        if head_s is None:
            head_s = self._head_s[rows] = self._times.head.at(rows)
        last_s = 0.0
        if sequences:
            knots, values, slopes, _ = self.row(sequences)
            i = bisect_right(knots, context_tokens, 0, len(slopes)) - 1
            last_s = values[i] + slopes[i] * (context_tokens - knots[i])
        attention, dense = self._prefill.at, self._dense
        return lambda new: first_s + attention(new, before) + (dense(others + new) + head_s) + last_s

    def _dense(self, tokens: int) -> float:
        found = self._dense_s.get(tokens)
        if found is None:
            found = self._dense_s[tokens] = self._times.dense.at(tokens)
        return found

    def _make_row(self, sequences: int) -> _Row:
        table = self._times.decode_attention
        knots = [sequences * mean for mean in table.columns]
        values = [table.at(sequences, mean) for mean in table.columns]
        slopes = [(values[i + 1] - values[i]) / (knots[i + 1] - knots[i]) for i in range(len(knots) - 1)]
        base = self._host_s + self._times.dense.at(sequences) + self._times.head.at(sequences)
        return knots, values, slopes, base


class _ByTp(dict[int, _Steps]):
    """Step times of all TPs of a profile; asked for another, it says which there are."""

    def __init__(self, profile: Profile) -> None:
        super().__init__((tp, _Steps(times, profile.host_overhead_s)) for tp, times in profile.tps.items())
        self._name = profile.name

    def __missing__(self, tp: int) -> _Steps:
        have = ", ".join(str(known) for known in sorted(self))
        raise InvalidInputError(f"profile {self._name} has no TP {tp}: use one of {have}")


class _Patches:
    """A plane, worked out as one polynomial for each patch between four points."""

    def __init__(self, plane: Plane) -> None:
        self._rows, self._columns = plane.rows, plane.columns
        self._last = (len(plane.rows) - 1, len(plane.columns) - 1)
        self._patches = [[self._patch(plane, i, j) for j in range(self._last[1])] for i in range(self._last[0])]

    @staticmethod
    def _patch(plane: Plane, i: int, j: int) -> tuple[int, int, float, float, float, float]:
        s, rows, columns = plane.seconds, plane.rows, plane.columns
        height, width = rows[i + 1] - rows[i], columns[j + 1] - columns[j]
        down, across = s[i + 1][j] - s[i][j], s[i][j + 1] - s[i][j]
        both = s[i + 1][j + 1] - s[i + 1][j] - s[i][j + 1] + s[i][j]
        return rows[i], columns[j], s[i][j], down / height, across / width, both / (height * width)

    def at(self, row: int, column: int) -> float:
        i = bisect_right(self._rows, row, 0, self._last[0]) - 1
        j = bisect_right(self._columns, column, 0, self._last[1]) - 1
        row0, column0, value, down, across, both = self._patches[i][j]
        y, x = row - row0, column - column0
        return value + down * y + (across + both * y) * x
