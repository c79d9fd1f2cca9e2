"""State that decoding keeps between steps and between turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.language.protocol import LanguageModelCache
from flamingo_kernels.model.context import MediaContext
from flamingo_kernels.nn import MediaKeyValue

LEAST_SPARE = 4


@dataclass(frozen=True)
class FlamingoCache:
    """Cache of the language model, media of every cross-attention layer, and the text so far.

    A call that is given a cache extends its language part in place; :meth:`select_rows` copies.

    Attributes
    ----------
    language : LanguageModelCache
        The language model's own cache.
    media : tuple of MediaKeyValue
        Keys and values of each cross-attention layer, [B, I, R, H, D], projected once per image.
    num_images : Tensor
        int64 [B], media slots in use.
    input_ids : Tensor
        [B, T], all tokens seen. The images of each row are counted in them.
    attention_mask : Tensor or None
        [B, T]; None if no padding was ever given.
    extendable : bool
        The media are copies of this cache, usually with spare slots, that later turns may write
        into. False if gradients may need them.
    """

    language: LanguageModelCache
    media: tuple[MediaKeyValue, ...]
    num_images: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None
    extendable: bool = False

    @classmethod
    def after(cls, context: MediaContext, language: LanguageModelCache) -> FlamingoCache:
        """Return the cache once the language model has read all of ``context``."""
        return cls(
            language,
            context.media,
            context.num_images,
            context.input_ids,
            context.attention_mask,
            context.extendable and may_write_in_place(context.media),
        )

    def with_room(self) -> FlamingoCache:
        """Return a cache whose media have spare slots for the images of later turns."""
        if self.extendable or not self.media or not may_write_in_place(self.media):
            return self
        slots = self.media[0].key.shape[1]
        spare = _with_spare(slots) - slots if slots else 0

        def copied(tensor: Tensor) -> Tensor:
            return F.pad(tensor, (0, 0) * 3 + (0, spare))

        media = tuple(MediaKeyValue(copied(k), copied(v)) for k, v in self.media)
        return replace(self, media=media, extendable=True)

    def select_rows(self, rows: Tensor) -> FlamingoCache:
        """Return a separate cache of rows [B'], in that order.

        Rows may repeat, as for beams or several samples.
        """
        return FlamingoCache(
            language=self.language.index_select(rows),
            media=tuple(MediaKeyValue(k[rows], v[rows]) for k, v in self.media),
            num_images=self.num_images[rows],
            input_ids=self.input_ids[rows],
            attention_mask=None if self.attention_mask is None else self.attention_mask[rows],
            extendable=may_write_in_place(self.media),
        )

    def in_dtype(self, dtype: torch.dtype) -> FlamingoCache:
        """Return a cache whose media are in ``dtype``: autocast may have begun or ended."""
        if all(k.dtype == v.dtype == dtype for k, v in self.media):
            return self
        media = tuple(MediaKeyValue(k.to(dtype), v.to(dtype)) for k, v in self.media)
        return replace(self, media=media)

    def append_text(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return all tokens and their mask, given new tokens and the mask of this call."""
        text = torch.cat((self.input_ids, input_ids), 1)
        if attention_mask is None and self.attention_mask is not None:
            attention_mask = torch.cat((self.attention_mask, torch.ones_like(input_ids)), 1)
        return text, attention_mask

    def append_media(
        self, new: Sequence[MediaKeyValue] | None, counts: Tensor
    ) -> tuple[tuple[MediaKeyValue, ...], bool]:
        """Return all media, the first ``counts`` [B] new ones of each row behind its own.

        Also return whether they are extendable. New media are then written into the spare slots of
        this cache, which its ``num_images`` leaves out.
        """
        extendable = self.extendable and may_write_in_place(self.media)
        if new is None:
            return self.media, extendable
        media = tuple(
            _append_media(old, self.num_images, added, counts, extendable)
            for old, added in zip(self.media, new, strict=True)
        )
        return media, extendable


def check_cache(cache: FlamingoCache) -> None:
    """Raise TypeError or ValueError unless a call can continue from ``cache``."""
    if not isinstance(cache, FlamingoCache):
        raise TypeError(f"cache must be a FlamingoCache, got {type(cache).__name__}")
    if cache.language.length != cache.input_ids.shape[1]:
        raise ValueError(
            f"the cache was made after {cache.input_ids.shape[1]} tokens, but another call has "
            f"extended it in place to {cache.language.length}; continue from that call's cache, or "
            "take copies with cache.select_rows before"
        )


def may_write_in_place(media: Sequence[MediaKeyValue]) -> bool:
    """Whether caches made now may write to media of their own: no gradient needs them."""
    if torch.is_grad_enabled():
        return False
    return torch.is_inference_mode_enabled() or not any(k.is_inference() for k, _ in media)


def _append_media(
    cached: MediaKeyValue,
    cached_counts: Tensor,
    new: MediaKeyValue,
    new_counts: Tensor,
    in_place: bool,
) -> MediaKeyValue:
    """Put the new media of each row right behind its earlier ones.

    ``in_place``: slots of ``cached`` past ``cached_counts`` may be written to. Then only new media
    are copied, unless too few slots are left.
    """
    slots = int((cached_counts + new_counts).max())
    columns = torch.arange(new.key.shape[1], device=new.key.device)
    rows, columns = (columns < new_counts[:, None]).nonzero(as_tuple=True)
    target = columns + cached_counts[rows]

    def append(old: Tensor, fresh: Tensor) -> Tensor:
        if in_place and slots <= old.shape[1]:
            old[rows, target] = fresh[rows, columns]
            return old
        wanted = _with_spare(slots) if in_place else slots
        grown = F.pad(old, (0, 0) * 3 + (0, max(0, wanted - old.shape[1])))
        return grown.index_put((rows, target), fresh[rows, columns])

    return MediaKeyValue(append(cached.key, new.key), append(cached.value, new.value))


def _with_spare(slots: int) -> int:
    """Half as many again: appending one by one then copies each a bounded number of times."""
    return slots + max(LEAST_SPARE, slots // 2)
