"""Records of WebDataset tar shards and JSON-lines files, read as streams from any record on."""

from __future__ import annotations

import glob
import gzip
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from flamingo_kernels.data.files import check_regular

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz")
# Members of a tar shard that are read. Others, such as pickles (.pyd, .pth), are passed over.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
READ_SUFFIXES = ("json", "txt", *IMAGE_SUFFIXES)

# Raised when as many bytes are read as a damaged header says.
_OF_DAMAGED_SIZES = (ValueError, OverflowError, MemoryError)


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
    """

    shard: str
    key: str
    offset: int
    end: int
    fields: dict[str, bytes]


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
        if not path.endswith(TAR_SUFFIXES + JSON_LINES_SUFFIXES):
            raise ValueError(
                f"{path} is no shard: known are {', '.join(TAR_SUFFIXES + JSON_LINES_SUFFIXES)}"
            )
    return sorted(found.values())


def read_shard(path: str, offset: int = 0) -> Iterator[Record]:
    """Yield the records of a shard from the one at byte ``offset`` on.

    Raises
    ------
    BrokenShardError
        The file cannot be opened, is no regular file, is truncated, or is not of the kind that its
        name says.
    """
    read = _read_tar if path.endswith(TAR_SUFFIXES) else _read_lines
    try:
        with _open(path) as file:
            file.seek(offset)
            yield from read(path, file)
    except (OSError, EOFError, tarfile.TarError, zlib.error, *_OF_DAMAGED_SIZES) as error:
        raise BrokenShardError(f"{path}: {error or type(error).__name__}") from error


def _open(path: str) -> BufferedIOBase:
    check_regular(path)
    return gzip.open(path, "rb") if path.endswith(("gz", "tgz")) else open(path, "rb")


def _read_lines(path: str, file: BufferedIOBase) -> Iterator[Record]:
    offset = file.tell()
    for line in file:
        end = offset + len(line)
        if line.strip():
            yield Record(path, f"byte {offset}", offset, end, {"json": line})
        offset = end


def _read_tar(path: str, file: BufferedIOBase) -> Iterator[Record]:
    """Yield records of the members whose names agree up to the first dot of the file name.

    A member whose extension the record already has begins the next record.
    """
    start = key = None
    fields: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
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
                    yield Record(path, "/".join(key).lstrip("/"), start, member.offset, fields)
                start, key, fields = member.offset, (folder, stem), {}
            if extension.rpartition(".")[2] in READ_SUFFIXES:
                fields[extension] = archive.extractfile(member).read()
        end = archive.offset
    if key is not None:
        yield Record(path, "/".join(key).lstrip("/"), start, end, fields)
    # tarfile takes a damaged header for the end of the archive, but the end is a block of zeros.
    file.seek(end)
    if (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {end}: {block[:16]!r}")
