"""All families of models, by the names that checkpoints give them."""

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.families.family import Family
from nitsum_jax.models.families.gemma import GEMMA2, GEMMA3
from nitsum_jax.models.families.granite import GRANITE
from nitsum_jax.models.families.llama import LLAMA, MISTRAL
from nitsum_jax.models.families.olmo import OLMO2
from nitsum_jax.models.families.phi import PHI3
from nitsum_jax.models.families.qwen import QWEN2, QWEN3
from nitsum_jax.models.families.smollm import SMOLLM3

_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, GRANITE, SMOLLM3)
FAMILIES = {family.architecture: family for family in _ALL}
GGUF_FAMILIES = {one.gguf.architecture: (one, one.gguf) for one in FAMILIES.values() if one.gguf is not None}


def family_of(architecture: str) -> Family:
    """The family with this `model_type`.

    Raises:
      InvalidInputError: there is none; it says which there are.
    """
    if architecture not in FAMILIES:
        raise InvalidInputError(
            f"model architecture '{architecture}' is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]
