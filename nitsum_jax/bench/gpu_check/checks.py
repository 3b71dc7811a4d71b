"""What must be true on an accelerator: its numbers are those of the CPU, and wrapping copies nothing."""

import jax
import numpy as np

from nitsum_jax.bench.gpu_check.shapes import TINY
from nitsum_jax.bench.gpu_check.timed_step import TimedModel
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.vshards import VshardMap
from nitsum_jax.meshes.weight_bank import WeightBank

# Of the largest logit.  A GPU may multiply float32 with fewer bits (TF32).
TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-2}


def numerics(device: jax.Device, dtype: str) -> tuple[bool, str]:
    """The same prompt through the same weights here and on the CPU: (whether they agree, what was found)."""
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, 48).astype(np.int32)
    here = TimedModel(TINY, 4, dtype, device, max_batch=1, max_len=64)
    there = TimedModel(TINY, 4, dtype, jax.devices("cpu")[0], max_batch=1, max_len=64)
    there.replace_leaves(tuple(np.asarray(leaf) for leaf in here.leaves))
    a, b = here.logits(tokens), there.logits(tokens)
    error = float(np.abs(a - b).max() / np.abs(b).max())
    same = int(a.argmax()) == int(b.argmax())
    return error <= TOLERANCE[dtype] and bool(np.isfinite(a).all()), (
        f"largest difference {error:.1e} of the largest logit (at most {TOLERANCE[dtype]:.0e}), "
        f"{'the same' if same else 'another'} greedy token"
    )


def pointers(devices: tuple[jax.Device, ...]) -> tuple[bool, str]:
    """Wraps vshards for every TP and compares addresses: (whether nothing was copied, what was found)."""
    count = 1 << (len(devices).bit_length() - 1)
    vmap = VshardMap(max(2, count))
    bank = WeightBank(devices, vmap)
    for vshard in range(vmap.num_vshards):
        for device in range(count):
            bank.add_cut("w", vshard, device, np.full((256, 256), vshard, np.float32))
    owned = {
        shard.data.unsafe_buffer_pointer()
        for device in range(count)
        for array in bank.wrap(InstanceSpec((device,)))["w"]
        for shard in array.addressable_shards
    }
    views = same = 0
    tp = 1
    while tp <= count:
        for array in bank.wrap(InstanceSpec(tuple(range(tp))))["w"]:
            for shard in array.addressable_shards:
                views += 1
                same += shard.data.unsafe_buffer_pointer() in owned
        tp *= 2
    return same == views, f"{same} of {views} wrapped shards lie where they were, TP 1 to {count}"
