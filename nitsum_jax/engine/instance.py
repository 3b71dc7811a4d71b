"""One instance: a group of devices that runs one batch loop.

The engine's thread decides and dispatches; a reader thread per instance waits for results, so that nothing waits on
the host.  Up to two steps are in flight: step n+1 takes its tokens from the device before step n's tokens were read
back.
"""

import collections
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.kv.history import STEERED_BY, HistoryMover
from nitsum_jax.engine.kv.kv_pool import KvPool
from nitsum_jax.engine.kv.prefix_cache import PrefixCache
from nitsum_jax.engine.kv.window import give_back
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.step.dispatched import Chunk, IncomingRequest, PrefillChoice, Step
from nitsum_jax.engine.step.packing import Packer, StepShape
from nitsum_jax.engine.step.program import Program, StepState
from nitsum_jax.meshes.layout import InstanceSpec, Role
from nitsum_jax.meshes.mesh import Geometry

MAX_IN_FLIGHT = 2
# Gives a sequence pages for so many tokens, at the cost of others if need be; False if the sequence itself had to go.
MakeRoom = Callable[["Instance", LiveRequest, int], bool]
Choose = Callable[["Instance"], PrefillChoice | None]


class Instance:
    """Batch state of one group of devices; used by the engine's thread alone."""

    depth = MAX_IN_FLIGHT
    _array: jax.Array

    def __init__(
        self,
        spec: InstanceSpec,
        geometry: Geometry,
        program: Program,
        leaves: tuple[jax.Array, ...],
        executables: Callable[[], Mapping[StepShape, jax.stages.Compiled]],
        pool: KvPool,
        histories: HistoryMover,
        prefixes: PrefixCache | None,
        on_step: Callable[["Instance", Step], None],
    ):
        """Takes over the pools of its devices.

        Args:
          spec: devices and role.
          geometry: where these lie.
          program: what its steps compute.
          leaves: wrapped parameters in the order of `Program.parameters`.
          executables: those that are ready; the largest buckets of both phases always are.
          pool: the cell's KV pool.
          histories: copies rows of token histories.
          prefixes: finds and keeps beginnings of prompts, if the cell does that.
          on_step: called on the reader thread with every finished step.
        """
        self.spec = spec
        self.order = geometry.order
        self.device_of = geometry.device_of
        self.rows: dict[int, LiveRequest] = {}
        self.prefills: collections.deque[LiveRequest] = collections.deque()
        self.outstanding: list[Step] = []
        self.retired = False  # its sequences live elsewhere; results still in flight are theirs
        self.lost = False  # a device of it failed for good: what is in flight counts for nothing
        self._before: tuple[Step, ...] = ()
        self.broken = False  # a step failed, and its pool with it: nothing is dispatched until `abandon`
        self.steps = 0
        self._program = program
        self._mesh = geometry.mesh
        self._leaves = leaves
        self._executables = executables
        self._pool = pool
        self._histories = histories
        self._prefixes = prefixes
        self._slots = collections.Counter(self.device_of)
        self._window = program.config.window_everywhere
        self._free_rows = list(range(program.max_batch - 1, -1, -1))
        self._history: jax.Array | None = None
        self._no_masks: dict[int, jax.Array] = {}  # by rows; on the devices, so that steps without masks bring none
        self._claim_pool()  # late: nothing behind it fails
        self._results: queue.SimpleQueue[tuple[Step, dict[str, jax.Array]] | None] = queue.SimpleQueue()
        self._on_step = on_step
        name = "nitsum-read-" + "-".join(map(str, spec.devices))
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._reader.start()

    # ---- capacity

    @property
    def page_size(self) -> int:
        """W, tokens in a page."""
        return self._program.pool.page_size

    @property
    def max_batch(self) -> int:
        """Most sequences that it can have."""
        return self._program.max_batch

    @property
    def in_flight(self) -> int:
        """Dispatched steps whose results have not been taken in."""
        return len(self.outstanding)

    @property
    def free_rows(self) -> int:
        """Sequences that could still join."""
        return len(self._free_rows)

    def free_pages(self) -> int:
        """Pages that all of its devices could still give."""
        return min(self._pool.allocators[device].free // count for device, count in self._slots.items())

    def total_pages(self) -> int:
        """Pages of its devices when empty."""
        return min(self._pool.allocators[device].total // count for device, count in self._slots.items())

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // self._program.pool.page_size)

    def settled_tokens(self, sequence: LiveRequest) -> int:
        """Tokens of one of its sequences whose keys and values no step or copy in flight still writes.

        There may be some more.
        """
        if sequence.landing:
            return 0
        flying = [*self.outstanding, *(step for step in self._before if not step.settled)]
        return max(0, sequence.cached - sum(step.tokens_of(sequence) for step in flying))

    def touched(self, device: int) -> list[np.ndarray]:
        """Block ids on one of its devices that steps in flight may read or write, freed ones included."""
        here = np.array(self.device_of) == device
        shape = self._program.cut.num_vshards, self._program.pages
        return [step.page_table(*shape)[:, here].reshape(-1) for step in self.outstanding]

    def grow(self, sequence: LiveRequest, tokens: int) -> bool:
        """Gives a sequence pages for its first `tokens` tokens; False, and nothing taken, if there are not enough."""
        missing = self.pages_for(tokens) - sequence.pages
        if missing <= 0:
            return True
        if missing > self.free_pages():
            return False
        for vshard, device in enumerate(self.device_of):
            blocks = self._pool.allocators[device].take(missing)
            sequence.page_table[vshard, sequence.pages : sequence.pages + missing] = blocks
        sequence.pages += missing
        return True

    # ---- membership

    def join(self, sequence: LiveRequest) -> None:
        """Adds a sequence that has yet to be prefilled."""
        self._seat(sequence)
        sequence.landing = self.steps + 1
        self.prefills.append(sequence)
        self._note_shared(sequence)

    @property
    def history(self) -> jax.Array:
        """Token history after all dispatched steps, i32[rows, columns] on each device."""
        if self._history is None:
            self._history = self._put_history(np.zeros(self._program.history_shape, np.int32))
        return self._history

    def follow(self, before: Sequence[Step]) -> None:
        """Its sequences come from where these steps ran, whose results must be taken in before those of its own."""
        self._before = tuple(before)

    def adopt(self, arrivals: list[IncomingRequest]) -> None:
        """Adds sequences that come with their blocks, before the first step of this instance; waits for nothing."""
        history = np.zeros(self._program.history_shape, np.int32)
        in_flight: dict[int, tuple[jax.Array, list[tuple[int, int]]]] = {}
        for arrival in arrivals:
            sequence = arrival.sequence
            self._seat(sequence)
            sequence.landing = 0
            history[sequence.row, : len(sequence.tokens)] = sequence.tokens
            if sequence.steering is not None:
                history[sequence.row, STEERED_BY] = sequence.steering
            if sequence.prefilling:
                self.prefills.append(sequence)
            if sequence.pending:
                _, rows = in_flight.setdefault(id(arrival.history), (arrival.history, []))
                rows.append((arrival.row, sequence.row))
        self.prefills = collections.deque(sorted(self.prefills, key=lambda sequence: sequence.admitted))
        merged = self._put_history(history)
        for source, rows in in_flight.values():
            merged = self._histories.merge(merged, source, rows)
        self._history = merged

    def leave(self, sequence: LiveRequest) -> None:
        """Takes a sequence out and frees its blocks.

        Safe while its steps are in flight: the next owner writes to the blocks in a later step of the same devices.
        """
        for vshard, device in enumerate(self.device_of):
            self._pool.allocators[device].give(sequence.page_table[vshard, : sequence.pages])
        del self.rows[sequence.row]
        self._free_rows.append(sequence.row)
        if sequence in self.prefills:
            self.prefills.remove(sequence)
        sequence.row = -1
        sequence.home = None
        sequence.pages = 0

    def receive(self, arrival: IncomingRequest, before: Sequence[Step]) -> None:
        """Adds a sequence that comes with its blocks while this instance runs; waits for nothing.

        Args:
          arrival: it has been prefilled.
          before: steps that may still bring tokens of it.
        """
        self._before += tuple(before)
        self._seat(arrival.sequence)
        arrival.sequence.landing = self.steps + 1
        self._history = self._histories.merge(self.history, arrival.history, [(arrival.row, arrival.sequence.row)])

    def note_pages(self, sequence: LiveRequest) -> None:
        """Pages of a sequence may have become full: lets others find them."""
        if self._prefixes is not None and not self.broken and not self.lost:
            self._prefixes.enter(sequence, self.device_of)

    def _note_shared(self, sequence: LiveRequest) -> None:
        """Tokens of shared pages never went through a step of this sequence; penalties must know them all the same."""
        if sequence.cached and sequence.request.sampling.repetition_penalty != 1:
            history = np.zeros(self._program.history_shape, np.int32)
            history[sequence.row, : sequence.cached] = sequence.tokens[: sequence.cached]
            rows = [(sequence.row, sequence.row)]
            self._history = self._histories.merge(self.history, self._put_history(history), rows)

    def vacate(self, row: int) -> None:
        """Makes a row free whose sequence went elsewhere."""
        self._free_rows.append(row)

    def _seat(self, sequence: LiveRequest) -> None:
        sequence.row = self._free_rows.pop()
        sequence.home = self
        sequence.dropped = 0
        self.rows[sequence.row] = sequence

    # ---- steps

    def dispatch(self, make_room: MakeRoom, choose: Choose) -> bool:
        """Starts the next step, if there is one and fewer than `depth` are in flight.

        Args:
          make_room: gives a sequence pages.
          choose: asked whose prompt the step works on, if there are prompts; None decodes.

        Returns:
          Whether a step was started, or something else changed.
        """
        if self.in_flight >= self.depth or self.broken:
            return False
        choice = choose(self) if self.prefills else None
        if choice is not None and not choice.sequence.awaits_mask:
            return self._dispatch_prefill(choice, make_room)
        return self._dispatch_decode(make_room)

    def decodable(self) -> list[LiveRequest]:
        """Sequences that get a token in the next decode step; a prefill instance has none."""
        if self.spec.role == Role.PREFILL:
            return []
        return [sequence for sequence in self.rows.values() if sequence.may_decode]

    def owes_decode(self) -> bool:
        """Whether a decode step is due: somebody can take part in it now, or as soon as a mask is made."""
        if self.spec.role == Role.PREFILL:
            return False
        return any(s.may_decode or (s.goes_on and s.awaits_mask) for s in self.rows.values())

    def departing(self) -> list[LiveRequest]:
        """Sequences of a prefill instance that decode elsewhere: their prompts are done, or about to be."""
        if self.spec.role != Role.PREFILL:
            return []
        return [sequence for sequence in self.rows.values() if sequence.may_decode]

    def _dispatch_prefill(self, choice: PrefillChoice, make_room: MakeRoom) -> bool:
        sequence = choice.sequence
        if self._prefixes is not None and not sequence.counts_every_token:
            before = sequence.cached
            self._prefixes.catch_up(sequence, self.device_of)
            if sequence.cached > before:
                sequence.landing = self.steps + 1
                self._note_shared(sequence)
        left = sequence.target - sequence.cached
        executables = self._executables()
        buckets = sorted(shape for shape in executables if shape.is_prefill)
        count = min(left, buckets[-1].tokens if choice.tokens is None else min(choice.tokens, buckets[-1].tokens))
        if not make_room(self, sequence, sequence.cached + count):
            return True  # something changed: look again
        shape, beside = next(shape for shape in buckets if shape.tokens >= count), list[LiveRequest]()
        mixed = [shape for shape in executables if shape.is_mixed and shape.tokens >= count]
        if mixed and choice.fused and (choice.tokens is None or count == min(left, choice.tokens)):
            beside = self._growing(self.decodable(), make_room)
            if sequence.row < 0:
                return True  # it had to go for one of them
            shape = min((one for one in mixed if beside and one.beside >= len(beside)), default=shape)
            beside = beside if shape.is_mixed else []
        packer = self._packer(shape)
        last = count == left
        self._add(packer, sequence, sequence.tokens[sequence.cached : sequence.cached + count], emit=last)
        chunk = Chunk(count, sequence.cached)
        sequence.dispatched(count, emits=last)
        context = self._add_decoding(packer, beside)
        if last:
            self.prefills.remove(sequence)
        emits = [last] + [True] * len(beside)
        step = Step(shape, [sequence, *beside], emits, chunk=chunk, joined=choice.joined, context=context)
        self._start(step, executables[shape], packer)
        self.note_pages(sequence)
        self._give_back_behind_window(step.sequences)
        return True

    def _dispatch_decode(self, make_room: MakeRoom) -> bool:
        ready = self.decodable()
        if ready and all(sequence.masked for sequence in ready) and self._awaits_more():
            return False
        chosen = self._growing(ready, make_room)
        if not chosen:
            return False
        executables = self._executables()
        shape = min(shape for shape in executables if shape.is_decode and shape.batch >= len(chosen))
        packer = self._packer(shape)
        context = self._add_decoding(packer, chosen)
        self._start(Step(shape, chosen, [True] * len(chosen), context=context), executables[shape], packer)
        self._give_back_behind_window(chosen)
        return True

    def _give_back_behind_window(self, sequences: Sequence[LiveRequest]) -> None:
        if self._window is None:
            return
        allocators = [self._pool.allocators[device] for device in self.device_of]
        for sequence in sequences:
            entered_only = self._prefixes is not None
            give_back(sequence, self._window, self.page_size, allocators, entered_only=entered_only)

    def _growing(self, ready: list[LiveRequest], make_room: MakeRoom) -> list[LiveRequest]:
        """Those of them that have room for another token."""
        chosen: list[LiveRequest] = []
        for sequence in ready:
            # Making room may send others back, even some that were chosen.
            if sequence.row >= 0 and make_room(self, sequence, sequence.cached + 1):
                chosen.append(sequence)
        return [sequence for sequence in chosen if sequence.row >= 0]

    def _add_decoding(self, packer: Packer, sequences: list[LiveRequest]) -> int:
        """Adds rows that decode to a step; returns the tokens of context that they hold together."""
        context = 0
        for sequence in sequences:
            self._add(packer, sequence, None, emit=True)
            context += sequence.cached
            sequence.dispatched(1, emits=True)
        return context

    def _awaits_more(self) -> bool:
        """Whether sequences with masks are about to be ready: they cost less in one step than in two in turns."""
        return any(s.goes_on and s.awaits_mask for s in self.rows.values())

    def _packer(self, shape: StepShape) -> Packer:
        return Packer(shape, self._program.cut.num_vshards, self._program.pages, self._program.max_batch)

    def _add(self, packer: Packer, sequence: LiveRequest, tokens: list[int] | None, *, emit: bool) -> None:
        packer.add(
            sequence.columns,
            row=sequence.row,
            context=sequence.cached,
            tokens=tokens,
            emit=emit,
            page_table=sequence.page_table[:, : sequence.pages],
            steering=sequence.steering,
            mask=sequence.allowed.mask if emit and sequence.allowed is not None else None,
        )

    def _start(self, step: Step, executable: jax.stages.Compiled, packer: Packer) -> None:
        self._before = tuple(before for before in self._before if not before.settled)
        step.after = self._before
        step.launched_s = time.monotonic()
        self.outstanding.append(step)
        self.steps += 1
        step.number = self.steps
        try:
            step.packed = packer.done()
            masks = self._idle_masks(step.shape) if packer.masks is None else packer.masks
            state, results = executable(self._leaves, StepState(self._array, self.history), step.packed, masks)
            self._array, self._history = state.pool, state.history
            wanted = {"tokens": results.tokens}
            if step.with_logprobs:
                wanted["token_logprobs"] = results.token_logprobs
            if step.pools and results.pooled is not None:
                wanted["pooled"] = results.pooled
            for result in wanted.values():
                result.copy_to_host_async()
        except Exception as error:  # as a step that fails later: the reader hands it on in its turn
            step.error = error
            self._results.put((step, {}))
        else:
            self._results.put((step, wanted))

    def _idle_masks(self, shape: StepShape) -> jax.Array:
        if shape.rows not in self._no_masks:
            everywhere = NamedSharding(self._mesh, PartitionSpec())
            self._no_masks[shape.rows] = jax.device_put(self._program.no_masks(shape), everywhere)
        return self._no_masks[shape.rows]

    def _read(self) -> None:
        while (item := self._results.get()) is not None:
            step, results = item
            try:
                # Each rank writes to its pool after the last exchange with the others: that one has its tokens does not
                # say that the others are done.
                jax.block_until_ready(results)
                for name, result in reversed(results.items()):  # tokens last: a step that has them is whole
                    setattr(step, name, np.asarray(result))
            except Exception as error:  # a failed step is the engine's to deal with, not this thread's
                step.error = error
            step.ready_s = time.monotonic()
            self._on_step(self, step)

    # ---- the pool

    def lend_pool(self) -> None:
        """Gives its devices' pools back for a while: for one program that is launched before the next step."""
        self._pool.take_back(self._array, self.order)

    def regain_pool(self) -> None:
        """Takes the pools again."""
        self._array = self._pool.lend(self._mesh, self.order)

    # ---- end

    def release(self) -> None:
        """Gives the pools back, if they are whole, and ends the reader."""
        if not (self.broken or self.lost):
            self.lend_pool()
        self.close()

    def retire(self) -> None:
        """Lets go of its sequences, which others have adopted; results still in flight are read to the end."""
        self.rows.clear()
        self.prefills.clear()
        self.retired = True
        self.close()

    def _claim_pool(self) -> None:
        self.regain_pool()

    def abandon(self) -> None:
        """After a failed step: the pool array went with it, so its devices get new ones."""
        for device in self.order:
            self._pool.renew(device)
        self._array = self._pool.lend(self._mesh, self.order)
        self._history = None
        self.broken = False

    def close(self) -> None:
        """Ends the reader thread."""
        self._results.put(None)

    def wait_closed(self, timeout_s: float) -> None:
        """Waits for the reader, which reads what is in flight first.

        A thread that waits for a device when the interpreter ends takes the process down with it.
        """
        self._reader.join(timeout_s)

    def _put_history(self, history: np.ndarray) -> jax.Array:
        return jax.device_put(history, NamedSharding(self._mesh, PartitionSpec()))
