"""A tokenizer of UTF-8 bytes with Flamingo's special tokens; it needs no download."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_NUM_BYTES = 256
_SPECIAL_TOKENS = {"<PAD>": 256, "<BOS>": 257, "<EOS>": 258, "<image>": 259, "<EOC>": 260}
_SPECIAL_NAMES = {token: name for name, token in _SPECIAL_TOKENS.items()}
_SPECIAL_PATTERN = re.compile("(" + "|".join(map(re.escape, _SPECIAL_TOKENS)) + ")")
_VOCAB_MULTIPLE = 8


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then "<PAD>", "<BOS>", "<EOS>", "<image>" and "<EOC>".

    The remaining ids up to ``vocab_size`` are unused and stand for no text.

    Examples
    --------
    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("<image>hi<EOC>", add_bos=True)
    [257, 259, 104, 105, 260]
    >>> tokenizer.decode([257, 259, 104, 105, 260])
    'hi'
    """

    vocab_size = -(-(_NUM_BYTES + len(_SPECIAL_TOKENS)) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    pad_token_id = _SPECIAL_TOKENS["<PAD>"]
    bos_token_id = _SPECIAL_TOKENS["<BOS>"]
    eos_token_id = _SPECIAL_TOKENS["<EOS>"]
    image_token_id = _SPECIAL_TOKENS["<image>"]
    end_of_chunk_token_id = _SPECIAL_TOKENS["<EOC>"]

    def encode(
        self, text: str, add_bos: bool = False, split_special_tokens: bool = False
    ) -> list[int]:
        """Return the ids of ``text``; names of special tokens in it become their ids.

        Parameters
        ----------
        text : str
        add_bos : bool
            Start with "<BOS>".
        split_special_tokens : bool
            Take names of special tokens for text like any other, as in a caption of others.

        Raises
        ------
        UnicodeEncodeError
            The text has no UTF-8 form (lone surrogates).
        """
        ids = [self.bos_token_id] if add_bos else []
        if split_special_tokens:
            return [*ids, *text.encode("utf-8")]
        for part in _SPECIAL_PATTERN.split(text):
            if part in _SPECIAL_TOKENS:
                ids.append(_SPECIAL_TOKENS[part])
            else:
                ids.extend(part.encode("utf-8"))
        return ids

    def decode(self, ids: Iterable[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Parameters
        ----------
        ids : iterable of int, or Tensor
            Token ids; a tensor is an integer vector.
        skip_special_tokens : bool
            Leave out special and unused ids. False writes special ids by name and unused ids as
            U+FFFD.

        Raises
        ------
        ValueError
            An id is not in the vocabulary.
        """
        data = bytearray()
        for place, token in enumerate(ids.tolist() if isinstance(ids, Tensor) else ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"id {token} at place {place} is outside the vocabulary "
                    f"0..{self.vocab_size - 1}"
                )
            if token < _NUM_BYTES:
                data.append(token)
            elif not skip_special_tokens:
                data += _SPECIAL_NAMES.get(token, "\ufffd").encode("utf-8")
        return data.decode("utf-8", errors="replace")

    def pad(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
        """Make one batch of rows of different lengths.

        Parameters
        ----------
        rows : sequence of sequences of int
            Token ids of each row.
        side : {"left", "right"}
            Where the padding goes.

        Returns
        -------
        input_ids, attention_mask : Tensor
            int64 [B, longest]; the mask is 1 at real tokens and 0 at padding.

        Raises
        ------
        ValueError
            Another ``side``, or an id that is not in the vocabulary.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', got {side!r}")
        longest = max(map(len, rows), default=0)
        input_ids = torch.full((len(rows), longest), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            for token in row:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"id {token} in row {i} is outside the vocabulary 0..{self.vocab_size - 1}"
                    )
            start = longest - len(row) if side == "left" else 0
            input_ids[i, start : start + len(row)] = torch.as_tensor(row, dtype=torch.int64)
            attention_mask[i, start : start + len(row)] = 1
        return input_ids, attention_mask
