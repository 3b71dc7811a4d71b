"""nitsum-bench switch: layouts change under live streams of a real engine, and how long the streams stand still.

A stream's stall is the longest time between two of its tokens around the switch, less what is usual without a switch:
the mean gap of the old layout up to the switch, of the new one behind it, and of the slower of them for the gap in
which the switch is.
The copies of KV blocks stand beside a plain memcpy of as many bytes, and the whole beside the ways to change a layout
that need no virtual shards, measured in the same run: moving weights and KV with `jax.device_put`, starting an engine
anew, and dropping the KV cache and computing it again.
"""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from nitsum_jax.bench.alternatives import device_put_ms, memcpy_gbps
from nitsum_jax.bench.streams import Streams
from nitsum_jax.bench.switch_report import draw, table
from nitsum_jax.bench.switch_rows import Measured, SwitchRow
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.engine.switching.switch import SwitchReport
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.devices import emulate_cpu_devices
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.meshes.memory import spare_the_collector
from nitsum_jax.models.loading import OpenModel, open_model
from nitsum_jax.runtime.startup.compile_cache import enable
from nitsum_jax.server import cli

# Tokens of every stream before a switch and after it, from which the usual gap is taken.
_BEFORE, _AFTER = 8, 8
_MOST_TOKENS = 1024
_QUICK_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class SwitchOptions:
    """What the flags say."""

    model: str
    devices: int
    dtype: str
    quantization: str
    layers: int | None
    layouts: tuple[str, ...]
    live: tuple[int, ...]
    context: tuple[int, ...]
    json: str | None
    plot: str | None
    alternatives: bool
    quick: bool
    precopy: bool
    cache_dir: str | None


def read_options(argv: Sequence[str]) -> SwitchOptions:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("model", "smollm2-135m", "a model as nitsum-serve takes it", flag_values=values)
    flags.DEFINE_integer("devices", 4, "devices, emulated on a CPU", lower_bound=2, flag_values=values)
    flags.DEFINE_string("dtype", "auto", "float32, bfloat16 or auto", flag_values=values)
    flags.DEFINE_string("quantization", "none", "of the weights, as nitsum-serve --quantization", flag_values=values)
    flags.DEFINE_integer("layers", None, "only the first layers of the model", lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "layouts", None, "walk through these layouts, semicolons between (default: every TP, and back)",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("live", ["8", "32"], "live sequences, several with commas", flag_values=values)
    flags.DEFINE_list("context", ["128", "512", "2048"], "tokens of each, several with commas", flag_values=values)
    flags.DEFINE_bool(
        "quick", False, f"8 sequences of 128 tokens, and {_QUICK_LAYERS} layers unless --layers says otherwise: little "
        "to compile", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("alternatives", True, "measure the other ways too", flag_values=values)
    flags.DEFINE_bool("precopy", False, "copy KV blocks ahead of each switch", flag_values=values)
    flags.DEFINE_string("json", None, "file for the rows, one JSON object a line", flag_values=values)
    flags.DEFINE_string("plot", None, "file for a picture, .png or .svg", flag_values=values)
    flags.DEFINE_string("cache_dir", None, "folder of compiled steps (default: the user's)", flag_values=values)
    cli.parse(values, argv, __doc__ or "")
    if values.plot is not None and pathlib.Path(values.plot).suffix not in (".png", ".svg"):
        raise InvalidInputError(f"--plot={values.plot} must name a .png or .svg file")
    devices = values.devices
    steps = [1 << n for n in range(devices.bit_length()) if devices % (1 << n) == 0]
    walk = [f"tp{tp}x{devices // tp}" if tp < devices else f"tp{tp}" for tp in (*steps, 1)]
    return SwitchOptions(
        model=values.model,
        devices=devices,
        dtype=values.dtype,
        quantization=values.quantization,
        layers=_QUICK_LAYERS if values.quick and values.layers is None else values.layers,
        layouts=tuple(values.layouts.split(";")) if values.layouts else tuple(walk),
        live=(8,) if values.quick else _numbers("live", values.live),
        context=(128,) if values.quick else _numbers("context", values.context),
        json=values.json,
        plot=values.plot,
        alternatives=values.alternatives,
        quick=values.quick,
        precopy=values.precopy,
        cache_dir=values.cache_dir,
    )


def run(argv: Sequence[str]) -> None:
    """Measures, prints and writes; see the module.

    Raises:
      NitsumError: a flag, the model or the machine do not fit.
    """
    options = read_options(argv)
    logging.basicConfig(level="WARNING")
    cache = enable(options.cache_dir)
    emulate_cpu_devices(options.devices)
    model = open_model(options.model)
    if options.layers is not None:
        model = model.with_layers(options.layers)
    streams = Streams()
    longest = max(options.context)
    config = EngineConfig(
        devices=options.devices,
        layout=options.layouts[0],
        layouts=tuple(dict.fromkeys(options.layouts)),
        dtype=options.dtype,
        quantization=options.quantization,
        max_batch=max(options.live),
        max_model_len=min(model.config.max_context, longest + _MOST_TOKENS),
        deterministic=options.quick,  # one step to compile per phase
        precopy=options.precopy,
        max_queue=max(options.live),
    )
    kept = _steps_kept(cache)
    engine, rebuild_ms = _started(model, config, streams)
    cold = _steps_kept(cache) > kept
    try:
        cli.err("compiling the steps of all layouts")
        engine.wait_for_layouts()
        spare_the_collector()
        rows = []
        for live in options.live:
            for context in options.context:
                rows += _walk(engine, streams, options, live, context)
    finally:
        engine.close()
    if options.alternatives:
        if cold:  # it compiled; others that start anew find their executables
            del engine  # and its memory
            engine, rebuild_ms = _started(model, config, streams)
            engine.close()
        rows = [item.with_alternatives(rebuild=rebuild_ms) for item in rows]
    cli.out(table(rows))
    if options.json is not None:
        lines = [json.dumps(dataclasses.asdict(item.row)) + "\n" for item in rows]
        pathlib.Path(options.json).write_text("".join(lines), encoding="utf-8")
    if options.plot is not None:
        draw(rows, options.plot)


def _started(model: OpenModel, config: EngineConfig, streams: Streams) -> tuple[Engine, float]:
    start = time.perf_counter()
    engine = start_engine(model, config, streams)
    return engine, 1000 * (time.perf_counter() - start)


def _steps_kept(cache: pathlib.Path | None) -> int:
    """Compiled steps in the cache."""
    return 0 if cache is None else sum(1 for _ in cache.glob("steps/*"))


def _walk(engine: Engine, streams: Streams, options: SwitchOptions, live: int, context: int) -> list[Measured]:
    """All switches of the walk under the same streams."""
    names, first_ms = _prefilled(engine, streams, options.layouts[0], live, context)
    streams.wait(dict.fromkeys(names, _BEFORE))
    rows = []
    for before, after in zip(options.layouts, options.layouts[1:], strict=False):
        cli.err(f"{before} -> {after} under {live} sequences of {context} tokens")
        asked = {name: streams.count(name) for name in names}
        report = engine.set_layout(after).result()
        seen = {name: streams.count(name) for name in names}
        streams.wait({name: count + _AFTER for name, count in seen.items()})
        rows.append(_row(report, context, streams, asked, seen))
    streams.stop(engine, names)
    if options.alternatives:
        recompute = {options.layouts[0]: first_ms}
        for layout in options.layouts[1:]:
            if layout not in recompute:
                names, recompute[layout] = _prefilled(engine, streams, layout, live, context)
                streams.stop(engine, names)
        rows = [
            item.with_alternatives(
                device_put=_device_put_ms(engine, options, item.row), recompute=recompute[item.row.to_layout]
            )
            for item in rows
        ]
    return rows


def _prefilled(engine: Engine, streams: Streams, layout: str, live: int, context: int) -> tuple[list[str], float]:
    """Starts the streams in a layout: their names, and the milliseconds until all of them have a token."""
    engine.set_layout(layout).result()
    begin = time.monotonic()
    names = streams.start(engine, live, context, _MOST_TOKENS, seed=context)
    streams.wait(dict.fromkeys(names, 1))
    return names, 1000 * (max(streams.times(name)[0] for name in names) - begin)


def _row(report: SwitchReport, context: int, streams: Streams, asked: dict[str, int], seen: dict[str, int]) -> Measured:
    gaps = {name: np.diff(streams.times(name)) for name in asked}
    # The mean: emulated devices share their cores and take turns, so that short gaps alternate with long ones.
    step = float(np.mean(np.concatenate([gaps[name][seen[name] + 1 :] for name in asked])))
    earlier = [gaps[name][max(0, count - _BEFORE) : max(1, count - 1)] for name, count in asked.items()]
    step_before = float(np.mean(np.concatenate(earlier)))
    waits, longest = [], []
    for name, gap in gaps.items():
        # The token behind the last one that was seen when the switch was over is the first of the new layout.
        last = seen[name] - 1
        old, new = gap[max(0, asked[name] - 1) : last], gap[last + 1 : last + 2]
        waits.append(max(old.max(initial=0) - step_before, gap[last] - max(step_before, step), new.max() - step, 0))
        longest.append(max(old.max(initial=0), gap[last], new.max()))
    stalls = 1000 * np.array(waits)
    moved = report.kv_bytes_moved
    row = SwitchRow(
        from_layout=report.from_layout,
        to_layout=report.to_layout,
        live_sequences=len(asked),
        context_tokens=context,
        weight_bytes_moved=report.weight_bytes_moved,
        kv_bytes_moved=moved,
        kv_bytes_minimum=report.kv_bytes_minimum,
        stall_ms_p50=float(np.median(stalls)),
        stall_ms_p99=float(np.percentile(stalls, 99)),
        decode_step_ms=1000 * step,
        transfer_gbps=(moved - report.kv_bytes_ahead) / report.transfer_ms / 1e6 if report.transfer_ms else 0.0,
        memcpy_gbps=memcpy_gbps(max(moved, 1 << 20)),
        alternatives={},
    )
    return Measured(
        row,
        decode_step_before_ms=1000 * step_before,
        gap_ms_p99=1000 * float(np.percentile(longest, 99)),
        kv_bytes_ahead=report.kv_bytes_ahead,
        host_ms=report.host_ms,
        transfer_ms=report.transfer_ms,
    )


def _device_put_ms(engine: Engine, options: SwitchOptions, row: SwitchRow) -> float:
    cell = engine.cell
    before, after = (parse_layout(text, options.devices) for text in (row.from_layout, row.to_layout))
    pages = -(-(row.context_tokens + _BEFORE) // cell.program.pool.page_size)
    return device_put_ms(cell, before, after, row.live_sequences * pages * cell.vmap.num_vshards)


def _numbers(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    try:
        numbers = tuple(int(text) for text in texts)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InvalidInputError(f"--{name}={','.join(texts)} must be numbers of at least 1, separated by commas")
    return numbers
