"""Loaders of a configuration's datasets."""

from __future__ import annotations

import functools
from pathlib import Path

from flamingo_kernels.data.augment import ImagePreparation
from flamingo_kernels.data.samples import SampleBuilder, TextEncoding
from flamingo_kernels.data.shards import find_shards
from flamingo_kernels.data.stream import BatchLoader, SampleStream
from flamingo_kernels.train.config import DatasetSection
from flamingo_kernels.vision import VisionEncoder


def build_loader(
    section: DatasetSection,
    encoding: TextEncoding,
    encoder: VisionEncoder,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """Batches of one dataset for this rank, pictures prepared as ``encoder`` wants them.

    Raises
    ------
    FileNotFoundError, ValueError
        No shard matches, there are fewer than readers, or the encoder takes no pictures.
    """
    if encoder.image_size is None:
        raise ValueError(f"datasets.{section.name} holds pictures, but this model takes features")
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


def _stream(
    shards: list[str], build: SampleBuilder, part: int, parts: int, *, seed: int, shuffle: int
) -> SampleStream:
    return SampleStream(shards, build, seed=seed, shuffle=shuffle, part=part, parts=parts)
