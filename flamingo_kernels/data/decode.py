"""The one place that opens pictures: which formats are read, by Pillow, and how large ones."""

from __future__ import annotations

from io import BytesIO
from os import PathLike
from typing import TYPE_CHECKING

from flamingo_kernels.data import bounds

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow knows many more. Some of them start programs: EPS starts Ghostscript, whatever the name of
# the file. Others are decoders that few have looked at.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ANIMATED = ("GIF", "PNG", "WEBP")


def check_pillow() -> None:
    """Raise ImportError if Pillow is missing; it says what to install."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'reading pictures needs Pillow: pip install "flamingo_kernels[hf]" ({error})'
        ) from error


def open_picture(source: str | PathLike | bytes) -> Image:
    """Return an undecoded Pillow image, to be closed by the caller.

    Parameters
    ----------
    source : path or bytes
        A file, or its contents.

    Raises
    ------
    OSError
        There is no such file, or it is damaged.
    ImportError
        Pillow is missing.
    ValueError
        The contents are of none of ``FORMATS`` (the name of a file does not matter), or the
        picture has more pixels or frames than ``data.bounds`` allows.
    """
    check_pillow()
    import PIL.Image

    file = BytesIO(source) if isinstance(source, bytes) else source
    try:
        image = PIL.Image.open(file, formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:  # of twice as many pixels as it warns of
        limit = f"{bounds.__name__}.PIXELS.limit is {bounds.PIXELS.limit:,}"
        raise ValueError(f"{error} {limit}: make the picture smaller") from None
    except PIL.UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}, or its header is damaged") from None
    try:
        pixels = image.width * image.height
        bounds.PIXELS.check(pixels, f"the picture of {image.width} x {image.height}")
        frames = count_frames(image)
        bounds.FRAMES.check(frames, "the picture")
        bounds.ANIMATION.check(frames * pixels, f"the picture of {frames} frames")
    except Exception:
        image.close()
        raise
    return image


def count_frames(image: Image) -> int:
    """Return the frames of an animated picture; 1 for others.

    What else a file may hold (the thumbnail or gain map in a camera's JPEG, further pages of a
    TIFF) is no frame.
    """
    return getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
