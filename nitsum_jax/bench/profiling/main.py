"""nitsum-profile: step-time profiles, measured or derived; docs/simulator/profiles.md describes both."""

import sys
from collections.abc import Sequence

from nitsum_jax.bench.profiling.derive import check_all, derive_all
from nitsum_jax.bench.profiling.options import read_options
from nitsum_jax.errors import NitsumError
from nitsum_jax.profiles.shapes import MODELS, find_device, find_model
from nitsum_jax.server import cli

_NAME = "nitsum-profile"


def main(argv: Sequence[str]) -> int:
    """Runs the tool and returns the exit status."""
    try:
        options = read_options(argv)
        if options.derive is None:
            # Late: JAX takes seconds to load, and deriving does not need it.
            from nitsum_jax.bench.profiling.measure import measure

            measure(options)
            return cli.EXIT_OK
        devices = tuple(map(find_device, options.kinds))
        if options.heldout:
            check_all(options.derive, devices)
            return cli.EXIT_OK
        models = MODELS if options.model is None else tuple(map(find_model, options.model.split(",")))
        assert options.out is not None
        derive_all(options.derive, options.out, models, devices, options.assumptions)
    except (cli.HelpRequested, NitsumError, OSError) as why:
        return cli.ended(_NAME, why)
    except KeyboardInterrupt:
        return cli.EXIT_INTERRUPTED
    return cli.EXIT_OK


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
