"""Writes the golden files with Hugging Face transformers; see README.md for the environment and the command.

Nothing of nitsum_jax but the texts of its evals is used, so that the files are evidence from outside.
"""

import argparse
import copy
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from nitsum_jax.bench.evals.texts import TEXTS  # noqa: E402  found through the line above
from tests.models.golden import smollm2_prompts, tiny_models  # noqa: E402

HERE = Path(__file__).resolve().parent
NUM_STEPS = 48
NUM_TOP = 8


def make_tiny() -> None:
    """tiny_logits.npz: logits of every tiny variant, and a checksum of what they were made from."""
    arrays: dict[str, np.ndarray] = {}
    for variant, config_dict in tiny_models.VARIANTS.items():
        settings = copy.deepcopy(config_dict)  # transformers writes into nested dicts
        del settings["architectures"], settings["torch_dtype"]
        config = AutoConfig.for_model(**settings)
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        weights = {name: torch.from_numpy(value) for name, value in tiny_models.tensors(variant).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - ({"lm_head.weight"} if config_dict["tie_word_embeddings"] else set()):
            raise SystemExit(f"{variant}: missing {missing}, unexpected {unexpected}")
        with torch.no_grad():
            logits = model(torch.from_numpy(tiny_models.token_ids(variant))).logits
        arrays[variant] = logits.numpy()
        arrays[f"{variant}.checksum"] = np.asarray(tiny_models.checksum(variant), dtype=np.uint32)
        best = np.sort(arrays[variant], axis=-1)[..., -2:]
        gap = np.median(best[..., 1] - best[..., 0])
        print(f"{variant}: std {arrays[variant].std():.2f}, median gap of the best two {gap:.2f}")
    _save("tiny_logits.npz", arrays)


def load_smollm2(path: Path) -> tuple[Any, Any]:
    """Tokenizer and model of the demo model's GGUF file."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers reads GGUF's "smollm" as GPT-2; the published tokenizer.json of SmolLM2 splits digits first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    _check_weights(model, path)
    return tokenizer, model


def make_evals(path: Path) -> None:
    """smollm2-135m.json of nitsum-bench evals: how likely the tokens of its texts are."""
    tokenizer, model = load_smollm2(path)
    texts = []
    for name, text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            likely = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        logprobs = likely[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
        texts.append({"name": name, "text": text, "ids": ids, "logprobs": [float(f"{one:.7g}") for one in logprobs]})
        print(name, len(ids), "tokens, perplexity", np.exp(-np.mean(logprobs)))
    made_by = f"transformers {version('transformers')}, torch {version('torch')}, float32"
    whole = {"schema": "nitsum-evals/1", "model": "smollm2-135m", "made_by": made_by, "texts": texts}
    (ROOT / "nitsum_jax/bench/evals/smollm2-135m.json").write_text(json.dumps(whole) + "\n", encoding="utf-8")


def make_smollm2(path: Path) -> None:
    """smollm2_135m.json and smollm2_135m.npz: greedy continuations of the demo model and their logits."""
    tokenizer, model = load_smollm2(path)
    entries: list[dict[str, Any]] = []
    arrays: dict[str, list[np.ndarray]] = {"top_ids": [], "top_logits": [], "gaps": []}
    full: dict[str, np.ndarray] = {}
    for prompt in smollm2_prompts.PROMPTS:
        if prompt.messages is not None:
            text = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
        else:
            text = prompt.text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        output, steps = _greedy(model, ids)
        ranked = np.argsort(-steps, axis=-1, kind="stable")[:, :NUM_TOP]
        top = np.take_along_axis(steps, ranked, axis=-1)
        arrays["top_ids"].append(ranked.astype(np.uint16))
        arrays["top_logits"].append(top)
        arrays["gaps"].append(top[:, 0] - top[:, 1])
        if prompt.full_logits:
            full[f"logits.{prompt.name}"] = steps[0]
        entry: dict[str, Any] = {"name": prompt.name}
        entry |= {"messages": list(prompt.messages)} if prompt.messages is not None else {"text": prompt.text}
        eos = model.generation_config.eos_token_id
        entry |= {
            "prompt_ids": ids,
            "output_ids": output,
            "output_text": tokenizer.decode(output, skip_special_tokens=True),
            "first_eos": output.index(eos) if eos in output else None,
            "smallest_gap": round(float(arrays["gaps"][-1].min()), 6),
        }
        entries.append(entry)
        print(prompt.name, len(ids), entry["first_eos"], entry["smallest_gap"], repr(entry["output_text"][:80]))
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers", "gguf")}
    header = {"model": path.name, "versions": versions, "dtype": "float32", "attention": "eager"}
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    text = json.dumps(header, indent=1)[:-2] + f',\n "prompts": [\n{lines}\n ]\n}}\n'
    (HERE / "smollm2_135m.json").write_text(text, encoding="utf-8")
    stacked = {name: np.stack(values) for name, values in arrays.items()}
    _save("smollm2_135m.npz", stacked | full)


def _save(name: str, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(HERE / name, allow_pickle=False, **arrays)


def _greedy(model: Any, prompt_ids: list[int]) -> tuple[list[int], np.ndarray]:
    """(NUM_STEPS ids by plain argmax, whatever they are; the logits each was chosen from, float32 [steps, V])."""
    ids, cache = torch.tensor([prompt_ids]), None
    output: list[int] = []
    steps: list[np.ndarray] = []
    with torch.no_grad():
        for _ in range(NUM_STEPS):
            result = model(ids, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits[0, -1].numpy())
            output.append(int(steps[-1].argmax()))
            ids = torch.tensor([output[-1:]])
    return output, np.stack(steps)


def _check_weights(model: Any, path: Path) -> None:
    """The model's weights are those that the gguf package dequantises, bit for bit (q and k up to their row order)."""
    state = model.state_dict()
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
    }
    different: list[str] = []
    for tensor in gguf.GGUFReader(path).tensors:
        parts = tensor.name.split(".")
        name = names[parts[-2]]
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{name}"
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if parts[-2] in ("attn_q", "attn_k"):  # rows of each head are stored as interleaved halves
            heads = expected.shape[0] // model.config.head_dim
            pairs = expected.reshape(heads, model.config.head_dim // 2, 2, -1)
            expected = pairs.swapaxes(1, 2).reshape(expected.shape)
        actual = state[f"{name}.weight"]
        if actual.dtype != torch.float32 or not np.array_equal(actual.numpy(), expected.reshape(actual.shape)):
            different.append(name)
    print(f"{len(different)} tensors differ from the gguf package's: {different[:4]}")
    if different:
        raise SystemExit("transformers dequantised otherwise than the gguf package: the golden file would be of no use")


def main() -> None:
    """Command line: which files to write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="write tiny_logits.npz")
    parser.add_argument("--smollm2", type=Path, metavar="GGUF", help="write smollm2_135m.json and .npz from this file")
    parser.add_argument("--evals", type=Path, metavar="GGUF", help="write smollm2-135m.json of nitsum-bench evals")
    args = parser.parse_args()
    if not args.tiny and args.smollm2 is None and args.evals is None:
        parser.error("nothing to do: give --tiny, --smollm2 GGUF or --evals GGUF")
    if args.tiny:
        make_tiny()
    if args.smollm2 is not None:
        make_smollm2(args.smollm2)
    if args.evals is not None:
        make_evals(args.evals)


if __name__ == "__main__":
    main()
