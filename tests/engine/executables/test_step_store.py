"""What the names of stored steps depend on."""

import pathlib

import pytest

from nitsum_jax.engine.executables.step_store import _hash_of_sources

FILES = (
    "engine/step/program.py",
    "engine/steps/attention/paged.py",
    "models/layers/decoder.py",
    "models/families/llama.py",
    "meshes/mesh.py",
    "meshes/maps/vshards.py",
)


@pytest.fixture
def package(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in (*FILES, "server/launch/main.py", "engine/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"NAME = {name!r}\n")
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_step_is_made_anew_when_a_source_of_it_changes_at_any_depth(package: pathlib.Path, name: str) -> None:
    before = _hash_of_sources(package)
    (package / name).write_text("NAME = None\n")
    changed = _hash_of_sources(package)
    assert changed != before
    (package / name).rename((package / name).with_name("renamed.py"))
    assert _hash_of_sources(package) not in (before, changed)
    (package / name).with_name("renamed.py").unlink()
    assert _hash_of_sources(package) not in (before, changed)


@pytest.mark.parametrize("name", ["server/launch/main.py", "engine/notes.txt"])
def test_other_files_change_nothing(package: pathlib.Path, name: str) -> None:
    before = _hash_of_sources(package)
    (package / name).write_text("something else")
    assert _hash_of_sources(package) == before
