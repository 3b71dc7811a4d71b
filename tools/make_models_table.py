"""Writes the table in docs/models.md from the families and their tests: `python -m tools.make_models_table`."""

import collections
from pathlib import Path

from nitsum_jax.models.families.registry import FAMILIES
from tests.models.golden import tiny_models

PATH = Path(__file__).resolve().parents[1] / "docs" / "models.md"
START = "<!-- Written by tools/make_models_table.py; change nitsum_jax/models/families/ instead. -->\n\n"
END = "\n<!-- End of the table. -->\n"
_REAL = {"llama": "SmolLM2-135M"}


def table() -> str:
    """One row for every family."""
    tiny = collections.Counter(config["model_type"] for config in tiny_models.VARIANTS.values())
    rows = [
        "| models | `model_type` | in GGUF | unlike Llama | tiny random models | real weights |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        form = "no" if family.gguf is None else f"`{family.gguf.architecture}`"
        cells = [family.title, f"`{family.architecture}`", form, family.variants or "nothing"]
        cells += [str(tiny[family.architecture]), _REAL.get(family.architecture, "")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def page(now: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = now.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{table()}{END}{after}"


if __name__ == "__main__":
    PATH.write_text(page(PATH.read_text(encoding="utf-8")), encoding="utf-8")
