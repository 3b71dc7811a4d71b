"""Reading compiled programs: what is counted, on programs short enough to count by hand.

tests/accelerator compiles real ones, where the compilers of accelerators are installed.
"""

import dataclasses
import textwrap

import pytest

from nitsum_jax.bench.compile import main as compile_steps
from nitsum_jax.bench.compile.explain import costs, costs_table
from nitsum_jax.bench.compile.hlo import Buffer, parse
from nitsum_jax.bench.compile.report import table
from nitsum_jax.bench.compile.rows import StepEstimate, exchanged_bytes, reading
from nitsum_jax.bench.compile.steps import CompiledStep, StepCase
from nitsum_jax.bench.compile.targets import CHIPS, Chip, Target
from nitsum_jax.bench.compile.work import Reading, Work, Written
from nitsum_jax.bench.gpu_check import shapes
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.errors import InvalidInputError

TPU = CHIPS["v5e"]
GPU = CHIPS["h100"]


def read(text: str, *, chip: Chip = TPU, trips: float = 1, **kernel: int) -> Reading:
    return Reading(parse(textwrap.dedent(text)), chip, trips, **kernel)


def test_instructions_are_read() -> None:
    module = parse(
        textwrap.dedent(
            """\
            HloModule jit_step, entry_computation_layout={(bf16[8,16])->bf16[8,16]}

            %fused (p.0: bf16[8,16]) -> bf16[8,16] {
              %p.0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
              ROOT %neg = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} negate(%p.0)
            }

            ENTRY %main (x.1: bf16[8,16]) -> (bf16[8,16], s32[]) {
              %x.1 = bf16[8,16]{1,0} parameter(0), metadata={op_name="x"}
              %f.2 = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[3]{0}) fusion(%x.1), calls=%fused, {CYCLES}
              ROOT %c = s32[] constant(7)
            }
            """
        ).replace("{CYCLES}", 'backend_config={"estimated_cycles":"123"}')
    )
    assert module.entry == "main"
    x, fusion, constant = module.computations["main"].instructions
    assert (x.opcode, x.parameter, x.operands) == ("parameter", 0, ())
    assert fusion.buffers == (Buffer("bf16", (8, 16), 1), Buffer("pred", (3,), 0))
    assert [b.bytes for b in fusion.buffers] == [256, 3]
    assert (fusion.operands, fusion.called("calls"), fusion.cycles) == (("x.1",), ("fused",), 123)
    assert (constant.opcode, constant.operands, constant.root) == ("constant", (), True)


GATHER = """\
    %rows (table: f32[1000,4], at: s32[2,1]) -> f32[2,4] {
      %table = f32[1000,4]{1,0} parameter(0)
      %view = f32[1000,4]{1,0} bitcast(%table)
      %at = s32[2,1]{1,0} parameter(1)
      ROOT %g = f32[2,4]{1,0} gather(%view, %at), offset_dims={1}
    }

    %put (pool: f32[1000,4], row: f32[1,4], i: s32[]) -> f32[1000,4] {
      %pool = f32[1000,4]{1,0} parameter(0)
      %row = f32[1,4]{1,0} parameter(1)
      %i = s32[] parameter(2)
      ROOT %d = f32[1000,4]{1,0} dynamic-update-slice(%pool, %row, %i, %i)
    }

    ENTRY %main (a: f32[1000,4], b: s32[2,1], c: f32[1,4], d: s32[]) -> f32[1000,4] {
      %a = f32[1000,4]{1,0} parameter(0)
      %b = s32[2,1]{1,0} parameter(1)
      %c = f32[1,4]{1,0} parameter(2)
      %d = s32[] parameter(3)
      %g = f32[2,4]{1,0} fusion(%a, %b), kind=kLoop, calls=%rows
      ROOT %p = f32[1000,4]{1,0} fusion(%a, %c, %d), kind=kLoop, calls=%put
    }
"""


def test_a_gather_reads_what_it_takes_and_an_update_writes_what_is_new() -> None:
    work = read(GATHER).work()
    assert work.read == (2 * 4 * 4 + 2 * 4) + (4 * 4 + 4)
    assert work.written == 2 * 4 * 4 + 4 * 4
    assert list(read(GATHER).large_writes(1000)) == []


def test_a_relayout_of_a_weight_is_found_and_its_prefetch_is_none() -> None:
    text = """\
        ENTRY %main (w: bf16[64,32], v: bf16[64,32]) -> bf16[32,64] {
          %w = bf16[64,32]{1,0} parameter(0)
          %v = bf16[64,32]{1,0} parameter(1)
          %s = (bf16[64,32]{1,0:S(1)}, bf16[64,32]{1,0}, u32[]{:S(2)}) copy-start(%w)
          %e = bf16[64,32]{1,0:S(1)} copy-done(%s)
          %small = bf16[2,32]{1,0} slice(%e), slice={[0:2], [0:32]}
          %both = bf16[128,32]{1,0} concatenate(%w, %v), dimensions={0}
          ROOT %t = bf16[32,64]{1,0} transpose(%e), dimensions={1,0}
        }
        """
    found = list(read(text).copies_of((0, 1)))
    assert found == [
        Written("both", "concatenate", (128, 32), 2 * 4096),
        Written("t", "transpose", (32, 64), 4096),
    ]
    assert [one.name for one in read(text).copies_of((1,))] == ["both"]


LOOP = """\
    %body (s: (s32[], f32[1024])) -> (s32[], f32[1024]) {
      %s = (s32[], f32[1024]{0}) parameter(0)
      %x = f32[1024]{0} get-tuple-element(%s), index=1
      %y = f32[1024]{0} negate(%x), backend_config={"estimated_cycles":"3000000"}
      ROOT %r = (s32[], f32[1024]{0}) tuple(%x, %y)
    }

    %none (n: f32[1024]) -> f32[1024] {
      ROOT %n = f32[1024]{0} parameter(0)
    }

    %much (m: f32[1024]) -> f32[1024] {
      %m = f32[1024]{0} parameter(0)
      ROOT %k = f32[1024]{0} copy(%m)
    }

    ENTRY %main (a: (s32[], f32[1024]), p: pred[], f: f32[1024]) -> f32[1024] {
      %a = (s32[], f32[1024]{0}) parameter(0)
      %p = pred[] parameter(1)
      %f = f32[1024]{0} parameter(2)
      %w = (s32[], f32[1024]{0}) while(%a), condition=%cond, body=%body{TRIPS}
      ROOT %c = f32[1024]{0} conditional(%p, %f, %f), branch_computations={%much, %none}
    }
"""


def test_a_loop_counts_as_often_as_it_runs_and_of_branches_the_cheapest() -> None:
    work = read(LOOP.replace("{TRIPS}", ""), trips=5).work()
    assert (work.read, work.written, work.cycles) == (5 * 4096, 5 * 4096, 15_000_000)
    assert work.seconds(TPU) == pytest.approx(0.01)  # by cycles, at 1.5 GHz
    known = LOOP.replace("{TRIPS}", ', backend_config={"known_trip_count":{"n":"3"}}')
    assert read(known, trips=5).work().read == 3 * 4096
    # A GPU has no cycles, but launches.
    work = read(LOOP.replace("{TRIPS}", ""), chip=GPU, trips=5).work()
    assert work.launches == 5
    assert work.seconds(GPU) == pytest.approx(5 * 8192 / GPU.bytes_per_s)


def test_what_runs_is_listed_one_by_one() -> None:
    found = [(one.name, work.bytes, times) for one, work, times in read(LOOP.replace("{TRIPS}", "")).instructions()]
    assert sum(work * times for _, work, times in found) == read(LOOP.replace("{TRIPS}", "")).work().bytes
    assert found == [("y", 8192, 1)]  # nothing of the branch that copies
    assert [times for *_, times in read(LOOP.replace("{TRIPS}", ""), trips=5).instructions()] == [5]


LAYER = """\
    %y{N} = f32[1024]{0} negate(%x), metadata={op_name="jit(step)/shard_map/mlp/neg"}, {"estimated_cycles":"1500000"}
"""


def test_costs_are_those_of_all_layers_and_the_costliest_come_first() -> None:
    case = StepCase(Target.parse("v5e:2x4"), shapes.LLAMA_8B, 8, StepShape(32, 1), 1024, 1 << 15)

    def step(layers: int) -> CompiledStep:
        body = "".join(LAYER.replace("{N}", str(layer)) for layer in range(layers))
        text = f"""\
ENTRY %main (x: f32[1024]) -> f32[2048] {{
    %x = f32[1024]{{0}} parameter(0)
{body}
    ROOT %h = f32[2048]{{0}} custom-call(%y0), custom_call_target="head"
}}
"""
        config = dataclasses.replace(case.config, num_layers=layers)
        return CompiledStep(dataclasses.replace(case, config=config), text, 0, 0, 0, 1.0)

    first, second = found = costs(case, (step(1), step(2)), 512)
    assert (first.place, first.opcode, first.gives, first.times) == ("mlp/neg", "negate", "f32[1024]", 32)
    assert first.ms == pytest.approx(32)  # 1.5 million cycles each, at 1.5 GHz
    assert (second.place, second.times, second.bytes) == ("", 1, 4096 + 8192)
    text = costs_table("TP 8", found, 1)
    assert "| 32.000 | 48000 | 0.3 | 32 | negate | f32[1024] | mlp/neg |" in text
    assert text.endswith("| 0.000 | 0 | 0.0 | 1 |  |  | 1 other kinds |")


def test_the_cycles_of_a_tpus_kernel_are_those_of_its_chip() -> None:
    for name, bundles in (("v5e:2x4", 144), ("v6e:2x4", 117)):
        case = StepCase(Target.parse(name), shapes.LLAMA_8B, 4, StepShape(32, 1), 2048, 1 << 16)
        step = CompiledStep(case, "ENTRY %main () -> f32[] {\n}\n", 0, 0, 0, 1.0)
        # 32 sequences of 2 virtual shards, in tiles of 256 tokens.
        assert reading(step, 2048).kernel_cycles == 32 * 2 * (120 + 8 * bundles)


def test_time_is_linear_in_the_layers_where_bytes_and_cycles_change_places() -> None:
    head, layer = Work(straight_bytes=8.19e9, straight_cycles=1e6), Work(straight_bytes=819, straight_cycles=3e6)
    whole = head.plus(layer, 32)
    assert whole.seconds(TPU) == pytest.approx(0.0647, rel=0.001)  # 97 million cycles
    assert head.plus(layer).seconds(TPU) == pytest.approx(0.01)  # few layers: bytes


def test_large_writes_are_found_in_loops_and_rare_branches() -> None:
    names = {one.name for one in read(LOOP.replace("{TRIPS}", "")).large_writes(4096)}
    assert names == {"y", "k"}


def test_a_kernel_reads_of_the_pool_what_it_is_said_to() -> None:
    text = """\
        ENTRY %main (q: f32[256], pool: bf16[4096]) -> f32[256] {
          %q = f32[256]{0} parameter(0)
          %pool = bf16[4096]{0} parameter(1)
          ROOT %k = f32[256]{0} custom-call(%q, %pool), custom_call_target="tpu_custom_call"
        }
        """
    reading = read(text, pool_bytes=8192, kernel_bytes=2048)
    assert [one.name for one in reading.kernels()] == ["k"]
    assert (reading.work().read, reading.work().written) == (1024 + 2048, 1024)


@pytest.mark.parametrize(
    ("line", "kind", "received"),
    [
        ("all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}", "all-gather", 3 * 400),
        ("all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add", "all-reduce", 2 * 400 * 3 / 4),
        ("all-to-all(%x), replica_groups={{0,1}}, dimensions={0}", "all-to-all", 200),
    ],
)
def test_bytes_from_other_devices(line: str, kind: str, received: float) -> None:
    text = f"""\
        ENTRY %main (x: f32[100]) -> f32[100] {{
          %x = f32[100]{{0}} parameter(0)
          ROOT %r = f32[100]{{0}} {line}
        }}
        """
    assert read(text).work().collectives == ((kind, 1, received),)


def test_expected_exchange_follows_the_limit_of_the_step() -> None:
    # Above 128 KiB parts are added up, where the rows can be shared.
    case = StepCase(Target.parse("h100x8"), shapes.LLAMA_8B, 8, StepShape(32, 1), 1024, 1 << 15)
    sums = 2 * 32 + 1
    assert exchanged_bytes(case, fast=False) == sums * 2 * 32 * 4096 * 4 * 7 / 8
    assert exchanged_bytes(dataclasses.replace(case, shape=StepShape(1, 1)), fast=False) == sums * 4096 * 4 * 7
    assert exchanged_bytes(case, fast=True) == sums * 2 * 32 * 4096 * 2 * 7 / 8
    large = dataclasses.replace(case, shape=StepShape(1, 512))
    assert exchanged_bytes(large, fast=False) == sums * 2 * 512 * 4096 * 4 * 7 / 8
    assert exchanged_bytes(dataclasses.replace(case, tp=1), fast=False) == 0


def test_targets_are_read_and_others_refused() -> None:
    assert (Target.parse("v6e:2x4").count, Target.parse("h100x8").count) == (8, 8)
    for name in ("v5e", "v5e:8", "a100x8", "h100"):
        with pytest.raises(InvalidInputError, match="give one such as v5e:2x4"):
            Target.parse(name)
    with pytest.raises(InvalidInputError, match="TP 8 is more than the 4 devices of h100x4"):
        StepCase(Target.parse("h100x4"), shapes.LLAMA_8B, 8, StepShape(1, 1), 16, 16)
    for wrong in ({"tp": 3}, {"vshards": 6}, {"page_size": 24}):
        case = StepCase(Target.parse("h100x4"), shapes.LLAMA_8B, 4, StepShape(1, 1), 16, 16)
        with pytest.raises(InvalidInputError, match="must be a power of two"):
            dataclasses.replace(case, **wrong)  # type: ignore[arg-type]


def test_flags_are_read() -> None:
    options = compile_steps.read_options(["c", "--target=h100x8", "--tps=1,8", "--batch=1", "--prefill=512"])
    assert options.explain == 0
    assert (options.tps, options.batches, options.contexts, options.prefill) == ((1, 8), (1,), (1024, 2048), 512)
    with pytest.raises(InvalidInputError, match="--tps=two must be whole numbers"):
        compile_steps.read_options(["c", "--tps=two"])


def test_the_table_has_a_line_per_step() -> None:
    row = StepEstimate(
        *("v5e:2x4", "m", "decode", 2, 32, 1, 0, 2048, "fixed", "mosaic"),
        *(1e9, 2e6, 0, 65, 3e6, 3e6, 1e6, 5_000_000, 1e9),
        fits=False,
        link_ms=0.5,
        roofline_ms=4.0,
        estimate_ms=5.0,
        compile_s=1.0,
    )
    prefill = dataclasses.replace(row, what="prefill", batch=1, tokens=512, estimate_ms=9.0)
    mixed = dataclasses.replace(prefill, what="mixed", beside=32, estimate_ms=10.0)
    head, _, _, _, line, _, both = table([row, prefill, mixed], TPU).splitlines()
    assert "m on v5e:2x4, attention mosaic, reduction fixed: estimates of the compiler" in head
    assert line == (
        "| decode | 2 | 32 x 1 | 2048 | 1.00 | 2.00 | - | 65 | 3.0 | 3.0 / 1.0 | 0.50 | 5 | NO | 4.00 | 5.00 | - "
        "| 1.25 |"
    )
    assert both.startswith("| mixed | 2 | 1 x 512 + 32 x 1 | 2048 |")
    assert both.endswith("| 10.00 | 14.00 | 2.50 |")  # what decode and prefill take apart
