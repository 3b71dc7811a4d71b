"""What the server needs of an engine, a tokenizer and a model, and the state of the server between start and end.

The protocols name exactly the part of `Engine` that is used here, so that the service is tested against a small engine
without a model, and so that another engine can stand behind the same front ends.
"""

# ruff: noqa: D102  the members of the protocols are described where they are implemented

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from nitsum_jax.engine.request import Request
from nitsum_jax.meshes.layout import Layout
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.models.pooling import Pooling
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.runtime.tools.formats import ToolFormat

if TYPE_CHECKING:
    from nitsum_jax.engine.batching.pacing import Pace
    from nitsum_jax.engine.executables.progress import CompileProgress
    from nitsum_jax.runtime.control.control_loop import ControlLoop
    from nitsum_jax.runtime.control.layout_log import LayoutChoice, SwitchNote
    from nitsum_jax.runtime.structured.compiler import FormCompiler

T = TypeVar("T")


class ServingStats(Protocol):
    """Counters and gauges of an engine; see `ServingStats` in nitsum.proto."""

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def queue_capacity(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...
    @property
    def blocks_total(self) -> int: ...
    @property
    def tokens_generated(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def switches(self) -> int: ...
    @property
    def compiles(self) -> int: ...
    @property
    def pace_late_steps(self) -> int: ...
    @property
    def blocks_cached(self) -> int: ...
    @property
    def prefix_queried_tokens(self) -> int: ...
    @property
    def prefix_hit_tokens(self) -> int: ...


class ServingLoad(Protocol):
    """A look at one instance; see `nitsum_jax.engine.batching.load.InstanceLoad`."""

    @property
    def devices(self) -> tuple[int, ...]: ...
    @property
    def tp(self) -> int: ...
    @property
    def role(self) -> str: ...
    @property
    def running(self) -> int: ...
    @property
    def kv_use(self) -> float: ...


class ServingEngine(Protocol):
    """The thread-safe face of an engine; `nitsum_jax.engine.engine.Engine` is one."""

    @property
    def tier_names(self) -> tuple[str, ...]: ...
    @property
    def device_names(self) -> tuple[str, ...]: ...
    @property
    def memory_report(self) -> str: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def set_layout(self, layout: str) -> concurrent.futures.Future[Any]: ...  # of a SwitchReport
    def prepare_layout(self, layout: str) -> concurrent.futures.Future[Any]: ...  # likewise
    def layout(self) -> Layout: ...
    def allowed_layouts(self) -> tuple[str, ...]: ...
    def lose_device(self, device: int) -> None: ...
    def restore_device(self, device: int) -> None: ...
    def lost_devices(self) -> tuple[int, ...]: ...
    def ask(self, call: Callable[[], T]) -> concurrent.futures.Future[T]: ...  # on the engine's thread
    def ready_layouts(self) -> tuple[str, ...]: ...
    def compiling(self) -> "CompileProgress": ...
    def context_limit(self) -> int: ...
    def stats(self) -> ServingStats: ...
    def loads(self) -> Sequence[ServingLoad]: ...
    def drain(self, timeout_s: float) -> bool: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class OneCell:
    """One of the cells behind an engine that has several.

    Attributes:
      name: of the cell.
      state: "joining", "serving" or "silent".
      layout: in force, text form; empty while nobody knows.
      devices: their numbers among those of all cells; empty while it does not serve.
      stats: its own; None while nobody knows.
      lately: by tier, how many of the last minute's requests ended there, and how many of these met both targets.
    """

    name: str
    state: str
    layout: str
    devices: tuple[int, ...]
    stats: ServingStats | None
    lately: Mapping[str, tuple[int, int]]


@runtime_checkable
class ManyCells(Protocol):
    """What an engine with several cells has besides."""

    def cell_views(self) -> Sequence[OneCell]: ...
    def cell_notes(self) -> tuple[Sequence["LayoutChoice"], Sequence["SwitchNote"]]: ...  # of all cells


class TextStream(Protocol):
    """Incremental detokenizer of one output."""

    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class ServingTokenizer(Protocol):
    """`nitsum_jax.models.text.tokenizer.Tokenizer` is one."""

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...
    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes: ...
    def decode(self, ids: Iterable[int], skip_special: bool = True, *, starts_text: bool = False) -> str: ...
    def stream(self, skip_special: bool = True, shown: frozenset[str] = frozenset()) -> TextStream: ...
    @property
    def special_ids(self) -> frozenset[int]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class ServedModel:
    """The part of a model that the front ends need: names, ids and text.

    Attributes:
      name: as the user gave it.
      tokenizer: text to ids and back.
      vocab_size: V of the model; ids are 0 to V - 1.
      eos_ids: the ids that end an output, unless the request ignores them.
      render_chat: messages (each with "role" and "content", a text or text parts) to the text of the prompt, as the
        options say; None when the model has no chat template. Raises InvalidInputError if the template refuses them.
      defaults: what stands for the parameters that a request does not set.
      forms: compiles what outputs are held to; None where that is not possible.
      tools: how it writes calls of tools; None: it knows none.
      thinks: whether its answers begin with thoughts in <think> tags.
      pooling: what its embeddings are made of; None: it gives none.
    """

    name: str
    tokenizer: ServingTokenizer
    vocab_size: int
    eos_ids: tuple[int, ...]
    render_chat: Callable[[Sequence[Mapping[str, Any]], ChatOptions], str] | None
    defaults: GenerationDefaults = GenerationDefaults()
    forms: "FormCompiler | None" = None
    tools: ToolFormat | None = None
    thinks: bool = False
    pooling: Pooling | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """A started engine with what connects it to the event loop."""

    engine: ServingEngine
    model: ServedModel
    router: StreamRouter
    control: "ControlLoop | None" = None
    pace: "Pace | None" = None
