"""The text, media and spans that the cross-attention layers of one call share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flamingo_kernels.nn import MediaKeyValue
from flamingo_kernels.ops import KeyRanges, MediaSpans


@dataclass(frozen=True)
class MediaContext:
    """All tokens of a call, including those that a cache holds, and their media.

    Attributes
    ----------
    media : tuple of MediaKeyValue
        Keys and values of each cross-attention layer: of I media slots, [B, I, R, Hkv, D], or of
        all keys one by one, [B, S, 1, Hkv, D].
    num_images : Tensor
        int64 [B], the images of each row.
    input_ids : Tensor
        [B, T].
    attention_mask : Tensor or None
        int64 [B, T]; None if no padding was ever given.
    spans : MediaSpans
        [B, T], the media slots, or the keys, that each token sees.
    lengths : Tensor or None
        int64 [B, I], the keys of each image; None if all have R.
    extendable : bool
        As in ``FlamingoCache``.
    """

    media: tuple[MediaKeyValue, ...]
    num_images: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None
    spans: MediaSpans
    lengths: Tensor | None = None
    extendable: bool = False

    def spans_of(self, start: int, end: int) -> MediaSpans:
        """Return the spans of tokens start..end-1.

        Tokens past the last one, which are being generated, see what the last one sees.
        """
        length = self.spans.shape[1]
        if end > length:
            index = torch.arange(start, end, device=self.spans.first.device).clamp(max=length - 1)
            first, last = (s[:, index] for s in (self.spans.first, self.spans.last))
        else:
            first, last = (s[:, start:end] for s in (self.spans.first, self.spans.last))
        return MediaSpans(first, last, self.spans.single_item)

    def repeat(self, times: int) -> MediaContext:
        """Return the context with ``times`` copies of each row, side by side."""
        if times == 1:
            return self

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, dim=0)

        spans, mask, lengths = self.spans, self.attention_mask, self.lengths
        return replace(
            self,
            media=tuple(MediaKeyValue(repeated(k), repeated(v)) for k, v in self.media),
            num_images=repeated(self.num_images),
            input_ids=repeated(self.input_ids),
            attention_mask=None if mask is None else repeated(mask),
            spans=MediaSpans(repeated(spans.first), repeated(spans.last), spans.single_item),
            lengths=None if lengths is None else repeated(lengths),
        )


def token_spans(
    input_ids: Tensor,
    image_token_id: int,
    attend: str,
    assign: str | Sequence[str],
    lengths: Tensor | None = None,
) -> MediaSpans:
    """Return the media slots, or the keys, that each token [B, T] sees.

    Parameters
    ----------
    input_ids, image_token_id, attend
        As in ``MediaSpans.from_tokens``.
    assign : {"previous", "next"} or one of them per row
        Which neighbouring image the text belongs to.
    lengths : Tensor, optional
        int64 [B, I], the keys of each image. Given, the spans are those of keys.
    """
    spans = _image_spans(input_ids, image_token_id, attend, assign)
    return spans if lengths is None else KeyRanges.from_items(spans, lengths).spans


def _image_spans(
    input_ids: Tensor, image_token_id: int, attend: str, assign: str | Sequence[str]
) -> MediaSpans:
    if isinstance(assign, str):
        return MediaSpans.from_tokens(input_ids, image_token_id, attend, assign)
    if len(assign) != len(input_ids):
        raise ValueError(f"assign names {len(assign)} rows, input_ids has {len(input_ids)}")
    rows = [
        MediaSpans.from_tokens(ids[None], image_token_id, attend, mode)
        for ids, mode in zip(input_ids, assign, strict=True)
    ]
    return MediaSpans(
        torch.cat([spans.first for spans in rows]),
        torch.cat([spans.last for spans in rows]),
        all(spans.single_item for spans in rows),
    )
