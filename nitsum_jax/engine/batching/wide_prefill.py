"""A long prompt at a high TP, step by step in between the decode steps of the instances on the same devices.

Weights of every TP are in place and KV blocks have one shape, so a second layout can run on the same devices at the
same time: all launches go through the engine's thread, in one order.  The `WideInstance` owns no pool; for each of its
steps it borrows those of the instances on its devices.  When the prompt is done, its blocks move to the instance that
will decode it, behind the last chunk and without waiting for it, and the first token travels there in the token
history.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from nitsum_jax.engine.batching.handover import move_sequence
from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.executables.compiling import LIKELY, Group
from nitsum_jax.engine.instance import Instance, MakeRoom
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.policy import takes_decodes
from nitsum_jax.engine.step.dispatched import PrefillChoice, Step
from nitsum_jax.engine.step.packing import Packer
from nitsum_jax.meshes.layout import InstanceSpec, Role


class WideInstance(Instance):
    """An instance that borrows the pools of others for each step."""

    depth = 1  # the others' steps come in between

    def __init__(self, cell: Cell, group: Group, on_step: Callable[[Instance, Step], None]):
        """Takes nothing; the group's executables must be ready."""
        super().__init__(**cell.parts(InstanceSpec(group)), on_step=on_step)
        self.lenders: Sequence[Instance] = ()

    def release(self) -> None:
        """Ends the reader; there is no pool to give back."""
        self.close()

    def abandon(self) -> None:
        """After a failed step: the lenders find their pools broken and renew them."""
        self._history = None
        self.broken = False

    def _claim_pool(self) -> None:
        pass

    def _start(self, step: Step, executable: jax.stages.Compiled, packer: Packer) -> None:
        for lender in self.lenders:
            lender.lend_pool()
        try:
            self.regain_pool()
            super()._start(step, executable, packer)
            self.lend_pool()
        finally:
            for lender in self.lenders:
                lender.regain_pool()


class HandedOver(NamedTuple):
    """A sequence went from one instance to another."""

    sequence: LiveRequest
    source: Instance
    target: Instance


class WidePrefill:
    """Decides which prompts the wide instance prefills, and hands them over; used by the engine's thread alone."""

    def __init__(self, cell: Cell, on_step: Callable[[Instance, Step], None]):
        """Asks for the executables of the widest group, if the cell is configured to use it."""
        self._cell = cell
        self._on_step = on_step
        self._instance: WideInstance | None = None
        size = min(cell.vmap.num_vshards, 1 << (len(cell.devices).bit_length() - 1))
        self._group: Group = cell.geometries.of(range(size)).order
        if cell.wide_prefill is not None and size > 1:
            cell.executables.want([self._group], LIKELY)

    @property
    def sequence(self) -> LiveRequest | None:
        """The sequence that is being prefilled or waits to be handed over."""
        return None if self._instance is None else next(iter(self._instance.rows.values()), None)

    def admit(
        self, sequence: LiveRequest, pages: int, instances: Sequence[Instance], known: int = 0
    ) -> Instance | None:
        """Whether the wide instance takes a waiting sequence now: itself, or None.

        Args:
          sequence: whose prompt is long enough or not.
          pages: that it takes at admission.
          instances: of the layout in force.
          known: tokens that need not be computed.
        """
        least = self._cell.wide_prefill
        if least is None or len(sequence.tokens) - known < least or self.sequence is not None:
            return None
        lenders = [instance for instance in instances if not set(self._group).isdisjoint(instance.order)]
        if (
            not all(len(one.order) < len(self._group) and set(one.order) <= set(self._group) for one in lenders)
            or {device for lender in lenders for device in lender.order} != set(self._group)
            or not any(lender.total_pages() >= pages and lender.spec.role != Role.PREFILL for lender in lenders)
            or any(lender.broken for lender in lenders)
            or not self._cell.executables.ready(self._group)
        ):
            return None
        if self._instance is None or self._instance.lost:
            self._instance = WideInstance(self._cell, self._group, self._on_step)
        self._instance.lenders = lenders
        return self._instance if self._instance.free_pages() >= pages and not self._instance.broken else None

    @property
    def running(self) -> WideInstance | None:
        """The wide instance, if there is one; steps of it may be in flight."""
        return self._instance

    def prefill(self, make_room: MakeRoom) -> tuple[WideInstance, Step] | None:
        """Starts the next chunk; returns where and what, or None if there is nothing to start now."""
        wide, sequence = self._instance, self.sequence
        if wide is None or sequence is None or wide.broken or not sequence.prefilling:
            return None
        before = wide.steps
        wide.dispatch(make_room, lambda _: PrefillChoice(sequence))
        return (wide, wide.outstanding[-1]) if wide.steps != before else None

    def hand_over(self) -> HandedOver | None:
        """Hands the sequence over if its last chunk was started; None if that is not so, or no instance has room."""
        wide, sequence = self._instance, self.sequence
        if wide is None or sequence is None or wide.broken or sequence.prefilling:
            return None
        for home in sorted(wide.lenders, key=lambda lender: (len(lender.rows) / lender.spec.tp, -lender.free_pages())):
            if takes_decodes(home) and move_sequence(self._cell, sequence, wide, home, wide.lenders):
                return HandedOver(sequence, wide, home)
        return None

    def lose(self, device: int) -> WideInstance | None:
        """A device is lost: the wide instance, if that ends it."""
        if self._instance is None or device not in self._group:
            return None
        return self._instance

    def close(self, timeout_s: float) -> None:
        """Ends the wide instance's thread, when the step in flight is read."""
        if self._instance is not None:
            self._instance.close()
            self._instance.wait_closed(timeout_s)
