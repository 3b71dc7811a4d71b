"""The flags of all clients about which server they call, and as whom."""

from absl import flags

from nitsum_jax.server.address import DEFAULT_HOST, DEFAULT_PORT, target
from nitsum_jax.server.client.channel import KEY_VARIABLE, Identity, read_identity


def define(values: flags.FlagValues) -> None:
    """Adds the flags to those of a tool."""
    for name, default, meaning in (
        ("server", target(DEFAULT_HOST, DEFAULT_PORT), "HOST:PORT of the server"),
        (
            "api_key_file",
            None,
            f"file with the API key, for a server that wants one; the environment variable {KEY_VARIABLE} if not given",
        ),
        ("tls_ca", None, "certificates that sign that of the server, PEM: the call is encrypted"),
        ("tls_cert", None, "certificate of this client, PEM, for a server that asks for one"),
        ("tls_key", None, "private key of --tls_cert, PEM"),
    ):
        flags.DEFINE_string(name, default, meaning, flag_values=values)


def read(values: flags.FlagValues) -> Identity:
    """The identity of the client, from parsed flags.

    Raises:
      InvalidInputError: a file cannot be read, or flags do not go together.
    """
    return read_identity(values.api_key_file, values.tls_ca, values.tls_cert, values.tls_key)
