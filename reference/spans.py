"""Which media items each token sees, read off the tokens one by one."""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY = (0, -1)


def media_spans(
    input_ids: Tensor, image_token_id: int, attend: str = "last", assign: str = "previous"
) -> tuple[Tensor, Tensor]:
    """The inclusive range of media items every token sees.

    Parameters
    ----------
    input_ids : Tensor
        Integers ``[B, T]``.
    image_token_id : int
        The k-th such token of a row starts media item k, and always has media index k itself.
    attend : str
        With k the media index of the token: ``last`` is item k; ``last_group`` the run of adjacent
        images that k belongs to, all of it for text and up to itself for an ``<image>`` token;
        ``previous`` items 0..k.
    assign : str
        Media index of text: ``previous`` takes the nearest image before it, ``next`` the nearest
        one after it (Flamingo A.3.2).

    Returns
    -------
    tuple of Tensor
        ``first`` and ``last``, int32 ``[B, T]``; (0, -1) where nothing is seen.

    Raises
    ------
    ValueError
        For an unknown ``attend`` or ``assign``.
    """
    if attend not in ("last", "last_group", "previous"):
        raise ValueError(f"attend is {attend!r}, not last, last_group or previous")
    if assign not in ("previous", "next"):
        raise ValueError(f"assign is {assign!r}, not previous or next")
    rows = [_row_ranges(row, image_token_id, attend, assign) for row in input_ids.tolist()]
    table = torch.tensor(rows, dtype=torch.int32, device=input_ids.device)
    table = table.reshape(*input_ids.shape, 2)
    return table[..., 0], table[..., 1]


def _row_ranges(
    row: list[int], image_token_id: int, attend: str, assign: str
) -> list[tuple[int, int]]:
    runs = _runs(row, image_token_id)
    ranges = []
    seen = 0
    for token in row:
        is_image = token == image_token_id
        index = seen if is_image or assign == "next" else seen - 1
        seen += is_image
        if not 0 <= index < len(runs):
            ranges.append(EMPTY)
        elif attend == "last":
            ranges.append((index, index))
        elif attend == "previous":
            ranges.append((0, index))
        else:
            start, end = runs[index]
            ranges.append((start, index if is_image else end))
    return ranges


def _runs(row: list[int], image_token_id: int) -> list[tuple[int, int]]:
    """For each item, the first and last item of the run of adjacent images it belongs to."""
    groups: list[int] = []  # length of each run
    for position, token in enumerate(row):
        if token == image_token_id:
            if position > 0 and row[position - 1] == image_token_id:
                groups[-1] += 1
            else:
                groups.append(1)
    runs: list[tuple[int, int]] = []
    for length in groups:
        runs += [(len(runs), len(runs) + length - 1)] * length
    return runs


def key_spans(first: Tensor, last: Tensor, lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The inclusive range of keys every token sees, of items whose keys lie end to end.

    Parameters
    ----------
    first, last : Tensor
        Integers ``[B, T]``, the items that each token sees.
    lengths : list of list of int
        Keys of each item of each row.

    Returns
    -------
    tuple of Tensor
        int32 ``[B, T]``; (0, -1) where no key is seen.
    """
    spans = torch.tensor([EMPTY], dtype=torch.int32, device=first.device).repeat(first.numel(), 1)
    spans = spans.reshape(*first.shape, 2)
    for row, of_row in enumerate(lengths):
        for token, (item, end) in enumerate(
            zip(first[row].tolist(), last[row].tolist(), strict=True)
        ):
            start, count = sum(of_row[:item]), sum(of_row[item : end + 1])
            if count:
                spans[row, token] = torch.tensor([start, start + count - 1])
    return spans[..., 0], spans[..., 1]


def clip_ranges(first: Tensor, last: Tensor, items: int) -> tuple[Tensor, Tensor]:
    """Ranges cut to ``[0, items)``; what is empty stays or becomes empty (first > last)."""
    return first.clamp(min=0), last.clamp(max=items - 1)
