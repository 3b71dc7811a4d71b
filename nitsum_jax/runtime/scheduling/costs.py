"""What the scheduler of a live cell predicts with, and at whose pace the cell runs."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from nitsum_jax.control.model.corrected_cost import CorrectedCost
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.rough_profile import rough_profile
from nitsum_jax.engine.batching.pacing import Pace
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.models.checkpoint.blocks import QuantFormat
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.pack import NOTHING, cut_bytes
from nitsum_jax.profiles.library import load_profile

# A paced cell has the KV cache of its target, up to this size per device: memory is all it costs, but there may be
# little.  500,000 tokens of tiny-random; --kv_cache_gib gives more.
_MOST_KV_GIB = 1 / 8


def paced(config: EngineConfig, model: ModelConfig, profile: str, time_scale: float) -> tuple[EngineConfig, CostModel]:
    """Settings of a cell that runs at the pace of a profile.

    Prompts and decoding share steps if those of the target do, or as the flags say of both.

    Args:
      config: what the flags say of the engine.
      model: that makes the tokens.
      profile: name or .json file.
      time_scale: seconds here for a second of the target.

    Raises:
      InvalidInputError: there is no such profile, or it is not sound.
    """
    found = load_profile(profile)
    if config.fused_steps == "auto" and not config.deterministic:
        config = dataclasses.replace(config, fused_steps="on" if found.mixed_steps else "off")
    found = dataclasses.replace(found, mixed_steps=config.fuses("cpu"))
    cost = CostModel(found)
    pace = Pace(cost, found.name, found.kv_bytes_per_token, time_scale)
    kv_gib = config.kv_cache_gib
    if kv_gib is None:
        tp = cost.tps[0]
        tokens = cost.kv_capacity_tokens(tp) / tp  # of one device
        wanted = tokens * _kv_bytes(model, config.vshards or config.devices or 1) / (1 << 30)
        kv_gib = min(wanted, _MOST_KV_GIB)
    return dataclasses.replace(config, pace=pace, tps=cost.tps, kv_cache_gib=kv_gib), cost


def predicted(
    config: EngineConfig,
    model: ModelConfig,
    profile: str | None,
    devices: Sequence[jax.Device],
    formats: Mapping[str, QuantFormat] = NOTHING,
) -> CostModel:
    """A cost model that corrects itself: from a profile, or from the size of the model.

    Its steps hold prompts and decoding together if those of the engine do, whatever the profile says.

    Args:
      config: what the flags say of the engine.
      model: to be served.
      profile: name or .json file; None: the model's size will do.
      devices: of the cell.
      formats: of the parameters that are kept in few bits.

    Raises:
      InvalidInputError: there is no such profile, or it is not sound.
    """
    fused = config.fuses(devices[0].platform)
    if profile is not None:
        return CorrectedCost(dataclasses.replace(load_profile(profile), mixed_steps=fused))
    tps = [1 << i for i in range(len(devices).bit_length())]
    weights, replicated = cut_bytes(model, ModelCut.of(model, 1), "float32", formats)
    return CorrectedCost(
        rough_profile(
            devices=len(devices),
            tps=[tp for tp in tps if tp <= len(devices)],
            weight_bytes=weights + replicated,
            kv_bytes_per_token=_kv_bytes(model, 1),
            kv_capacity_tokens=1 << 20,  # the engine knows
            page_size=config.page_size,
            mixed_steps=fused,
        )
    )


def _kv_bytes(model: ModelConfig, vshards: int) -> int:
    """Bytes of a token's keys and values, float32, with the heads that padding adds."""
    cut = ModelCut.of(model, 1 << (vshards.bit_length() - 1))
    return 2 * 4 * model.num_layers * cut.kv_heads * model.head_dim * cut.num_vshards
