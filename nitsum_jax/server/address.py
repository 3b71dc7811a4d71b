"""Addresses that the server binds and the client calls."""

import errno
import socket

from nitsum_jax.errors import InvalidInputError, PreconditionError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50051


def target(host: str, port: int) -> str:
    """HOST:PORT as gRPC wants it, IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def callable_host(host: str) -> str:
    """The host under which a client on this machine reaches a server bound to `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def check_bindable(host: str, port: int, flag: str = "port") -> None:
    """Tries to bind every address of `host`, and lets go of it again.

    gRPC is content if one of the addresses of a name can be bound, and says little about why one could not.

    Args:
      host: address or name.
      port: 0 for a free one.
      flag: that the port came from.

    Raises:
      InvalidInputError: `host` names no address of this machine, or the port is out of range.
      PreconditionError: the port is in use, or this user may not bind it.
    """
    if not 0 <= port <= 65535:
        raise InvalidInputError(f"--{flag}={port} is out of range: give 1 to 65535, or 0 for a free one")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise InvalidInputError(f"--host={host} cannot be resolved: give an address of this machine") from None
    last: OSError | None = None
    bound = False
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does: the remains of closed connections do not make a port used.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                bound = True
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PreconditionError(
                    f"port {port} on {host} is in use: stop the server that has it, or give another --{flag}"
                ) from None
            last = error
    if bound or last is None:
        return
    if last.errno == errno.EACCES:
        raise PreconditionError(f"port {port} may not be bound by this user: give a --{flag} of 1024 or more")
    raise InvalidInputError(f"--host={host} is not an address of this machine ({last.strerror}): give one that is")
