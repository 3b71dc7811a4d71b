"""Blocks of GGUF files as numbers and scales, none of them rounded.

A block holds 32 or 256 neighbouring inputs of one output.  The layouts are those of ggml-common.h.
"""

from collections.abc import Callable

import gguf
import numpy as np

from nitsum_jax.models.checkpoint.blocks import QuantFormat, QuantisedBlocks
from nitsum_jax.models.checkpoint.gguf_file import GgufTensor

_K_SUBBLOCKS, _K_SCALE_BYTES = 8, 12


def format_of(tensor: GgufTensor) -> QuantFormat | None:
    """The format that holds a matrix as it is; None if there is none."""
    known = _FORMATS.get(tensor.tensor_type.name)
    return known[0] if known is not None and len(tensor.shape) == 2 else None


def read(tensor: GgufTensor) -> QuantisedBlocks:
    """A whole matrix that has a format."""
    _, unpacked = _FORMATS[tensor.tensor_type.name]
    _, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    outputs = len(tensor.data)
    numbers, scales, minimums = unpacked(np.ascontiguousarray(tensor.data).reshape(-1, size))
    return QuantisedBlocks(
        numbers.reshape(outputs, -1),
        scales.reshape(outputs, -1),
        None if minimums is None else minimums.reshape(outputs, -1),
    )


_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _half(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _q8_0(raw: np.ndarray) -> _Parts:
    return raw[:, 2:].view(np.int8), _half(raw[:, :2]), None


def _q4_0(raw: np.ndarray) -> _Parts:
    return _nibbles(raw[:, 2:]), _half(raw[:, :2]), None


def _q4_1(raw: np.ndarray) -> _Parts:
    return _nibbles(raw[:, 4:]), _half(raw[:, :2]), _half(raw[:, 2:4])


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw, axis=1, bitorder="little")


def _q5_0(raw: np.ndarray) -> _Parts:
    numbers = _nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6]) << 4
    return numbers.astype(np.int8) - np.int8(16), _half(raw[:, :2]), None


def _q5_1(raw: np.ndarray) -> _Parts:
    numbers = _nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8]) << 4
    return numbers, _half(raw[:, :2]), _half(raw[:, 2:4])


def _k_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minimums of the eight groups of a block, 6 bits each, times those of the block."""
    packed = raw[:, 4 : 4 + _K_SCALE_BYTES].reshape(-1, 3, 4)
    first, second, rest = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 2) & 48], axis=1).astype(np.float32)
    minimums = np.concatenate([second & 63, (rest >> 4) | (second >> 2) & 48], axis=1).astype(np.float32)
    return scales * _half(raw[:, :2]), -minimums * _half(raw[:, 2:4])


def _q4_k(raw: np.ndarray) -> _Parts:
    numbers = _nibbles(raw[:, 4 + _K_SCALE_BYTES :].reshape(-1, 4, 32))
    return (numbers, *_k_scales(raw))


def _q5_k(raw: np.ndarray) -> _Parts:
    at = 4 + _K_SCALE_BYTES
    low = _nibbles(raw[:, at + 32 :].reshape(-1, 4, 32)).reshape(-1, _K_SUBBLOCKS, 32)
    high = raw[:, None, at : at + 32] >> np.arange(_K_SUBBLOCKS, dtype=np.uint8)[None, :, None] & 1
    return (low | high << 4, *_k_scales(raw))


def _q6_k(raw: np.ndarray) -> _Parts:
    low = raw[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[None, None, :, None] & 15
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[None, None, :, None] & 3
    numbers = (low.reshape(-1, 8, 32) | high.reshape(-1, 8, 32) << 4).astype(np.int8) - np.int8(32)
    return numbers, raw[:, 192:208].view(np.int8).astype(np.float32) * _half(raw[:, 208:210]), None


_FORMATS: dict[str, tuple[QuantFormat, Callable[[np.ndarray], _Parts]]] = {
    "Q8_0": (QuantFormat(8, 32, False, "float16"), _q8_0),
    "Q4_0": (QuantFormat(4, 32, False, "float16"), _q4_0),
    "Q4_1": (QuantFormat(4, 32, True, "float16"), _q4_1),
    "Q5_0": (QuantFormat(8, 32, False, "float16"), _q5_0),
    "Q5_1": (QuantFormat(8, 32, True, "float16"), _q5_1),
    "Q4_K": (QuantFormat(4, 32, True, "float32"), _q4_k),
    "Q5_K": (QuantFormat(8, 32, True, "float32"), _q5_k),
    "Q6_K": (QuantFormat(8, 16, False, "float32"), _q6_k),
}
