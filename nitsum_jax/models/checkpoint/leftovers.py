"""Tensors of a checkpoint that its config has no place for.

Nearly always they mean that config and weights are of different models: a layer too many, biases or norms that the
architecture does not have.  Served without them, the model would talk almost well.
"""

import dataclasses
import logging

import numpy as np

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.source import TensorSource, is_harmless
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.families.tensors import EMBEDDING, HEAD, checkpoint_shapes

_ROWS = 4096
_log = logging.getLogger(__name__)


def with_own_head(config: ModelConfig, source: TensorSource) -> ModelConfig:
    """The config, its head not tied if the checkpoint has another head than the embedding, as in transformers 5."""
    names = set(source.names())
    if not config.tied_head or HEAD not in names or EMBEDDING not in names or _equal(source):
        return config
    _log.warning("the config says that embedding and head are one, but the checkpoint has two that differ: both count")
    return dataclasses.replace(config, tied_head=False)


def refuse_leftovers(config: ModelConfig, source: TensorSource) -> None:
    """Raises InvalidInputError if the checkpoint has tensors that the config has no place for.

    A copy of the embedding as head is none: `with_own_head` has compared it.
    """
    known = checkpoint_shapes(config).keys() | {HEAD}
    left = [name for name in source.names() if name not in known and not is_harmless(name)]
    if left:
        others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise InvalidInputError(
            f"checkpoint tensor '{left[0]}'{others} has no place in a {config.architecture} model of "
            f"{config.num_layers} layers, which is what the config says; config and weights are of different models"
        )


def _equal(source: TensorSource) -> bool:
    shape = source.shape(HEAD)
    if source.shape(EMBEDDING) != shape:
        return False
    starts = range(0, shape[0], _ROWS)
    ends = [min(start + _ROWS, shape[0]) for start in starts]
    return all(
        np.array_equal(source.read_rows(HEAD, start, end), source.read_rows(EMBEDDING, start, end))
        for start, end in zip(starts, ends, strict=True)
    )
