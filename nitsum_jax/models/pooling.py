"""How a model makes one vector of a text, where its authors say that it does: the files of sentence-transformers.

`modules.json` lists what follows the model itself; its pooling has a folder with a `config.json`.  GGUF files name the
pooling in their metadata.
"""

import enum
import json
import logging
from pathlib import Path
from typing import Any

from nitsum_jax.errors import InvalidInputError

_log = logging.getLogger(__name__)
_MODULES_FILE = "modules.json"
_HARMLESS = ("Transformer", "Pooling", "Normalize")  # vectors are of length 1 in any case
_GGUF_KINDS = {1: "mean", 2: "cls", 3: "last", 4: "rank"}


class Pooling(enum.StrEnum):
    """What an embedding is made of: the last layer's outputs behind the final norm, scaled to length 1."""

    LAST = "last"  # that of the last token
    MEAN = "mean"  # the mean of all tokens


POOLINGS = ("auto", "none", *(kind.value for kind in Pooling))
_HF_NAMES = {Pooling.LAST: "lasttoken", Pooling.MEAN: "mean_tokens"}
_PACKAGE = "sentence_transformers.models"


def chosen_pooling(choice: str, own: Pooling | None) -> Pooling | None:
    """What one of POOLINGS means for a model.

    Args:
      choice: one of them.
      own: what the model's files say.
    """
    if choice == "auto":
        return own
    return None if choice == "none" else Pooling(choice)


def read_pooling(folder: Path) -> Pooling | None:
    """What the files beside a model say; None if it is not one for embeddings, or pools in a way that is not known.

    Raises:
      InvalidInputError: the files cannot be read.
    """
    modules = _json(folder / _MODULES_FILE)
    if modules is None:
        return None
    found: list[Pooling | None] = []
    for module in modules if isinstance(modules, list) else ():
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        if kind == "Pooling":
            found.append(_of_config(_json(folder / str(module.get("path", "")) / "config.json")))
        elif kind not in _HARMLESS:
            _log.warning("%s has a module %s that is not known: it gives no embeddings", folder.name, kind or module)
            return None
    return found[0] if len(found) == 1 else None


def write_pooling(folder: Path, pooling: Pooling | None) -> None:
    """Writes what `read_pooling` finds again."""
    if pooling is None:
        return
    modules = ["Transformer", "Pooling", "Normalize"]
    listed = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": f"{_PACKAGE}.{kind}"}
        for index, kind in enumerate(modules)
    ]
    (folder / _MODULES_FILE).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    place = folder / "1_Pooling"
    place.mkdir(exist_ok=True)
    mode = {f"pooling_mode_{_HF_NAMES[kind]}": kind is pooling for kind in Pooling}
    (place / "config.json").write_text(json.dumps(mode, indent=2) + "\n", encoding="utf-8")


def pooling_of_gguf(value: Any) -> Pooling | None:
    """What `ARCHITECTURE.pooling_type` of a GGUF file says."""
    return _known(_GGUF_KINDS.get(value)) if isinstance(value, int) else None


def _of_config(config: Any) -> Pooling | None:
    if not isinstance(config, dict):
        return None
    if isinstance(mode := config.get("pooling_mode"), str):  # as later versions write it
        return _known(mode)
    modes = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True]
    modes = [mode for mode in modes if mode != "include_prompt"]
    return _known(modes[0]) if len(modes) == 1 else None


def _known(mode: str | None) -> Pooling | None:
    mode = {name: kind.value for kind, name in _HF_NAMES.items()}.get(mode or "", mode)
    if mode is not None and mode not in tuple(Pooling):
        _log.warning("the model pools by %s, which is not known: no embeddings unless --pooling says so", mode)
        return None
    return None if mode is None else Pooling(mode)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {path}: {' '.join(str(error).split())}; fetch the file again") from None
