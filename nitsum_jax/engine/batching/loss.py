"""Going on without a device, and with it again."""

from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.policy import Listener, leave_instance
from nitsum_jax.meshes.layout import InstanceSpec, Layout


def layout_without(cell: Cell, layout: Layout) -> Layout | None:
    """What is left of a layout, and the other devices of the groups that broke up each for itself; None: no such.

    Args:
      cell: with the lost devices noted.
      layout: its instances that are left.
    """
    used = cell.lost.union(layout.devices)
    if cell.vmap.min_tp > 1:
        return None
    rest = [InstanceSpec((device,)) for device in range(len(cell.devices)) if device not in used]
    return Layout((*layout.instances, *rest)) if rest else None


def layout_with(cell: Cell, device: int, layout: Layout, wanted: Layout) -> Layout | None:
    """The layout to have when a device is back; None: it is of no use alone.

    Args:
      cell: with the lost devices noted.
      device: that is back.
      layout: in force.
      wanted: that was asked for last.
    """
    if not cell.lost.intersection(wanted.devices):
        return wanted
    return Layout((*layout.instances, InstanceSpec((device,)))) if cell.vmap.min_tp == 1 else None


def write_off(instance: Instance, listener: Listener) -> list[LiveRequest]:
    """Takes out what is in a lost instance, or still has a token to come from it: to be computed anew."""
    instance.lost = True
    victims = list(instance.rows.values())
    for step in instance.outstanding:
        step.settled = True
        steps = zip(step.sequences, step.emits, step.epochs, strict=True)
        victims += [s for s, emits, epoch in steps if emits and epoch == s.epoch and s.finish is None]
    found = list(dict.fromkeys(victims))
    for sequence in found:
        sequence.forget_flights()
        leave_instance(sequence, listener)
    return found
