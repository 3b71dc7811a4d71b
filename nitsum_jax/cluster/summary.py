"""Many cells as one: their layouts side by side, their counters summed."""

import dataclasses
from typing import TYPE_CHECKING

from nitsum_jax.cluster.link import CellLink, LinkState
from nitsum_jax.control.scheduling.forecast import TierForecast
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.engine.engine import EngineStats
from nitsum_jax.engine.executables.progress import CompileProgress
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import Layout, parse_layout
from nitsum_jax.runtime.backend import OneCell
from nitsum_jax.runtime.control.layout_log import LayoutChoice, SwitchNote

if TYPE_CHECKING:
    from nitsum_jax.engine.batching.load import InstanceLoad

_GAUGES = {"waiting", "running", "queue_capacity", "blocks_free", "blocks_total", "blocks_cached", "pages_total"}
_NOT_SUMMED = {"paced", "pace_late_share", "pace_worst_late_ms", "pace_valid", "page_size"}


class ClusterView:
    """The part of the front door's engine that only looks.

    Devices of the cells are numbered one cell after the other, in the order in which the cells joined.
    """

    # ruff: noqa: D102
    def __init__(self, tiers: TierSet) -> None:
        self._tiers = tiers
        self._links: dict[str, CellLink] = {}
        self._past: dict[str, int] = {}  # counters of cells that are gone

    @property
    def tier_names(self) -> tuple[str, ...]:
        return self._tiers.names

    @property
    def device_names(self) -> tuple[str, ...]:
        return tuple(
            f"{link.name}/{name}" for link in self._serving() if link.facts for name in link.facts.device_names
        )

    @property
    def memory_report(self) -> str:
        links = self._serving()
        first = links[0].facts if links else None
        return f"{len(links)} cells" + ("" if first is None else f", each: {first.memory_report}")

    def layout(self) -> Layout:
        instances = []
        offset = 0
        for link in self._serving():
            assert link.status is not None
            assert link.facts is not None
            count = len(link.facts.device_names)
            for one in parse_layout(link.status.layout, count).instances:
                instances.append(dataclasses.replace(one, devices=tuple(offset + device for device in one.devices)))
            offset += count
        return Layout(tuple(instances))

    def allowed_layouts(self) -> tuple[str, ...]:
        """Of each cell."""
        links = self._serving()
        return links[0].facts.allowed_layouts if links and links[0].facts else ()

    def ready_layouts(self) -> tuple[str, ...]:
        """Those that are ready in every cell."""
        found = [link.status.ready_layouts for link in self._serving() if link.status]
        return tuple(text for text in found[0] if all(text in other for other in found)) if found else ()

    def lost_devices(self) -> tuple[int, ...]:
        lost, offset = [], 0
        for link in self._serving():
            lost += [offset + device for device in (link.status.lost_devices if link.status else ())]
            offset += len(link.facts.device_names) if link.facts else 0
        return tuple(lost)

    def context_limit(self) -> int:
        limits = [link.status.limits for link in self._serving() if link.status]
        return min((min(one.max_model_len, one.pool_tokens) for one in limits), default=1)

    def stats(self) -> EngineStats:
        """Sums; counters hold what cells did that are silent or gone by now."""
        found = [link.status.stats for link in self._serving() if link.status]
        known = [link.status.stats for link in list(self._links.values()) if link.status]
        sums = {}
        for field in dataclasses.fields(EngineStats):
            if field.name in _NOT_SUMMED:
                continue
            gauge = field.name in _GAUGES
            past = 0 if gauge else self._past.get(field.name, 0)
            sums[field.name] = past + sum(getattr(one, field.name) for one in (found if gauge else known))
        sums["page_size"] = found[0].page_size if found else 0
        return EngineStats(**sums)

    def loads(self) -> "tuple[InstanceLoad, ...]":
        out, offset = [], 0
        for link in self._serving():
            for load in link.status.loads if link.status else ():
                out.append(dataclasses.replace(load, devices=tuple(offset + device for device in load.devices)))
            offset += len(link.facts.device_names) if link.facts else 0
        return tuple(out)

    def compiling(self) -> CompileProgress:
        found = [link.status.compiling for link in self._serving() if link.status]
        return CompileProgress(
            tuple(making for one in found for making in one.making),
            sum(one.queued for one in found),
            tuple(layout for one in found for layout in one.layouts),
        )

    def forecasts(self) -> list[TierForecast]:
        """Of the cell where a request of the tier would do best."""
        reports = [link.status.report for link in self._serving() if link.status]
        found = ([report.tier(name) for report in reports] for name in self._tiers.names)
        return [min(ones, key=lambda one: (one.ttft_s, one.tpot_s)) for ones in found if ones]

    def cells(self) -> dict[str, str]:
        """State of every cell by its name."""
        return {name: link.state.value for name, link in list(self._links.items())}

    def cell_views(self) -> tuple[OneCell, ...]:
        """Every cell by itself."""
        views, offset = [], 0
        for link in list(self._links.values()):
            status, count = link.status, 0
            if link.state is LinkState.SERVING and link.facts is not None:
                count = len(link.facts.device_names)
            views.append(
                OneCell(
                    link.name,
                    link.state.value,
                    "" if status is None else status.layout,
                    tuple(range(offset, offset + count)),
                    None if status is None else status.stats,
                    {} if status is None else status.lately,
                )
            )
            offset += count
        return tuple(views)

    def cell_notes(self) -> tuple[list[LayoutChoice], list[SwitchNote]]:
        """Decisions and switches of the cells' planners, each with the name of its cell."""
        known = [(link.name, link.status) for link in list(self._links.values()) if link.status]
        return (
            [dataclasses.replace(one, cell=name) for name, status in known for one in status.decisions],
            [dataclasses.replace(one, cell=name) for name, status in known for one in status.switches],
        )

    def _serving(self) -> list[CellLink]:
        return [link for link in list(self._links.values()) if link.state is LinkState.SERVING and link.status]

    def _waiting(self) -> int:
        """Requests that wait, with those that were sent and are in no report yet."""
        return sum(link.status.stats.waiting + link.known.since for link in self._serving() if link.status)

    def _owner(self, device: int) -> tuple[CellLink, int]:
        offset = 0
        for link in self._serving():
            count = len(link.facts.device_names) if link.facts else 0
            if offset <= device < offset + count:
                return link, device - offset
            offset += count
        raise InvalidInputError(f"there is no device {device}: give one from 0 to {offset - 1}")

    def _keep_counters(self, link: CellLink) -> None:
        if link.status is None:
            return
        for field in dataclasses.fields(EngineStats):
            if field.name not in _GAUGES | _NOT_SUMMED:
                self._past[field.name] = self._past.get(field.name, 0) + getattr(link.status.stats, field.name)
