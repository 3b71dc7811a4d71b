import time

import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.text import chat_sandbox
from nitsum_jax.models.text.chat import render_chat

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10000000000 }}",
        "{{ 10000000000 * 'x' }}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** 99999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_cannot_fill_the_memory(template: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InvalidInputError, match="makes more than 4000000 characters"):
        render_chat(template, HELLO)
    assert time.monotonic() - begin < 5


def test_a_template_cannot_compute_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_SECONDS", 0.1)
    silent = "{% for a in range(100000) %}{% for b in range(99) %}{% set c = b ** 2 %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidInputError, match=r"takes longer than 0\.1 s"):
        render_chat(silent, HELLO)
    assert render_chat("{{ messages[0].content }}", HELLO) == "hello"  # the next one has a clock of its own


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ '=' * 3 }}{{ 2 * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}", "===610243"),
        ("{{ 'tool %s of %03d' % ('a', 7) }}", "tool a of 007"),
        ("{{ 'ab'.upper() ~ messages | length }}", "AB1"),
        ("{{ 1.5 * 2 }}{{ 2 ** -1 }}{{ 'x' * -1 }}", "3.00.5"),
    ],
)
def test_what_templates_do_in_earnest_still_works(template: str, text: str) -> None:
    assert render_chat(template, HELLO) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ open('pyproject.toml').read() }}",
    ],
)
def test_a_template_reaches_nothing_outside(template: str) -> None:
    with pytest.raises(InvalidInputError, match="chat template"):
        render_chat(template, HELLO)
