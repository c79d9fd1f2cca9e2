"""From a configuration's datasets to loaders: text encoding, shards, pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flamingo_kernels.data.augment import ImagePreparation
from flamingo_kernels.data.decode import check_pillow
from flamingo_kernels.data.formats import Document, Media
from flamingo_kernels.data.samples import SampleBuilder, TextEncoding, encode_document
from flamingo_kernels.data.shards import find_shards
from flamingo_kernels.data.stream import BatchLoader, SampleStream
from flamingo_kernels.language import ByteTokenizer, PlainTextEncoder, prompt_start
from flamingo_kernels.model import FlamingoConfig, FlamingoModel
from flamingo_kernels.train import distributed
from flamingo_kernels.train.config import DatasetSection, TrainConfig
from flamingo_kernels.transformers_models import read_folder
from flamingo_kernels.vision import VisionEncoder


def build_loaders(
    config: TrainConfig, model: FlamingoModel, tokenizer: Any | None = None
) -> dict[str, BatchLoader]:
    """Return this process's loader of every dataset of ``config``, by the dataset's name.

    ``tokenizer`` is one of transformers; None: the one in the folder that ``config`` names, if the
    model's text is not bytes.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As :func:`text_encoding` and :func:`build_loader`.
    """
    encoding = text_encoding(tokenizer or config.model.tokenizer_folder, model.config)
    return {
        section.name: build_loader(
            section,
            encoding,
            model.vision_encoder,
            seed=config.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        for section in config.datasets
    }


def text_encoding(tokenizer: Any | Path | None, config: FlamingoConfig) -> TextEncoding:
    """Return how training text becomes ids.

    A document starts as the tokenizer starts a prompt, and ends in one ``config.eos_token_id``.
    Names of special tokens in the text of a record are text like any other.

    Parameters
    ----------
    tokenizer : transformers tokenizer, Path or None
        The language model's, or its folder; not used by a model whose text is bytes.
    config : FlamingoConfig

    Raises
    ------
    FileNotFoundError, ValueError
        The model needs a tokenizer, and there is none that can be read.
    """
    encode: Callable[[str], list[int]]
    start = None
    if config.uses_byte_tokenizer:
        encode = functools.partial(ByteTokenizer().encode, split_special_tokens=True)
    elif tokenizer is None:
        raise ValueError("model.tokenizer is missing: this language model needs one")
    else:
        if isinstance(tokenizer, Path):
            tokenizer = read_folder("AutoTokenizer", tokenizer)
        structure = (config.image_token_id, config.end_of_chunk_token_id, config.bos_token_id)
        encode = PlainTextEncoder(tokenizer, (*structure, config.eos_token_id, config.pad_token_id))
        start = prompt_start(tokenizer)
    return TextEncoding(
        encode,
        config.image_token_id,
        config.end_of_chunk_token_id,
        config.bos_token_id,
        config.eos_token_id,
        config.pad_token_id,
        start,
    )


def build_loader(
    section: DatasetSection,
    encoding: TextEncoding,
    encoder: VisionEncoder,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """Return a loader of one dataset for this rank, with pictures prepared for ``encoder``.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        Pillow is missing, no shard matches, there are fewer tar shards than readers, the encoder
        takes no pictures, or ``max_tokens`` leaves no text.
    """
    check_pillow()  # workers would say so in many lines
    if encoder.image_size is None:
        raise ValueError(f"datasets.{section.name} holds pictures, but this model takes features")
    _check_room(section, encoding)
    preparation = ImagePreparation(
        encoder.image_size,
        encoder.image_mean,
        encoder.image_std,
        section.fit,
        section.flip,
        section.colour,
    )
    build = SampleBuilder(
        section.kind,
        encoding,
        preparation,
        section.max_tokens,
        section.max_images,
        section.p_next,
        section.frames,
        section.leading_space,
        None if section.image_root is None else Path(section.image_root),
    )
    make = functools.partial(
        _stream, find_shards(section.shards), build, seed=seed, shuffle=section.shuffle
    )
    make(0, world_size * max(1, section.workers))  # too few shards: say so before training starts
    return BatchLoader(
        make,
        section.batch_size,
        encoding.pad_token_id or 0,
        rank=rank,
        world_size=world_size,
        workers=section.workers,
    )


def _check_room(section: DatasetSection, encoding: TextEncoding) -> None:
    """Raise ValueError if ``max_tokens`` leaves no text of any sample to train on."""
    least, why = 2, "the first token of a sample is predicted from nothing"
    if section.kind != "interleaved":  # interleaved windows may begin anywhere
        ids, _ = encode_document(Document((Media("", ()),)), encoding)
        least = ids.index(encoding.image_token_id) + 2
        why = f"a sample begins with {least - 1} token(s) up to its image, and text follows"
    if section.max_tokens < least:
        raise ValueError(
            f"datasets.{section.name}.max_tokens is {section.max_tokens}, which leaves 0 of "
            f"{section.max_tokens} labels to train on: {why}; give at least {least}"
        )


def _stream(
    shards: list[str], build: SampleBuilder, part: int, parts: int, *, seed: int, shuffle: int
) -> SampleStream:
    return SampleStream(shards, build, seed=seed, shuffle=shuffle, part=part, parts=parts)
