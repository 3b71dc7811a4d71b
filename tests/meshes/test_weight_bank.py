"""The weight bank: wraps without copies, moves only what is missing, counts every byte."""

import gc
import pathlib
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.layout import InstanceSpec, Role, enumerate_layouts, parse_layout
from nitsum_jax.meshes.mesh import TP_AXIS, instance_mesh
from nitsum_jax.meshes.vshards import VshardMap
from nitsum_jax.meshes.weight_bank import BankCounters, Placement, WeightBank
from tests.meshes.bank_bytes import bytes_resident, bytes_shared

ROWS, WIDTH = 3, 5
CUT_BYTES = ROWS * WIDTH * 4
NORM_BYTES = WIDTH * 4


def values_of(vshard: int) -> np.ndarray:
    return np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH) + 100 * vshard


def placements(num_vshards: int) -> Iterator[Placement]:
    for vshard in range(num_vshards):
        yield "w", vshard, values_of(vshard)
    yield "norm", None, np.arange(WIDTH, dtype=np.float32)


def bank_with(num_devices: int, num_vshards: int, residency: dict[int, frozenset[int]]) -> WeightBank:
    bank = WeightBank(jax.devices()[:num_devices], VshardMap(num_vshards))
    bank.load(placements(num_vshards), residency)
    return bank


def full_bank(num_devices: int, num_vshards: int) -> WeightBank:
    return bank_with(num_devices, num_vshards, {d: frozenset(range(num_vshards)) for d in range(num_devices)})


def pointers(array: jax.Array) -> dict[int, int]:
    return {shard.device.id: shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


def test_the_mesh_is_in_order_of_rank() -> None:
    devices = jax.devices()
    mesh = instance_mesh(devices, InstanceSpec((4, 5, 6, 7)), VshardMap(8))
    assert mesh.axis_names == (TP_AXIS,)
    assert list(mesh.devices.flat) == [devices[4], devices[6], devices[5], devices[7]]
    with pytest.raises(InvalidInputError, match="cannot form"):
        instance_mesh(devices, InstanceSpec((0, 2)), VshardMap(8))


@pytest.mark.parametrize("num_vshards", [1, 2, 4, 8])
def test_every_instance_is_wrapped_around_the_same_buffers(num_vshards: int) -> None:
    bank = full_bank(8, num_vshards)
    vmap = VshardMap(num_vshards)
    # At TP=1 a device shows one array per vshard; every other wrap must show the very same buffers.
    original = {
        (d, v): pointers(bank.wrap(InstanceSpec((d,)))["w"][v])[d] for d in range(8) for v in range(num_vshards)
    }
    for layout in enumerate_layouts(8, num_vshards):
        for instance in layout.instances:
            wrapped = bank.wrap(instance)
            tp, slots = instance.tp, num_vshards // instance.tp
            mesh = instance_mesh(jax.devices(), instance, vmap)
            assert len(wrapped["w"]) == slots
            for j, array in enumerate(wrapped["w"]):
                assert array.shape == (tp * ROWS, WIDTH)
                assert array.sharding == NamedSharding(mesh, P(TP_AXIS))
                held = {d: vmap.vshards_of(d, tp)[j] for d in instance.devices}
                assert pointers(array) == {d: original[d, v] for d, v in held.items()}
                # Along the leading axis rank r shows vshard r * K/t + j.
                expected = np.concatenate([values_of(rank * slots + j) for rank in range(tp)])
                np.testing.assert_array_equal(array, expected)
            (norm,) = wrapped["norm"]
            assert norm.sharding == NamedSharding(mesh, P())
            assert norm.shape == (WIDTH,)
            assert {s.device.id for s in norm.addressable_shards} == set(instance.devices)
    assert bank.counters.bytes_moved == 0


def test_a_wrap_can_be_computed_with() -> None:
    bank = full_bank(4, 4)

    @jax.jit
    def total(params: dict[str, tuple[jax.Array, ...]]) -> jax.Array:
        return sum((array.sum() for array in params["w"]), start=params["norm"][0].sum())

    expected = sum(values_of(v).sum() for v in range(4)) + np.arange(WIDTH).sum()
    for text in ("tp1x4", "tp2x2", "tp4", "tp2+tp1x2"):
        for instance in parse_layout(text, 4).instances:
            assert float(total(bank.wrap(instance))) == expected


def test_wraps_are_cached_per_devices() -> None:
    bank = full_bank(4, 4)
    first = bank.wrap(InstanceSpec((0, 1), Role.PREFILL))
    counters = bank.counters
    assert bank.wrap(InstanceSpec((1, 0), Role.DECODE)) is first
    assert bank.counters == counters
    assert bank.wrap(InstanceSpec((2, 3))) is not first


def test_counters_are_exact() -> None:
    vmap = VshardMap(4)
    bank = bank_with(4, 4, vmap.residency([(0, 1), (2, 3)]))
    assert bank.names == ("w", "norm")
    loaded = 4 * (2 * CUT_BYTES + NORM_BYTES)
    assert bank.counters == BankCounters(bytes_loaded=loaded)
    assert [bytes_resident(bank, d) for d in range(4)] == [loaded // 4] * 4
    assert [bank.resident(d) for d in range(4)] == [{0, 1}, {2, 3}, {0, 1}, {2, 3}]

    pair, four, one = InstanceSpec((0, 1)), InstanceSpec((0, 1, 2, 3)), InstanceSpec((3,))
    bank.wrap(pair)
    wrapped = 4 * CUT_BYTES + 2 * NORM_BYTES
    assert bank.counters == BankCounters(bytes_loaded=loaded, bytes_wrapped=wrapped)

    assert bank.missing(four) == []  # growing moves nothing: the ranges nest
    assert bank.fetch(four) == 0
    bank.wrap(four)
    wrapped += 4 * CUT_BYTES + 4 * NORM_BYTES
    assert bank.counters == BankCounters(bytes_loaded=loaded, bytes_wrapped=wrapped)

    assert bank.missing(one) == [("w", 0, 3), ("w", 1, 3)]
    with pytest.raises(PreconditionError, match=r"tp1@3 lacks 2 weight buffers, the first vshard 0 of 'w' on device 3"):
        bank.wrap(one)
    assert bank.fetch(one) == 2 * CUT_BYTES
    assert bank.missing(one) == []
    np.testing.assert_array_equal(np.concatenate(bank.wrap(one)["w"]), np.concatenate([values_of(v) for v in range(4)]))
    wrapped += 4 * CUT_BYTES + NORM_BYTES
    assert bank.counters == BankCounters(loaded, wrapped, 2 * CUT_BYTES, 0)

    assert bank.drop(3, {0, 1}) == 2 * CUT_BYTES
    assert bank.drop(3, {0, 1}) == 0
    assert bank.counters == BankCounters(loaded, wrapped, 2 * CUT_BYTES, 2 * CUT_BYTES)
    assert bytes_resident(bank, 3) == loaded // 4


def test_fetch_moves_replicated_parameters_too() -> None:
    bank = bank_with(2, 2, {0: frozenset({0, 1})})
    assert bank.missing(InstanceSpec((1,))) == [("w", 0, 1), ("w", 1, 1), ("norm", None, 1)]
    assert bank.fetch(InstanceSpec((1,))) == 2 * CUT_BYTES + NORM_BYTES
    wrapped = bank.wrap(InstanceSpec((1,)))
    assert all(array.devices() == {jax.devices()[1]} for arrays in wrapped.values() for array in arrays)


def test_fetch_spreads_the_load_over_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_with(3, 4, {0: frozenset(range(4)), 1: frozenset(range(4))})
    transfers = []
    real = jax.device_put

    def spy(buffers: list[jax.Array], device: jax.Device) -> list[jax.Array]:
        transfers.append([d.id for buffer in buffers for d in buffer.devices()])
        return real(buffers, device)

    monkeypatch.setattr(jax, "device_put", spy)
    bank.fetch(InstanceSpec((2,)))
    # One call per source; the norm goes to whoever comes first among equals.
    assert transfers == [[0, 0, 0], [1, 1]]


def test_what_is_nowhere_cannot_be_fetched() -> None:
    bank = bank_with(2, 2, {0: frozenset({0, 1}), 1: frozenset({1})})
    bank.drop(0, [0])
    before = bank.counters
    with pytest.raises(PreconditionError, match="vshard 0 of 'w' is on no device any more: load the weights again"):
        bank.fetch(InstanceSpec((0,)))
    assert bank.counters == before


def test_drop_forgets_exactly_the_wraps_that_hold_the_vshards() -> None:
    bank = full_bank(4, 4)
    instances = {text: parse_layout(text, 4).instances[0] for text in ("tp1@0", "tp2@0,1", "tp4", "tp2@2,3")}
    before = {text: bank.wrap(instance) for text, instance in instances.items()}
    bank.drop(0, [1])  # device 0 holds 0-3 at TP=1, 0-1 at TP=2, 0 at TP=4
    assert bank.wrap(instances["tp4"]) is before["tp4"]
    assert bank.wrap(instances["tp2@2,3"]) is before["tp2@2,3"]
    for text in ("tp1@0", "tp2@0,1"):
        with pytest.raises(PreconditionError, match="fetch the instance first"):
            bank.wrap(instances[text])
    assert bank.fetch(instances["tp2@0,1"]) == CUT_BYTES
    for text in ("tp1@0", "tp2@0,1"):
        assert bank.wrap(instances[text]) is not before[text]
        np.testing.assert_array_equal(bank.wrap(instances[text])["w"][1], before[text]["w"][1])


def test_drop_frees_the_buffers() -> None:
    def alive() -> int:
        gc.collect()
        return sum(array.shape == (17, 19) for array in jax.live_arrays())

    bank = WeightBank(jax.devices()[:1], VshardMap(1))
    bank.add_cut("w", 0, 0, np.ones((17, 19), np.float32))
    bank.wrap(InstanceSpec((0,)))
    assert alive() == 2  # the buffer and its wrap
    bank.drop(0, [0])
    assert alive() == 0


def test_adding_again_replaces() -> None:
    bank = full_bank(2, 2)
    before = bank.wrap(InstanceSpec((0,)))
    other = bank.wrap(InstanceSpec((1,)))
    loaded = bank.counters.bytes_loaded
    bank.add_cut("w", 1, 0, values_of(7))
    bank.add_replicated("norm", 0, np.ones((WIDTH,), np.float32))
    after = bank.wrap(InstanceSpec((0,)))
    assert bank.wrap(InstanceSpec((1,))) is other
    np.testing.assert_array_equal(after["w"][0], values_of(0))
    np.testing.assert_array_equal(after["w"][1], values_of(7))
    np.testing.assert_array_equal(before["w"][1], values_of(1))  # whoever holds the old wrap keeps the old values
    assert bank.counters.bytes_loaded == loaded + CUT_BYTES + NORM_BYTES
    assert bank.counters.bytes_freed == CUT_BYTES + NORM_BYTES


def test_a_new_name_makes_wraps_stale() -> None:
    bank = full_bank(1, 2)
    assert set(bank.wrap(InstanceSpec((0,)))) == {"w", "norm"}
    bank.add_replicated("scale", 0, np.ones((), np.float32))
    assert set(bank.wrap(InstanceSpec((0,)))) == {"w", "norm", "scale"}
    assert bank.wrap(InstanceSpec((0,)))["scale"][0].shape == ()


def test_an_array_on_its_device_is_not_copied() -> None:
    device = jax.devices()[2]
    buffer = jax.device_put(values_of(0), device)
    bank = WeightBank(jax.devices(), VshardMap(1))
    bank.add_cut("w", 0, 2, buffer)
    assert pointers(bank.wrap(InstanceSpec((2,)))["w"][0]) == {2: buffer.unsafe_buffer_pointer()}
    bank.add_cut("w", 0, 3, buffer)  # elsewhere it is
    assert pointers(bank.wrap(InstanceSpec((3,)))["w"][0])[3] != buffer.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_later_writes_to_a_host_array_do_not_show(dtype: type) -> None:
    memory = np.zeros(64 + 1024, np.uint8)
    start = -memory.ctypes.data % 64
    value: np.ndarray = memory[start : start + 1024].view(dtype).reshape(-1, 4)  # aligned: JAX alone would alias it
    bank = WeightBank(jax.devices()[:2], VshardMap(2))
    bank.load([("w", 0, value), ("w", 1, value.T.reshape(-1, 4))], {0: {0, 1}, 1: {1}})
    memory[:] = 1
    for array in bank.wrap(InstanceSpec((0,)))["w"]:
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), np.zeros(value.shape, dtype))


def test_emulated_devices_share_memory() -> None:
    bank = full_bank(4, 2)
    assert sum(bytes_resident(bank, d) for d in range(4)) == 4 * (2 * CUT_BYTES + NORM_BYTES)
    assert bytes_shared(bank) == 2 * CUT_BYTES + NORM_BYTES
    bank.drop(0, [1])
    assert bytes_shared(bank) == 2 * CUT_BYTES + NORM_BYTES  # three others hold it
    bank.fetch(InstanceSpec((0,)))
    assert bytes_shared(bank) == 3 * CUT_BYTES + NORM_BYTES


def test_load_holds_one_host_array_at_a_time() -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def stream() -> Iterator[Placement]:
        nonlocal most
        for vshard in range(8):
            value = values_of(vshard)
            alive.append(weakref.ref(value))
            most = max(most, sum(ref() is not None for ref in alive))
            yield "w", vshard, value
            del value

    WeightBank(jax.devices(), VshardMap(8)).load(stream(), {d: {0, d} for d in range(8)})
    assert len(alive) == 8
    assert most == 1


def test_load_keeps_to_the_residency() -> None:
    bank = bank_with(4, 4, {1: frozenset({2}), 3: frozenset()})
    assert [bank.resident(d) for d in range(4)] == [set(), {2}, set(), set()]
    assert [bytes_resident(bank, d) for d in range(4)] == [0, CUT_BYTES + NORM_BYTES, 0, NORM_BYTES]


@pytest.mark.parametrize(
    ("vshard", "device", "value", "message"),
    [
        (4, 0, values_of(0), "vshard 4 of 'w' is outside 0 to 3"),
        (-1, 0, values_of(0), "vshard -1 of 'w' is outside 0 to 3"),
        (0, 2, values_of(0), "device 2 is outside 0 to 1"),
        (0, -1, values_of(0), "device -1 is outside 0 to 1"),
        (0, 0, values_of(0)[1:], "but other buffers of this name are"),
        (0, 0, values_of(0).astype(np.int32), "but other buffers of this name are"),
        (0, 0, np.ones((), np.float32), "no leading axis to cut"),
    ],
)
def test_buffers_that_do_not_fit(vshard: int, device: int, value: np.ndarray, message: str) -> None:
    bank = full_bank(2, 4)
    before = bank.counters
    with pytest.raises(ValueError, match=message):
        bank.add_cut("w", vshard, device, value)
    assert bank.counters == before


def test_a_parameter_is_either_cut_or_replicated() -> None:
    with pytest.raises(ValueError, match=r"'w' \(replicated\) is .*, but other buffers of this name are"):
        full_bank(2, 4).add_replicated("w", 0, values_of(0))


def test_a_dtype_that_jax_would_change() -> None:
    bank = WeightBank(jax.devices()[:1], VshardMap(1))
    with pytest.raises(ValueError, match="JAX holds no float64"):
        bank.add_cut("w", 0, 0, np.ones((2, 2)))
    assert bank.names == ()


def test_instances_that_cannot_be() -> None:
    bank = full_bank(4, 2)
    with pytest.raises(PreconditionError, match="tp4 is not possible with 2 vshards"):
        bank.wrap(InstanceSpec((0, 1, 2, 3)))
    with pytest.raises(InvalidInputError, match="cannot form"):
        bank.wrap(InstanceSpec((0, 2)))
    with pytest.raises(ValueError, match="device 5 is outside 0 to 3"):
        bank.missing(InstanceSpec((5,)))
    with pytest.raises(ValueError, match="device 9 is outside 0 to 3"):
        bank.drop(9, [0])


def test_threads_share_one_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = full_bank(4, 4)
    make = jax.make_array_from_single_device_arrays

    def slow(*args: Any) -> jax.Array:
        time.sleep(0.02)  # so that every thread comes while the first is at it
        return make(*args)

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", slow)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(bank.wrap(InstanceSpec((0, 1, 2, 3))))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(wrap) for wrap in found}) == 1
    assert bank.counters.bytes_wrapped == 4 * CUT_BYTES + 4 * NORM_BYTES


def test_the_root_link_shows_this_room() -> None:
    root = pathlib.Path(__file__).parents[2]
    assert (root / "meshes").resolve() == root / "nitsum_jax" / "meshes"
