"""The table of models on the page is that of the families, and every family is compared with transformers."""

import pytest

from nitsum_jax.models.families.registry import FAMILIES
from tests.models.golden import tiny_models
from tools import make_models_table


def test_the_page_has_the_table() -> None:
    text = make_models_table.PATH.read_text(encoding="utf-8")
    assert text == make_models_table.page(text), "run python -m tools.make_models_table"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_is_compared_with_transformers(architecture: str) -> None:
    assert any(config["model_type"] == architecture for config in tiny_models.VARIANTS.values())
