"""Chat templates: the published kinds, and what a hostile or broken one can do."""

import datetime
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.text.chat import render_chat
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.models.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "Hi <there> & 'you'"}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nDefault<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """\
{%- set ns = namespace(last='assistant') %}
{%- for message in messages if message.role != 'system' %}
    {%- if message['role'] == ns.last %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set ns.last = message['role'] %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {% generation %}{{- ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""


def test_chatml() -> None:
    assert render_chat(CHATML, USER) == (
        "<|im_start|>system\nDefault<|im_end|>\n<|im_start|>user\nHi <there> & 'you'<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_chat(CHATML, TALK, ChatOptions(add_generation_prompt=False)) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )


def test_special_tokens_of_the_model() -> None:
    text = render_chat(LLAMA2, TALK, bos_token="<s>", eos_token="</s>")
    assert text.split() == ["<s>[INST]", "Hi", "[/INST]", "Hello", "</s><s>[INST]", "Bye", "[/INST]"]


def test_blocks_leave_no_blank_lines() -> None:
    template = "  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\nend"
    assert render_chat(template, TALK[1:3]) == "Hi\nHello\nend"


def test_loop_controls() -> None:
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }};{% endfor %}"
    assert render_chat(template, TALK) == "Be kind.;Hi;"


def test_tojson_keeps_text_readable() -> None:
    message = [{"role": "user", "content": "<é>", "b": [1], "a": None}]
    assert (
        render_chat("{{ messages | tojson }}", message) == '[{"role": "user", "content": "<é>", "b": [1], "a": null}]'
    )
    assert render_chat("{{ messages[0].b | tojson(indent=2) }}", message) == "[\n  1\n]"
    assert render_chat("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", message) == '{"a": 2, "b": 1}'


def test_strftime_now() -> None:
    before = datetime.date.today()
    text = render_chat("{{ strftime_now('%Y-%m-%d') }}", USER)
    assert before <= datetime.date.fromisoformat(text) <= datetime.date.today()


def test_refusal_of_the_template() -> None:
    with pytest.raises(InvalidInputError, match=r"^the chat template refuses these messages: roles must alternate$"):
        render_chat(LLAMA2, [*USER, *USER])
    with pytest.raises(InvalidInputError, match=r"refuses these messages: two lines$"):
        render_chat("{{ raise_exception('two\nlines') }}", USER)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ a.b.c }}", "fails on these messages: 'a' is undefined"),
        ("{{ 1 / 0 }}", "fails on these messages: division by zero"),
        ("{{ messages + 1 }}", "fails on these messages"),
        ("{% for m in messages %}\n{{ m.content", "broken at line 2"),
        ("{% nosuchtag %}", "broken at line 1"),
        ("{% generation %}open", "broken at line 1"),
        ("{% include 'file' %}", "fails on these messages"),
        # What the sandbox is for.
        ("{{ messages.append(messages[0]) }}", "fails on these messages.*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "fails on these messages.*unsafe"),
        ("{{ raise_exception.__globals__.x }}", "fails on these messages.*unsafe"),
        ("{% for i in range(10000000) %}x{% endfor %}", "fails on these messages.*[Rr]ange"),
    ],
)
def test_templates_that_fail(template: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        render_chat(template, USER)
    assert "\n" not in str(caught.value)


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InvalidInputError):
        render_chat("{% set _ = messages[0].update(content='no') %}", messages)
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([{"content": "x"}], "message 0 has no role"),
        ([*USER, {"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": None}], "message 0 has no content"),
        ([{"role": 1, "content": "x"}], "message 0 has no role"),
        ([{"role": "", "content": "x"}], "message 0 has an empty role"),
    ],
)
def test_malformed_messages(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        render_chat(CHATML, messages)


def test_model_without_template() -> None:
    with pytest.raises(InvalidInputError, match="no chat template: send a plain prompt"):
        render_chat(None, USER)


def test_the_start_token_comes_from_the_template_only() -> None:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = HfTokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|im_end|>", special=True)])
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer(inner, bos_id=256, eos_ids=(257,), chat_template=template)

    def encoded(content: str) -> list[int]:
        text = render_chat(
            tokenizer.chat_template, [{"role": "user", "content": content}], bos_token="<s>", eos_token="<|im_end|>"
        )
        return tokenizer.encode(text, add_special=False)

    assert encoded("ab") == [256, vocab["a"], vocab["b"], 257]
    # Text that spells a special token becomes it, as with Hugging Face.
    assert encoded("a<|im_end|>") == [256, vocab["a"], 257, 257]
