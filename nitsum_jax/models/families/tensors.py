"""Which tensors a checkpoint of a model has: their Hugging Face names, shapes and what lies where in them."""

from collections.abc import Iterator
from typing import NamedTuple

from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.families.registry import family_of

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class LayerPart(NamedTuple):
    """A part of a layer, such as the weight of its queries, in a checkpoint.

    Attributes:
      name: as in `families.family.LLAMA_PARTS`, with `_bias` behind it if it is a bias.
      tensor: that it lies in.
      first: its first row there; not 0 in a tensor that holds several.
      shape: of the part.
    """

    name: str
    tensor: str
    first: int
    shape: tuple[int, ...]


def layer_parts(config: ModelConfig, layer: int) -> dict[str, LayerPart]:
    """The parts of one layer by name, in the order of the model."""
    names, rows = family_of(config.architecture).parts, dict[str, int]()
    found = {}
    for name, kind, shape in _shapes(config):
        tensor = f"model.layers.{layer}.{names[name]}.{kind}"
        part = name if kind == "weight" else f"{name}_{kind}"
        found[part] = LayerPart(part, tensor, rows.get(tensor, 0), shape)
        rows[tensor] = rows.get(tensor, 0) + shape[0]
    return found


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors a Hugging Face checkpoint of this config has, in model order."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.d_model)}
    for layer in range(config.num_layers):
        for part in layer_parts(config, layer).values():
            shapes[part.tensor] = (part.first + part.shape[0], *part.shape[1:])
    shapes[FINAL_NORM] = (config.d_model,)
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, config.d_model)
    return shapes


def _shapes(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(part, weight or bias, shape) of everything in a layer."""
    d, f, a = config.d_model, config.d_mlp, config.head_dim
    widths = {"q": config.num_heads * a, "k": config.num_kv_heads * a, "v": config.num_kv_heads * a}
    if config.pre_norms:
        yield "attn.norm", "weight", (d,)
    for which, width in widths.items():
        yield f"attn.{which}", "weight", (width, d)
        if config.qkv_bias:
            yield f"attn.{which}", "bias", (width,)
    if config.qk_norm:
        yield "attn.q_norm", "weight", (widths["q"] if config.wide_qk_norm else a,)
        yield "attn.k_norm", "weight", (widths["k"] if config.wide_qk_norm else a,)
    yield "attn.out", "weight", (d, widths["q"])
    if config.post_norms:
        yield "attn.post_norm", "weight", (d,)
    if config.pre_norms:
        yield "mlp.norm", "weight", (d,)
    yield "mlp.gate", "weight", (f, d)
    yield "mlp.up", "weight", (f, d)
    yield "mlp.down", "weight", (d, f)
    if config.post_norms:
        yield "mlp.post_norm", "weight", (d,)
