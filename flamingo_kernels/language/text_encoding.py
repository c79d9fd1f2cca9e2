"""Text to ids by a tokenizer of transformers: prompts that go on, and plain text."""

from __future__ import annotations

from typing import Any

from flamingo_kernels.language.media_tokens import IMAGE_TOKEN


def prompt_start(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before any text, such as its beginning of sequence.

    Raises
    ------
    ValueError
        They cannot be told from the text: the tokenizer has no id for it, or changes others.
    """
    whole = tokenizer.encode(IMAGE_TOKEN, split_special_tokens=False)
    text = _without_ends(tokenizer, IMAGE_TOKEN)
    for start in range(len(whole) - len(text) + 1 if text else 0):
        if whole[start : start + len(text)] == text:
            return tuple(whole[:start])
    raise ValueError(
        f"the tokenizer turns {IMAGE_TOKEN!r} into {whole}, and into {text} with "
        "add_special_tokens=False: which ids come before a text cannot be told"
    )


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that generation continues; special tokens in it are read as such.

    It starts as the tokenizer starts a text, once, also if the text begins so itself (a chat
    template writes that). It has no end: what a tokenizer puts behind a text, such as an end of
    sequence, would end it before the continuation.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    text : str

    Raises
    ------
    ValueError
        As :func:`prompt_start`.
    """
    start, ids = list(prompt_start(tokenizer)), _without_ends(tokenizer, text)
    return ids if ids[: len(start)] == start else start + ids


def _without_ends(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
