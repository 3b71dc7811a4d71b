"""nitsum-jax: a JAX serving runtime in which tensor parallelism is a runtime control, not a deployment choice.

Its folders are rooms, each of which imports only rooms below it: bench; server, sim; runtime; engine, profiles;
control, models; meshes. See docs/ARCHITECTURE.md. This file imports nothing until a name is used, so that the pure
rooms load without JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nitsum_jax.engine.request import SamplingParams
    from nitsum_jax.llm import LLM, Completion

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "nitsum_jax.llm",
    "Completion": "nitsum_jax.llm",
    "SamplingParams": "nitsum_jax.engine.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
