"""TLS for all ports: the files are read and tried at the start, so that a wrong one is reported then."""

import dataclasses
import pathlib
import ssl

import grpc

from nitsum_jax.errors import InvalidInputError


@dataclasses.dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files in PEM form.

    Attributes:
      cert: certificate of the server, with the chain behind it.
      key: its private key.
      client_ca: certificates that sign those of clients; None: clients need none.
    """

    cert: pathlib.Path
    key: pathlib.Path
    client_ca: pathlib.Path | None = None

    def __post_init__(self) -> None:
        """Reads and tries all of them.

        Raises:
          InvalidInputError: a file cannot be read, is not PEM, or the key is not that of the certificate.
        """
        for flag, path in (("tls_cert", self.cert), ("tls_key", self.key), ("tls_client_ca", self.client_ca)):
            if path is not None:
                _read(flag, path)
        self.ssl_context()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a port of a gRPC server."""
        ca = None if self.client_ca is None else _read("tls_client_ca", self.client_ca)
        pair = (_read("tls_key", self.key), _read("tls_cert", self.cert))
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)

    def ssl_context(self) -> ssl.SSLContext:
        """For an HTTP server.

        Raises:
          InvalidInputError: the files do not fit together, or are not PEM.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # A password would be asked for on the terminal; a server has none.
            context.load_cert_chain(self.cert, self.key, password="")
        except (ssl.SSLError, ValueError):
            raise InvalidInputError(
                f"--tls_cert={self.cert} and --tls_key={self.key} do not fit together: give a PEM certificate and its "
                "own private key, without a password"
            ) from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError:
                raise InvalidInputError(f"--tls_client_ca={self.client_ca} has no certificate in PEM form") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def tls_of(cert: str | None, key: str | None, client_ca: str | None) -> TlsFiles | None:
    """From the flags; None: no TLS.

    Raises:
      InvalidInputError: a flag that belongs to another stands alone, or a file is wrong.
    """
    if cert is None and key is None:
        if client_ca is not None:
            raise InvalidInputError("--tls_client_ca needs --tls_cert and --tls_key")
        return None
    if cert is None or key is None:
        raise InvalidInputError("--tls_cert and --tls_key belong together: give both")
    return TlsFiles(pathlib.Path(cert), pathlib.Path(key), None if client_ca is None else pathlib.Path(client_ca))


def _read(flag: str, path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"--{flag}={path} cannot be read: {error.strerror or error}") from None
