"""The keys that each token sees, as ranges of a flat list of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.ops import checks
from flamingo_kernels.ops.spans import (
    MediaSpans,
    SegmentTable,
    first_of_newest,
    require_bounds,
)

_MOST_KEYS = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """The range ``start..stop-1`` of a row's keys that each token sees.

    Items of any lengths, documents packed end to end, prefixes and sliding windows are all such
    ranges. A range is empty where ``start >= stop``: such a token sees nothing, and its attention
    output is exactly zero. Ops intersect ranges with the ``0..S-1`` keys that they are given. Any
    ranges are computed rightly; quickly where neighbouring tokens see nearly the same keys.

    Compute the ranges once per forward and pass them to every layer.

    Attributes
    ----------
    start, stop : Tensor
        int32 [B, T]. They are read when the ranges are made: to change them, make others.
    spans : MediaSpans
        The same ranges over media items of one key each, as the kernels take them.
    """

    start: Tensor
    stop: Tensor
    spans: MediaSpans = field(init=False)

    def __post_init__(self) -> None:
        require_bounds("KeyRanges", start=self.start, stop=self.stop)
        object.__setattr__(self, "spans", MediaSpans(self.start, self.stop.clamp(min=0) - 1))

    @property
    def shape(self) -> torch.Size:
        """[B, T]."""
        return self.start.shape

    def with_segments(self, segments: SegmentTable) -> KeyRanges:
        """Return the same ranges with the segments that were derived from them."""
        ranges = KeyRanges(self.start, self.stop)
        object.__setattr__(ranges, "spans", self.spans.with_segments(segments))
        return ranges

    @classmethod
    def everything(cls, batch: int, tokens: int, keys: int, device: torch.device) -> KeyRanges:
        """Return ranges by which every token sees all ``keys`` keys."""
        _require_count("keys", keys)
        start = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
        return cls(start, torch.full_like(start, min(keys, _MOST_KEYS)))

    @classmethod
    def from_items(cls, spans: MediaSpans, lengths: Tensor) -> KeyRanges:
        """Return ranges for items of different lengths, whose keys lie end to end.

        Parameters
        ----------
        spans : MediaSpans
            Ranges [B, T] of the items that each token sees, clipped to the I items.
        lengths : Tensor
            Integer [B, I]: the keys of each item, 0 for an unused slot.

        Raises
        ------
        TypeError, ValueError
            ``lengths`` are not such a tensor, or negative (seen on the CPU only); the message
            names the item.
        """
        if not isinstance(spans, MediaSpans):
            raise TypeError(f"spans must be MediaSpans, got {type(spans).__name__}")
        _require_integers("lengths", lengths, "[B, I]", 2)
        if lengths.shape[0] != spans.shape[0]:
            raise ValueError(
                f"lengths {tuple(lengths.shape)} and spans {tuple(spans.shape)} must have one "
                "number of rows B"
            )
        if checks.may_read(lengths) and bool((lengths < 0).any()):
            row, item = (lengths < 0).nonzero()[0].tolist()
            raise ValueError(f"lengths[{row}, {item}] is {lengths[row, item]}, a negative number")
        offsets = F.pad(lengths.long().clamp(0, _MOST_KEYS).cumsum(1), (1, 0))  # [B, I + 1]
        items = lengths.shape[1]
        first = spans.first.clamp(0, items).long()
        last = spans.last.clamp(-1, items - 1).long()
        start, stop = offsets.gather(1, first), offsets.gather(1, last + 1)
        empty = first > last
        return cls._of(start.masked_fill(empty, 0), stop.masked_fill(empty, 0))

    @classmethod
    def from_boundary(cls, boundary: Tensor, window: int | None = None) -> KeyRanges:
        """Return ranges of all keys before a boundary, as of frames that came before each token.

        Parameters
        ----------
        boundary : Tensor
            Integer [B, T]: the number of keys before each token.
        window : int, optional
            See no more than the last ``window`` of them. Default: all.

        Raises
        ------
        TypeError, ValueError
            ``boundary`` is not such a tensor, or ``window`` no integer of at least 1.
        """
        _require_integers("boundary", boundary, "[B, T]", 2)
        stop = boundary.long().clamp(0, _MOST_KEYS)
        if window is None:
            return cls._of(torch.zeros_like(stop), stop)
        _require_count("window", window, 1)
        return cls._of((stop - min(window, _MOST_KEYS)).clamp(min=0), stop)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tokens: int) -> KeyRanges:
        """Return ranges of documents that are packed in one row: a token sees its document's keys.

        Parameters
        ----------
        cu_seqlens_q, cu_seqlens_k : Tensor
            Integer [N + 1]: where the tokens and the keys of each of the N documents start, and
            where those of the last one end.
        tokens : int
            T, of the row. Tokens outside all documents see nothing.

        Raises
        ------
        TypeError, ValueError
            The offsets are not such tensors, of one length, or fall or are negative (seen on the
            CPU only), or ``tokens`` is no count.
        """
        for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            _require_integers(name, offsets, "[N + 1]", 1)
        if cu_seqlens_q.shape != cu_seqlens_k.shape or len(cu_seqlens_q) == 0:
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must have one length N + 1, got "
                f"{len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
            )
        for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            _require_rising(name, offsets)
        _require_count("tokens", tokens)
        position = torch.arange(tokens, device=cu_seqlens_q.device)
        document = torch.searchsorted(cu_seqlens_q.long(), position, right=True) - 1
        offsets = F.pad(cu_seqlens_k.long(), (1, 1))  # before the first document, after the last
        outside = (document < 0) | (document >= cu_seqlens_k.shape[0] - 1)
        start, stop = offsets[document + 1], offsets[document + 2]
        return cls._of(*(bound.masked_fill(outside, 0)[None] for bound in (start, stop)))

    @classmethod
    def packed(cls, documents: Sequence[KeyRanges], keys: Sequence[int]) -> KeyRanges:
        """Return the ranges of documents whose tokens, and whose keys, are packed end to end.

        Parameters
        ----------
        documents : sequence of KeyRanges
            [B, T] each, with one B.
        keys : sequence of int
            The number of keys of each document.

        Raises
        ------
        TypeError, ValueError
            There are no documents, not as many as numbers of keys, documents of different B, or
            what is no document or no number of keys.
        """
        if len(documents) != len(keys) or not documents:
            raise ValueError(
                f"packed needs documents, and one number of keys for each: got {len(documents)} "
                f"documents and {len(keys)} numbers of keys"
            )
        for number, (ranges, count) in enumerate(zip(documents, keys, strict=True)):
            if not isinstance(ranges, KeyRanges):
                raise TypeError(
                    f"documents[{number}] must be KeyRanges, got {type(ranges).__name__}"
                )
            _require_count(f"keys[{number}]", count)
        if any(ranges.shape[0] != documents[0].shape[0] for ranges in documents):
            shapes = ", ".join(str(tuple(ranges.shape)) for ranges in documents)
            raise ValueError(f"documents must have one number of rows B, got [B, T] of {shapes}")
        starts, stops, before = [], [], 0
        for ranges, count in zip(documents, keys, strict=True):
            start, stop = (
                bound.long().clamp(0, min(count, _MOST_KEYS))
                for bound in (ranges.start, ranges.stop)
            )
            starts.append(start + before)
            stops.append(stop + before)
            before += count
        return cls._of(torch.cat(starts, 1), torch.cat(stops, 1))

    @classmethod
    def from_mask(cls, mask: Tensor) -> KeyRanges:
        """Return the ranges of a mask, which is read: not for every step.

        Parameters
        ----------
        mask : Tensor
            bool [B, T, S], True where a token sees a key.

        Raises
        ------
        TypeError
            ``mask`` is no such tensor.
        ValueError
            The keys of a token are not contiguous; the message names the first such token.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 3:
            shape = f" {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
            got = f"{checks.describe(mask)}{shape}"
            raise TypeError(f"mask must be a bool tensor [B, T, S], got {got}")
        seen = mask.sum(-1)
        if mask.shape[-1] == 0:
            return cls._of(seen, seen)
        as_bytes = mask.view(torch.uint8)  # there is no argmax of bool
        start = as_bytes.argmax(-1)
        stop = mask.shape[-1] - as_bytes.flip(-1).argmax(-1)
        wrong = (seen > 0) & (stop - start != seen)
        if bool(wrong.any()):
            row, token = wrong.nonzero()[0].tolist()
            first, end = int(start[row, token]), int(stop[row, token])
            hole = first + int(as_bytes[row, token, first:end].argmin())
            raise ValueError(
                f"the keys of row {row}, token {token} are not contiguous: it sees {first} and "
                f"{end - 1} but not {hole}"
            )
        empty = seen == 0
        return cls._of(start.masked_fill(empty, 0), stop.masked_fill(empty, 0))

    @classmethod
    def _of(cls, start: Tensor, stop: Tensor) -> KeyRanges:
        # What lies beyond int32 lies beyond all keys: it must not wrap around.
        return cls(*(bound.clamp(0, _MOST_KEYS).to(torch.int32) for bound in (start, stop)))

    def check(self, keys: int) -> None:
        """Raise ValueError unless every range lies in ``0..keys``; it names row and token.

        It reads the ranges, for which a GPU must finish all that came before: for who takes ranges
        from others, at the boundary of a model.
        """
        _require_count("keys", keys)
        beyond = self.stop > min(keys, _MOST_KEYS)  # int32 takes no other number
        wrong = (self.start < 0) | beyond | (self.start > self.stop)
        if bool(wrong.any()):
            row, token = wrong.nonzero()[0].tolist()
            start, stop = int(self.start[row, token]), int(self.stop[row, token])
            raise ValueError(
                f"row {row}, token {token} sees keys {start}..{stop - 1} (start {start}, stop "
                f"{stop}): a range must have 0 <= start <= stop <= {keys}, the number of keys"
            )

    def newest(self, tokens: int) -> KeyRanges:
        """Return the ranges of the last ``tokens`` tokens of each row, as a decoding step needs.

        ValueError if there are not as many.
        """
        first = first_of_newest(self.shape[1], tokens)
        return KeyRanges(self.start[:, first:], self.stop[:, first:])

    def visible(self, keys: int) -> Tensor:
        """Return bool [B, T, keys]: whether token t sees key s."""
        return self.spans.visible(keys)


def _require_integers(name: str, tensor: object, layout: str, ndim: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in checks.INTEGERS:
        raise TypeError(f"{name} must be an integer tensor {layout}, got {checks.describe(tensor)}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")


def _require_count(name: str, value: int, least: int = 0) -> None:
    # Not "no int": in a recorded program a size is another type.
    if isinstance(value, (bool, float)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value}")


def _require_rising(name: str, offsets: Tensor) -> None:
    if not checks.may_read(offsets):
        return
    offsets = offsets.long()
    falls = offsets[1:] < offsets[:-1]
    if bool((offsets[:1] < 0).any()):
        raise ValueError(f"{name}[0] is {int(offsets[0])}, a negative number")
    if bool(falls.any()):
        place = int(falls.nonzero()[0])
        before, after = offsets[place : place + 2].tolist()
        raise ValueError(f"{name} must not fall: [{place}] is {before}, [{place + 1}] is {after}")
