"""`nitsum-convert SRC DST --to=orbax|safetensors`: a model from one checkpoint format into another.

The result holds tokenizer, chat template and generation config as well, so --model takes it as it is.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags

from nitsum_jax.errors import InvalidInputError, NitsumError
from nitsum_jax.models.checkpoint.orbax_io import save_orbax
from nitsum_jax.models.checkpoint.quantisation import QUANTIZATIONS
from nitsum_jax.models.checkpoint.safetensors_source import SafetensorsWriter
from nitsum_jax.models.config_readers.hf import config_to_hf
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.families.tensors import checkpoint_shapes
from nitsum_jax.models.generation import add_generation_config
from nitsum_jax.models.loading import OpenModel, open_model
from nitsum_jax.models.pack import matrix_dtype
from nitsum_jax.models.pooling import write_pooling

FORMATS = ("orbax", "safetensors")
DEFAULT_VSHARDS = 8


def convert(
    src: str, dst: str, to: str, *, vshards: int = DEFAULT_VSHARDS, dtype: str = "auto", quantize: str = "none"
) -> None:
    """Converts a model.

    Args:
      src: whatever --model takes.
      dst: folder to write; it must be new or empty.
      to: "orbax" or "safetensors".
      vshards: K, for orbax.  A cell of another K can load the result too, only slower.
      dtype: of the weights; "auto" keeps the checkpoint's (quantised GGUF files become float32).
      quantize: which weights become (or stay) weights of few bits, for orbax; see `EngineConfig.quantization`.

    Raises:
      InvalidInputError: `src` is no model, `dst` is not empty, or another argument is out of range.
    """
    if to not in FORMATS:
        raise InvalidInputError(f"cannot convert to '{to}': use {' or '.join(FORMATS)}")
    if quantize != "none" and to != "orbax":
        raise InvalidInputError("--quantize goes with --to=orbax: safetensors folders are written in full precision")
    folder = Path(dst).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInputError(f"{folder} is not an empty folder: give the name of a new one")
    model = open_model(src)
    wanted = model.config.dtype if dtype == "auto" else str(matrix_dtype(dtype))
    cut = ModelCut.of(model.config, vshards)
    formats = model.formats(quantize, cut)
    folder.mkdir(parents=True, exist_ok=True)
    model.tokenizer.save(folder)
    add_generation_config(folder, model.generation)
    write_pooling(folder, model.pooling)
    if to == "orbax":
        save_orbax(folder, model.config, cut, model.weights(cut, wanted, formats), wanted, formats)
    else:
        _write_safetensors(model, folder, wanted)


def _write_safetensors(model: OpenModel, folder: Path, dtype: str) -> None:
    writer = SafetensorsWriter(folder)
    for name in checkpoint_shapes(model.config):
        writer.add(name, model.source.read(name).astype(matrix_dtype(dtype), copy=False))
    writer.close()
    # Last, so that a folder left half written is not taken for a model.
    config = config_to_hf(model.config) | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """The command line after flags are parsed; leaves with a one-line message on an error."""
    values = flags.FLAGS
    try:
        if len(argv) != 3:
            raise InvalidInputError("give a source and a destination: nitsum-convert SRC DST --to=orbax|safetensors")
        convert(argv[1], argv[2], values.to, vshards=values.vshards, dtype=values.dtype, quantize=values.quantize)
    except NitsumError as error:
        sys.exit(f"nitsum-convert: {error}")
    print(f"wrote {argv[2]}")  # noqa: T201


def run() -> None:
    """Entry point of `nitsum-convert`."""
    # Flags are defined here, not on import: names like --dtype belong to other programs of the package as well.
    flags.DEFINE_enum("to", None, FORMATS, "Format to write.", required=True)
    flags.DEFINE_integer("vshards", DEFAULT_VSHARDS, "Number of vshards an Orbax checkpoint is cut into.")
    flags.DEFINE_enum(
        "dtype", "auto", ("auto", "float32", "bfloat16", "float16"), "Type of the weights; auto keeps the checkpoint's."
    )
    flags.DEFINE_enum(
        "quantize",
        "none",
        QUANTIZATIONS,
        "Weights in few bits, in an Orbax checkpoint: as nitsum-serve --quantization, which then is auto.",
    )
    jax.config.update("jax_platforms", "cpu")  # converting needs no accelerator, and must not take its memory
    app.run(main)


if __name__ == "__main__":
    run()
