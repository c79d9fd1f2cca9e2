"""Folders as users have them, with tiny random models, for the pages of the documentation."""

from __future__ import annotations

from pathlib import Path

from testing.backbones import SPECIAL, clip, language_model

WORDS = ("Output:", "Question:", "Answer:", "a", "cat", "dog", "What", "is", "it?", "two", "of")


def write_language_model(folder: str | Path) -> None:
    """Write a Llama and a tokenizer whose vocabulary is ``WORDS``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    model = language_model("llama", vocab_size=len(vocab), **_ids(SPECIAL))
    for name in ("image_token_id", "end_of_chunk_token_id"):
        delattr(model.config, name)
    model.save_pretrained(folder)


def write_vision_encoder(folder: str | Path) -> None:
    """Write a CLIP vision tower."""
    clip().save_pretrained(folder)


def _ids(special: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in special.items() if name != "vocab_size"}
