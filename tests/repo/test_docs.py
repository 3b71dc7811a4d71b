"""The documents: links lead somewhere, flags exist, each page says what it is for, and lines have one width."""

import ast
import pathlib
import re

import pytest

from tools import source_tree

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
WIDTH = 120
GENERATED = {"goodput.md", "ladder.md"}  # by studies, whose sentences have the figures of a cell in one line
_OF_DOCKER, _OF_ALL = {"build", "rm"}, {"help"}
_OF_LOAD_GENERATORS = {
    *(
        "backend",
        "config_file",
        "constraint",
        "data",
        "endpoint",
        "request",
        "streaming",
        "synthetic",
        "tokenizer",
        "use",
    )
}
FOREIGN_FLAGS = _OF_DOCKER | _OF_ALL | _OF_LOAD_GENERATORS
_FLAG = re.compile(r"(?<![\w-])--(no)?([a-z]\w*)")
_LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)[^)]*\)|!\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: pathlib.Path) -> set[str]:
    """Anchors of the headings, as GitHub and mkdocs name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: pathlib.Path) -> None:
    for match in _LINK.finditer(page.read_text(encoding="utf-8")):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_the_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/**/*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in navigation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_begins_with_what_it_is_for(page: pathlib.Path) -> None:
    title, opening, *_ = re.sub(r"<!--.*?-->\s*", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).split(
        "\n\n", 2
    )
    assert title.strip().startswith("# ")
    assert re.match(r"(?!```)[A-Z`n]", opening), f"{page.name} begins with {opening[:40]!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_fit_the_width_of_the_sources(page: pathlib.Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE).splitlines()
    wide = [line for line in prose if len(line) > WIDTH and not line.lstrip().startswith(("|", "<", "![", "#"))]
    assert page.name in GENERATED or wide == []


def test_flags_that_the_documents_name_exist() -> None:
    known = FOREIGN_FLAGS | words_of_the_sources()
    unknown = {
        (page.name, match[0])
        for page in PAGES
        for match in _FLAG.finditer(page.read_text(encoding="utf-8"))
        if not {match[2], f"{match[1] or ''}{match[2]}"} & known
    }
    assert unknown == set()


def test_every_flag_of_the_server_is_described() -> None:
    sources = (ROOT / "nitsum_jax/server/launch").glob("*flags.py")
    flags = {name for source in sources for name in defined_flags(source)}
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("server/serving.md", "control.md"))
    assert len(flags) > 40
    assert {name for name in flags if f"--{name}" not in text} == set()


def test_messages_state_what_must_hold() -> None:
    # "must be positive" rather than "does not do: give more than 0".
    loose = re.compile(r"does not do\b|is not to be had|\bis no (?:part|multiple|number|address)\b")
    found = [str(path) for path in source_tree.python_files() if path.parts[0] == source_tree.PACKAGE]
    assert [name for name in found if loose.search((ROOT / name).read_text(encoding="utf-8"))] == []


def words_of_the_sources() -> set[str]:
    """Every string of the sources that could be the name of a flag."""
    files = [
        path for path in source_tree.python_files() if path.parts[0] in {source_tree.PACKAGE, "benchmarks", "tools"}
    ]
    trees = (ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in files)
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.value.lstrip("-") for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def defined_flags(source: pathlib.Path) -> set[str]:
    """Names of the flags that a file defines, by absl or by the helpers of the file."""
    calls = (node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return {
        call.args[0].value
        for call in calls
        if re.match(r"(flags\.DEFINE_\w+|text|count|port)$", ast.unparse(call.func))
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }
