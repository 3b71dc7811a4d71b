"""The models and devices for which profiles are derived."""

import dataclasses

from nitsum_jax.errors import InvalidInputError

BYTES_PER_VALUE = 2
"""bfloat16, for weights, activations and KV cache."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a dense decoder.

    Attributes:
      name: what profiles are called after it.
      title: the model, in words.
      L: layers.
      D: model width.
      F: MLP width (gate and up each).
      H: query heads.
      G: KV heads.
      A: head width.
      V: vocabulary.
      tied: whether the output head is the embedding.
      qkv_bias: whether q, k and v have a bias.
    """

    name: str
    title: str
    L: int
    D: int
    F: int
    H: int
    G: int
    A: int
    V: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        qkv = (self.H + 2 * self.G) * self.A
        layer = qkv * self.D + self.H * self.A * self.D + 3 * self.D * self.F + 2 * self.D + self.qkv_bias * qkv
        return self.L * layer + (1 if self.tied else 2) * self.V * self.D + self.D

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.weights * BYTES_PER_VALUE

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the KV cache, all layers and heads."""
        return 2 * self.L * self.G * self.A * BYTES_PER_VALUE

    def kv_heads(self, tp: int) -> int:
        """KV heads of one device; where there are more devices than heads, each head lives on several."""
        return max(1, self.G // tp)


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A kind of accelerator.

    Attributes:
      name: what profiles are called after it.
      title: the device, in words.
      table: what the files of its kernel times begin with.
      memory_bytes: its memory.
    """

    name: str
    title: str
    table: str
    memory_bytes: float


MODELS = (
    ModelShape("llama-3.1-8b", "Llama-3.1-8B", L=32, D=4096, F=14336, H=32, G=8, A=128, V=128256),
    ModelShape("llama-3.1-70b", "Llama-3.1-70B", L=80, D=8192, F=28672, H=64, G=8, A=128, V=128256),
    ModelShape("qwen2.5-14b", "Qwen2.5-14B", L=48, D=5120, F=13824, H=40, G=8, A=128, V=152064, qkv_bias=True),
    ModelShape("qwen2.5-32b", "Qwen2.5-32B", L=64, D=5120, F=27648, H=40, G=8, A=128, V=152064, qkv_bias=True),
)
DEVICES = (
    Device("h100", "NVIDIA H100 SXM, 80 GB", "h100_sxm", 80e9),
    Device("h200", "NVIDIA H200 SXM, 141 GB", "h200_sxm", 141e9),
)


def find_model(name: str) -> ModelShape:
    """The model of this name.

    Raises:
      InvalidInputError: there is none; the message names those there are.
    """
    for model in MODELS:
        if model.name == name:
            return model
    raise InvalidInputError(f"no shape is known for {name!r}: use {', '.join(model.name for model in MODELS)}")


def find_device(name: str) -> Device:
    """The device of this name.

    Raises:
      InvalidInputError: there is none; the message names those there are.
    """
    for device in DEVICES:
        if device.name == name:
            return device
    raise InvalidInputError(f"no tables are known for {name!r}: use {', '.join(device.name for device in DEVICES)}")
