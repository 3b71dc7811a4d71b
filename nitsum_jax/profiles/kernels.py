"""Times of single kernels, interpolated in the tables.

Products and decode attention are interpolated linearly along each axis, prefill attention (which grows with the square
of the prompt) in the logarithms of both sides.  Beyond the largest size products cost in proportion to it, and the
others are drawn on from their last two points.  heldout.py says how well this predicts points that it was not given.
"""

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.profiles.smooth import drawn_on, linear
from nitsum_jax.profiles.tables import Heads, Tables, TimeGrid

Counts = Sequence[int] | np.ndarray


class Kernels:
    """Kernel times of one kind of device, in seconds, from its tables."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._gemm = RegularGridInterpolator(tables.gemm.axes, tables.gemm.seconds)

    def matmul(self, m: Counts, n: int, k: int) -> np.ndarray:
        """x[m, k] @ w[k, n] for several m; sizes above the table's cost in proportion."""
        points = np.stack(np.broadcast_arrays(np.asarray(m, float), float(n), float(k)), axis=-1)
        low, high = (np.array([axis[end] for axis in self._tables.gemm.axes], float) for end in (0, -1))
        inside = np.clip(points, low, high)
        return self._gemm(inside) * np.prod(np.maximum(points / high, 1), axis=-1)

    def all_reduce(self, size: Counts, devices: int) -> np.ndarray:
        """The faster of the two ways to add up so many bytes over the devices; 0 for one device."""
        if devices == 1:
            return np.zeros(len(size))
        ways = [self._collective("all_reduce", way, devices, size) for way in ("nccl", "one_shot_in_cuda_graph")]
        return np.minimum(*ways)

    def all_gather(self, size: Counts, devices: int) -> np.ndarray:
        """Gathering so many bytes, counted after it; 0 for one device."""
        return np.zeros(len(size)) if devices == 1 else self._collective("all_gather", "nccl", devices, size)

    def link(self) -> tuple[float, float]:
        """(bytes/s from one device to another, seconds before the first byte).

        From the exchange of two devices, in which each sends half of the bytes to the other: the largest rate, and the
        time of the smallest exchange.
        """
        grid = self._collective_grid("alltoall", "nccl", 2)
        return float(np.max(grid.axes[0] / 2 / grid.seconds)), float(np.min(grid.seconds))

    def decode(self, sequences: Counts, context: Counts, heads: Heads) -> np.ndarray:
        """Attention of one layer for one new token a sequence, [sequences, context].

        Where the table has too little context for a number of sequences, its last two points are drawn on.
        """
        grid = self._attention("decode", heads)
        filled = np.array([drawn_on(grid.axes[1], row) for row in grid.seconds])
        across = np.array([linear(grid.axes[1], row, np.asarray(context, float)) for row in filled])
        return np.array([linear(grid.axes[0], column, np.asarray(sequences, float)) for column in across.T]).T

    def prefill(self, prompt: Sequence[float] | np.ndarray, heads: Heads) -> np.ndarray:
        """Causal attention of one layer over one whole prompt; nothing takes no time."""
        grid = self._attention("prefill", heads)
        one = grid.seconds[grid.axes[0].tolist().index(1)]
        known = np.isfinite(one)
        wanted = np.asarray(prompt, float)
        logs = linear(np.log(grid.axes[1][known]), np.log(one[known]), np.log(np.maximum(wanted, grid.axes[1][0])))
        return np.where(wanted > 0, np.exp(logs), 0.0)

    def prefill_chunk(self, new: Counts, context: Counts, heads: Heads) -> np.ndarray:
        """Attention of one layer for chunks of new tokens after a context, [new, context].

        The prefill of both less the prefill of the context, but not less than the prefill of the chunk alone, nor than
        one decode step over the context (which must be read once).
        """
        n, s = np.asarray(new, float)[:, None], np.asarray(context, float)[None, :]
        rest = self.prefill((n + s).ravel(), heads).reshape(n.size, s.size) - self.prefill(s.ravel(), heads)
        alone = self.prefill(n.ravel(), heads)[:, None]
        reading = self.decode([1], context, heads)
        return np.maximum(np.maximum(rest, alone), reading)

    def _attention(self, phase: str, heads: Heads) -> TimeGrid:
        found: TimeGrid | None = getattr(self._tables, phase).get(heads)
        if found is None:
            raise InvalidInputError(
                f"the {phase} attention table has no rows of {heads[0]} query heads, {heads[1]} KV heads and width"
                f" {heads[2]}: add them, or leave out this TP"
            )
        return found

    def _collective_grid(self, op: str, source: str, devices: int) -> TimeGrid:
        found = self._tables.collectives.get((op, source, devices))
        if found is None:
            raise InvalidInputError(f"the collectives table has no rows of {op} by {source} on {devices} devices")
        return found

    def _collective(self, op: str, source: str, devices: int, size: Counts) -> np.ndarray:
        grid = self._collective_grid(op, source, devices)
        return linear(grid.axes[0], grid.seconds, np.maximum(np.asarray(size, float), grid.axes[0][0]))
