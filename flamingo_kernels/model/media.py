"""From images to the keys and values of the cross-attention layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flamingo_kernels.model.inputs import MediaInputs
from flamingo_kernels.nn import GatedCrossAttentionBlock, MediaKeyValue
from flamingo_kernels.ops.transforms import is_recorded


@dataclass(frozen=True)
class Media:
    """The images of a batch, before they are projected to keys and values.

    Attributes
    ----------
    latents : Tensor
        [B, I, R, dim]: R of each image. Or [1, K, 1, dim]: of all images of all rows, end to end,
        without what is padding.
    lengths : Tensor, optional
        int64 [B, I], on the host: how many of the K belong to each image. None: R each.
    """

    latents: Tensor
    lengths: Tensor | None = None

    def key_value(self, layer: GatedCrossAttentionBlock) -> MediaKeyValue:
        """Return a layer's keys and values, [B, I, R, Hkv, D], or [B, S, 1, Hkv, D] by lengths.

        S is the largest number of keys of a row. Rows with fewer end in zeros.
        """
        projected = layer.project_media(self.latents)
        if self.lengths is None:
            return projected
        of_rows = self.lengths.sum(1).tolist()
        return MediaKeyValue(*(_padded(x[0], of_rows) for x in projected))


def _padded(packed: Tensor, of_rows: list[int]) -> Tensor:
    """Return [B, S, ...] with rows of these lengths, given [K, ...] that has them end to end."""
    if len(set(of_rows)) == 1:
        return packed.unflatten(0, (len(of_rows), of_rows[0]))
    return pad_sequence(packed.split(of_rows), batch_first=True)


def encode_media(
    vision_encoder: nn.Module,
    connector: nn.Module,
    inputs: MediaInputs | None,
    batch: int,
    device: torch.device | None = None,
    *,
    resample: bool = True,
) -> Media:
    """Encode images, and resample or project their features.

    Parameters
    ----------
    vision_encoder : nn.Module
        A ``VisionEncoder``. It is not run on features, and builds a graph only if some of its
        parameters have ``requires_grad``.
    connector : nn.Module
        A ``PerceiverResampler``, which turns the features of each image into latents, or a
        ``Linear``, which turns each feature into one.
    inputs : MediaInputs or None
        The images; None: no row has any.
    batch : int
        Number of rows B.
    device : torch.device, optional
        Of the result without images (default: that of the connector, which may be offloaded).
    resample : bool
        Whether ``connector`` resamples.

    Returns
    -------
    Media
        In the dtype of the connector. Latents of a resampler are zero in slots without an image.

    Raises
    ------
    ValueError
        A model with a projector is traced.
    """
    parameter = next(connector.parameters())
    if not resample and is_recorded():
        raise ValueError(
            "a model with a projector is not traced: the numbers of keys of its images would be "
            "constants of the program"
        )
    if inputs is None:
        # The connector runs on nothing, so that its parameters have gradients, zero, and so that
        # processes that wait for each other in it go on waiting for the same ones.
        channels: Any = vision_encoder.output_dim
        if resample:
            return Media(connector(parameter.new_zeros(batch, 0, 1, 1, channels, device=device)))
        nothing = connector(parameter.new_zeros(1, 0, 1, channels, device=device))
        return Media(nothing, torch.zeros(batch, 0, dtype=torch.int64))
    if inputs.pixel_values.ndim == 5:
        _refuse_images(inputs, vision_encoder, parameter)
        features = _given_features(inputs, vision_encoder.output_dim, parameter.dtype)
    else:
        features = _encode_frames(vision_encoder, inputs, parameter)
    if not resample:
        return _project_real_frames(connector, features, inputs)
    frames = None
    if inputs.frames is not None:
        frames = torch.tensor(inputs.frames, device=features.device)
    if inputs.counts is None:
        return Media(connector(features, frames))
    # Resample only the slots that hold an image.
    used = torch.arange(inputs.slots) < torch.tensor(inputs.counts)[:, None]
    rows, slots = (index.to(features.device) for index in used.nonzero(as_tuple=True))
    packed_frames = None if frames is None else frames[rows, slots][None]
    packed = connector(features[rows, slots][None], packed_frames)[0]
    latents = packed.new_zeros(batch, inputs.slots, *packed.shape[1:])
    return Media(latents.index_put((rows, slots), packed))


def _project_real_frames(projector: nn.Module, features: Tensor, inputs: MediaInputs) -> Media:
    """Return media of one latent per feature; those of frames that are padding are left out."""
    batch, slots, frames, size = features.shape[:4]
    real = inputs.real_frames()
    if real is None:
        lengths = torch.full((batch, slots), frames * size)
        packed = features.flatten(0, 3)
    else:
        lengths = real.sum(-1) * size
        index = real.flatten().nonzero()[:, 0].to(features.device)
        packed = features.flatten(0, 2)[index].flatten(0, 1)
    return Media(projector(packed[None, :, None]), lengths)


def project_media(
    layers: Iterable[GatedCrossAttentionBlock], media: Media
) -> tuple[MediaKeyValue, ...]:
    """Return the keys and values of media for each layer."""
    return tuple(media.key_value(layer) for layer in layers)


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
