"""Result of a decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from flamingo_kernels.language import LanguageModelCache


class Decoded(NamedTuple):
    """Result of a decoding.

    Attributes
    ----------
    sequences : Tensor
        int64 [B * num_return_sequences, all tokens], cached ones included.
    language : LanguageModelCache or None
        The language model's cache; None if the decoding does not leave one.
    output : object, optional
        The output of transformers, if ``return_dict_in_generate`` asked for it.
    """

    sequences: Tensor
    language: LanguageModelCache | None
    output: Any = None
