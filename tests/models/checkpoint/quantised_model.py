"""A model small enough for tests whose groups of 32 inputs fit eight virtual shards, each matrix in another format."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from nitsum_jax.models.checkpoint.blocks import INT4, INT8, QuantFormat, QuantisedBlocks, quantised
from nitsum_jax.models.checkpoint.quantisation import choose_formats
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.pack import checkpoint_shapes, pack
from tests.engine.reference import ArraySource, Params

CONFIG = ModelConfig(
    name="quantised",
    architecture="llama",
    num_layers=1,
    d_model=64,
    d_mlp=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=96,
    max_context=512,
    eos_ids=(2,),
    bos_id=1,
)
# By channel, and in groups with and without minimums, in 8 and 4 bits; small groups as of Q6_K.
FORMATS = {
    "embed_tokens": QuantFormat(8, 32, False, "float16"),
    "lm_head": INT8,
    "q_proj": INT4,
    "k_proj": INT4,
    "v_proj": QuantFormat(4, 32, False, "float16"),
    "o_proj": QuantFormat(4, 32, False, "float16"),
    "gate_proj": INT4,
    "up_proj": INT4,
    "down_proj": QuantFormat(8, 16, False, "float32"),
}


class KeptSource(ArraySource):
    """Tensors in memory whose matrices are in few bits already; read plainly, they are what these bits say."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._blocks = {n: _blocks(value, _format(n)) for n, value in tensors.items() if value.ndim == 2}
        wide = {n: blocks.values(centred=_format(n).bits == 4) for n, blocks in self._blocks.items()}
        super().__init__({**tensors, **wide})

    def block_format(self, name: str) -> QuantFormat | None:
        return _format(name) if name in self._blocks else None

    def read_blocks(self, name: str) -> QuantisedBlocks:
        return self._blocks[name]


def _format(name: str) -> QuantFormat:
    return FORMATS[name.split(".")[-2]]


def _blocks(value: np.ndarray, fmt: QuantFormat) -> QuantisedBlocks:
    if fmt.bits == 8 or fmt.minimum:
        return quantised(value, fmt)
    scales = (np.abs(value.reshape(len(value), -1, fmt.group)).max(axis=2) / 7).astype(np.float16).astype(np.float32)
    numbers = np.rint(value / scales.repeat(fmt.group, axis=1)) + 8
    return QuantisedBlocks(np.clip(numbers, 0, 15).astype(np.uint8), scales)


def tensors(config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    """Random weights."""
    rng = np.random.default_rng(7)
    return {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else (rng.standard_normal(shape) * (2 / shape[1] ** 0.5)).astype(np.float32)
        for name, shape in checkpoint_shapes(config).items()
    }


@dataclasses.dataclass(frozen=True)
class QuantisedModel:
    """What a rig takes: the cut, its parameters, and the formats of those in few bits."""

    cut: ModelCut
    params: Params
    formats: tuple[tuple[str, QuantFormat], ...]


def quantised_model(num_vshards: int, quantization: str = "auto", dtype: str = "float32") -> QuantisedModel:
    """The model as the engine would load it."""
    source = KeptSource(tensors())
    cut = ModelCut.of(CONFIG, num_vshards)
    formats = choose_formats(quantization, CONFIG, cut, source)
    params = {(name, k): np.asarray(value) for name, k, value in pack(CONFIG, cut, source, dtype, formats)}
    return QuantisedModel(cut, params, tuple(formats.items()))
