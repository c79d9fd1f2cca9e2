from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_kernels.language import ByteTokenizer

TOKENIZER = ByteTokenizer()
SPECIALS = ("<PAD>", "<BOS>", "<EOS>", "<image>", "<EOC>")


def test_ids():
    assert TOKENIZER.vocab_size == 264
    assert [TOKENIZER.encode(name) for name in SPECIALS] == [[256], [257], [258], [259], [260]]
    assert TOKENIZER.encode("a<image>é<EOC>", add_bos=True) == [257, 97, 259, 0xC3, 0xA9, 260]
    assert TOKENIZER.image_token_id == 259
    assert TOKENIZER.end_of_chunk_token_id == 260
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (
        256,
        257,
        258,
    )


UTF8_TEXT = st.text(st.characters(codec="utf-8"))


@given(st.lists(st.one_of(UTF8_TEXT, st.sampled_from(SPECIALS))).map("".join))
def test_everything_round_trips(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert TOKENIZER.decode(torch.tensor(ids, dtype=torch.int64), skip_special_tokens=False) == text


@given(UTF8_TEXT)
def test_plain_text_round_trips_and_bos_is_skipped(text):
    if not any(name in text for name in SPECIALS):
        assert TOKENIZER.decode(TOKENIZER.encode(text, add_bos=True)) == text


@given(st.lists(st.integers(0, 263)))
def test_every_sequence_in_the_vocabulary_decodes(ids):
    assert isinstance(TOKENIZER.decode(ids), str)


def test_invalid_utf8_and_unused_ids():
    assert TOKENIZER.decode([0xC3, 97]) == "\ufffda"
    assert TOKENIZER.decode([97, 261]) == "a"
    assert TOKENIZER.decode([97, 261], skip_special_tokens=False) == "a\ufffd"


@pytest.mark.parametrize("token", [-1, 264])
def test_ids_out_of_range(token):
    with pytest.raises(ValueError, match=rf"id {token} at place 1 is outside .* 0\.\.263"):
        TOKENIZER.decode([97, token])
    with pytest.raises(ValueError, match=rf"id {token} in row 1 is outside .* 0\.\.263"):
        TOKENIZER.pad([[1], [token]])


def test_lone_surrogates_are_refused():
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        TOKENIZER.encode("\ud800")


def test_pad():
    rows = [[1, 2, 3], [], [4]]
    input_ids, attention_mask = TOKENIZER.pad(rows, side="right")
    assert input_ids.tolist() == [[1, 2, 3], [256, 256, 256], [4, 256, 256]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    input_ids, attention_mask = TOKENIZER.pad(rows, side="left")
    assert input_ids.tolist() == [[1, 2, 3], [256, 256, 256], [256, 256, 4]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64


def test_pad_of_nothing():
    input_ids, attention_mask = TOKENIZER.pad([])
    assert input_ids.shape == attention_mask.shape == (0, 0)


def test_pad_side():
    with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'middle'"):
        TOKENIZER.pad([[1]], side="middle")
