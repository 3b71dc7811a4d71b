"""Numbers with scales: what they hold, and that GGUF's own blocks lose nothing in them."""

import gguf
import numpy as np
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint import gguf_blocks
from nitsum_jax.models.checkpoint.blocks import (
    INT4,
    INT8,
    QuantFormat,
    QuantisedBlocks,
    blocks_of,
    common,
    fitted,
    leaves_of,
    quantised,
)
from nitsum_jax.models.checkpoint.gguf_file import GgufTensor

OUTPUTS, INPUTS = 6, 512
# Where each block has its float16 scales; all other bytes may be any.
HALVES = {
    "Q8_0": slice(0, 2),
    "Q4_0": slice(0, 2),
    "Q5_0": slice(0, 2),
    "Q4_1": slice(0, 4),
    "Q5_1": slice(0, 4),
    "Q4_K": slice(0, 4),
    "Q5_K": slice(0, 4),
    "Q6_K": slice(208, 210),
}


def random_tensor(kind: str) -> GgufTensor:
    rng = np.random.default_rng(len(kind))
    tensor_type = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[tensor_type]
    raw = rng.integers(0, 256, (OUTPUTS, INPUTS // block, size), np.uint8)
    at = HALVES[kind]
    halves = rng.uniform(-0.1, 0.1, (*raw.shape[:2], (at.stop - at.start) // 2)).astype(np.float16)
    raw[:, :, at] = halves.view(np.uint8)
    return GgufTensor("blk.0.ffn_up.weight", (INPUTS, OUTPUTS), tensor_type, raw.reshape(OUTPUTS, -1))


@pytest.mark.parametrize("kind", HALVES)
def test_blocks_of_gguf_are_what_gguf_makes_of_them(kind: str) -> None:
    tensor = random_tensor(kind)
    fmt = gguf_blocks.format_of(tensor)
    assert fmt is not None
    blocks = gguf_blocks.read(tensor)
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(blocks.values(centred=fmt.bits == 4), expected)
    leaves = leaves_of(blocks, fmt)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()} == fmt.leaves(OUTPUTS, INPUTS)
    np.testing.assert_array_equal(blocks_of(leaves, fmt).values(centred=fmt.bits == 4), expected)
    np.testing.assert_array_equal(leaves["peaks"][:, 0], np.abs(expected).max(axis=1))


def test_a_type_without_format_stays_wide() -> None:
    tensor = GgufTensor("x", (256, 4), gguf.GGMLQuantizationType.Q3_K, np.zeros((4, 110), np.uint8))
    assert gguf_blocks.format_of(tensor) is None


@pytest.mark.parametrize(("fmt", "step"), [(INT8, 127), (INT4, 15), (QuantFormat(8, 32, False, "float16"), 127)])
def test_quantised_values_are_within_half_a_step(fmt: QuantFormat, step: int) -> None:
    values = np.random.default_rng(0).standard_normal((16, 96)).astype(np.float32)
    found = quantised(values, fmt).values(centred=False)
    grouped = values.reshape(16, -1, fmt.group or 96)
    size = np.ptp(grouped, axis=2) if fmt.minimum else np.abs(grouped).max(axis=2)
    allowed = (size / step * 0.51 + 2e-3).repeat(fmt.group or 96, axis=1)
    assert (np.abs(found - values) <= allowed).all()


def test_zeros_and_constants_are_kept() -> None:
    for fmt in (INT8, INT4):
        values = np.zeros((2, 64), np.float32)
        np.testing.assert_array_equal(quantised(values, fmt).values(centred=False), values)
    constant = np.full((2, 64), 0.75, np.float32)
    np.testing.assert_array_equal(quantised(constant, INT4).values(centred=False), constant)


@pytest.mark.parametrize("kinds", [("Q4_0", "Q4_1"), ("Q4_K", "Q6_K"), ("Q4_0", "Q8_0"), ("Q4_0", "Q4_0")])
def test_one_format_holds_several_without_loss(kinds: tuple[str, str]) -> None:
    tensors = [random_tensor(kind) for kind in kinds]
    formats = [gguf_blocks.format_of(tensor) for tensor in tensors]
    known = [fmt for fmt in formats if fmt is not None]
    together = common(known)
    for tensor, fmt in zip(tensors, known, strict=True):
        blocks = fitted(gguf_blocks.read(tensor), fmt, together)
        kept = blocks_of(leaves_of(blocks, together), together)
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(kept.values(centred=together.bits == 4), expected)


def test_inputs_are_taken_in_whole_groups() -> None:
    blocks = quantised(np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32), INT4)
    part = blocks.take(slice(1, 3), slice(32, 96))
    np.testing.assert_array_equal(part.values(centred=False), blocks.values(centred=False)[1:3, 32:96])
    with pytest.raises(InvalidInputError, match="cut a group of 32"):
        blocks.take(slice(None), slice(16, 48))
    whole = QuantisedBlocks(np.ones((2, 6), np.int8), np.full((2, 1), 0.5, np.float32))
    assert whole.take(slice(None), slice(1, 3)).values(centred=False).tolist() == [[0.5, 0.5]] * 2
