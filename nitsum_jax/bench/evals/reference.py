"""Texts with how likely each of their tokens is, as somebody else has computed it."""

import dataclasses
import importlib
import importlib.resources
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Self

from nitsum_jax.errors import InvalidInputError, PreconditionError

SCHEMA = "nitsum-evals/1"
OWN = "smollm2-135m"
"""The model whose reference comes with the package."""

_FOLDER = "nitsum_jax.bench.evals"


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """A text and its likelihoods.

    Attributes:
      name: for people.
      text: as it is sent.
      ids: of its tokens, with those that the tokenizer puts before it.
      logprobs: natural logarithms of the probabilities of all tokens but the first.
    """

    name: str
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a model should say.

    Attributes:
      model: which.
      made_by: what computed it.
      texts: at least one.
    """

    model: str
    made_by: str
    texts: tuple[ScoredText, ...]

    @classmethod
    def of(cls, data: Any) -> Self:
        """The reference in a parsed file.

        Raises:
          ValueError, TypeError, KeyError: it is none.
        """
        if data["schema"] != SCHEMA:
            raise ValueError(f"it is of {data['schema']}")
        texts = [
            ScoredText(str(one["name"]), str(one["text"]), tuple(one["ids"]), tuple(map(float, one["logprobs"])))
            for one in data["texts"]
        ]
        if not texts or any(not one.logprobs or len(one.ids) != len(one.logprobs) + 1 for one in texts):
            raise ValueError("texts are missing, or their likelihoods")
        return cls(str(data["model"]), str(data["made_by"]), tuple(texts))

    def as_json(self) -> str:
        """The file; likelihoods to seven digits."""
        texts = [
            dataclasses.asdict(one) | {"logprobs": [float(f"{value:.7g}") for value in one.logprobs]}
            for one in self.texts
        ]
        return json.dumps({"schema": SCHEMA, "model": self.model, "made_by": self.made_by, "texts": texts}) + "\n"


def read_reference(path: str | None) -> Reference:
    """A reference from a file, or the one that comes with the package.

    Raises:
      InvalidInputError: the file cannot be read, or holds none.
    """
    if path is None:
        text = importlib.resources.files(_FOLDER).joinpath(f"{OWN}.json").read_text(encoding="utf-8")
        return Reference.of(json.loads(text))
    try:
        return Reference.of(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidInputError(f"cannot read --reference={path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInputError(
            f"--reference={path} is not a file of this tool ({' '.join(str(error).split())}): make one with --make"
        ) from None


def by_transformers(checkpoint: str, texts: Sequence[tuple[str, str]]) -> Reference:
    """What transformers says of texts, in float32 with eager attention.

    Args:
      checkpoint: a Hugging Face folder, or a name that transformers knows.
      texts: names and texts.

    Raises:
      PreconditionError: transformers or torch is not installed, or cannot load the model.
    """
    try:
        torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    except ImportError:
        raise PreconditionError("--make needs transformers and torch: pip install transformers torch") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    except (OSError, ValueError) as error:
        raise PreconditionError(
            f"transformers cannot load {checkpoint}: {' '.join(str(error).split())[:200]}"
        ) from None
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
    name = pathlib.Path(checkpoint).name
    return Reference(name, versions, tuple(scored(torch, tokenizer, model, *one) for one in texts))


def scored(torch: Any, tokenizer: Any, model: Any, name: str, text: str) -> ScoredText:
    """What a model of transformers says of a text.

    Args:
      torch: the module.
      tokenizer: of the model.
      model: in evaluation mode.
      name: for people.
      text: of two tokens or more.
    """
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    likely = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return ScoredText(name, text, tuple(ids), tuple(likely.tolist()))
