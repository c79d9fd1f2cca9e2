"""Add the ``<image>`` and end-of-chunk tokens to a tokenizer and to the embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from flamingo_kernels.bare_modules import is_plain_tensor
from flamingo_kernels.precision import accumulator

IMAGE_TOKEN = "<image>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"
PAD_TOKEN = "<PAD>"
# Where the language model's configuration lists the tokens whose rows are to be trained.
NEW_TOKEN_IDS = "new_token_ids"


class MediaTokens(NamedTuple):
    """Ids of the tokens, as ``FlamingoConfig`` takes them."""

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
    """Add the media tokens that a transformers tokenizer lacks, and their embeddings.

    The default tokens are OpenFlamingo's. A token that exists keeps its id and becomes special:
    the tokenizer finds it in any text, even inside a word. Embeddings that already have enough
    rows keep their size. New rows are the mean of the old ones, so a repetition on the same model
    gives the same bits. The ids are stored in ``language_model.config``, where
    ``FlamingoModel.from_backbones`` reads them, and among them the ids of new tokens, whose rows
    the model trains (``new_token_ids``): the media tokens that the tokenizer or the embeddings
    lacked, or that have the default names.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Gets a padding token too if it has none.
    language_model : nn.Module, optional
        A transformers causal language model. None: no embeddings are changed.
    image_token, end_of_chunk_token : str
        The tokens.

    Returns
    -------
    MediaTokens
        Their ids.

    Raises
    ------
    ValueError
        Both tokens are the same, or rows would have to be added to quantised embeddings.
    ImportError
        transformers is not installed.
    """
    from transformers import AddedToken

    if image_token == end_of_chunk_token:
        raise ValueError(f"image_token and end_of_chunk_token are both {image_token!r}")
    # OpenFlamingo's order gives the ids of its checkpoints.
    names = (end_of_chunk_token, image_token)
    own = {IMAGE_TOKEN, END_OF_CHUNK_TOKEN}  # no language model has learned these
    new = {name for name in names if name in own or name not in tokenizer.get_vocab()}
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
        known = getattr(language_model.config, NEW_TOKEN_IDS, ())
        ids = zip(names, (tokens.end_of_chunk_token_id, tokens.image_token_id), strict=True)
        new_ids = {i for name, i in ids if name in new or i >= rows or i in known}
        setattr(language_model.config, NEW_TOKEN_IDS, sorted(new_ids))
        resize_embeddings(language_model, max(rows, len(tokenizer)))
        language_model.config.image_token_id = tokens.image_token_id
        language_model.config.end_of_chunk_token_id = tokens.end_of_chunk_token_id
        language_model.config.pad_token_id = tokens.pad_token_id
    return tokens


def has_media_tokens(language_model: nn.Module) -> bool:
    """Return whether the configuration of a transformers model has the ids of media tokens."""
    names = ("image_token_id", "end_of_chunk_token_id")
    return all(getattr(language_model.config, name, None) is not None for name in names)


@torch.no_grad()
def resize_embeddings(language_model: nn.Module, rows: int) -> None:
    """Resize input and output embeddings to ``rows``; new rows are the mean of the old ones.

    Raises
    ------
    ValueError
        They are quantised.
    """
    old = language_model.get_input_embeddings().weight.shape[0]
    if rows == old:
        return
    for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        weight = getattr(layer, "weight", None)
        if weight is not None and not (is_plain_tensor(weight) and weight.is_floating_point()):
            raise ValueError(
                f"cannot resize the embeddings of {type(language_model).__name__} from {old} to "
                f"{rows} rows: a {type(layer).__name__} holds a {type(weight).__name__} of "
                f"{weight.dtype}; call add_media_tokens before quantising"
            )
    language_model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        for tensor in () if layer is None else (layer.weight, getattr(layer, "bias", None)):
            if tensor is not None and old < tensor.shape[0] == rows:
                wide = accumulator(tensor.dtype)
                tensor[old:] = tensor[:old].to(wide).mean(0).to(tensor.dtype)
