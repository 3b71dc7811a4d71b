"""From what --model says to a model that is ready to be loaded: config and tokenizer now, weights as a stream."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.blocks import QuantFormat
from nitsum_jax.models.checkpoint.gguf_file import GgufFile
from nitsum_jax.models.checkpoint.gguf_source import GgufSource
from nitsum_jax.models.checkpoint.hf_blocks import QuantisedFolder
from nitsum_jax.models.checkpoint.leftovers import refuse_leftovers, with_own_head
from nitsum_jax.models.checkpoint.quantisation import check_quantization, choose_formats
from nitsum_jax.models.checkpoint.safetensors_source import SafetensorsSource, has_safetensors
from nitsum_jax.models.checkpoint.source import TensorSource
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.gguf import config_from_gguf, gguf_field
from nitsum_jax.models.config_readers.hf import config_from_hf
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.generation import generation_of_gguf, read_generation_config
from nitsum_jax.models.known import tiny_random
from nitsum_jax.models.known.registry import KNOWN_MODELS, fetch
from nitsum_jax.models.pack import NOTHING, check_tensors, pack
from nitsum_jax.models.pooling import Pooling, pooling_of_gguf, read_pooling
from nitsum_jax.models.text.special_ids import valid_ids
from nitsum_jax.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nitsum_jax.models.checkpoint.orbax_io import OrbaxCheckpoint

_log = logging.getLogger(__name__)
_ORBAX_META = "nitsum.json"


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A checkpoint that was opened; its weights are read only when asked for.

    Attributes:
      name: for people: the known name, or the name of the file or folder.
      config: the model; `eos_ids` are those of the checkpoint and of the tokenizer together.
      tokenizer: its tokenizer.
      source: its tensors.
      vshards: the checkpoint if it holds vshards already (Orbax), else None.
      generation: what it says about how it is to be sampled, as in generation_config.json.
      pooling: how it makes a vector of a text, if it says so.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    source: TensorSource
    vshards: "OrbaxCheckpoint | None" = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pooling: Pooling | None = None

    def with_layers(self, count: int) -> "OpenModel":
        """The model without the layers behind the first `count`: it talks nonsense, and its steps cost less.

        Raises:
          InvalidInputError: it has fewer, or its checkpoint holds vshards already.
        """
        if self.vshards is not None:
            raise InvalidInputError("an Orbax checkpoint is read whole: leave --layers out, or take the original")
        if count > self.config.num_layers:
            raise InvalidInputError(f"{self.name} has {self.config.num_layers} layers: give at most so many")
        return dataclasses.replace(self, config=dataclasses.replace(self.config, num_layers=count))

    def formats(self, quantization: str, cut: ModelCut) -> dict[str, QuantFormat]:
        """Which parameters are kept in few bits, see `choose_formats`.

        Raises:
          InvalidInputError: there is no such quantisation, or it does not fit the model or its cut.
        """
        if self.vshards is not None and (kept := self.vshards.formats):
            return _kept_formats(quantization, kept, self.vshards.cut.num_vshards, cut)
        return choose_formats(quantization, self.config, cut, self.source)

    def weights(
        self, cut: ModelCut, dtype: "str | np.dtype", formats: Mapping[str, QuantFormat] = NOTHING
    ) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """All parameters as vshards on the host, one after the other.

        Args:
          cut: how the model is cut.
          dtype: of matrices and embedding ("float32", "bfloat16"); norms and biases are float32.
          formats: of those that are kept in few bits, see `formats`.

        Yields:
          (parameter name, vshard or None for replicated, array).

        Raises:
          InvalidInputError: the checkpoint is damaged.
        """
        if self.vshards is not None and self.vshards.gives(cut, formats):
            return self.vshards.stream(dtype)
        return pack(self.config, cut, self.source, dtype, formats)

    def place(
        self,
        cut: ModelCut,
        dtype: "str | np.dtype",
        devices: Sequence[jax.Device],
        residency: Mapping[int, Set[int]],
        formats: Mapping[str, QuantFormat] = NOTHING,
    ) -> Iterator[tuple[str, int | None, int, jax.Array]]:
        """All parameters on the devices that hold them; from Orbax with the same cut without passing through the host.

        Args:
          cut: how the model is cut.
          dtype: of matrices and embedding.
          devices: of the cell.
          residency: device index -> its vshards; every device in it gets the replicated parameters too.
          formats: of the parameters that are kept in few bits.

        Yields:
          (parameter name, vshard or None, device index, single-device array).

        Raises:
          InvalidInputError: the checkpoint is damaged.
        """
        if self.vshards is not None and self.vshards.gives(cut, formats):
            yield from self.vshards.place(devices, residency, dtype)
            return
        for name, vshard, value in pack(self.config, cut, self.source, dtype, formats):
            for device, held in residency.items():
                if vshard is None or vshard in held:
                    yield name, vshard, device, jax.device_put(value, devices[device])


def open_model(spec: str) -> OpenModel:
    """Opens a model: reads its config and tokenizer and checks that it has all its tensors and no others.

    No weights are read, but for a head beside an embedding that the config calls one: these are compared.

    Args:
      spec: a known name, a .gguf file, a Hugging Face model folder, or an Orbax folder of ours.

    Raises:
      InvalidInputError: none of these, damaged, or a model that is not supported.
      PreconditionError: a known model cannot be fetched.
    """
    if spec in KNOWN_MODELS:
        return _open_gguf(fetch(KNOWN_MODELS[spec]), spec)
    if spec == tiny_random.NAME:
        return _open_hf(tiny_random.folder(), spec)
    path = Path(spec).expanduser() if spec else None
    if path is None or not path.exists():
        raise InvalidInputError(f"there is no model '{spec}': {_accepted()}")
    name = path.resolve().name
    if path.is_file():
        if path.suffix != ".gguf":
            raise InvalidInputError(f"{path} is not a .gguf file: {_accepted()}")
        return _open_gguf(path, name.removesuffix(".gguf"))
    if (path / _ORBAX_META).is_file():
        return _open_orbax(path, name)
    if has_safetensors(path):
        return _open_hf(path, name)
    raise InvalidInputError(f"folder {path} holds no model with safetensors or Orbax weights: {_accepted()}")


def _open_gguf(path: Path, name: str) -> OpenModel:
    file = GgufFile(path)
    config = config_from_gguf(file, name)
    reader: Any = file  # has what the tokenizer asks of a gguf.GGUFReader
    said = generation_of_gguf(file.fields)
    pooling_type = gguf_field(file, f"{gguf_field(file, 'general.architecture')}.pooling_type")
    pooling = None if pooling_type is None else pooling_of_gguf(pooling_type)
    return _finished(name, config, Tokenizer.from_gguf(reader), GgufSource(file, config), said, pooling)


def _open_hf(folder: Path, name: str) -> OpenModel:
    try:
        config_json = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidInputError(f"{folder} has no config.json: give a complete Hugging Face model folder") from None
    except (OSError, ValueError):
        config_json = None
    if not isinstance(config_json, dict):
        raise InvalidInputError(f"{folder / 'config.json'} is not a JSON object: download it again")
    config = config_from_hf(config_json, name)
    said = read_generation_config(folder)
    files = SafetensorsSource(folder)
    source: TensorSource = files
    if (kept := config_json.get("quantization_config")) is not None:
        if not isinstance(kept, dict):
            raise InvalidInputError(
                f"{folder / 'config.json'}: quantization_config is not an object: download it again"
            )
        source = QuantisedFolder(files, kept)
    return _finished(name, config, Tokenizer.from_file(folder), source, said, read_pooling(folder))


def _open_orbax(folder: Path, name: str) -> OpenModel:
    # Orbax takes a while to import, and only these folders need it.
    from nitsum_jax.models.checkpoint.orbax_io import OrbaxCheckpoint

    checkpoint = OrbaxCheckpoint(folder)
    said = read_generation_config(folder)
    tokenizer, pooling = Tokenizer.from_file(folder), read_pooling(folder)
    return _finished(name, checkpoint.config, tokenizer, checkpoint, said, pooling, checkpoint)


def _finished(
    name: str,
    config: ModelConfig,
    tokenizer: Tokenizer,
    source: TensorSource,
    generation: Mapping[str, Any],
    pooling: Pooling | None,
    vshards: "OrbaxCheckpoint | None" = None,
) -> OpenModel:
    config = with_own_head(config, source)
    check_tensors(config, source)
    refuse_leftovers(config, source)
    config = dataclasses.replace(config, name=name, eos_ids=_end_ids(config, tokenizer))
    return OpenModel(name, config, tokenizer, source, vshards, generation, pooling)


def _kept_formats(
    quantization: str, kept: Mapping[str, QuantFormat], vshards: int, cut: ModelCut
) -> dict[str, QuantFormat]:
    """The formats of a checkpoint that holds quantised vshards: what was rounded once is not rounded again."""
    check_quantization(quantization)
    if quantization == "none":
        return {}
    if quantization != "auto":
        raise InvalidInputError(
            f"the checkpoint is quantised already: leave --quantization={quantization} out, or convert the original"
        )
    if cut.num_vshards != vshards:
        raise InvalidInputError(
            f"the checkpoint holds {vshards} quantised vshards: give --vshards={vshards}, --quantization=none, or "
            "convert the original again"
        )
    return dict(kept)


def _end_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a generation, by config and tokenizer together.

    Raises:
      InvalidInputError: there are too many for a request, or every text starts with an id that the model lacks.
    """
    rows = config.vocab_size
    if lacking := [i for i in tokenizer.encode("") if i >= rows]:
        raise InvalidInputError(
            f"the tokenizer starts every text with token {lacking[0]}, but the model knows {rows} tokens only: "
            "tokenizer and weights are of different models"
        )
    if tokenizer.vocab_size > rows:
        _log.warning(
            "the tokenizer has %d tokens but the model %d: requests whose text needs the others are refused",
            tokenizer.vocab_size,
            rows,
        )
    return valid_ids([*config.eos_ids, *tokenizer.eos_ids], rows, "the end ids of the tokenizer")


def _accepted() -> str:
    known = ", ".join(sorted((*KNOWN_MODELS, tiny_random.NAME)))
    return (
        f"give a known name ({known}), a .gguf file, a Hugging Face model folder "
        "(config.json, tokenizer.json, safetensors), or a folder made by nitsum-convert"
    )
