"""The `<image>` and end-of-chunk tokens: one call for the tokenizer and for the embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from flamingo_kernels.precision import accumulator

IMAGE_TOKEN = "<image>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"
PAD_TOKEN = "<PAD>"


class MediaTokens(NamedTuple):
    """Ids of the tokens, as `FlamingoConfig` takes them."""

    image_token_id: int
    end_of_chunk_token_id: int
    pad_token_id: int


def add_media_tokens(
    tokenizer: Any,
    language_model: nn.Module | None = None,
    *,
    image_token: str = IMAGE_TOKEN,
    end_of_chunk_token: str = END_OF_CHUNK_TOKEN,
) -> MediaTokens:
    """Give a transformers tokenizer the tokens it lacks, and the embeddings their rows.

    The defaults are OpenFlamingo's. Tokens that are there already keep their ids and are special
    from now on: found in any text, also inside a word. Embeddings with rows to spare keep their
    size. New rows are the mean of the old ones, so that doing it again to
    the same model gives the same bits. The ids are noted in `language_model.config`, where
    `FlamingoModel.from_backbones` finds them.

    Parameters
    ----------
    tokenizer : a transformers tokenizer; gets a padding token too if it has none.
    language_model : a transformers causal language model, or None to leave embeddings alone.

    Raises
    ------
    ValueError
        If the two tokens are one.
    ImportError
        If transformers is not installed.
    """
    from transformers import AddedToken

    if image_token == end_of_chunk_token:
        raise ValueError(f"image_token and end_of_chunk_token are both {image_token!r}")
    # In OpenFlamingo's order, so that the ids are those of its checkpoints.
    names = (end_of_chunk_token, image_token)
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in names], True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokens = MediaTokens(
        tokenizer.convert_tokens_to_ids(image_token),
        tokenizer.convert_tokens_to_ids(end_of_chunk_token),
        tokenizer.pad_token_id,
    )
    if language_model is not None:
        rows = language_model.get_input_embeddings().weight.shape[0]
        resize_embeddings(language_model, max(rows, len(tokenizer)))
        language_model.config.image_token_id = tokens.image_token_id
        language_model.config.end_of_chunk_token_id = tokens.end_of_chunk_token_id
        language_model.config.pad_token_id = tokens.pad_token_id
    return tokens


@torch.no_grad()
def resize_embeddings(language_model: nn.Module, rows: int) -> None:
    """`rows` input and output embeddings: the first of the old ones, new ones are their mean."""
    old = language_model.get_input_embeddings().weight.shape[0]
    if rows == old:
        return
    language_model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        for tensor in () if layer is None else (layer.weight, getattr(layer, "bias", None)):
            if tensor is not None and old < tensor.shape[0] == rows:
                wide = accumulator(tensor.dtype)
                tensor[old:] = tensor[:old].to(wide).mean(0).to(tensor.dtype)
