"""The special ids that a checkpoint names: one reader for config.json, generation_config.json and GGUF metadata.

Files say "there is none" in several ways: no key, null, -1, and -1 written without a sign.  An id beyond the vocabulary
can never come out of the model, but a request that is to end with it would be refused; so it is left out here, with a
warning that names the key.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config_readers.values import shown

MAX_END_IDS = 64  # a request may bring as many of its own
_UNSIGNED_NONE = (2**32 - 1, 2**64 - 1)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class SpecialIds:
    """What one file says.

    Attributes:
      bos: id that starts a text, or None.
      ends: ids that end a generation, in the order of the file.
    """

    bos: int | None
    ends: tuple[int, ...]


def ids_of_json(data: Mapping[str, Any], vocab_size: int, file: str, *, warn: bool = True) -> SpecialIds:
    """The ids in a parsed config.json or generation_config.json.

    Args:
      data: the JSON object.
      vocab_size: ids are less than this.
      file: its name, for messages.
      warn: whether to warn of ids that are left out; another reader of the same file may have done so.

    Raises:
      InvalidInputError: an id is not a whole number.
    """
    starts = valid_ids(data.get("bos_token_id"), vocab_size, f"bos_token_id of {file}", warn=warn)
    ends = valid_ids(data.get("eos_token_id"), vocab_size, f"eos_token_id of {file}", warn=warn)
    return SpecialIds(starts[0] if starts else None, ends)


def ids_of_gguf(get: Callable[[str], Any], vocab_size: int, *, warn: bool = True) -> SpecialIds:
    """The ids in the metadata of a GGUF file: end of sequence, of a turn and of a message all end a generation.

    Args:
      get: key -> its value, or None.
      vocab_size: ids are less than this.
      warn: as in `ids_of_json`.

    Raises:
      InvalidInputError: an id is not a whole number.
    """
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("bos", "eos", "eot", "eom")]
    starts, *ends = (valid_ids(get(key), vocab_size, f"{key} of the GGUF file", warn=warn) for key in keys)
    return SpecialIds(starts[0] if starts else None, tuple(dict.fromkeys(i for group in ends for i in group)))


def valid_ids(value: Any, vocab_size: int, what: str, *, warn: bool = True) -> tuple[int, ...]:
    """The ids under one key: an id, a list of ids, or none.

    Raises:
      InvalidInputError: an id is not a whole number, or there are more than MAX_END_IDS; `what` names the key.
    """
    found: dict[int, None] = {}
    for entry in value if isinstance(value, list | tuple) else [value]:
        if entry is None:
            continue
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise InvalidInputError(f"{what} is {shown(value)}, a value of the wrong kind: give token ids")
        if entry < 0 or entry in _UNSIGNED_NONE:
            continue
        if entry < vocab_size:
            found[entry] = None
        elif warn:
            _log.warning("%s names token %d, but the vocabulary has %d: it is ignored", what, entry, vocab_size)
    if len(found) > MAX_END_IDS:
        raise InvalidInputError(f"{what} names {len(found)} tokens: name at most {MAX_END_IDS}")
    return tuple(found)
