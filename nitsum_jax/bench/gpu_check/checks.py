"""What must be true on an accelerator: numbers are those of the CPU, promises about bits hold, wrapping copies nothing.

Each check returns whether it passed, and what was found.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
import tempfile
import threading
from collections.abc import Callable, Sequence

import jax
import numpy as np

from nitsum_jax.bench.gpu_check.shapes import LLAMA_8B, TINY, with_layers
from nitsum_jax.bench.gpu_check.timed_step import TimedModel
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.engine.request import Request, TokenDelta
from nitsum_jax.engine.step.forms import AttentionForm
from nitsum_jax.engine.switching.switch import SwitchReport
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.vshards import VshardMap
from nitsum_jax.meshes.weight_bank import WeightBank
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.known import tiny_random
from nitsum_jax.models.loading import open_model

Found = tuple[bool, str]

# Of the largest logit.  A GPU may multiply float32 with fewer bits (TF32).
TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-2}
_SMALL = with_layers(TINY, 2)
# Heads as wide as the kernels want them, in a model that is otherwise small.
WIDE = dataclasses.replace(LLAMA_8B, name="two wide layers", num_layers=2, d_mlp=2048, vocab_size=4096)
_WAIT_S = 300.0
_CYCLE_TOKENS = 120


def numerics(device: jax.Device, dtype: str) -> Found:
    """The same prompt through the same weights here and on the CPU."""
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (1, 48)).astype(np.int32)
    here = TimedModel(TINY, 4, dtype, [device], max_batch=1, max_len=64)
    cpu = jax.devices("cpu")[0]
    there = TimedModel(TINY, 4, dtype, [cpu], max_batch=1, max_len=64, weights=here.weights())
    return _agree(here.logits(tokens), there.logits(tokens), dtype)


def rows_keep_their_bits(device: jax.Device, dtype: str) -> Found:
    """A row of a decode step says the same bits whoever else is in the batch."""
    model = TimedModel(_SMALL, 4, dtype, [device], max_batch=8, max_len=256)
    tokens = np.random.default_rng(0).integers(0, _SMALL.vocab_size, (8, 1)).astype(np.int32)
    others = tokens.copy()
    others[[0, 1, 2, 4, 5, 6, 7]] = (others[[0, 1, 2, 4, 5, 6, 7]] + 17) % _SMALL.vocab_size
    first, second = model.logits(tokens, 200), model.logits(others, 200)
    same = bool(np.array_equal(first[3].view(np.uint32), second[3].view(np.uint32)))
    moved = not np.array_equal(first[0], second[0])
    if not moved:
        return False, "other tokens have the same logits"
    return same, "the same bits in another company" if same else "another company changes its bits"


def every_tp_gives_the_same_bits(devices: Sequence[jax.Device], dtype: str) -> Found:
    """Logits of a prompt and of a decode step at every TP that the devices allow."""
    widest = 1 << (len(devices).bit_length() - 1)
    one = TimedModel(_SMALL, widest, dtype, devices[:1], max_batch=4, max_len=256)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, _SMALL.vocab_size, (1, 64)).astype(np.int32)
    rows = rng.integers(0, _SMALL.vocab_size, (4, 1)).astype(np.int32)
    expected = [one.logits(prompt), one.logits(rows, 150)]
    weights, differing, tp = one.weights(), [], 2
    while tp <= widest:
        model = TimedModel(_SMALL, widest, dtype, devices[:tp], max_batch=4, max_len=256, weights=weights)
        got = [model.logits(prompt), model.logits(rows, 150)]
        if any(not np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(got, expected, strict=True)):
            differing.append(tp)
        tp *= 2
    text = f"other bits than at TP 1: TP {', '.join(map(str, differing))}" if differing else "the same bits"
    return not differing, f"TP 1 to {widest}: {text}"


def kernel_agrees(device: jax.Device, config: ModelConfig = WIDE) -> Found:
    """The attention kernel beside XLA's attention, in whole steps of a prompt and of decoding behind 1,000 tokens."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, config.vocab_size, (1, 256)).astype(np.int32)
    rows = rng.integers(0, config.vocab_size, (4, 1)).astype(np.int32)
    kernel = TimedModel(config, 1, "bfloat16", [device], max_batch=4, max_len=1100)
    if kernel.program.forms.attention is AttentionForm.XLA:
        return True, "there is no kernel for this device: XLA attends"
    plain = TimedModel(
        config, 1, "bfloat16", [device], max_batch=4, max_len=1100, attention="xla", weights=kernel.weights()
    )
    found = [
        _agree(kernel.logits(tokens, context), plain.logits(tokens, context), "bfloat16")
        for tokens, context in ((prompt, 0), (rows, 1000))
    ]
    texts = (f"{what}: {text}" for what, (_, text) in zip(("prompt", "decode"), found, strict=True))
    return all(good for good, _ in found), f"{kernel.program.forms.attention}; {'; '.join(texts)}"


def switches_change_nothing(devices: Sequence[jax.Device]) -> Found:
    """Tokens and log probabilities of a stream that goes through a cycle of layouts, beside one that stays where it is.

    A block of keys and values that went astray shows in the log probabilities long before greedy text differs.
    """
    count = 1 << (len(devices).bit_length() - 1)
    narrow, wide = f"tp1x{count}", f"tp{count}"
    with tempfile.TemporaryDirectory() as folder:
        tiny_random.write(pathlib.Path(folder))
        config = EngineConfig(
            devices=count,
            deterministic=True,
            max_batch=4,
            max_model_len=256,
            layout=narrow,
            layouts=(narrow, wide),
            kv_cache_gib=0.125,
        )
        stream = _Stream()
        engine = start_engine(open_model(folder), config, stream)
        try:
            engine.wait_for_layouts()
            calm = stream.run(engine, {})
            disturbed = stream.run(engine, {20: wide, 50: narrow, 80: wide})
        finally:
            engine.close()
    same = calm == disturbed
    return same, f"{narrow} to {wide} and back in {_CYCLE_TOKENS} tokens: " + (
        "the same tokens and log probabilities" if same else "other tokens or log probabilities"
    )


def pointers(devices: Sequence[jax.Device]) -> Found:
    """Wraps vshards for every TP and compares addresses: nothing may be copied."""
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


class _Stream:
    """The deltas of one request at a time, and what is done when so many tokens have come."""

    def __init__(self) -> None:
        self._deltas: list[TokenDelta] = []
        self._ended = threading.Event()
        self._due: dict[int, Callable[[], object]] = {}

    def __call__(self, deltas: Sequence[TokenDelta]) -> None:
        self._deltas += deltas
        come = sum(len(delta.token_ids) for delta in self._deltas)
        for count in [count for count in self._due if count <= come]:
            self._due.pop(count)()
        if deltas and deltas[-1].finish_reason is not None:
            self._ended.set()

    def run(self, engine: Engine, layouts: dict[int, str]) -> list[tuple[int, float]]:
        """Tokens and their log probabilities; switches to layouts when so many tokens have come."""
        self._deltas, self._ended = [], threading.Event()
        switches: list[concurrent.futures.Future[SwitchReport]] = []

        def switch_to(layout: str) -> None:
            switches.append(engine.set_layout(layout))

        self._due = {count: functools.partial(switch_to, layout) for count, layout in layouts.items()}
        engine.submit(Request("a stream", tuple(range(1, 40)), _CYCLE_TOKENS, logprobs=0))
        if not self._ended.wait(_WAIT_S):
            raise RuntimeError(f"a stream did not end in {_WAIT_S:.0f} s")
        for switch in switches:
            switch.result(_WAIT_S)
        return [
            (token, one.logprob)
            for delta in self._deltas
            for token, one in zip(delta.token_ids, delta.logprobs, strict=True)
        ]


def _agree(a: np.ndarray, b: np.ndarray, dtype: str) -> Found:
    error = float(np.abs(a - b).max() / np.abs(b).max())
    same = bool((a.argmax(-1) == b.argmax(-1)).all())
    return error <= TOLERANCE[dtype] and bool(np.isfinite(a).all()), (
        f"largest difference {error:.1e} of the largest logit (at most {TOLERANCE[dtype]:.0e}), "
        f"{'the same' if same else 'another'} greedy token"
    )
