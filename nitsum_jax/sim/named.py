"""Policies by name: what `--policy` may say."""

import dataclasses
from collections.abc import Sequence

from nitsum_jax.control.plan import ROLES, Shape
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim import baselines
from nitsum_jax.sim.baselines import Setting
from nitsum_jax.sim.simulation import Policy


def policies_named(setting: Setting, name: str, *, device_put: bool = False) -> Sequence[Policy]:
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
    elif name.startswith("tp") and name[2:3].isdigit():
        shapes = parse_shapes(name, setting.tiers)
        found = [dataclasses.replace(baselines.static(setting, "static", _fitting(shapes, setting, name)), name=name)]
    else:
        known = ", ".join(("adaptive", *families, *ablations))
        raise InvalidInputError(f"unknown policy {name!r}: use {known}, or a layout such as tp4+tp2x2")
    if not found:
        raise InvalidInputError(f"policy {name}: there is none of this kind for these tiers, TPs and devices")
    return [dataclasses.replace(policy, device_put=True) for policy in found] if device_put else found


def _fitting(shapes: tuple[Shape, ...], setting: Setting, name: str) -> tuple[Shape, ...]:
    total = sum(shape.tp for shape in shapes)
    for shape in shapes:
        if shape.tp not in setting.tps:
            have = ", ".join(map(str, setting.tps))
            raise InvalidInputError(f"policy {name}: TP {shape.tp} is not in the profile: use {have}")
    if total > setting.node:
        raise InvalidInputError(f"policy {name}: {total} devices, but a node has {setting.node}")
    return shapes


def parse_shapes(text: str, tiers: TierSet) -> tuple[Shape, ...]:
    """Reads `tp4:prefill+tp2x2/chat`: TP, how many, role, tiers.

    Raises:
      InvalidInputError: a part cannot be read, or a tier is not known.
    """
    shapes: list[Shape] = []
    for part in text.split("+"):
        head, _, names = part.partition("/")
        head, _, role = head.partition(":")
        tp, _, count = head.removeprefix("tp").partition("x")
        if not (head.startswith("tp") and tp.isdigit() and (count or "1").isdigit() and (role or "mixed") in ROLES):
            raise InvalidInputError(
                f"layout {text!r}: cannot read {part!r}: write such as tp4, tp2x2, tp4:prefill, tp1/chat"
            )
        own = tuple(name for name in names.split(";") if name)
        for name in own:
            tiers.get(name)
        shapes += [Shape(int(tp), role or "mixed", own)] * int(count or "1")
    return tuple(shapes)
