"""What a planner is asked, how it is set, and what it answers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nitsum_jax.control.model.cell import MAX_BATCH
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.rollout import Arrival
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role


@dataclasses.dataclass(frozen=True, slots=True)
class PlannerConfig:
    """How a planner decides.

    Attributes:
      least_kv_share: TPs whose weights would leave less than this share of a device for KV cache are not used (all
        devices keep the weights of the least TP in use, so that switches move none).
      headroom: the larger load is this many times the load.
      headroom_weight: weight of the prediction at the larger load.
      finalists: candidates, besides the present plan, that are replayed.
      replayed: requests that are replayed at the most.
      replay_ttfts: seconds that are replayed, in TTFT targets of the most patient tier, but 10 at the least and 40 at
        the most.
      replay_patience: no TTFT target is longer in a replay than this share of it: an overload would not show in time.
      pressure: requests are replayed so many times as fast as they came.
      satisfied: share of the replayed goodput at which a plan stays without others being looked at.
      trusted: if the estimate, too, gives it at least this score: a queue that grows slowly takes longer than a replay.
      estimate_weight: weight of the estimate beside the replay.
      hysteresis: least gain, as a share of the offered goodput, for which a switch is made; twice this if the present
        plan satisfies the requests as fast as they came.
      clear_gain: gain by the estimate, as a share of the offered goodput, for which a thrifty decision looks closer.
      chance: and of the requests for which two plans differ, the gain must be so many standard deviations of chance.
      splits: whether plans with prefill and decode apart are candidates.
      tps: TPs that may be used; empty: all that the profile has and that leave room for KV cache.
    """

    least_kv_share: float = 0.25
    headroom: float = 1.3
    headroom_weight: float = 0.35
    finalists: int = 3
    replayed: int = 600
    replay_ttfts: float = 2.0
    replay_patience: float = 0.25
    pressure: float = 1.2
    satisfied: float = 0.985
    trusted: float = 0.9
    estimate_weight: float = 0.15
    hysteresis: float = 0.03
    clear_gain: float = 0.1
    chance: float = 1.5
    splits: bool = True
    tps: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class PlanInputs:
    """All that a decision depends on, besides the settings.

    Attributes:
      time_s: when.
      plan: in force.
      num_devices: of the cell.
      lost: devices that cannot be used.
      loads: of the tiers.
      recent: the last arrivals, for the replay.
      allowed: texts of the layouts that may be used, wherever they lie and for whatever tiers; empty: all.
      waiting: requests whose prompt is still to be computed, in time all the same.
      max_batch: most requests of an instance.
      thrifty: nothing is replayed unless the estimate finds a clear gain (`PlannerConfig.clear_gain`).
    """

    time_s: float
    plan: Layout
    num_devices: int
    lost: tuple[int, ...]
    loads: tuple[TierLoad, ...]
    recent: tuple[Arrival, ...] = ()
    allowed: tuple[str, ...] = ()
    waiting: tuple[Arrival, ...] = ()
    max_batch: int = MAX_BATCH
    thrifty: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes an equal object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "PlanInputs":
        """Reads what `to_json` wrote."""
        loads = tuple(TierLoad(**(load | {"prompts": tuple(load["prompts"])})) for load in values["loads"])
        recent = tuple(Arrival(**arrival) for arrival in values["recent"])
        return PlanInputs(
            values["time_s"],
            _plan_from_json(values["plan"]),
            values["num_devices"],
            tuple(values["lost"]),
            loads,
            recent,
            tuple(values["allowed"]),
            tuple(Arrival(**arrival) for arrival in values.get("waiting", ())),
            values.get("max_batch", MAX_BATCH),
            values.get("thrifty", False),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was considered.

    Attributes:
      plan: text.
      goodput: weighted requests per second that would meet both targets, by the estimate.
      score: the estimate with headroom, as a share of the offered goodput.
      load: of its fullest instances.
      attainment: per tier.
      replayed: share of the replayed goodput it met, if it was replayed; of one that was given up, what it could have
        met at the most.
    """

    plan: str
    goodput: float
    score: float
    load: float
    attainment: Mapping[str, float]
    replayed: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What a planner says.

    Attributes:
      time_s: when.
      inputs: what it was decided from.
      candidates: the best few, and the present plan.
      choice: the plan to have.
      switch: whether it differs from the present one.
      reason: one line.
      work: requests that were replayed for it and plans that were predicted (of a cell of one node).
    """

    time_s: float
    inputs: PlanInputs
    candidates: tuple[Candidate, ...]
    choice: Layout
    switch: bool
    reason: str
    work: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes an equal object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Decision":
        """Reads what `to_json` wrote."""
        return Decision(
            values["time_s"],
            PlanInputs.from_json(values["inputs"]),
            tuple(Candidate(**candidate) for candidate in values["candidates"]),
            _plan_from_json(values["choice"]),
            values["switch"],
            values["reason"],
            values.get("work", 0),
        )


def _plan_from_json(values: Mapping[str, Any]) -> Layout:
    return Layout(
        tuple(InstanceSpec(tuple(i["devices"]), Role(i["role"]), tuple(i["tiers"])) for i in values["instances"])
    )
