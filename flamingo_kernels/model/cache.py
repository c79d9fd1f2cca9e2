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
        Keys and values of each cross-attention layer, projected once per image: of I media slots,
        [B, I, R, Hkv, D], or of all keys one by one, [B, S, 1, Hkv, D].
    num_images : Tensor
        int64 [B], the images of each row.
    input_ids : Tensor
        [B, T], all tokens seen. The images of each row are counted in them.
    attention_mask : Tensor or None
        [B, T]; None if no padding was ever given.
    lengths : Tensor or None
        int64 [B, I], the keys of each image; None if all have R.
    extendable : bool
        The media are copies of this cache, usually with spare slots, that later turns may write
        into. False if gradients may need them.
    """

    language: LanguageModelCache
    media: tuple[MediaKeyValue, ...]
    num_images: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None
    lengths: Tensor | None = None
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
            context.lengths,
            context.extendable and may_write_in_place(context.media),
        )

    def with_room(self) -> FlamingoCache:
        """Return a cache whose media have spare slots for the images of later turns."""
        if self.extendable or not self.media or not may_write_in_place(self.media):
            return self
        slots = self.media[0].key.shape[1]
        wanted = _with_spare(slots) if slots else 0
        media = tuple(
            MediaKeyValue(_with_slots(k, wanted), _with_slots(v, wanted)) for k, v in self.media
        )
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
            lengths=None if self.lengths is None else self.lengths[rows],
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
        self, new: Sequence[MediaKeyValue] | None, counts: Tensor, lengths: Tensor | None
    ) -> tuple[tuple[MediaKeyValue, ...], Tensor | None, bool]:
        """Return all media, the first ``counts`` [B] new images of each row behind its own.

        ``lengths`` [B, I] are the keys of each new image, or None as in the cache. Also return the
        lengths of all images, and whether the media are extendable: new ones are then written into
        the spare slots of this cache, which its images do not fill.
        """
        extendable = self.extendable and may_write_in_place(self.media)
        if new is None:
            return self.media, self.lengths, extendable
        if self.lengths is None or lengths is None:
            into = _Append(self.num_images, counts, extendable)
        else:
            into = _Append(self.lengths.sum(1), lengths.sum(1), extendable)
            lengths = _Append(self.num_images, counts, in_place=False)(self.lengths, lengths)
        media = tuple(
            MediaKeyValue(*map(into, old, added))
            for old, added in zip(self.media, new, strict=True)
        )
        return media, lengths, extendable


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


class _Append:
    """Puts what is new in each row right behind what the row has.

    Parameters
    ----------
    used, added : Tensor
        Integer [B]: slots of each row in use, and how many come behind them.
    in_place : bool
        Slots past ``used`` may be written to. Then only what is new is copied, unless too few
        slots are left.
    """

    def __init__(self, used: Tensor, added: Tensor, in_place: bool) -> None:
        self.in_place = in_place
        self.slots = int((used + added).max())
        columns = torch.arange(int(added.max()), device=added.device)
        self.rows, self.columns = (columns < added[:, None]).nonzero(as_tuple=True)
        self.target = self.columns + used[self.rows]

    def __call__(self, old: Tensor, new: Tensor) -> Tensor:
        """Return [B, slots, ...], given [B, old slots, ...] and [B, new slots, ...]."""
        fresh = new[self.rows, self.columns]
        if self.in_place and self.slots <= old.shape[1]:
            old[self.rows, self.target] = fresh
            return old
        wanted = _with_spare(self.slots) if self.in_place else self.slots
        grown = _with_slots(old, max(wanted, old.shape[1]))
        return grown.index_put((self.rows, self.target), fresh)


def _with_slots(tensor: Tensor, slots: int) -> Tensor:
    """Return a copy of [B, n, ...] with ``slots`` instead of n; the last ones are zeros."""
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, slots - tensor.shape[1]))


def _with_spare(slots: int) -> int:
    """Half as many again: appending one by one then copies each a bounded number of times."""
    return slots + max(LEAST_SPARE, slots // 2)
