"""The metrics under the names that vLLM gives them, for dashboards and gateways that know those.

vLLM has no tiers, so its series are the sums over ours.  What it has no name for keeps its own.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

OURS, VLLM, BOTH = "nitsum", "vllm", "both"
NAMES: Final = (OURS, VLLM, BOTH)
_VLLM: Final = {
    "nitsum_total_queued_requests": "num_requests_waiting",
    "nitsum_total_running_requests": "num_requests_running",
    "nitsum_kv_cache_usage_perc": "kv_cache_usage_perc",
    "nitsum_cache_config_info": "cache_config_info",
    "nitsum_prefix_cache_queries": "prefix_cache_queries",
    "nitsum_prefix_cache_hits": "prefix_cache_hits",
    "nitsum_num_preemptions": "num_preemptions",
    "nitsum_prompt_tokens": "prompt_tokens",
    "nitsum_generation_tokens": "generation_tokens",
    "nitsum_request_success": "request_success",
    "nitsum_time_to_first_token_seconds": "time_to_first_token_seconds",
    "nitsum_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "nitsum_request_queue_time_seconds": "request_queue_time_seconds",
    "nitsum_request_prefill_time_seconds": "request_prefill_time_seconds",
    "nitsum_request_decode_time_seconds": "request_decode_time_seconds",
    "nitsum_e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "nitsum_request_prompt_tokens": "request_prompt_tokens",
    "nitsum_request_generation_tokens": "request_generation_tokens",
}
"""Families by the names of ours.  Ours per tier of what waits and runs have no twin: their sums above have."""


class Collects(Protocol):
    """The part of a registry that its encoders use."""

    def collect(self) -> Iterable[Metric]:
        """All families."""


@dataclasses.dataclass(frozen=True)
class _Renamed:
    """A registry under other names."""

    registry: Collects
    ours_too: bool

    def collect(self) -> Iterator[Metric]:
        """All families: those that vLLM knows by its names, too or instead."""
        for family in self.registry.collect():
            twin = _VLLM.get(family.name)
            if twin is None or self.ours_too:
                yield family
            if twin is not None:
                yield _twin(family, f"vllm:{twin}")


def named(registry: Collects, names: str) -> Collects:
    """The registry for an encoder.

    Args:
      registry: of our names.
      names: one of NAMES.
    """
    return registry if names == OURS else _Renamed(registry, names == BOTH)


def _twin(family: Metric, name: str) -> Metric:
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for sample in family.samples:
        if sample.name.endswith("_created"):
            continue
        labels = {key: value for key, value in sample.labels.items() if key != "tier"} | {"engine": "0"}
        sums[name + sample.name.removeprefix(family.name), tuple(labels.items())] += sample.value
    twin = Metric(name, family.documentation, family.type)
    twin.samples = [Sample(full, dict(labels), value) for (full, labels), value in sums.items()]
    return twin
