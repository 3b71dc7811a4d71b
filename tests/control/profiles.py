"""Profiles made by hand, for tests."""

import dataclasses

from nitsum_jax.control.model.grids import Line, Plane
from nitsum_jax.control.model.profile import Profile, TpProfile

LAYERS, WIDTH, KV_BYTES, WEIGHTS = 32, 4096, 131_072, 16e9
FLOPS, BYTES = 600e12, 2.6e12  # what one device reaches


def roofline_profile(tps: tuple[int, ...] = (1, 2, 4, 8), *, devices: int = 8, mixed_steps: bool = True) -> Profile:
    """A profile with the proportions of an 8-billion-weight model: bytes or arithmetic, whichever takes longer."""
    return Profile(
        name="roofline",
        model="Roofline-8B",
        device="imagined",
        devices=devices,
        source="made by hand for tests",
        mixed_steps=mixed_steps,
        page_size=16,
        kv_bytes_per_token=KV_BYTES,
        weight_bytes=int(WEIGHTS),
        host_overhead_s=0.0003,
        link_bytes_per_s=250e9,
        transfer_latency_s=20e-6,
        switch_host_s=0.002,
        device_put_bytes_per_s=25e9,
        tps={tp: roofline_tp(tp) for tp in tps},
    )


def roofline_tp(tp: int) -> TpProfile:
    tokens = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    sequences = (1, 4, 16, 64, 256)
    contexts = (0, 256, 1024, 4096, 16384, 65536)
    chunks = (1, 64, 256, 1024, 4096, 8192)

    def dense(count: int) -> float:
        reduce = 0 if tp == 1 else LAYERS * 2 * (5e-6 + count * WIDTH * 2 / 200e9)
        return max(WEIGHTS / BYTES, count * WEIGHTS / FLOPS) / tp + reduce

    def prefill(new: int, before: int) -> float:
        return LAYERS * (5e-6 + 4 * new * (before + new / 2) * WIDTH / FLOPS / tp)

    return TpProfile(
        dense=Line(tokens, tuple(dense(count) for count in tokens)),
        head=Line((1, 64, 256), tuple((0.4e-3 + 1e-6 * rows) / tp for rows in (1, 64, 256))),
        decode_attention=Plane(
            sequences,
            contexts,
            tuple(tuple(LAYERS * 5e-6 + n * s * KV_BYTES / BYTES / tp for s in contexts) for n in sequences),
        ),
        prefill_attention=Plane(chunks, contexts, tuple(tuple(prefill(new, s) for s in contexts) for new in chunks)),
        kv_capacity_tokens=int((72e9 * tp - WEIGHTS) / KV_BYTES),
    )


def with_times(profile: Profile, tp: int, **changes: object) -> Profile:
    """The profile with other step times of one TP."""
    times = dataclasses.replace(profile.tps[tp], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(profile, tps=dict(profile.tps) | {tp: times})
