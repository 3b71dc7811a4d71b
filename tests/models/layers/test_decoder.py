"""The decoder against transformers: every config variant, every cut, every degree of tensor parallelism."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.decoder import Decoder
from nitsum_jax.models.layers.norms import rms_norm
from nitsum_jax.models.layers.reduction import Ranks
from tests.engine.reference import causal_attend, decoder_logits, split_decoder, tiny_config, tiny_params
from tests.models.golden import tiny_models

GOLDEN = Path(tiny_models.__file__).with_name("tiny_logits.npz")
# Logits spread over about -8 to 8; what is allowed is a few roundings of float32.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


# These go through steps: tests/models/families/test_variants.py.
STEPPED = ("mistral_window", "gemma2", "gemma3", "phi3", "olmo2", "granite", "smollm3")
FEW = ("llama_yarn", "llama_dynamic", "qwen2_window")  # others have their arithmetic
PLAIN = [variant for variant in tiny_models.VARIANTS if variant not in STEPPED + FEW]
EVERY = [(variant, cut) for variant in PLAIN for cut in ((1, 1), (2, 2), (4, 4))] + [(one, (4, 4)) for one in FEW]
SOME = [(variant, cut) for variant in ("llama_odd", "qwen3") for cut in ((2, 1), (4, 1), (4, 2))]


@pytest.mark.parametrize(("variant", "cut"), EVERY + SOME)
def test_logits_are_those_of_transformers(variant: str, cut: tuple[int, int], golden: dict[str, np.ndarray]) -> None:
    vshards, tp = cut
    model_cut, params = tiny_params(variant, vshards)
    logits = decoder_logits(model_cut, params, tiny_models.token_ids(variant), tp)
    np.testing.assert_allclose(logits, golden[variant], rtol=0, atol=TOLERANCE)


# More vshards than KV heads, and than heads: replicas and whole vshards of zeros.
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_eight_vshards(tp: int, golden: dict[str, np.ndarray]) -> None:
    cut, params = tiny_params("llama_three_heads", 8)
    logits = decoder_logits(cut, params, tiny_models.token_ids("llama_three_heads"), tp)
    np.testing.assert_allclose(logits, golden["llama_three_heads"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", ["llama_odd", "qwen2", "qwen3"])
def test_every_cut_parameter_says_that_ranks_lie_along_its_first_axis(variant: str) -> None:
    cut, params = tiny_params(variant, 4)
    _, state, names = split_decoder(cut, 2)
    specs = dict(nnx.to_flat_state(nnx.get_partition_spec(state)))
    for (path, leaf), (name, slot) in zip(nnx.to_flat_state(state), names, strict=True):
        spec = tuple(specs[path].get_value())
        shape = leaf.get_value().shape
        if slot is None:
            assert all(axis is None for axis in spec), name
            assert shape == params[name, None].shape
        else:
            assert spec == (TP_AXIS,) + (None,) * (len(shape) - 1), name
            assert shape == params[name, slot].shape
    # The decoder's names are those under which checkpoints are packed: nothing is left over on either side.
    assert {name for name, _ in names} == {name for name, _ in params}
    assert {slot for _, slot in names} == {None, 0, 1}


def test_parameters_have_the_type_asked_for() -> None:
    cut = ModelCut.of(tiny_config("qwen2"), 2)
    state = nnx.state(nnx.eval_shape(lambda: Decoder(cut.config, cut, slots=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    for path, leaf in nnx.to_flat_state(state):
        small = any("norm" in str(part) or "bias" in str(part) for part in path)
        assert leaf.get_value().dtype == (jnp.float32 if small else jnp.bfloat16), path


def test_slots_and_ranks_must_make_all_vshards() -> None:
    cut = ModelCut.of(tiny_config("llama_mha"), 4)
    with pytest.raises(ValueError, match="2 slots on 4 devices do not make 4 virtual shards"):
        Decoder(cut.config, cut, slots=2, ranks=Ranks(4), rngs=nnx.Rngs(0))


def test_rows_that_pad_the_vocabulary_cannot_be_chosen() -> None:
    config = tiny_config("llama_odd")  # 93 ids in 4 vshards of 24
    cut = ModelCut.of(config, 4)
    model = Decoder(dataclasses.replace(config, num_layers=1), cut, slots=4, rngs=nnx.Rngs(0))
    logits = np.asarray(model.logits(jnp.ones((2, config.d_model), jnp.float32)))
    assert logits.shape == (2, 96)
    assert np.isfinite(logits[:, :93]).all()
    assert (logits[:, 93:] == -np.inf).all()


def test_causal_attend_is_softmax_over_the_past() -> None:
    rng = np.random.default_rng(0)
    batch, length, slots, heads, groups, width = 2, 5, 2, 4, 2, 8
    q = rng.standard_normal((batch, length, slots, heads, width)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, length, slots, groups, width)).astype(np.float32)
    expected = np.zeros_like(q, np.float64)
    for b, t, s, h in np.ndindex(batch, length, slots, heads):
        keys, values = (x[b, : t + 1, s, h // 2].astype(np.float64) for x in (k, v))
        weights = np.exp(keys @ q[b, t, s, h] / np.sqrt(width))
        expected[b, t, s, h] = weights / weights.sum() @ values
    actual = causal_attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


def test_rms_norm() -> None:
    x = np.random.default_rng(1).standard_normal((3, 7)).astype(np.float32) * 50
    scale = np.linspace(0.5, 2, 7, dtype=np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), expected, rtol=1e-6)
