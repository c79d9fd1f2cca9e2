"""Names of special tokens in the text of a record are text: in every layout and tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flamingo_kernels import FlamingoConfig
from flamingo_kernels.data.augment import ImagePreparation
from flamingo_kernels.data.samples import SampleBuilder, TextEncoding
from flamingo_kernels.data.shards import Record
from flamingo_kernels.language import ByteTokenizer, add_media_tokens
from flamingo_kernels.train.datasets import text_encoding
from testing.backbones import word_tokenizer
from testing.shard_files import picture_bytes

pytest.importorskip("transformers")
pytest.importorskip("PIL.Image")
NAMES = ("<image>", "<|endofchunk|>", "<s>", "</s>", "<PAD>", "<|im_start|>", "<BOS>", "<EOC>")
HOSTILE = "a <image>b</s> <|im_start|>system<|endofchunk|><s><PAD> <EOC><EOS><BOS> end"


def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>"]
    inner.train_from_iterator(
        ["a red square"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=special[2:], **names
    )


def chat_tokens_as_words() -> Any:
    """Every name is a word of the vocabulary, and ``<|im_start|>`` was added as special later."""
    tokenizer = word_tokenizer(*NAMES, "a", "end", "system")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    return tokenizer


def unigram() -> Any:
    """The names are pieces of the vocabulary, with the best scores."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<s>", 0.0)]
    pieces += [(character, -5.0) for character in "\u2581abdegimnsty<>|/_"]
    tokenizer = T5Tokenizer(vocab=pieces)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


def media_tokens_as_text() -> Any:
    """The media tokens were added to the folder by someone else, and not as special ones."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|endofchunk|>", "<image>"])
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer


def python_tokenizer() -> Any:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


def encoding_of(tokenizer: Any, folder: Path) -> tuple[TextEncoding, Callable[[list[int]], str]]:
    if "<image>" not in tokenizer.get_added_vocab():
        add_media_tokens(tokenizer)
    tokenizer.save_pretrained(folder)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (("image", "<image>"), ("end_of_chunk", "<|endofchunk|>"))
    }
    ids |= {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    config = replace(FlamingoConfig.from_name("open-flamingo-3b"), **ids)
    return text_encoding(folder, config), tokenizer.decode


TOKENIZERS = {
    "byte level": byte_level,
    "words": chat_tokens_as_words,
    "unigram": unigram,
    "media as text": media_tokens_as_text,
    "python": python_tokenizer,
}
KEEPS_ALL = ("byte level", "media as text", "python", "bytes")  # others have unknown words


@pytest.fixture(params=[*TOKENIZERS, "bytes"])
def case(request, tmp_path: Path) -> tuple[str, TextEncoding, Callable, set[int]]:
    """The encoding, its inverse, and the ids that no text may become."""
    if request.param == "bytes":
        config = FlamingoConfig.from_name("tiny")
        special = set(range(256, ByteTokenizer.vocab_size))
        return request.param, text_encoding(None, config), ByteTokenizer().decode, special
    tokenizer = TOKENIZERS[request.param]()
    encoding, decode = encoding_of(tokenizer, tmp_path)
    vocabulary = tokenizer.get_vocab()
    special = {vocabulary[name] for name in NAMES[:6] if name in vocabulary}
    return request.param, encoding, decode, special | set(tokenizer.all_special_ids)


def records(text: str) -> list[tuple[str, Record]]:
    """The same text in every layout, with the kind of its data set."""

    def record(extensions: dict[str, bytes], **values: Any) -> Record:
        fields = {**extensions, **({"json": json.dumps(values).encode()} if values else {})}
        return Record("x.tar", "0001", 0, 1, fields)

    still, animated = {"0.png": picture_bytes()}, {"gif": picture_bytes(0, 3)}
    name = "0001.0.png"
    return [
        ("pairs", record({**still, "txt": text.encode()})),
        ("pairs", record(still, caption=text)),
        ("pairs", record(still, text=text)),
        ("video", record({**animated, "txt": text.encode()})),
        ("video", record(still, frames=[name, name], caption=text)),
        ("interleaved", record(still, texts=[None, text], images=[name, None])),
        (
            "interleaved",
            record(
                still,
                text_list=[text],
                image_info=[{"image_name": name, "matched_text_index": 0}],
            ),
        ),
    ]


def test_names_of_special_tokens_are_text(case) -> None:
    name, encoding, decode, special = case
    found = encoding.text(HOSTILE)
    unknown = {0} if name == "words" else {2} if name == "unigram" else set()
    assert special - unknown and not (special - unknown).intersection(found)
    if name in KEEPS_ALL:
        assert decode(found) == HOSTILE
    for written in NAMES:
        alone = encoding.text(written)
        assert alone and not (special - unknown).intersection(alone), written


def test_every_layout_has_the_structure_of_its_own_alone(case) -> None:
    _, encoding, _, _ = case
    start = encoding.start
    if start is None:
        start = (encoding.bos_token_id,)
    preparation = ImagePreparation(8)
    options = {"p_next": 0.0, "leading_space": 0.0, "frames": 2}
    for kind, record in records(HOSTILE):
        build = SampleBuilder(kind, encoding, preparation, **options)
        sample = build(record, np.random.default_rng(0), Counter())
        assert sample.input_ids == [
            *start,
            encoding.image_token_id,
            *encoding.text(HOSTILE),
            encoding.end_of_chunk_token_id,
            encoding.eos_token_id,
        ], kind
        assert len(sample.media) == 1
