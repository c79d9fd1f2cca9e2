"""How much of a stranger's file is read and decoded: every bound of the data, in one place.

A shard of a few KiB can name a member of any size, and a picture of a few KiB can have any number
of pixels. What exceeds a bound is skipped and counted as broken.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 2**20


@dataclass
class Bound:
    """The most of something that is read.

    Attributes
    ----------
    name : str
        Of this bound in this module, for errors.
    limit : int
        May be set by who has larger data.
    unit : str
    """

    name: str
    limit: int
    unit: str

    def check(self, amount: int, what: str) -> None:
        """Raise ValueError if ``what`` has more than the limit."""
        if amount > self.limit:
            raise ValueError(
                f"{what} has {amount:,} {self.unit}, more than {self.limit:,}: make it smaller, or "
                f"set {__name__}.{self.name}.limit"
            )


FILE = Bound("FILE", 64 * _MIB, "bytes")  # a picture, or a member of a tar shard
RECORD = Bound("RECORD", 256 * _MIB, "bytes")  # all members of one record, with their headers
HEADER = Bound("HEADER", _MIB, "bytes")  # a tar header with its extensions (long names, holes)
LINE = Bound("LINE", 32 * _MIB, "bytes")  # JSON; parsed, it takes up to 20 times as much memory
TEXT = Bound("TEXT", _MIB, "characters")  # all text of one document
PIXELS = Bound("PIXELS", 89_478_485, "pixels")  # of a picture; where Pillow warns of a bomb
FRAMES = Bound("FRAMES", 20_000, "frames")  # of an animated picture
# Pixels of all frames: those before a frame are decoded to get at it.
ANIMATION = Bound("ANIMATION", 2**32, "pixels in all its frames")
CLIP = Bound("CLIP", 2**28, "pixels")  # of the frames that one clip gives to a sample
BUFFER = Bound("BUFFER", 2048 * _MIB, "bytes")  # records that wait in one shuffle buffer
