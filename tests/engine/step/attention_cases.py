"""Batches with random keys and values, old ones in random blocks of a pool, and their attention in numpy."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import PoolForm

LAYERS = 2


def int8_rows(values: np.ndarray) -> np.ndarray:
    """`f32[..., A] -> i8[..., A + 2]`: integers, and behind them the bfloat16 that they are to be multiplied with."""
    least = np.abs(values).max(axis=-1, keepdims=True).astype(np.float64) / 127
    scale = least.astype(ml_dtypes.bfloat16)
    scale = (scale.view(np.uint16) + (scale.astype(np.float64) < least)).astype(np.uint16).view(scale.dtype)  # up
    integers = np.rint(values.astype(np.float64) / scale.astype(np.float64)).astype(np.int8)
    return np.concatenate([integers, scale.view(np.int8)], axis=-1)


def of_int8_rows(stored: np.ndarray) -> np.ndarray:
    """What `int8_rows` stand for: f32[..., A]."""
    scale = np.ascontiguousarray(stored[..., -2:]).view(ml_dtypes.bfloat16)
    return stored[..., :-2].astype(np.float32) * scale.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One attention.

    Attributes:
      shape: of the pool.
      q: f32[B, T, S, H/K, A].
      k: f32[B, T, S, G/K, A].
      v: as k.
      pool: in storage type.
      page_table: i32[B, S, P].
      context: i32[B].
      window: a token sees so many.
      soft_cap: of scores.
    """

    shape: PoolShape
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pool: np.ndarray
    page_table: np.ndarray
    context: np.ndarray
    window: int | None = None
    soft_cap: float | None = None

    @classmethod
    def draw(
        cls,
        contexts: list[int],
        *,
        length: int = 1,
        slots: int = 1,
        heads: int = 4,
        groups: int = 2,
        width: int = 16,
        page_size: int = 16,
        dtype: str = "float32",
        form: PoolForm = PoolForm(),
        seed: int = 0,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Self:
        """Draws one; queries are scaled up so that softmax is far from uniform."""
        rng = np.random.default_rng(seed)
        batch = len(contexts)
        one = PoolShape(1, LAYERS, page_size, groups, width, dtype, form)
        pages = one.pages(max(*contexts, 1))
        blocks = batch * slots * pages + 3
        shape = dataclasses.replace(one, blocks=blocks)

        def normal(*size: int) -> np.ndarray:
            return rng.standard_normal(size).astype(np.float32)

        pool = normal(blocks, *shape.block_shape)
        match dtype:
            case "int8":
                pool = int8_rows(pool[..., :width])
            case "bfloat16":
                pool = pool.astype(ml_dtypes.bfloat16).view(shape.storage_dtype)
            case "float8_e4m3":
                pool = pool.astype(ml_dtypes.float8_e4m3fn).view(shape.storage_dtype)
        page_table = rng.permutation(blocks)[: batch * slots * pages].reshape(batch, slots, pages).astype(np.int32)
        q = 2 * normal(batch, length, slots, heads, width)
        k, v = normal(batch, length, slots, groups, width), normal(batch, length, slots, groups, width)
        return cls(shape, q, k, v, pool, page_table, np.array(contexts, np.int32), window, soft_cap)

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The arguments of an attention before the layer, and those behind it."""
        return tuple(map(jnp.asarray, (self.q, self.k, self.v, self.pool, self.page_table, self.context)))

    def expected(self, layer: int) -> np.ndarray:
        """Plain softmax attention of every query over what it sees, in float64."""
        match self.shape.dtype:
            case "float32":
                stored = self.pool
            case "int8":
                stored = of_int8_rows(self.pool)
            case "float8_e4m3":
                stored = self.pool.view(ml_dtypes.float8_e4m3fn)
            case _:
                stored = self.pool.view(ml_dtypes.bfloat16)
        out = np.zeros(self.q.shape)
        batch, length, slots, heads, width = self.q.shape
        for b, s, h in np.ndindex(batch, slots, heads):
            g = h // (heads // self.k.shape[3])
            pages = stored[self.page_table[b, s], layer][..., g, :].astype(np.float64)  # [P, 2, W, A]
            keys, values = pages.transpose(1, 0, 2, 3).reshape(2, -1, width)[:, : self.context[b]]
            keys = np.concatenate([keys, self.k[b, :, s, g]])
            values = np.concatenate([values, self.v[b, :, s, g]])
            for t in range(length):
                end = self.context[b] + t + 1
                start = 0 if self.window is None else max(0, end - self.window)
                scores = keys[start:end] @ self.q[b, t, s, h].astype(np.float64) / np.sqrt(width)
                if self.soft_cap is not None:
                    scores = self.soft_cap * np.tanh(scores / self.soft_cap)
                weights = np.exp(scores - scores.max())
                out[b, t, s, h] = weights @ values[start:end] / weights.sum()
        return out
