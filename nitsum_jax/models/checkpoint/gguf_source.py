"""The tensors of a GGUF file under Hugging Face names, dequantised piece by piece."""

import re
from collections.abc import Iterable

import gguf
import ml_dtypes
import numpy as np

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint import gguf_blocks
from nitsum_jax.models.checkpoint.blocks import QuantFormat, QuantisedBlocks
from nitsum_jax.models.checkpoint.gguf_file import GgufFile, GgufTensor
from nitsum_jax.models.checkpoint.source import missing_tensor
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.families.family import PartNames
from nitsum_jax.models.families.registry import family_of
from nitsum_jax.models.families.tensors import EMBEDDING, FINAL_NORM, HEAD

_TOP = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": HEAD,
}
# What llama.cpp calls the parts of a layer.  A tensor of several is called like one of them.
_PARTS = {
    "attn_norm": "attn.norm",
    "attn_q": "attn.q",
    "attn_qkv": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.out",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "post_attention_norm": "attn.post_norm",
    "ffn_norm": "mlp.norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
    "post_ffw_norm": "mlp.post_norm",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PERMUTED = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
_FLOATS = ("F32", "F16", "BF16", "F64")


class GgufSource:
    """A `TensorSource` over a GGUF file.

    Llama-family files hold the rows of q and k in the order of interleaved RoPE (features 2i and 2i+1 of a head turn
    together); they are put back into Hugging Face's order (i and i + A/2).
    """

    def __init__(self, file: GgufFile, config: ModelConfig):
        """Presents `file`, whose config is `config`.

        Raises:
          InvalidInputError: two tensors of the file are the same one of the model.
        """
        self._file = file
        self._head_dim = config.head_dim
        self._norm_offset = config.norm_offset
        family = family_of(config.architecture)
        self._unpermute = family.gguf is not None and family.gguf.interleaved
        self._tensors: dict[str, GgufTensor] = {}
        for tensor in file.tensors:
            if self._tensors.setdefault(_canonical(tensor.name, family.parts), tensor) is not tensor:
                raise InvalidInputError(f"GGUF file {file.path} has tensor '{tensor.name}' twice: convert it again")

    def names(self) -> Iterable[str]:
        """All tensor names, those without a Hugging Face name as they are."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, outermost first."""
        return tuple(reversed(self._tensor(name).shape))

    def read(self, name: str) -> np.ndarray:
        """The whole tensor."""
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the first axis; only these rows are dequantised."""
        tensor = self._tensor(name)
        if self._unpermute and _PERMUTED.fullmatch(tensor.name):
            return self._values(tensor, tensor.data[_stored_rows(start, stop, self._head_dim)])
        return self._values(tensor, tensor.data[start:stop])

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the second axis; only blocks that hold them are dequantised."""
        tensor = self._tensor(name)
        if self._unpermute and _PERMUTED.fullmatch(tensor.name):
            return self.read(name)[:, start:stop]
        if tensor.tensor_type.name in _FLOATS:
            block, width = 1, tensor.data.shape[1] // tensor.shape[0]  # bfloat16 is kept as bytes
        else:
            block, width = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        first, last = start // block, -(-stop // block)
        values = self._values(tensor, tensor.data[:, first * width : last * width])
        return values[:, start - first * block : stop - first * block]

    def block_format(self, name: str) -> QuantFormat | None:
        """The format that holds a tensor as the file has it; None: there is none."""
        return gguf_blocks.format_of(self._tensor(name))

    def read_blocks(self, name: str) -> QuantisedBlocks:
        """A whole tensor that has such a format."""
        tensor = self._tensor(name)
        blocks = gguf_blocks.read(tensor)
        if self._unpermute and _PERMUTED.fullmatch(tensor.name):
            return blocks.take(_stored_rows(0, len(tensor.data), self._head_dim))
        return blocks

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise missing_tensor(name, self._file.path)
        return self._tensors[name]

    def _values(self, tensor: GgufTensor, data: np.ndarray) -> np.ndarray:
        if self._norm_offset and tensor.name.endswith("norm.weight"):  # which llama.cpp has added already
            return np.asarray(self._stored(tensor, data).astype(np.float32) - np.float32(self._norm_offset))
        return self._stored(tensor, data)

    def _stored(self, tensor: GgufTensor, data: np.ndarray) -> np.ndarray:
        match tensor.tensor_type.name:
            case "F32" | "F16" | "F64":
                return data
            case "BF16":
                return np.ascontiguousarray(data).view(ml_dtypes.bfloat16)
        try:
            values: np.ndarray = gguf.quants.dequantize(np.ascontiguousarray(data), tensor.tensor_type)
        except NotImplementedError:
            raise InvalidInputError(
                f"GGUF tensor '{tensor.name}' is stored as {tensor.tensor_type.name}, which is not supported; "
                "use another quantisation of the model (Q4_K, Q8_0, F16, ...)"
            ) from None
        return values


def _canonical(name: str, parts: PartNames) -> str:
    """The Hugging Face name of a GGUF tensor; names without one are returned as they are."""
    found = _LAYER_NAME.fullmatch(name)
    if found and found[2] in _PARTS:
        return f"model.layers.{found[1]}.{parts[_PARTS[found[2]]]}.{found[3]}"
    return _TOP.get(name, name)


def _stored_rows(start: int, stop: int, head_dim: int) -> np.ndarray:
    """Where a llama-family GGUF file keeps rows [start, stop) of q or k."""
    head, row = np.divmod(np.arange(start, stop), head_dim)
    half, pair = np.divmod(row, head_dim // 2)
    return np.asarray(head * head_dim + 2 * pair + half)
