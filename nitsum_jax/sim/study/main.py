"""`python -m nitsum_jax.sim.study.main`: runs the study and writes its page; `make study` calls it."""

import json
import logging
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

from absl import app, flags

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.study.config import StudyConfig, mixes_of, read_study
from nitsum_jax.sim.study.config_file import chosen_names
from nitsum_jax.sim.study.runner import StudyCell, run_cell
from nitsum_jax.sim.study.sources import FILES, open_traces
from nitsum_jax.sim.workloads.workload import Workload

_CONFIG = flags.DEFINE_string(
    "config", "study", "A TOML file, or `study` or `quick` for those that come with the package."
)
_TRACES = flags.DEFINE_string(
    "traces", None, f"Folder with {' and '.join(FILES.values())}; seeded stand-ins with their statistics if left out."
)
_OUT = flags.DEFINE_string("out", "docs/results", "Folder of goodput.md and its plots.")
_CACHE = flags.DEFINE_string("cache", ".cache/study", "Folder of results; runs that are there are not run again.")
_ONLY = flags.DEFINE_string("only", "", "Run cells whose name contains this; the page is made of all that are there.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Processes.", lower_bound=1)
_PAGE = flags.DEFINE_bool("page_only", False, "Run nothing; make the page of the results that are there.")


def cells_of(config: StudyConfig, traces: Mapping[str, Workload], source: str, cache: pathlib.Path) -> list[StudyCell]:
    """All cells, the small ones of every kind first."""
    cells = [
        StudyCell(config, case, profile, mix, traces, source, cache)
        for case in config.cases
        for profile in case.profiles
        for mix in mixes_of(case, config.mixes)
    ]
    return sorted(cells, key=lambda cell: (not cell.mix.shifting, cell.case.profiles.index(cell.profile)))


def _result(cell: StudyCell) -> pathlib.Path:
    return cell.cache / f"{cell.name}.result.json"


def _work(cell: StudyCell) -> str:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    values = run_cell(cell)
    _result(cell).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return cell.name


def _main(argv: Sequence[str]) -> None:
    from nitsum_jax.sim.study.page import write_page  # matplotlib is only needed here

    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        config = read_study(_CONFIG.value)
        traces, source = open_traces(_TRACES.value, config.seed)
        cells = cells_of(config, traces, source, pathlib.Path(_CACHE.value))
        if not _PAGE.value:
            _run(cells)
    except InvalidInputError as e:
        sys.stderr.write(f"{e}\n")
        sys.exit(2)
    results = [json.loads(_result(cell).read_text(encoding="utf-8")) for cell in cells if _result(cell).exists()]
    if not results:
        sys.stderr.write("no results yet: run without --page_only\n")
        sys.exit(1)
    write_page(results, pathlib.Path(_OUT.value), missing=len(cells) - len(results))


def _run(cells: Sequence[StudyCell]) -> None:
    os.nice(10)
    names = chosen_names([cell.name for cell in cells], _ONLY.value)
    chosen = [cell for cell in cells if cell.name in names]
    for cell in chosen:
        cell.check()
    if _JOBS.value == 1:
        for cell in chosen:
            _work(cell)
    else:
        with multiprocessing.get_context("spawn").Pool(_JOBS.value) as pool:
            for name in pool.imap_unordered(_work, chosen, chunksize=1):
                logging.info("%s is done", name)


def run() -> None:
    """Entry point."""
    app.run(_main)


if __name__ == "__main__":
    run()
