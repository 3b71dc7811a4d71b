"""Forms with tokenizers of every kind: what a mask allows, the form accepts, and the text is as the form has it."""

import random
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as HfTokenizer

from nitsum_jax.engine.step.masks import mask_words
from nitsum_jax.models.text.tokenizer import Tokenizer
from nitsum_jax.runtime.structured import forms
from nitsum_jax.runtime.structured.compiler import FormCompiler, GrammarForm, TokensOfModel
from tests.models.golden import tiny_models
from tests.models.text.tokenizer_kinds import KINDS


def with_an_end(inner: HfTokenizer) -> Tokenizer:
    inner.add_special_tokens([AddedToken("<end>", special=True)])
    end = inner.get_vocab(with_added_tokens=True)["<end>"]
    return Tokenizer(inner, bos_id=None, eos_ids=[end], chat_template=None)


KIND = [name for name in KINDS if name != "word_piece"]  # it cannot say every text
WRAPPED = {name: with_an_end(KINDS[name]()) for name in KIND}
TOKENS = {name: TokensOfModel(one, one.vocab_size, one.eos_ids) for name, one in WRAPPED.items()}
COMPILERS = {name: FormCompiler(one, one.vocab_size, one.eos_ids) for name, one in WRAPPED.items()}


def said(form: GrammarForm, tokenizer: Tokenizer, rng: random.Random, most: int = 1000) -> str | None:
    """An output drawn from all that the masks allow, which ends where it may; None if it grows too long."""
    matcher, mask, ids = form.matcher(), form.first_mask, list[int]()
    while not matcher.ended:
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        ends = [token for token in allowed if token in tokenizer.eos_ids]
        token = rng.choice(ends if ends and rng.random() < 0.2 else allowed)
        if token in tokenizer.eos_ids:
            break
        if len(ids) == most:
            return None
        matcher.accept(token)
        ids.append(token)
        mask = np.zeros(mask_words(tokenizer.vocab_size), np.int32)
        if not matcher.ended:
            matcher.allowed(mask)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KIND)
@given(text=st.text(st.sampled_from(' abworld<s/>\n"{:}é語😀_▁'), max_size=20))
@example(text="<s></s><end>")
@example(text="es")
@example(text=" world</s>")
@settings(max_examples=30)
def test_a_text_within_an_output_is_told_by_tokens_that_say_it(kind: str, text: str) -> None:
    one = TOKENS[kind]
    if one.tokens[WRAPPED[kind].encode("\n")[-1]] != b"\n":  # it has no bytes, and so not every character
        text = re.sub("[^ -~é語]", "", text)
    ids = one(text.encode())
    assert b"".join(one.tokens[token] for token in ids) == text.encode()
    assert not set(ids) & set(one.special_token_ids)


@pytest.mark.parametrize("kind", KIND)
def test_texts_that_a_form_forces(kind: str) -> None:
    schema = {"const": {"name": "the world 語", "a": ["</s>", None]}}
    form = COMPILERS[kind].compile(forms.json_schema(schema))
    for seed in range(5):
        text = said(form, WRAPPED[kind], random.Random(seed)) or ""
        assert "".join(text.split()) == '{"name":"theworld語","a":["</s>",null]}'
    form = COMPILERS[kind].compile(forms.choice(["yes", "no world", " the end"]))
    assert {said(form, WRAPPED[kind], random.Random(seed)) for seed in range(20)} == {"yes", "no world", " the end"}


def test_a_tokenizer_that_changes_what_it_reads() -> None:
    lowers = Tokenizer(tiny_models.tokenizer(), bos_id=1, eos_ids=(2,), chat_template=None)
    one = TokensOfModel(lowers, lowers.vocab_size, lowers.eos_ids)
    assert [one.tokens[token] for token in one(b"the you")] == [b"t", b"h", b"e", b" you"]
    assert one(b"THE") == []  # it knows no such letters, so no mask may promise them
