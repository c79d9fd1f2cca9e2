"""Records of WebDataset tar shards and JSON-lines files, read as streams from any record on."""

from __future__ import annotations

import codecs
import glob
import gzip
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import IO, cast

from flamingo_kernels.data import bounds
from flamingo_kernels.data.files import check_regular

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz")
# Members of a tar shard that are read. Others, such as pickles (.pyd, .pth), are passed over.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
READ_SUFFIXES = ("json", "txt", *IMAGE_SUFFIXES)

# Raised by sizes of damaged headers, and by headers that extend headers without end.
_OF_DAMAGED_HEADERS = (ValueError, OverflowError, MemoryError, RecursionError)
_CHUNK = 2**20


class BrokenShardError(Exception):
    """A shard cannot be read from some record on."""


@dataclass(frozen=True)
class Record:
    """One record of a shard.

    Attributes
    ----------
    shard : str
        Path of the file.
    key : str
        Name of the record in the file.
    offset, end : int
        Where this record and the next one start, in bytes of the uncompressed file.
    fields : dict of str to bytes
        Contents by extension, such as ``{"json": ..., "0.jpg": ...}``. A line of a JSON-lines file
        is ``json``.
    too_large : str
        What was not read because it exceeds one of ``data.bounds``, and which; empty if nothing.
    """

    shard: str
    key: str
    offset: int
    end: int
    fields: dict[str, bytes]
    too_large: str = ""

    @property
    def size(self) -> int:
        """Bytes of all fields."""
        return sum(map(len, self.fields.values()))


def find_shards(patterns: Sequence[str]) -> list[str]:
    """Return the paths that file names and glob patterns match, sorted, each file once.

    Raises
    ------
    FileNotFoundError
        A pattern matches no file.
    ValueError
        A file is neither a tar nor a JSON-lines file by its name.
    """
    found: dict[Path, str] = {}
    for pattern in patterns:
        named = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        paths = [path for path in named if Path(path).is_file()]
        if not paths:
            raise FileNotFoundError(f"no shard matches {pattern!r}")
        for path in paths:
            found.setdefault(Path(path).resolve(), path)
    for path in found.values():
        _check_suffix(path)
    return sorted(found.values())


def _check_suffix(path: str) -> None:
    known = TAR_SUFFIXES + JSON_LINES_SUFFIXES
    if not path.endswith(known):
        raise ValueError(f"{path} is no shard: known are {', '.join(known)}")


def read_shard(path: str, offset: int = 0) -> Iterator[Record]:
    """Yield the records of a shard from the one at byte ``offset`` on.

    What exceeds one of ``data.bounds`` is passed over, unread, and named in its record.

    Raises
    ------
    BrokenShardError
        The file cannot be opened, is no regular file, is truncated, or is not of the kind that its
        name says.
    """
    read = _read_tar if path.endswith(TAR_SUFFIXES) else _read_lines
    try:
        _check_suffix(path)
        with _open(path) as file:
            file.seek(offset)
            yield from read(path, file)
    except (OSError, EOFError, tarfile.TarError, zlib.error, *_OF_DAMAGED_HEADERS) as error:
        raise BrokenShardError(f"{path}: {error or type(error).__name__}") from error


def _open(path: str) -> BufferedIOBase:
    check_regular(path)
    return gzip.open(path, "rb") if path.endswith(("gz", "tgz")) else open(path, "rb")


def _read_lines(path: str, file: BufferedIOBase) -> Iterator[Record]:
    offset = file.tell()
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
    if offset == 0 and file.read(4).startswith(marks):
        raise ValueError("the lines are in UTF-16 or UTF-32: write them in UTF-8")
    file.seek(offset)
    while line := file.readline(bounds.LINE.limit + 1):
        fields, too_large = {"json": line}, ""
        size = len(line)
        if size > bounds.LINE.limit:
            while not line.endswith(b"\n") and (line := file.readline(_CHUNK)):
                size += len(line)
            fields, too_large = {}, _excess(bounds.LINE, size, "the line")
        end = offset + size
        if too_large or line.strip():
            yield Record(path, f"byte {offset}", offset, end, fields, too_large)
        offset = end


def _excess(bound: bounds.Bound, amount: int, what: str) -> str:
    """Return what :meth:`Bound.check` says; empty if all is well."""
    try:
        bound.check(amount, what)
    except ValueError as error:
        return str(error)
    return ""


class _Metered:
    """A file for tarfile, which reads extensions of headers whole, whatever size they claim."""

    def __init__(self, file: BufferedIOBase) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell
        self.begin(bounds.HEADER)

    def begin(self, bound: bounds.Bound) -> None:
        """Allow as many bytes as ``bound`` from here on."""
        self.bound, self.amount = bound, 0

    def read(self, size: int) -> bytes:
        if size < 0:
            raise tarfile.ReadError(f"size {size}")
        self.amount += size
        self.bound.check(self.amount, f"what is at byte {self.tell()}")
        return self.file.read(size)


def _read_tar(path: str, file: BufferedIOBase) -> Iterator[Record]:
    """Yield records of the members whose names agree up to the first dot of the file name.

    A member whose extension the record already has begins the next record.
    """
    start = key = None
    fields: dict[str, bytes] = {}
    too_large, size = "", 0
    metered = _Metered(file)
    with tarfile.open(fileobj=cast("IO[bytes]", metered), mode="r:") as archive:
        while (member := archive.next()) is not None:
            # tarfile would keep every header. Its stub lacks the attribute.
            archive.members = []  # type: ignore[attr-defined]
            if archive.offset <= member.offset:
                raise tarfile.ReadError(f"member of size {member.size} at byte {member.offset}")
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if not stem:
                continue
            extension = extension.lower()
            if key != (folder, stem) or extension in fields:
                if key is not None:
                    name = "/".join(key).lstrip("/")
                    yield Record(path, name, start, member.offset, fields, too_large)
                start, key, fields = member.offset, (folder, stem), {}
                too_large, size = "", 0
            if extension.rpartition(".")[2] in READ_SUFFIXES:
                size += tarfile.BLOCKSIZE + member.size
                too_large = (
                    too_large
                    or _excess(bounds.FILE, member.size, member.name[:80])
                    or _excess(bounds.RECORD, size, "all of the record")
                )
                if not too_large:
                    fields[extension] = _contents(archive, member, metered)
            metered.begin(bounds.HEADER)
        end = archive.offset
    if key is not None:
        yield Record(path, "/".join(key).lstrip("/"), start, end, fields, too_large)
    # tarfile takes a damaged header for the end of the archive, but the end is a block of zeros.
    file.seek(end)
    if (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {end}: {block[:16]!r}")


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo, metered: _Metered) -> bytes:
    metered.begin(bounds.FILE)
    file = archive.extractfile(member)
    assert file is not None  # of a regular member
    return file.read()
