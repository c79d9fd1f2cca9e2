"""Checks of the model's inputs: every error names the offending row or value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flamingo_kernels.ops.checks import INTEGERS, describe
from flamingo_kernels.ops.transforms import is_recorded


@dataclass(frozen=True)
class MediaInputs:
    """Checked images, and which of them are real.

    Attributes
    ----------
    pixel_values : Tensor
        Pixels [B, I, F, C, H, W] or features [B, I, F, S, D].
    counts : list of int, or None
        Slots that each row fills; None: all.
    frames : list of list of int, or None
        Real frames of each slot of each row; None: all.
    """

    pixel_values: Tensor
    counts: list[int] | None
    frames: list[list[int]] | None

    @property
    def slots(self) -> int:
        """Media slots I of each row."""
        return self.pixel_values.shape[1]

    def real_frames(self) -> Tensor | None:
        """Return the frames to encode, bool [B, I, F] on the host; None: all of them."""
        if self.counts is None and self.frames is None:
            return None
        batch, slots, frames = self.pixel_values.shape[:3]
        real = torch.ones(batch, slots, frames, dtype=torch.bool)
        if self.counts is not None:
            real &= (torch.arange(slots) < torch.tensor(self.counts)[:, None])[..., None]
        if self.frames is not None:
            real &= torch.arange(frames) < torch.tensor(self.frames).reshape(batch, slots, 1)
        return real


def check_text(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    vocab_size: int,
    cached_tokens: int = 0,
) -> None:
    """Raise TypeError or ValueError unless the tokens and their mask fit together."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"input_ids must be an int64 or int32 tensor [B, T], got {describe(input_ids)}"
        )
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: a batch needs at least one row and one "
            "token"
        )
    _require_values("input_ids", input_ids)
    low, high = (int(value) for value in torch.aminmax(input_ids))
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"input_ids holds {bad}, outside the vocabulary 0..{vocab_size - 1}")
    batch, tokens = input_ids.shape
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"attention_mask must be a tensor, got {describe(attention_mask)}")
        expected = (batch, cached_tokens + tokens)
        if tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"attention_mask must be [B, T] = {expected}"
                + (f" ({cached_tokens} cached + {tokens} new tokens)" if cached_tokens else "")
                + f", got {tuple(attention_mask.shape)}"
            )
        _require_device("attention_mask", attention_mask, input_ids)


def check_labels(labels: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    """Raise TypeError or ValueError unless labels fit checked tokens."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, got {describe(labels)}")
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels must have the shape of input_ids {tuple(input_ids.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    _require_device("labels", labels, input_ids)
    counted = labels[labels != -100]
    if counted.numel():
        low, high = (int(value) for value in torch.aminmax(counted))
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"labels holds {bad}; allowed are -100 (ignored) and 0..{vocab_size - 1}"
            )


def require_left_padding(attention_mask: Tensor | None, purpose: str) -> None:
    """Raise ValueError if a row ends in padding, which leaves nothing to continue."""
    if attention_mask is None:
        return
    padded = attention_mask[:, -1] == 0
    if bool(padded.any()):
        row = int(padded.nonzero()[0])
        raise ValueError(f"row {row} ends in padding; pad prompts on the left to {purpose}")


def check_media(
    input_ids: Tensor,
    image_token_id: int,
    pixel_values: Tensor | None,
    num_images: Tensor | None,
    num_frames: Tensor | None,
) -> MediaInputs | None:
    """Check that the images match the ``<image>`` tokens of each row.

    Returns
    -------
    MediaInputs or None
        None for a batch without images.

    Raises
    ------
    TypeError, ValueError
        Wrong rank, dtype or device; a row with another number of ``<image>`` tokens than images.
    """
    batch = input_ids.shape[0]
    if pixel_values is None:
        for name, value in (("num_images", num_images), ("num_frames", num_frames)):
            if value is not None:
                _require_integers(name, value)
                if bool((value != 0).any()):
                    raise ValueError(f"{name} is given without pixel_values")
        _match_counts(input_ids, image_token_id, [0] * batch)
        return None
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        raise TypeError(
            f"pixel_values must be a floating point tensor, got {describe(pixel_values)}"
        )
    if pixel_values.ndim not in (5, 6):
        raise ValueError(
            "pixel_values must be [B, I, F, C, H, W], or features [B, I, F, S, D], got shape "
            f"{tuple(pixel_values.shape)}"
        )
    if pixel_values.shape[0] != batch:
        raise ValueError(f"pixel_values has {pixel_values.shape[0]} rows, input_ids has {batch}")
    _require_device("pixel_values", pixel_values, input_ids)
    slots, frames = pixel_values.shape[1:3]
    counts = _host_integers("num_images", num_images, (batch,), 0, slots)
    _match_counts(input_ids, image_token_id, counts or [slots] * batch)
    # A padded slot may hold any frame count, including zero.
    frame_counts = _host_integers("num_frames", num_frames, (batch, slots), 0, frames)
    if frame_counts is not None:
        for row, of_row in enumerate(frame_counts):
            for slot, value in enumerate(of_row[: slots if counts is None else counts[row]]):
                if value < 1:
                    raise ValueError(f"num_frames[{row}, {slot}] is {value}; a clip needs a frame")
    if slots and frames == 0:
        raise ValueError(f"pixel_values has no frames: shape {tuple(pixel_values.shape)}")
    if slots and 0 in pixel_values.shape[3:]:
        raise ValueError(f"pixel_values has no pixels: shape {tuple(pixel_values.shape)}")
    return MediaInputs(pixel_values, counts, frame_counts) if slots else None


def _host_integers(
    name: str, value: Tensor | None, shape: tuple[int, ...], low: int, high: int
) -> list | None:
    """Return the values of an integer tensor of ``shape`` within low..high."""
    if value is None:
        return None
    if is_recorded():
        raise ValueError(
            f"{name} is read while tracing, and its values would become constants of the program: "
            "trace rows that fill all slots, without it"
        )
    _require_integers(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    outside = (value < low) | (value > high)
    if bool(outside.any()):
        index = tuple(outside.nonzero()[0].tolist())
        raise ValueError(f"{name}{list(index)} is {int(value[index])}, outside {low}..{high}")
    return value.tolist()


def _require_integers(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be an integer tensor, got {describe(value)}")
    _require_values(name, value)


def _require_values(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta: the model reads it and needs values")


def _match_counts(input_ids: Tensor, image_token_id: int, given: list[int]) -> None:
    tokens = (input_ids == image_token_id).sum(1).tolist()
    for row, (wanted, images) in enumerate(zip(tokens, given, strict=True)):
        if wanted != images:
            raise ValueError(
                f"row {row} has {wanted} <image> token(s) but {images} image(s); give as many "
                "images as tokens, and num_images where rows differ"
            )


def _require_device(name: str, tensor: Tensor, reference: Tensor) -> None:
    if tensor.device != reference.device:
        raise ValueError(f"{name} is on {tensor.device}, input_ids on {reference.device}")
