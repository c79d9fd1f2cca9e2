"""Text to ids by a tokenizer of transformers: prompts that go on, and plain text of others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
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


class PlainTextEncoder:
    """Ids of texts that others wrote, such as captions: names of special tokens are text in them.

    So a caption cannot stand for an image, a turn of a chat or the end of the text. A tokenizer
    that has the name of a special token among its words encodes that name in two pieces.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    structure : iterable of int or None
        Further ids that no text may become.
    """

    def __init__(self, tokenizer: Any, structure: Iterable[int | None] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        special = {token for token, description in added if description.special}
        special |= set(tokenizer.all_special_ids)
        special.discard(tokenizer.unk_token_id)  # what unknown words become
        self._special = special | {token for token in structure if token is not None}
        names = map(tokenizer.convert_ids_to_tokens, sorted(self._special))
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __call__(self, text: str) -> list[int]:
        """Return the ids of ``text``, without any that the tokenizer adds."""
        ids = self._plain(text)
        if self._special.isdisjoint(ids):
            return ids
        cuts = [0, *(match.start() + 1 for match in self._names.finditer(text)), len(text)]
        pieces = (text[start:end] for start, end in pairwise(cuts))
        ids = [token for piece in pieces if piece for token in self._plain(piece)]
        return [token for token in ids if token not in self._special]

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _without_ends(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
