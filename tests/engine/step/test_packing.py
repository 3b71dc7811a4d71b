"""What the host packs is what a step unpacks."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.engine.request import MAX_SEED, MAX_STOP_IDS, SamplingParams
from nitsum_jax.engine.step.packing import Packer, StepShape, packed_shape, sampling_columns, steering, unpack
from nitsum_jax.engine.step.sampling import all_greedy

VSHARDS, PAGES, VOCAB, DUMMY = 4, 3, 1000, 99

jit_unpack = jax.jit(unpack, static_argnums=(1, 2, 3))
unit = st.floats(0, 1, width=32)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100, width=32),
    top_k=st.integers(0, 2**40),
    top_p=unit.filter(lambda p: p > 0),
    min_p=unit,
    repetition_penalty=st.floats(0.5, 100, width=32),
    presence_penalty=st.floats(-100, 100, width=32),
    frequency_penalty=st.floats(-100, 100, width=32),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=5).map(
        lambda bias: tuple(bias.items())
    ),
)


@st.composite
def rows(draw: st.DrawFn, tokens: int) -> dict[str, object]:
    """Arguments of one `Packer.add`, with `sampling`, `seed` and `prompt_len` in place of the columns."""
    used = draw(st.integers(0, PAGES))
    count = draw(st.integers(1, tokens))
    new = [draw(st.integers(0, VOCAB - 1)) for _ in range(count)]
    return {
        "sampling": draw(SAMPLING),
        "seed": draw(st.integers(0, MAX_SEED)),
        "prompt_len": draw(st.integers(1, 10_000)),
        "row": draw(st.integers(0, DUMMY - 1)),
        "context": draw(st.integers(0, 10_000)),
        "tokens": None if tokens == 1 else new,
        "emit": draw(st.booleans()),
        "min_tokens": draw(st.integers(0, 3)),
        "logprobs": draw(st.booleans()),
        "stops": draw(st.lists(st.integers(0, VOCAB - 1), max_size=MAX_STOP_IDS)),
        "page_table": np.array([[draw(st.integers(0, 500)) for _ in range(used)] for _ in range(VSHARDS)], np.int32),
    }


@settings(max_examples=50)
@given(data=st.data(), shape=st.sampled_from([StepShape(1, 1), StepShape(5, 1), StepShape(1, 6), StepShape(3, 4)]))
def test_round_trip(data: st.DataObject, shape: StepShape) -> None:
    wanted = data.draw(st.lists(rows(shape.tokens), max_size=shape.batch))
    packer = Packer(shape, VSHARDS, PAGES, DUMMY)
    for one in wanted:
        rest = {key: one[key] for key in ("row", "context", "tokens", "emit", "page_table")}
        fields = {key: one[key] for key in ("min_tokens", "logprobs")}
        columns = sampling_columns(one["sampling"], one["seed"], one["prompt_len"], **fields)  # type: ignore[arg-type]
        packer.add(columns, steering=steering(one["sampling"], one["stops"]), **rest)  # type: ignore[arg-type]
    packed = packer.done()
    assert packed.dtype == np.int32
    assert packed.shape == packed_shape(shape, VSHARDS, PAGES)
    inputs = jax.tree.map(np.asarray, jit_unpack(jax.numpy.asarray(packed), shape, VSHARDS, PAGES))
    for index, one in enumerate(wanted):
        sampling = one["sampling"]
        assert isinstance(sampling, SamplingParams)
        tokens, page_table = one["tokens"], one["page_table"]
        assert inputs.row[index] == one["row"]
        assert inputs.context[index] == one["context"]
        assert inputs.emit[index] == one["emit"]
        choice = inputs.sampling
        assert choice.prompt_len[index] == one["prompt_len"]
        assert choice.seed[index] == one["seed"]
        assert choice.top_k[index] == min(sampling.top_k, 2**31 - 1)
        floats = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition": sampling.repetition_penalty,
            "presence": sampling.presence_penalty,
            "frequency": sampling.frequency_penalty,
        }
        for name, value in floats.items():
            assert getattr(choice, name)[index].tobytes() == np.float32(value).tobytes(), name
        assert choice.position[index] == inputs.context[index] + inputs.new_tokens[index]
        assert choice.biased[index] == bool(sampling.logit_bias)
        assert inputs.logprobs[index] == one["logprobs"]
        prompt_len, least = one["prompt_len"], one["min_tokens"]
        assert isinstance(prompt_len, int)
        assert isinstance(least, int)
        assert choice.stops_from[index] == (prompt_len + least if least else 0)
        if not shape.is_decode:
            wanted_steering = steering(sampling, one["stops"])  # type: ignore[arg-type]
            assert inputs.steering[index].tolist() == wanted_steering.tolist()
        assert isinstance(page_table, np.ndarray)
        np.testing.assert_array_equal(inputs.page_table[index, :, : page_table.shape[1]], page_table)
        if isinstance(tokens, list):
            assert inputs.new_tokens[index] == len(tokens)
            assert inputs.tokens[index, : len(tokens)].tolist() == tokens
        else:
            assert inputs.new_tokens[index] == 1
    for index in range(len(wanted), shape.batch):  # padding
        assert inputs.row[index] == DUMMY
        assert inputs.new_tokens[index] == 0
        assert not inputs.emit[index]
        # Neither a draw nor a penalty: no row of a step pays for what padding asks for.
        assert inputs.sampling.temperature[index] == 0
        assert inputs.sampling.repetition[index] == 1
        assert not inputs.sampling.presence[index]
        assert not inputs.sampling.frequency[index]
        assert not inputs.sampling.biased[index]
        assert not inputs.sampling.masked[index]


def test_padding_leaves_a_step_greedy() -> None:
    shape = StepShape(3, 1)
    for sampling, expected in ((SamplingParams(), True), (SamplingParams(temperature=1.0), False)):
        packer = Packer(shape, VSHARDS, PAGES, DUMMY)
        for row in range(2):
            columns = sampling_columns(sampling if row else SamplingParams(), 0, 4)
            packer.add(columns, row=row, context=5, tokens=None, emit=True, page_table=np.zeros((VSHARDS, 1), np.int32))
        inputs = jit_unpack(jax.numpy.asarray(packer.done()), shape, VSHARDS, PAGES)
        assert bool(all_greedy(inputs.sampling, inputs.emit)) == expected


def test_a_decode_step_has_one_token_per_row() -> None:
    assert StepShape(8, 1).is_decode
    assert not StepShape(1, 32).is_decode
    assert sorted([StepShape(8, 1), StepShape(1, 1)]) == [StepShape(1, 1), StepShape(8, 1)]
