"""Kernel tables of an imagined device whose times are formulas, in the files that nitsum-profile --derive reads."""

import itertools
import pathlib

SIZES = (32, 512, 1024, 2048, 4096, 8192, 16384, 51200, 65536)
TOKENS = (1, 16, 17, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CONTEXTS = tuple(2**power for power in range(1, 18))
PROMPTS = (1, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
BYTES = tuple(2**power for power in range(8, 31))
MOST_KV = 2_000_000  # tokens for which decode attention was measured
HEADS = tuple((h // tp, 8 // tp, 128) for h, tp in itertools.product((32, 40, 64), (1, 2, 4, 8)))


def product(m: int, n: int, k: int) -> float:
    return 2e-6 + 2 * m * n * k / 700e12 + 2 * n * k / 3e12


def prefill(batch: int, prompt: int, q_heads: int) -> float:
    return 5e-6 + batch * 2 * prompt**2 * q_heads * 128 / 500e12


def decode(batch: int, context: int, kv_heads: int) -> float:
    return 5e-6 + 4 * batch * context * kv_heads * 128 / 3e12


def collective(size: int, devices: int, *, quick: bool) -> float:
    return (3e-6 if quick else 8e-6) + size * (1 + devices / 8) / (200e9 if quick else 400e9)


def write_tables(folder: pathlib.Path, device: str = "h100_sxm") -> pathlib.Path:
    """Writes the four files of a device."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, header: str, rows: list[str]) -> None:
        (folder / f"{device}_{name}_bf16.csv").write_text("\n".join([header, *rows]) + "\n")

    grid = itertools.product(TOKENS, SIZES, SIZES)
    write("gemm", "m,n,k,ms", [f"{m},{n},{k},{1000 * product(m, n, k)}" for m, n, k in grid if min(n, k) < 65536])
    heads = sorted(set(HEADS))
    write(
        "prefill_attention",
        "batch_size,prompt_tokens,q_heads,kv_heads,head_dim,ms",
        [f"{b},{s},{h},{g},{a},{1000 * prefill(b, s, h)}" for h, g, a in heads for b in (1, 2) for s in PROMPTS],
    )
    write(
        "decode_attention",
        "batch_size,context_tokens,q_heads,kv_heads,head_dim,ms",
        [
            f"{b},{s},{h},{g},{a},{1000 * decode(b, s, g)}"
            for h, g, a in heads
            for b in SEQUENCES
            for s in CONTEXTS
            if b * s <= MOST_KV
        ],
    )
    ways = (("nccl", False), ("one_shot_in_cuda_graph", True))
    rows = [
        f"{op},{source},{devices},{size},{1000 * collective(size, devices, quick=quick)}"
        for op in ("all_reduce", "all_gather", "alltoall")
        for source, quick in ways
        for devices in (2, 4, 8)
        for size in BYTES
    ]
    write("collectives", "op,source,devices,bytes,ms", rows)
    return folder
