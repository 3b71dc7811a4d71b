"""The command line of nitsum-profile."""

import dataclasses
from collections.abc import Sequence

from absl import flags

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.profiles.derive import Assumptions
from nitsum_jax.profiles.shapes import DEVICES, MODELS
from nitsum_jax.server import cli

USAGE = """nitsum-profile: step-time profiles, for control and simulation.

  nitsum-profile --model=MODEL --out=FILE      measures a model on the devices present, at every TP
  nitsum-profile --derive=DIR --out=DIR        derives profiles from a folder of kernel tables
  nitsum-profile --derive=DIR --heldout        prints how well such tables predict points that are left out"""

_DERIVING = ("kinds", "host_overhead_ms", "small_ops", "switch_host_ms", "device_put_gbps", "memory_fraction")
_MEASURING = (
    "layout",
    "dtype",
    "kv_dtype",
    "max_batch",
    "max_model_len",
    "prefill_chunk",
    "fused_steps",
    "quick",
    "name",
    "cache_dir",
)
_DEFAULT = Assumptions()
_BATCH, _QUICK_BATCH = 32, 8


@dataclasses.dataclass(frozen=True)
class ProfilingOptions:
    """What the flags say.

    Attributes:
      derive: folder of tables, or None to measure.
      heldout: whether to check the tables instead of writing profiles.
      out: file (measured) or folder (derived).
      model: what to measure; models to derive, with commas.
      kinds: kinds of devices to derive for.
      assumptions: what no table says.
      layout: TPs to measure are those of this layout; None: all.
      devices: devices to measure on; None: all.
      dtype: of weights.
      kv_dtype: of the KV cache.
      max_batch: most sequences.
      max_model_len: longest context, tokens.
      prefill_chunk: most new tokens of a prefill step.
      fused_steps: as the engine's.
      page_size: tokens in a KV block.
      quick: fewer contexts and repetitions.
      name: of the measured profile.
      cache_dir: folder of compiled steps.
    """

    derive: str | None
    heldout: bool
    out: str | None
    model: str | None
    kinds: tuple[str, ...]
    assumptions: Assumptions
    layout: str | None
    devices: int | None
    dtype: str
    kv_dtype: str
    max_batch: int
    max_model_len: int | None
    prefill_chunk: int
    fused_steps: str
    page_size: int
    quick: bool
    name: str | None
    cache_dir: str | None


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    names = ", ".join(model.name for model in MODELS)
    given = _DEFAULT
    flags.DEFINE_string("derive", None, "derive from the kernel tables in this folder", flag_values=values)
    flags.DEFINE_bool("heldout", False, "with --derive: predict points left out, and print errors", flag_values=values)
    flags.DEFINE_string("out", None, "file for a measured profile, folder for derived ones", flag_values=values)
    flags.DEFINE_string(
        "model", None, f"a model as nitsum-serve takes it; with --derive some of {names} (default: all)",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "kinds", [device.name for device in DEVICES], "with --derive: kinds of devices", flag_values=values
    )
    flags.DEFINE_integer("devices", None, "devices of the cell (default: all; derived: 8)", 1, flag_values=values)
    flags.DEFINE_integer("page_size", 16, "tokens in a KV block", 1, flag_values=values)
    flags.DEFINE_float(
        "host_overhead_ms", 1000 * given.host_overhead_s, "derived: host time of a step", 0, flag_values=values
    )
    flags.DEFINE_float(
        "small_ops", given.small_ops, "derived: norms, rotary, sampling ...: times the compiler's figure", 0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "switch_host_ms", 1000 * given.switch_host_s, "derived: host's part of a switch", 0, flag_values=values
    )
    flags.DEFINE_float(
        "device_put_gbps", given.device_put_bytes_per_s / 1e9, "derived: GB/s of a general resharding", 0.001,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "memory_fraction", given.memory_fraction, "derived: memory for weights, KV cache and workspace", 0.01, 1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("layout", None, "measure the TPs of this layout (default: every TP)", flag_values=values)
    flags.DEFINE_string("dtype", "auto", "float32, bfloat16 or auto", flag_values=values)
    flags.DEFINE_string("kv_dtype", "auto", "as nitsum-serve --kv_dtype", flag_values=values)
    flags.DEFINE_integer(
        "max_batch", None, "most sequences of an instance (default: 32; quick: 8)", 1, flag_values=values
    )
    flags.DEFINE_integer(
        "max_model_len", None, "longest context (default: the model's, 2048 at most)", 2, flag_values=values
    )
    flags.DEFINE_integer("prefill_chunk", 128, "most new tokens of a prefill step", 2, flag_values=values)
    flags.DEFINE_enum("fused_steps", "auto", ["auto", "on", "off"], "as nitsum-serve --fused_steps", flag_values=values)
    flags.DEFINE_bool("quick", False, "few sizes, contexts and repetitions", flag_values=values)
    flags.DEFINE_string("name", None, "name of a measured profile (default: the model's)", flag_values=values)
    flags.DEFINE_string("cache_dir", None, "folder of compiled steps (default: the user's)", flag_values=values)
    return values


def read_options(argv: Sequence[str]) -> ProfilingOptions:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = _flags()
    cli.parse(values, argv, USAGE)
    if values.derive is None and values.model is None:
        raise InvalidInputError("nothing to do: give --model to measure one, or --derive=DIR with kernel tables")
    if values.heldout and values.derive is None:
        raise InvalidInputError("--heldout checks kernel tables: give their folder with --derive=DIR")
    if values.out is None and not values.heldout:
        raise InvalidInputError("--out is missing: say where the profile goes")
    for name in _MEASURING if values.derive is not None else _DERIVING:
        if values[name].present:
            other = "--derive" if values.derive is not None else "--model alone"
            raise InvalidInputError(f"--{name} means nothing with {other}: leave it out")
    return ProfilingOptions(
        derive=values.derive,
        heldout=values.heldout,
        out=values.out,
        model=values.model,
        kinds=tuple(values.kinds),
        assumptions=Assumptions(
            host_overhead_s=values.host_overhead_ms / 1000,
            small_ops=values.small_ops,
            switch_host_s=values.switch_host_ms / 1000,
            device_put_bytes_per_s=values.device_put_gbps * 1e9,
            memory_fraction=values.memory_fraction,
            page_size=values.page_size,
            devices=values.devices or _DEFAULT.devices,
        ),
        layout=values.layout,
        devices=values.devices,
        dtype=values.dtype,
        kv_dtype=values.kv_dtype,
        max_batch=values.max_batch or (_QUICK_BATCH if values.quick else _BATCH),
        max_model_len=values.max_model_len,
        prefill_chunk=values.prefill_chunk,
        fused_steps=values.fused_steps,
        page_size=values.page_size,
        quick=values.quick,
        name=values.name,
        cache_dir=values.cache_dir,
    )
