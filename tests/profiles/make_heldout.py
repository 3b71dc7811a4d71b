"""Writes heldout.json: parts of step times at points of the kernel tables, in two halves.

`kept` is put together from tables without every other point, `left_out` are the sums of what the full tables hold at
points that were left out.  All layers of a model at one TP, seconds.

    python -m tests.profiles.make_heldout --calibration=DIR
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from nitsum_jax.profiles.derive import TOKENS, dense_s, head_s
from nitsum_jax.profiles.heldout import every_other, thinned
from nitsum_jax.profiles.kernels import Kernels
from nitsum_jax.profiles.shapes import find_device, find_model
from nitsum_jax.profiles.tables import read_tables

CASES = (("llama-3.1-8b", "h100", 1), ("qwen2.5-32b", "h200", 4))
SEQUENCES, CONTEXT = (1, 4, 16, 64, 256), (0, 128, 512, 2048, 8192, 32768)
CHUNKS, BEFORE = (1, 32, 128, 512, 1536, 3072, 6144, 10240), (0, 512, 1536, 3072, 6144)
HELD_CHUNKS = ((256, 0), (1024, 0), (2048, 0), (4096, 0), (8192, 0), (1024, 1024), (2048, 2048), (4096, 4096))
SOURCE = "public performance database of NVIDIA AIConfigurator (Apache-2.0; vLLM 0.24 kernels, NCCL 2.29)"


def case(folder: str, model_name: str, device_name: str, tp: int) -> dict[str, Any]:
    model, device = find_model(model_name), find_device(device_name)
    tables = read_tables(folder, device.table)
    full, coarse = Kernels(tables), Kernels(thinned(tables))
    heads = (model.H // tp, model.kv_heads(tp), model.A)
    out = every_other(tables.gemm.axes[0])
    kept = tuple(m for m in TOKENS if m not in out)
    held = tuple(m for m in TOKENS if m in out)
    grid = tables.decode[heads]
    points = [
        (n, c)
        for n in sorted(every_other(grid.axes[0]))
        for c in sorted(every_other(grid.axes[1]))
        if n <= SEQUENCES[-1] and CONTEXT[1] <= c <= CONTEXT[-1]
    ]
    decode = full.decode(grid.axes[0], grid.axes[1], heads)
    at = [decode[grid.axes[0].tolist().index(n), grid.axes[1].tolist().index(c)] for n, c in points]
    chunks = [full.prefill([c + n], heads)[0] - full.prefill([c], heads)[0] for n, c in HELD_CHUNKS]
    return {
        "model": model.title,
        "device": device.title,
        "tp": tp,
        "dense": {
            "kept": {"tokens": kept, "seconds": rounded(dense_s(model, tp, coarse, kept))},
            "left_out": [[m, *rounded(dense_s(model, tp, full, (m,)))] for m in held],
        },
        "head_s": rounded(head_s(model, tp, full, (1,)))[0],
        "decode_attention": {
            "kept": {
                "sequences": SEQUENCES,
                "context": CONTEXT,
                "seconds": [rounded(model.L * row) for row in coarse.decode(SEQUENCES, CONTEXT, heads)],
            },
            "left_out": [[n, c, s] for (n, c), s in zip(points, rounded(model.L * np.array(at)), strict=True)],
        },
        "prefill_attention": {
            "kept": {
                "new_tokens": CHUNKS,
                "context": BEFORE,
                "seconds": [rounded(model.L * row) for row in coarse.prefill_chunk(CHUNKS, BEFORE, heads)],
            },
            "left_out": [[*p, s] for p, s in zip(HELD_CHUNKS, rounded(model.L * np.array(chunks)), strict=True)],
        },
    }


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", required=True, help="folder of kernel tables")
    folder = parser.parse_args().calibration
    document = {"source": f"derived from the {SOURCE}", "cases": [case(folder, *names) for names in CASES]}
    path = pathlib.Path(__file__).with_name("heldout.json")
    path.write_text(json.dumps(document, separators=(",", ":")).replace("],[", "],\n[") + "\n")
