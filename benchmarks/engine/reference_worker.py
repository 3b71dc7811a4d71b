"""Runs transformers and llama-cpp-python for decode.py, in whatever interpreter has them.

  python reference_worker.py MODEL

It needs neither JAX nor this package.  One JSON object per line on standard input is one run:
`{"name": "transformers", "prompts": [[ids]], "tokens": 64}`; each is answered by one on standard output.  The first
line it prints says what there is.
"""

import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

Times = dict[str, float]
Runner = Callable[[list[list[int]], int], Times]


def transformers_runner(model: pathlib.Path, report: dict[str, str]) -> Runner:
    """Greedy decoding with a KV cache: the forward pass in a loop, which is faster than `generate`.

    Both ways of attention are tried for each batch in the first run, and the faster one is kept.
    """
    import torch
    import transformers

    torch.set_num_threads(_cores())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where, more = (model.parent, {"gguf_file": model.name}) if model.is_file() else (model, {})
    network = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more).eval()
    report["transformers"] = f"{transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    best: dict[int, str] = {}

    def once(prompts: list[list[int]], tokens: int) -> Times:
        start = time.perf_counter()
        out = network(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        chosen = [out.logits[:, -1].argmax(dim=-1, keepdim=True)]
        first = time.perf_counter()
        for _ in range(tokens):
            out = network(input_ids=chosen[-1], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            chosen.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
        torch.cat(chosen, dim=1).tolist()
        end = time.perf_counter()
        return {"decode_s": end - first, "total_s": end - start}

    def run(prompts: list[list[int]], tokens: int) -> Times:
        with torch.inference_mode():
            if len(prompts) not in best:
                seconds = {}
                for kind in ("eager", "sdpa"):
                    network.set_attn_implementation(kind)
                    once(prompts, 4)
                    seconds[kind] = once(prompts, 16)["decode_s"]
                best[len(prompts)] = min(seconds, key=lambda kind: seconds[kind])
            network.set_attn_implementation(best[len(prompts)])
            return {**once(prompts, tokens), "tokens": len(prompts) * tokens}

    return run


def llama_cpp_runner(model: pathlib.Path, report: dict[str, str]) -> Runner:
    """Greedy decoding of one sequence, with the weights as the file has them."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(model), n_ctx=2048, n_threads=_cores(), n_threads_batch=_cores(), logits_all=False, verbose=False
    )
    report["llama.cpp"] = f"llama-cpp-python {llama_cpp.__version__}, weights as in {model.name}, {_cores()} threads"

    def run(prompts: list[list[int]], tokens: int) -> Times:
        (prompt,) = prompts
        llama.reset()
        start = time.perf_counter()
        stream = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
        next(stream)
        first = time.perf_counter()
        for _ in range(tokens):
            next(stream)
        end = time.perf_counter()
        return {"decode_s": end - first, "total_s": end - start, "tokens": tokens}

    return run


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(model: pathlib.Path, commands: TextIO, answers: TextIO) -> None:
    """Answers runs until there are no more."""
    runners: dict[str, Runner] = {}
    report: dict[str, str] = {}
    missing: dict[str, str] = {}
    makers: dict[str, tuple[tuple[str, ...], Callable[[pathlib.Path, dict[str, str]], Runner]]]
    makers = {"transformers": (("torch", "transformers"), transformers_runner)}
    if model.suffix == ".gguf":
        makers["llama.cpp"] = (("llama_cpp",), llama_cpp_runner)
    for name, (modules, make) in makers.items():
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        if absent:
            missing[name] = f"{', '.join(absent)} not installed"
            continue
        try:
            runners[name] = make(model, report)
        except Exception as error:  # a library that cannot take this model is left out of the comparison
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def say(answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"there": report, "missing": missing})
    for line in commands:
        order = json.loads(line)
        try:
            say(runners[order["name"]](order["prompts"], order["tokens"]))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


if __name__ == "__main__":
    # Libraries print what they like; the answers get the real standard output to themselves.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(pathlib.Path(sys.argv[1]), sys.stdin, channel)
