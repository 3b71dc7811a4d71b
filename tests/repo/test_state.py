"""What a request has cached, generated and owes, and whether it is late, is written by its own methods alone."""

import ast

import pytest

from tools import source_tree

OF_A_REQUEST = {"late", "cached", "generated", "target", "pending", "epoch"}


def written_from_outside(text: str) -> list[str]:
    """Assignments to such an attribute of anything but `self`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load) or node.attr not in OF_A_REQUEST:
            continue
        if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_a_request_is_the_only_writer_of_its_state() -> None:
    found = {
        str(path): places
        for path in source_tree.python_files()
        if path.parts[0] == source_tree.PACKAGE
        and (places := written_from_outside((source_tree.ROOT / path).read_text(encoding="utf-8")))
    }
    assert found == {}, "say by a method of the request what happened"


@pytest.mark.parametrize(
    "text", ["job.late = True", "a.b.cached += 1", "job.cached, x = 1, 2", "for job.late in x: ..."]
)
def test_other_writers_are_found(text: str) -> None:
    assert len(written_from_outside(text)) == 1
