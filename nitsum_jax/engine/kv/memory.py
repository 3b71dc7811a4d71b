"""Where the memory of a device goes: weights, KV pool, workspace.  Computed before anything is allocated."""

import dataclasses

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import PoolForm
from nitsum_jax.errors import PreconditionError
from nitsum_jax.meshes import workspace
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut

_GIB = 1 << 30
# Of what is free after weights and workspace; the rest is left to the runtime and, on a CPU, to other programs.
_SHARE = {"cpu": 0.4}
_DEFAULT_SHARE = 0.9
_CPU_LIMIT = 1 * _GIB


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device.

    Attributes:
      weights: of the vshards and replicated parameters that a device holds.
      workspace: temporary arrays of the largest step, an estimate.
      pool: shape of the KV pool.
      tokens: tokens of context that one device holds at TP 1; an instance of TP t holds t times as many.
      free: what the device said was free, or None.
      text: the plan in one line per item.
    """

    weights: int
    workspace: int
    pool: PoolShape
    tokens: int
    free: int | None
    text: str


def workspace_bytes(
    config: ModelConfig, cut: ModelCut, batch: int, chunk: int, platform: str = "cpu", *, fused: bool = False
) -> int:
    """Temporary bytes of the largest step on a device that may run any TP, see `meshes.workspace`.

    Args:
      config: the model.
      cut: its vshards.
      batch: sequences of an instance.
      chunk: tokens of the largest prefill step.
      platform: "cpu", "gpu" or "tpu".
      fused: whether there are steps with both.
    """
    vshards = cut.num_vshards
    return workspace.workspace_bytes(
        width=config.d_model,
        mlp=cut.d_mlp * vshards,
        q_heads=cut.q_heads * vshards,
        kv_heads=cut.kv_heads * vshards,
        head_dim=config.head_dim,
        vocab=cut.vocab * vshards,
        batch=batch,
        chunk=chunk,
        platform=platform,
        fused=fused,
    )


def plan_memory(
    config: ModelConfig,
    cut: ModelCut,
    *,
    dtype: str,
    platform: str,
    devices: int,
    weights: int,
    allocated: int,
    free: int | None,
    max_batch: int,
    max_model_len: int,
    page_size: int,
    chunk: int,
    kv_cache_gib: float | None,
    form: PoolForm = PoolForm(),
    fused: bool = False,
) -> MemoryPlan:
    """Sizes the KV pool.

    Args:
      config: the model.
      cut: its vshards.
      dtype: of the KV cache.
      platform: "cpu", "gpu" or "tpu".  The devices of a CPU share one memory.
      devices: how many.
      weights: bytes of weights per device.
      allocated: bytes of weights of all devices together (emulated devices share copies).
      free: free bytes of a device (of the machine, on a CPU), or None if unknown.
      max_batch: sequences of an instance.
      max_model_len: their greatest length, tokens.
      page_size: tokens per block.
      chunk: tokens of the largest prefill step.
      kv_cache_gib: what the user asked for, or None.
      form: of the pool.
      fused: whether there are steps with both a chunk and a batch.

    Raises:
      PreconditionError: weights, workspace and pool do not fit.
    """
    temporary = workspace_bytes(config, cut, max_batch, chunk, platform, fused=fused)
    one = PoolShape(1, config.num_layers, page_size, cut.kv_heads, config.head_dim, dtype, form)
    page = one.block_bytes * cut.num_vshards  # all vshards of a page: what TP 1 keeps on one device
    useful = max_batch * one.pages(max_model_len) * page
    left = None
    if free is not None:
        left = (free - allocated) // devices - temporary if platform == "cpu" else free - weights - temporary
        if left <= 0:
            raise PreconditionError(
                f"{_gib(weights)} GiB of weights and {_gib(temporary)} GiB of workspace do not fit in {_gib(free)} "
                "GiB: use more devices, a smaller model, --dtype=bfloat16 or a smaller --max_batch"
            )
    if kv_cache_gib is not None:
        size = int(kv_cache_gib * _GIB)
        if left is not None and size > left:
            raise PreconditionError(
                f"a KV cache of {kv_cache_gib:g} GiB per device does not fit: {_gib(max(0, left))} GiB are left per "
                "device beside weights and workspace; lower --kv_cache_gib"
            )
    else:
        size = useful if left is None else min(useful, int(left * _SHARE.get(platform, _DEFAULT_SHARE)))
        if platform == "cpu":
            size = min(size, _CPU_LIMIT)
    blocks = size // page * cut.num_vshards
    smallest = one.chunk_pages * page
    if blocks * one.block_bytes < smallest:
        raise PreconditionError(
            f"a KV cache of {_gib(size)} GiB per device is too small: it must hold {one.chunk_pages * page_size} "
            f"tokens, {_gib(smallest)} GiB; raise --kv_cache_gib"
        )
    pool = dataclasses.replace(one, blocks=blocks)
    tokens = blocks // cut.num_vshards * page_size
    text = "\n".join(
        [
            f"memory per device: weights {_gib(weights)} GiB, KV cache {_gib(blocks * one.block_bytes)} GiB "
            f"({tokens} tokens at TP 1, {dtype}, pages of {page_size}), workspace about {_gib(temporary)} GiB"
            + (
                ""
                if free is None
                else f"; free before: {_gib(free)} GiB{' for all devices' if platform == 'cpu' else ''}"
            ),
            f"cut: {cut.describe()}",
        ]
    )
    return MemoryPlan(weights, temporary, pool, tokens, free, text)


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"
