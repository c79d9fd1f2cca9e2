"""Documents to training samples (Flamingo, sections 2.4 and 3.2 of v1, appendix A.3)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flamingo_kernels.data.augment import ImagePreparation
from flamingo_kernels.data.formats import (
    BROKEN_IMAGE,
    NO_IMAGE,
    NO_TEXT,
    PARSERS,
    Document,
    Media,
    SkipRecordError,
)
from flamingo_kernels.data.images import load_frames, sample_frames, stack_media
from flamingo_kernels.data.shards import Record

IGNORED_LABEL = -100
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextEncoding:
    """How text becomes ids: ``encode`` (without special tokens) and the ids that mark structure."""

    encode: Callable[[str], list[int]]
    image_token_id: int
    end_of_chunk_token_id: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def text(self, text: str) -> list[int]:
        """Ids of plain text; ids that it may not hold, as ``<image>`` written out, are left out."""
        text.encode()  # what has no UTF-8 form is a ValueError here, whatever a tokenizer raises
        structure = {self.image_token_id, self.end_of_chunk_token_id, self.bos_token_id}
        structure |= {self.eos_token_id, self.pad_token_id}
        return [token for token in self.encode(text) if token not in structure]


@dataclass(frozen=True)
class Sample:
    """One row of a batch: ids, its media [F, 3, H, W] in order, and what text is assigned to."""

    key: str
    input_ids: list[int]
    media: list[Tensor]
    assign: str = "previous"


def encode_document(document: Document, encoding: TextEncoding) -> tuple[list[int], list[Media]]:
    """Ids of a whole document, and its media in the order of their ``<image>`` tokens.

    ``<BOS>text<EOC><image>text<EOC><image>text<EOC><EOS>``: the end of a chunk of text is marked
    before an image and at the end of the document. Adjacent images have no chunk between them.
    """
    ids = [] if encoding.bos_token_id is None else [encoding.bos_token_id]
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
    """Bounds of a random window of at most ``max_tokens`` ids with at most ``max_images`` images.

    Uniform over the starts. It ends before an image too many: the text after that one would be
    taken to belong to the image before.
    """
    start = int(generator.integers(max(0, len(ids) - max_tokens) + 1))
    end = min(start + max_tokens, len(ids))
    places = [i for i in range(start, end) if ids[i] == image_token_id]
    return start, places[max_images] if len(places) > max_images else end


@dataclass(frozen=True)
class SampleBuilder:
    """Records of one dataset to samples.

    Attributes
    ----------
    kind : "interleaved", "pairs" or "video", a layout of ``data.formats``.
    encoding, preparation : of text and pictures.
    max_tokens : L, the longest sample (256; 32 or 64 for pairs in the paper).
    max_images : N, images of an interleaved sample (5).
    p_next : probability that the text of a document is assigned the next image (0.5, once each).
    frames : frames of a clip (8).
    leading_space : probability of a space before the text of a pair (0.5).
    image_root : folder of image names; default: the shard's.
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
        """The sample of a record; images left out of a document are counted in ``skipped``.

        Raises
        ------
        SkipRecordError
            The record gives none: it cannot be read, or has no text or no image.
        """
        document = PARSERS[self.kind](record, self.image_root)
        interleaved = self.kind == "interleaved"
        # Drawn first and always, so that what a document holds does not move them.
        assign = "next" if generator.random() < self.p_next and interleaved else "previous"
        if generator.random() < self.leading_space and not interleaved:
            document = Document((document.parts[0], " " + document.parts[1]))
        key = f"{record.shard}: {record.key}"
        try:
            ids, media = encode_document(document, self.encoding)
        except ValueError as error:  # text that has no UTF-8 form
            raise SkipRecordError(NO_TEXT, f"{key}: {error}") from error
        if not media:
            raise SkipRecordError(NO_IMAGE, key)
        if not any(isinstance(part, str) and part.strip() for part in document.parts):
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
                chosen = sample_frames(len(media.sources), self.frames)
                frames = [load_frames(media.sources[i], 1, media.name)[0] for i in chosen]
            return self.preparation(frames, generator)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            log_first(skipped, BROKEN_IMAGE, str(error))
            return None


def _without(
    ids: Sequence[int], broken: Sequence[bool], image_token_id: int, assign: str
) -> list[int]:
    """Ids without broken images and the text that belongs to them.

    That text would otherwise be taken to belong to the image before (or after).
    """
    kept: list[int] = []
    text_from = 0  # where in kept the text since the last image begins
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
    """Count what is skipped, and warn of the first of each reason."""
    if not skipped[reason]:
        logger.warning("skipped, %s: %s (later ones are counted)", reason, detail)
    skipped[reason] += 1


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor | list[str]]:
    """Samples of any lengths as arguments of ``FlamingoModel.forward``, padded on the right.

    Returns
    -------
    dict
        ``input_ids``, ``attention_mask`` and ``labels`` int64 [B, T], labels -100 at padding;
        ``assign``, a word per row; and what :func:`~flamingo_kernels.data.images.stack_media`
        gives, nothing if there is no image.
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
