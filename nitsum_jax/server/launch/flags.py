"""The flags of nitsum-serve."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from nitsum_jax.engine.step.attention import KV_DTYPES
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.runtime.startup.compile_cache import OFF, default_folder
from nitsum_jax.server.address import DEFAULT_HOST, DEFAULT_PORT
from nitsum_jax.server.cli import parse
from nitsum_jax.server.launch import control_flags, ops_flags

USAGE = """nitsum-serve serves a language model over gRPC and HTTP, and changes its tensor parallelism while it streams.

  nitsum-serve --model=smollm2-135m --devices=4 --layout=tp2+tp1x2

It prints the command that talks to it. SIGTERM or Ctrl-C lets the requests that are alive finish; a second one stops at
once. Exit status: 0 stopped as asked; 1 a bug; 2 wrong flags, or something that they name cannot be used."""


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """The values of the flags; `engine` has the fields of EngineConfig that were given."""

    model: str
    host: str
    port: int
    http_port: int | None
    served_model_name: str | None
    cache_dir: str | None
    drain_s: float
    log_level: str
    tiers: str | None
    engine: dict[str, Any]
    profile: str | None = None
    pace: str | None = None
    time_scale: float = 1.0
    ops: ops_flags.OpsOptions = ops_flags.OpsOptions()
    control: control_flags.ControlOptions = control_flags.ControlOptions()
    generation_config: str = "auto"
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"


def read_options(argv: Sequence[str]) -> LaunchOptions:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = _define()
    parse(values, argv, USAGE)
    if values.pace is not None and values.profile is not None:
        raise InvalidInputError("--pace and --profile do not go together: a paced cell predicts with its pace")
    if not values.model:
        raise InvalidInputError("--model is empty: name a model, a .gguf file or a model folder")
    if values.served_model_name == "":
        raise InvalidInputError("--served_model_name is empty: name the model, or leave the flag out")
    return LaunchOptions(
        model=values.model,
        host=values.host,
        port=values.port,
        http_port=values.http_port,
        served_model_name=values.served_model_name,
        cache_dir=values.cache_dir,
        drain_s=values.drain_seconds,
        log_level=values.log_level,
        tiers=values.tiers,
        profile=values.profile,
        pace=values.pace,
        time_scale=values.time_scale,
        ops=ops_flags.read(values),
        control=control_flags.read(values),
        generation_config=values.generation_config,
        tool_parser=values.tool_parser,
        reasoning_parser=values.reasoning_parser,
        engine={
            "devices": values.devices,
            "layout": values.layout,
            "vshards": values.vshards,
            "dtype": values.dtype,
            "kv_dtype": values.kv_dtype,
            "max_model_len": values.max_model_len,
            "max_batch": values.max_batch,
            "page_size": values.page_size,
            "prefill_chunk": values.prefill_chunk,
            "kv_cache_gib": values.kv_cache_gib,
            "deterministic": values.deterministic,
            "max_queue": values.max_queue,
            "residency": values.residency,
            "weight_budget_gib": values.weight_budget_gib,
            "precopy": values.precopy,
            "prefix_cache": values.prefix_cache,
            "attention": values.attention,
            "reduction": values.reduction,
            "fused_steps": values.fused_steps,
            "pooling": values.pooling,
            "wide_prefill_tokens": values.wide_prefill_tokens,
            "layouts": _layouts(values.layouts),
        },
    )


def _layouts(text: str | None) -> tuple[str, ...] | None:
    # Semicolons, because a layout that names its devices has commas of its own.
    return None if text is None else tuple(part.strip() for part in text.split(";") if part.strip())


def _define() -> flags.FlagValues:
    values = flags.FlagValues()

    def text(name: str, default: str | None, meaning: str) -> None:
        flags.DEFINE_string(name, default, meaning, flag_values=values)

    def count(name: str, default: int | None, meaning: str) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)

    text(
        "model",
        "smollm2-135m",
        "name of a known model, a GGUF file, a Hugging Face folder or an Orbax checkpoint of ours",
    )
    text(
        "host", DEFAULT_HOST, "address to listen on; 0.0.0.0 lets other machines in: use --api_keys and --tls_cert then"
    )
    flags.DEFINE_integer(
        "port", DEFAULT_PORT, "port of gRPC; 0: a free one", lower_bound=0, upper_bound=65535, flag_values=values
    )
    flags.DEFINE_integer(
        "http_port",
        None,
        "port of the OpenAI-compatible HTTP API, on the same host; 0: a free one; no HTTP if not given",
        lower_bound=0,
        upper_bound=65535,
        flag_values=values,
    )
    text("served_model_name", None, "name of the model for clients; the value of --model if not given")
    flags.DEFINE_enum(
        "generation_config",
        "auto",
        ["auto", "none"],
        "temperature, top_p, top_k, min_p, repetition_penalty and length of requests that do not set them; auto: from "
        "the model's generation_config.json (or GGUF metadata); none: that file is ignored",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "tool_parser",
        "auto",
        ["auto", "none", "hermes", "llama3", "mistral", "mistral_args"],
        "how the model writes calls of tools; auto: as its chat template teaches",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "reasoning_parser",
        "auto",
        ["auto", "none", "think"],
        "think: answers may begin with thoughts in <think> tags, which are told apart; auto: if the template knows "
        "these tags",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "pooling",
        "auto",
        ["auto", "none", "last", "mean"],
        "what /v1/embeddings makes a text's vector of: the last token or the mean of all; auto: as the model's files "
        "say, and none if they do not",
        flag_values=values,
    )
    count("devices", None, "devices of the cell; emulated on the CPU where there is no accelerator; all if not given")
    text(
        "layout",
        None,
        "layout at the start, such as tp4, tp2+tp1x2 or tp2/interactive+tp1x2/batch; chosen to fit if not given",
    )
    text(
        "layouts",
        None,
        "allow-list of layouts, with semicolons between them: only these are compiled and may be switched to, whatever "
        "tiers their instances are kept for",
    )
    count(
        "vshards",
        None,
        "K, into how many virtual shards the model is cut: the largest TP; from the devices if not given",
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "of the weights; auto: bfloat16 where the devices multiply it fast, else float32",
        flag_values=values,
    )
    count("max_model_len", None, "longest prompt plus output, in tokens; what the model was trained for if not given")
    count("max_batch", 32, "most sequences in one decode step of an instance")
    count("page_size", 16, "tokens per KV block")
    count("prefill_chunk", 128, "most prompt tokens in one step")
    count(
        "wide_prefill_tokens",
        None,
        "prompts of at least this many tokens are prefilled at the widest TP of the cell, between the decode steps of "
        "the instances on the same devices; never if not given",
    )
    flags.DEFINE_enum(
        "residency",
        "auto",
        ["auto", "resident", "lean"],
        "weights on a device: resident, those of all layouts, so that a switch moves none; lean, those of the layout "
        "in force; auto: resident unless that takes more than --weight_budget_gib",
        flag_values=values,
    )
    flags.DEFINE_float(
        "weight_budget_gib",
        None,
        "weights that may stay on a device, in GiB, for --residency=auto",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "precopy",
        False,
        "copy KV blocks ahead of a switch, while the streams go on: the switch takes longer, but the stall is shorter",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "prefix_cache",
        None,
        "share KV blocks among prompts that begin alike; on if not given, unless --deterministic, where whole prefill "
        "chunks are shared",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "attention",
        "auto",
        ["auto", "xla", "pallas"],
        "what attends to the KV cache: xla, plain operations; pallas, a kernel, on GPUs and TPUs only; "
        "auto: a kernel on accelerators that have one for the model's shapes",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "reduction",
        "fixed",
        ["fixed", "fast"],
        "how partial results of devices are added up: fixed, in one order, the same bits at every TP; fast: by fewer "
        "bytes in bfloat16, and no promise about bits (not with --deterministic)",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "fused_steps",
        "auto",
        ["auto", "on", "off"],
        "whether a prompt's chunk and the sequences that decode share a step, so that weights are read once for both; "
        "auto: on accelerators, and in a paced cell if its profile says so (never with --deterministic)",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "kv_dtype",
        "auto",
        ["auto", *KV_DTYPES],
        "type of the KV cache; int8, with a scale per token and head (not on TPUs), and float8_e4m3 hold twice the "
        "context of bfloat16 and halve what a switch moves; auto: the type of the weights",
        flag_values=values,
    )
    flags.DEFINE_float(
        "kv_cache_gib",
        None,
        "size of the KV pool of each device, in GiB; if not given, what --max_batch requests can use and memory allows",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "deterministic",
        False,
        "one step shape for all batches: slower, but neither load nor a switch can change a token",
        flag_values=values,
    )
    text(
        "tiers",
        None,
        "TOML file of latency tiers, a table [tiers.NAME] with ttft_ms and tpot_ms each; interactive, standard and "
        "batch if not given; auto: these three, with longer targets where this machine cannot meet them",
    )
    text(
        "profile",
        None,
        "step times that the scheduler predicts with, a name or a .json file of nitsum-profile; an estimate from the "
        "model's size if not given. Measured steps correct it either way",
    )
    text(
        "pace",
        None,
        "profile at whose pace steps, switches and hand-overs are delivered, a name or a .json file: to emulate a cell "
        "of other hardware with the tokens of a small model, such as --model=tiny-random",
    )
    flags.DEFINE_float(
        "time_scale",
        1.0,
        "with --pace, real seconds per second of the profile; more than 1 for machines that cannot keep up",
        lower_bound=0.001,
        flag_values=values,
    )
    count("max_queue", 256, "most requests that may wait; further ones are refused with RESOURCE_EXHAUSTED")
    flags.DEFINE_float(
        "drain_seconds",
        30.0,
        "how long requests may take to finish after SIGTERM or Ctrl-C",
        lower_bound=0.0,
        flag_values=values,
    )
    text(
        "cache_dir",
        None,
        f"folder for compiled executables ({OFF}: none); JAX_COMPILATION_CACHE_DIR or {default_folder()} if not given",
    )
    flags.DEFINE_enum(
        "log_level", "warning", ["debug", "info", "warning", "error"], "what is logged to stderr", flag_values=values
    )
    ops_flags.define(values)
    control_flags.define(values)
    return values
