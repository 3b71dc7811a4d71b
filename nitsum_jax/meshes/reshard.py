"""The general way to move parameters between devices and shardings: whatever is not in place is put there here.

It is `jax.device_put` and so works for every pair of shardings, but it copies, where buffers that are in place already
need only be wrapped (see `weight_bank`).  So a switch of a cell that keeps all weights resident does without it.  Lean
cells fetch the vshards that a layout lacks with it, and `nitsum-bench switch` measures what moving everything costs.
"""

import math
from typing import Any

import jax

_Box = tuple[tuple[int, int], ...]  # per axis, start and stop


def reshard(tree: Any, shardings: Any) -> tuple[Any, int]:
    """Puts a tree of arrays where the shardings say.

    Args:
      tree: pytree of `jax.Array` or numpy arrays, of any shapes.
      shardings: one sharding (or device) for all leaves, or a tree of them that is a prefix of `tree`.

    Returns:
      The tree with its leaves placed (dispatched, not waited for), and the bytes that land on a device which did not
      have them before: 0 if everything is there already, the whole size per device for host arrays.

    Raises:
      ValueError: a sharding does not fit the shape of its leaf, or the trees do not match.
    """
    placed = jax.device_put(tree, shardings)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    return placed, sum(_landing_bytes(before, after) for before, after in pairs)


def _landing_bytes(before: object, after: jax.Array) -> int:
    had = _boxes(before) if isinstance(before, jax.Array) else {}
    landing = 0
    for device, box in _boxes(after).items():
        landing += _size(box) - (_size(_overlap(box, had[device])) if device in had else 0)
    return landing * after.dtype.itemsize


def _boxes(array: jax.Array) -> dict[jax.Device, _Box]:
    """Which part of the array each device holds."""
    return {
        device: tuple(s.indices(n)[:2] for s, n in zip(index, array.shape, strict=True))
        for device, index in array.sharding.devices_indices_map(array.shape).items()
    }


def _overlap(a: _Box, b: _Box) -> _Box:
    return tuple((max(a0, b0), max(max(a0, b0), min(a1, b1))) for (a0, a1), (b0, b1) in zip(a, b, strict=True))


def _size(box: _Box) -> int:
    return math.prod(stop - start for start, stop in box)
