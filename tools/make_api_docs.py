"""Writes docs/python.md, the reference of the Python API, from docstrings: `python -m tools.make_api_docs`."""

import dataclasses
import enum
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import EngineStats
from nitsum_jax.engine.request import FinishReason, SamplingParams, TokenLogprob
from nitsum_jax.engine.switching.switch import SwitchReport
from nitsum_jax.llm import LLM
from nitsum_jax.runtime.local.completion import Completion, FunctionCall
from nitsum_jax.runtime.local.options import CallOptions
from nitsum_jax.runtime.streams.output import End, Piece

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "python.md"
_HEAD = """# Python

<!-- Written by tools/make_api_docs.py from docstrings; change those. -->

The reference of the Python API: how to run a model without a server, in a script, a notebook or an event loop.
[notebooks/quickstart.ipynb](../notebooks/quickstart.ipynb) is a tour.

```python
from nitsum_jax import LLM, SamplingParams

with LLM("smollm2-135m", layout="tp2x2") as llm:
    print(llm.generate(["Once upon a time"], SamplingParams(temperature=0.8, seed=7), max_tokens=32)[0].text)
```

`LLM`, `Completion` and `SamplingParams` are imported from `nitsum_jax`; the other classes are their arguments and
results. Errors are of the class `nitsum_jax.errors.NitsumError`, with one line that suggests what to do.
"""
_SHOWN = (
    LLM, SamplingParams, CallOptions, Completion, FunctionCall, Piece, End, FinishReason, TokenLogprob,
    SwitchReport, EngineStats, EngineConfig,
)  # fmt: skip
_GIVEN = (SamplingParams, CallOptions, EngineConfig)
_NOTES = {
    CallOptions: "Keyword arguments of the calls above. At most one of `json_schema`, `json_object`, `regex`, `choice` "
    "and `grammar` may be given; [HTTP](server/http.md#output-that-holds-a-form) says what they hold.\n",
    EngineConfig: "Keyword arguments of `LLM`, where `max_queue` is 65536 if not given.\n",
}
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns):")
_ENTRY = re.compile(r"(\*{0,2}\w[\w, ]*): (.*)")


def text() -> str:
    """The page."""
    return _HEAD + "".join(f"\n{part}" for shown in _SHOWN for part in _class(shown))


def _class(shown: type) -> Iterator[str]:
    yield f"## {shown.__name__}\n"
    yield from _told(shown)
    if shown in _NOTES:
        yield _wrapped(_NOTES[shown])
    if issubclass(shown, enum.Enum):
        yield _wrapped("Values: " + ", ".join(f'`"{member.value}"`' for member in shown) + ".")
    elif dataclasses.is_dataclass(shown):
        defaults = [
            f"`{field.name}={field.default!r}`"
            for field in dataclasses.fields(shown)
            if isinstance(field.default, (str, int, float, bool, tuple)) and field.default != ""
        ]
        if shown in _GIVEN:
            yield _wrapped(f"If not given: {', '.join(defaults)}.")
    else:
        for name, member in vars(shown).items():
            if name == "__init__":
                yield f"### {shown.__name__}({_arguments(member)})\n"
                yield from _told(member)
            elif not name.startswith("_") and isinstance(member, property):
                yield f"### .{name}\n"
                yield from _told(member)
            elif not name.startswith("_") and inspect.isfunction(member):
                word = "await " if inspect.iscoroutinefunction(member) else ""
                yield f"### {word}.{name}({_arguments(member)})\n"
                yield from _told(member)


def _arguments(function: Any) -> str:
    """Names and defaults; the docstrings say the types in words."""
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return str(inspect.Signature(bare))[1:-1]


def _told(shown: Any) -> Iterator[str]:
    """Paragraphs and sections of a docstring."""
    for block in inspect.getdoc(shown).split("\n\n"):  # type: ignore[union-attr]
        first, _, rest = block.partition("\n")
        section = _SECTION.fullmatch(first)
        if section is None:
            yield _wrapped(block)
            continue
        items: list[str] = []
        for line in textwrap.dedent(rest).splitlines():
            entry = _ENTRY.fullmatch(line)
            if entry is not None:
                items.append(f"- `{entry[1]}`: {entry[2]}")
            elif items:
                items[-1] += " " + line.strip()
            else:
                items.append(f"- {line}")
        heading = "" if section[1] in ("Args", "Attributes") else f"{section[1]}:\n\n"
        yield heading + "".join(_wrapped(item, "  ") for item in items)


def _wrapped(block: str, indent: str = "") -> str:
    return (
        textwrap.fill(
            " ".join(block.split()), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        + "\n"
    )


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{PATH.relative_to(ROOT)}\n")
