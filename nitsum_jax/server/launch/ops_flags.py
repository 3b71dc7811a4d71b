"""Flags of nitsum-serve about operation and security, and what they come to."""

import dataclasses

from absl import flags

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.address import DEFAULT_HOST
from nitsum_jax.server.operations.metrics.vllm_names import NAMES, OURS
from nitsum_jax.server.security.tls import TlsFiles, tls_of

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class OpsOptions:
    """What the flags say.

    Attributes:
      metrics_port: of the HTTP port for operators; None: none.
      admin_port: of the gRPC port for administration; None: none.
      admin_host: where that listens.
      api_keys: file of keys; None: callers are not asked.
      tls: None: no encryption.
      streams_per_client: most outputs of one client at a time; None: no limit.
      log_format: "text" or "json".
      otlp_endpoint: of a collector of traces; None: no traces.
      profile_dir: gets the traces of the profiler; None: none can be recorded.
      behind_gateway: whether all calls come from a gateway that says whom each is for.
      metrics_names: whose names the metrics have: "nitsum", "vllm" or "both".
    """

    metrics_port: int | None = None
    admin_port: int | None = None
    admin_host: str = DEFAULT_HOST
    api_keys: str | None = None
    tls: TlsFiles | None = None
    streams_per_client: int | None = None
    log_format: str = "text"
    otlp_endpoint: str | None = None
    profile_dir: str | None = None
    behind_gateway: bool = False
    metrics_names: str = OURS


def define(values: flags.FlagValues) -> None:
    """Adds the flags to those of a tool."""

    def text(name: str, default: str | None, meaning: str) -> None:
        flags.DEFINE_string(name, default, meaning, flag_values=values)

    def port(name: str, meaning: str) -> None:
        flags.DEFINE_integer(name, None, meaning, lower_bound=0, upper_bound=65535, flag_values=values)

    port(
        "metrics_port",
        "HTTP port for /metrics, /dashboard, /livez and /readyz, on --host; 0: a free one; none if not given",
    )
    port(
        "admin_port",
        "gRPC port for administration (SetLayout, nitsum-admin), on --admin_host; then no other port offers it; none "
        "if not given",
    )
    text("admin_host", DEFAULT_HOST, "address for --admin_port")
    text(
        "api_keys",
        None,
        "TOML file of API keys, made by nitsum-keys: every call but health checks then needs one; read again at SIGHUP",
    )
    text("tls_cert", None, "certificate of the server, PEM, with its chain: all ports then speak TLS")
    text("tls_key", None, "private key of --tls_cert, PEM")
    text("tls_client_ca", None, "certificates that sign those of clients, PEM: a client without one is turned away")
    flags.DEFINE_integer(
        "max_streams_per_client",
        None,
        "most outputs at a time of one API key, or of one address where there are no keys; no limit if not given",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_enum(
        "log_format", "text", ["text", "json"], "form of the log on stderr; requests are logged at --log_level=info",
        flag_values=values,
    )  # fmt: skip
    text(
        "otlp_endpoint",
        None,
        "OTLP/HTTP collector of OpenTelemetry traces, such as http://127.0.0.1:4318 (needs the extra otel)",
    )
    flags.DEFINE_bool(
        "behind_gateway",
        False,
        "all calls come from a gateway: the header x-gateway-inference-fairness-id tells clients apart for "
        "--max_streams_per_client where there are no keys",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "metrics_names",
        OURS,
        list(NAMES),
        "whose names the metrics have: vllm calls those by vLLM's names that it has, too, for dashboards and gateways "
        "that know them",
        flag_values=values,
    )
    text("profile_dir", None, "folder for traces of JAX's profiler, recorded on an administrator's request")


def read(values: flags.FlagValues) -> OpsOptions:
    """The options of parsed flags.

    Raises:
      InvalidInputError: flags that do not go together, or a file of TLS that is wrong.
    """
    endpoint = values.otlp_endpoint
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise InvalidInputError(f"--otlp_endpoint={endpoint} is not an address: give one such as http://127.0.0.1:4318")
    return OpsOptions(
        metrics_port=values.metrics_port,
        admin_port=values.admin_port,
        admin_host=values.admin_host,
        api_keys=values.api_keys,
        tls=tls_of(values.tls_cert, values.tls_key, values.tls_client_ca),
        streams_per_client=values.max_streams_per_client,
        log_format=values.log_format,
        otlp_endpoint=endpoint,
        profile_dir=values.profile_dir,
        behind_gateway=values.behind_gateway,
        metrics_names=values.metrics_names,
    )
