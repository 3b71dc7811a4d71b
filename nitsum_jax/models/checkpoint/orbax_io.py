"""Orbax checkpoints of vshards: every parameter of every vshard is an array of its own.

So a device's vshards are read straight onto it, and nothing is ever assembled on the host.  The folder holds

    nitsum.json   format version, number of vshards, dtype, size of every file in weights/
    config.json   the model, as Hugging Face writes it
    weights/      the Orbax tree {parameter name split at dots: {"v<k>" or "all": array}}
    (tokenizer files)
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.blocks import QuantFormat, blocks_of
from nitsum_jax.models.checkpoint.source import missing_tensor
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.hf import config_from_hf, config_to_hf
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.families.tensors import checkpoint_shapes
from nitsum_jax.models.pack import (
    NOTHING,
    matrix_dtype,
    pieces_by_tensor,
    plan,
    row_parallel,
    stored,
    unpack_tensor,
)

META_FILE = "nitsum.json"
CONFIG_FILE = "config.json"
WEIGHTS_FOLDER = "weights"
FORMAT_VERSION = 1
QUANTISED_VERSION = 2  # of checkpoints with parameters in few bits, which earlier programs cannot read
GROUP_BYTES = 128 * 2**20  # what one restore reads, unless a single layer is larger

# Orbax logs every step at level INFO, through absl's logger; its warnings and errors stay.
logging.getLogger("absl").addFilter(lambda r: r.levelno >= logging.WARNING or "orbax" not in Path(r.pathname).parts)

Key = tuple[str, int | None]  # (parameter name, vshard or None for replicated)


@dataclasses.dataclass(frozen=True, slots=True)
class _StoredParam:
    """One array of one vshard; `fixed` is its type, None that of the matrices."""

    name: str
    vshard: int | None
    shape: tuple[int, ...]
    fixed: np.dtype | None

    def dtype(self, matrices: np.dtype) -> np.dtype:
        return self.fixed or matrices


class OrbaxCheckpoint:
    """An Orbax folder of ours, open for reading.  It is a `TensorSource` as well, for cuts other than its own.

    Attributes:
      folder: where it is.
      config: the model.
      cut: how its vshards were cut.
      dtype: of its matrices.
      formats: of the parameters that it has in few bits.
    """

    def __init__(self, folder: str | Path):
        """Reads the two JSON files and the shapes of all arrays; no weights.

        Raises:
          InvalidInputError: not an Orbax folder of ours, of a later format, or arrays are missing or misshapen.
        """
        self.folder = Path(folder)
        meta, config = _read_json(self.folder / META_FILE), _read_json(self.folder / CONFIG_FILE)
        if meta.get("format_version") not in (FORMAT_VERSION, QUANTISED_VERSION):
            raise InvalidInputError(
                f"{self.folder} is of checkpoint format {meta.get('format_version')}, this program reads "
                f"{FORMAT_VERSION} and {QUANTISED_VERSION}: update nitsum-jax or convert the model again"
            )
        # Sizes first: a read that fails within Orbax leaves others behind, which print traces when the program ends.
        if not isinstance(meta.get("num_vshards"), int) or meta.get("files") != _file_sizes(self.folder):
            raise _damaged(self.folder)
        self.config = config_from_hf(config)
        self.cut = ModelCut.of(self.config, meta["num_vshards"])
        self.dtype = matrix_dtype(str(meta.get("dtype")))
        self.formats = _formats(meta.get("quantised", {}), self.folder)
        # What there is to be read: parameters, or the arrays of those in few bits.
        self._params = _stored_params(self.config, self.cut, self.formats)
        self._check_shapes()
        self._tensor_shapes = checkpoint_shapes(self.config)
        self._param_of = {tensor: where[0][0] for tensor, where in pieces_by_tensor(self.cut).items()}
        self._last: dict[str, np.ndarray] = {}

    def gives(self, cut: ModelCut, formats: Mapping[str, QuantFormat]) -> bool:
        """Whether `stream` and `place` give what a model of this cut and of these formats needs."""
        return self.cut.num_vshards == cut.num_vshards and self.formats == formats

    def stream(self, dtype: "str | np.dtype") -> Iterator[tuple[str, int | None, np.ndarray]]:
        """All parameters of all vshards in loading order, as `pack` yields them; some layers are read at a time."""
        matrices = matrix_dtype(dtype)
        for members in self._groups(matrices):
            values = self._restore(
                {(p.name, p.vshard): ocp.RestoreArgs(restore_type=np.ndarray, dtype=p.dtype(matrices)) for p in members}
            )
            for param in members:
                yield param.name, param.vshard, values.pop((param.name, param.vshard))

    def place(
        self, devices: Sequence[jax.Device], residency: Mapping[int, Set[int]], dtype: "str | np.dtype"
    ) -> Iterator[tuple[str, int | None, int, jax.Array]]:
        """All parameters, group by group of layers, each read once and put on every device that holds it.

        Args:
          devices: of the cell.
          residency: device index -> the vshards it holds; it holds the replicated parameters as well.
          dtype: of the matrices.

        Yields:
          (parameter name, vshard or None, device index, single-device array).
        """
        matrices = matrix_dtype(dtype)
        for members in self._groups(matrices):
            homes: dict[Key, list[int]] = {}
            for param in members:
                held_by = [d for d, held in residency.items() if param.vshard is None or param.vshard in held]
                if held_by:
                    homes[param.name, param.vshard] = held_by
            shardings = {key: _replicated_over([devices[d] for d in held_by]) for key, held_by in homes.items()}
            values = self.restore(shardings, matrices)
            for key, held_by in homes.items():
                buffers = {shard.device: shard.data for shard in values.pop(key).addressable_shards}
                for d in held_by:
                    yield *key, d, buffers[devices[d]]

    def restore(self, shardings: Mapping[Key, jax.sharding.Sharding], dtype: "str | np.dtype") -> dict[Key, jax.Array]:
        """Restores parameters straight to devices.

        A vshard that several devices hold gets a fully replicated NamedSharding over them: the file is read once, and
        `addressable_shards` are the single-device buffers.

        Args:
          shardings: where each wanted parameter goes; others are not read.
          dtype: of the matrices.

        Raises:
          InvalidInputError: a key is not in this checkpoint, or the checkpoint is damaged.
        """
        matrices = matrix_dtype(dtype)
        wanted: dict[Key, Any] = {}
        for key, sharding in shardings.items():
            if key not in self._params:
                raise missing_tensor(f"{key[0]} of vshard {key[1]}", self.folder)
            param = self._params[key]
            wanted[key] = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=param.shape, dtype=param.dtype(matrices), strict=True
            )
        return self._restore(wanted)

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._tensor_shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        if name not in self._tensor_shapes:
            raise missing_tensor(name, self.folder)
        return self._tensor_shapes[name]

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, put together from all vshards."""
        self.shape(name)
        if name not in self._last:
            # q, k and v come from one parameter, and another cut asks for each once per vshard: keep the last layer.
            layer = _layer_of(self._param_of[name])
            keys = [key for key in self._params if _layer_of(key[0]) == layer]
            values = self._restore({key: ocp.RestoreArgs(restore_type=np.ndarray) for key in keys})
            tensors = [tensor for tensor, param in self._param_of.items() if _layer_of(param) == layer]
            self._last = {
                t: unpack_tensor(self.config, self.cut, t, lambda *key: self._whole(values, *key)) for t in tensors
            }
        return self._last[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the first axis."""
        return self.read(name)[start:stop]

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the second axis."""
        return self.read(name)[:, start:stop]

    def _whole(self, values: Mapping[Key, np.ndarray], name: str, vshard: int | None) -> np.ndarray:
        """A parameter as `plan` has it, widened if it is in few bits."""
        fmt = self.formats.get(name)
        if fmt is None:
            return values[name, vshard]
        leaves = {key.removeprefix(f"{name}."): v for (key, k), v in values.items() if k == vshard}
        found = blocks_of(leaves, fmt).values(centred=fmt.bits == 4)
        return found.T if name in row_parallel(self.config, self.cut) else found

    def _check_shapes(self) -> None:
        path = (self.folder / WEIGHTS_FOLDER).absolute()
        try:
            with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
                tree = checkpointer.metadata(path).item_metadata.tree
            shapes = {key: tuple(_leaf(tree, key).shape) for key in self._params}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise _damaged(self.folder) from None
        if left := _names(tree) - {".".join(_path(key)) for key in self._params}:
            raise InvalidInputError(
                f"Orbax checkpoint {self.folder} has parameter '{min(left)}', which its config has no place for; "
                "convert the model again"
            )
        if any(shapes[key] != param.shape for key, param in self._params.items()):
            raise _damaged(self.folder)

    def _groups(self, matrices: np.dtype) -> Iterator[list[_StoredParam]]:
        """Parameters in loading order, as many whole layers together as fit GROUP_BYTES, but at least one.

        Every restore costs milliseconds, more with the number of arrays in the checkpoint; so small layers go together.
        """
        group: list[_StoredParam] = []
        size = 0
        for _, layer in itertools.groupby(self._params.values(), key=lambda param: _layer_of(param.name)):
            members = list(layer)
            layer_size = sum(math.prod(p.shape) * p.dtype(matrices).itemsize for p in members)
            if group and size + layer_size > GROUP_BYTES:
                yield group
                group, size = [], 0
            group += members
            size += layer_size
        yield group

    def _restore(self, wanted: Mapping[Key, Any]) -> dict[Key, Any]:
        item = _nested({key: jax.ShapeDtypeStruct(self._params[key].shape, np.float32) for key in wanted})
        args = ocp.args.PyTreeRestore(item=item, restore_args=_nested(wanted), partial_restore=True)
        try:
            with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
                tree = checkpointer.restore((self.folder / WEIGHTS_FOLDER).absolute(), args=args)
        except (OSError, ValueError, KeyError):
            raise _damaged(self.folder) from None
        return {key: _leaf(tree, key) for key in wanted}


def save_orbax(
    folder: str | Path,
    config: ModelConfig,
    cut: ModelCut,
    params: Iterable[tuple[str, int | None, "np.ndarray | jax.Array"]],
    dtype: "str | np.dtype",
    formats: Mapping[str, QuantFormat] = NOTHING,
) -> None:
    """Writes vshards as an Orbax folder of ours (without a tokenizer); the parameters are in memory while it writes.

    Args:
      folder: created if need be; it must not hold a checkpoint yet.
      config: the model.
      cut: how it is cut.
      params: (parameter name, vshard or None, array), all of them: what `pack` yields, or arrays on devices.
      dtype: of the matrices.
      formats: of the parameters that are in few bits.

    Raises:
      InvalidInputError: the folder already holds a checkpoint.
    """
    folder = Path(folder)
    if (folder / META_FILE).exists() or (folder / WEIGHTS_FOLDER).exists():
        raise InvalidInputError(f"{folder} already holds a checkpoint; give another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    tree = _nested({(name, vshard): value for name, vshard, value in params})
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
        checkpointer.save((folder / WEIGHTS_FOLDER).absolute(), args=ocp.args.PyTreeSave(tree))
    config_json = config_to_hf(config) | {"torch_dtype": str(matrix_dtype(dtype))}
    (folder / CONFIG_FILE).write_text(json.dumps(config_json, indent=2) + "\n")
    # Written last: a folder without it is an unfinished checkpoint and is not taken for one.
    meta = {
        "format_version": QUANTISED_VERSION if formats else FORMAT_VERSION,
        "num_vshards": cut.num_vshards,
        "dtype": str(matrix_dtype(dtype)),
        "files": _file_sizes(folder),
    }
    if formats:
        meta["quantised"] = {name: dataclasses.asdict(fmt) for name, fmt in formats.items()}
    (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")


def _stored_params(config: ModelConfig, cut: ModelCut, formats: Mapping[str, QuantFormat]) -> dict[Key, "_StoredParam"]:
    found = {}
    for param in plan(config, cut):
        leaves = stored(param, formats, param.name in row_parallel(config, cut), np.dtype(np.float32))
        for name, (shape, dtype) in leaves.items():
            fixed = None if param.name not in formats and len(param.shape) > 1 else dtype
            found[name, param.vshard] = _StoredParam(name, param.vshard, shape, fixed)
    return found


def _formats(meta: Any, folder: Path) -> dict[str, QuantFormat]:
    try:
        return {str(name): QuantFormat(**fields) for name, fields in meta.items()}
    except (AttributeError, TypeError):
        raise _damaged(folder) from None


def _replicated_over(devices: Sequence[jax.Device]) -> jax.sharding.Sharding:
    if len(devices) == 1:
        return jax.sharding.SingleDeviceSharding(devices[0])
    mesh = jax.sharding.Mesh(np.array(devices), ("copies",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _layer_of(name: str) -> str:
    first, second, *_ = [*name.split("."), ""]
    return second if first == "layers" else first


def _path(key: Key) -> list[str]:
    name, vshard = key
    return [*name.split("."), "all" if vshard is None else f"v{vshard}"]


def _nested(flat: Mapping[Key, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = _path(key)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _names(tree: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted paths of all leaves."""
    inner = {name: _names(node, f"{prefix}{name}.") for name, node in tree.items() if isinstance(node, Mapping)}
    return {prefix + name for name in tree if name not in inner}.union(*inner.values())


def _leaf(tree: Mapping[str, Any], key: Key) -> Any:
    node: Any = tree
    for part in _path(key):
        node = node[part]
    return node


def _file_sizes(folder: Path) -> dict[str, int]:
    weights = folder / WEIGHTS_FOLDER
    files = sorted(path for path in weights.rglob("*") if path.is_file())
    return {path.relative_to(weights).as_posix(): path.stat().st_size for path in files}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise _damaged(path.parent)
    return value


def _damaged(folder: Path) -> InvalidInputError:
    return InvalidInputError(f"Orbax checkpoint {folder} is incomplete or damaged; convert the model again")
