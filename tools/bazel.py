"""BUILD files as values: targets, how they are written (the way buildifier likes it) and how they are read back."""

import ast
import dataclasses
import json
from collections.abc import Iterable

# The order in which buildifier wants the attributes of a rule; `deps` comes after those that it does not know.
_ORDER = (
    "name",
    "testonly",
    "size",
    "timeout",
    "srcs",
    "actual",
    "args",
    "data",
    "main_module",
    "pyi_srcs",
    "tags",
    "visibility",
    "deps",
)
_LABELS = {"srcs", "data", "deps", "pyi_srcs"}
Value = str | bool | tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One rule call of a BUILD file.

    Attributes:
      rule: py_library, py_binary, py_test, alias ...
      attributes: literal values by name; empty tuples are left out when it is written.
    """

    rule: str
    attributes: dict[str, Value]

    @property
    def name(self) -> str:
        """The target's name in its package."""
        return str(self.attributes["name"])

    def labels(self, attribute: str) -> tuple[str, ...]:
        """A list attribute, empty if it is not set."""
        value = self.attributes.get(attribute, ())
        if not isinstance(value, tuple):
            raise ValueError(f"{self.name}: {attribute} must be a list of labels, not {value!r}")
        return value


def render(targets: Iterable[Target], *, comment: str, loads: dict[str, tuple[str, ...]], head: str = "") -> str:
    """The text of a BUILD file.

    Args:
      targets: in the order in which they are to stand.
      comment: one line for the top of the file.
      loads: symbols by the .bzl file that they come from.
      head: a statement before the targets (package(...), exports_files(...)).
    """
    blocks = ["\n".join(f"# {line}" for line in comment.splitlines())]
    lines = [f"load({', '.join(map(_quote, (file, *sorted(names))))})" for file, names in sorted(loads.items())]
    if lines:
        blocks.append("\n".join(lines))
    if head:
        blocks.append(head)
    blocks += [_render_target(t) for t in targets]
    return "\n\n".join(blocks) + "\n"


def parse(text: str, where: str) -> list[Target]:
    """Reads a BUILD file of plain rule calls; nothing in it is executed.

    Raises:
      ValueError: the file holds anything but load(), package(), exports_files() and calls with literal values.
    """
    targets = []
    for node in ast.parse(text, where).body:
        call = node.value if isinstance(node, ast.Expr) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError(f"{where}:{node.lineno}: only calls of rules are understood here")
        if call.func.id in {"load", "package", "exports_files"}:
            continue
        if call.args:
            raise ValueError(f"{where}:{node.lineno}: give every attribute of {call.func.id} by its name")
        attributes = {str(k.arg): _freeze(ast.literal_eval(k.value), where, node.lineno) for k in call.keywords}
        if not isinstance(attributes.get("name"), str):
            raise ValueError(f"{where}:{node.lineno}: {call.func.id} has no name")
        targets.append(Target(call.func.id, attributes))
    return targets


def absolute(label: str, package: str) -> str:
    """A label in its full form: `:x` in package `a/b` is `//a/b:x`, and `//a/b` is `//a/b:b`."""
    if label.startswith(":"):
        return f"//{package}{label}"
    if ":" in label or not label.startswith(("//", "@")):
        return label
    return f"{label}:{label.rpartition('/')[2]}"


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels without duplicates in buildifier's order: this package, this repository, other repositories."""

    def key(label: str) -> tuple[int, tuple[str, ...]]:
        rank = 2 if label.startswith("@") else 1 if label.startswith("//") else 0
        return rank, tuple(label.replace(":", "\x00:").replace(".", "\x00.").split("/"))

    return tuple(sorted(set(labels), key=key))


def _render_target(target: Target) -> str:
    lines = [f"{target.rule}("]
    known = {name: i for i, name in enumerate(_ORDER)}
    for name in sorted(target.attributes, key=lambda n: known[n]):
        value = target.attributes[name]
        if value == ():
            continue
        if isinstance(value, bool):
            lines.append(f"    {name} = {value},")
        elif isinstance(value, str):
            lines.append(f"    {name} = {_quote(value)},")
        else:
            values = sort_labels(value) if name in _LABELS else value
            if len(values) == 1:
                lines.append(f"    {name} = [{_quote(values[0])}],")
            else:
                lines += [f"    {name} = [", *(f"        {_quote(v)}," for v in values), "    ],"]
    return "\n".join([*lines, ")"])


def _quote(text: str) -> str:
    return json.dumps(text)


def _freeze(value: object, where: str, line: int) -> Value:
    if isinstance(value, str | bool):
        return value
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise ValueError(f"{where}:{line}: only strings, booleans and lists of strings are understood, not {value!r}")
