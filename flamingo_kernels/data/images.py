"""From pictures and clips to normalised pixel values, and from ragged rows to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flamingo_kernels.data import bounds
from flamingo_kernels.data.decode import count_frames, open_picture
from flamingo_kernels.data.files import DataFile

if TYPE_CHECKING:
    from PIL.Image import Image

Channels = tuple[float, float, float]

# Statistics of ImageNet, which the published NFNets were trained with.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
FITS = ("pad", "crop")
_LONGEST_STRIP = 16  # the longer side over the shorter


def load_image(path: str | PathLike) -> Image:
    """Return the picture in a file, in RGB, turned as its EXIF data say.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ImportError
        Pillow is missing.
    ValueError
        It is of a format that is not read (BMP, GIF, JPEG, PNG, PPM, TIFF and WebP are), Pillow
        cannot decode it (it may be truncated), it is grey of more than 16 bits, or it has more
        pixels or frames than ``data.bounds`` allows.
    """
    return load_frames(path, 1)[0]


def load_frames(
    source: str | PathLike | bytes | DataFile, frames: int, name: str | None = None
) -> list[Image]:
    """Return ``frames`` pictures in RGB, spread over an animated picture, or a still repeated.

    Parameters
    ----------
    source : path, bytes or DataFile
        A file, its contents, or a file that a data set names.
    frames : int
        Number of pictures; see :func:`sample_frames`.
    name : str or None
        What errors call the picture; None: its path.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As :func:`load_image`, and as :meth:`flamingo_kernels.data.files.DataFile.read`.
    """
    if isinstance(source, DataFile):
        name, source = name or source.name, source.read()
    try:
        with open_picture(source) as image:
            chosen = sample_frames(count_frames(image), frames)
            pictures = dict.fromkeys(chosen, image)  # repeated ones are decoded once
            bounds.CLIP.check(len(pictures) * image.width * image.height, "the clip")
            for index in pictures:
                image.seek(index)
                image.load()
                pictures[index] = _rgb(_upright(image))
            return [pictures[index] for index in chosen]
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        what = name or (f"of {len(source)} bytes" if isinstance(source, bytes) else source)
        raise ValueError(f"cannot decode the image {what}: {error}") from error


def _upright(image: Image) -> Image:
    """Turn a decoded picture as its EXIF data say; those that cannot be read say nothing."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except SyntaxError:  # Pillow's word for a damaged header
        return image


def to_pixel_values(
    image: Image,
    size: int,
    *,
    mean: Channels | None = IMAGE_MEAN,
    std: Channels | None = IMAGE_STD,
    fit: str = "pad",
) -> Tensor:
    """Return a Pillow image of any size as pixel values, fp32 [3, size, size].

    Parameters
    ----------
    image : Image
        Of any mode. The upper 8 bits of 16-bit grey are used.
    size : int
        Pixels on a side; an encoder's ``image_size``.
    mean, std : three floats
        An encoder's ``image_mean`` and ``image_std``. Default: those of ImageNet. None, which an
        encoder has where they are not known, is an error.
    fit : {"pad", "crop"}
        ``pad`` fits the longer side, and pads with the mean, which is 0 after normalisation
        (Flamingo, appendix B.1.2). ``crop`` fits the shorter side, bicubic, and cuts out the centre
        (CLIP and OpenFlamingo).

    Raises
    ------
    ValueError
        Unknown ``fit``, unknown statistics, an image without pixels, or grey of more than 16 bits.
    """
    if fit not in FITS:
        raise ValueError(f"unknown fit {fit!r}; known: {', '.join(FITS)}")
    check_statistics(mean, std)
    if 0 in image.size:
        raise ValueError(f"the image has no pixels: its size is {image.size}")
    side = max(image.size) if fit == "pad" else min(image.size)
    if fit == "crop" and max(image.size) > _LONGEST_STRIP * side:
        # Only the middle is kept, so the rest of a long strip need not be resized.
        width, height = (min(length, _LONGEST_STRIP * side) for length in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    width, height = (max(1, round(length * size / side)) for length in image.size)
    resized = _rgb(image).resize((width, height))
    if fit == "crop":
        left, top = (width - size) // 2, (height - size) // 2
        resized = resized.crop((left, top, left + size, top + size))
        width = height = size
    pixels = np.asarray(resized, dtype=np.float32) / 255
    offset, scale = (np.asarray(c, np.float32) for c in (mean, std))
    normalised = (pixels - offset) / scale
    top, left = (size - height) // 2, (size - width) // 2
    canvas = np.zeros((3, size, size), dtype=np.float32)
    canvas[:, top : top + height, left : left + width] = normalised.transpose(2, 0, 1)
    return torch.from_numpy(canvas)


def check_statistics(mean: Channels | None, std: Channels | None) -> None:
    """Raise ValueError where the statistics of an encoder are not known."""
    if mean is None or std is None:
        raise ValueError(
            "how this vision encoder wants its pixels normalised is not known: put a "
            "preprocessor_config.json with image_mean and image_std into its folder, or give both "
            "to flamingo_kernels.vision.wrap_vision_encoder"
        )


def _rgb(image: Image) -> Image:
    """Convert to 8 bits per channel. Pillow's own conversion clips 16-bit grey to white."""
    if image.mode == "F":
        raise ValueError("the image is of mode F, floats of unknown range: convert it to L first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        import PIL.Image

        values = np.asarray(image)
        if values.size and not 0 <= values.min() <= values.max() < 2**16:
            raise ValueError(
                f"the image is grey of {values.min()} to {values.max()}, outside 16 bits: convert "
                "it to L first"
            )
        image = PIL.Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def sample_frames(available: int, frames: int) -> list[int]:
    """Return the indices of ``frames`` frames, spread evenly over ``available`` ones.

    The clip is divided into ``frames`` equal stretches, and the middle of each is taken. A short
    clip repeats frames.
    """
    if available < 1 or frames < 1:
        raise ValueError(f"a clip needs frames: {available} available, {frames} wanted")
    return [int((i + 0.5) * available / frames) for i in range(frames)]


def stack_media(rows: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Pad ragged rows of images and clips into arguments of ``FlamingoModel``.

    Parameters
    ----------
    rows : sequence of sequences of Tensor
        The images [3, H, W] and clips [F, 3, H, W] of each row of the batch, all of one size.

    Returns
    -------
    dict
        ``pixel_values`` [B, I, F, 3, H, W], padded with zeros, ``num_images`` int64 [B] and
        ``num_frames`` int64 [B, I]. Empty if no row has an image.

    Raises
    ------
    ValueError
        An image or clip has another shape; the message names its row.
    """
    clips = [[m[None] if m.ndim == 3 else m for m in row] for row in rows]
    every = [clip for row in clips for clip in row]
    if not every:
        return {}
    for row, of_row in enumerate(clips):
        for clip in of_row:
            if clip.ndim != 4 or clip.shape[1:] != every[0].shape[1:]:
                raise ValueError(
                    f"row {row} has media of shape {tuple(clip.shape)}; all must be "
                    f"[F, {', '.join(map(str, every[0].shape[1:]))}]"
                )
    slots, frames = max(map(len, clips)), max(map(len, every))
    pixels = every[0].new_zeros(len(rows), slots, frames, *every[0].shape[1:])
    counts = torch.ones(len(rows), slots, dtype=torch.int64)
    for row, of_row in enumerate(clips):
        for slot, clip in enumerate(of_row):
            pixels[row, slot, : len(clip)] = clip
            counts[row, slot] = len(clip)
    return {
        "pixel_values": pixels,
        "num_images": torch.tensor([len(row) for row in rows]),
        "num_frames": counts,
    }
