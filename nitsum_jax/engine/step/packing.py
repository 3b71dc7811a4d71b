"""The host's inputs of a step, packed in one integer array so that they cost one transfer.

A row of the array is one sequence of the batch: fixed columns, then its T new tokens, then its block table, K x P.
Floats travel as their bits.  The sequences of a mixed step have rows of two widths, so its array is flat: the row of
the chunk, then those that decode.

Logit bias and the stop tokens that `min_tokens` forbids are too many numbers to travel with every step.  They are the
*steering* of a sequence: it travels with its prefill steps, between tokens and block table, and stays on the device
behind the sequence's tokens in the token history.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nitsum_jax.engine.request import MAX_LOGIT_BIAS, MAX_STOP_IDS, SamplingParams
from nitsum_jax.engine.step.sampling import SamplingArrays

Packed = TypeVar("Packed", np.ndarray, jax.Array)


class _Column:
    """The fixed columns; the floats travel as their bits.

    Plain numbers: numpy takes twice as long for an index that is an enum.
    """

    ROW: Final = 0
    CONTEXT: Final = 1
    NEW_TOKENS: Final = 2
    EMIT: Final = 3
    PROMPT_LEN: Final = 4
    SEED: Final = 5
    TOP_K: Final = 6
    BIASED: Final = 7
    STOPS_FROM: Final = 8
    LOGPROBS: Final = 9
    TEMPERATURE: Final = 10
    TOP_P: Final = 11
    MIN_P: Final = 12
    REPETITION: Final = 13
    PRESENCE: Final = 14
    FREQUENCY: Final = 15
    MASKED: Final = 16


_COLUMNS = 17
# The bits of 1.0.  Zero would be a penalty, for which all rows of a step would be searched.
_NO_PENALTY = int(np.float32(1).view(np.int32))

# Columns of a sequence's steering: ids with a bias (-1: none), their biases, stop ids (-1: none).
STEERING = 2 * MAX_LOGIT_BIAS + MAX_STOP_IDS


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """The bucket of a step: B sequences with up to T new tokens each, and in a mixed step others that decode.

    Attributes:
      batch: B.
      tokens: T.
      beside: of a mixed step, rows of sequences that decode beside a prompt's chunk; they come behind it.
    """

    batch: int
    tokens: int
    beside: int = 0

    @property
    def is_decode(self) -> bool:
        """Whether each sequence continues from its own last token."""
        return self.tokens == 1

    @property
    def is_prefill(self) -> bool:
        """Whether it computes prompts, and nothing else."""
        return self.tokens > 1 and not self.beside

    @property
    def is_mixed(self) -> bool:
        """Whether it does both."""
        return self.beside > 0

    @property
    def rows(self) -> int:
        """Sequences that it has room for."""
        return self.batch + self.beside

    @property
    def new_tokens(self) -> int:
        """Tokens that it has room for: rows of its matrix products."""
        return self.batch * self.tokens + self.beside

    @property
    def parts(self) -> "tuple[StepShape, ...]":
        """What attends alike: the step itself, or the chunk and the decoding rows of a mixed one."""
        if not self.beside:
            return (self,)
        return StepShape(self.batch, self.tokens), StepShape(self.beside, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """Unpacked inputs of a step, or of a part of a mixed one.

    Attributes:
      row: i32[B], the sequence's row in the token history; the last row is a dummy for padding.
      context: i32[B], tokens already in the pool.
      new_tokens: i32[B], new tokens of this step that are real (0 for padding).
      emit: bool[B], whether the step samples the token that follows.
      logprobs: bool[B], whether log probabilities are asked for.
      tokens: i32[B, T].
      page_table: i32[B, K, P], block ids, each on the device of its virtual shard.
      sampling: how the tokens that follow are chosen.
      steering: i32[B, STEERING] of a prefill step, i32[B, 0] of a decode step; see `steering`.
    """

    row: jax.Array
    context: jax.Array
    new_tokens: jax.Array
    emit: jax.Array
    logprobs: jax.Array
    tokens: jax.Array
    page_table: jax.Array
    sampling: SamplingArrays
    steering: jax.Array


def packed_shape(shape: StepShape, vshards: int, pages: int) -> tuple[int, ...]:
    """Shape of the packed array, `[B, columns]`; that of a mixed step is flat."""
    sizes = [(part.batch, _table_column(part) + vshards * pages) for part in shape.parts]
    return (sum(rows * columns for rows, columns in sizes),) if shape.is_mixed else sizes[0]


def split(packed: Packed, shape: StepShape, vshards: int, pages: int) -> list[Packed]:
    """The packed arrays `[rows, columns]` of a step's parts."""
    if not shape.is_mixed:
        return [packed]
    found, start = [], 0
    for part in shape.parts:
        rows, columns = packed_shape(part, vshards, pages)
        found.append(packed[start : start + rows * columns].reshape(rows, columns))
        start += rows * columns
    return found


def _table_column(shape: StepShape) -> int:
    return _COLUMNS + shape.tokens + (0 if shape.is_decode else STEERING)


def tables_of(packed: np.ndarray, shape: StepShape, vshards: int, pages: int) -> np.ndarray:
    """The block tables in a packed array: i32[rows, K, P]."""
    arrays = split(packed, shape, vshards, pages)
    tables = [a[:, _table_column(part) :] for part, a in zip(shape.parts, arrays, strict=True)]
    return np.concatenate(tables).reshape(shape.rows, vshards, pages)


def unpack(packed: jax.Array, shape: StepShape, vshards: int, pages: int) -> StepInputs:
    """Takes a packed i32[B, columns] apart, inside a jitted step; one part at a time of a mixed one."""
    tokens, page_table = _COLUMNS + shape.tokens, _table_column(shape)

    def bits(column: int, kind: jnp.dtype) -> jax.Array:
        return jax.lax.bitcast_convert_type(packed[:, column], kind)

    context, new_tokens = packed[:, _Column.CONTEXT], packed[:, _Column.NEW_TOKENS]
    return StepInputs(
        row=packed[:, _Column.ROW],
        context=context,
        new_tokens=new_tokens,
        emit=packed[:, _Column.EMIT] > 0,
        logprobs=packed[:, _Column.LOGPROBS] > 0,
        tokens=packed[:, _COLUMNS:tokens],
        page_table=packed[:, page_table:].reshape(shape.batch, vshards, pages),
        sampling=SamplingArrays(
            temperature=bits(_Column.TEMPERATURE, jnp.float32),
            top_k=packed[:, _Column.TOP_K],
            top_p=bits(_Column.TOP_P, jnp.float32),
            min_p=bits(_Column.MIN_P, jnp.float32),
            repetition=bits(_Column.REPETITION, jnp.float32),
            presence=bits(_Column.PRESENCE, jnp.float32),
            frequency=bits(_Column.FREQUENCY, jnp.float32),
            seed=bits(_Column.SEED, jnp.uint32),
            position=context + new_tokens,
            prompt_len=packed[:, _Column.PROMPT_LEN],
            biased=packed[:, _Column.BIASED] > 0,
            stops_from=packed[:, _Column.STOPS_FROM],
            masked=packed[:, _Column.MASKED] > 0,
        ),
        steering=packed[:, tokens:page_table],
    )


def sampling_columns(
    sampling: SamplingParams, seed: int, prompt_len: int, *, min_tokens: int = 0, logprobs: bool = False
) -> np.ndarray:
    """The columns of a row that stay the same for all of a request's steps, i32[columns]; made once per request."""
    columns = np.zeros(_COLUMNS, np.int32)
    columns[_Column.PROMPT_LEN] = prompt_len
    columns[_Column.TOP_K] = min(sampling.top_k, 2**31 - 1)
    columns[_Column.BIASED] = bool(sampling.logit_bias)
    columns[_Column.STOPS_FROM] = prompt_len + min_tokens if min_tokens else 0
    columns[_Column.LOGPROBS] = logprobs
    columns.view(np.uint32)[_Column.SEED] = seed
    floats = columns.view(np.float32)
    floats[_Column.TEMPERATURE] = sampling.temperature
    floats[_Column.TOP_P] = sampling.top_p
    floats[_Column.MIN_P] = sampling.min_p
    floats[_Column.REPETITION] = sampling.repetition_penalty
    floats[_Column.PRESENCE] = sampling.presence_penalty
    floats[_Column.FREQUENCY] = sampling.frequency_penalty
    return columns


def steering(sampling: SamplingParams, stop_ids: Sequence[int]) -> np.ndarray:
    """What steers the choice of a sequence's tokens beside its columns, i32[STEERING]; made once per request."""
    packed = np.full(STEERING, -1, np.int32)
    bias = sampling.logit_bias
    packed[: len(bias)] = [token for token, _ in bias]
    values = np.array([value for _, value in bias], np.float32)
    packed[MAX_LOGIT_BIAS : MAX_LOGIT_BIAS + len(bias)] = values.view(np.int32)
    packed[2 * MAX_LOGIT_BIAS : 2 * MAX_LOGIT_BIAS + len(stop_ids)] = stop_ids
    return packed


class Packer:
    """Fills packed arrays of one step shape."""

    def __init__(self, shape: StepShape, vshards: int, pages: int, dummy_row: int):
        self._shape = shape
        self._vshards = vshards
        self._pages = pages
        self._packed = np.zeros(packed_shape(shape, vshards, pages), np.int32)
        self._parts = list(zip(shape.parts, split(self._packed, shape, vshards, pages), strict=True))
        for _, lines in self._parts:
            lines[:, _Column.ROW] = dummy_row
            lines[:, _Column.REPETITION] = _NO_PENALTY
        self._used = 0
        self.masks: np.ndarray | None = None
        """i32[rows, W] if a row has a mask."""

    def add(
        self,
        columns: np.ndarray,
        *,
        row: int,
        context: int,
        tokens: Sequence[int] | None,
        emit: bool,
        page_table: np.ndarray,
        steering: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> None:
        """Adds one sequence; to a mixed step first the one whose prompt is computed.

        Args:
          columns: from `sampling_columns`.
          row: the sequence's row in the token history.
          context: tokens already in the pool.
          tokens: the new tokens, or None to continue from the token history (decode).
          emit: whether to sample the token that follows.
          page_table: i32[K, n], block ids so far, n <= P.
          steering: i32[STEERING], for prefill steps; None for a sequence that has none.
          mask: i32[W], which tokens may follow; None: all.
        """
        beside = self._used >= self._shape.batch
        shape, lines = self._parts[beside]
        line = lines[self._used - self._shape.batch if beside else self._used]
        if mask is not None:
            if self.masks is None:
                self.masks = np.zeros((self._shape.rows, mask.size), np.int32)
            self.masks[self._used] = mask
        self._used += 1
        line[:_COLUMNS] = columns
        line[_Column.ROW] = row
        line[_Column.CONTEXT] = context
        line[_Column.NEW_TOKENS] = 1 if tokens is None else len(tokens)
        line[_Column.EMIT] = emit
        line[_Column.MASKED] = mask is not None
        if tokens is not None:
            line[_COLUMNS : _COLUMNS + len(tokens)] = tokens
        start = _table_column(shape)
        if not shape.is_decode and steering is not None:
            line[start - STEERING : start] = steering
        line[start:].reshape(self._vshards, self._pages)[:, : page_table.shape[1]] = page_table

    def done(self) -> np.ndarray:
        """The packed array; rows not added are padding."""
        return self._packed
