import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.client import generate
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from nitsum_jax.server.security.keys import ApiKey, digest_of, entry
from nitsum_jax.server.security.tls import TlsFiles, tls_of
from tests.server.operations.http import fetch
from tests.server.operations.ports import opened


class Papers:
    """Certificates of an authority that exists for one test."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.folder = folder
        self.ca_file = self._write("ca.pem", self.ca.cert_pem)
        self.cert, self.key = self.issue("server", self.ca)

    def issue(self, name: str, ca: trustme.CA) -> tuple[Path, Path]:
        leaf = ca.issue_cert("127.0.0.1", "localhost")
        chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        cert = self.folder / f"{name}.pem"
        cert.write_bytes(chain)
        return cert, self._write(f"{name}.key", leaf.private_key_pem)

    def _write(self, name: str, blob: Any) -> Path:
        path = self.folder / name
        path.write_bytes(blob.bytes())
        return path


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers(tmp_path)


def credentials(ca: Path, pair: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
    if pair is None:
        return grpc.ssl_channel_credentials(ca.read_bytes())
    return grpc.ssl_channel_credentials(ca.read_bytes(), pair[1].read_bytes(), pair[0].read_bytes())


async def _layout(port: int, with_what: grpc.ChannelCredentials | None) -> str:
    make: Callable[..., grpc.aio.Channel] = (
        grpc.aio.insecure_channel
        if with_what is None
        else lambda where: grpc.aio.secure_channel(where, with_what)
    )  # fmt: skip
    async with make(f"localhost:{port}") as channel:
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        answer = await stub.GetLayout(nitsum_pb2.GetLayoutRequest(), timeout=5)
    return str(answer.layout)


async def _fails(port: int, with_what: grpc.ChannelCredentials | None) -> bool:
    try:
        await _layout(port, with_what)
    except grpc.aio.AioRpcError as error:
        return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return False


def test_tls_on_grpc_and_http(papers: Papers) -> None:
    async def scenario() -> None:
        options = OpsOptions(metrics_port=0, tls=TlsFiles(papers.cert, papers.key))
        async with opened(options) as open_:
            port = open_.run.server.port
            assert await _layout(port, credentials(papers.ca_file)) == "tp1x4"
            assert await _fails(port, None)
            other = Papers(papers.folder / "..")
            assert await _fails(port, credentials(other.ca_file))

            assert open_.http.startswith("https://")
            context = ssl.create_default_context(cafile=str(papers.ca_file))
            assert (await fetch(f"{open_.http}/readyz", context=context)).status == 200
            with pytest.raises(ssl.SSLCertVerificationError):
                await fetch(f"{open_.http}/readyz", context=ssl.create_default_context(cafile=str(other.ca_file)))
            with pytest.raises(OSError):  # noqa: PT011  plain HTTP, refused in one of several ways
                await fetch(open_.http.replace("https", "http") + "/readyz")

    asyncio.run(scenario())


def test_mutual_tls_turns_strangers_away(papers: Papers) -> None:
    clients, strangers = trustme.CA(), trustme.CA()
    authority = papers.folder / "clients.pem"
    authority.write_bytes(clients.cert_pem.bytes())
    friend, stranger = papers.issue("friend", clients), papers.issue("stranger", strangers)

    async def scenario() -> None:
        options = OpsOptions(metrics_port=0, tls=TlsFiles(papers.cert, papers.key, authority))
        async with opened(options) as open_:
            port = open_.run.server.port
            assert await _layout(port, credentials(papers.ca_file, friend)) == "tp1x4"
            assert await _fails(port, credentials(papers.ca_file))
            assert await _fails(port, credentials(papers.ca_file, stranger))

            context = ssl.create_default_context(cafile=str(papers.ca_file))
            with pytest.raises(OSError):  # noqa: PT011  an alert of TLS, or a connection that just ends
                await fetch(f"{open_.http}/readyz", context=context)
            context.load_cert_chain(*friend)
            assert (await fetch(f"{open_.http}/readyz", context=context)).status == 200

    asyncio.run(scenario())


def test_the_client_speaks_tls_and_shows_its_key(papers: Papers, capsys: pytest.CaptureFixture[str]) -> None:
    clients = trustme.CA()
    authority = papers.folder / "clients.pem"
    authority.write_bytes(clients.cert_pem.bytes())
    cert, key = papers.issue("friend", clients)
    (papers.folder / "keys.toml").write_text(entry(ApiKey("a", digest_of("nk_secret"))))
    (papers.folder / "key").write_text("nk_secret\n")

    async def scenario() -> None:
        tls = TlsFiles(papers.cert, papers.key, authority)
        async with opened(OpsOptions(api_keys=str(papers.folder / "keys.toml"), tls=tls)) as open_:
            flags = ["nitsum-generate", f"--server=localhost:{open_.run.server.port}", "--prompt=hello", "--wait"]
            flags += [f"--tls_ca={papers.ca_file}", f"--tls_cert={cert}", f"--tls_key={key}"]
            assert await generate.main_async([*flags, f"--api_key_file={papers.folder / 'key'}"]) == 0
            assert capsys.readouterr().out == "hello\n"
            assert await generate.main_async(flags) == 1
            assert "UNAUTHENTICATED" in capsys.readouterr().err

    asyncio.run(scenario())


def test_wrong_files_are_told_at_the_start(papers: Papers) -> None:
    _, other = papers.issue("other", papers.ca)
    empty = papers.folder / "empty.pem"
    empty.write_text("")
    with pytest.raises(InvalidInputError, match=r"--tls_cert=.*none\.pem cannot be read: No such file"):
        TlsFiles(papers.folder / "none.pem", papers.key)
    for cert, key in ((papers.cert, other), (empty, papers.key), (papers.key, papers.cert)):
        with pytest.raises(InvalidInputError, match="do not fit together"):
            TlsFiles(cert, key)
    with pytest.raises(InvalidInputError, match=r"--tls_client_ca=.*no certificate"):
        TlsFiles(papers.cert, papers.key, empty)
    with pytest.raises(InvalidInputError, match="belong together"):
        tls_of(str(papers.cert), None, None)
    with pytest.raises(InvalidInputError, match="--tls_client_ca needs"):
        tls_of(None, None, str(papers.ca_file))
    assert tls_of(None, None, None) is None
