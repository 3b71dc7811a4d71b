"""`python -m nitsum_jax.sim.study.ladder.main`: runs the ladder and writes its page; `make ladder` calls it."""

import json
import logging
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.study.config_file import chosen_names
from nitsum_jax.sim.study.ladder.config import LadderConfig, read_ladder
from nitsum_jax.sim.study.ladder.runner import Runs, run_ladder
from nitsum_jax.sim.study.sources import open_traces

_CONFIG = flags.DEFINE_string("config", "ladder", "A TOML file, or `ladder` for the one that comes with the package.")
_TRACES = flags.DEFINE_string("traces", None, "Folder with the traces; seeded stand-ins if left out.")
_OUT = flags.DEFINE_string("out", "docs/results", "Folder of ladder.md and its plots.")
_CACHE = flags.DEFINE_string("cache", ".cache/ladder", "Folder of results; runs that are there are not run again.")
_ONLY = flags.DEFINE_string("only", "", "Run cells whose name contains this; the page is made of all that are there.")
_PAGE = flags.DEFINE_bool("page_only", False, "Run nothing; make the page of the results that are there.")


def _main(argv: Sequence[str]) -> None:
    from nitsum_jax.sim.study.ladder.page import write_page  # matplotlib is only needed here

    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    folder = pathlib.Path(_CACHE.value)
    try:
        config = read_ladder(_CONFIG.value)
        if not _PAGE.value:
            _run(config, folder)
    except InvalidInputError as e:
        sys.stderr.write(f"{e}\n")
        sys.exit(2)
    paths = [folder / f"ladder_{cell.name}.json" for cell in config.cells]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    if not results:
        sys.stderr.write("no results yet: run without --page_only\n")
        sys.exit(1)
    write_page(
        results,
        pathlib.Path(_OUT.value),
        missing=[c.name for c, p in zip(config.cells, paths, strict=True) if not p.exists()],
    )


def _run(config: LadderConfig, folder: pathlib.Path) -> None:
    traces, source = open_traces(_TRACES.value, 0)
    chosen = chosen_names([cell.name for cell in config.cells], _ONLY.value)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    todo = [Runs(config, cell, traces, source, folder) for cell in config.cells if cell.name in chosen]
    for runs in todo:
        runs.check()
    for runs in todo:
        values = run_ladder(runs)
        (folder / f"ladder_{runs.cell.name}.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def run() -> None:
    """Entry point."""
    app.run(_main)


if __name__ == "__main__":
    run()
