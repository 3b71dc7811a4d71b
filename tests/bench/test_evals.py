"""nitsum-bench evals, against a server that says how likely it takes each token to be."""

import asyncio
import json
import math
import pathlib
import sys
from typing import Any

import pytest

from nitsum_jax.bench.evals import main as evals
from nitsum_jax.bench.evals.reference import Reference, ScoredText, read_reference
from nitsum_jax.errors import InvalidInputError, PreconditionError, UnavailableError
from tests.server.harness import TOKENIZER, running, says

TEXT = "The quick brown fox"


def write(path: pathlib.Path, **changes: Any) -> str:
    """A reference that the fake engine agrees with: it takes token t for as likely as exp(-t / 1000)."""
    ids = TOKENIZER.encode(TEXT)
    entry = {"name": "fox", "text": TEXT, "ids": ids, "logprobs": [-one / 1000 for one in ids[1:]]} | changes
    path.write_text(json.dumps({"schema": "nitsum-evals/1", "model": "fake", "made_by": "hand", "texts": [entry]}))
    return str(path)


def ask(reference: str, *flags: str) -> None:
    async def scenario() -> None:
        async with running(says("x")) as server:
            argv = ["evals", f"--server={server.address}", f"--reference={reference}", *flags]
            await asyncio.to_thread(evals.run, argv)

    asyncio.run(scenario())


def test_a_server_that_agrees_passes(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(write(tmp_path / "fox.json"))
    said = capsys.readouterr().out.splitlines()
    mean = sum(TOKENIZER.encode(TEXT)[1:]) / 1000 / (len(TEXT) - 1)
    assert said[1].split()[:4] == ["fox", str(len(TEXT) - 1), f"{math.exp(mean):.4f}", f"{math.exp(mean):.4f}"]
    assert said[-1] == "all tokens within 0.001 of hand"


def test_one_token_that_differs_is_found(tmp_path: pathlib.Path) -> None:
    likely = [-one / 1000 for one in TOKENIZER.encode(TEXT)[1:]]
    likely[6] += 0.02
    path = write(tmp_path / "fox.json", logprobs=likely)
    with pytest.raises(
        PreconditionError, match=r"is not fake as hand has it: fox differs by 0\.02 at token 7; .*float32"
    ):
        ask(path)
    ask(path, "--tolerance=0.03")


def test_another_tokenizer_is_told_as_such(tmp_path: pathlib.Path) -> None:
    ids = TOKENIZER.encode(TEXT)
    ids[3] += 1
    with pytest.raises(
        PreconditionError, match=r"tokenizer is another: of fox it makes 19 tokens, .* differ at token 3"
    ):
        ask(write(tmp_path / "fox.json", ids=ids))


def test_nobody_there_and_files_that_are_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UnavailableError, match="does not serve: UNAVAILABLE"):
        evals.run(["evals", "--server=127.0.0.1:9", f"--reference={write(tmp_path / 'fox.json')}"])
    with pytest.raises(InvalidInputError, match="cannot read --reference=/nowhere"):
        read_reference("/nowhere")
    for content in (
        "{",
        "[]",
        "{}",
        '{"schema": "other"}',
        '{"schema": "nitsum-evals/1", "model": 1, "made_by": 2, "texts": []}',
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InvalidInputError, match="is not a file of this tool"):
            read_reference(str(tmp_path / "bad.json"))
    for short in ({"logprobs": [-1.0]}, {"ids": [5], "logprobs": []}):
        with pytest.raises(InvalidInputError, match="texts are missing, or their likelihoods"):
            read_reference(write(tmp_path / "short.json", **short))


def test_a_reference_can_be_written_and_read(tmp_path: pathlib.Path) -> None:
    reference = Reference("m", "by", (ScoredText("t", "text", (1, 2, 3), (-0.25, -1.5)),))
    (tmp_path / "file.json").write_text(reference.as_json())
    assert read_reference(str(tmp_path / "file.json")) == reference


def test_making_one_takes_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInputError, match="belong together"):
        evals.run(["evals", "--make=file.json"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(PreconditionError, match="--make needs transformers and torch: pip install"):
        evals.run(["evals", f"--make={tmp_path / 'file.json'}", "--checkpoint=model"])
