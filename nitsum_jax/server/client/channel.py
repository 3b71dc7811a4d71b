"""The channel of nitsum-generate: plain or TLS, with or without an API key."""

import dataclasses
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from nitsum_jax.errors import InvalidInputError, UnavailableError, one_line

KEY_VARIABLE = "NITSUM_API_KEY"
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # a prompt may come back as ids
    # A server that is just starting is found within a second.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web has no business between a client and its server
)


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity of the client, and the certificates that it trusts; files in PEM form.

    Attributes:
      api_key: secret; None: none is sent.
      ca: certificates that sign that of the server; None: no TLS.
      cert: certificate of the client, for servers that ask for one.
      key: its private key.
    """

    api_key: str | None = None
    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None


def read_identity(api_key_file: str | None, ca: str | None, cert: str | None, key: str | None) -> Identity:
    """Reads the files that flags name; without a key file the key comes from the environment.

    Raises:
      InvalidInputError: a file cannot be read, or flags do not go together.
    """
    if (cert is None) != (key is None) or (cert is not None and ca is None):
        raise InvalidInputError("--tls_cert and --tls_key belong together, and need --tls_ca")
    if api_key_file is not None:
        secret: str | None = _read("api_key_file", api_key_file).decode("utf-8", "replace").strip()
    else:
        secret = os.environ.get(KEY_VARIABLE) or None
    if secret is not None and not (secret.isascii() and secret.isprintable()):
        raise InvalidInputError("the API key has characters that no key has: give the line that nitsum-keys printed")
    return Identity(
        secret,
        None if ca is None else _read("tls_ca", ca),
        None if cert is None else _read("tls_cert", cert),
        None if key is None else _read("tls_key", key),
    )


def does_not_serve(server: str, error: grpc.aio.AioRpcError) -> UnavailableError:
    """What a tool says of a server that did not answer a call."""
    return UnavailableError(f"{server} does not serve: {error.code().name}: {one_line(error.details() or '')}")


def open_channel(server: str, identity: Identity) -> grpc.aio.Channel:
    """A channel to HOST:PORT; nothing is connected yet."""
    interceptors = [] if identity.api_key is None else [_KeyUnary(identity.api_key), _KeyStream(identity.api_key)]
    if identity.ca is None:
        return grpc.aio.insecure_channel(server, options=_OPTIONS, interceptors=interceptors)
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)
    return grpc.aio.secure_channel(server, credentials, options=_OPTIONS, interceptors=interceptors)


class _Keyed:
    """Adds the key to the metadata of a call."""

    def __init__(self, api_key: str) -> None:
        self._value = f"Bearer {api_key}"

    async def _call(self, continuation: Callable[..., Awaitable[Any]], details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), ("authorization", self._value))
        return await continuation(details._replace(metadata=metadata), request)


class _KeyUnary(_Keyed, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """See grpc.aio.UnaryUnaryClientInterceptor."""
        return await self._call(continuation, client_call_details, request)


class _KeyStream(_Keyed, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """See grpc.aio.UnaryStreamClientInterceptor."""
        return await self._call(continuation, client_call_details, request)


def _read(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInputError(f"--{flag}={path} cannot be read: {error.strerror or error}") from None
