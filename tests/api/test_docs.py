"""The reference of the Python API says what the docstrings say, and leaves nothing public out."""

import re

from nitsum_jax.llm import LLM
from tools import make_api_docs


def test_the_page_is_what_the_docstrings_say() -> None:
    page = make_api_docs.PATH.read_text(encoding="utf-8")
    assert page == make_api_docs.text(), "run python -m tools.make_api_docs"


def test_every_public_name_of_the_model_is_there() -> None:
    page = make_api_docs.PATH.read_text(encoding="utf-8")
    assert set(re.findall(r"^### (?:await )?\.(\w+)", page, re.MULTILINE)) == {
        name for name in vars(LLM) if not name.startswith("_")
    }
    for name in ("temperature", "min_tokens", "cached_tokens", "prefill_chunk", "kv_bytes_ahead"):
        assert f"- `{name}`: " in page
