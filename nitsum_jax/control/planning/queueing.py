"""Predicted goodput of a plan under a load, by a queueing estimate: fast enough for hundreds of plans.

**Work is additive.**  An instance that must give every decoding request a token each `tpot` seconds can compute so
many prompt tokens in such a step; against what it computes with none decoding, that is its room (an instance that
only decodes has what reading the weights leaves of the time).  A request takes `prefill time + output tokens * b` of
it, where b is what one more sequence takes from a step, and a short prompt takes its share of a full step.  So the load
of an instance is linear in its requests; it is full at 1.

**Waiting.**  Prompts queue for what decodes leave of the time.  The instances that serve the same tiers share one
queue: an M/G/m estimate with the arrivals' burstiness (Allen and Cunneen) and priority by TTFT target.  A request that
would come too late is demoted and costs the others nothing, so what is lost follows the formula for customers who leave
a queue after a fixed time (M/M/1+D; Baccelli, Boyer and Hebuterne 1984), which is smooth through full load and tends to
1 - 1/load beyond it.  Beyond full load the longest prompts are given up, if more of the others are in time then, as the
scheduler does.

What it leaves out (tiers using what others leave, how long a queue takes to build) is what the planner's what-if
rollouts are for.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import DECODE, PREFILL, Shape
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.tiers import Tier

_BATCH = 32  # sequences at which the marginal decode time is taken
_LARGEST = 1024  # sequences of a batch
_LEAST_ROOM = 0.04
_FULL = 4096  # prompt tokens of a step in which what it costs whatever is in it no longer matters
_BURSTS = 6.0  # dispersion beyond which arrivals come in bursts longer than this estimate's queues; replays see these


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan would do.

    Attributes:
      goodput: weighted requests per second that meet both targets.
      attainment: per tier, the share that does.
      load: of the fullest group of instances; full is 1.
    """

    goodput: float
    attainment: Mapping[str, float]
    load: float


@dataclasses.dataclass(slots=True)
class _Work:
    """What requests of one tier cost at one TP."""

    prefill_s: tuple[float, ...]  # at the quantiles of its prompts, in steps of their own
    work_s: tuple[float, ...]  # what they take of an instance with enough to do, whose steps are full
    mean_s: float  # of these
    square_s: float
    decode_s: float  # of one more sequence in a step
    alone_s: float  # a step of one sequence
    context: float
    prompt: float


@dataclasses.dataclass(slots=True)
class _Group:
    """Instances of one shape, pooled."""

    shape: Shape
    count: int
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    load: float = 0.0


class QueueingModel:
    """Predicts plans under one load."""

    def __init__(
        self,
        cost: CostModel,
        tiers: Mapping[str, Tier],
        loads: Sequence[TierLoad],
        *,
        resident_tp: int | None = None,
        tpot_margin: float = 0.92,
    ):
        """Prepares a load; `tiers` has the targets of all its tiers."""
        self._cost = cost
        self._tiers = tiers
        self._loads = {load.tier: load for load in loads if load.rate > 0}
        # Tight ones first: they are the ones with least choice.
        self._order = sorted(self._loads, key=lambda name: (tiers[name].tpot_ms, tiers[name].ttft_ms))
        self._resident_tp = resident_tp
        self._margin = tpot_margin
        self._work = {(tp, name): self._work_of(tp, self._loads[name]) for tp in cost.tps for name in self._loads}
        self._rooms: dict[tuple[int, float, str], tuple[float, float]] = {}
        self._fullest: dict[tuple[int, float, str], int] = {}

    @property
    def tiers(self) -> tuple[str, ...]:
        """Tiers with a load, the tightest first."""
        return tuple(self._order)

    @property
    def offered(self) -> float:
        """Weighted requests per second that come."""
        return sum(load.rate * self._tiers[name].weight for name, load in self._loads.items())

    def can(self, tp: int, tier: str) -> bool:
        """Whether an instance of this TP can hold the tier's time per token at all."""
        return self._work[tp, tier].alone_s <= self._margin * self._tiers[tier].tpot_ms / 1000

    def predict(self, shapes: Sequence[Shape], scale: float = 1.0) -> Prediction:
        """What these instances would do with `scale` times the load."""
        groups: dict[Shape, _Group] = {}
        for shape in shapes:
            groups.setdefault(shape, _Group(shape, 0)).count += 1
        prefills = [group for group in groups.values() if group.shape.role != DECODE]
        decodes = [group for group in groups.values() if group.shape.role == DECODE]
        for name in self._order:
            self._spread(name, prefills, scale)
        attained = {group.shape: self._attained(group) for group in prefills}
        apart = [group for group in prefills if group.shape.role == PREFILL]
        decode_share = dict.fromkeys(self._order, 1.0)
        if apart:
            # Who is late with its prompt decodes when nobody in time needs the room.
            handed = {
                name: sum(group.rates.get(name, 0.0) * attained[group.shape].get(name, 0.0) for group in apart)
                for name in self._order
            }
            for name in self._order:
                if decodes and handed[name] > 0:
                    self._spread(name, decodes, scale, handed[name])
            for name in self._order:
                found = sum(group.rates.get(name, 0.0) for group in decodes)
                decode_share[name] = min(1.0, found / handed[name]) if handed[name] > 0 else 1.0
            for group in decodes:
                fit = self._held(group)
                for name, rate in group.rates.items():
                    decode_share[name] -= (1 - fit) * rate / max(1e-12, handed[name])
        goodput = 0.0
        got = dict.fromkeys(self._order, 0.0)
        for group in prefills:
            for name, share in attained[group.shape].items():
                held = decode_share[name] if group.shape.role == PREFILL else 1.0
                got[name] += group.rates[name] * share * max(0.0, held)
        attainment: dict[str, float] = {}
        for name in self._order:
            rate = self._loads[name].rate * scale
            attainment[name] = min(1.0, got[name] / rate) if rate else 0.0
            goodput += self._tiers[name].weight * rate * attainment[name]
        return Prediction(goodput, attainment, max((group.load for group in groups.values()), default=0.0))

    # ---- work

    def _work_of(self, tp: int, load: TierLoad) -> _Work:
        prompt = sum(load.prompts) / len(load.prompts)
        context = prompt + load.output / 2
        seconds = tuple(self._cost.prefill_s(tp, -(-tokens // 64) * 64, 8192) for tokens in load.prompts)
        work = tuple(self._work_s(tp, tokens, alone_s) for tokens, alone_s in zip(load.prompts, seconds, strict=True))
        alone = self._cost.step_s(tp, 1, int(context))
        many = self._cost.step_s(tp, _BATCH, int(_BATCH * context))
        return _Work(
            prefill_s=seconds,
            work_s=work,
            mean_s=sum(work) / len(work),
            square_s=sum(s * s for s in work) / len(work),
            decode_s=(many - alone) / (_BATCH - 1),
            alone_s=alone,
            context=context,
            prompt=prompt,
        )

    def _work_s(self, tp: int, tokens: int, alone_s: float) -> float:
        """What a prompt takes of a busy instance: short ones share steps, and what a step costs whatever is in it."""
        if tokens >= _FULL or not self._cost.profile.mixed_steps:
            return alone_s
        return min(alone_s, tokens * self._token_s(tp))

    def _token_s(self, tp: int) -> float:
        """A prompt's token in a full step."""
        return self._cost.step_s(tp, 0, 0, ((_FULL, 0),)) / _FULL

    def _tpot_s(self, names: Sequence[str]) -> float:
        return min((self._tiers[name].tpot_ms / 1000 for name in names), default=math.inf)

    def _unit(self, group: _Group, name: str) -> float:
        """Load that one request of a tier a second puts on a group: time taken over the time there is."""
        work = self._work[group.shape.tp, name]
        role = group.shape.role
        if role == PREFILL:
            return work.mean_s / group.count
        room, decode_s = self._room(group.shape, self._tpot_s([*group.rates, name]) * self._margin, name)
        busy = decode_s * self._loads[name].output + (work.mean_s if role != DECODE else 0.0)
        return busy / (group.count * max(room, _LEAST_ROOM / 4))

    def _room(self, shape: Shape, tpot_s: float, name: str) -> tuple[float, float]:
        """Share of the time left for prompts when one sequence decodes, and seconds that each further one takes."""
        work = self._work[shape.tp, name]
        if shape.role == DECODE:
            return 1 - work.alone_s / tpot_s, work.decode_s
        key = shape.tp, tpot_s, name
        found = self._rooms.get(key)
        if found is None:
            tokens_s = self._token_s(shape.tp)

            def share(batch: int) -> float:
                context = int(batch * work.context)
                tokens = self._cost.max_chunk(shape.tp, batch, context, 0, 8192, tpot_s)
                used = self._cost.step_s(shape.tp, batch, context, ((tokens, 0),)) if tokens == 8192 else tpot_s
                return min(1.0, tokens * tokens_s / used)

            one, many = share(1), share(_BATCH)
            found = self._rooms[key] = one, max((one - many) * tpot_s / (_BATCH - 1), work.decode_s / 4)
        return found

    def _spread(self, name: str, groups: Sequence[_Group], scale: float, rate: float | None = None) -> None:
        """Gives a tier's requests, or this rate of them, to the groups so that these are loaded evenly."""
        rate = self._loads[name].rate * scale if rate is None else rate
        own = [group for group in groups if not group.shape.tiers or name in group.shape.tiers]
        fit = [group for group in own if group.shape.role == PREFILL or self.can(group.shape.tp, name)]
        if not fit:  # no instance can hold its time per token: it is late from the start, and costs the others nothing
            return
        # A trickle of tight requests takes the room of all others in an instance that is barely fast enough for them.
        tpot_s = self._tiers[name].tpot_ms / 1000 * self._margin
        chosen = [g for g in fit if g.shape.role == PREFILL or self._room(g.shape, tpot_s, name)[0] >= 0.2] or fit
        units = {id(group): self._unit(group, name) for group in chosen}
        ordered = sorted(chosen, key=lambda group: group.load)
        left, level = rate, ordered[0].load
        for i, group in enumerate(ordered):
            level = max(level, group.load)
            capacity = sum(1 / units[id(other)] for other in ordered[: i + 1])
            following = ordered[i + 1].load if i + 1 < len(ordered) else math.inf
            if (following - level) * capacity >= left:
                level += left / capacity
                break
            left -= (following - level) * capacity
            level = following
        for group in ordered:
            extra = max(0.0, level - group.load) / units[id(group)]
            if extra > 0:
                group.rates[name] = group.rates.get(name, 0.0) + extra
        for group in ordered:  # a tighter tier may have shrunk the room of those that were there
            group.load = sum(self._unit(group, other) * share for other, share in group.rates.items())

    # ---- attainment

    def _held(self, group: _Group) -> float:
        """Share of the requests of a decoding group whose time per token holds."""
        if not group.rates:
            return 1.0
        if group.shape.role == DECODE:
            return self._admitted(group)
        # Where prompts are computed too, an overload makes these wait, and no time per token longer.
        tp = group.shape.tp
        tokens, context, marginal, alone = self._decoding(group, 1 / max(1.0, group.load))
        room = 1.0
        for name, rate in group.rates.items():
            room -= rate * self._work[tp, name].mean_s / max(1.0, group.load) / group.count
        speed = max(1e-9, room - marginal * tokens) / alone  # decode steps a second
        tpot_s = self._tpot_s(list(group.rates)) * self._margin
        batch = tokens * min(1 / speed, tpot_s)
        most = (tpot_s - alone) / marginal if marginal > 0 else math.inf
        most = min(most, self._cost.kv_capacity_tokens(tp, self._resident_tp) / max(1.0, context))
        if batch <= 0:
            return 1.0
        spread = math.sqrt(batch) + 1.0
        return 1 - 0.25 * math.erfc((most + 0.5 - batch) / spread / math.sqrt(2))

    def _admitted(self, group: _Group) -> float:
        """Share of the requests handed to instances that only decode that keep their time per token.

        So many fit that a step takes as long as the tightest time per token, which is a mean over a request's tokens:
        what an emptier step was faster makes up for a fuller one.  For so many there is room: Erlang's loss formula in
        its normal approximation, which tends to most / offered beyond full load, with Hayward's correction for bursts.
        Of those let in as many again are lost, since they have waited for room until they had no time to spare.
        """
        tp = group.shape.tp
        tokens, context, _, _ = self._decoding(group)
        tpot_s = self._tpot_s(list(group.rates))
        shares = {name: rate * self._loads[name].output for name, rate in group.rates.items()}
        most = sum(shares.values()) / sum(share / self._most(tp, tpot_s, name) for name, share in shares.items())
        most = min(most, self._cost.kv_capacity_tokens(tp, self._resident_tp) / max(1.0, context))
        bursts = max(1 + min(_BURSTS, self._loads[name].dispersion) for name in group.rates) / 2
        return (1 - _no_room(tokens * tpot_s, most, bursts)) ** 2

    def _most(self, tp: int, tpot_s: float, name: str) -> int:
        """Sequences of a tier of which a decode step takes at most so long; one at the least."""
        key = tp, tpot_s, name
        found = self._fullest.get(key)
        if found is None:
            context = self._work[tp, name].context
            low, high = 1, _LARGEST
            while high - low > 1:
                middle = (low + high) // 2
                fits = self._cost.step_s(tp, middle, int(middle * context)) <= tpot_s
                low, high = (middle, high) if fits else (low, middle)
            found = self._fullest[key] = low
        return found

    def _decoding(self, group: _Group, admitted: float = 1.0) -> tuple[float, float, float, float]:
        """Tokens a second of an instance; context of a request; seconds of one more in a step, and of one alone."""
        tp, total = group.shape.tp, sum(group.rates.values())
        tokens = sum(rate * self._loads[name].output for name, rate in group.rates.items()) * admitted / group.count
        context = sum(rate * self._work[tp, name].context for name, rate in group.rates.items()) / total
        marginal = sum(rate * self._work[tp, name].decode_s for name, rate in group.rates.items()) / total
        return tokens, context, marginal, max(self._work[tp, name].alone_s for name in group.rates)

    def _attained(self, group: _Group) -> dict[str, float]:
        """Share of each tier of a group whose both targets hold."""
        if not group.rates:
            return {}
        tp, count = group.shape.tp, group.count
        held = self._held(group) if group.shape.role != PREFILL else 1.0
        tpot_s = self._tpot_s(list(group.rates)) * self._margin
        speed = 1.0  # what decodes leave of the time
        if group.shape.role != PREFILL:
            rooms = {name: self._room(group.shape, tpot_s, name) for name in group.rates}
            total = sum(group.rates.values())
            room = sum(rate * rooms[name][0] for name, rate in group.rates.items()) / total
            taken = sum(rate * self._loads[name].output * rooms[name][1] for name, rate in group.rates.items())
            # Beyond full load only so many are admitted, and decode.
            speed = max(_LEAST_ROOM, room - taken / count / max(1.0, group.load))
        shares: dict[str, float] = {}
        before = busy = moment = 0.0
        for name in sorted(group.rates, key=lambda name: self._tiers[name].ttft_ms):
            work, rate = self._work[tp, name], group.rates[name] / count
            busy += rate * work.mean_s / speed
            moment += rate * work.square_s / speed**2
            free = max(0.02, 1 - before)  # of the time, when those with less patience have been served
            scale_s = self._scale_s(name, moment / busy, count) / free
            shares[name] = held * self._met(name, work.prefill_s, speed, (busy - before) / free, scale_s, count)
            before = min(busy, 1.0)
        if group.load <= 1:
            return shares
        kept = self._kept(group, 1.0 if group.shape.role == PREFILL else room)
        return {name: max(share, held * kept[name]) for name, share in shares.items()}

    def _kept(self, group: _Group, room: float) -> dict[str, float]:
        """Share of each tier of a group that is too full whose TTFT holds if the longest prompts are given up.

        That is what the scheduler does (`scheduling.shedding`): so many of the shortest as are most in time.  Tiers
        with less patience go first; what they keep, the others do not get.
        """
        tp, count = group.shape.tp, group.count
        shares: dict[str, float] = {}
        used = moment = 0.0
        for name in sorted(group.rates, key=lambda name: self._tiers[name].ttft_ms):
            work, whole = self._work[tp, name], group.rates[name] / count
            decode_s = self._loads[name].output * work.decode_s if group.shape.role != PREFILL else 0.0
            free = max(_LEAST_ROOM, room - used)
            best = best_used = best_moment = 0.0
            for keep in range(1, len(work.prefill_s) + 1):
                kept = work.work_s[:keep]
                rate = whole * keep / len(work.work_s)
                busy = rate * (sum(kept) / keep + decode_s)
                speed = max(_LEAST_ROOM, free - rate * decode_s)
                more = rate * sum(s * s for s in kept) / keep
                scale_s = self._scale_s(name, (moment + more) / (used + busy), count) / speed
                met = self._met(name, work.prefill_s[:keep], speed, busy / free, scale_s, count)
                met *= keep / len(work.prefill_s)
                if met > best:
                    best, best_used, best_moment = met, min(busy, free), more
            shares[name] = best
            used, moment = used + best_used, moment + best_moment
        return shares

    def _scale_s(self, name: str, mean_s: float, count: int) -> float:
        """Mean residual service of a queue whose requests take `mean_s` (second moment over first), with bursts."""
        return mean_s / 2 * (1 + min(_BURSTS, self._loads[name].dispersion)) / 2 / count

    def _met(
        self, name: str, prefill_s: Sequence[float], speed: float, load: float, scale_s: float, count: int
    ) -> float:
        """Share of these prompts that are computed in time."""
        met = 0.0
        for seconds in prefill_s:
            left_s = self._tiers[name].ttft_ms / 1000 * 0.97 - seconds / speed
            met += 0.0 if left_s < 0 else 1 - _lost(load, left_s / scale_s, count)
        return met / len(prefill_s)


def _no_room(offered: float, most: float, bursts: float) -> float:
    """Share of customers who find all of `most` servers busy if there would be `offered` customers with no limit."""
    spread = math.sqrt(offered * bursts)
    if most - offered > 6 * spread:
        return 0.0
    if offered - most > 6 * spread:
        return 1 - most / offered
    above = (most - offered) / spread
    density = math.exp(-above * above / 2) / math.sqrt(2 * math.pi)
    return min(1.0, density / (0.5 * math.erfc(-above / math.sqrt(2))) * bursts / spread)


def _lost(load: float, patience: float, servers: int) -> float:
    """Share of customers who leave a queue because their wait would exceed `patience` (in mean residual services)."""
    if abs(load - 1) < 1e-4:
        load = 1 + 1e-4
    waits = load ** (math.sqrt(2 * (servers + 1)) - 1) if load < 1 else load
    exponent = -patience * (1 - load)
    if exponent > 500:
        return 1 - 1 / load
    tail = waits * math.exp(exponent)
    return min(1.0, max(0.0, (1 - load) * tail / (1 - load * tail)))
