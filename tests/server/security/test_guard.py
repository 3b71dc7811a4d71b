import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from nitsum_jax.control.tiers import DEFAULT_TIERS
from nitsum_jax.engine.request import Request
from nitsum_jax.runtime.callers import Caller, calling, current_caller
from nitsum_jax.runtime.control.layout_log import LayoutLog
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.proto import (
    admin_pb2,
    admin_pb2_grpc,
    jetstream_pb2,
    jetstream_pb2_grpc,
    nitsum_pb2,
    nitsum_pb2_grpc,
)
from nitsum_jax.server.security.engine_access import access_checked
from nitsum_jax.server.security.errors import DeniedError
from nitsum_jax.server.security.guard import AccessPolicy, Guard
from nitsum_jax.server.security.http_guard import HttpGuard
from nitsum_jax.server.security.keys import ApiKey, KeyRing, KeyRole, digest_of, entry
from tests.server.fake_engine import FakeEngine
from tests.server.harness import ask, echo, refusal, says, until
from tests.server.operations.http import fetch
from tests.server.operations.ports import opened

SECRETS = {name: f"nk_{name}" for name in ("user", "fast", "slow", "few", "monitor", "admin")}


def key_list() -> list[ApiKey]:
    def key(name: str, **fields: Any) -> ApiKey:
        return ApiKey(name, digest_of(SECRETS[name]), **fields)

    return [
        key("user"),
        key("fast", tiers=("interactive",)),
        key("slow", requests_per_minute=2),
        key("few", concurrent=1),
        key("monitor", role=KeyRole.MONITOR),
        key("admin", role=KeyRole.ADMIN),
    ]


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., OpsOptions]:
    path = tmp_path / "keys.toml"
    path.write_text("\n".join(map(entry, key_list())))
    return lambda **more: OpsOptions(metrics_port=0, api_keys=str(path), **more)


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {SECRETS[name]}"),)


async def generate(stub: Any, metadata: Any = None, **fields: Any) -> list[Any]:
    message = nitsum_pb2.GenerateRequest(**({"text": "hello"} | fields))
    return [event async for event in stub.Generate(message, metadata=metadata, timeout=20)]


def test_with_keys_on_no_grpc_call_works_without_one_but_health(options: Callable[..., OpsOptions]) -> None:
    async def scenario() -> None:
        async with opened(options()) as open_:
            channel = open_.run.channel
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            ask_for = reflection_pb2.ServerReflectionRequest(list_services="")

            async def reflect(metadata: Any) -> list[Any]:
                return [answer async for answer in reflection.ServerReflectionInfo(iter([ask_for]), metadata=metadata)]

            calls: dict[str, Callable[[Any], Any]] = {
                "Generate": lambda metadata: generate(open_.run.stub, metadata),
                "Embed": lambda m: open_.run.stub.Embed(nitsum_pb2.EmbedRequest(), metadata=m),
                "GetLayout": lambda m: open_.run.stub.GetLayout(nitsum_pb2.GetLayoutRequest(), metadata=m),
                "SetLayout": lambda m: open_.run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp4"), metadata=m),
                "Profile": lambda m: admin.Profile(admin_pb2.ProfileRequest(seconds=1), metadata=m),
                "reflection": reflect,
            }
            bad = [
                None,
                (("authorization", "Bearer nk_wrong"),),
                (("authorization", SECRETS["admin"]),),  # no scheme
                (("authorization", "Bearer " + "x" * 2000),),
                (("authorization", "Bearer"),),
                (("authorization", "Basic !!!"),),
                (("x-api-key", SECRETS["admin"]),),
            ]
            for name, call in calls.items():
                for metadata in bad:
                    error = await refusal(call(metadata))
                    assert error.code() is grpc.StatusCode.UNAUTHENTICATED, name
                    assert "API key" in (error.details() or "")
            assert open_.run.engine.requests == []
            assert str(open_.run.engine.layout()) == "tp1x4"
            assert (await generate(open_.run.stub, bearer("user")))[-1].finished.usage.output_tokens == 5
            assert await reflect(bearer("user"))
            assert (await calls["GetLayout"](bearer("user"))).model == "fake"

    asyncio.run(scenario())


def test_roles_and_tiers(options: Callable[..., OpsOptions]) -> None:
    async def scenario() -> None:
        async with opened(options()) as open_:
            stub = open_.run.stub
            switch = nitsum_pb2.SetLayoutRequest(layout="tp2x2")
            for name in ("user", "monitor"):
                for message in (switch, nitsum_pb2.SetLayoutRequest(layout="tp2x2", prepare=True)):
                    error = await refusal(stub.SetLayout(message, metadata=bearer(name)))
                    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                    assert f"'{name}' has the role {name}" in (error.details() or "")
            for call in (
                generate(stub, bearer("monitor")),
                stub.Embed(nitsum_pb2.EmbedRequest(), metadata=bearer("monitor")),
            ):
                error = await refusal(call)
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert (await stub.SetLayout(switch, metadata=bearer("admin"))).to_layout == "tp2x2"
            (decision,) = open_.ports.views.present().layout_log.decisions()
            assert (decision.choice, decision.reason) == ("tp2x2", "asked for by the key 'admin'")

            assert await generate(stub, bearer("fast"), tier="interactive")
            for tier in ("batch", ""):  # none named: the default, which this key may not use either
                error = await refusal(generate(stub, bearer("fast"), tier=tier))
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                assert f"may not use the tier '{tier or 'standard'}': ask for interactive" in (error.details() or "")
            error = await refusal(generate(stub, bearer("user"), tier="batch", max_tokens=0))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scenario())


def test_rates_and_calls_at_the_same_time(options: Callable[..., OpsOptions]) -> None:
    async def scenario() -> None:
        async with opened(options(), says("x", end=False)) as open_:
            stub = open_.run.stub
            for _ in range(2):
                await generate(stub, bearer("slow"), max_tokens=1)
            error = await refusal(generate(stub, bearer("slow"), max_tokens=1))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            hint = dict(error.trailing_metadata() or ())["retry-after-ms"]
            assert 0 < int(hint) <= 30_000
            assert await stub.GetLayout(nitsum_pb2.GetLayoutRequest(), metadata=bearer("slow"))  # is free

            call = stub.Generate(nitsum_pb2.GenerateRequest(text="a", max_tokens=10**6), metadata=bearer("few"))
            assert (await call.read()).WhichOneof("event") == "started"
            error = await refusal(generate(stub, bearer("few"), max_tokens=1))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "'few' has 1 open at once" in (error.details() or "")
            assert await generate(stub, bearer("user"), max_tokens=1)  # others are not held up
            call.cancel()
            await until(lambda: open_.run.router.open_streams == 0)
            assert await generate(stub, bearer("few"), max_tokens=1)

            metrics = (await fetch(f"{open_.http}/metrics", headers=dict(bearer("monitor")))).text
            assert 'nitsum_calls_refused_total{model_name="fake",reason="rate_limit"} 2.0' in metrics

    asyncio.run(scenario())


def test_without_keys_an_address_may_have_so_many_streams() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(streams_per_client=1), says("x", end=False)) as open_:
            call = open_.run.stub.Generate(nitsum_pb2.GenerateRequest(text="a", max_tokens=10**6))
            await call.read()
            error = await refusal(generate(open_.run.stub))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "127.0.0.1 has 1 open at once" in (error.details() or "")
            call.cancel()
            await until(lambda: open_.run.router.open_streams == 0)
            await generate(open_.run.stub, max_tokens=1)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("host", "admin_port", "open_here"), [("127.0.0.1", None, True), ("127.0.0.1", 0, False), ("0.0.0.0", None, False)]
)
def test_where_administration_is_to_be_had_without_keys(host: str, admin_port: int | None, open_here: bool) -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0, admin_port=admin_port), host=host) as open_:
            switch = nitsum_pb2.SetLayoutRequest(layout="tp2x2")
            if open_here:
                assert (await open_.run.stub.SetLayout(switch)).to_layout == "tp2x2"
                assert (await fetch(f"{open_.http}/admin/profile", "POST")).status == 400  # no --profile_dir
                return
            error = await refusal(open_.run.stub.SetLayout(switch))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "--admin_port" in (error.details() or "")
            assert (await fetch(f"{open_.http}/admin/profile", "POST")).status == 403
            if admin_port is not None:
                async with grpc.aio.insecure_channel(open_.admin) as channel:
                    stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
                    assert (await stub.SetLayout(switch)).to_layout == "tp2x2"

    asyncio.run(scenario())


def test_with_keys_and_an_admin_port_both_are_needed(options: Callable[..., OpsOptions]) -> None:
    async def scenario() -> None:
        async with opened(options(admin_port=0)) as open_:
            switch = nitsum_pb2.SetLayoutRequest(layout="tp2x2")
            error = await refusal(open_.run.stub.SetLayout(switch, metadata=bearer("admin")))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            async with grpc.aio.insecure_channel(open_.admin) as channel:
                stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
                assert (await refusal(stub.SetLayout(switch))).code() is grpc.StatusCode.UNAUTHENTICATED
                error = await refusal(stub.SetLayout(switch, metadata=bearer("user")))
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                assert (await stub.SetLayout(switch, metadata=bearer("admin"))).to_layout == "tp2x2"

    asyncio.run(scenario())


async def admin_refusals(channel: Any, metadata: Any = None) -> dict[str, grpc.StatusCode]:
    """How every method of the administration is refused, with an empty message."""
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    return {
        method.name: (
            await refusal(getattr(stub, method.name)(getattr(admin_pb2, method.input_type.name)(), metadata=metadata))
        ).code()
        for method in admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods
    }


def test_all_of_the_administration_is_for_administrators(options: Callable[..., OpsOptions]) -> None:
    async def scenario() -> None:
        async with opened(options()) as open_:
            for metadata, code in (
                (None, grpc.StatusCode.UNAUTHENTICATED),
                (bearer("user"), grpc.StatusCode.PERMISSION_DENIED),
                (bearer("monitor"), grpc.StatusCode.PERMISSION_DENIED),
            ):
                refused = await admin_refusals(open_.run.channel, metadata)
                assert len(refused) >= 5
                assert set(refused.values()) == {code}, refused
            admin = admin_pb2_grpc.AdminServiceStub(open_.run.channel)
            lost = await admin.SetDevice(admin_pb2.SetDeviceRequest(device=3, lost=True), metadata=bearer("admin"))
            assert list(lost.lost) == [3]
        async with opened(OpsOptions(admin_port=0)) as open_:  # without keys, but not on this port
            assert set((await admin_refusals(open_.run.channel)).values()) == {grpc.StatusCode.PERMISSION_DENIED}

    asyncio.run(scenario())


def test_http_for_operators_wants_the_right_key(options: Callable[..., OpsOptions]) -> None:
    async def scenario() -> None:
        async with opened(options()) as open_:
            for path in ("/livez", "/readyz", "/health"):
                assert (await fetch(open_.http + path)).status == 200
            for path in ("/metrics", "/dashboard", "/dashboard/events", "/admin/profile", "/", "/nothing", "/livez/"):
                reply = await fetch(open_.http + path)
                assert reply.status == 401, path
                assert reply.json["error"]["code"] == "invalid_api_key"
                scheme = "Basic" if path.startswith("/dashboard") else "Bearer"
                assert reply.headers["www-authenticate"] == f'{scheme} realm="nitsum"'
            assert (await fetch(f"{open_.http}/metrics", headers=dict(bearer("user")))).status == 403
            assert (await fetch(f"{open_.http}/metrics", headers=dict(bearer("monitor")))).status == 200
            # A browser sends what it asked its user for.
            password = base64.b64encode(f"anybody:{SECRETS['monitor']}".encode()).decode()
            reply = await fetch(f"{open_.http}/dashboard", headers={"Authorization": f"Basic {password}"})
            assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
            for name, status in (("user", 403), ("monitor", 403), ("admin", 400)):
                reply = await fetch(f"{open_.http}/admin/profile", "POST", dict(bearer(name)))
                assert reply.status == status
            assert "--profile_dir" in reply.json["error"]["message"]

    asyncio.run(scenario())


def test_every_path_of_the_openai_api_wants_a_key(options: Callable[..., OpsOptions]) -> None:
    async def scenario() -> None:
        async with opened(options()) as open_:
            told = (await fetch(f"{open_.api}/openapi.json", headers=dict(bearer("user")))).json
            paths = {(path, method) for path, methods in told["paths"].items() for method in methods}
            assert ("/v1/chat/completions", "post") in paths
            for path, method in sorted(
                paths | {("/metrics", "get"), ("/dashboard", "get"), ("/admin/profile", "post")}
            ):
                reply = await fetch(open_.api + path.replace("{model}", "fake"), method.upper(), body=b"{}")
                if path.startswith("/health"):
                    assert reply.status == 200
                else:
                    error = reply.json["error"]
                    key = ("type", "authentication_error") if "messages" in path else ("code", "invalid_api_key")
                    assert (reply.status, error[key[0]]) == (401, key[1]), path
                assert reply.headers["x-request-id"]
            assert open_.run.engine.requests == []
            for path in ("/livez", "/readyz"):
                assert (await fetch(open_.api + path)).status == 200
            assert (await fetch(f"{open_.api}/metrics", headers=dict(bearer("monitor")))).status == 200

    asyncio.run(scenario())


def test_tiers_rates_and_roles_over_the_openai_api(options: Callable[..., OpsOptions]) -> None:
    async def scenario() -> None:
        async with opened(options()) as open_:

            async def complete(name: str, **fields: Any) -> Any:
                body = json.dumps({"model": "fake", "prompt": "hello"} | fields).encode()
                headers = {**dict(bearer(name)), "content-type": "application/json"}
                return await fetch(f"{open_.api}/v1/completions", "POST", headers, body)

            reply = await complete("fast", service_tier="interactive")
            assert (reply.status, reply.json["choices"][0]["text"]) == (200, "hello")
            reply = await complete("fast", service_tier="batch")
            assert (reply.status, reply.json["error"]["code"]) == (403, "permission_denied")
            assert "may not use the tier 'batch'" in reply.json["error"]["message"]
            assert [(await complete("slow")).status for _ in range(3)] == [200, 200, 429]
            assert (await complete("monitor")).status == 403
            counted = (await fetch(f"{open_.api}/metrics", headers=dict(bearer("admin")))).text
            assert 'nitsum_requests_refused_total{model_name="fake",reason="denied",tier="batch"} 1.0' in counted

    asyncio.run(scenario())


def test_jetstream_wants_a_key_but_for_its_health(options: Callable[..., OpsOptions]) -> None:
    async def scenario() -> None:
        async with opened(options()) as open_:
            stub = jetstream_pb2_grpc.OrchestratorStub(open_.run.channel)
            assert (await stub.HealthCheck(jetstream_pb2.HealthCheckRequest())).is_live
            content = jetstream_pb2.DecodeRequest.TextContent(text="hello")
            message = jetstream_pb2.DecodeRequest(text_content=content, max_tokens=9)

            async def decode(metadata: Any) -> list[Any]:
                return [answer async for answer in stub.Decode(message, metadata=metadata)]

            assert (await refusal(decode(None))).code() is grpc.StatusCode.UNAUTHENTICATED
            assert await decode(bearer("user"))
            assert (await refusal(decode(bearer("fast")))).code() is grpc.StatusCode.PERMISSION_DENIED

    asyncio.run(scenario())


def test_the_engine_behind_the_front_ends_trusts_nobody() -> None:
    """A front end that forgot its guard cannot change the cell."""
    engine = FakeEngine(lambda deltas: None, echo)
    try:
        front = access_checked(engine, LayoutLog(), lambda request_id: None, DEFAULT_TIERS)
        with pytest.raises(DeniedError):
            front.set_layout("tp4")
        with pytest.raises(DeniedError):
            front.prepare_layout("tp4")
        with pytest.raises(DeniedError):
            front.lose_device(1)
        with pytest.raises(DeniedError):
            front.restore_device(1)
        assert front.tier_names == engine.tier_names
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("tiers", "ttft_ms", "tpot_ms", "allowed"),
    [
        (("batch",), None, None, True),
        (("batch",), 90_000.0, 2_000.0, True),  # slower than the tier
        (("batch",), 100.0, None, False),
        (("batch",), None, 10.0, False),
        (None, 100.0, 10.0, True),
    ],
)
def test_a_key_for_certain_tiers_cannot_name_tighter_targets(
    tiers: tuple[str, ...] | None, ttft_ms: float | None, tpot_ms: float | None, allowed: bool
) -> None:
    engine = FakeEngine(lambda deltas: None, echo)
    try:
        front = access_checked(engine, LayoutLog(), lambda request_id: None, DEFAULT_TIERS)
        request = Request("r", (1, 2), 3, tier="batch", ttft_ms=ttft_ms, tpot_ms=tpot_ms)
        with calling(Caller("a key", tiers)):
            if allowed:
                front.submit(request)
            else:
                with pytest.raises(DeniedError, match="tighter"):
                    front.submit(request)
    finally:
        engine.close()


class _Wire:
    """Sends one request to an ASGI application, as a server would, and keeps what it says."""

    def __init__(self, path: str = "/v1/completions", method: str = "POST", **headers: str) -> None:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": "http", "path": path, "method": method, "headers": raw, "client": ("10.0.0.1", 5)}
        self.sent: list[Any] = []

    async def run(self, app: Any, *chunks: bytes) -> "_Wire":
        left = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        left.append({"type": "http.request", "body": b"", "more_body": False})

        async def receive() -> Any:
            return left.pop(0)

        async def send(message: Any) -> None:
            self.sent.append(message)

        await app(self.scope, receive, send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def error(self) -> Any:
        return json.loads(self.sent[1]["body"])["error"]


async def _reads_all(scope: Any, receive: Any, send: Any) -> None:
    size = 0
    while True:
        message = await receive()
        size += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    caller = current_caller()
    await send({"type": "http.response.body", "body": f"{size} {caller.client} {caller.tiers}".encode()})


def test_http_requests_run_as_their_caller_with_openai_shaped_errors() -> None:
    guard = Guard(AccessPolicy(KeyRing(key_list()), admin=True))
    app = HttpGuard(_reads_all, guard)

    async def scenario() -> None:
        wire = await _Wire(authorization=f"Bearer {SECRETS['fast']}").run(app, b"abc")
        assert wire.sent[1]["body"] == b"3 fast ('interactive',)"
        assert current_caller().client == ""
        wire = await _Wire(**{"x-api-key": SECRETS["fast"]}).run(app, b"abc")  # as Anthropic's client sends it
        assert wire.sent[1]["body"] == b"3 fast ('interactive',)"
        wire = await _Wire("/v1/messages", **{"x-api-key": "nk_wrong"}).run(app)
        assert (wire.status, wire.error["type"]) == (401, "authentication_error")
        wire = await _Wire().run(app)
        assert (wire.status, wire.error["type"], wire.error["code"]) == (
            401,
            "invalid_request_error",
            "invalid_api_key",
        )
        for _ in range(2):
            assert (await _Wire(authorization=f"Bearer {SECRETS['slow']}").run(app)).status == 200
        wire = await _Wire(authorization=f"Bearer {SECRETS['slow']}").run(app)
        assert (wire.status, wire.error["code"]) == (429, "rate_limit_exceeded")
        assert 0 < int(wire.headers["retry-after"]) <= 30
        assert 0 < int(wire.headers["retry-after-ms"]) <= 30_000
        assert (await _Wire("/v1/models", "GET", authorization=f"Bearer {SECRETS['slow']}").run(app)).status == 200

    asyncio.run(scenario())


def test_a_websocket_is_turned_away() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    app = HttpGuard(_reads_all, Guard(AccessPolicy()))
    asyncio.run(app({"type": "websocket", "path": "/"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_long_metadata_ends_the_call_and_not_the_server() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions()) as open_:
            flood = tuple((f"x-{number}", "y" * 8000) for number in range(20))
            error = await refusal(generate(open_.run.stub, flood))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await ask(open_.run.stub)).text == "hello"

    asyncio.run(scenario())
