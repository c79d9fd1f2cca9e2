"""What decoding keeps between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.language.protocol import LanguageModelCache
from flamingo_kernels.model.context import Context
from flamingo_kernels.nn import MediaKeyValue

LEAST_SPARE = 4


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
    owned : bool
        The media are copies of this cache, usually with slots to spare, into which later turns may
        write. False where gradients may need them.
    """

    language: LanguageModelCache
    media: tuple[MediaKeyValue, ...]
    num_images: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None
    owned: bool = False

    @classmethod
    def after(cls, context: Context, language: LanguageModelCache) -> FlamingoCache:
        """The cache once the language model has read all of ``context``."""
        return cls(
            language,
            context.media,
            context.num_images,
            context.input_ids,
            context.attention_mask,
            context.owned and writable(context.media),
        )

    def with_room(self) -> FlamingoCache:
        """The same with copies of the media that have slots to spare, for images of later turns."""
        if self.owned or not self.media or not writable(self.media):
            return self
        slots = self.media[0].key.shape[1]
        spare = _with_spare(slots) - slots if slots else 0

        def copied(tensor: Tensor) -> Tensor:
            return F.pad(tensor, (0, 0) * 3 + (0, spare))

        media = tuple(MediaKeyValue(copied(k), copied(v)) for k, v in self.media)
        return replace(self, media=media, owned=True)

    def select_rows(self, rows: Tensor) -> FlamingoCache:
        """The cache of rows [B'] in that order, repeats allowed (beams, several samples)."""
        return FlamingoCache(
            language=self.language.index_select(rows),
            media=tuple(MediaKeyValue(k[rows], v[rows]) for k, v in self.media),
            num_images=self.num_images[rows],
            input_ids=self.input_ids[rows],
            attention_mask=None if self.attention_mask is None else self.attention_mask[rows],
            owned=writable(self.media),
        )


def append_media(
    cached: MediaKeyValue,
    cached_counts: Tensor,
    new: MediaKeyValue,
    new_counts: Tensor,
    owned: bool = False,
) -> MediaKeyValue:
    """Put each row's new media right after that row's earlier ones.

    ``owned``: ``cached`` may be written to past ``cached_counts``, where nobody reads. Then only
    what is new is copied, unless the slots are all in use.
    """
    slots = int((cached_counts + new_counts).max())
    columns = torch.arange(new.key.shape[1], device=new.key.device)
    rows, columns = (columns < new_counts[:, None]).nonzero(as_tuple=True)
    target = columns + cached_counts[rows]

    def append(old: Tensor, fresh: Tensor) -> Tensor:
        if owned and slots <= old.shape[1]:
            old[rows, target] = fresh[rows, columns]
            return old
        wanted = _with_spare(slots) if owned else slots
        grown = F.pad(old, (0, 0) * 3 + (0, max(0, wanted - old.shape[1])))
        return grown.index_put((rows, target), fresh[rows, columns])

    return MediaKeyValue(append(cached.key, new.key), append(cached.value, new.value))


def writable(media: Sequence[MediaKeyValue]) -> bool:
    """Whether caches made now may write to media of their own: no gradient will ask for them."""
    if torch.is_grad_enabled():
        return False
    return torch.is_inference_mode_enabled() or not any(k.is_inference() for k, _ in media)


def _with_spare(slots: int) -> int:
    """Half as many again, so that appending one by one copies each a bounded number of times."""
    return slots + max(LEAST_SPARE, slots // 2)
