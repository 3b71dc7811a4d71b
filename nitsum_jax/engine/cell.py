"""Building a cell: devices, cut, memory, weights, pool, executables."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import TypedDict

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.config import EngineConfig, prefix_granule, resolve_dtype
from nitsum_jax.engine.executables.compiling import FIRST, Executables, Group
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.kv.history import HistoryMover
from nitsum_jax.engine.kv.kv_pool import KvPool
from nitsum_jax.engine.kv.memory import MemoryPlan, plan_memory, workspace_bytes
from nitsum_jax.engine.kv.prefix_cache import PrefixCache
from nitsum_jax.engine.kv.transfer import BlockMover, HostMover, Mover
from nitsum_jax.engine.step.dispatched import Step
from nitsum_jax.engine.step.forms import check_kv_dtype, step_forms
from nitsum_jax.engine.step.packing import Packer, StepShape
from nitsum_jax.engine.step.paged.check import checked
from nitsum_jax.engine.step.paged.choice import fitting
from nitsum_jax.engine.step.program import Program, StepState
from nitsum_jax.engine.switching.residency import Residency, choose_residency
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.devices import discover, free_bytes
from nitsum_jax.meshes.layout import InstanceSpec, Layout, enumerate_layouts, parse_layout
from nitsum_jax.meshes.memory import keep_freed_memory
from nitsum_jax.meshes.mesh import Geometries, Geometry
from nitsum_jax.meshes.vshards import VshardMap, is_power_of_two
from nitsum_jax.meshes.weight_bank import WeightBank
from nitsum_jax.models.checkpoint.blocks import QuantFormat
from nitsum_jax.models.checkpoint.quantisation import described
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.loading import OpenModel
from nitsum_jax.models.pack import cut_bytes
from nitsum_jax.models.pooling import Pooling, chosen_pooling

_LOG = logging.getLogger(__name__)
# What all vshards of a device may take of its memory before a higher least TP is chosen.
_WEIGHT_SHARE = 0.85


class InstanceParts(TypedDict):
    """Arguments of an instance; see there."""

    spec: InstanceSpec
    geometry: Geometry
    program: Program
    leaves: tuple[jax.Array, ...]
    executables: Callable[[], Mapping[StepShape, jax.stages.Compiled]]
    pool: KvPool
    histories: HistoryMover
    prefixes: PrefixCache | None


@dataclasses.dataclass(frozen=True)
class Cell:
    """The devices that one process drives, with all that lies on them.

    Attributes:
      devices: N devices.
      vmap: which vshards lie where.
      geometries: where each instance lies.
      program: what steps compute.
      memory: the memory plan.
      bank: the weights.
      pool: the KV pool.
      mover: copies KV blocks between devices, behind the steps in flight.
      switch_mover: the one for switches.
      histories: copies token histories between instances.
      executables: compiled steps.
      allowed: the allow-list of layouts, or None for every one that fits.
      first: the layout to start with.
      wide_prefill: least tokens of prompts that are prefilled at the widest TP in between; None: never.
      lean: whether devices keep only the weights of the layout in force.
      precopy: whether KV blocks are copied ahead of a switch.
      tps: degrees of TP that layouts may have; None: all that fit.
      drain: whether a switch begins when the steps in flight are read, not behind them.
      prefixes: shares KV blocks of prompts that begin alike; None: that is off.
      fused: whether prompts and sequences that decode share steps.
      lost: devices that failed for good; the engine's thread adds to it.
    """

    devices: tuple[jax.Device, ...]
    vmap: VshardMap
    geometries: Geometries
    program: Program
    memory: MemoryPlan
    bank: WeightBank
    pool: KvPool
    mover: Mover
    switch_mover: Mover
    histories: HistoryMover
    executables: Executables
    allowed: tuple[Layout, ...] | None
    first: Layout
    wide_prefill: int | None = None
    lean: bool = False
    precopy: bool = False
    drain: bool = False
    tps: tuple[int, ...] | None = None
    prefixes: PrefixCache | None = None
    fused: bool = False
    lost: set[int] = dataclasses.field(default_factory=set)

    def group(self, spec: InstanceSpec) -> Group:
        """An instance's devices in rank order: what its executables are compiled for."""
        return self.geometries.of(spec.devices).order

    def groups(self, layout: Layout) -> list[Group]:
        """The groups of a layout."""
        return [self.group(spec) for spec in layout.instances]

    def known_layouts(self) -> tuple[Layout, ...]:
        """The allow-list, or one placement of every layout of the cell."""
        if self.allowed is not None:
            return self.allowed
        found = enumerate_layouts(len(self.devices), self.vmap.num_vshards, self.vmap.min_tp)
        usable = [layout for layout in found if self.tps is None or all(i.tp in self.tps for i in layout.instances)]
        return tuple(dict.fromkeys((self.first, *usable)))

    def check(self, layout: Layout, *, listed: bool = True) -> None:
        """Raises PreconditionError (or InvalidInputError) if this cell cannot take a layout.

        Args:
          layout: to be judged.
          listed: whether it must be on the allow-list, if there is one.
        """
        _check(layout, len(self.devices), self.vmap, self.allowed if listed else None)
        check_tps(layout, self.tps)
        gone = sorted(self.lost.intersection(d for spec in layout.instances for d in spec.devices))
        if gone:
            raise PreconditionError(f"layout {layout} uses device {gone[0]}, which is lost: choose one without it")

    def leaves(self, spec: InstanceSpec) -> tuple[jax.Array, ...]:
        """The parameters of an instance, wrapped, in the order that its steps take them."""
        wrapped = self.bank.wrap(spec)
        return tuple(wrapped[one.name][one.slot or 0] for one in self.program.parameters(spec.tp))

    def trial_run(self, group: Group, shape: StepShape, compiled: jax.stages.Compiled) -> object:
        """Runs a step in which every row is padding; does not wait for it.

        It takes the pools of its devices, which must not be on loan, and gives them back as they were.
        """
        spec, mesh = InstanceSpec(group), self.geometries.of(group).mesh
        history = jax.device_put(np.zeros(self.program.history_shape, np.int32), NamedSharding(mesh, PartitionSpec()))
        packed = Packer(shape, self.vmap.num_vshards, self.program.pages, self.program.max_batch).done()
        leaves = self.leaves(spec)
        pool = self.pool.lend(mesh, group)
        try:
            state, results = compiled(leaves, StepState(pool, history), packed, self.program.no_masks(shape))
        except Exception:
            self.pool.take_back(pool, group)
            raise
        self.pool.take_back(state.pool, group)
        return state.history, results  # not the pool: the next step takes it

    def instance(self, spec: InstanceSpec, on_step: Callable[[Instance, Step], None]) -> Instance:
        """Starts an instance; its devices' pools must be free and its executables ready."""
        return Instance(**self.parts(spec), on_step=on_step)

    def parts(self, spec: InstanceSpec) -> InstanceParts:
        """What the cell gives to an instance."""
        geometry = self.geometries.of(spec.devices)

        def executables() -> dict[StepShape, jax.stages.Compiled]:
            return self.executables.of(geometry.order)

        leaves = self.leaves(spec)
        return InstanceParts(
            spec=spec,
            geometry=geometry,
            program=self.program,
            leaves=leaves,
            executables=executables,
            pool=self.pool,
            histories=self.histories,
            prefixes=self.prefixes,
        )


def build_cell(model: OpenModel, config: EngineConfig, on_ready: Callable[[], None]) -> Cell:
    """Loads a model onto the devices and begins to compile.

    Args:
      model: what to serve.
      config: settings.
      on_ready: called on a compiling thread when a group of devices has its executables.

    Raises:
      NitsumError: devices, layout, lengths or memory do not fit.
    """
    site = _choose_layout(model, config)
    plan = _plan_memory(model.config, config, site, chosen_pooling(config.pooling, model.pooling))
    # Compiling starts before the weights are read: both take seconds, and neither needs the other.
    executables = _compile(config, site, plan, on_ready)
    bank = _load(model, site, plan)
    return _assemble(config, site, plan, executables, bank)


@dataclasses.dataclass(frozen=True)
class _Site:
    """Where a model goes; nothing is allocated yet.

    Attributes:
      devices: N devices.
      free: free bytes of one of them, or None if unknown.
      dtype: of the weights.
      cut: of the model.
      formats: of the parameters that are kept in few bits.
      vmap: which vshards lie where.
      geometries: where each instance lies.
      max_model_len: longest prompt and output together, in tokens.
      first: the layout to start with.
      allowed: the allow-list, if there is one.
    """

    devices: tuple[jax.Device, ...]
    free: int | None
    dtype: str
    cut: ModelCut
    formats: Mapping[str, QuantFormat]
    vmap: VshardMap
    geometries: Geometries
    max_model_len: int
    first: Layout
    allowed: tuple[Layout, ...] | None

    @property
    def platform(self) -> str:
        """The kind of the devices."""
        return self.devices[0].platform


@dataclasses.dataclass(frozen=True)
class _Placement:
    """What lies on the devices, and what runs there."""

    residency: Residency
    memory: MemoryPlan
    program: Program


def _choose_layout(opened: OpenModel, config: EngineConfig) -> _Site:
    """First step: devices, cut, least TP and the layout of the start."""
    model = opened.config
    devices = discover(config.devices)
    platform = devices[0].platform
    if platform == "cpu":
        keep_freed_memory()
    dtype = resolve_dtype(config.dtype, platform)
    vshards = config.num_vshards(len(devices))
    if not is_power_of_two(vshards):
        raise InvalidInputError(f"vshards={vshards} is not a power of two: give 1, 2, 4, 8, ...")
    cut = ModelCut.of(model, vshards)
    max_model_len = _max_model_len(model, config.max_model_len)
    free = free_bytes(devices[0])
    formats = opened.formats(config.quantization, cut)
    shard_bytes, _ = cut_bytes(model, cut, dtype, formats)
    chunk = min(config.prefill_chunk, max_model_len)
    workspace = workspace_bytes(model, cut, config.max_batch, chunk, platform, fused=config.fuses(platform))
    min_tp = 1
    if platform != "cpu" and free is not None:
        while min_tp < vshards and vshards // min_tp * shard_bytes + workspace > _WEIGHT_SHARE * free:
            min_tp *= 2
    vmap = VshardMap(vshards, min_tp)
    first, allowed = _layouts(config, len(devices), vmap)
    return _Site(
        devices=devices,
        free=free,
        dtype=dtype,
        cut=cut,
        formats=formats,
        vmap=vmap,
        geometries=Geometries(devices, vmap),
        max_model_len=max_model_len,
        first=first,
        allowed=allowed,
    )


def _plan_memory(model: ModelConfig, config: EngineConfig, site: _Site, pooling: Pooling | None) -> _Placement:
    """Second step: which weights stay, and how large the KV pool is."""
    count, vshards, min_tp = len(site.devices), site.vmap.num_vshards, site.vmap.min_tp
    if site.allowed:
        groups = [spec.devices for layout in site.allowed for spec in layout.instances]
        if config.wide_prefill_tokens is not None:
            groups.append(tuple(range(min(vshards, 1 << (count.bit_length() - 1)))))
    else:  # every run of neighbours; the smallest need as much as all others
        groups = [tuple(range(start, start + min_tp)) for start in range(count - min_tp + 1)]
    shard_bytes, replicated = cut_bytes(model, site.cut, site.dtype, site.formats)
    residency = choose_residency(
        config.residency,
        config.weight_budget_gib,
        vmap=site.vmap,
        devices=count,
        first=site.first,
        groups=groups,
        shard_bytes=shard_bytes,
        replicated_bytes=replicated,
    )
    weights = residency.bytes_per_device
    forms = step_forms(site.platform, site.dtype, config.attention)
    kv_dtype = site.dtype if config.kv_dtype == "auto" else config.kv_dtype
    check_kv_dtype(site.platform, kv_dtype)
    shared = 1 if site.platform == "cpu" else count
    memory = plan_memory(
        model,
        site.cut,
        dtype=kv_dtype,
        platform=site.platform,
        devices=count,
        weights=weights,
        allocated=weights * shared,
        free=site.free,
        max_batch=config.max_batch,
        max_model_len=site.max_model_len,
        page_size=config.page_size,
        chunk=min(config.prefill_chunk, site.max_model_len),
        kv_cache_gib=config.kv_cache_gib,
        form=forms.pool,
        fused=config.fuses(site.platform),
    )
    q_heads = site.cut.q_heads
    most_new = config.prefill_shapes()[-1].tokens
    forms = fitting(forms, config.attention, memory.pool, q_heads=q_heads, most_new_tokens=most_new)
    model = model.served_up_to(site.max_model_len)
    variants = dict.fromkeys(model.attention_of(layer) for layer in range(model.num_layers))
    program = Program(
        config=model,
        cut=site.cut,
        dtype=site.dtype,
        pool=memory.pool,
        max_batch=config.max_batch,
        max_model_len=site.max_model_len,
        forms=checked(forms, config.attention, memory.pool, q_heads=q_heads, device=site.devices[0], variants=variants),
        fast_sums=config.reduction == "fast",
        pooling=pooling,
        quantised=tuple(site.formats.items()),
    )
    kept = f"\nparameters in few bits: {described(site.formats)}" if site.formats else ""
    return _Placement(residency, dataclasses.replace(memory, text=f"{memory.text}\n{residency.why}{kept}"), program)


def _compile(config: EngineConfig, site: _Site, plan: _Placement, on_ready: Callable[[], None]) -> Executables:
    """Begins to compile what the first layout needs."""
    prefill, decode = config.prefill_shapes(), config.decode_shapes()
    mixed = config.mixed_shapes() if config.fuses(site.platform) else ()
    executables = Executables(
        plan.program,
        (*prefill, *decode, *mixed),
        lambda group: site.geometries.of(group).mesh,
        on_ready,
        essential=(prefill[-1], decode[-1]),  # the largest can do the work of all
        trials=site.platform == "cpu" and not plan.residency.lean,  # a trial needs the weights
    )
    executables.want([site.geometries.of(spec.devices).order for spec in site.first.instances], FIRST)
    return executables


def _load(model: OpenModel, site: _Site, plan: _Placement) -> WeightBank:
    """Third step: brings the weights to the devices."""
    bank = WeightBank(site.devices, site.vmap)
    if model.vshards is not None:
        for name, vshard, device, array in model.place(
            site.cut, site.dtype, site.devices, plan.residency.first, site.formats
        ):
            if vshard is None:
                bank.add_replicated(name, device, array)
            else:
                bank.add_cut(name, vshard, device, array)
    else:
        bank.load(model.weights(site.cut, site.dtype, site.formats), plan.residency.first)
    return bank


def _assemble(config: EngineConfig, site: _Site, plan: _Placement, executables: Executables, bank: WeightBank) -> Cell:
    """Fourth step: the KV pool, with all that moves and shares its blocks, and the whole."""
    cpu, granule = site.platform == "cpu", prefix_granule(config)
    pool = KvPool(site.devices, plan.memory.pool, prefix_vshards=None if granule is None else site.vmap.num_vshards)
    histories = HistoryMover(site.devices, plan.program.history_shape)
    mover = BlockMover(pool)
    # XLA:CPU runs copies on the thread that launches them, so waiting for the steps before is all the same, and their
    # tokens would come late.
    drain = cpu if config.drain_before_switch is None else config.drain_before_switch
    prefixes = None
    if granule is not None:
        prefixes = PrefixCache(pool, mover, granule=granule, prompts_only=config.deterministic)
    cell = Cell(
        devices=site.devices,
        vmap=site.vmap,
        geometries=site.geometries,
        program=plan.program,
        memory=plan.memory,
        bank=bank,
        pool=pool,
        mover=mover,
        switch_mover=HostMover(pool) if drain and cpu else mover,
        histories=histories,
        executables=executables,
        allowed=site.allowed,
        first=site.first,
        wide_prefill=config.wide_prefill_tokens,
        lean=plan.residency.lean,
        precopy=config.precopy,
        drain=drain,
        tps=config.tps,
        prefixes=prefixes,
        fused=config.fuses(site.platform),
    )
    executables.provide(cell.trial_run)
    return cell


def _max_model_len(model: ModelConfig, wanted: int | None) -> int:
    if wanted is None:
        return model.max_context
    if wanted > model.max_context:
        raise InvalidInputError(
            f"max_model_len={wanted} is more than the model's context of {model.max_context} tokens: "
            "lower --max_model_len"
        )
    return wanted


def _layouts(config: EngineConfig, devices: int, vmap: VshardMap) -> tuple[Layout, tuple[Layout, ...] | None]:
    allowed = None
    if config.layouts is not None:
        if not config.layouts:
            raise InvalidInputError("the list of layouts is empty: give at least one, or leave --layouts out")
        allowed = tuple(parse_layout(text, devices) for text in config.layouts)
        for layout in allowed:
            _check(layout, devices, vmap, None)
            check_tps(layout, config.tps)
    if config.layout is not None:
        first = parse_layout(config.layout, devices)
    elif allowed:
        first = allowed[0]
    else:
        tp = min((tp for tp in config.tps or () if vmap.min_tp <= tp <= devices), default=vmap.min_tp)
        count = devices // tp
        first = parse_layout(f"tp{tp}x{count}" if count > 1 else f"tp{tp}", devices)
    _check(first, devices, vmap, allowed)
    check_tps(first, config.tps)
    return first, allowed


def check_tps(layout: Layout, tps: tuple[int, ...] | None) -> None:
    """Raises PreconditionError if a layout has a TP that is not among these."""
    wrong = next((i.tp for i in layout.instances if tps is not None and i.tp not in tps), None)
    if wrong is not None:
        known = ", ".join(f"tp{tp}" for tp in tps or ())
        raise PreconditionError(f"layout {layout} has tp{wrong}, and the profile knows {known}: choose among these")


def _check(layout: Layout, devices: int, vmap: VshardMap, allowed: tuple[Layout, ...] | None) -> None:
    layout.validate(devices, max_tp=vmap.num_vshards, min_tp=vmap.min_tp)
    if layout.tiers:
        raise PreconditionError(
            f"layout {layout} keeps instances for tiers, and this engine serves all requests alike: write "
            f"{layout.without_tiers()}"
        )
    if allowed is not None and layout not in allowed:
        names = "; ".join(map(str, allowed))
        raise PreconditionError(f"layout {layout} is not on the server's list: choose one of {names}")
