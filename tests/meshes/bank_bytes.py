"""How much memory the buffers of a weight bank take."""

from nitsum_jax.meshes.weight_bank import WeightBank


def bytes_resident(bank: WeightBank, device: int) -> int:
    """The bytes of all buffers of a device."""
    return sum(buffer.nbytes for held in bank._buffers[device].values() for buffer in held.values())


def bytes_shared(bank: WeightBank) -> int:
    """The memory in bytes that all buffers of emulated devices take: they share theirs, which is counted once."""
    buffers = [buffer for names in bank._buffers for held in names.values() for buffer in held.values()]
    return sum({buffer.unsafe_buffer_pointer(): buffer.nbytes for buffer in buffers}.values())
