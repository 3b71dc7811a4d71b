"""Small schemas drawn by a seed, and a vocabulary of 93 tokens that can write what they describe."""

import random
from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as HfTokenizer

from nitsum_jax.models.text.tokenizer import Tokenizer

VOCAB, EOS = 93, 92
_SYMBOLS = '{}[]":, -.+_abcdefghijklmnopqrstuvwxyz0123456789ABTZ/\\'
_LONGER = ['{"', '":', '": ', ', "', '"}', "true", "false", "null", "ab", "abc", "12", "00", "\\n", "é", "[1", "}]"]
_PATTERNS = ["^[a-c]{1,4}$", "^a\\d+b$", "^(ab|cd)?$", "^[0-9]{3}-[0-9]$"]


def tokenizer() -> Tokenizer:
    """Symbols, and tokens that spell several of them; the rest is filled up with words."""
    tokens = [token.replace(" ", "\u2581") for token in (*_SYMBOLS, *_LONGER)]
    tokens += [f"w{number}" for number in range(EOS - len(tokens))]
    made = HfTokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    made.add_special_tokens([AddedToken("<end>", special=True)])
    assert made.get_vocab_size() == VOCAB
    return Tokenizer(made, bos_id=None, eos_ids=[EOS], chat_template=None)


def schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose values are short."""
    kinds = ["string", "pattern", "enum", "integer", "number", "boolean", "null", "const"]
    if depth:
        kinds += ["object", "object", "object", "array", "tuple", "any", "types", "reference"]
    match rng.choice(kinds):
        case "string":
            least = rng.randint(0, 2)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 5)}
        case "pattern":
            return {
                "type": "string",
                "pattern": rng.choice(["^[a-c]{1,4}$", "^a\\d+b$", "^(ab|cd)?$", "^[0-9]{3}-[0-9]$"]),
            }
        case "enum":
            return {"enum": rng.sample(["a", "abc", 1, 12, True, None, "é", 0.5], 3)}
        case "integer":
            return {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 2000)}
        case "number":
            return {"type": "number", "minimum": -1, "exclusiveMaximum": rng.randint(1, 9)}
        case "boolean":
            return {"type": "boolean"}
        case "null":
            return {"type": "null"}
        case "const":
            return {"const": rng.choice(["abc", 12, None, [1, 2], {"a": "b"}])}
        case "array":
            least = rng.randint(0, 2)
            return {"type": "array", "items": schema(rng, depth - 1), "minItems": least, "maxItems": least + 1}
        case "tuple":
            return {"type": "array", "prefixItems": [schema(rng, 0), schema(rng, 0)], "items": False, "minItems": 2}
        case "any":
            return {"anyOf": [schema(rng, depth - 1), schema(rng, 0)]}
        case "types":
            return {"type": ["integer", "null"], "minimum": 0, "maximum": 99}
        case "reference":
            return {"$defs": {"one": schema(rng, 0)}, "type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2}
        case _:
            names = rng.sample("abcdefg", rng.randint(0, 3))
            return {
                "type": "object",
                "properties": {name: schema(rng, depth - 1) for name in names},
                "required": [name for name in names if rng.random() < 0.7],
                "additionalProperties": False,
            }


def schemas(count: int) -> list[dict[str, Any]]:
    """So many different ones; a reference is only followed at the top, where its definition stands."""
    rng = random.Random(0)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        one = schema(rng)
        if "$ref" not in str(one) or "$defs" in one:
            found[str(one)] = one
    return list(found.values())
