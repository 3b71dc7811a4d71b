"""nitsum-profile --model: the profile of a loaded model on the devices that are present.

An engine is started with all executables.  Streams under it show the host's part of switches and steps; then it is
closed, and its executables and copies are timed one by one.
"""

import datetime
import os
import pathlib

import jax
import numpy as np

from nitsum_jax.bench.profiling import links, live
from nitsum_jax.bench.profiling.options import ProfilingOptions
from nitsum_jax.bench.profiling.steps import StepTimer
from nitsum_jax.bench.streams import Streams
from nitsum_jax.control.model.grids import Line, Plane
from nitsum_jax.control.model.profile import Profile, TpProfile, write_profile
from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.devices import discover, emulate_cpu_devices
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.models.loading import OpenModel, open_model
from nitsum_jax.models.pack import cut_bytes
from nitsum_jax.profiles import smooth
from nitsum_jax.runtime.startup.compile_cache import enable
from nitsum_jax.server import cli

_LONGEST = 2048
_CONTEXTS = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_QUICK_CONTEXTS = (0, 128, 512)
_LIVE = 8
_ROUNDS, _QUICK_ROUNDS = 7, 3
# Executables are not taken apart: their whole time stands with the attention, but for what steps can share.
_NOTHING = Line((1, 2), (0.0, 0.0))
_MOST_SHARED = 0.95  # of the least step


def measure(options: ProfilingOptions) -> None:
    """Measures, and writes the profile.

    Raises:
      NitsumError: model, layout, devices, memory or file cannot be used.
    """
    assert options.model is not None
    assert options.out is not None
    out = pathlib.Path(options.out)
    if out.is_dir() or not out.parent.is_dir():  # rather now than after minutes
        raise InvalidInputError(f"--out={out} must name a file in a folder that exists")
    enable(options.cache_dir)
    if options.devices is not None:
        emulate_cpu_devices(options.devices)
    model = open_model(options.model)
    tps = _tps(options, len(discover(options.devices)))
    config = EngineConfig(
        devices=options.devices,
        layout=None if tps is None else f"tp{tps[0]}",
        layouts=None if tps is None else tuple(f"tp{tp}" for tp in tps),
        dtype=options.dtype,
        quantization=options.quantization,
        kv_dtype=options.kv_dtype,
        max_batch=options.max_batch,
        max_model_len=options.max_model_len or min(model.config.max_context, _LONGEST),
        page_size=options.page_size,
        prefill_chunk=options.prefill_chunk,
        fused_steps=options.fused_steps,
    )
    streams = Streams()
    cli.err(f"loading {model.name} and compiling its steps")
    engine = start_engine(model, config, streams)
    try:
        engine.wait_for_layouts()
        tps = sorted({spec.tp for layout in engine.cell.known_layouts() for spec in layout.instances})
        cli.err(f"streams under TP {', '.join(map(str, tps))}")
        alive = live.walk(engine, streams, tps, min(_LIVE, options.max_batch))
    finally:
        engine.close()
    profile = _profile(options, model, engine, alive, tps)
    write_profile(profile, out)
    cli.out(f"{out}: TP {', '.join(map(str, profile.tps))}")


def _quantised(options: ProfilingOptions) -> str:
    return "" if options.quantization == "none" else f" weights --quantization={options.quantization},"


def _tps(options: ProfilingOptions, devices: int) -> list[int] | None:
    """The TPs to measure; None where the memory decides."""
    if options.layout is None:
        return [1 << bit for bit in range(devices.bit_length())]
    return sorted({spec.tp for spec in parse_layout(options.layout, devices).instances})


def _profile(options: ProfilingOptions, model: OpenModel, engine: Engine, alive: live.Live, tps: list[int]) -> Profile:
    cell = engine.cell
    rounds = _QUICK_ROUNDS if options.quick else _ROUNDS
    contexts = _QUICK_CONTEXTS if options.quick else _CONTEXTS
    shard, replicated = cut_bytes(model.config, cell.program.cut, cell.program.dtype, dict(cell.program.quantised))
    pool, vshards = cell.pool.shape, cell.vmap.num_vshards
    kv_bytes = pool.block_bytes * vshards // pool.page_size
    weights = shard * vshards + replicated
    times, beyond = {}, []
    for tp in tps:
        cli.err(f"timing the steps of TP {tp}")
        timer = StepTimer(cell, tp, rounds)
        decode, prefill = (_plane(timer, contexts, decode=which) for which in (True, False))
        shared_s = _shared_s(timer, contexts) if cell.fused else 0.0
        shared_s = min(shared_s, *(_MOST_SHARED * plane.seconds[0][0] for plane in (decode, prefill)))
        times[tp] = TpProfile(
            dense=Line(_NOTHING.points, (shared_s, shared_s)),
            head=_NOTHING,
            decode_attention=_less(decode, shared_s),
            prefill_attention=_less(prefill, shared_s),
            kv_capacity_tokens=_capacity(cell, tp, weights, kv_bytes),
        )
        streams = min(_LIVE, options.max_batch)
        bucket = next(shape for shape in timer.shapes if shape.is_decode and shape.batch >= streams)
        beyond.append(alive.gap_s[tp] - timer.seconds(bucket, alive.context))
    cli.err("timing copies")
    rate, latency = links.link(cell, rounds)
    device = cell.devices[0]
    emulated = f", {len(cell.devices)} emulated on {os.cpu_count()} cores" if device.platform == "cpu" else ""
    today = datetime.datetime.now(datetime.UTC).date()
    return Profile(
        name=options.name or f"{model.name}-{device.platform}",
        model=model.name,
        device=f"{device.device_kind}{emulated}",
        devices=len(cell.devices),
        source=f"measured by nitsum-profile{' --quick' if options.quick else ''} on {today}: {cell.program.dtype},"
        f"{_quantised(options)}"
        f" K={vshards}, JAX {jax.__version__}, one instance at a time",
        mixed_steps=cell.fused,
        page_size=pool.page_size,
        kv_bytes_per_token=kv_bytes,
        weight_bytes=weights,
        host_overhead_s=_digits(max(0.0, float(np.median(beyond)))),
        link_bytes_per_s=_digits(rate),
        transfer_latency_s=_digits(latency),
        switch_host_s=_digits(alive.switch_host_s),
        device_put_bytes_per_s=_digits(links.resharding(cell, tps[0], tps[-1], weights)),
        tps=times,
    )


def _plane(timer: StepTimer, contexts: tuple[int, ...], *, decode: bool) -> Plane:
    """Times of all buckets of a phase, over the work that they hold.

    A bucket costs the same however little of it is used, so it stands at the least and the most work that takes it.
    Twice the work of the largest takes two steps.
    """
    shapes = [shape for shape in timer.shapes if (shape.is_decode if decode else shape.is_prefill)]
    columns = [context for context in contexts if timer.fits(shapes[0], context)]
    if len(columns) < 2:
        raise InvalidInputError("--max_model_len leaves no room for two contexts: raise it, or lower --prefill_chunk")
    rows: dict[int, np.ndarray] = {}
    least = 1
    for shape in shapes:
        seconds = [timer.seconds(shape, c) if timer.fits(shape, c) else np.nan for c in columns]
        most = _work(shape)
        rows[least] = rows[most] = smooth.drawn_on(np.array(columns), np.array(seconds))
        least = most + 1
    rows[2 * most] = 2 * rows[most]
    return smooth.plane(list(rows), columns, np.array(list(rows.values())))


def _shared_s(timer: StepTimer, contexts: tuple[int, ...]) -> float:
    """What a chunk and sequences that decode save when they share a step: median over buckets and contexts."""
    saved = []
    for mixed in (shape for shape in timer.shapes if shape.is_mixed):
        decode = max(shape for shape in timer.shapes if shape.is_decode and shape.batch <= mixed.beside)
        apart = (StepShape(mixed.batch, mixed.tokens), decode)
        for context in contexts:
            if all(timer.fits(shape, context) for shape in (mixed, *apart)):
                both_s = timer.seconds(mixed, context)
                saved.append(sum(timer.seconds(shape, context) for shape in apart) - both_s)
    return _digits(max(0.0, float(np.median(saved)))) if saved else 0.0


def _less(plane: Plane, seconds: float) -> Plane:
    """A plane whose times are all so much shorter."""
    return Plane(plane.rows, plane.columns, tuple(tuple(s - seconds for s in row) for row in plane.seconds))


def _work(shape: StepShape) -> int:
    return shape.batch if shape.is_decode else shape.tokens


def _capacity(cell: Cell, tp: int, weights: int, kv_bytes: int) -> int:
    """Tokens of cache if devices kept the weights of this TP only; the engine keeps those of the least TP."""
    pool = cell.memory.tokens * tp
    least = cell.vmap.min_tp
    return pool + weights * (tp - least) // least // kv_bytes


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
