"""The file of keys changes while the server runs."""

import asyncio
import dataclasses
import json
from pathlib import Path

import grpc
import pytest

from nitsum_jax.server.client import admin
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.security.keys import entry
from tests.server.harness import refusal, until
from tests.server.operations.http import fetch
from tests.server.operations.ports import opened
from tests.server.security.test_guard import SECRETS, bearer, generate, key_list


def test_keys_are_read_again_while_the_server_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, secret = tmp_path / "keys.toml", tmp_path / "admin"
    path.write_text("\n".join(map(entry, key_list())))
    secret.write_text(SECRETS["admin"])

    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0, api_keys=str(path))) as open_:

            async def reload(*more: str) -> int:
                flags = [f"--server={open_.run.address}", f"--api_key_file={secret}", *more]
                return await admin.main_async(["nitsum-admin", "reload_keys", *flags])

            stub = open_.run.stub
            open_.run.engine.hold()
            alive = asyncio.create_task(generate(stub, bearer("user")))
            await until(lambda: open_.run.engine.stats().waiting == 1)
            fewer = [key for key in key_list() if key.name in ("fast", "admin")]
            path.write_text("\n".join(map(entry, [dataclasses.replace(fewer[0], tiers=("batch",)), *fewer[1:]])))
            assert await reload() == 0
            error = await refusal(generate(stub, bearer("user")))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            for base in (open_.api, open_.http):
                assert (await fetch(f"{base}/metrics", headers=dict(bearer("monitor")))).status == 401
            open_.run.engine.release()
            assert (await alive)[-1].finished.usage.output_tokens == 5  # it was let in before
            error = await refusal(generate(stub, bearer("fast"), tier="interactive"))
            assert "ask for batch" in (error.details() or "")
            assert await generate(stub, bearer("fast"), tier="batch")

            for text in ("[keys.x]\nhash = 1\n", ""):
                path.write_text(text)
                assert await reload() == 2
                assert await generate(stub, bearer("fast"), tier="batch")
            path.unlink()
            assert await reload() == 2
            path.write_text("\n".join(map(entry, key_list())))
            assert await reload("--json") == 0
            assert await generate(stub, bearer("user"))
        async with opened(OpsOptions()) as open_:
            assert await reload() == 2

    asyncio.run(scenario())
    out, err = capsys.readouterr()
    told, as_json = out.splitlines()
    assert told == "API keys read again, 2 in force: removed user, slow, few, monitor; changed fast"
    assert json.loads(as_json) == {
        "keys": 6, "added": ["user", "slow", "few", "monitor"], "removed": [], "changed": ["fast"]
    }  # fmt: skip
    wrong, empty, missing, none = err.splitlines()
    assert f"FAILED_PRECONDITION: the API keys in force stay: {path}:1: key 'x': hash must be" in wrong
    assert "no keys" in empty
    assert "cannot read the keys file" in missing
    assert "this server has no API keys" in none
