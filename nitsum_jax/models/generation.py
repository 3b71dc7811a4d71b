"""How a model's authors would have it sampled: generation_config.json, or `general.sampling.*` of a GGUF file.

What is used is what a request of ours can ask for, as with vLLM: temperature, top_k, top_p, min_p, repetition_penalty
and max_new_tokens.  Unlike there `do_sample` counts, as in transformers: false means greedy, and true without a
temperature means temperature 1.  What transformers itself takes where the file says nothing (top_k 50, 20 tokens) is
not used.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import gguf

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.text.tokenizer import GENERATION_CONFIG_FILE

_GGUF_KEYS = {
    gguf.Keys.General.SAMPLING_TEMP: "temperature",
    gguf.Keys.General.SAMPLING_TOP_K: "top_k",
    gguf.Keys.General.SAMPLING_TOP_P: "top_p",
    gguf.Keys.General.SAMPLING_MIN_P: "min_p",
    gguf.Keys.General.SAMPLING_PENALTY_REPEAT: "repetition_penalty",
}
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


class _Field(Protocol):
    def contents(self) -> Any: ...


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What stands for the parameters that a request does not set.

    Attributes:
      temperature: 0 is greedy; None leaves it to the front end.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens of this probability.
      min_p: keep tokens at least this many times as likely as the most likely one.
      repetition_penalty: over prompt and output.
      max_new_tokens: length of an output, where the front end has no limit of its own.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of the engine's SamplingParams that the model's authors have set."""
        fields = dataclasses.asdict(self)
        del fields["max_new_tokens"]
        return {name: value for name, value in fields.items() if value is not None}

    def __str__(self) -> str:
        """For people: what is set, such as "temperature 0.6, top_p 0.9"; empty if nothing is."""
        fields = dataclasses.asdict(self).items()
        return ", ".join(f"{name} {value:g}" for name, value in fields if value is not None)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """What generation_config.json says, unchecked; {} without one.

    Raises:
      InvalidInputError: it is not a JSON object.
    """
    path = folder / GENERATION_CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {path}: {' '.join(str(error).split())}; fetch the file again") from None
    if not isinstance(data, dict):
        raise InvalidInputError(f"cannot read {path}: it is not a JSON object; fetch the file again")
    return data


def add_generation_config(folder: Path, said: Mapping[str, Any]) -> None:
    """Adds to generation_config.json what it does not say yet, such as end ids."""
    data = {**said, **read_generation_config(folder)}
    (folder / GENERATION_CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def generation_of_gguf(fields: Mapping[str, _Field]) -> dict[str, Any]:
    """The same of the metadata of a GGUF file."""
    found = {name: fields[key].contents() for key, name in _GGUF_KEYS.items() if key in fields}
    # Stored as float32: 0.6 is meant where 0.6000000238 stands.
    said = {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in found.items()}
    if isinstance(said.get("temperature"), float):
        said["temperature"] = max(said["temperature"], 0.0)  # llama.cpp: zero and less are greedy
        said["do_sample"] = said["temperature"] > 0
    return said


def generation_defaults(said: Mapping[str, Any], vocab_size: int) -> GenerationDefaults:
    """Reads what the model says; null stands for nothing.

    Args:
      said: of generation_config.json.
      vocab_size: V; keeping more tokens than there are is the same as keeping all.

    Raises:
      InvalidInputError: a value is not a number.  Its range is not checked.
    """
    values: dict[str, Any] = {name: _number(said, name) for name in _NUMBERS}
    top_k = _count(said, "top_k")
    if top_k is not None:
        values["top_k"] = top_k if 0 < top_k < vocab_size else 0  # -1 is one more way to say all
    values["max_new_tokens"] = _count(said, "max_new_tokens")
    do_sample = said.get("do_sample")
    if do_sample is False:
        values["temperature"] = 0.0
    elif do_sample is True and values["temperature"] is None:
        values["temperature"] = 1.0
    return GenerationDefaults(**values)


def _number(said: Mapping[str, Any], name: str) -> float | None:
    value = said.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInputError(f"{name} is {value!r}, which is not a number")
    try:
        return float(value)
    except OverflowError:
        raise InvalidInputError(f"{name} is larger than any number that can be used") from None


def _count(said: Mapping[str, Any], name: str) -> int | None:
    value = _number(said, name)
    if value is None:
        return None
    if not value.is_integer():
        raise InvalidInputError(f"{name} is {value:g}, which is no whole number")
    return int(value)
