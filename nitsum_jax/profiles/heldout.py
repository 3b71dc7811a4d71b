"""How well tables predict points that they were not given: every other point is left out and predicted from the rest.

First kernel by kernel, along each axis of each table; then whole steps, of profiles that are derived from tables
thinned along all axes at once, beside the sum of the times that the full tables hold.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.profiles.derive import Assumptions, dense_s, derive, head_s
from nitsum_jax.profiles.kernels import Kernels
from nitsum_jax.profiles.shapes import MODELS, Device, ModelShape
from nitsum_jax.profiles.tables import Heads, Tables, TimeGrid


@dataclasses.dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of predictions of one kind.

    Attributes:
      kind: what is predicted.
      count: how many points.
      median: half of them are nearer to the measurement.
      p90: nine of ten are.
      bias: median of predicted / measured - 1, with its sign.
    """

    kind: str
    count: int
    median: float
    p90: float
    bias: float

    @classmethod
    def of(cls, kind: str, predicted: np.ndarray, measured: np.ndarray) -> "Errors":
        """Compares; points that were not measured are left out.  At least one was."""
        known = np.isfinite(measured)
        off = predicted[known] / measured[known] - 1
        size = np.abs(off)
        return cls(kind, size.size, float(np.median(size)), float(np.quantile(size, 0.9)), float(np.median(off)))


def every_other(axis: np.ndarray) -> set[int]:
    """Every other value, never the first or last; a multiple of 16 and its successor go or stay together.

    Tables have 128 and 129 because tiles change there: one alone would be predicted by the other.
    """
    values = axis.tolist()
    groups: list[list[int]] = []
    for value in values:
        if groups and value == groups[-1][-1] + 1 and value % 16 == 1 and value > 1:
            groups[-1].append(value)
        else:
            groups.append([value])
    return set(itertools.chain.from_iterable(groups[1:-1:2]))


def thinned(tables: Tables) -> Tables:
    """The tables without every other m, number of sequences, context and prompt."""

    def thin(grid: TimeGrid, *axes: int) -> TimeGrid:
        for axis in axes:
            grid = grid.without(axis, every_other(grid.axes[axis]))
        return grid

    # The same sizes for all ways to reduce, or one would be predicted by the other.
    sizes = every_other(tables.collectives["all_reduce", "nccl", 2].axes[0])
    return dataclasses.replace(
        tables,
        gemm=thin(tables.gemm, 0),
        prefill={heads: thin(grid, 1) for heads, grid in tables.prefill.items()},
        decode={heads: thin(grid, 0, 1) for heads, grid in tables.decode.items()},
        collectives={key: grid.without(0, sizes) for key, grid in tables.collectives.items()},
    )


def kernel_errors(tables: Tables) -> list[Errors]:
    """Errors along each axis of each table; attention of the models' heads only."""
    found = [_product_errors(tables, axis) for axis in range(3)]
    found += [_decode_errors(tables, axis) for axis in range(2)]
    return [*found, _prefill_errors(tables), _reduce_errors(tables)]


def step_errors(tables: Tables, device: Device) -> list[Errors]:
    """Errors of whole steps, of profiles from thinned tables; without what is no measurement: the host, small ops."""
    full, coarse = Kernels(tables), Kernels(thinned(tables))
    rows = []
    for model in MODELS:
        profile = derive(model, device, coarse, Assumptions(host_overhead_s=0.0, small_ops=0.0))
        cost = CostModel(profile)
        for name, chunk in (("decode step", None), ("step with a chunk of 1024 tokens", 1024)):
            pairs = [
                (cost.step_s(tp, n, n * context, [(chunk, 0)] if chunk else []), measured)
                for tp in cost.tps
                for n, context, measured in _measured_steps(model, tp, full, tables, chunk)
                if n * (context + 1) <= profile.tps[tp].kv_capacity_tokens
            ]
            predicted, measured_s = np.array(pairs).T
            rows.append(Errors.of(f"{model.title}, {name}", predicted, measured_s))
    return rows


def _measured_steps(
    model: ModelShape, tp: int, full: Kernels, tables: Tables, chunk: int | None
) -> Iterator[tuple[int, int, float]]:
    """(sequences, context of each, seconds) of steps at points of the attention table that thinning leaves out."""
    heads = (model.H // tp, model.kv_heads(tp), model.A)
    grid = tables.decode[heads]
    counts, contexts = grid.axes[0].tolist(), grid.axes[1].tolist()
    extra = 0.0 if chunk is None else model.L * float(full.prefill([chunk], heads)[0])
    for n in sorted(every_other(grid.axes[0])):
        tokens = n + (chunk or 0)
        rest = float(dense_s(model, tp, full, (tokens,))[0] + head_s(model, tp, full, (n + (chunk is not None),))[0])
        for context in sorted(every_other(grid.axes[1])):
            attention = grid.seconds[counts.index(n), contexts.index(context)]
            if np.isfinite(attention):
                yield n, context, rest + model.L * float(attention) + extra


def _product_errors(tables: Tables, axis: int) -> Errors:
    grid = tables.gemm
    out = every_other(grid.axes[axis])
    coarse = Kernels(dataclasses.replace(tables, gemm=grid.without(axis, out)))
    predicted, measured = [], []
    m_all, n_all, k_all = (points.tolist() for points in grid.axes)
    for (i, n), (j, k) in itertools.product(enumerate(n_all), enumerate(k_all)):
        chosen = [value in out for value in m_all] if axis == 0 else [(n if axis == 1 else k) in out] * len(m_all)
        if any(chosen):
            predicted.append(coarse.matmul(grid.axes[0][chosen], n, k))
            measured.append(grid.seconds[chosen, i, j])
    ahead, real = np.concatenate(predicted), np.concatenate(measured)
    known = np.isfinite(ahead)
    return Errors.of(f"product, over {'mnk'[axis]}", ahead[known], real[known])


def _model_heads() -> list[Heads]:
    return sorted({(model.H // tp, model.kv_heads(tp), model.A) for model in MODELS for tp in (1, 2, 4, 8)})


def _decode_errors(tables: Tables, axis: int) -> Errors:
    predicted, measured = [], []
    for heads in _model_heads():
        grid = tables.decode[heads]
        out = every_other(grid.axes[axis])
        coarse = Kernels(dataclasses.replace(tables, decode={heads: grid.without(axis, out)}))
        chosen = [value in out for value in grid.axes[axis].tolist()]
        predicted.append(np.compress(chosen, coarse.decode(grid.axes[0], grid.axes[1], heads), axis).ravel())
        measured.append(np.compress(chosen, grid.seconds, axis).ravel())
    name = ("sequences", "context")[axis]
    return Errors.of(f"decode attention, over {name}", np.concatenate(predicted), np.concatenate(measured))


def _prefill_errors(tables: Tables) -> Errors:
    predicted, measured = [], []
    for heads in _model_heads():
        grid = tables.prefill[heads]
        out = every_other(grid.axes[1])
        coarse = Kernels(dataclasses.replace(tables, prefill={heads: grid.without(1, out)}))
        chosen = [value in out for value in grid.axes[1].tolist()]
        predicted.append(coarse.prefill(grid.axes[1][chosen], heads))
        measured.append(grid.seconds[grid.axes[0].tolist().index(1), chosen])
    return Errors.of("prefill attention, over the prompt", np.concatenate(predicted), np.concatenate(measured))


def _reduce_errors(tables: Tables) -> Errors:
    predicted, measured = [], []
    full, coarse = Kernels(tables), Kernels(thinned(tables))
    for devices in (2, 4, 8):
        sizes = sorted(every_other(tables.collectives["all_reduce", "nccl", devices].axes[0]))
        predicted.append(coarse.all_reduce(sizes, devices))
        measured.append(full.all_reduce(sizes, devices))
    return Errors.of("all-reduce, over bytes", np.concatenate(predicted), np.concatenate(measured))
