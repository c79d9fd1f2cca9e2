"""The media items that each token sees, as ranges of media indices."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

ATTEND_MODES = ("last", "last_group", "previous")
ASSIGN_MODES = ("previous", "next")


class SegmentTable(NamedTuple):
    """The segment of each media item: from the first to the last token that sees it.

    Attributes
    ----------
    table : Tensor
        int32, in the layout of the kernel that made it from the ranges.
    media, kv_heads : int
        Number I of media slots and Hkv of key/value heads that it was made for.
    """

    table: Tensor
    media: int
    kv_heads: int


@dataclass(frozen=True, eq=False)
class MediaSpans:
    """The range ``first..last``, both inclusive, of media items that each token sees.

    Every attend mode is such a range, because media indices never decrease along the text
    (Flamingo, section 2.4 and appendix A.1.3). A range is empty where ``first > last``: such a
    token sees nothing, and its attention output is exactly zero. Ops intersect ranges with the
    ``0..I-1`` media slots that they are given.

    Compute the spans once per forward and pass them to every layer.

    Attributes
    ----------
    first, last : Tensor
        int32 [B, T].
    single_item : bool
        No range holds more than one item (attend mode ``"last"``), known without a device read.
    segments : SegmentTable, optional
        Set by :func:`flamingo_kernels.ops.plan_media_attention` for all layers of one forward.
    """

    first: Tensor
    last: Tensor
    single_item: bool = False
    segments: SegmentTable | None = field(default=None, init=False)  # so that no copy keeps it

    def __post_init__(self) -> None:
        require_bounds("MediaSpans", first=self.first, last=self.last)

    def with_segments(self, segments: SegmentTable) -> MediaSpans:
        """Return the same ranges with the segments that were derived from them."""
        spans = MediaSpans(self.first, self.last, self.single_item)
        object.__setattr__(spans, "segments", segments)
        return spans

    @property
    def shape(self) -> torch.Size:
        """[B, T]."""
        return self.first.shape

    @cached_property
    def signature(self) -> tuple:
        """Metadata that the checks of a call depend on; the ranges' values are no part."""
        sizes = None if self.segments is None else self.segments[1:]
        ranges = (self.first, self.last)
        layout = (self.shape, *(t.device for t in ranges), *(t.is_contiguous() for t in ranges))
        return *layout, self.single_item, sizes

    @classmethod
    def from_tokens(
        cls, input_ids: Tensor, image_token_id: int, attend: str = "last", assign: str = "previous"
    ) -> MediaSpans:
        """Return ranges for token ids; the k-th ``<image>`` token of a row starts media item k.

        Parameters
        ----------
        input_ids : Tensor
            Integer [B, T]. Padding needs no mask: only ``<image>`` tokens are counted.
        image_token_id : int
            Id of the ``<image>`` token.
        attend : {"last", "last_group", "previous"}
            ``last``: the token's own item k (Flamingo, OpenFlamingo, IDEFICS); ``last_group``: the
            run of adjacent ``<image>`` tokens that ends at item k (Llama-3.2-Vision);
            ``previous``: items 0..k.
        assign : {"previous", "next"}
            Whether text belongs to the image before it or, as in half of the paper's training
            documents (appendix A.3.2), to the one after it. With ``"next"``, text after the
            last image sees none. An ``<image>`` token always belongs to its own image.

        Raises
        ------
        TypeError, ValueError
            ``input_ids`` not a tensor of shape [B, T], or unknown mode.
        """
        _require_tensor("input_ids", input_ids)
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
        return cls.from_media_locations(input_ids == image_token_id, attend, assign)

    @classmethod
    def from_media_locations(
        cls, locations: Tensor, attend: str = "last", assign: str = "previous"
    ) -> MediaSpans:
        """Return ranges from bool [B, T], True at ``<image>`` tokens; see :meth:`from_tokens`."""
        _check_mode("attend", attend, ATTEND_MODES)
        _check_mode("assign", assign, ASSIGN_MODES)
        _require_tensor("media locations", locations)
        if locations.ndim != 2 or locations.dtype != torch.bool:
            raise ValueError(
                f"media locations must be bool [B, T], got {locations.dtype} of shape "
                f"{tuple(locations.shape)}"
            )
        count = locations.cumsum(1, dtype=torch.int32)
        index = count - 1
        if assign == "next":
            none_left = ~locations & (count == count[:, -1:])
            index = torch.where(locations, index, count).masked_fill(none_left, -1)
        if attend != "last_group" or locations.shape[1] == 0:
            return cls.from_media_index(index, "last" if attend == "last_group" else attend)

        before = torch.nn.functional.pad(locations, (1, 0))[:, :-1]
        starts_run = locations & ~before
        first = torch.where(starts_run, count - 1, -1).cummax(1).values
        last = index
        if assign == "next":
            after = torch.nn.functional.pad(locations, (0, 1))[:, 1:]
            beyond = torch.iinfo(torch.int32).max
            run_ends = torch.where(locations & ~after, count - 1, beyond)
            following_end = run_ends.flip(1).cummin(1).values.flip(1)
            first = torch.where(locations, first, index)
            last = torch.where(locations | (index < 0), index, following_end)
        return cls(*_empty_as_canonical(first, last))

    @classmethod
    def from_media_index(cls, index: Tensor, attend: str = "last") -> MediaSpans:
        """Return ranges from each token's media index, integer [B, T] with -1 for "no media".

        ``last_group`` needs the positions of the ``<image>`` tokens and is refused here.
        """
        _check_mode("attend", attend, ("last", "previous"))
        _require_tensor("index", index)
        last = index.to(torch.int32)
        if attend == "last":
            return cls(*_empty_as_canonical(last, last), single_item=True)
        return cls(*_empty_as_canonical(torch.zeros_like(last), last))

    @classmethod
    def everything(cls, batch: int, tokens: int, media: int, device: torch.device) -> MediaSpans:
        """Return ranges by which every token sees all ``media`` items."""
        first = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
        return cls(first, torch.full_like(first, media - 1))

    def newest(self, tokens: int) -> MediaSpans:
        """Return the ranges of the last ``tokens`` tokens of each row, as a decoding step needs.

        ValueError if there are not as many.
        """
        start = first_of_newest(self.shape[1], tokens)
        return MediaSpans(self.first[:, start:], self.last[:, start:], self.single_item)

    def visible(self, media: int) -> Tensor:
        """Return bool [B, T, media]: whether token t sees media slot i."""
        slots = torch.arange(media, dtype=torch.int32, device=self.first.device)
        return (slots >= self.first[..., None]) & (slots <= self.last[..., None])

    def sees_any(self, media: int) -> Tensor:
        """Return bool [B, T]: whether token t sees any of the slots 0..media-1."""
        return self.first.clamp(min=0) <= self.last.clamp(max=media - 1)

    def seen(self, media: int) -> Tensor:
        """Return bool [B, media]: whether any token sees slot i."""
        first, last = self.first.clamp(0, media).long(), self.last.clamp(-1, media - 1).long()
        ones = (first <= last).int()
        changes = ones.new_zeros(len(first), media + 1)
        changes.scatter_add_(1, first, ones).scatter_add_(1, last + 1, -ones)
        return changes.cumsum(1)[:, :media] > 0


def require_bounds(owner: str, **bounds: object) -> None:
    """Raise TypeError or ValueError unless two bounds of ranges are int32 of one shape [B, T]."""
    for name, value in bounds.items():
        if not isinstance(value, Tensor) or value.dtype != torch.int32:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{owner}.{name} must be an int32 tensor, got {got}")
    shapes = [tuple(value.shape) for value in bounds.values() if isinstance(value, Tensor)]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        raise ValueError(
            f"{owner}.{' and .'.join(bounds)} must have one shape [B, T], got "
            f"{shapes[0]} and {shapes[1]}"
        )


def first_of_newest(present: int, tokens: int) -> int:
    """Return where the last ``tokens`` of ``present`` tokens begin; ValueError if too few."""
    if not 0 <= tokens <= present:
        raise ValueError(f"ranges of {present} tokens have no newest {tokens}")
    return present - tokens


def _empty_as_canonical(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Write every empty range as 0..-1, so that equal ranges have equal bits."""
    empty = (first > last) | (last < 0)
    return first.masked_fill(empty, 0), last.masked_fill(empty, -1)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor [B, T], got {type(value).__name__}")


def _check_mode(what: str, mode: str, known: tuple[str, ...]) -> None:
    if mode not in known:
        raise ValueError(f"unknown {what} mode {mode!r}; known: {', '.join(known)}")
