"""What decoding keeps between steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.language.protocol import LanguageModelCache
from flamingo_kernels.model.context import Context
from flamingo_kernels.nn import MediaKeyValue


@dataclass(frozen=True)
class FlamingoCache:
    """LM state, media keys and values of every cross-attention layer, and the text so far.

    A call that is given a cache extends its language part in place; :meth:`select_rows` copies.

    Attributes
    ----------
    language : LanguageModelCache
        The language model's own cache.
    media : tuple of MediaKeyValue
        One per cross-attention layer, [B, I, R, H, D]: projected once, when the image came.
    num_images : Tensor
        int64 [B], media slots in use.
    input_ids : Tensor
        [B, T] of all tokens seen, from which each row's media index is counted.
    attention_mask : Tensor or None
        [B, T]; None if no padding was ever given.
    """

    language: LanguageModelCache
    media: tuple[MediaKeyValue, ...]
    num_images: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None

    @classmethod
    def after(cls, context: Context, language: LanguageModelCache) -> FlamingoCache:
        """The cache once the language model has read all of ``context``."""
        return cls(
            language,
            context.media,
            context.num_images,
            context.input_ids,
            context.attention_mask,
        )

    def select_rows(self, rows: Tensor) -> FlamingoCache:
        """The cache of rows [B'] in that order, repeats allowed (beams, several samples)."""
        return FlamingoCache(
            language=self.language.index_select(rows),
            media=tuple(MediaKeyValue(k[rows], v[rows]) for k, v in self.media),
            num_images=self.num_images[rows],
            input_ids=self.input_ids[rows],
            attention_mask=None if self.attention_mask is None else self.attention_mask[rows],
        )


def append_media(
    cached: MediaKeyValue, cached_counts: Tensor, new: MediaKeyValue, new_counts: Tensor
) -> MediaKeyValue:
    """Put each row's new media right after that row's earlier ones."""
    slots = int((cached_counts + new_counts).max())

    def append(old: Tensor, fresh: Tensor) -> Tensor:
        grown = F.pad(old, (0, 0) * 3 + (0, max(0, slots - old.shape[1])))
        target = torch.arange(fresh.shape[1], device=fresh.device) + cached_counts[:, None]
        used = torch.arange(fresh.shape[1], device=fresh.device) < new_counts[:, None]
        rows, columns = used.nonzero(as_tuple=True)
        return grown.index_put((rows, target[rows, columns]), fresh[rows, columns])

    return MediaKeyValue(append(cached.key, new.key), append(cached.value, new.value))
