"""The engine's loop without devices: real instances, sequences and admission under a virtual clock.

Steps compute nothing and take what a cost model says, so that a policy can be watched for minutes of load in a second.
"""

import collections
import functools
import heapq
import itertools
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.engine.batching.admission import Admission, Counters
from nitsum_jax.engine.batching.allowed import AllowedTokens, MaskMaker
from nitsum_jax.engine.batching.pacing import Pace, Pacer
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.kv.kv_pool import BlockAllocator
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.policy import Policy, leave_instance
from nitsum_jax.engine.request import FinishReason, OutputForm, Request
from nitsum_jax.engine.step.dispatched import Step
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.meshes.layout import InstanceSpec, parse_layout

PAGE = 16
MASK_S = 0.0005
SHAPES = (*(StepShape(size, 1) for size in (1, 8, 64)), *(StepShape(1, size) for size in (32, 512)))
MIXED = tuple(StepShape(1, size, beside) for size in (32, 512) for beside in (32, 64))


class NoPacker:
    """Packs nothing."""

    def add(self, *_: Any, **__: Any) -> None: ...


class FakeInstance(Instance):
    """An instance whose steps are noted instead of launched."""

    def __init__(
        self,
        spec: InstanceSpec,
        allocators: Sequence[BlockAllocator],
        vshards: int,
        pages: int,
        *,
        fused: bool = False,
    ):
        self.spec, self.order = spec, spec.devices
        self.device_of = tuple(spec.devices[k * spec.tp // vshards] for k in range(vshards))
        self.rows, self.prefills, self.outstanding = {}, collections.deque(), []
        self.retired = self.lost = self.broken = False
        self.steps = 0
        self._before = ()
        self._prefixes = self._window = None
        program: Any = types.SimpleNamespace(pool=types.SimpleNamespace(page_size=PAGE), max_batch=64, pages=pages)
        pool: Any = types.SimpleNamespace(allocators=allocators)
        executables: Any = dict.fromkeys((*SHAPES, *MIXED) if fused else SHAPES)
        self._program, self._pool = program, pool
        self._executables = lambda: executables
        self._slots = collections.Counter(self.device_of)
        self._free_rows = list(range(63, -1, -1))

    def _packer(self, shape: StepShape) -> Any:
        return NoPacker()

    def _start(self, step: Step, executable: Any, packer: Any) -> None:
        self.outstanding.append(step)
        self.steps += 1
        step.number = self.steps


class FakeCell:
    """Runs requests through a policy; chunks and decoding share steps where those of the cost model do."""

    def __init__(self, policy_of: Callable[[Callable[[], float]], Policy], cost: CostModel, layout: str, blocks: int):
        self.now_s = 0.0
        self.policy = policy_of(lambda: self.now_s)
        devices = 8
        allocators = [BlockAllocator(blocks) for _ in range(devices)]
        self.instances = [
            FakeInstance(spec, allocators, devices, 4096 // PAGE, fused=cost.profile.mixed_steps)
            for spec in parse_layout(layout, devices).instances
        ]
        self.pacer = Pacer(Pace(cost, "fake", 1))  # it knows what steps take
        self.sequences: list[LiveRequest] = []
        self.counters = Counters()
        self.alive: set[str] = set()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._woken: float | None = None
        program = types.SimpleNamespace(pool=types.SimpleNamespace(page_size=PAGE))
        cell: Any = types.SimpleNamespace(program=program, prefixes=None)
        wide: Any = types.SimpleNamespace(admit=lambda *_: None)
        lock = threading.Lock()
        self.admission = Admission(
            cell,
            self.policy,
            lock,
            self.counters,
            wide,
            MaskMaker(1, lambda made: None),
            self._finish,
            deterministic=False,
        )
        self.policy.relaid(self.instances, 0.0)
        self.ends: dict[str, float] = {}

    def add(self, at_s: float, prompt: int, output: int, tier: str, form: OutputForm | None = None) -> None:
        """A request comes at a time; the masks of one with a form take a while to be made."""
        name = str(len(self._events))
        self._at(at_s, lambda: self._arrive(Request(name, (1,) * prompt, output, tier=tier, form=form)))

    def run(self) -> None:
        """Until nothing happens any more."""
        while self._events:
            self.now_s, _, do = heapq.heappop(self._events)
            do()
            self._turn()

    def _arrive(self, request: Request) -> None:
        page_table = np.zeros((8, 4096 // PAGE), np.int32)
        limit = len(request.prompt_ids) + request.max_tokens
        sequence = LiveRequest(request, 0, list(request.prompt_ids), page_table, limit, arrival_s=self.now_s)
        sequence.allowed = None if request.form is None else AllowedTokens(request, 32, sequence)
        self.alive.add(request.id)
        self.policy.push(sequence)

    def _turn(self) -> None:
        self.admission.admit(self.instances, self.now_s, switching=False)
        busy = True
        while busy:
            busy = False
            for instance in self.instances:
                before = instance.steps
                busy |= instance.dispatch(self.admission.make_room, self.policy.prefill)
                if instance.steps != before:
                    self._launched(instance, instance.outstanding[-1])
        wake_s = self.policy.wake_s()
        if wake_s is not None and (self._woken is None or wake_s < self._woken):
            self._woken = wake_s
            self._at(max(wake_s, self.now_s), self._wake)

    def _wake(self) -> None:
        self._woken = None

    def _launched(self, instance: Instance, step: Step) -> None:
        self.pacer.launched(instance, step, self.now_s)
        self.policy.launched(instance, step, self.now_s)
        self._at(step.paced_s, lambda: self._settle(instance, step))

    def _settle(self, instance: Instance, step: Step) -> None:
        instance.outstanding.remove(step)
        step.settle(instance)
        step.ready_s = self.now_s
        step.tokens = np.zeros(len(step.sequences), np.int32)
        for sequence, emits in zip(step.sequences, step.emits, strict=True):
            if not emits:
                continue
            sequence.settled(emits=True)
            if sequence.finish is not None:
                continue
            ended = sequence.accept(7)
            if ended is None and sequence.allowed is not None and sequence.allowed.said(7) is not None:
                self._at(self.now_s + MASK_S, functools.partial(sequence.allowed.made, np.zeros(1, np.int32)))
            if not sequence.delivered:
                self.policy.first_token(sequence, self.now_s)
            sequence.take_undelivered()
            if ended is not None:
                self._retire(sequence)
            elif sequence.home is None and not sequence.pending:
                self.admission.await_again(sequence)
        self.policy.settled(instance, step, self.now_s)

    def _finish(self, sequence: LiveRequest, reason: FinishReason, error: str | None) -> None:
        sequence.finish = reason
        self.admission.drop(sequence)
        self._retire(sequence)

    def _retire(self, sequence: LiveRequest) -> None:
        leave_instance(sequence, self.policy)
        self.alive.remove(sequence.request.id)
        self.ends[sequence.request.id] = self.now_s
        self.policy.ended(sequence, self.now_s)

    def _at(self, time_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), do))
