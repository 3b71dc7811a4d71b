"""Estimates for a whole model from steps of it with few layers."""

import dataclasses

from nitsum_jax.bench.compile.hlo import parse
from nitsum_jax.bench.compile.steps import CompiledStep, StepCase, compile_case
from nitsum_jax.bench.compile.work import Reading, Work
from nitsum_jax.bench.gpu_check.ceilings import Ceilings, roofline_ms
from nitsum_jax.bench.gpu_check.shapes import slice_of, with_layers
from nitsum_jax.engine.step.forms import AttentionForm

DEPTHS = (1, 2)
# Bundles of instructions of the TPU kernel's inner loop for a tile of 256 old tokens, by chip, page size and KV heads
# of a virtual shard, from the compiler's schedule (docs/inside/attention.md); one takes a cycle.
KERNEL_BUNDLES = {
    "v5e": {(16, 1): 144, (64, 1): 90, (128, 1): 86, (16, 2): 305, (16, 4): 488},
    "v6e": {(16, 1): 117, (64, 1): 79, (128, 1): 74, (16, 2): 234, (16, 4): 421},
}
_TILE_TOKENS = 256
_PROGRAM_BUNDLES = 120  # of a sequence and virtual shard, beside its tiles


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """What the compiler says of a step; of one device, all layers of the model.

    Attributes:
      target: text form.
      model: name.
      what: "decode", "prefill" or "mixed".
      tp: devices that run it.
      batch: sequences; of a mixed step without those that decode.
      tokens: new tokens of each.
      beside: sequences that decode in a mixed step.
      context: tokens of each in the KV cache.
      reduction: "fixed" or "fast".
      attention: its form.
      hbm_bytes: read and written in main memory.
      cycles: that XLA:TPU expects; 0 for a GPU.
      launches: kernels; 0 for a TPU.
      exchanges: collectives.
      received_bytes: from other devices.
      received_fixed: likewise of a step with fixed reduction, by arithmetic.
      received_fast: of one with fast reduction.
      temp_bytes: memory beside arguments and results, of the deeper of the steps that were compiled.
      resident_bytes: weights and KV cache of so many sequences of this length.
      fits: whether these fit the device together.
      link_ms: what receiving takes at the rate of the links.
      roofline_ms: that reading weights and KV once and all products need.
      estimate_ms: that memory and, on a TPU, cycles need; see `work`.
      compile_s: for the steps that were compiled.
    """

    target: str
    model: str
    what: str
    tp: int
    batch: int
    tokens: int
    beside: int
    context: int
    reduction: str
    attention: str
    hbm_bytes: float
    cycles: float
    launches: float
    exchanges: float
    received_bytes: float
    received_fixed: float
    received_fast: float
    temp_bytes: int
    resident_bytes: float
    fits: bool
    link_ms: float
    roofline_ms: float
    estimate_ms: float
    compile_s: float

    @property
    def ratio(self) -> float:
        """How often the roofline the estimate is."""
        return self.estimate_ms / self.roofline_ms


def compiled(case: StepCase, depths: tuple[int, int] = DEPTHS) -> tuple[CompiledStep, CompiledStep]:
    """A step of the model with fewer layers, at two depths.

    Raises:
      PreconditionError: there is no compiler for the target.
    """
    shallow, deep = (
        compile_case(dataclasses.replace(case, config=with_layers(case.config, depth))) for depth in sorted(depths)
    )
    return shallow, deep


def work_of(step: CompiledStep, context: int) -> Work:
    """What a compiled step does with `context` tokens of each sequence in the KV cache."""
    return reading(step, context).work()


def reading(step: CompiledStep, context: int) -> Reading:
    """A compiled step, ready to be read."""
    case = step.case
    chunk = case.program.pool.chunk_pages * case.program.pool.page_size
    return Reading(
        parse(step.text),
        case.target.chip,
        trips=-(-context // chunk),
        pool_bytes=case.pool_bytes,
        kernel_bytes=_kernel_bytes(case, context),
        kernel_cycles=_kernel_cycles(case, context),
    )


def _kernel_cycles(case: StepCase, context: int) -> float:
    """Cycles of a TPU's kernel for rows that decode; 0 where they are not known.  A mixed step's are shared by both."""
    if case.target.chip.platform != "tpu" or case.shape.is_prefill:
        return 0.0
    programs = case.shape.parts[-1].batch * case.vshards // case.tp
    bundles = KERNEL_BUNDLES[case.target.name.split(":")[0]].get((case.page_size, case.program.pool.kv_heads))
    if bundles is None:
        return 0.0
    return programs * (_PROGRAM_BUNDLES + -(-context // _TILE_TOKENS) * bundles) / len(case.shape.parts)


def _kernel_bytes(case: StepCase, context: int) -> float:
    """Bytes of old keys and values that a kernel reads.

    A mixed step has two in a layer.  Which is which does not show in a program, so that each counts half of both.
    """
    parts = [dataclasses.replace(case, shape=part) for part in case.shape.parts]
    return sum(layer_kv_bytes(part, context) * _times_read(part) for part in parts) / len(parts)


def layer_kv_bytes(case: StepCase, context: int) -> int:
    """Bytes of old keys and values of one layer that a device has to read."""
    pool = case.program.pool
    slots = case.vshards // case.tp
    return case.shape.rows * context * slots * pool.block_bytes // (pool.layers * pool.page_size)


def _times_read(case: StepCase) -> int:
    """How often a kernel reads old tokens: once per tile of new ones."""
    program = case.program
    if case.shape.is_decode or program.forms.attention is AttentionForm.XLA:
        return 1
    from nitsum_jax.engine.step.paged.kernels import KERNELS
    from nitsum_jax.engine.step.paged.plan import make_plan

    heads = program.cut.q_heads // program.cut.kv_heads
    limits = KERNELS[str(program.forms.attention)].limits(program.pool)
    return make_plan(program.pool, case.shape.tokens, heads, limits).tiles


def exchanged_bytes(case: StepCase, *, fast: bool) -> float:
    """Bytes that a device receives to add up partial results: after the embedding, and twice in a layer."""
    if case.tp == 1:
        return 0.0
    rows, ranks = case.shape.new_tokens, case.tp
    sums = 2 * case.config.num_layers + 1
    values = rows * case.config.d_model
    if fast:
        return sums * 2 * (2 * values) * (ranks - 1) / ranks
    per_sum = 4 * values * (ranks - 1)
    if (
        4 * values > case.program.forms.gather_limit_bytes and rows % ranks == 0
    ):  # each adds up a part, and the parts are exchanged
        per_sum = 2 * per_sum // ranks
    return float(sums * per_sum)


def estimate(case: StepCase, steps: tuple[CompiledStep, CompiledStep], context: int) -> StepEstimate:
    """Extrapolates from a step at two depths to all layers of its model."""
    shallow, deep = (work_of(step, context) for step in steps)
    layers = [step.case.config.num_layers for step in steps]
    layer = deep.plus(shallow, -1)
    work = deep.plus(layer, (case.config.num_layers - layers[1]) / (layers[1] - layers[0]))
    chip = case.target.chip
    limits = Ceilings(chip.bytes_per_s, chip.flops_per_s)
    shape = case.shape
    kv = case.config.num_layers * layer_kv_bytes(case, context + shape.tokens)
    resident = sum(case.weight_sizes) + kv
    return StepEstimate(
        target=case.target.name,
        model=case.config.name,
        what="decode" if shape.is_decode else "mixed" if shape.is_mixed else "prefill",
        tp=case.tp,
        batch=shape.batch,
        tokens=shape.tokens,
        beside=shape.beside,
        context=context,
        reduction="fast" if case.fast_sums else "fixed",
        attention=str(case.program.forms.attention),
        hbm_bytes=work.bytes,
        cycles=work.cycles,
        launches=work.launches,
        exchanges=work.exchanges,
        received_bytes=work.received,
        received_fixed=exchanged_bytes(case, fast=False),
        received_fast=exchanged_bytes(case, fast=True),
        temp_bytes=steps[1].temp_bytes,
        resident_bytes=resident,
        fits=resident + steps[1].temp_bytes <= chip.memory_bytes,
        link_ms=1000 * work.received / chip.link_bytes_per_s,
        roofline_ms=roofline_ms(
            slice_of(case.config, case.tp),
            limits,
            batch=shape.batch,
            tokens=shape.tokens,
            context=context,
            beside=shape.beside,
        ),
        estimate_ms=1000 * work.seconds(chip),
        compile_s=sum(step.seconds for step in steps),
    )
