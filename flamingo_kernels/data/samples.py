"""From documents to training samples (Flamingo, sections 2.4 and 3.2 of v1, appendix A.3)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flamingo_kernels.data import bounds
from flamingo_kernels.data.augment import ImagePreparation
from flamingo_kernels.data.formats import (
    BROKEN_IMAGE,
    BROKEN_RECORD,
    NO_IMAGE,
    NO_TEXT,
    PARSERS,
    Document,
    Media,
    SkipRecordError,
)
from flamingo_kernels.data.images import load_frames, sample_frames, stack_media
from flamingo_kernels.data.shards import Record

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORED_LABEL = -100
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextEncoding:
    """How text becomes ids.

    Attributes
    ----------
    encode : callable
        Text to ids, without special tokens.
    image_token_id, end_of_chunk_token_id : int
    bos_token_id, eos_token_id, pad_token_id : int or None
        The ids that mark structure.
    start : tuple of int or None
        What a document starts with; None: ``bos_token_id``.
    """

    encode: Callable[[str], list[int]]
    image_token_id: int
    end_of_chunk_token_id: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    start: tuple[int, ...] | None = None

    def text(self, text: str) -> list[int]:
        """Return the ids of plain text, without ids of structure, such as a written ``<image>``.

        Raises
        ------
        ValueError
            The text has no UTF-8 form.
        """
        text.encode()  # raises the ValueError; tokenizers raise errors of other types
        structure = {self.image_token_id, self.end_of_chunk_token_id, self.bos_token_id}
        structure |= {self.eos_token_id, self.pad_token_id}
        return [token for token in self.encode(text) if token not in structure]


@dataclass(frozen=True)
class Sample:
    """One row of a batch.

    Attributes
    ----------
    key : str
        The shard and record that it is from.
    input_ids : list of int
    media : list of Tensor
        Each [F, 3, H, W], in the order of the ids.
    assign : {"previous", "next"}
        The image that text is assigned to.
    """

    key: str
    input_ids: list[int]
    media: list[Tensor]
    assign: str = "previous"


def encode_document(document: Document, encoding: TextEncoding) -> tuple[list[int], list[Media]]:
    """Return the ids of a whole document, and its media in the order of their ``<image>`` tokens.

    The ids are ``<BOS>text<EOC><image>text<EOC><image>text<EOC><EOS>``. ``<EOC>`` ends a chunk of
    text before an image and at the end of the document. Adjacent images have no chunk between them.
    """
    start = encoding.start
    if start is None:
        start = () if encoding.bos_token_id is None else (encoding.bos_token_id,)
    ids = list(start)
    media: list[Media] = []
    open_chunk = False
    for part in document.parts:
        if isinstance(part, Media):
            if open_chunk:
                ids.append(encoding.end_of_chunk_token_id)
            ids.append(encoding.image_token_id)
            media.append(part)
            open_chunk = False
        elif tokens := encoding.text(part):
            ids += tokens
            open_chunk = True
    if open_chunk:
        ids.append(encoding.end_of_chunk_token_id)
    if encoding.eos_token_id is not None:
        ids.append(encoding.eos_token_id)
    return ids, media


def choose_window(
    ids: Sequence[int],
    max_tokens: int,
    max_images: int,
    image_token_id: int,
    generator: np.random.Generator,
) -> tuple[int, int]:
    """Return the bounds of a random window of at most ``max_tokens`` ids and ``max_images`` images.

    Its start is uniform. It ends before an image too many: the text after that image would be
    assigned to the image before.
    """
    start = int(generator.integers(max(0, len(ids) - max_tokens) + 1))
    end = min(start + max_tokens, len(ids))
    places = [i for i in range(start, end) if ids[i] == image_token_id]
    return start, places[max_images] if len(places) > max_images else end


@dataclass(frozen=True)
class SampleBuilder:
    """Build samples of the records of one dataset.

    Attributes
    ----------
    kind : {"interleaved", "pairs", "video"}
        A layout of ``data.formats``.
    encoding : TextEncoding
    preparation : ImagePreparation
    max_tokens : int
        The longest sample, L in the paper (256; 32 or 64 for pairs).
    max_images : int
        Most images of an interleaved sample, N in the paper (5).
    p_next : float
        Probability that the text of a document is assigned to the next image, drawn once for each
        document (0.5 in the paper).
    frames : int
        Frames of a clip (8 in the paper).
    leading_space : float
        Probability of a space before the text of a pair or clip (0.5 in the paper).
    image_root : Path or None
        Folder that image names are relative to and may not leave; None: the shard's.
    """

    kind: str
    encoding: TextEncoding
    preparation: ImagePreparation
    max_tokens: int = 256
    max_images: int = 5
    p_next: float = 0.5
    frames: int = 8
    leading_space: float = 0.5
    image_root: Path | None = None

    def __call__(
        self, record: Record, generator: np.random.Generator, skipped: Counter[str]
    ) -> Sample:
        """Return the sample of a record.

        Parameters
        ----------
        record : Record
        generator : numpy.random.Generator
            Of the random choices for this record.
        skipped : Counter
            Counts the images that are left out of a document because they cannot be decoded.

        Raises
        ------
        SkipRecordError
            The record cannot be read or exceeds a bound, or has no text or no image.
        """
        key = f"{record.shard}: {record.key}"
        if record.too_large:
            raise SkipRecordError(BROKEN_RECORD, f"{key}: {record.too_large}")
        document = PARSERS[self.kind](record, self.image_root)
        interleaved = self.kind == "interleaved"
        # Drawn first and always, so that these draws do not depend on the document.
        assign = "next" if generator.random() < self.p_next and interleaved else "previous"
        if generator.random() < self.leading_space and not interleaved:
            document = Document((document.parts[0], " " + document.parts[1]))
        texts = [part for part in document.parts if isinstance(part, str)]
        try:
            bounds.TEXT.check(sum(map(len, texts)), "its text")
        except ValueError as error:
            raise SkipRecordError(BROKEN_RECORD, f"{key}: {error}") from error
        try:
            ids, media = encode_document(document, self.encoding)
        except ValueError as error:  # text without UTF-8 form
            raise SkipRecordError(NO_TEXT, f"{key}: {error}") from error
        if not media:
            raise SkipRecordError(NO_IMAGE, key)
        if not any(text.strip() for text in texts):
            raise SkipRecordError(NO_TEXT, key)
        image = self.encoding.image_token_id
        if interleaved:
            start, end = choose_window(ids, self.max_tokens, self.max_images, image, generator)
        else:
            start, end = 0, min(self.max_tokens, len(ids))
        places = [i for i in range(start, end) if ids[i] == image]
        first = ids[:start].count(image)
        tensors = [self._load(m, generator, skipped) for m in media[first : first + len(places)]]
        if places and all(tensor is None for tensor in tensors):
            raise SkipRecordError(NO_IMAGE, f"{key}: none of its images can be decoded")
        kept = _without(ids[start:end], [t is None for t in tensors], image, assign)
        return Sample(key, kept, [t for t in tensors if t is not None], assign)

    def _load(
        self, media: Media, generator: np.random.Generator, skipped: Counter[str]
    ) -> Tensor | None:
        try:
            if self.kind != "video":
                frames = load_frames(media.sources[0], 1, media.name)
            elif len(media.sources) == 1:
                frames = load_frames(media.sources[0], self.frames, media.name)
            else:
                frames = _load_stills(media, self.frames)
            return self.preparation(frames, generator)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            log_first(skipped, BROKEN_IMAGE, str(error))
            return None


def _load_stills(media: Media, frames: int) -> list[Image]:
    """Return ``frames`` pictures of a clip that has a file for each."""
    chosen = sample_frames(len(media.sources), frames)
    pictures: dict[int, Image] = {}
    pixels = 0
    for i in dict.fromkeys(chosen):
        (pictures[i],) = load_frames(media.sources[i], 1, media.name)
        pixels += pictures[i].width * pictures[i].height
        bounds.CLIP.check(pixels, f"the clip {media.name}")
    return [pictures[i] for i in chosen]


def _without(
    ids: Sequence[int], broken: Sequence[bool], image_token_id: int, assign: str
) -> list[int]:
    """Return ``ids`` without broken images and without the text that is assigned to them.

    That text would otherwise be assigned to the image before (or after).
    """
    kept: list[int] = []
    text_from = 0  # index in kept of the text since the last image
    dropped = False
    images = iter(broken)
    for token in ids:
        if token == image_token_id:
            is_broken = next(images)
            if is_broken and assign == "next":
                del kept[text_from:]
            dropped = is_broken and assign == "previous"
            if not is_broken:
                kept.append(token)
            text_from = len(kept)
        elif not dropped:
            kept.append(token)
    return kept


def log_first(skipped: Counter[str], reason: str, detail: str) -> None:
    """Count what is skipped, and warn at the first of each reason."""
    if not skipped[reason]:
        logger.warning("skipped, %s: %s (later ones are counted)", reason, detail)
    skipped[reason] += 1


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor | list[str]]:
    """Pad samples on the right into arguments of ``FlamingoModel.forward``.

    Returns
    -------
    dict
        ``input_ids``, ``attention_mask`` and ``labels``, int64 [B, T], with labels -100 at padding;
        ``assign``, a word per row; and the arguments that
        :func:`flamingo_kernels.data.images.stack_media` gives.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_token_id)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, sample in enumerate(samples):
        ids = torch.tensor(sample.input_ids, dtype=torch.int64)
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "labels": labels,
        "assign": [sample.assign for sample in samples],
        **stack_media([sample.media for sample in samples]),
    }
