"""Compiling in the background: once per size, kept on disk, loaded for other devices, and failing without harm."""

import dataclasses
import os
import pathlib
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nitsum_jax.engine.executables import compiling as module
from nitsum_jax.engine.executables.compiling import ASKED_FOR, Executables, Group, compile_counter
from nitsum_jax.engine.executables.progress import CompileProgress, LayoutProgress, WantedLayout
from nitsum_jax.engine.executables.rebind import Blueprint, can_rebind, without_jax_cache
from nitsum_jax.engine.executables.step_store import StepStore
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.step.program import Program
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.meshes.mesh import TP_AXIS
from tests.engine.rig import StepRig

PREFILL, DECODE = StepShape(1, 8), StepShape(4, 1)
SPEC = PartitionSpec(TP_AXIS)


def mesh_of(group: Group) -> Mesh:
    return Mesh(np.array([jax.devices()[device] for device in group]), (TP_AXIS,))


def compile_stand_in(mesh: Mesh, factor: float = 2.0) -> jax.stages.Compiled:
    """A program of a step's kind (a donated array sharded along "tp") that compiles in no time."""

    def step(x: jax.Array) -> jax.Array:
        return x * jnp.float32(factor) + jax.lax.psum(x, TP_AXIS)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    size = 4 * mesh.devices.size
    abstract = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=NamedSharding(mesh, SPEC))
    with without_jax_cache() as name:
        mapped.__name__ = name
        return jax.jit(mapped, donate_argnums=0).lower(abstract).compile()


def run_stand_in(compiled: jax.stages.Compiled, group: Group) -> jax.Array:
    x = np.arange(4 * len(group), dtype=np.float32)
    result: jax.Array = compiled(jax.device_put(jnp.asarray(x), NamedSharding(mesh_of(group), SPEC)))
    return result


@pytest.fixture(scope="module")
def program() -> Program:
    return StepRig("llama_mqa", "float32", vshards=2, batch=1, max_model_len=16).program


# ---- rebind


@pytest.mark.parametrize(("first", "second"), [((0,), (3,)), ((0, 1), (2, 3)), ((2, 0, 3, 1), (6, 4, 7, 5))])
def test_an_executable_runs_on_other_devices(first: Group, second: Group) -> None:
    compiled = compile_stand_in(mesh_of(first))
    expected = np.asarray(run_stand_in(compiled, first))
    blueprint = pickle.loads(pickle.dumps(Blueprint(compiled, list(mesh_of(first).devices.flat))))
    compiles = compile_counter().count
    loaded = blueprint.load(list(mesh_of(second).devices.flat))
    result = run_stand_in(loaded, second)
    np.testing.assert_array_equal(result, expected)
    assert result.devices() == {jax.devices()[device] for device in second}
    assert result.sharding.is_equivalent_to(NamedSharding(mesh_of(second), SPEC), 1)
    assert compile_counter().count == compiles


def test_emulated_devices_can_be_exchanged() -> None:
    for _ in range(2):  # the second time JAX's cache might have it, and what comes from there cannot be serialised
        assert can_rebind.__wrapped__(jax.devices()[0], jax.devices()[1])


# ---- store


def stored(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.step"))


def test_a_kept_step_is_found_again(program: Program, tmp_path: pathlib.Path) -> None:
    device = jax.devices()[0]
    store = StepStore(tmp_path / "steps")
    assert store.get(program, DECODE, device, 1) is None
    compiled = compile_stand_in(mesh_of((0,)))
    store.put(program, DECODE, device, 1, Blueprint(compiled, [device]))
    assert len(list((tmp_path / "steps").iterdir())) == 1  # and no half-written file beside it
    found = StepStore(tmp_path / "steps").get(program, DECODE, device, 1)
    assert found is not None
    result = run_stand_in(found.load([jax.devices()[1]]), (1,))
    np.testing.assert_array_equal(result, run_stand_in(compiled, (0,)))


def test_anything_that_changes_the_program_changes_its_name(
    program: Program, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = jax.devices()[0]
    store = StepStore(tmp_path)
    store.put(program, DECODE, device, 1, Blueprint(compile_stand_in(mesh_of((0,))), [device]))
    assert store.get(program, DECODE, device, 1) is not None
    changed = [
        dataclasses.replace(program, max_model_len=17),
        dataclasses.replace(program, dtype="bfloat16"),
        dataclasses.replace(program, config=dataclasses.replace(program.config, rope_theta=5.0)),
        dataclasses.replace(program, pool=dataclasses.replace(program.pool, blocks=program.pool.blocks + 1)),
    ]
    for other in changed:
        assert store.get(other, DECODE, device, 1) is None
    assert store.get(program, PREFILL, device, 1) is None
    assert store.get(program, DECODE, device, 2) is None
    monkeypatch.setattr(
        "nitsum_jax.engine.executables.step_store._surroundings", lambda: "another JAX, or other sources of ours"
    )
    assert store.get(program, DECODE, device, 1) is None


@pytest.mark.parametrize("damage", [b"", b"not a pickle", pickle.dumps({"not": "a blueprint"}), None])
def test_a_damaged_file_is_made_anew(
    damage: bytes | None, program: Program, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = jax.devices()[0]
    store = StepStore(tmp_path)
    blueprint = Blueprint(compile_stand_in(mesh_of((0,))), [device])
    store.put(program, DECODE, device, 1, blueprint)
    (path,) = stored(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage is None else damage)
    assert store.get(program, DECODE, device, 1) is None
    store.put(program, DECODE, device, 1, blueprint)
    assert stored(tmp_path) == [path]
    assert store.get(program, DECODE, device, 1) is not None


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    program: Program, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = jax.devices()[0]
    (tmp_path / "file").write_text("in the way")
    store = StepStore(tmp_path / "file")
    store.put(program, DECODE, device, 1, Blueprint(compile_stand_in(mesh_of((0,))), [device]))
    assert "are not kept" in caplog.text
    assert store.get(program, DECODE, device, 1) is None


def test_without_a_compilation_cache_nothing_is_kept(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[0]
    with without_jax_cache():
        store = StepStore.beside_jax_cache()
    store.put(program, DECODE, device, 1, Blueprint(compile_stand_in(mesh_of((0,))), [device]))
    assert store.get(program, DECODE, device, 1) is None


# ---- executables


@dataclasses.dataclass
class Workshop:
    """Executables whose compiler is a stand-in.

    Attributes:
      compiled: (TP, shape) of every compilation, in order.
      told: how often `on_ready` was called.
      gate: compilations wait for it.
      failing: TPs that do not compile.
    """

    folder: pathlib.Path
    compiled: list[tuple[int, StepShape]] = dataclasses.field(default_factory=list)
    told: threading.Semaphore = dataclasses.field(default_factory=lambda: threading.Semaphore(0))
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)
    failing: set[int] = dataclasses.field(default_factory=set)
    open: list[Executables] = dataclasses.field(default_factory=list)

    def compile(self, program: Program, shape: StepShape, mesh: Mesh, *, name: str = "step") -> jax.stages.Compiled:
        assert self.gate.wait(30)
        assert name.startswith("step")
        self.compiled.append((mesh.devices.size, shape))
        if mesh.devices.size in self.failing:
            raise RuntimeError("XLA says no\nat great length")
        return compile_stand_in(mesh)

    def start(self, program: Program, threads: int = 2) -> Executables:
        started = Executables(program, (PREFILL, DECODE), mesh_of, self.told.release, threads=threads)
        self.open.append(started)
        return started


@pytest.fixture
def workshop(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    shop = Workshop(tmp_path)
    monkeypatch.setattr(module, "compile_step", shop.compile)
    # Not beside JAX's cache: engines of other tests must not find stand-ins there.
    monkeypatch.setattr(StepStore, "beside_jax_cache", lambda: StepStore(tmp_path))
    yield shop
    shop.gate.set()
    for executables in shop.open:
        executables.close()


def in_time(function: Callable[[], None]) -> None:
    """Calls a function that must return; the test fails if it does not."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_a_group_is_ready_when_all_its_buckets_are(program: Program, workshop: Workshop) -> None:
    executables = workshop.start(program)
    executables.want([(0, 1)], 0)
    assert not executables.ready((0, 1))
    assert not executables.wait([(0, 1)], timeout_s=0.01)
    workshop.gate.set()
    assert executables.wait([(0, 1)], timeout_s=30)
    assert executables.ready((0, 1))
    assert executables.failure((0, 1)) is None
    assert workshop.told.acquire(timeout=30)
    by_shape = executables.of((0, 1))
    assert set(by_shape) == {PREFILL, DECODE}
    assert run_stand_in(by_shape[DECODE], (0, 1)).shape == (8,)
    assert not executables.ready((2, 3))


def test_groups_of_one_size_are_compiled_once(program: Program, workshop: Workshop) -> None:
    workshop.gate.set()
    executables = workshop.start(program)
    groups: list[Group] = [(0,), (1,), (2,), (3,)]
    executables.want(groups, 0)
    executables.wait(groups)
    assert sorted(workshop.compiled) == [(1, PREFILL), (1, DECODE)]
    for group in groups:
        assert run_stand_in(executables.of(group)[DECODE], group).devices() == {jax.devices()[group[0]]}


def test_it_is_told_how_far_a_layout_is(program: Program, workshop: Workshop) -> None:
    executables = workshop.start(program, threads=1)
    groups = ((0, 1), (2, 3))
    wanted = WantedLayout(parse_layout("tp2x2", 4), groups, time.monotonic())
    assert executables.progress([]) == CompileProgress()
    executables.want(groups, 0)
    progress = executables.progress([wanted, wanted])
    while not any(one.activity == "compiling" for one in progress.making):
        time.sleep(0.001)  # until the thread has looked in the store, and is at the gate
        progress = executables.progress([wanted, wanted])
    (layout,) = progress.layouts  # once, whoever asks for it
    assert (layout.layout, layout.stage, layout.needed, layout.compiled, layout.ready) == (
        "tp2x2",
        "compiling",
        4,
        0,
        0,
    )
    (making,) = progress.making
    assert (making.activity, making.tp, making.phase, making.size) == ("compiling", 2, "prefill", PREFILL.tokens)
    assert progress.queued == 3
    assert 0 <= making.seconds <= executables.progress([wanted]).layouts[0].seconds
    workshop.gate.set()
    executables.wait(groups)
    progress = executables.progress([wanted])
    assert (progress.making, progress.queued) == ((), 0)
    assert dataclasses.replace(progress.layouts[0], seconds=0.0) == LayoutProgress("tp2x2", "switching", 4, 4, 4, 0.0)


def test_what_waits_for_its_first_run_is_compiled_and_not_ready(program: Program, workshop: Workshop) -> None:
    workshop.gate.set()
    executables = Executables(program, (DECODE,), mesh_of, workshop.told.release, trials=True)
    workshop.open.append(executables)
    wanted = WantedLayout(parse_layout("tp2@0,1", 4), ((0, 1),), time.monotonic())
    executables.provide(lambda group, shape, compiled: None)
    executables.serve()
    executables.want([(0, 1)], 0)
    while not (layout := executables.progress([wanted]).layouts[0]).compiled:
        time.sleep(0.001)
    assert (layout.stage, layout.compiled, layout.ready) == ("compiling", 1, 0)
    while not executables.ready((0, 1)):
        executables.launch_trial(lambda group, shape, compiled: run_stand_in(compiled, group), idle=False)
        time.sleep(0.001)
    layout = executables.progress([wanted]).layouts[0]
    assert (layout.stage, layout.compiled, layout.ready) == ("switching", 1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_once_the_cell_serves_nothing_is_compiled_at_the_priority_of_its_streams(
    program: Program, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def compile_noting(*arguments: Any, **options: Any) -> jax.stages.Compiled:
        def note() -> None:
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

        helper = threading.Thread(target=note)  # as XLA starts some
        helper.start()
        helper.join()
        note()
        return workshop.compile(*arguments, **options)

    monkeypatch.setattr(module, "compile_step", compile_noting)
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    executables = workshop.start(program)
    executables.serve()
    executables.want([(0,), (0, 1)], ASKED_FOR)  # so that both threads take part
    workshop.gate.set()
    executables.wait([(0,), (0, 1)])
    assert len(seen) == 8
    assert all(niceness == min(mine + 10, 19) for niceness in seen)


def test_a_second_start_compiles_nothing(program: Program, workshop: Workshop) -> None:
    workshop.gate.set()
    for _ in range(2):
        executables = workshop.start(program)
        executables.want([(0,), (0, 1)], 0)
        executables.wait([(0,), (0, 1)])
    assert len(workshop.compiled) == 4


def test_a_failure_is_told_and_harms_no_other_group(
    program: Program, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    workshop.failing.add(2)
    workshop.gate.set()
    executables = workshop.start(program)
    executables.want([(0, 1), (0,)], 0)
    executables.wait([(0,)])
    with pytest.raises(RuntimeError) as caught:
        executables.wait([(0, 1)])
    assert str(caught.value) == "the steps of devices (0, 1) do not compile: RuntimeError: XLA says no"
    assert executables.failure((0, 1)) == "RuntimeError: XLA says no"
    assert not executables.ready((0, 1))
    assert executables.failure((0,)) is None
    assert "failed" in caplog.text


def test_what_is_asked_for_with_haste_overtakes(program: Program, workshop: Workshop) -> None:
    executables = workshop.start(program, threads=1)
    executables.want([(0,)], 0)  # keeps the only thread busy at the gate
    executables.want([(0, 1), (0, 1, 2, 3)], 10)
    executables.want([(0, 1, 2, 3)], 1)
    executables.want([(0, 1, 2, 3)], 5)  # asking again never slows down
    workshop.gate.set()
    assert executables.wait([(0,), (0, 1), (0, 1, 2, 3)])
    assert [tp for tp, _ in workshop.compiled] == [1, 1, 4, 4, 2, 2]


def test_closing_drops_what_has_not_begun(program: Program, workshop: Workshop) -> None:
    executables = workshop.start(program, threads=1)
    executables.want([(0,)], 0)
    executables.want([(0, 1, 2, 3)], 10)
    workshop.gate.set()
    in_time(executables.close)
    assert (4, DECODE) not in workshop.compiled


def test_nobody_waits_for_what_was_closed(program: Program, workshop: Workshop) -> None:
    executables = workshop.start(program, threads=1)
    workshop.gate.set()
    executables.close()

    def wait() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            executables.wait([(0, 1)])

    in_time(wait)


def test_a_broken_stored_step_is_compiled_instead(
    program: Program, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    workshop.gate.set()
    first = workshop.start(program)
    first.want([(0,)], 0)
    first.wait([(0,)])
    for path in stored(workshop.folder):
        blueprint = pickle.loads(path.read_bytes())
        blueprint._data = blueprint._data[:100]
        path.write_bytes(pickle.dumps(blueprint))
    second = workshop.start(program)
    second.want([(0,)], 0)
    second.wait([(0,)])
    assert len(workshop.compiled) == 4
    assert run_stand_in(second.of((0,))[DECODE], (0,)).shape == (4,)


def test_compilations_are_counted() -> None:
    before = compile_counter().count
    size = 137  # a shape of this test alone
    jax.jit(lambda x: x + jnp.float32(1))(jnp.zeros(size, jnp.float32)).block_until_ready()
    assert compile_counter().count > before
    assert compile_counter() is compile_counter()
