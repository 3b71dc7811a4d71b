"""What every checkpoint format presents: named tensors, read in whole or in part."""

import re
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.blocks import QuantFormat, QuantisedBlocks

# Rotary frequencies: older checkpoints keep them in every layer though they follow from the config, and transformers
# ignores them; of a GGUF file, the config reader has taken them into account.
_HARMLESS = re.compile(
    r".*rotary_emb\.inv_freq|(blk\.\d+\.)?attn_rot_embd(\.weight)?|rope_freqs\.weight|rope_factors_(long|short)\.weight"
)


class TensorSource(Protocol):
    """Tensors under their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`), whatever the file format.

    Matrices are [out features, in features], heads in Hugging Face's RoPE order.  A read returns an array in the
    dtype of the file (quantised formats: float32) that must not be written to, for it may be a view of the file; it
    raises InvalidInputError if the tensor is not there or the file is damaged.
    """

    def names(self) -> Iterable[str]:
        """All tensor names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """The whole tensor."""

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the first axis."""

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the second axis of a matrix."""


@runtime_checkable
class BlockSource(Protocol):
    """A `TensorSource` that has some of its matrices in few bits."""

    def block_format(self, name: str) -> QuantFormat | None:
        """The format that holds a tensor as the checkpoint has it, without rounding; None if it has it in many bits."""

    def read_blocks(self, name: str) -> QuantisedBlocks:
        """A whole tensor that has such a format."""


def block_format(source: TensorSource, name: str) -> QuantFormat | None:
    """`BlockSource.block_format`, None for sources that have nothing in few bits."""
    return source.block_format(name) if isinstance(source, BlockSource) else None


def missing_tensor(name: str, where: object) -> InvalidInputError:
    """The error for a tensor that a checkpoint should have."""
    return InvalidInputError(f"checkpoint {where} has no tensor '{name}'; it is incomplete or of another architecture")


def is_harmless(name: str) -> bool:
    """Whether a tensor changes nothing, whatever the config says."""
    return _HARMLESS.fullmatch(name) is not None
