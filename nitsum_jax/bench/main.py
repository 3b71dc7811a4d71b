"""nitsum-bench: one command, a subcommand per thing that is measured."""

import sys
from collections.abc import Callable, Mapping, Sequence

from nitsum_jax.bench import switch
from nitsum_jax.bench.compile import main as compile_steps
from nitsum_jax.bench.demo import main as demo
from nitsum_jax.bench.evals import main as evals
from nitsum_jax.bench.gpu_check import main as gpu_check
from nitsum_jax.bench.serve import main as serve
from nitsum_jax.errors import NitsumError
from nitsum_jax.server import cli

_NAME = "nitsum-bench"
COMMANDS: Mapping[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "switch": ("how long streams stand still when the layout changes, and what other ways cost", switch.run),
    "serve": ("TTFT, TPOT and goodput of a server under a trace or a synthetic load", serve.run),
    "demo": ("adaptive control against static layouts, live in a paced cell of 8 devices", demo.run),
    "compile": ("what the compilers of accelerators make of a step, without the accelerators", compile_steps.run),
    "evals": ("whether a served model is the model: likelihoods of texts beside those of transformers", evals.run),
    "gpu-check": ("whether an accelerator computes what it should, and how near the limit", gpu_check.run),
}


def main(argv: Sequence[str]) -> int:
    """Runs a subcommand and returns the exit status."""
    name = argv[1] if len(argv) > 1 else "--help"
    listing = "\n".join(f"  {command:<10} {what}" for command, (what, _) in COMMANDS.items())
    if name in ("--help", "-h", "help"):
        cli.out(f"usage: {_NAME} COMMAND [flags]   ({_NAME} COMMAND --help lists them)\n\n{listing}")
        return cli.EXIT_OK
    if name not in COMMANDS:
        cli.err(f"{_NAME}: unknown command {name!r}: use one of {', '.join(COMMANDS)}")
        return cli.EXIT_USAGE
    try:
        COMMANDS[name][1]([f"{_NAME} {name}", *argv[2:]])
    except (cli.HelpRequested, NitsumError, OSError) as why:
        return cli.ended(f"{_NAME} {name}", why)
    except KeyboardInterrupt:
        return cli.EXIT_INTERRUPTED
    return cli.EXIT_OK


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
