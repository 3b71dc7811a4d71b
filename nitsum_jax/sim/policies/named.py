"""Policies by name: what `--policy` may say."""

import dataclasses
import re
from collections.abc import Sequence

from nitsum_jax.control.plan import Shape
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.sim.policies import baselines
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.runs.simulation import RunPolicy

_LAYOUT = re.compile(r"\s*tp[0-9]", re.IGNORECASE)  # how every layout begins, and no name of a policy


def policies_named(setting: Setting, name: str, *, device_put: bool = False) -> Sequence[RunPolicy]:
    """The policies that a name stands for: one, or a family to search.

    Args:
      setting: cost, tiers, devices.
      name: `adaptive`, a family, an ablation, or a layout.
      device_put: switches reshard by the general path.

    Raises:
      InvalidInputError: there is no such policy, or the layout is not sound or does not fit.
    """
    families, ablations = baselines.families(setting), baselines.ablations(setting)
    if name == "adaptive":
        found = [baselines.adaptive(setting)]
    elif name in families:
        found = list(families[name](setting))
    elif name in ablations:
        found = list(ablations[name])
    elif _LAYOUT.match(name):
        found = [dataclasses.replace(baselines.static(setting, "static", _shapes(name, setting)), name=name)]
    else:
        known = ", ".join(("adaptive", *families, *ablations))
        raise InvalidInputError(f"unknown policy {name!r}: use {known}, or a layout such as tp4+tp2x2")
    if not found:
        raise InvalidInputError(f"policy {name}: there is none of this kind for these tiers, TPs and devices")
    return [dataclasses.replace(policy, device_put=True) for policy in found] if device_put else found


def _shapes(text: str, setting: Setting) -> tuple[Shape, ...]:
    """The instances that a layout names; where they lie on a node is the policy's business."""
    try:
        layout = parse_layout(text, setting.node)
    except PreconditionError as error:  # the devices are a flag here, too
        raise InvalidInputError(str(error)) from None
    for tier in layout.tiers:
        setting.tiers.get(tier)
    for shape in layout.shapes:
        if shape.tp not in setting.tps:
            have = ", ".join(map(str, setting.tps))
            raise InvalidInputError(f"policy {text}: TP {shape.tp} is not in the profile: use {have}")
    return layout.shapes
