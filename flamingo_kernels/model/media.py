"""From images to the keys and values of the cross-attention layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from flamingo_kernels.model.inputs import MediaInputs
from flamingo_kernels.nn import GatedCrossAttentionBlock, MediaKeyValue, PerceiverResampler


def encode_media(
    vision_encoder: nn.Module,
    resampler: PerceiverResampler,
    inputs: MediaInputs | None,
    batch: int,
    device: torch.device | None = None,
) -> Tensor:
    """Encode and resample images.

    Parameters
    ----------
    vision_encoder : nn.Module
        A ``VisionEncoder``. It is not run on features, and builds a graph only if some of its
        parameters have ``requires_grad``.
    resampler : PerceiverResampler
        Turns the features of each image into latents.
    inputs : MediaInputs or None
        The images; None: no row has any.
    batch : int
        Number of rows B.
    device : torch.device, optional
        Of the result without images (default: that of the resampler, which may be offloaded).

    Returns
    -------
    Tensor
        Latents [B, I, R, dim] in the dtype of the resampler, zero in slots without an image.
    """
    parameter = resampler.latents
    if inputs is None:
        # The resampler runs on nothing, so that its parameters have gradients, zero, and so that
        # processes that wait for each other in it go on waiting for the same ones.
        channels: Any = vision_encoder.output_dim
        return resampler(parameter.new_zeros(batch, 0, 1, 1, channels, device=device))
    if inputs.pixel_values.ndim == 5:
        _refuse_images(inputs, vision_encoder, parameter)
        features = _given_features(inputs, vision_encoder.output_dim, parameter.dtype)
    else:
        features = _encode_frames(vision_encoder, inputs, parameter)
    frames = None
    if inputs.frames is not None:
        frames = torch.tensor(inputs.frames, device=features.device)
    if inputs.counts is None:
        return resampler(features, frames)
    # Resample only the slots that hold an image.
    used = torch.arange(inputs.slots) < torch.tensor(inputs.counts)[:, None]
    rows, slots = (index.to(features.device) for index in used.nonzero(as_tuple=True))
    packed_frames = None if frames is None else frames[rows, slots][None]
    packed = resampler(features[rows, slots][None], packed_frames)[0]
    latents = packed.new_zeros(batch, inputs.slots, *packed.shape[1:])
    return latents.index_put((rows, slots), packed)


def project_media(
    layers: Iterable[GatedCrossAttentionBlock], latents: Tensor
) -> tuple[MediaKeyValue, ...]:
    """Return the keys and values of latents [B, I, R, dim] for each layer."""
    return tuple(layer.project_media(latents) for layer in layers)


def _refuse_images(inputs: MediaInputs, vision_encoder: nn.Module, parameter: Tensor) -> None:
    """Raise ValueError if features [B, I, 3, S, D] may be images [B, I, 3, H, W] with W = D.

    They are features if the encoder gives S tokens, or if frames are counted.
    """
    shape = tuple(inputs.pixel_values.shape)
    side = cast(int | None, vision_encoder.image_size)
    if shape[2] != 3 or shape[4] != vision_encoder.output_dim or inputs.frames is not None:
        return
    if side is None:
        unclear = shape[3] == shape[4]
    else:
        weight = next(vision_encoder.parameters(), parameter)
        with torch.no_grad():
            example = _encode(vision_encoder, weight.new_zeros(1, 3, side, side))
        unclear = shape[3] == side or shape[3] != example.shape[1]
    if unclear:
        raise ValueError(
            f"pixel_values of shape {shape} may be images without the axis of frames: give images "
            "as [B, I, F, C, H, W], which pixel_values[:, :, None] is; with features of 3 frames "
            "give num_frames"
        )


def _given_features(inputs: MediaInputs, channels: int, dtype: torch.dtype) -> Tensor:
    """Return features [B, I, F, S, D] that were given, zero in frames that are padding."""
    features = inputs.pixel_values
    if features.shape[-1] != channels:
        raise ValueError(
            f"features must have {channels} channels, got shape {tuple(features.shape)}"
        )
    features = features.to(dtype)
    real = inputs.real_frames()
    if real is None:
        return features
    return features.masked_fill(~real.to(features.device)[..., None, None], 0)


def _encode_frames(vision_encoder: nn.Module, inputs: MediaInputs, parameter: Tensor) -> Tensor:
    """Return features [B, I, F, S, D] of the real frames, zero in frames that are padding.

    They are in the dtype of ``parameter``, which the encoder's may differ from.
    """
    pixels, dtype = inputs.pixel_values, parameter.dtype
    weights = (p for p in vision_encoder.parameters() if p.is_floating_point())  # not the int8 ones
    weight = next(weights, parameter)
    real = inputs.real_frames()
    # Parameters that were given requires_grad again are trained.
    trained = any(p.requires_grad for p in vision_encoder.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        if real is None:
            features = _encode(vision_encoder, pixels.flatten(0, 2).to(weight.dtype))
            return features.unflatten(0, pixels.shape[:3]).to(dtype)
        index = tuple(i.to(pixels.device) for i in real.nonzero(as_tuple=True))
        images = pixels[index].to(weight.dtype)
        if not len(images):  # not every encoder accepts an empty batch
            images = images.new_zeros(1, *images.shape[1:])
        features = _encode(vision_encoder, images)[: len(index[0])].to(dtype)
        padded = features.new_zeros(*pixels.shape[:3], *features.shape[1:])
        return padded.index_put(index, features)


def _encode(vision_encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the features [N, S, D] of images; ValueError if the encoder gives anything else."""
    features = vision_encoder(images)
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 3 or shape[2] != vision_encoder.output_dim:
        raise ValueError(
            f"the vision encoder {type(vision_encoder).__name__} must return features [N, S, "
            f"{vision_encoder.output_dim}], got {type(features).__name__} of shape {shape}"
        )
    return features
