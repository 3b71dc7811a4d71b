"""nitsum-profile --derive: profiles from a folder of kernel tables."""

import pathlib

from nitsum_jax.control.model.profile import write_profile
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.profiles import heldout
from nitsum_jax.profiles.derive import Assumptions, derive
from nitsum_jax.profiles.kernels import Kernels
from nitsum_jax.profiles.shapes import Device, ModelShape
from nitsum_jax.profiles.tables import read_tables
from nitsum_jax.server import cli


def derive_all(
    folder: str, out: str, models: tuple[ModelShape, ...], devices: tuple[Device, ...], assumptions: Assumptions
) -> None:
    """Writes a profile for each model on each kind of device, and prints what they are called.

    Raises:
      InvalidInputError: a table is not sound, a model does not fit, or the files cannot be written.
    """
    target = pathlib.Path(out)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InvalidInputError(f"--out={out}: cannot make the folder: {e.strerror or e}") from e
    for device in devices:
        kernels = Kernels(read_tables(folder, device.table))
        for model in models:
            profile = derive(model, device, kernels, assumptions)
            path = target / f"{profile.name}.json"
            write_profile(profile, path)
            cli.out(f"{path}: TP {', '.join(map(str, profile.tps))}")


def check_all(folder: str, devices: tuple[Device, ...]) -> None:
    """Prints how well points of the tables are predicted that were left out, as a Markdown table.

    Raises:
      InvalidInputError: a table is not sound.
    """
    cli.out("| device | predicted | points | median error | 90 % are within | bias |\n|---|---|---|---|---|---|")
    for device in devices:
        tables = read_tables(folder, device.table)
        for row in (*heldout.kernel_errors(tables), *heldout.step_errors(tables, device)):
            errors = f"{row.median:.1%} | {row.p90:.1%} | {row.bias:+.1%}"
            cli.out(f"| {device.name} | {row.kind} | {row.count} | {errors} |")
