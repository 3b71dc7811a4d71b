"""The attention kernels compiled for TPUs and GPUs that are not there: the pool is read where it lies."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nitsum_jax.bench.compile.rows import KERNEL_BUNDLES
from nitsum_jax.bench.compile.targets import Target
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import step_forms
from nitsum_jax.engine.step.paged.choice import fitting
from nitsum_jax.engine.step.paged.kernels import paged_attention
from nitsum_jax.models.config import AttentionVariant
from tests.accelerator.cases import skip_without_compiler

TARGETS = {"v5e:2x4": "tpu", "v6e:2x4": "tpu", "h100x8": "gpu"}
MAX_MODEL_LEN = 2048


@dataclasses.dataclass(frozen=True)
class Asked:
    """A kernel to compile."""

    batch: int = 32
    length: int = 1
    slots: int = 8
    per_group: int = 4
    groups: int = 1
    width: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None


CASES = {
    "decode": Asked(),
    "decode-pages-of-64": Asked(page_size=64),
    "decode-2-heads": Asked(groups=2, slots=4),
    "decode-3-heads": Asked(groups=3, slots=1, per_group=3),
    "decode-8-heads": Asked(groups=8, slots=1),
    "decode-width-256": Asked(width=256, slots=4),
    "decode-7-queries": Asked(per_group=7, slots=4),
    "decode-float32": Asked(dtype="float32", groups=2, slots=2),
    "decode-window-and-cap": Asked(window=300, soft_cap=30.0, slots=1),
    "prefill": Asked(batch=1, length=128),
    "prefill-8-heads": Asked(batch=1, length=128, groups=8, slots=1),
    "prefill-long": Asked(batch=1, length=2048, slots=2),
    "prefill-7-queries": Asked(batch=1, length=33, per_group=7, slots=2),
}
# Narrow heads have a kernel on GPUs only.
NARROW = {
    "decode-width-64": Asked(width=64),
    "decode-width-80": Asked(width=80),
    "prefill-width-64": Asked(1, 128, width=64),
}


@pytest.mark.parametrize("name", CASES | NARROW)
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_compiles_and_copies_no_pool(target: str, name: str) -> None:
    asked = (CASES | NARROW)[name]
    platform = TARGETS[target]
    forms = step_forms(platform, asked.dtype)
    layers, blocks = 4, 4096
    shape = PoolShape(blocks, layers, asked.page_size, asked.groups, asked.width, asked.dtype, forms.pool)
    heads = asked.per_group * asked.groups
    fitted = fitting(forms, "auto", shape, q_heads=heads, most_new_tokens=asked.length)
    if platform == "tpu" and name in NARROW:
        assert fitted.attention is not forms.attention
        return
    assert fitted == forms
    skip_without_compiler(target)

    mesh = Mesh(np.array(Target.parse(target).devices()[:1]), ("x",))
    everywhere = PartitionSpec()

    def argument(size: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, everywhere))

    rows = (asked.batch, asked.length, asked.slots)
    number, whole = jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)
    arguments = (
        argument((*rows, heads, asked.width), number),
        argument((*rows, asked.groups, asked.width), number),
        argument((*rows, asked.groups, asked.width), number),
        argument((blocks, *shape.block_shape), shape.storage_dtype),
        argument((asked.batch, asked.slots, shape.pages(MAX_MODEL_LEN)), whole),
        argument((asked.batch,), whole),
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array, *rest: jax.Array) -> jax.Array:
        variant = AttentionVariant(asked.window, asked.soft_cap)
        return paged_attention(q, k, v, pool, 1, *rest, shape, variant, kernel=str(forms.attention))

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(everywhere,) * 6, out_specs=everywhere, check_vma=False)
    compiled = jax.jit(mapped).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # What is arranged for the kernel: queries with their padding and the result.
    queries = 4 * asked.batch * -(-asked.length // 16) * 16 * asked.slots * asked.groups * 16 * 256
    assert memory.temp_size_in_bytes < min(4 * queries, blocks * shape.block_bytes // 4)
    text = compiled.as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') + text.count("__gpu$xla.gpu.triton") >= 1
    sizes = {blocks * shape.block_bytes // shape.storage_dtype.itemsize}
    for line in text.splitlines():
        found = re.search(r"= \w+\[([\d,]+)\]\S* (\S+?)\(", line)
        if found and int(np.prod([int(n) for n in found[1].split(",")], dtype=np.int64)) in sizes:
            assert found[2] in ("parameter", "bitcast"), line[:200]


@pytest.mark.parametrize(("name", "page_size"), [("decode", 16), ("decode-pages-of-64", 64)])
@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:2x4"])
def test_estimates_count_the_cycles_of_the_compilers_schedule(
    target: str, name: str, page_size: int, tmp_path: pathlib.Path
) -> None:
    skip_without_compiler(target)
    # libtpu writes what it makes of a kernel down if it is told so before it is loaded.
    env = dict(os.environ) | {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true"}
    compiling = f"{__file__}::{test_the_kernel_compiles_and_copies_no_pool.__name__}[{target}-{name}]"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", compiling], env=env, check=True)
    (schedule,) = (path for path in tmp_path.glob("*paged_attention*final_bundles.txt") if "analysis" not in path.name)
    lines = re.findall(r"^ *0x([0-9a-f]+) +(LB|PF): (>+) ", schedule.read_text(), re.MULTILINE)
    # The last loop within that over programs is the one over tiles; what follows it lies in the outer one again.
    start = max(i for i, (_, kind, depth) in enumerate(lines) if (kind, depth) == ("LB", ">>"))
    end = next(int(at, 16) for at, _, depth in lines[start:] if depth == ">")
    counted = KERNEL_BUNDLES[target.split(":")[0]][page_size, 1]
    assert 0.95 * counted <= end - int(lines[start][0], 16) <= 1.05 * counted
