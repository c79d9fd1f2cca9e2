"""What the cross-attention layers of one call see: text so far, media, and who sees what."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flamingo_kernels.nn import MediaKeyValue
from flamingo_kernels.ops import MediaSpans


@dataclass(frozen=True)
class Context:
    """All tokens of a call, those that a cache holds included, and their media.

    Attributes
    ----------
    media : tuple of MediaKeyValue
        One per cross-attention layer, [B, I, R, H, D].
    num_images : Tensor
        int64 [B], media slots in use.
    input_ids : Tensor
        [B, T].
    attention_mask : Tensor or None
        int64 [B, T]; None if no padding was ever given.
    spans : MediaSpans
        [B, T], the media that each token sees.
    owned : bool
        The media are a cache's own copies, see ``FlamingoCache``.
    """

    media: tuple[MediaKeyValue, ...]
    num_images: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None
    spans: MediaSpans
    owned: bool = False

    def spans_of(self, start: int, end: int) -> MediaSpans:
        """Of tokens start..end-1; text that follows the last one sees what that one sees."""
        length = self.spans.shape[1]
        if end > length:
            index = torch.arange(start, end, device=self.spans.first.device).clamp(max=length - 1)
            first, last = (s[:, index] for s in (self.spans.first, self.spans.last))
        else:
            first, last = (s[:, start:end] for s in (self.spans.first, self.spans.last))
        return MediaSpans(first, last, self.spans.single_item)

    def repeat(self, times: int) -> Context:
        """Each row so many times, side by side."""
        if times == 1:
            return self

        def grown(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, dim=0)

        spans = MediaSpans(grown(self.spans.first), grown(self.spans.last), self.spans.single_item)
        return replace(
            self,
            media=tuple(MediaKeyValue(grown(k), grown(v)) for k, v in self.media),
            num_images=grown(self.num_images),
            input_ids=grown(self.input_ids),
            attention_mask=None if self.attention_mask is None else grown(self.attention_mask),
            spans=spans,
        )
