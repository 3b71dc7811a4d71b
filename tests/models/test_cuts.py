import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.cuts import ModelCut
from tests.models.checkpoint.helpers import tiny_config


def test_groups_are_split_where_they_divide() -> None:
    cut = ModelCut.of(tiny_config(num_heads=8, num_kv_heads=4), 2)
    assert cut.q_head_of == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert cut.kv_head_of == ((0, 1), (2, 3))
    assert cut.padded_fraction == 0.0


def test_smollm2_is_padded_to_four_groups() -> None:
    config = tiny_config(num_heads=9, num_kv_heads=3, head_dim=64, d_model=576, d_mlp=1536, vocab_size=49152)
    cut = ModelCut.of(config, 4)
    assert (cut.padded_heads, cut.padded_kv_heads, cut.d_mlp, cut.vocab) == (12, 4, 384, 12288)
    assert cut.q_head_of[3] == (None, None, None)
    assert cut.kv_head_of == ((0,), (1,), (2,), (None,))
    line = cut.describe()
    assert "query heads 9 -> 12" in line
    assert "KV heads 3 -> 4" in line
    assert "7.7%" in line
    assert "\n" not in line


def test_kv_heads_are_replicated_when_there_are_more_vshards() -> None:
    cut = ModelCut.of(tiny_config(num_heads=8, num_kv_heads=2), 4)
    assert cut.kv_head_of == ((0,), (0,), (1,), (1,))
    assert cut.q_head_of == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_query_heads_that_do_not_split_over_replicas_are_padded() -> None:
    cut = ModelCut.of(tiny_config(num_heads=14, num_kv_heads=2), 4)  # Qwen2.5-0.5B
    assert cut.q_head_of == ((0, 1, 2, 3), (4, 5, 6, None), (7, 8, 9, 10), (11, 12, 13, None))


def test_ranges_of_mlp_and_vocabulary_stop_at_the_real_size() -> None:
    cut = ModelCut.of(tiny_config(d_mlp=5, vocab_size=9), 4)
    assert [cut.mlp_range(k) for k in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert [cut.vocab_range(k) for k in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 9)]


@pytest.mark.parametrize("num_vshards", [0, -1, 3, 6])
def test_only_powers_of_two(num_vshards: int) -> None:
    with pytest.raises(InvalidInputError, match="power of two"):
        ModelCut.of(tiny_config(), num_vshards)


HEADS = st.tuples(st.integers(1, 9), st.integers(1, 8))  # KV heads, query heads per KV head


@hypothesis.given(heads=HEADS, log_vshards=st.integers(0, 4))
def test_every_head_has_one_home_and_reads_its_own_kv_head(heads: tuple[int, int], log_vshards: int) -> None:
    groups, ratio = heads
    cut = ModelCut.of(tiny_config(num_heads=groups * ratio, num_kv_heads=groups), 2**log_vshards)
    placed = [head for vshard in cut.q_head_of for head in vshard if head is not None]
    assert sorted(placed) == list(range(groups * ratio))
    assert {head for vshard in cut.kv_head_of for head in vshard if head is not None} == set(range(groups))
    for q_heads, kv_heads in zip(cut.q_head_of, cut.kv_head_of, strict=True):
        assert (len(q_heads), len(kv_heads)) == (cut.q_heads, cut.kv_heads)
        for i, head in enumerate(q_heads):
            if head is not None:
                assert kv_heads[i // (cut.q_heads // cut.kv_heads)] == head // ratio


@hypothesis.given(heads=HEADS, log_vshards=st.integers(0, 4))
def test_padding_is_never_more_than_the_plain_rule(heads: tuple[int, int], log_vshards: int) -> None:
    groups, ratio = heads
    num_vshards = 2**log_vshards
    cut = ModelCut.of(tiny_config(num_heads=groups * ratio, num_kv_heads=groups), num_vshards)
    padded_groups = -(-groups // num_vshards) * num_vshards
    assert cut.padded_kv_heads == padded_groups
    assert cut.padded_heads <= padded_groups * ratio


@hypothesis.given(heads=HEADS, log_vshards=st.integers(0, 3), seed=st.integers(0, 2**32 - 1))
def test_padded_attention_equals_unpadded(heads: tuple[int, int], log_vshards: int, seed: int) -> None:
    groups, ratio = heads
    tokens, width, model = 5, 4, 6
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(groups * ratio, tokens, width))
    k, v = rng.normal(size=(2, groups, tokens, width))
    out = rng.normal(size=(groups * ratio, width, model))
    whole = sum(_attend(q[h], k[h // ratio], v[h // ratio]) @ out[h] for h in range(groups * ratio))

    def pick(array: np.ndarray, head: int | None) -> np.ndarray:
        return np.zeros_like(array[0]) if head is None else array[head]

    cut = ModelCut.of(tiny_config(num_heads=groups * ratio, num_kv_heads=groups), 2**log_vshards)
    parts = np.zeros((tokens, model))
    for q_heads, kv_heads in zip(cut.q_head_of, cut.kv_head_of, strict=True):
        for i, head in enumerate(q_heads):
            kv = kv_heads[i // (cut.q_heads // cut.kv_heads)]
            parts += _attend(pick(q, head), pick(k, kv), pick(v, kv)) @ pick(out, head)
    np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-12)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.where(np.tri(len(q), dtype=bool), q @ k.T / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ v)
