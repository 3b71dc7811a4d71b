"""A profile out of a model's size alone, for cells of which nothing was measured.

Only its proportions are meant: reading all weights once takes as long as multiplying them with so many tokens, a token
of context costs its keys and values.  `CorrectedCost` finds the rest out in the first steps.
"""

from collections.abc import Iterable

from nitsum_jax.control.model.grids import Line, Plane
from nitsum_jax.control.model.profile import Profile, TpProfile

_BYTES_PER_S = 20e9
_BALANCE = 16  # tokens in a step from which on arithmetic takes longer than reading the weights
_TOKENS = (1, _BALANCE, 8192)
_ROWS = (1, 1024)
_CONTEXTS = (0, 65536)
_HOST_S = 0.0005


def rough_profile(
    *,
    devices: int,
    tps: Iterable[int],
    weight_bytes: int,
    kv_bytes_per_token: int,
    kv_capacity_tokens: int,
    page_size: int,
    mixed_steps: bool,
) -> Profile:
    """Makes the profile.

    Args:
      devices: of the cell.
      tps: TPs that it can use.
      weight_bytes: of all weights.
      kv_bytes_per_token: all heads and layers.
      kv_capacity_tokens: tokens of KV cache that one device holds.
      page_size: tokens in a KV block.
      mixed_steps: whether a step can hold both decoding and a prompt.
    """
    return Profile(
        name="rough",
        model="by its size",
        device="not measured",
        devices=devices,
        source="an estimate from the size of the weights; corrected by measured steps",
        mixed_steps=mixed_steps,
        page_size=page_size,
        kv_bytes_per_token=kv_bytes_per_token,
        weight_bytes=weight_bytes,
        host_overhead_s=_HOST_S,
        link_bytes_per_s=2e9,
        transfer_latency_s=0.001,
        switch_host_s=0.005,
        device_put_bytes_per_s=1e9,
        tps={tp: _of(tp, weight_bytes, kv_bytes_per_token, kv_capacity_tokens) for tp in tps},
    )


def _of(tp: int, weight_bytes: int, kv_bytes_per_token: int, kv_capacity_tokens: int) -> TpProfile:
    read_s = weight_bytes / _BYTES_PER_S / tp
    token_s = kv_bytes_per_token / _BYTES_PER_S / tp  # of context, for one sequence
    dense = Line(_TOKENS, (read_s, read_s, read_s * _TOKENS[-1] / _BALANCE))
    head = Line(_ROWS, (0.0, 0.0))
    decode = tuple(tuple(rows * context * token_s for context in _CONTEXTS) for rows in _ROWS)
    # A chunk reads its context once, and half of itself for each of its tokens.
    prefill = tuple(
        tuple(new * (context + new / 2) * token_s / _BALANCE for context in _CONTEXTS) for new in (1, 2048, 8192)
    )
    return TpProfile(
        dense,
        head,
        Plane(_ROWS, _CONTEXTS, decode),
        Plane((1, 2048, 8192), _CONTEXTS, prefill),
        kv_capacity_tokens * tp,
    )
