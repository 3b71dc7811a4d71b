"""The comparison of a server with the simulator."""

import pathlib

from benchmarks.server import fidelity
from nitsum_jax.bench.serve.results import Results
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.sim.runs.metrics import Metrics, measure
from nitsum_jax.sim.runs.records import RequestRecord
from nitsum_jax.sim.runs.tables import RequestTable

TIERS = TierSet((Tier("chat", 1000, 200),))


def figures(first_s: float) -> tuple[Metrics, list[RequestRecord]]:
    """Ten chats, one a second: first tokens after so long, then ten more in a second."""
    records = [
        RequestRecord(str(i), "chat", float(i), 100, 11, i + first_s, i + first_s + 1, (), first_s <= 1)
        for i in range(10)
    ]
    return measure(RequestTable.of(records), TIERS, 10.0), records


def test_the_table_says_how_far_the_simulator_is_off() -> None:
    metrics, records = figures(0.5)
    said, _ = figures(2.0)
    results = Results(metrics, records, {}, 0.0, 0.1, ("the client was late",), None)
    lines = fidelity.table(results, said).splitlines()
    assert lines[2] == "| attainment, % | 100.00 | 0.00 | 0.00 |"
    assert lines[4] == "| TTFT p50, ms | 500.00 | 2000.00 | 4.00 |"
    assert lines[6] == "| TPOT p50, ms | 100.00 | 100.00 | 1.00 |"
    assert lines[-1] == "the client was late"


def test_a_profile_that_is_named_is_not_measured(tmp_path: pathlib.Path) -> None:
    args = fidelity.options(["--profile=mine.json"])
    assert str(fidelity.measured(args, tmp_path)) == "mine.json"
