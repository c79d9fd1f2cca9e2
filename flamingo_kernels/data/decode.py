"""The one place that opens pictures: which formats are read, by Pillow."""

from __future__ import annotations

from io import BytesIO
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow knows many more. Some of them start programs: EPS starts Ghostscript, whatever the name of
# the file. Others are decoders that few have looked at.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


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
    ValueError
        The contents are of none of ``FORMATS``. The name of a file does not matter.
    """
    import PIL.Image

    file = BytesIO(source) if isinstance(source, bytes) else source
    try:
        return PIL.Image.open(file, formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}, or its header is damaged") from None
