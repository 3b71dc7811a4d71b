"""nitsum-bench demo: a shifting load on a paced cell, adaptive control against static layouts, live in the terminal."""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence

import grpc.aio
from absl import flags

from nitsum_jax.bench.demo.load import PHASES, TIERS, demo_load
from nitsum_jax.bench.demo.prediction import adaptive_policy, best_uneven, predict, static_policy
from nitsum_jax.bench.demo.report import ADAPTIVE, Entry, tables, to_json
from nitsum_jax.bench.demo.screen import Screen, attainments
from nitsum_jax.bench.demo.server import child, settled
from nitsum_jax.bench.serve.player import Player
from nitsum_jax.bench.serve.results import Results
from nitsum_jax.bench.serve.session import Session, drive
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.tiers import tiers_toml
from nitsum_jax.errors import InvalidInputError, UnavailableError, one_line
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.server import cli
from nitsum_jax.server.proto import admin_pb2, admin_pb2_grpc, nitsum_pb2, nitsum_pb2_grpc
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.workloads.workload import Workload

DEVICES = 8
_MAX_BATCH = 64
_READY_S = 900.0
_LOOK_S = 0.5
USAGE = """nitsum-bench demo runs the whole server, with a tiny model on emulated devices, at the pace of 8 accelerators
with a large model, under a load that shifts between chat and code. It shows where instances are and how tiers fare, and
ends with a table: adaptive control against static layouts on the same load, live and as the simulator predicts them.

  nitsum-bench demo --quick

All figures are PACED: they are of the profile, not of this machine. Where this machine cannot keep the pace they are
marked invalid: raise --time_scale."""


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """What the flags say; None of `layouts`: the best homogeneous one and the best other one by the simulator."""

    profile: str
    time_scale: float
    phase_s: float
    phases: int
    quick: bool
    rate_scale: float
    seed: int
    layouts: tuple[str, ...] | None
    json: str | None
    folder: pathlib.Path


def read_options(argv: Sequence[str]) -> DemoOptions:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("quick", False, "two phases, and the best static layout alone", flag_values=values)
    flags.DEFINE_string("profile", "qwen2.5-32b-h100", "at whose pace: name or .json file", flag_values=values)
    flags.DEFINE_float(
        "time_scale", 6.0, "seconds here for a second of the target", lower_bound=0.1, flag_values=values
    )
    flags.DEFINE_float(
        "phase_seconds",
        20.0,
        "length of a phase, of the target's seconds",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_float("rate_scale", 1.0, "what the rate is multiplied with", lower_bound=1e-3, flag_values=values)
    flags.DEFINE_integer("seed", 1, "of the load", lower_bound=0, flag_values=values)
    flags.DEFINE_string(
        "layouts",
        None,
        "static layouts to compare with, semicolons between them; if not given, the best one of one TP and the "
        "best other one, by the simulator",
        flag_values=values,
    )
    flags.DEFINE_string("json", None, "file that gets all figures", flag_values=values)
    flags.DEFINE_string(
        "out", None, "folder for the server's log and its decisions (decisions.jsonl)", flag_values=values
    )
    cli.parse(values, argv, USAGE)
    layouts = values.layouts
    return DemoOptions(
        profile=values.profile,
        time_scale=values.time_scale,
        phase_s=values.phase_seconds,
        phases=2 if values.quick else len(PHASES),
        quick=values.quick,
        rate_scale=values.rate_scale,
        seed=values.seed,
        layouts=None if layouts is None else tuple(part.strip() for part in layouts.split(";") if part.strip()),
        json=values.json,
        folder=pathlib.Path(values.out or tempfile.mkdtemp(prefix="nitsum-demo-")),
    )


def run(argv: Sequence[str]) -> None:
    """Runs the subcommand.

    Raises:
      NitsumError: the flags are wrong, or the server does not start.
    """
    options = read_options(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(_Demo(options).run())
    except grpc.aio.AioRpcError as error:
        raise UnavailableError(f"the server failed: {one_line(error.details() or '')}; see {options.folder}") from None


class _Demo:
    """One run of the demonstration."""

    def __init__(self, options: DemoOptions):
        self._options = options
        self._setting = Setting(CostModel(load_profile(options.profile)), TIERS, DEVICES)
        self._workload: Workload = demo_load(
            options.phase_s, options.rate_scale, options.seed, PHASES[: options.phases]
        )
        tps = self._setting.tps
        self._first = _even(tps[len(tps) // 2])
        self._screen = Screen()

    async def run(self) -> None:
        options, setting, workload = self._options, self._setting, self._workload
        layouts = options.layouts if options.layouts is not None else await asyncio.to_thread(self._best)
        minutes = (1 + len(layouts)) * workload.seconds * options.time_scale / 60
        cli.out(
            f"{len(workload.requests)} requests in {workload.seconds:g} s of the target, at time_scale "
            f"{options.time_scale:g}, under {', '.join(('adaptive control', *layouts))}: about {minutes:.0f} minutes; "
            f"log and decisions in {options.folder}"
        )
        tiers = options.folder / "tiers.toml"
        tiers.write_text(tiers_toml(TIERS), encoding="utf-8")
        entries = []
        async with (
            child(self._flags(tiers), options.folder / "server.log", _READY_S) as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
            for layout in (*layouts, self._first):
                await stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout=layout, prepare=True))
            await settled(stub)
            for name in (ADAPTIVE, *layouts):
                entries.append(await self._play(channel, name))
        pace = f"{setting.cost.profile.name}, time_scale {options.time_scale:g}"
        cli.out("\n" + tables(entries, pace))
        if options.json is not None:
            pathlib.Path(options.json).write_text(json.dumps(to_json(entries, pace), indent=1) + "\n", encoding="utf-8")

    def _best(self) -> tuple[str, ...]:
        """Prints what the simulator expects of each policy; returns the static layouts that are worth a live run."""
        setting, workload = self._setting, self._workload
        even = tuple(_even(tp) for tp in setting.tps)
        uneven = best_uneven(setting, workload, _MAX_BATCH)
        others: tuple[str, ...] = () if uneven is None else (uneven,)
        policies = {name: static_policy(setting, name) for name in (*even, *others)}
        policies[ADAPTIVE] = adaptive_policy(setting, self._first)
        goodput = {n: predict(setting, workload, p, _MAX_BATCH).total.goodput for n, p in policies.items()}
        cli.out("the simulator expects a goodput, requests/s, of")
        for name in sorted(goodput, key=lambda n: -goodput[n]):
            cli.out(f"  {name:28} {goodput[name]:.2f}")
        worth = [max(even, key=lambda n: goodput[n]), *others]
        worth.sort(key=lambda n: -goodput[n])
        return tuple(worth[: 1 if self._options.quick else None])

    def _flags(self, tiers: pathlib.Path) -> list[str]:
        options = self._options
        return [
            "--model=tiny-random",
            f"--devices={DEVICES}",
            f"--layout={self._first}",
            f"--pace={options.profile}",
            f"--time_scale={options.time_scale:g}",
            f"--tiers={tiers}",
            "--planner=on",
            f"--decision_log={options.folder / 'decisions.jsonl'}",
            f"--max_batch={_MAX_BATCH}",
            "--max_queue=100000",
            # Small pieces, for which no other step on this machine waits long; the pace counts them as one chunk.
            "--prefill_chunk=256",
            # Small block tables: they travel with every step.
            "--page_size=128",
            f"--max_model_len={self._longest()}",
            "--noprefix_cache",  # the simulator has none, and random prompts have nothing in common
        ]

    def _longest(self) -> int:
        """Tokens of the longest request, to the next 1024."""
        most = max(request.prompt_tokens + request.output_tokens for request in self._workload.requests)
        return -(-most // 1024) * 1024

    async def _play(self, channel: grpc.aio.Channel, name: str) -> Entry:
        """One policy on the load, live and simulated."""
        options, setting = self._options, self._setting
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        layout = self._first if name == ADAPTIVE else name
        await admin.ForceLayout(admin_pb2.ForceLayoutRequest(layout=layout))  # pauses the planner
        if name == ADAPTIVE:
            await admin.SetControl(admin_pb2.SetControlRequest(paused=False))
        before = (await stub.GetLayout(nitsum_pb2.GetLayoutRequest())).stats.switches
        watching: list[asyncio.Task[None]] = []

        def begun(player: Player, scale: float) -> None:
            watching.append(asyncio.create_task(self._watch(stub, player, scale, name)))

        session = Session(self._workload, TIERS, seed=options.seed)
        try:
            results: Results = await drive(channel, session, begun=begun)
        finally:
            for task in watching:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            self._screen.done()
        after = (await stub.GetLayout(nitsum_pb2.GetLayoutRequest())).stats.switches
        policy = adaptive_policy(setting, self._first) if name == ADAPTIVE else static_policy(setting, name)
        simulated = await asyncio.to_thread(predict, setting, self._workload, policy, _MAX_BATCH)
        total = results.metrics.total
        cli.out(f"{name}: goodput {total.goodput:.2f}/s, attainment {total.attainment:.1%}")
        return Entry(name, results, simulated, after - before)

    async def _watch(
        self, stub: nitsum_pb2_grpc.GenerationServiceStub, player: Player, scale: float, name: str
    ) -> None:
        start = time.monotonic()
        while True:
            now = (time.monotonic() - start) / scale
            state = await stub.GetLayout(nitsum_pb2.GetLayoutRequest())
            phase = PHASES[min(int(now / self._options.phase_s), self._options.phases - 1)].name
            self._screen.show(f"{name}, {phase}", now, state, attainments(player.played, TIERS, scale, now))
            await asyncio.sleep(_LOOK_S)


def _even(tp: int) -> str:
    """The layout of one TP."""
    if DEVICES % tp:
        raise InvalidInputError(f"TP {tp} does not divide {DEVICES} devices: give --layouts")
    return f"tp{tp}x{DEVICES // tp}" if tp < DEVICES else f"tp{tp}"
