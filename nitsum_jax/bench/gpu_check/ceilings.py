"""What the device can do at most, measured in the same run, and the time that a step would need at these rates."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nitsum_jax.bench.gpu_check.shapes import head_parameters, kv_bytes, layer_parameters
from nitsum_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of one device: bytes read and written per second, and bfloat16 operations per second."""

    bytes_per_s: float
    flops_per_s: float


def measure(device: jax.Device, *, quick: bool) -> Ceilings:
    """Copies a large array and multiplies large matrices."""
    count, side = (1 << 22, 512) if quick else (1 << 29, 8192)
    array = jax.device_put(jnp.ones(count, jnp.bfloat16), device)
    copy = jax.jit(lambda x: x * jnp.bfloat16(1.5))
    matrix = jax.device_put(jnp.ones((side, side), jnp.bfloat16), device)
    multiply = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.bfloat16) * jnp.bfloat16(1 / side))
    return Ceilings(2 * array.nbytes / _seconds(copy, array), 2 * side**3 / _seconds(multiply, matrix))


def roofline_ms(
    config: ModelConfig, ceilings: Ceilings, *, batch: int, tokens: int, context: int, beside: int = 0
) -> float:
    """Milliseconds that a step needs at least: every weight and cached key and value read once, every product made.

    Args:
      config: the model, of which weights and KV are bfloat16.
      ceilings: rates.
      batch: sequences.
      tokens: new tokens of each.
      context: tokens of each in the cache.
      beside: others that decode in the same step, with as much context.
    """
    size = 2 * (config.num_layers * layer_parameters(config) + head_parameters(config))
    size += (batch * (context + tokens) + beside * (context + 1)) * config.num_layers * kv_bytes(config, 2)
    flops = 2 * (batch * tokens + beside) * config.num_layers * layer_parameters(config)
    flops += 2 * (batch + beside) * head_parameters(config)
    attended = batch * tokens * (context + tokens / 2) + beside * (context + 1 / 2)
    flops += int(4 * config.num_layers * config.num_heads * config.head_dim * attended)
    return 1000 * max(size / ceilings.bytes_per_s, flops / ceilings.flops_per_s)


def _seconds(run: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    jax.block_until_ready(run(argument))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5):
            result = run(argument)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / 5)
    return float(np.min([statistics.median(times), *times]))
