"""From the tensors of a checkpoint to the parameters of vshards, and back.

One table says which piece of which checkpoint tensor lies where in which parameter (`plan`); `pack` follows it in one
direction and `unpack` in the other.  Every parameter has the TP axis first (row-parallel matrices are transposed), so a
vshard is contiguous.  What no piece covers is zero: padding.

Shapes of one vshard, Hk and Gk being its query and KV heads:
`embed.table`, `head.table` [V/K, D]; `layers.{l}.attn.qkv` [(Hk + 2 Gk) A, D], rows of q, then k, then v;
`layers.{l}.attn.qkv_bias` [(Hk + 2 Gk) A]; `layers.{l}.attn.out` [Hk A, D]; `layers.{l}.mlp.gate_up` [2 F/K, D];
`layers.{l}.mlp.down` [F/K, D].  Replicated: `final_norm`, `layers.{l}.attn.norm`, `layers.{l}.mlp.norm` [D];
`layers.{l}.attn.q_norm`, `layers.{l}.attn.k_norm` [A], unless that norm is over all heads (then cut: [Hk A]).
Some families lack norms or have `attn.post_norm` and `mlp.post_norm`.
"""

import dataclasses
import functools
import itertools
import logging
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.blocks import (
    QuantFormat,
    QuantisedBlocks,
    fitted,
    holds,
    leaves_of,
    quantised,
)
from nitsum_jax.models.checkpoint.source import BlockSource, TensorSource, block_format
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.families.tensors import EMBEDDING, FINAL_NORM, HEAD, LayerPart, checkpoint_shapes, layer_parts

_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

_log = logging.getLogger(__name__)
NOTHING: Mapping[str, QuantFormat] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True)
class TensorPiece:
    """A run of rows (or, if `transposed`, columns) of a checkpoint tensor, and its first row in the parameter."""

    tensor: str
    start: int
    stop: int
    row: int = 0
    transposed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedParam:
    """One parameter of one vshard (None: replicated) and the pieces it is made of."""

    name: str
    vshard: int | None
    shape: tuple[int, ...]
    pieces: tuple[TensorPiece, ...]

    def dtype(self, matrices: np.dtype) -> np.dtype:
        """Norms and biases stay float32: they are small, and the arithmetic around them is float32."""
        return matrices if len(self.shape) > 1 else _DTYPES["float32"]

    @property
    def row_parallel(self) -> bool:
        """Whether the first axis is the inputs'."""
        return any(piece.transposed for piece in self.pieces)


def matrix_dtype(name: "str | np.dtype") -> np.dtype:
    """The numpy dtype of "float32", "bfloat16" or "float16".

    Raises:
      InvalidInputError: any other name.
    """
    dtype = _DTYPES.get(str(name))
    if dtype is None:
        raise InvalidInputError(f"dtype '{name}' is not supported; use {', '.join(_DTYPES)}")
    return dtype


def plan(config: ModelConfig, cut: ModelCut) -> Iterator[PlannedParam]:
    """All parameters in loading order: embedding, layer by layer, final norm, head; in each, vshard by vshard."""
    yield from _table("embed.table", EMBEDDING, config, cut)
    for layer in range(config.num_layers):
        yield from _layer(layer, config, cut)
    yield _replicated("final_norm", FINAL_NORM, config.d_model)
    if not config.tied_head:
        yield from _table("head.table", HEAD, config, cut)


@functools.lru_cache(maxsize=16)
def row_parallel(config: ModelConfig, cut: ModelCut) -> frozenset[str]:
    """Names of the parameters whose first axis is the inputs'."""
    return frozenset(param.name for param in plan(config, cut) if param.row_parallel)


def cut_bytes(
    config: ModelConfig, cut: ModelCut, dtype: "str | np.dtype", formats: Mapping[str, QuantFormat] = NOTHING
) -> tuple[int, int]:
    """Bytes of one vshard, and bytes of the replicated parameters that every device holds once."""
    matrices, cut_total, replicated_total = matrix_dtype(dtype), 0, 0
    inputs_first = row_parallel(config, cut)
    for param in plan(config, cut):
        leaves = stored(param, formats, param.name in inputs_first, param.dtype(matrices))
        size = sum(math.prod(shape) * of.itemsize for shape, of in leaves.values())
        if param.vshard is None:
            replicated_total += size
        elif param.vshard == 0:
            cut_total += size
    return cut_total, replicated_total


def stored(
    param: PlannedParam, formats: Mapping[str, QuantFormat], inputs_first: bool, dtype: np.dtype
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Names, shapes and types of the arrays that a parameter is kept as: itself, or those of its format."""
    fmt = formats.get(param.name)
    if fmt is None:
        return {param.name: (param.shape, dtype)}
    outputs, inputs = param.shape[::-1] if inputs_first else param.shape
    return {f"{param.name}.{leaf}": what for leaf, what in fmt.leaves(outputs, inputs).items()}


def pack(
    config: ModelConfig,
    cut: ModelCut,
    source: TensorSource,
    dtype: "str | np.dtype",
    formats: Mapping[str, QuantFormat] = NOTHING,
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Reads a checkpoint as vshards.

    Every piece is read when its parameter is due, so no more than one parameter of one vshard is in memory here.

    Args:
      config: the model.
      cut: how it is cut.
      source: the checkpoint.
      dtype: of the matrices and the embedding; norms and biases are float32.
      formats: of the parameters that are kept in few bits; each yields several arrays, see `stored`.

    Yields:
      (parameter name, vshard or None for replicated, array); the array belongs to the caller.

    Raises:
      InvalidInputError: a tensor is missing or has another shape than the config says.
    """
    matrices = matrix_dtype(dtype)
    check_tensors(config, source)
    reader, inputs_first = _BlockReader(source), row_parallel(config, cut)
    loss = _Loss()
    for param in plan(config, cut):
        fmt = formats.get(param.name)
        if fmt is None:
            yield param.name, param.vshard, _assemble(param, source, param.dtype(matrices))
            continue
        blocks = _blocks(param, fmt, param.name in inputs_first, reader, loss)
        for leaf, value in leaves_of(blocks, fmt).items():
            yield f"{param.name}.{leaf}", param.vshard, value
    loss.tell()


def check_tensors(config: ModelConfig, source: TensorSource) -> None:
    """Raises InvalidInputError if a tensor of this config is missing in the checkpoint or has the wrong shape."""
    for name, shape in checkpoint_shapes(config).items():
        found = source.shape(name)
        if found != shape:
            raise InvalidInputError(
                f"checkpoint tensor '{name}' has shape {list(found)} but the config says {list(shape)}; "
                "config and weights are of different models"
            )


def unpack(
    config: ModelConfig, cut: ModelCut, read: Callable[[str, int | None], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `pack`: whole checkpoint tensors from vshards, padding dropped.

    Args:
      config: the model.
      cut: how it was cut.
      read: (parameter name, vshard or None) -> array.

    Yields:
      (tensor name, array), in model order, one in memory at a time.
    """
    for name in checkpoint_shapes(config):
        yield name, unpack_tensor(config, cut, name, read)


def unpack_tensor(
    config: ModelConfig, cut: ModelCut, name: str, read: Callable[[str, int | None], np.ndarray]
) -> np.ndarray:
    """One checkpoint tensor from vshards; see `unpack`."""
    result: np.ndarray | None = None
    for param, vshard, piece in pieces_by_tensor(cut)[name]:
        value = read(param, vshard)
        if result is None:
            result = np.empty(_shapes(config)[name], value.dtype)
        rows = value[piece.row : piece.row + piece.stop - piece.start]
        if piece.transposed:
            result[:, piece.start : piece.stop] = rows.T
        else:
            result[piece.start : piece.stop] = rows
    assert result is not None, "every tensor has a piece in some vshard"
    return result


@functools.lru_cache(maxsize=4)
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return checkpoint_shapes(config)


@functools.lru_cache(maxsize=4)
def pieces_by_tensor(cut: ModelCut) -> dict[str, list[tuple[str, int | None, TensorPiece]]]:
    """For every checkpoint tensor, (parameter, vshard, piece) that together cover it; replicas are left out."""
    where: dict[str, list[tuple[str, int | None, TensorPiece]]] = {}
    seen: set[tuple[str, int]] = set()
    for param in plan(cut.config, cut):
        for piece in param.pieces:
            if (piece.tensor, piece.start) not in seen:
                seen.add((piece.tensor, piece.start))
                where.setdefault(piece.tensor, []).append((param.name, param.vshard, piece))
    return where


def _assemble(param: PlannedParam, source: TensorSource, dtype: np.dtype) -> np.ndarray:
    covered = sum(piece.stop - piece.start for piece in param.pieces)
    out = (np.empty if covered == param.shape[0] else np.zeros)(param.shape, dtype)
    for piece in param.pieces:
        rows = out[piece.row : piece.row + piece.stop - piece.start]
        if piece.transposed:
            # Converting before turning the matrix lets both passes run at full speed.
            rows[...] = source.read_columns(piece.tensor, piece.start, piece.stop).astype(dtype, copy=False).T
        else:
            rows[...] = source.read_rows(piece.tensor, piece.start, piece.stop)
    return out


class _BlockReader:
    """Reads matrices of few bits; the last ones are kept, for every vshard of a parameter asks for them."""

    def __init__(self, source: TensorSource):
        self.source = source
        self._last: dict[str, QuantisedBlocks] = {}

    def keeps(self, param: PlannedParam, fmt: QuantFormat) -> bool:
        """Whether the checkpoint has the parameter in bits that this format holds as they are."""
        found = [block_format(self.source, piece.tensor) for piece in param.pieces]
        return all(one is not None and holds(fmt, one) for one in found)

    def read(self, tensor: str, fmt: QuantFormat) -> QuantisedBlocks:
        """A whole tensor in a format that `keeps` it."""
        if tensor not in self._last:
            assert isinstance(self.source, BlockSource), "it has a format for this tensor"
            of = self.source.block_format(tensor)
            assert of is not None
            if len(self._last) > 2:
                self._last.clear()
            self._last[tensor] = fitted(self.source.read_blocks(tensor), of, fmt)
        return self._last[tensor]


class _Loss:
    """How much matrices differ that were quantised here."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._size = self._difference = 0.0

    def add(self, name: str, values: np.ndarray, blocks: QuantisedBlocks, fmt: QuantFormat) -> None:
        """Notes one vshard of a parameter."""
        self._names.add(name)
        kept = blocks.values(centred=fmt.bits == 4 and not fmt.minimum)
        self._size += float(np.square(values).sum(dtype=np.float64))
        self._difference += float(np.square(kept - values).sum(dtype=np.float64))

    def tell(self) -> None:
        """Says it, if there is anything to say."""
        if self._names and self._size > 0:
            share = math.sqrt(self._difference / self._size)
            _log.info(
                "%d parameters were quantised here and differ by %.2f %% (root mean square)",
                len(self._names),
                100 * share,
            )


def _blocks(
    param: PlannedParam, fmt: QuantFormat, inputs_first: bool, reader: _BlockReader, loss: _Loss
) -> QuantisedBlocks:
    outputs, inputs = param.shape[::-1] if inputs_first else param.shape
    if not reader.keeps(param, fmt):
        values = _assemble(param, reader.source, _DTYPES["float32"])
        values = values.T if inputs_first else values
        made = quantised(values, fmt)
        loss.add(param.name, values, made, fmt)
        return made
    group = fmt.group or inputs
    # Padding, of which a whole vshard may be, has scales and minimums of 0, so its numbers do not matter.
    numbers = np.zeros((outputs, inputs), np.uint8 if fmt.bits == 4 else np.int8)
    scales = np.zeros((outputs, inputs // group), np.float32)
    minimums = np.zeros_like(scales) if fmt.minimum else None
    for piece in param.pieces:
        whole = reader.read(piece.tensor, fmt)
        to = slice(piece.row, piece.row + piece.stop - piece.start)
        if piece.transposed:
            part = whole.take(slice(None), slice(piece.start, piece.stop))
            at = (slice(None), to)
            groups = (slice(None), slice(to.start // group, -(-to.stop // group)))
        else:
            part = whole.take(slice(piece.start, piece.stop))
            at, groups = (to, slice(None)), (to, slice(None))
        numbers[at] = part.numbers
        scales[groups] = part.scales
        if minimums is not None:
            minimums[groups] = part.minimums
    return QuantisedBlocks(numbers, scales, minimums)


def _layer(layer: int, config: ModelConfig, cut: ModelCut) -> Iterator[PlannedParam]:
    target, vshards, parts = f"layers.{layer}", range(cut.num_vshards), layer_parts(config, layer)
    d, a = config.d_model, config.head_dim

    def norm(name: str) -> PlannedParam:
        return _replicated(f"{target}.{name}", parts[name].tensor, *parts[name].shape)

    if config.pre_norms:
        yield norm("attn.norm")
    if config.qk_norm:
        for which, heads in (("q", cut.q_head_of), ("k", cut.kv_head_of)):
            name, part = f"{target}.attn.{which}_norm", parts[f"attn.{which}_norm"]
            if not config.wide_qk_norm:
                yield _replicated(name, part.tensor, a)
                continue
            for k in vshards:
                yield PlannedParam(name, k, (len(heads[k]) * a,), tuple(_heads(part, heads[k], a, 0)))
    rows = (cut.q_heads + 2 * cut.kv_heads) * a
    for k in vshards:
        yield PlannedParam(f"{target}.attn.qkv", k, (rows, d), _qkv(parts, "", a, cut, k))
    if config.qkv_bias:
        for k in vshards:
            yield PlannedParam(f"{target}.attn.qkv_bias", k, (rows,), _qkv(parts, "_bias", a, cut, k))
    for k in vshards:
        pieces = tuple(_heads(parts["attn.out"], cut.q_head_of[k], a, 0, transposed=True))
        yield PlannedParam(f"{target}.attn.out", k, (cut.q_heads * a, d), pieces)
    if config.post_norms:
        yield norm("attn.post_norm")
    if config.pre_norms:
        yield norm("mlp.norm")
    for k in vshards:
        span = cut.mlp_range(k)
        gate, up = _span(parts["mlp.gate"], span, 0), _span(parts["mlp.up"], span, cut.d_mlp)
        yield PlannedParam(f"{target}.mlp.gate_up", k, (2 * cut.d_mlp, d), gate + up)
    for k in vshards:
        pieces = _span(parts["mlp.down"], cut.mlp_range(k), 0, transposed=True)
        yield PlannedParam(f"{target}.mlp.down", k, (cut.d_mlp, d), pieces)
    if config.post_norms:
        yield norm("mlp.post_norm")


def _replicated(name: str, tensor: str, width: int) -> PlannedParam:
    return PlannedParam(name, None, (width,), (TensorPiece(tensor, 0, width),))


def _table(name: str, tensor: str, config: ModelConfig, cut: ModelCut) -> Iterator[PlannedParam]:
    whole = LayerPart(name, tensor, 0, (config.vocab_size, config.d_model))
    for k in range(cut.num_vshards):
        yield PlannedParam(name, k, (cut.vocab, config.d_model), _span(whole, cut.vocab_range(k), 0))


def _span(part: LayerPart, span: tuple[int, int], row: int, transposed: bool = False) -> tuple[TensorPiece, ...]:
    start, stop = span
    return (TensorPiece(part.tensor, part.first + start, part.first + stop, row, transposed),) if stop > start else ()


def _qkv(
    parts: Mapping[str, LayerPart], kind: str, head_dim: int, cut: ModelCut, vshard: int
) -> tuple[TensorPiece, ...]:
    q, kv = cut.q_head_of[vshard], cut.kv_head_of[vshard]
    return (
        *_heads(parts[f"attn.q{kind}"], q, head_dim, 0),
        *_heads(parts[f"attn.k{kind}"], kv, head_dim, len(q) * head_dim),
        *_heads(parts[f"attn.v{kind}"], kv, head_dim, (len(q) + len(kv)) * head_dim),
    )


def _heads(
    part: LayerPart, heads: Sequence[int | None], head_dim: int, row: int, transposed: bool = False
) -> Iterator[TensorPiece]:
    """One piece for every run of neighbouring heads."""
    present = [(slot, head) for slot, head in enumerate(heads) if head is not None]
    for _, run in itertools.groupby(present, key=lambda pair: pair[1] - pair[0]):
        members = list(run)
        slot, head = members[0]
        start, stop = part.first + head * head_dim, part.first + (head + len(members)) * head_dim
        yield TensorPiece(part.tensor, start, stop, row + slot * head_dim, transposed)
