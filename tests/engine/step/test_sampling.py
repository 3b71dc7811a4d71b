"""Sampling against a numpy reference written from the definitions, and the invariances that seeds promise."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.engine.step import sampling
from nitsum_jax.engine.step.packing import steering
from nitsum_jax.engine.step.sampling import NO_TOKEN, SamplingArrays, combine, greedy_local, gumbel_noise, sample, sound
from nitsum_jax.meshes.mesh import TP_AXIS

# Tests share few shapes, as every shape is a compile.
ROWS, VOCAB, LENGTH = 64, 300, 24
jit_sample = jax.jit(partial(sample, candidates=16))
jit_sample_with = {16: jit_sample} | {n: jax.jit(partial(sample, candidates=n)) for n in (0, 2, 128)}
Array = np.ndarray


def arrays(batch: int = ROWS, **fields: Any) -> SamplingArrays:
    """Greedy rows with seeds 0, 1, ... at position 8 of a 4-token prompt, changed by `fields` (scalars or [B])."""
    base = SamplingArrays.greedy(batch)
    changes: dict[str, Any] = {"seed": np.arange(batch), "position": 8, "prompt_len": 4} | fields
    return dataclasses.replace(
        base, **{k: jnp.asarray(np.broadcast_to(v, batch).astype(getattr(base, k).dtype)) for k, v in changes.items()}
    )


def history(batch: int = ROWS) -> jax.Array:
    return jnp.zeros((batch, LENGTH), jnp.int32)


def normal(shape: tuple[int, ...], scale: float, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def kept_tokens(logits: Array, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Array:
    """Ids that survive the filters, by sorting: temperature, then top-k, top-p, min-p, each renormalising."""
    scaled = logits.astype(np.float64) / temperature
    order = np.lexsort((np.arange(len(scaled)), -scaled))
    if top_k > 0:
        order = order[: int(top_k)]
    if top_p < 1:
        p = np.exp(scaled[order] - scaled[order[0]])
        p /= p.sum()
        order = order[: 1 + int(np.sum(np.cumsum(p)[:-1] < np.float32(top_p)))]
    p = np.exp(scaled[order] - scaled[order[0]])
    return order[p >= min_p]


def reference(logits: Array, params: SamplingArrays) -> Array:
    """The whole draw in numpy; only the noise is the module's own (its distribution is tested apart)."""
    batch, vocab = logits.shape
    every = jnp.asarray(np.broadcast_to(np.arange(vocab, dtype=np.int32), (batch, vocab)))
    noise = np.asarray(jax.jit(gumbel_noise)(params.seed, params.position, every))
    out = np.zeros(batch, np.int64)
    for b in range(batch):
        t, k, p, m = (float(a[b]) for a in (params.temperature, params.top_k, params.top_p, params.min_p))
        if t == 0:
            out[b] = np.argmax(logits[b])
            continue
        kept = np.sort(kept_tokens(logits[b], t, int(k), p, m))
        out[b] = kept[np.argmax((logits[b, kept].astype(np.float64) - logits[b].max()) / t + noise[b, kept])]
    return out


# In order of rank: ids 1, 3, 6 (tied at 0.2), 4, 8 (tied at 0.1), 7, 0, 5, 2, 9 (tied at 0.02).
TEN = np.log(np.array([0.05, 0.2, 0.02, 0.2, 0.1, 0.03, 0.2, 0.08, 0.1, 0.02], np.float32))
EVERY = list(range(10))
FIXED_CASES: list[tuple[dict[str, float], list[int]]] = [
    ({}, EVERY),
    ({"top_k": 1}, [1]),
    ({"top_k": 2}, [1, 3]),
    ({"top_k": 4}, [1, 3, 4, 6]),
    ({"top_k": 9}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ({"top_k": 10}, EVERY),
    ({"top_k": 1000}, EVERY),
    ({"top_p": 0.01}, [1]),
    ({"top_p": 0.35}, [1, 3]),
    ({"top_p": 0.65}, [1, 3, 4, 6]),
    ({"top_p": 0.97}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ({"min_p": 0.45}, [1, 3, 4, 6, 8]),
    ({"min_p": 1.0}, [1, 3, 6]),
    ({"top_k": 4, "top_p": 0.5}, [1, 3]),  # 0.4 of the 0.7 that top-k left; half of everything would need three
    ({"top_k": 6, "top_p": 0.99, "min_p": 0.45}, [1, 3, 4, 6, 8]),
    ({"top_k": 5, "min_p": 0.6}, [1, 3, 6]),
    ({"top_k": 2, "top_p": 0.4}, [1]),  # the third of the tied tokens must not count
]
DRAWS = 256
MANY = DRAWS * len(FIXED_CASES)


@pytest.mark.parametrize("candidates", [0, 2, 128])
def test_filters_keep_exactly_these_tokens(candidates: int) -> None:
    params = arrays(
        MANY,
        temperature=1.0,
        top_k=np.repeat([case.get("top_k", 0) for case, _ in FIXED_CASES], DRAWS),
        top_p=np.repeat([case.get("top_p", 1) for case, _ in FIXED_CASES], DRAWS),
        min_p=np.repeat([case.get("min_p", 0) for case, _ in FIXED_CASES], DRAWS),
    )
    got = np.asarray(jit_sample_with[candidates](jnp.asarray(np.tile(TEN, (MANY, 1))), params, history(MANY)))
    for (case, expected), ids in zip(FIXED_CASES, got.reshape(-1, DRAWS), strict=True):
        assert set(ids.tolist()) == set(expected), case


def test_the_reference_keeps_exactly_these_tokens() -> None:
    for case, expected in FIXED_CASES:
        options: dict[str, Any] = dict(case)
        assert sorted(kept_tokens(TEN, 1.0, **options)) == expected, case


@pytest.mark.parametrize("candidates", [0, 16])
@pytest.mark.parametrize("seed", range(4))
def test_draws_equal_the_reference(candidates: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, vocab = ROWS, VOCAB
    logits = normal((batch, vocab), 2.0, seed)
    logits[::2] = np.round(logits[::2] * 4) / 4  # many ties, as bfloat16 logits have
    params = arrays(
        batch,
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0], batch),
        top_k=rng.choice([0, 1, 5, 16, 17, 200, 299, 300, 5000], batch),
        top_p=rng.choice([1.0, 0.999, 0.9, 0.5, 0.01], batch),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.3], batch),
        seed=rng.integers(0, 2**32, batch),
        position=rng.integers(0, 100_000, batch),
    )
    got = jit_sample_with[candidates](jnp.asarray(logits), params, history(batch))
    np.testing.assert_array_equal(got, reference(logits, params))


def test_all_rows_at_once_equals_row_by_row() -> None:
    """The form for accelerators; the public function takes the other one on a CPU."""
    batch, vocab = ROWS, VOCAB
    rng = np.random.default_rng(2)
    logits = jnp.asarray(normal((batch, vocab), 2.0))
    params = arrays(
        batch,
        temperature=rng.choice([0.0, 0.5, 1.0], batch),
        top_k=rng.choice([0, 5, 100], batch),
        top_p=rng.choice([1.0, 0.95, 0.3], batch),
        min_p=rng.choice([0.0, 0.1], batch),
    )
    greedy = jnp.asarray(np.argmax(logits, axis=-1).astype(np.int32))
    at_once = jax.jit(sampling._draw, static_argnums=4)(params.temperature > 0, logits, greedy, params, 16)
    np.testing.assert_array_equal(at_once, jit_sample(logits, params, history()))


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.77}, {"min_p": 0.3}, {"top_k": 7, "top_p": 0.7}]
)
@pytest.mark.parametrize("candidates", [0, 128])
def test_distribution_is_softmax_of_what_is_kept(fields: dict[str, Any], candidates: int) -> None:
    draws, temperature = MANY, fields.get("temperature", 1.0)
    params = arrays(draws, **({"temperature": 1.0} | fields))
    logits = jnp.asarray(np.tile(TEN, (draws, 1)))
    ids = np.asarray(jit_sample_with[candidates](logits, params, history(draws)))
    kept = kept_tokens(TEN, **({"temperature": 1.0} | fields))
    p = np.exp(TEN[kept].astype(np.float64) / temperature)
    expected = draws * p / p.sum()
    seen = np.bincount(ids, minlength=10)
    assert seen.sum() == seen[kept].sum()
    chi2, freedom = float(np.sum((seen[kept] - expected) ** 2 / expected)), len(kept) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_noise_is_standard_gumbel_and_independent() -> None:
    n = 20_000
    ids = jnp.asarray(np.broadcast_to(np.arange(n, dtype=np.int32), (3, n)))
    seeds, positions = jnp.asarray([7, 7, 8], jnp.uint32), jnp.asarray([0, 1, 0], jnp.int32)
    noise = np.asarray(jax.jit(gumbel_noise)(seeds, positions, ids), np.float64)
    assert np.isfinite(noise).all()
    for row in noise:
        uniform = np.sort(np.exp(-np.exp(-row)))
        assert np.abs(uniform - (np.arange(n) + 0.5) / n).max() < 1.63 / np.sqrt(n)  # Kolmogorov-Smirnov at 1 %
    correlation = np.corrcoef(np.concatenate([noise, noise[:1, ::-1]]))
    assert np.abs(correlation - np.eye(4)).max() < 4 / np.sqrt(n)


def test_noise_has_a_long_and_finite_tail() -> None:
    smallest, largest = jax.jit(sampling._gumbel_of_bits)(jnp.asarray([0, 2**32 - 1], jnp.uint32))
    assert 22 < float(smallest) < 24
    assert -3 < float(largest) < -2.5


def test_neither_batch_mates_nor_row_nor_batch_size_matter() -> None:
    logits = normal((6, VOCAB), 1.5)
    tokens = np.random.default_rng(4).integers(0, VOCAB, (6, LENGTH)).astype(np.int32)
    mixed = {
        "temperature": np.array([0.0, 1.0, 0.7, 1.0, 1.2, 0.0]),
        "top_k": np.array([0, 0, 10, 200, 0, 0]),
        "top_p": np.array([1, 1, 0.9, 0.99, 0.95, 1]),
        "min_p": np.array([0, 0, 0, 0, 0.05, 0]),
        "repetition": np.array([1, 1, 1.3, 1, 1, 1.2]),
        "seed": np.array([3, 3, 3, 2**32 - 1, 5, 6]),
        "position": np.array([8, 8, 9, 8, 7, 8]),
    }

    def run(rows: list[int]) -> list[int]:
        params = arrays(len(rows), **{k: v[rows] for k, v in mixed.items()})
        ids: list[int] = jit_sample(jnp.asarray(logits[rows]), params, jnp.asarray(tokens[rows])).tolist()
        return ids

    alone = [run([b])[0] for b in range(6)]
    rng = np.random.default_rng(9)
    for mates in ([0, 1, 2, 3, 4, 5], [0, 5], [2], [1, 4]):
        rows = rng.choice(mates, ROWS).tolist()
        assert run(rows) == [alone[b] for b in rows]


def test_seed_and_position_both_change_the_draw() -> None:
    logits = jnp.zeros((ROWS, VOCAB), jnp.float32)
    first, again, moved = (
        np.asarray(jit_sample(logits, arrays(temperature=1.0, position=position), history())) for position in (8, 8, 7)
    )
    assert len(set(first.tolist())) > 50  # 64 seeds over 300 equal tokens
    assert np.sum(first != moved) > 55
    np.testing.assert_array_equal(first, again)


def test_vocabulary_padding_changes_nothing() -> None:
    batch, vocab, padded = ROWS, VOCAB, 1024
    logits = normal((batch, vocab), 1.5)
    params = arrays(
        batch,
        temperature=np.tile([0.0, 1.0, 1.0, 0.8], 16),
        top_k=np.tile([0, 0, 40, 299], 16),
        top_p=np.tile([1.0, 0.9, 1.0, 0.97], 16),
        min_p=np.tile([0.0, 0.0, 0.0, 0.01], 16),
        frequency=0.5,
    )
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, vocab, (batch, LENGTH)), jnp.int32)
    wide = np.full((batch, padded), -np.inf, np.float32)
    wide[:, :vocab] = logits
    np.testing.assert_array_equal(
        jit_sample(jnp.asarray(logits), params, tokens), jit_sample(jnp.asarray(wide), params, tokens)
    )


def test_filters_that_are_off_equal_plain_temperature() -> None:
    logits = jnp.asarray(normal((ROWS, VOCAB), 2.0))
    plain = jit_sample(logits, arrays(temperature=0.9), history())
    assert len(set(plain.tolist())) > 4
    for top_k in (VOCAB, 10_000):
        params = arrays(temperature=0.9, top_k=top_k, top_p=1.0, min_p=0.0)
        np.testing.assert_array_equal(jit_sample(logits, params, history()), plain)


@pytest.mark.parametrize(
    "more", [{"temperature": 0.5}, {"repetition": 1.1}, {"presence": 1.0}, {"biased": True}, {"masked": True}]
)
def test_a_row_calls_for_more_than_the_argmax_only_if_it_samples(more: dict[str, Any]) -> None:
    params = arrays(2, **{name: np.array([0 if name != "repetition" else 1, value]) for name, value in more.items()})
    assert not sampling.all_greedy(params, jnp.array([True, True]))
    assert not sampling.all_greedy(params, jnp.array([False, True]))
    assert sampling.all_greedy(params, jnp.array([True, False]))  # padding, or a chunk in the middle of a prompt


def test_greedy_is_argmax_with_the_lowest_id_on_ties() -> None:
    logits = np.round(normal((ROWS, VOCAB), 1.0) * 2).astype(np.float32)
    expected = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(jit_sample(jnp.asarray(logits), arrays(), history()), expected)
    beside_others = arrays(temperature=np.tile([0.0, 1.0], ROWS // 2))
    got = np.asarray(jit_sample(jnp.asarray(logits), beside_others, history()))
    np.testing.assert_array_equal(got[::2], expected[::2])
    assert (got[1::2] != expected[1::2]).any()


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}])
@pytest.mark.parametrize("candidates", [0, 16])
def test_a_filter_that_leaves_one_token_is_greedy_even_on_ties(fields: dict[str, Any], candidates: int) -> None:
    logits = np.round(normal((ROWS, VOCAB), 1.0) * 2).astype(np.float32)
    got = jit_sample_with[candidates](jnp.asarray(logits), arrays(temperature=1.0, **fields), history())
    np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = normal((ROWS, VOCAB), 5.0)
    for top_p in (0.9, 1.0):
        params = arrays(temperature=temperature, top_p=top_p)
        np.testing.assert_array_equal(jit_sample(jnp.asarray(logits), params, history()), np.argmax(logits, axis=-1))


def penalised_reference(logits: Array, tokens: Array, params: SamplingArrays) -> Array:
    out = logits.astype(np.float64)
    for b in range(len(out)):
        prompt, position = int(params.prompt_len[b]), int(params.position[b])
        for v in range(out.shape[1]):
            if v in tokens[b, :position]:
                r = float(params.repetition[b])
                out[b, v] = out[b, v] / r if out[b, v] > 0 else out[b, v] * r
            count = int(np.sum(tokens[b, prompt:position] == v))
            out[b, v] -= float(params.frequency[b]) * count + float(params.presence[b]) * (count > 0)
    return out


def test_penalties_equal_the_reference() -> None:
    batch, vocab, length = ROWS, VOCAB, LENGTH
    rng = np.random.default_rng(6)
    logits = normal((batch, vocab), 2.0)
    tokens = rng.integers(0, 20, (batch, length)).astype(np.int32)
    position = rng.integers(1, length + 1, batch)
    params = arrays(
        batch,
        position=position,
        prompt_len=rng.integers(1, position + 1),
        repetition=rng.choice([1.0, 1.5, 0.7], batch),
        presence=rng.choice([0.0, 1.0, -0.5], batch),
        frequency=rng.choice([0.0, 0.4, -0.2], batch),
    )
    expected = penalised_reference(logits, tokens, params)
    got = jax.jit(sampling.penalise)(jnp.asarray(logits), params, jnp.asarray(tokens))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        jit_sample(jnp.asarray(logits), params, jnp.asarray(tokens)), np.argmax(expected, axis=-1)
    )
    # What stands behind the position, and ids outside the vocabulary, are not read.
    junk = rng.choice([-1, vocab, 2**31 - 1, 3], (batch, length))
    tokens = np.where(np.arange(length) < position[:, None], tokens, junk).astype(np.int32)
    np.testing.assert_array_equal(jax.jit(sampling.penalise)(jnp.asarray(logits), params, jnp.asarray(tokens)), got)


def test_ids_outside_the_vocabulary_do_not_count() -> None:
    logits = normal((1, 20), 2.0)
    tokens = jnp.asarray([[-1, 20, 2**31 - 1, -20]], jnp.int32)
    params = arrays(1, position=4, prompt_len=0, repetition=2.0, presence=1.0)
    np.testing.assert_array_equal(jax.jit(sampling.penalise)(jnp.asarray(logits), params, tokens), logits)


def test_rows_without_penalties_are_untouched_to_the_bit() -> None:
    logits = normal((4, 50), 3.0)
    logits[1, 3] = -np.inf
    params = arrays(4, repetition=[1, 1, 1.2, 1], frequency=[0, 0, 0, 0.5])
    got = np.asarray(jax.jit(sampling.penalise)(jnp.asarray(logits), params, history(4)))
    np.testing.assert_array_equal(got[:2].view(np.int32), logits[:2].view(np.int32))
    assert got[3, 0] == pytest.approx(logits[3, 0] - 4 * 0.5)


def test_penalties_steer_sampled_rows_too() -> None:
    tokens = jnp.asarray(np.tile([1, 1, 1, 1, 5, 5, 6, 7] + [0] * 16, (MANY, 1)), jnp.int32)
    params = arrays(MANY, temperature=1.0, presence=100.0)
    got = set(jit_sample_with[128](jnp.zeros((MANY, 10), jnp.float32), params, tokens).tolist())
    assert got == {0, 1, 2, 3, 4, 8, 9}  # the output is 5, 5, 6, 7; the prompt's 1 does not count for presence


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}, {"temperature": 1.0, "repetition": 1.5}],
)
def test_whatever_is_in_a_row_some_id_is_drawn(fields: dict[str, Any]) -> None:
    nan, inf = np.nan, np.inf
    logits = [
        [nan, nan, nan, nan, nan, nan],
        [nan, 1.0, nan, nan, nan, nan],
        [-inf, -inf, -inf, -inf, -inf, -inf],
        [0.0, inf, 0.0, nan, -inf, 0.0],
        [-inf, nan, -inf, -inf, -5.0, nan],
    ]
    rows = np.full((ROWS, VOCAB), -inf, np.float32)
    rows[:5, :6] = logits
    got = jit_sample(jnp.asarray(rows), arrays(**fields), history())
    assert got.tolist() == [0, 1, 0, 1, 4] + [0] * (ROWS - 5)


def tp_mesh(tp: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:tp]), (TP_AXIS,))


def test_replicated_and_gathered_logits_under_shard_map() -> None:
    tp, batch, vocab = 4, 8, 64
    logits = jnp.asarray(normal((batch, vocab), 2.0))
    params = arrays(
        batch,
        temperature=np.tile([0.0, 1.0], 4),
        top_k=np.repeat([0, 5], 4),
        top_p=np.tile([1.0, 1.0, 0.9, 0.9], 2),
        repetition=np.tile([1.0, 1.1], 4),
    )
    step = partial(sample, candidates=4)
    expected = jax.jit(step)(logits, params, history(batch))
    same = jax.shard_map(step, mesh=tp_mesh(tp), in_specs=(P(), P(), P()), out_specs=P())
    np.testing.assert_array_equal(jax.jit(same)(logits, params, history(batch)), expected)

    def gathered(local: jax.Array, params: SamplingArrays, tokens: jax.Array) -> jax.Array:
        return step(jax.lax.all_gather(local, TP_AXIS, axis=1, tiled=True), params, tokens)[None]

    each = jax.shard_map(gathered, mesh=tp_mesh(tp), in_specs=(P(None, TP_AXIS), P(), P()), out_specs=P(TP_AXIS))
    for on_one_device in np.asarray(jax.jit(each)(logits, params, history(batch))):
        np.testing.assert_array_equal(on_one_device, expected)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_distributed_argmax_equals_argmax_of_the_row(tp: int) -> None:
    logits = np.round(normal((ROWS, VOCAB), 1.0)).astype(np.float32)  # ties across every device
    logits[0] = -np.inf
    logits[1, 5] = np.nan
    logits[2] = np.nan
    logits[3, 60] = np.inf
    logits[4, 150] = -np.inf
    logits[5:, 290:] = -np.inf  # padding

    def local(part: jax.Array) -> jax.Array:
        offset = jax.lax.axis_index(TP_AXIS) * part.shape[-1]
        return combine(*greedy_local(part, offset, 290), TP_AXIS)

    over = jax.shard_map(local, mesh=tp_mesh(tp), in_specs=P(None, TP_AXIS), out_specs=P())
    got = jax.jit(over)(jnp.asarray(logits))
    broken = np.arange(ROWS) < 5
    np.testing.assert_array_equal(got[broken], NO_TOKEN)
    np.testing.assert_array_equal(got[~broken], np.argmax(logits, axis=-1)[~broken])
    np.testing.assert_array_equal(got[~broken], jit_sample(jnp.asarray(logits), arrays(), history())[~broken])


def test_a_row_is_sound_if_all_its_logits_but_the_padding_are_finite() -> None:
    most = np.finfo(np.float32).max
    rows = np.tile(np.array([0.0, -most, most, 1e-45, -0.0, -np.inf], np.float32), (5, 1))
    rows[1, 0], rows[2, 3], rows[3, 4], rows[4, 5] = np.nan, np.inf, -np.inf, np.nan
    assert sound(jnp.asarray(rows), 100, 105).tolist() == [True, False, False, False, True]
    assert sound(jnp.asarray(rows), 100, 106).tolist() == [False] * 5


# ---- bias and stop tokens


def steered(bias: dict[int, float], stops: tuple[int, ...] = ()) -> Array:
    return steering(SamplingParams(logit_bias=tuple(bias.items())), stops)


def test_bias_is_added_and_stop_tokens_wait_for_their_position() -> None:
    logits = normal((ROWS, VOCAB), 1.0)
    logits[:, 7] = 50  # everybody would say 7, then 9
    logits[:, 9] = 40
    table = np.tile(steered({}), (ROWS, 1))
    table[0] = steered({11: 60.0})
    table[1] = steered({7: -100.0})
    table[2] = steered({299: 49.0}, (7, 9))  # behind what 7 has, and ahead once that is forbidden
    table[3] = steered({}, (7, 299))
    table[4] = steered({11: 60.0}, (7,))  # not in force: see below
    biased = np.arange(ROWS) < 4
    params = arrays(biased=biased & (np.arange(ROWS) != 3), stops_from=np.where(np.isin(np.arange(ROWS), (2, 3)), 9, 0))
    got = np.asarray(jit_sample(jnp.asarray(logits), params, history(), table))
    assert got[:6].tolist() == [11, 9, 299, 9, 7, 7]
    at_nine = dataclasses.replace(params, position=params.position + 1)
    assert np.asarray(jit_sample(jnp.asarray(logits), at_nine, history(), table))[2:4].tolist() == [7, 7]


def test_draws_follow_the_biased_distribution() -> None:
    """A bias is a change of the logits and nothing else: the same seeds draw the same tokens."""
    logits = normal((ROWS, VOCAB), 2.0, 5)
    rng = np.random.default_rng(1)
    bias = dict(zip(rng.permutation(VOCAB)[:250].tolist(), rng.normal(0, 3, 250).tolist(), strict=True))
    changed = logits.copy()
    for token, value in bias.items():
        changed[:, token] += np.float32(value)
    params = arrays(temperature=1.0, top_p=0.95, biased=np.arange(ROWS) % 2 == 0)
    got = jit_sample(jnp.asarray(logits), params, history(), np.tile(steered(bias), (ROWS, 1)))
    expected = np.where(np.arange(ROWS) % 2 == 0, reference(changed, params), reference(logits, params))
    np.testing.assert_array_equal(got, expected)
