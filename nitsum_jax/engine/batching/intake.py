"""Taking in what finished steps say: tokens to their sequences, failures to whom they hit."""

import logging
import time
from collections.abc import Callable

import numpy as np

from nitsum_jax.engine.batching.admission import Admission, Counters, Finish
from nitsum_jax.engine.batching.allowed import AllowedTokens, MaskMaker
from nitsum_jax.engine.batching.pacing import Pacer
from nitsum_jax.engine.batching.step_log import StepLog
from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.policy import Listener
from nitsum_jax.engine.request import FinishReason, TokenDelta
from nitsum_jax.engine.step.dispatched import Step
from nitsum_jax.engine.step.sampling import NO_TOKEN

_LOG = logging.getLogger(__name__)
_STEP_FAILED = "the accelerator reported an error in this step"


class Intake:
    """Takes results in, in the order in which steps continue each other; used by the engine's thread alone."""

    def __init__(
        self,
        cell: Cell,
        listener: Listener,
        pacer: Pacer | None,
        admission: Admission,
        counters: Counters,
        log: StepLog,
        masks: MaskMaker,
        *,
        say: Callable[[TokenDelta], None],
        finish: Finish,
        retire: Callable[[LiveRequest], None],
    ):
        """Begins with nothing to take in.

        Args:
          cell: whose steps they are.
          listener: is notified of results and ends.
          pacer: holds results until they are due, in a paced cell.
          admission: has sequences admitted again that were sent back while their steps ran.
          counters: of the loop.
          log: gets the times of steps.
          masks: makes what sequences may say next.
          say: passes a delta on.
          finish: ends a sequence that cannot go on.
          retire: takes a sequence out that has come to its end.
        """
        self._cell = cell
        self._listener = listener
        self._pacer = pacer
        self._admission = admission
        self._counters = counters
        self._log = log
        self._masks = masks
        self._say = say
        self._finish = finish
        self._retire = retire
        self._waiting: list[tuple[Instance, Step]] = []

    def take(self, instance: Instance, step: Step) -> None:
        """A step has finished; in a paced cell its results may not be due yet."""
        if self._pacer is None or not self._pacer.hold(instance, step, time.monotonic()):
            self._take_now(instance, step)

    def take_due(self, now_s: float) -> None:
        """Takes in what a paced cell has held until now."""
        if self._pacer is not None:
            for ready in self._pacer.due(now_s):
                self._take_now(*ready)

    def _take_now(self, instance: Instance, step: Step) -> None:
        # After a switch, results of the old instances and of the new ones come on threads that race.
        self._waiting.append((instance, step))
        while (ready := next((item for item in self._waiting if item[1].due), None)) is not None:
            self._waiting.remove(ready)
            self._settle(*ready)

    def _settle(self, instance: Instance, step: Step) -> None:
        instance.outstanding.remove(step)
        step.settle(instance)
        self._counters.steps, now = self._counters.steps + 1, time.monotonic()
        if step.tokens is None:
            self._fail(instance, step)
        else:
            self._accept(step, step.tokens, now)
            if self._pacer is not None:
                self._pacer.delivered(step, now)
            self._log.add(instance, step, now if self._pacer is not None else step.ready_s)
        self._listener.settled(instance, step, now)
        if instance.broken and not instance.in_flight and not instance.retired:
            instance.abandon()

    def _accept(self, step: Step, results: np.ndarray, now: float) -> None:
        if step.pooled is not None:
            step.sequences[0].pool(step.pooled[0], step.start)
        tokens = results[: len(step.sequences)].tolist()  # what is behind belongs to padding
        steps = zip(step.sequences, step.emits, step.epochs, tokens, strict=True)
        for index, (sequence, emits, epoch, token) in enumerate(steps):
            if not emits or epoch != sequence.epoch:
                continue
            sequence.settled(emits=True)
            if sequence.finish is not None:
                continue
            if token == NO_TOKEN:
                self._refuse_logits(sequence)
                continue
            finish = sequence.accept(token, step.logprob(index))
            if finish is None and sequence.allowed is not None:
                self._follow(sequence.allowed, token)
            if sequence.home is not None:
                sequence.home.note_pages(sequence)
            if not sequence.delivered:
                self._listener.first_token(sequence, now)
            new, logprobs = sequence.take_undelivered()
            self._counters.tokens += len(new)
            if finish is not None:
                self._retire(sequence)
            elif sequence.home is None and not sequence.pending:
                self._admission.await_again(sequence)  # sent back while this step ran
            if new or finish is not None:
                self._say(
                    TokenDelta(
                        sequence.request.id,
                        new,
                        now,
                        finish,
                        logprobs=logprobs,
                        cached_tokens=sequence.shared,
                        embedding=None if finish is None else sequence.embedding(),
                    )
                )

    def _follow(self, allowed: AllowedTokens, token: int) -> None:
        if (follows := allowed.said(token)) is not None:
            self._masks.follow(allowed, follows)

    def _refuse_logits(self, sequence: LiveRequest) -> None:
        """A row's logits are not numbers: its request ends, and its pages are not shared."""
        self._counters.broken_logits += 1
        if self._cell.prefixes is not None:
            self._cell.prefixes.disown(sequence)
        self._finish(sequence, FinishReason.ERROR, sequence.broken_logits())

    def _fail(self, instance: Instance, step: Step) -> None:
        """A step failed, and the pool with it: its instance's sequences end with an error, and it goes on afresh."""
        _LOG.error("a step on devices %s failed: %s", instance.spec.devices, step.error)
        if not (
            instance.broken or instance.lost
        ):  # the step behind it fails too; sequences that came in between lost nothing
            instance.broken = True
            for sequence in list(instance.rows.values()):
                self._finish(sequence, FinishReason.ERROR, _STEP_FAILED)
            if self._cell.prefixes is not None:
                self._cell.prefixes.forget(instance.order)
        for sequence, emits, epoch in zip(step.sequences, step.emits, step.epochs, strict=True):
            if epoch != sequence.epoch:
                continue
            sequence.settled(emits=emits)
            if emits and sequence.finish is None and sequence.home not in (None, instance):
                self._finish(sequence, FinishReason.ERROR, _STEP_FAILED)  # it went over before this token came
            if sequence.finish is None and sequence.home is None and not sequence.pending:
                self._admission.await_again(sequence)  # sent back while this step ran: it lost nothing more
