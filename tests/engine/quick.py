"""Quick compilations: for modules that do not ask for bits, and for those in which no request draws its tokens."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from nitsum_jax.engine.executables import step_store
from nitsum_jax.engine.executables.step_store import StepStore
from nitsum_jax.engine.step import logprobs, program, sampling
from nitsum_jax.engine.step.program import SampledRows
from nitsum_jax.models.layers.reduction import Ranks
from tests.engine.harness import wait_for_closed_engines
from tests.engine.shared_steps import SharedSteps

# For XLA:CPU.  A step of a tiny model compiles in a quarter of the time, and runs slower and rounds differently.
_QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": "true"}
if jax.__version_info__ < (0, 11):
    _QUICK["xla_cpu_use_fusion_emitters"] = "false"  # later ones have nothing else, and do not know the option
_OPTIONS: dict[str, str | bool] = {name: {"true": True, "false": False}.get(v, v) for name, v in _QUICK.items()}


@contextlib.contextmanager
def compiling_quickly() -> Iterator[None]:
    """Steps, and everything that child processes compile, are compiled quickly, and engines share them."""
    jax.block_until_ready(jax.jit(lambda: jax.numpy.int32(0))())  # this process has read its flags when they change
    compile_with = jax.stages.Lowered.compile
    folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "quick"  # never to be taken for the real ones
    wait_for_closed_engines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax.stages.Lowered,
            "compile",
            lambda self, given=None: compile_with(self, _OPTIONS | dict(given or {})),
        )
        patch.setattr(StepStore, "beside_jax_cache", lambda: SharedSteps(folder / "steps"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        flags = [f"--{name}={value}" for name, value in _QUICK.items()]
        patch.setenv("XLA_FLAGS", " ".join([os.environ["XLA_FLAGS"], *flags]))
        step_store._surroundings.cache_clear()  # the flags are part of it, so that child processes find the same steps
        yield
        wait_for_closed_engines()
    step_store._surroundings.cache_clear()


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """See `compiling_quickly`.

    For modules that ask what an engine does with requests, layouts and files, and whether the right blocks are at hand
    after a switch.  That steps of all degrees make the same of them as users compile them is asked in
    tests/engine/step/test_program.py and tests/engine/switching/test_switching.py, which do without; so do modules
    that run many or large steps, for these run several times slower.
    """
    with compiling_quickly():
        yield


def _greedy(
    logits: jax.Array,
    offset: jax.Array,
    vocab: int,
    inputs: SampledRows,
    history: jax.Array,
    masks: jax.Array,
    ranks: Ranks,
) -> jax.Array:
    value, token = sampling.greedy_local(logits, offset, vocab)
    token = sampling.combine(value, token, ranks.axis if ranks.size > 1 else None)
    asked = ~sampling.all_greedy(inputs.sampling, inputs.emit) | jnp.any(inputs.logprobs & inputs.emit)
    return jnp.where(asked, sampling.NO_TOKEN, token)


def _no_logprobs(logits: jax.Array, sampled: jax.Array, inputs: SampledRows, ranks: Ranks) -> jax.Array:
    return jnp.zeros((logits.shape[0], logprobs.COLUMNS), jnp.int32)


@contextlib.contextmanager
def without_draws() -> Iterator[None]:
    """Steps of this process are compiled without what draws tokens and tells log probabilities.

    Of a tiny model's step that is half of all there is to compile.  A step in which a row asks for either says nothing
    (`NO_TOKEN`), so that its requests fail.
    """
    shared = SharedSteps(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "without_draws")
    wait_for_closed_engines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_sample", _greedy)
        patch.setattr(program, "_token_logprobs", _no_logprobs)
        patch.setattr(StepStore, "beside_jax_cache", lambda: shared)  # never to be taken for the whole ones
        yield
        wait_for_closed_engines()


@pytest.fixture(scope="module")
def greedy_steps() -> Iterator[None]:
    """See `without_draws`; beside `quick_compiles`, name that one first."""
    with without_draws():
        yield
