import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.client.generate import main_async
from nitsum_jax.server.client.layout_plan import PlannedSwitch, parse_plan
from nitsum_jax.server.grpc.server import GrpcServer
from tests.server.harness import TOKENIZER, Running, echo, running, says

Capture = pytest.CaptureFixture[str]


def _with_server(
    use: Callable[[Running, Callable[..., Awaitable[int]]], Awaitable[None]], *args: Any, **options: Any
) -> None:
    async def scenario() -> None:
        async with running(*args, **options) as run:

            async def generate(*flags: str) -> int:
                return await main_async(["nitsum-generate", f"--server={run.address}", *flags])

            await use(run, generate)

    asyncio.run(scenario())


def test_streams_one_answer_to_the_terminal(capsys: Capture) -> None:
    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        assert (
            await generate("--prompt=grüß dich 🙂", "--max_tokens=100", "--temperature=0.5", "--seed=4", "--tier=batch")
            == 0
        )
        request = run.engine.requests[0]
        assert (request.sampling.temperature, request.sampling.seed, request.tier) == (0.5, 4, "batch")
        assert request.deadline_s is None

    _with_server(use)
    out, err = capsys.readouterr()
    assert out == "grüß dich 🙂\n"
    assert "tokens, stop, first token after" in err


def test_json_has_the_promised_keys(capsys: Capture) -> None:
    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        assert await generate("--prompt=hello", "--json", "--stop=lo") == 0
        assert await generate("--prompt_ids=72,73", "--json", "--max_tokens=1") == 0
        assert await generate("--prompt=hello") == 0

    _with_server(use, cached=lambda request: len(request.prompt_ids) // 3 * 3)
    out, err = capsys.readouterr()
    first, second = (json.loads(line) for line in out.splitlines()[:2])
    assert "5 (3 of them cached) + 5 tokens" in err
    ids = TOKENIZER.encode("hello")
    assert (first["prompt_ids"], first["output_ids"], first["text"]) == (ids, ids, "hel")
    assert first["finish_reason"] == "stop"
    assert first["usage"] == {"prompt_tokens": 5, "cached_tokens": 3, "output_tokens": 5}
    assert first["ttft_ms"] >= first["server_ttft_ms"] > 0
    assert first["tpot_ms"] >= 0  # a client that is late finds all tokens at once
    assert "error" not in first
    assert (second["prompt_ids"], second["finish_reason"]) == ([72, 73], "length")
    assert second["tpot_ms"] is None


def test_a_file_of_prompts_runs_all_at_once_and_answers_in_its_order(tmp_path: Path, capsys: Capture) -> None:
    prompts = [f"prompt {'x' * (40 - 4 * index)} {index}" for index in range(8)]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts), encoding="utf-8")

    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        assert await generate(f"--prompts_file={tmp_path}/prompts.txt", "--json") == 0
        assert max(len(run.engine.requests), 0) == 8
        assert await generate(f"--prompts_file={tmp_path}/prompts.txt", "--concurrency=2", "--chat", "--system=S") == 0

    _with_server(use)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in lines[:8]] == prompts
    assert lines[8:] == [f"[{n + 1}/8] <system>S<user>{prompt}<assistant>" for n, prompt in enumerate(prompts)]


def test_a_jsonl_file_sets_each_request(tmp_path: Path, capsys: Capture) -> None:
    lines = [
        {"prompt": "abcdef", "max_tokens": 3},
        {"prompt_ids": [65, 66, 67]},
        {"messages": [{"role": "user", "content": "hi"}], "seed": 5, "stop": ["<a"], "temperature": 0.25},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))

    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        assert await generate(f"--prompts_file={tmp_path}/p.jsonl", "--json", "--temperature=1", "--max_tokens=50") == 0
        by_length = {len(request.prompt_ids): request for request in run.engine.requests}
        assert (by_length[6].sampling.temperature, by_length[6].max_tokens) == (1.0, 3)
        assert (by_length[3].max_tokens, by_length[19].sampling.temperature, by_length[19].sampling.seed) == (
            50,
            0.25,
            5,
        )

    _with_server(use)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["output_ids"] for answer in answers[:2]] == [TOKENIZER.encode("abc"), [65, 66, 67]]
    assert answers[2]["text"] == "<user>hi"


def test_a_layout_plan_switches_while_all_streams_go_on(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")

    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        plan = "--layout_plan=0:tp2x2,40:tp4,80:tp2+tp1x2,100000:tp1x4"
        assert await generate(f"--prompts_file={tmp_path}/p.txt", "--json", "--max_tokens=300", plan) == 0
        assert str(run.engine.layout()) == "tp2+tp1x2"
        assert run.engine.stats().switches == 3

    _with_server(use, says("x", end=False))
    out, err = capsys.readouterr()
    assert [len(json.loads(line)["output_ids"]) for line in out.splitlines()] == [300] * 4
    assert "switched tp1x4 -> tp2x2: 0 sequences" in err
    assert "switched tp2x2 -> tp4: 4 sequences" in err
    assert "not switched to tp1x4: fewer than 100000 tokens came" in err


def test_a_refused_switch_is_reported_and_the_streams_go_on(capsys: Capture) -> None:
    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        assert await generate("--prompt=hello", "--layout_plan=0:tp8,2:tp4") == 2
        assert str(run.engine.layout()) == "tp4"

    _with_server(use)
    out, err = capsys.readouterr()
    assert out == "hello\n"
    assert "switch to tp8: " in err


def test_status_is_json(capsys: Capture) -> None:
    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        assert await generate("--status") == 0
        assert await generate("--status", "--prompt=x", "--json") == 0

    _with_server(use)
    out = capsys.readouterr().out
    state, end = json.JSONDecoder().raw_decode(out)
    assert (state["model"], state["layout"], len(state["instances"])) == ("fake", "tp1x4", 4)
    assert state["instances"][0] == {"devices": [0], "tp": 1, "role": "mixed", "running": 0, "kv_use": 0.0}
    assert state["stats"]["blocks_free"] == state["stats"]["blocks_total"]
    last = json.loads(out[end:].splitlines()[-1])
    assert last["stats"]["tokens_generated"] == 1


@pytest.mark.parametrize(
    ("flags", "status", "says_what"),
    [
        ([], 2, "exactly one of --prompt"),
        (["--prompt=a", "--prompt_ids=1"], 2, "exactly one of --prompt"),
        (["--prompt=a", "more"], 2, "'more'"),
        (["--prompt=a", "--colour=red"], 2, "colour"),
        (["--prompt=a", "--max_tokens=lots"], 2, "--max_tokens=lots"),
        (["--prompt=a", "--timeout=-1"], 2, "--timeout=-1"),
        (["--prompt=a", "--temperature=nan"], 2, "--temperature=nan"),
        (["--prompt=a", "--seed=99999999999999999999999"], 2, "cannot be sent"),
        (["--prompt_ids=1,two"], 2, "prompt_ids"),
        (["--prompt=a", "--stop_token_ids=x"], 2, "stop_token_ids"),
        (["--prompts_file=/no/such/file"], 2, "No such file"),
        (["--prompt=a", "--layout_plan=tp4"], 2, "TOKENS:LAYOUT"),
        (["--prompt="], 2, "prompt is empty"),
        (["--prompt=a", "--max_tokens=0"], 2, "max_tokens=0"),
        (["--prompt=a", "--temperature=-1"], 2, "temperature=-1.0"),
        (["--prompt=a", "--tier=gold"], 2, "'gold'"),
        (["--prompt_ids=1,999"], 2, "outside the vocabulary"),
        (["--prompt=" + os.fsdecode(b"\xff")], 2, "cannot be sent"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_is_one_line_with_its_exit_status(
    flags: list[str], status: int, says_what: str, capsys: Capture
) -> None:
    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        assert await generate(*flags) == status

    _with_server(use)
    err = capsys.readouterr().err
    assert err.startswith("nitsum-generate: ")
    assert err.count("\n") == 1
    assert says_what in err


def test_failed_requests_are_json_objects_too_and_the_others_are_answered(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "tier": "gold"}\n{"prompt": "b"}\n')

    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        assert await generate(f"--prompts_file={tmp_path}/p.jsonl", "--json") == 2

    _with_server(use)
    out, err = capsys.readouterr()
    bad, good = (json.loads(line) for line in out.splitlines())
    assert (bad["error"]["code"], bad["finish_reason"], bad["output_ids"]) == ("INVALID_ARGUMENT", None, [])
    assert good["text"] == "b"
    assert "prompt 1: " in err


@pytest.mark.parametrize(
    ("content", "name", "says_what"),
    [
        (b"", "p.txt", "no prompts"),
        (b"caf\xe9", "p.txt", "not UTF-8 (byte 3)"),
        (b"{", "p.jsonl", "not JSON"),
        (b"[1]", "p.jsonl", "must be an object"),
        (b'{"prompt": "a", "messages": []}', "p.jsonl", "must be an object with one of"),
        (b'{"prompt": "a", "color": 1}', "p.jsonl", "unknown key 'color'"),
        (b'{"prompt": 7}', "p.jsonl", "cannot be sent"),
        (b'{"messages": [{"name": "x"}]}', "p.jsonl", "cannot be sent"),
        (b'{"messages": 7}', "p.jsonl", "cannot be sent"),
        (b'{"prompt_ids": "abc"}', "p.jsonl", "prompt_ids"),
    ],
)
def test_wrong_prompts_files(content: bytes, name: str, says_what: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / name).write_bytes(content)
    assert asyncio.run(main_async(["nitsum-generate", f"--prompts_file={tmp_path / name}"])) == 2
    err = capsys.readouterr().err
    assert says_what in err
    assert err.count("\n") == 1


def test_no_server(capsys: Capture) -> None:
    async def scenario() -> None:
        flags = ["nitsum-generate", "--server=127.0.0.1:1", "--prompt=a"]
        assert await main_async(flags) == 3
        assert await main_async([*flags, "--json"]) == 3
        assert await main_async([*flags, "--wait", "--wait_seconds=0.3"]) == 3

    asyncio.run(scenario())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("no server answers at 127.0.0.1:1" in line for line in lines)
    assert "--wait_seconds" in lines[2]


def test_wait_waits_until_the_server_is_ready(capsys: Capture) -> None:
    async def scenario() -> None:
        server = GrpcServer("127.0.0.1", 0)  # bound, so the port is ours, but not started
        port = server.port
        flags = ["nitsum-generate", f"--server=127.0.0.1:{port}", "--prompt=hello"]
        await server.start()
        assert await main_async(flags) == 3
        assert "starting" in capsys.readouterr().err
        client = asyncio.create_task(main_async([*flags, "--wait"]))
        await asyncio.sleep(0.5)
        assert not client.done()
        async with running() as run:  # lends its backend
            assert run.server.state.backend is not None
            await server.serve(run.server.state.backend)
            assert await client == 0
            await server.stop()

    asyncio.run(scenario())
    assert capsys.readouterr().out == "hello\n"


def test_a_timeout_is_told_and_frees_the_request(capsys: Capture) -> None:
    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        assert await generate("--prompt=a", "--max_tokens=100000", "--timeout=0.2") == 1

    _with_server(use, says("x", end=False))
    assert "took longer than --timeout" in capsys.readouterr().err


def test_a_full_queue_is_told_with_the_hint(capsys: Capture) -> None:
    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        run.engine.hold()
        waiting = asyncio.ensure_future(generate("--prompt=a"))
        while not run.engine.stats().waiting:
            await asyncio.sleep(0.002)
        assert await generate("--prompt=b") == 1
        run.engine.release()
        assert await waiting == 0

    _with_server(use, echo, max_queue=1)
    assert "(try again in 1000 ms, or use --concurrency)" in capsys.readouterr().err


def test_plans() -> None:
    assert parse_plan("0:tp1x4,16:tp2x2, 32:tp4") == (
        PlannedSwitch(0, "tp1x4"),
        PlannedSwitch(16, "tp2x2"),
        PlannedSwitch(32, "tp4"),
    )
    assert parse_plan("5:tp2@2,3:decode+tp1x2,7:tp4") == (
        PlannedSwitch(5, "tp2@2,3:decode+tp1x2"),
        PlannedSwitch(7, "tp4"),
    )
    for wrong in ("", "tp4", "x:tp4", "-1:tp4", "5:", "5:tp4,5:tp2", "9:tp4,5:tp2"):
        with pytest.raises(InvalidInputError, match="plan"):
            parse_plan(wrong)


def test_bias_and_log_probabilities_on_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab", "logit_bias": {"3": 1}, "logprobs": 0, "min_tokens": 1}')

    async def use(run: Running, generate: Callable[..., Awaitable[int]]) -> None:
        steered = ("--logprobs=1", "--logit_bias=7:-100,9:2.5", "--min_tokens=2")
        assert await generate("--prompt=ab", "--json", *steered) == 0
        assert await generate(f"--prompts_file={tmp_path}/p.jsonl") == 0
        first, second = run.engine.requests
        assert (dict(first.sampling.logit_bias), first.min_tokens, first.logprobs) == ({7: -100.0, 9: 2.5}, 2, 1)
        assert (second.sampling.logit_bias, second.min_tokens, second.logprobs) == (((3, 1.0),), 1, 0)
        assert await generate("--prompt=ab", "--logit_bias=7") == 2

    _with_server(use)
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert [one["token_id"] for one in line["logprobs"]] == line["output_ids"]
    assert [len(one["top"]) for one in line["logprobs"]] == [1, 1]
