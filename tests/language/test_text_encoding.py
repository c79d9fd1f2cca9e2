"""Prompts end open and start once; documents of training have one start and one end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flamingo_kernels import FlamingoConfig
from flamingo_kernels.cli.generate import _text_coding
from flamingo_kernels.data.formats import Document, Media
from flamingo_kernels.data.samples import encode_document
from flamingo_kernels.language import ByteTokenizer, add_media_tokens, encode_prompt, prompt_start
from flamingo_kernels.train.datasets import text_encoding

pytest.importorskip("transformers")
PICTURE = Media("picture", (b"",))
BOS, EOS = 1, 2
CONFIG = FlamingoConfig.from_name("open-flamingo-3b")


def templated(template: str | None) -> Any:
    """A tokenizer of words that puts ``template`` around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("<unk>", "<s>", "</s>", "<sop>", "a", "cat")
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        special = [(word, words.index(word)) for word in ("<s>", "</s>", "<sop>")]
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    add_media_tokens(tokenizer)
    return tokenizer


def llama(**options: bool) -> Any:
    from transformers import LlamaTokenizer

    pieces = ("<unk>", "<s>", "</s>", "\u2581", "a", "c", "t", "at", "cat")
    merges = [("a", "t"), ("c", "at")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, **options)
    add_media_tokens(tokenizer)
    return tokenizer


def splitting(tokenizer: Any) -> Any:
    """As a saved tokenizer may say, the names of special tokens are text by default."""
    tokenizer.split_special_tokens = True
    return tokenizer


TOKENIZERS = {
    "nothing": (lambda: templated(None), ()),
    "start": (lambda: templated("<s> $A"), (BOS,)),
    "end": (lambda: templated("$A </s>"), ()),
    "both": (lambda: templated("<s> $A </s>"), (BOS,)),
    "both, twice": (lambda: templated("<s> <sop> $A <sop> </s>"), (BOS, 3)),
    "one token": (lambda: templated("</s> $A </s>"), (EOS,)),
    "split": (lambda: splitting(templated("<s> $A </s>")), (BOS,)),
    "llama": (lambda: llama(add_bos_token=True), (BOS,)),
    "llama that ends": (lambda: llama(add_bos_token=True, add_eos_token=True), (BOS,)),
    "llama without start": (lambda: llama(add_bos_token=False, add_eos_token=True), ()),
}


@pytest.fixture(params=TOKENIZERS)
def case(request) -> tuple[Any, list[int]]:
    make, start = TOKENIZERS[request.param]
    return make(), list(start)


def test_a_prompt_starts_once_and_ends_open(case) -> None:
    tokenizer, start = case
    image, cat = tokenizer.convert_tokens_to_ids(["<image>", "cat"])
    assert prompt_start(tokenizer) == tuple(start)
    assert encode_prompt(tokenizer, "<image>cat") == [*start, image, cat]
    written = "".join(tokenizer.convert_ids_to_tokens(start))  # as a chat template does
    assert encode_prompt(tokenizer, f"{written}<image>cat") == [*start, image, cat]
    assert encode_prompt(tokenizer, "<image>") == [*start, image]
    assert encode_prompt(tokenizer, "") == start
    assert encode_prompt(tokenizer, "<image></s>")[-1] == EOS  # the prompt says so itself


def test_training_and_the_command_start_alike(case, tmp_path: Path) -> None:
    """A caption has one start and one end, whatever the tokenizer adds."""
    tokenizer, start = case
    image, chunk, cat = tokenizer.convert_tokens_to_ids(["<image>", "<|endofchunk|>", "cat"])
    config = replace(
        CONFIG,
        image_token_id=image,
        end_of_chunk_token_id=chunk,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(tmp_path)
    encoding = text_encoding(tmp_path, config)
    ids, _ = encode_document(Document((PICTURE, "cat")), encoding)
    encode, _ = _text_coding(tmp_path, config)
    assert encode("<image>cat") == [*start, image, cat]
    assert ids == [*encode("<image>"), *encoding.text("cat"), chunk, EOS]
    assert BOS not in encoding.text("cat") and EOS not in encoding.text("cat")


def test_bytes_start_once() -> None:
    encode, _ = _text_coding(Path(), FlamingoConfig.from_name("tiny"))
    bos = ByteTokenizer.bos_token_id
    assert encode("a") == encode("<BOS>a") == [bos, ord("a")] and encode("") == [bos]


def test_a_start_that_cannot_be_told_is_an_error() -> None:
    class Odd:
        def encode(self, text: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
            return [1, 2, 3] if add_special_tokens else [4]

    with pytest.raises(ValueError, match=r"into \[1, 2, 3\], and into \[4\] with add_special"):
        prompt_start(Odd())
