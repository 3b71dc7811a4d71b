"""Hugging Face folders whose matrices are in few bits: compressed-tensors (int8, int4), GPTQ and AWQ (4 bits).

Each keeps several tensors for a matrix; here they are one tensor again, `X.weight`, that can be read as it is kept
(`read_blocks`) or widened.  Activations are never quantised, whatever the folder says of them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.blocks import QuantFormat, QuantisedBlocks
from nitsum_jax.models.checkpoint.safetensors_source import SafetensorsSource

METHODS = ("compressed-tensors", "gptq", "awq")
_WEIGHT = ".weight"
_NIBBLES = 4 * np.arange(8, dtype=np.int32)
# Which output each half byte of an AWQ word holds.
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """A matrix as a folder keeps it.

    Attributes:
      shape: [outputs, inputs].
      format: that holds it without rounding.
    """

    shape: tuple[int, int]
    format: QuantFormat


class _Method(Protocol):
    """One way of keeping matrices."""

    @property
    def suffixes(self) -> Sequence[str]:
        """Of a matrix's tensors; the first one tells that there is a matrix."""

    def kept(self, source: SafetensorsSource, prefix: str) -> _Kept:
        """What the tensors of a matrix are."""

    def blocks(self, source: SafetensorsSource, prefix: str) -> QuantisedBlocks:
        """Its numbers."""


class QuantisedFolder:
    """A `TensorSource` and `BlockSource` over a folder with a quantization_config."""

    def __init__(self, source: SafetensorsSource, config: Mapping[str, Any]):
        """Presents a folder.

        Args:
          source: its tensors.
          config: `quantization_config` of its config.json.

        Raises:
          InvalidInputError: the method or one of its options is not supported.
        """
        self._source = source
        self._method = _method(config)
        known = set(source.names())
        first = self._method.suffixes[0]
        prefixes = [name.removesuffix(first) for name in known if name.endswith(first)]
        if first == _WEIGHT:
            prefixes = [prefix for prefix in prefixes if prefix + self._method.suffixes[1] in known]
        self._kept = {prefix + _WEIGHT: self._method.kept(source, prefix) for prefix in prefixes}
        hidden = {prefix + suffix for prefix in prefixes for suffix in self._method.suffixes}
        self._names = [name for name in source.names() if name not in hidden] + list(self._kept)
        self._last: tuple[str, QuantisedBlocks] | None = None

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._kept[name].shape if name in self._kept else self._source.shape(name)

    def read(self, name: str) -> np.ndarray:
        """The whole tensor."""
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the first axis."""
        if name not in self._kept:
            return self._source.read_rows(name, start, stop)
        return self._values(name, self.read_blocks(name).take(slice(start, stop)))

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the second axis."""
        if name not in self._kept:
            return self._source.read_columns(name, start, stop)
        return self._values(name, self.read_blocks(name))[:, start:stop]

    def block_format(self, name: str) -> QuantFormat | None:
        """The format that holds a tensor as it is kept; None if it is in many bits."""
        return self._kept[name].format if name in self._kept else None

    def read_blocks(self, name: str) -> QuantisedBlocks:
        """A whole tensor that has such a format."""
        if self._last is None or self._last[0] != name:  # a piece of it is asked for by every vshard
            self._last = name, self._method.blocks(self._source, name.removesuffix(_WEIGHT))
        return self._last[1]

    def _values(self, name: str, blocks: QuantisedBlocks) -> np.ndarray:
        return blocks.values(centred=self._kept[name].format.bits == 4)


def _method(config: Mapping[str, Any]) -> _Method:
    name = config.get("quant_method")
    match name:
        case "compressed-tensors":
            return _compressed(config)
        case "gptq" | "awq":
            return _words(config, name)
    raise _unsupported(f"quant_method={name}", f"supported are {', '.join(METHODS)}")


def _unsupported(what: str, hint: str) -> InvalidInputError:
    return InvalidInputError(f"the model's quantization_config has {what}, which is not supported: {hint}")


_OTHER = "take the model in full precision, and --quantization=int8 or int4"


def _compressed(config: Mapping[str, Any]) -> "_Bytes | _Packed":
    groups = config.get("config_groups")
    schemes = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    if len(schemes) != 1 or not isinstance(schemes[0], Mapping):
        raise _unsupported(f"{len(schemes)} config_groups of weights", "it must have one; " + _OTHER)
    weights, form = schemes[0], config.get("format")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy", "tensor")
    if kind != "int":
        raise _unsupported(f"weights of type {kind}", "no step multiplies them; " + _OTHER)
    if weights.get("actorder") not in (None, "static", "weight"):
        raise _unsupported(f"actorder={weights['actorder']}", _OTHER)
    if not weights.get("symmetric", True):
        raise _unsupported("weights with zero points", _OTHER)
    if form in ("int-quantized", "naive-quantized") and bits == 8 and strategy in ("channel", "tensor"):
        return _Bytes()
    if form == "pack-quantized" and bits in (4, 8) and strategy in ("channel", "group"):
        return _Packed(bits)
    raise _unsupported(f"format={form} with num_bits={bits} and strategy={strategy}", _OTHER)


class _Bytes:
    """compressed-tensors, int-quantized: i8[O, I] and a scale per output."""

    suffixes = (_WEIGHT, ".weight_scale")

    def kept(self, source: SafetensorsSource, prefix: str) -> _Kept:
        outputs, inputs = source.stored_shape(prefix + _WEIGHT)
        return _Kept((outputs, inputs), QuantFormat(8))

    def blocks(self, source: SafetensorsSource, prefix: str) -> QuantisedBlocks:
        numbers = source.read_stored(prefix + _WEIGHT)
        scales = source.read_stored(prefix + ".weight_scale").astype(np.float32).reshape(-1, 1)
        if numbers.dtype != np.int8 or len(scales) not in (1, len(numbers)):
            raise _misshapen(prefix)
        return QuantisedBlocks(numbers, np.broadcast_to(scales, (len(numbers), 1)))


class _Packed:
    """compressed-tensors, pack-quantized: numbers side by side in i32, and scales per group or output."""

    suffixes = (".weight_packed", ".weight_scale", ".weight_shape")

    def __init__(self, bits: int):
        self._bits = bits

    def kept(self, source: SafetensorsSource, prefix: str) -> _Kept:
        outputs, inputs = (int(n) for n in source.read_stored(prefix + ".weight_shape"))
        groups = source.stored_shape(prefix + ".weight_scale")[-1]
        words = -(-inputs * self._bits // 32)
        if groups < 1 or inputs % groups or source.stored_shape(prefix + ".weight_packed") != (outputs, words):
            raise _misshapen(prefix)
        # By channel, 4 bits are a group of all inputs: what is cut keeps its scale.
        group = 0 if groups == 1 and self._bits == 8 else inputs // groups
        return _Kept((outputs, inputs), QuantFormat(self._bits, group))

    def blocks(self, source: SafetensorsSource, prefix: str) -> QuantisedBlocks:
        words, inputs = source.read_stored(prefix + ".weight_packed"), self.kept(source, prefix).shape[1]
        scales = source.read_stored(prefix + ".weight_scale").astype(np.float32)
        if self._bits == 4:
            return QuantisedBlocks(_unpacked(words)[:, :inputs], scales)
        numbers = np.ascontiguousarray(words).view(np.uint8)[:, :inputs].astype(np.int16) - 128
        return QuantisedBlocks(numbers.astype(np.int8), scales)


def _words(config: Mapping[str, Any], name: str) -> "_Words":
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise _unsupported(f"bits={bits}", f"of {name} 4 bits are; {_OTHER}")
    if config.get("desc_act"):
        raise _unsupported("desc_act=true", f"its groups lie in no order; {_OTHER}")
    version = str(config.get("version", "gemm")).lower()
    if name == "awq" and version != "gemm":
        raise _unsupported(f"version={version}", f"of awq version gemm is; {_OTHER}")
    return _Words(awq=name == "awq", later=config.get("checkpoint_format") == "gptq_v2")


class _Words:
    """GPTQ and AWQ: inputs first, numbers and zero points in i32 words, scales per group.

    GPTQ packs numbers along the inputs and AWQ along the outputs, in an order of its own; both pack zero points along
    the outputs.  GPTQ keeps zero points less one, but for format gptq_v2.
    """

    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, *, awq: bool, later: bool):
        self._awq = awq
        self._less = 0 if awq or later else 1

    def kept(self, source: SafetensorsSource, prefix: str) -> _Kept:
        rows, columns = source.stored_shape(prefix + ".qweight")
        inputs, outputs = (rows, columns * 8) if self._awq else (rows * 8, columns)
        groups = source.stored_shape(prefix + ".scales")[0]
        sound = groups > 0 and inputs % groups == 0
        if not sound or source.stored_shape(prefix + ".qzeros") != (groups, outputs // 8):
            raise _misshapen(prefix)
        return _Kept((outputs, inputs), QuantFormat(4, inputs // groups, True))

    def blocks(self, source: SafetensorsSource, prefix: str) -> QuantisedBlocks:
        words = source.read_stored(prefix + ".qweight")
        outputs, inputs = self.kept(source, prefix).shape
        scales = source.read_stored(prefix + ".scales").astype(np.float32).T
        if prefix + ".g_idx" in set(source.names()):
            order = source.read_stored(prefix + ".g_idx")
            if not np.array_equal(order, np.arange(inputs) // (inputs // scales.shape[1])):
                raise _unsupported("groups that lie in no order (g_idx)", _OTHER)
        numbers = self._columns(words).T if self._awq else _unpacked(np.ascontiguousarray(words.T))
        zeros = self._columns(source.read_stored(prefix + ".qzeros")).T.astype(np.float32) + self._less
        return QuantisedBlocks(np.ascontiguousarray(numbers).reshape(outputs, inputs), scales, -zeros * scales)

    def _columns(self, words: np.ndarray) -> np.ndarray:
        """Numbers that are packed along the last axis, in their order."""
        numbers = _unpacked(words)
        if not self._awq:
            return numbers
        place = np.argsort(_AWQ_ORDER)
        return numbers.reshape(len(numbers), -1, 8)[:, :, place].reshape(numbers.shape)


def _unpacked(words: np.ndarray) -> np.ndarray:
    """`i32[n, m] -> u8[n, 8 m]`, the lowest half byte first."""
    return ((words[:, :, None] >> _NIBBLES) & 15).astype(np.uint8).reshape(len(words), -1)


def _misshapen(prefix: str) -> InvalidInputError:
    return InvalidInputError(
        f"the quantised tensors of '{prefix}' do not fit each other or the quantization_config: download the model "
        "again"
    )
