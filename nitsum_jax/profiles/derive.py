"""Puts step times together from kernel times: what docs/simulator/profiles.md describes under "Derived profiles"."""

import dataclasses
import math

import numpy as np

from nitsum_jax.control.model.profile import Profile, TpProfile
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.workspace import workspace_bytes
from nitsum_jax.profiles import smooth
from nitsum_jax.profiles.kernels import Kernels
from nitsum_jax.profiles.shapes import BYTES_PER_VALUE, Device, ModelShape

SOURCE = (
    "derived from kernel times of the public performance database of NVIDIA AIConfigurator (Apache-2.0; vLLM 0.24"
    " kernels, NCCL 2.29), bfloat16; assumed, not measured: host_overhead_s, switch_host_s, device_put_bytes_per_s"
)
TPS = (1, 2, 4, 8)
# Of `small_ops_s`, for each layer and unit of width; within a quarter of the table's rows for all three models.
_SMALL_EACH_S, _SMALL_SHARED_S = 1.2e-9, 4.3e-9

# Points of the tables, with the last size before and the first after a change of tiles where products have one.
TOKENS = (
    *(1, 2, 4, 8, 16, 17, 32, 33, 48, 49, 64, 65, 96, 97, 128, 129, 192, 193, 256, 257, 512, 513, 768, 769, 1024, 1025),
    *(1280, 1281, 1536, 1537, 1792, 1793, 2048, 2049, 2304, 2560, 2561, 3072, 3073, 4096, 4097, 8192, 16384),
)
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 257, 512, 1024, 2048)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTEXT = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
NEW_TOKENS = (1, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
CONTEXT_BEFORE = (0, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536, 131072)


@dataclasses.dataclass(frozen=True, slots=True)
class Assumptions:
    """What no table says.

    Attributes:
      host_overhead_s: time of a step in which the device waits for the host: CUDA graphs are assumed.
      switch_host_s: the host's part of a layout switch; as this project's engine takes on a CPU (docs/switching.md).
      device_put_bytes_per_s: a general resharding, in which arrays go through the memory of the host: half of what
        PCIe 5.0 x16 does.
      small_ops: norms, rotary embedding, activations, sums of partial results and sampling take so many times what the
        compiler of an H100 makes of them in a decode step of 32 sequences (docs/accelerators.md).
      memory_fraction: share of a device's memory for weights, KV cache and workspace; the rest is the libraries' own.
      kv_room: a TP is left out where less than this share of that is left for the KV cache.
      max_batch: sequences, and
      prefill_chunk: tokens of a prompt in the largest step, for the workspace.
      page_size: tokens in a KV block.
      devices: devices of the cell.

    Raises:
      InvalidInputError: a value is out of its range (on construction).
    """

    host_overhead_s: float = 0.3e-3
    small_ops: float = 1.0
    switch_host_s: float = 3e-3
    device_put_bytes_per_s: float = 25e9
    memory_fraction: float = 0.9
    kv_room: float = 0.1
    page_size: int = 16
    devices: int = 8
    max_batch: int = 256
    prefill_chunk: int = 2048

    def __post_init__(self) -> None:
        for name in ("memory_fraction", "kv_room"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise InvalidInputError(f"{name}={value!r} must be above 0 and at most 1")
        for name in ("host_overhead_s", "switch_host_s", "small_ops"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InvalidInputError(f"{name}={value!r} must be a number, at least 0")
        counts = ("page_size", "devices", "max_batch", "prefill_chunk")
        for name, least in (("device_put_bytes_per_s", 1), *((name, 1) for name in counts)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise InvalidInputError(f"{name}={value!r} must be a number, at least {least}")


def derive(model: ModelShape, device: Device, kernels: Kernels, assumptions: Assumptions) -> Profile:
    """The profile of a model on a cell of one kind of device.

    Raises:
      InvalidInputError: the model fits at no TP, or the tables lack kernels of it.
    """
    tps = {
        tp: derive_tp(model, tp, kernels, capacity, assumptions.small_ops)
        for tp in TPS
        if tp <= assumptions.devices and (capacity := kv_capacity(model, tp, device, assumptions)) is not None
    }
    if not tps:
        raise InvalidInputError(
            f"{model.title} does not fit {assumptions.devices} x {device.title}: use more or larger devices, or a"
            " larger share of their memory"
        )
    bandwidth, latency = kernels.link()
    return Profile(
        name=f"{model.name}-{device.name}",
        model=model.title,
        device=device.title,
        devices=assumptions.devices,
        source=SOURCE,
        mixed_steps=True,
        page_size=assumptions.page_size,
        kv_bytes_per_token=model.kv_bytes_per_token,
        weight_bytes=model.weight_bytes,
        host_overhead_s=assumptions.host_overhead_s,
        link_bytes_per_s=float(f"{bandwidth:.4g}"),
        transfer_latency_s=float(f"{latency:.4g}"),
        switch_host_s=assumptions.switch_host_s,
        device_put_bytes_per_s=assumptions.device_put_bytes_per_s,
        tps=tps,
    )


def kv_capacity(model: ModelShape, tp: int, device: Device, assumptions: Assumptions) -> int | None:
    """Tokens of KV cache of an instance, whole pages; None where too little memory is left for it."""
    temporary = workspace_bytes(
        width=model.D,
        mlp=model.F // tp,
        q_heads=model.H // tp,
        kv_heads=model.kv_heads(tp),
        head_dim=model.A,
        vocab=model.V,
        batch=assumptions.max_batch,
        chunk=assumptions.prefill_chunk,
        platform="gpu",
        fused=True,
    )
    usable = device.memory_bytes * assumptions.memory_fraction
    room = usable - model.weight_bytes / tp - temporary
    if room < usable * assumptions.kv_room:
        return None
    share = model.kv_bytes_per_token * model.kv_heads(tp) / model.G  # bytes of a token on one device
    return int(room / share) // assumptions.page_size * assumptions.page_size


def derive_tp(
    model: ModelShape, tp: int, kernels: Kernels, kv_capacity_tokens: int, small_ops: float = 0.0
) -> TpProfile:
    """Step times of an instance of one TP; `small_ops` as of `Assumptions`.

    Raises:
      InvalidInputError: the tables lack kernels of this TP.
    """
    heads = (model.H // tp, model.kv_heads(tp), model.A)
    return TpProfile(
        dense=smooth.line(TOKENS, dense_s(model, tp, kernels, TOKENS)),
        head=smooth.line(ROWS, head_s(model, tp, kernels, ROWS) + small_ops * small_ops_s(model, tp)),
        decode_attention=smooth.plane(SEQUENCES, CONTEXT, model.L * kernels.decode(SEQUENCES, CONTEXT, heads)),
        prefill_attention=smooth.plane(
            NEW_TOKENS, CONTEXT_BEFORE, model.L * kernels.prefill_chunk(NEW_TOKENS, CONTEXT_BEFORE, heads)
        ),
        kv_capacity_tokens=kv_capacity_tokens,
    )


def dense_s(model: ModelShape, tp: int, kernels: Kernels, tokens: tuple[int, ...]) -> np.ndarray:
    """Seconds of all layers' matmuls and their two all-reduces a layer, for so many new tokens."""
    qkv = model.H // tp + 2 * model.kv_heads(tp)
    layer = (
        kernels.matmul(tokens, qkv * model.A, model.D)
        + kernels.matmul(tokens, model.D, model.H // tp * model.A)
        + kernels.matmul(tokens, 2 * model.F // tp, model.D)
        + kernels.matmul(tokens, model.D, model.F // tp)
        + 2 * kernels.all_reduce(np.asarray(tokens) * model.D * BYTES_PER_VALUE, tp)
    )
    return model.L * layer


def small_ops_s(model: ModelShape, tp: int) -> float:
    """Seconds of all that is neither a product nor attention nor a message, in a decode step of 32 sequences.

    By the compiler's figures for an H100, the estimate of a step less its roofline: a part that every device does, and
    one that the devices of an instance share.  Bytes at the full rate of the memory, no launches.
    """
    return model.L * model.D * (_SMALL_EACH_S + _SMALL_SHARED_S / tp)


def head_s(model: ModelShape, tp: int, kernels: Kernels, rows: tuple[int, ...]) -> np.ndarray:
    """Seconds of the output head for so many rows, and of gathering their logits."""
    gather = kernels.all_gather(np.asarray(rows) * model.V * BYTES_PER_VALUE, tp)
    return kernels.matmul(rows, model.V // tp, model.D) + gather
