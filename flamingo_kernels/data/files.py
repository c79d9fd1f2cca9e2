"""Files that a data set names: regular ones, inside its own folder."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from flamingo_kernels.data import bounds

_LONGEST_NAME = 4096  # of a path, in characters


@dataclass(frozen=True)
class DataFile:
    """A file that a record names.

    Data sets come from strangers, and the disk holds more than the data set. So the name may lead
    to a file in ``folder`` or below it, and nowhere else.

    Attributes
    ----------
    folder : Path
        The folder that the name is relative to.
    name : str
        As the record has it.
    """

    folder: Path
    name: str

    def read(self) -> bytes:
        """Return the contents.

        Raises
        ------
        FileNotFoundError, OSError
            There is no such file, or it cannot be read.
        ValueError
            The name leads out of the folder (as an absolute path, by ``..`` or by a link), to what
            is no regular file, is no name of a file, or leads to a file of more bytes than
            ``data.bounds.FILE``.
        """
        if len(self.name) > _LONGEST_NAME:
            raise ValueError(
                f"a name of {len(self.name)} characters is no file's: {self.name[:40]!r}..."
            )
        folder = os.path.realpath(self.folder)
        path = os.path.realpath(os.path.join(folder, self.name), strict=True)
        if not Path(path).is_relative_to(folder):
            raise ValueError(
                f"{self.name!r} lies outside of {self.folder}, the folder of its data set: move it "
                "there, or set image_root to a folder that holds it"
            )
        check_regular(path)
        with open(path, "rb") as file:
            bounds.FILE.check(os.fstat(file.fileno()).st_size, self.name)
            return file.read(bounds.FILE.limit)


def check_regular(path: str | PathLike) -> None:
    """Raise ValueError if ``path`` is a device, a pipe, or a folder; OSError if it is missing."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no regular file")
