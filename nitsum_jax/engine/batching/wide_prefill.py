"""A long prompt at a high TP, step by step in between the decode steps of the instances on the same devices.

Weights of every TP are in place and KV blocks have one shape, so a second layout can run on the same devices at the
same time: all launches go through the engine's thread, in one order.  The `Guest` owns no pool; for each of its steps
it borrows those of the instances on its devices.  When the prompt is done, its blocks move to the instance that will
decode it, behind the last chunk and without waiting for it, and the first token travels there in the token history.
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


class Guest(Instance):
    """An instance that borrows the pools of others for each step."""

    depth = 1  # the others' steps come in between

    def __init__(self, cell: Cell, group: Group, on_step: Callable[[Instance, Step], None]):
        """Takes nothing; the group's executables must be ready."""
        super().__init__(**cell.parts(InstanceSpec(group)), on_step=on_step)
        self.hosts: Sequence[Instance] = ()

    def release(self) -> None:
        """Ends the reader; there is no pool to give back."""
        self.close()

    def abandon(self) -> None:
        """After a failed step: the hosts find their pools broken and renew them."""
        self._history = None
        self.broken = False

    def _claim_pool(self) -> None:
        pass

    def _start(self, step: Step, executable: jax.stages.Compiled, packer: Packer) -> None:
        for host in self.hosts:
            host.lend_pool()
        try:
            self.regain_pool()
            super()._start(step, executable, packer)
            self.lend_pool()
        finally:
            for host in self.hosts:
                host.regain_pool()


class HandedOver(NamedTuple):
    """A sequence went from one instance to another."""

    sequence: LiveRequest
    source: Instance
    target: Instance


class WidePrefill:
    """Decides which prompts are prefilled by the guest, and hands them over; used by the engine's thread alone."""

    def __init__(self, cell: Cell, on_step: Callable[[Instance, Step], None]):
        """Asks for the executables of the widest group, if the cell is told to use it."""
        self._cell = cell
        self._on_step = on_step
        self._guest: Guest | None = None
        size = min(cell.vmap.num_vshards, 1 << (len(cell.devices).bit_length() - 1))
        self._group: Group = cell.geometries.of(range(size)).order
        if cell.wide_prefill is not None and size > 1:
            cell.executables.want([self._group], LIKELY)

    @property
    def sequence(self) -> LiveRequest | None:
        """The sequence that is being prefilled or waits to be handed over."""
        return None if self._guest is None else next(iter(self._guest.rows.values()), None)

    def admit(
        self, sequence: LiveRequest, pages: int, instances: Sequence[Instance], known: int = 0
    ) -> Instance | None:
        """Whether the guest takes a waiting sequence now: itself, or None.

        Args:
          sequence: whose prompt is long enough or not.
          pages: that it takes at admission.
          instances: of the layout in force.
          known: tokens that need not be computed.
        """
        least = self._cell.wide_prefill
        if least is None or len(sequence.tokens) - known < least or self.sequence is not None:
            return None
        hosts = [instance for instance in instances if not set(self._group).isdisjoint(instance.order)]
        if (
            not all(len(host.order) < len(self._group) and set(host.order) <= set(self._group) for host in hosts)
            or {device for host in hosts for device in host.order} != set(self._group)
            or not any(host.total_pages() >= pages and host.spec.role != Role.PREFILL for host in hosts)
            or any(host.broken for host in hosts)
            or not self._cell.executables.ready(self._group)
        ):
            return None
        if self._guest is None or self._guest.lost:
            self._guest = Guest(self._cell, self._group, self._on_step)
        self._guest.hosts = hosts
        return self._guest if self._guest.free_pages() >= pages and not self._guest.broken else None

    @property
    def running(self) -> Guest | None:
        """The guest, if there is one; steps of it may be in flight."""
        return self._guest

    def guest(self) -> Guest:
        """The guest, which is there once it was given a sequence."""
        assert self._guest is not None
        return self._guest

    def advance(self, make_room: MakeRoom) -> Step | HandedOver | None:
        """Starts the next chunk, or hands the sequence over if the last one was started.

        Returns:
          The step, or the sequence that was handed over; None if there is nothing to do now.
        """
        guest = self._guest
        sequence = self.sequence
        if guest is None or sequence is None or guest.broken:
            return None
        if sequence.prefilling:
            before = guest.steps
            guest.dispatch(make_room, lambda _: PrefillChoice(sequence))
            return guest.outstanding[-1] if guest.steps != before else None
        return self._hand_over(guest, sequence)

    def lose(self, device: int) -> Guest | None:
        """A device is lost: the guest, if that ends it."""
        if self._guest is None or device not in self._group:
            return None
        return self._guest

    def close(self, timeout_s: float) -> None:
        """Ends the guest's thread, when the step in flight is read."""
        if self._guest is not None:
            self._guest.close()
            self._guest.wait_closed(timeout_s)

    def _hand_over(self, guest: Guest, sequence: LiveRequest) -> HandedOver | None:
        for home in sorted(guest.hosts, key=lambda host: (len(host.rows) / host.spec.tp, -host.free_pages())):
            if takes_decodes(home) and move_sequence(self._cell, sequence, guest, home, guest.hosts):
                return HandedOver(sequence, guest, home)
        return None
