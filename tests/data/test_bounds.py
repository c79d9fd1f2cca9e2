"""What is larger than a bound is not read: little memory, an error that names it, the rest read."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import subprocess
import tarfile
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flamingo_kernels.data import bounds
from flamingo_kernels.data.formats import SkipRecordError
from flamingo_kernels.data.images import load_frames
from flamingo_kernels.data.shards import BrokenShardError, read_shard
from flamingo_kernels.data.stream import SampleStream
from testing.shard_files import builder, numbered_pairs, picture_bytes, write_lines, write_tar

Image = pytest.importorskip("PIL.Image")

GIB = 2**30
NAMED = r"more than [\d,]+: make it smaller, or set flamingo_kernels\.data\.bounds\.{}\.limit"


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No test may hold more than twice the largest file that is read."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * bounds.FILE.limit + 2**24, f"{peak / 2**20:.0f} MiB"


def too_large(path: str, bound: str, keys: str) -> None:
    """Check that the record ``x`` alone is skipped, and that the error names the bound."""
    found = []
    for record in read_shard(path):
        if record.too_large:
            assert record.size < 2**20
            with pytest.raises(SkipRecordError, match=f"^broken record: .*{NAMED.format(bound)}"):
                builder("pairs")(record, np.random.default_rng(0), Counter())
            found.append("x")
        else:
            found.append(record.fields["txt" if "txt" in record.fields else "json"].decode()[-3:])
    assert "".join(found) == keys


@pytest.mark.parametrize(
    "options", ["--format=gnu", *(f"--sparse-version={v}" for v in "0.0 0.1 1.0".split())]
)
@pytest.mark.parametrize("name", ["1.txt", "1.json", "1.png"])
def test_sparse_members(name: str, options: str, tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar")
    for number in "02":
        (tmp_path / f"{number}.txt").write_text(f"  {number}")
    with (tmp_path / name).open("wb") as file:
        file.truncate(GIB)
    form = [] if "format" in options else ["--format=posix"]
    command = ["tar", "-S", *form, options, "-cf", "a.tar", "0.txt", name, "2.txt"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "a.tar").stat().st_size < 50_000
    too_large(str(tmp_path / "a.tar"), "FILE", "  0x  2")


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz"])
def test_compressed_members(suffix: str, tmp_path: Path) -> None:
    large = bytes(bounds.FILE.limit + 1)
    members = {"0.txt": b"  0", "1.txt": large, "1.png": b"", "1.dat": large, "2.txt": b"  2"}
    too_large(write_tar(tmp_path / f"a.{suffix}", members, "w:gz"), "FILE", "  0x  2")


def test_a_record_of_many_members(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bounds.RECORD, "limit", 6000)
    many = {f"1.{i}.png": b"" for i in range(20)}
    path = write_tar(tmp_path / "a.tar", {"0.txt": b"  0", **many, "2.txt": b"  2"})
    too_large(path, "RECORD", "  0x  2")
    path = write_tar(tmp_path / "b.tar", {"1.0.png": bytes(4000), "1.1.png": bytes(4000)})
    too_large(path, "RECORD", "x")


def extension(kind: bytes, size: int, content: bytes = b"") -> bytes:
    """Return a member that extends the next one's header."""
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse_map_without_end(blocks: int) -> bytes:
    header = bytearray(tarfile.TarInfo("1.txt").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482] = tarfile.GNUTYPE_SPARSE, 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    entry = b"%011o\0%011o\0" % (512, 512)
    return bytes(header) + (entry * 21 + b"\1" + bytes(7)) * blocks


ONE_PAX = b"11 a=bcdef\n"
HEADERS = {
    "pax": extension(tarfile.XHDTYPE, 3 * 2**20, bytes(3 * 2**20)),
    "global pax": extension(tarfile.XGLTYPE, 3 * 2**20, bytes(3 * 2**20)),
    "long name": extension(tarfile.GNUTYPE_LONGNAME, 3 * 2**20, b"x" * 3 * 2**20),
    "claimed pax": extension(tarfile.XHDTYPE, 2**50),
    "claimed name": extension(tarfile.GNUTYPE_LONGNAME, 2**50),
    "negative": extension(tarfile.XHDTYPE, -1024),
    "nested": extension(tarfile.XHDTYPE, len(ONE_PAX), ONE_PAX) * 900,
    "deeply nested": extension(tarfile.XHDTYPE, len(ONE_PAX), ONE_PAX) * 9000,
    "map": sparse_map_without_end(5000),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_extended_headers(kind: str, tmp_path: Path) -> None:
    good = Path(write_tar(tmp_path / "0.tar", {"0.txt": b"0"})).read_bytes()[:1024]
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(good + HEADERS[kind] + good))
    keys = []
    with pytest.raises(BrokenShardError, match=r"a\.tar\.gz: "):
        for record in read_shard(str(path)):
            keys.append(record.key)
    assert keys in ([], ["0"])


@pytest.mark.parametrize("name", ["a.tar.xz", "a.tar.bz2", "a.tar.zst", "a.zip"])
def test_other_compressions_are_no_shards(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BrokenShardError, match=r"is no shard: known are \.tar, \.tar\.gz"):
        next(read_shard(str(tmp_path / name)))


@pytest.mark.parametrize("compression", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_of_another_name_is_not_decompressed(
    compression: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.txt": bytes(2**20)}, compression)
    with pytest.raises(BrokenShardError, match=r"a\.tar: "):
        next(read_shard(path))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_long_lines(suffix: str, end: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    first, last = b'"  0"\n', b'"  2"'
    with (gzip.open if suffix.endswith("gz") else open)(path, "wb") as file:
        file.write(first + b'{"caption": "')
        for _ in range(33):
            file.write(b"a" * 2**20)
        file.write(end + last * len(end))
    records = list(read_shard(str(path)))
    too_large(str(path), "LINE", '0"\nx' + ' 2"' * len(end))
    for i, record in enumerate(records):
        assert list(read_shard(str(path), record.offset)) == records[i:]


def test_what_is_too_large_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture_bytes())
    with (tmp_path / "1.png").open("wb") as file:
        file.write(picture_bytes())
        file.truncate(2**42)
    lines = [
        {"image": "0.png", "text": "good"},
        {"image": "1.png", "text": "a picture of 4 TiB"},
        {"image": "0.png", "text": "a" * (bounds.TEXT.limit + 1)},
    ]
    stream = SampleStream([write_lines(tmp_path / "a.jsonl", lines)], builder("pairs"), shuffle=1)
    next(stream), next(stream)
    assert stream.skipped == {"broken image": 1, "no image": 1, "broken record": 1}


def png(width: int, height: int, frames: int = 0) -> bytes:
    """Return the start of a PNG of any size; with ``frames``, an animated one that claims them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = chunk(b"IHDR", size + b"\1\0\0\0\0")
    control = chunk(b"acTL", frames.to_bytes(4, "big") + bytes(4)) if frames else b""
    return b"\x89PNG\r\n\x1a\n" + header + control + chunk(b"IDAT", zlib.compress(bytes(1000)))


def gif(width: int, height: int, frames: int) -> bytes:
    """Return a GIF whose frames are one pixel each, 15 bytes, in a picture of any size."""
    size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    frame = b"\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    return b"GIF89a" + size + b"\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b"\x3b"


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "bound", "wanted"),
    [
        (png(10_000, 9_000), "PIXELS", 1),
        (png(60_000, 60_000), "PIXELS", 1),
        (b"P6 10000 9000 255\n", "PIXELS", 1),
        (b"P4 2147483647 2147483647\n", "PIXELS", 1),
        (gif(65_535, 65_535, 2), "PIXELS", 1),
        (gif(1, 1, 20_001), "FRAMES", 1),
        (png(8, 8, 2**31 - 1), "FRAMES", 1),
        (gif(9_000, 9_000, 60), "ANIMATION", 1),
        (gif(9_000, 9_000, 4), "CLIP", 4),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_pictures(data: bytes, bound: str, wanted: int) -> None:
    message = rf"cannot decode the image a\.png: .*flamingo_kernels\.data\.bounds\.{bound}\.limit"
    with pytest.raises(ValueError, match=message):
        load_frames(data, wanted, "a.png")


def test_a_still_is_a_clip_whatever_the_number_of_frames() -> None:
    frames = load_frames(gif(3000, 3000, 1), 64)
    assert len(frames) == 64 and all(frame is frames[0] for frame in frames)


def test_frames_in_files_are_bounded_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bounds.CLIP, "limit", 3 * 64 - 1)
    members = {f"x.{i}.png": picture_bytes(i) for i in range(3)}
    path = write_tar(tmp_path / "a.tar", {**members, "x.txt": b"text"})
    (record,) = read_shard(path)
    skipped: Counter[str] = Counter()
    with pytest.raises(SkipRecordError, match="no image"):
        builder("video")(record, np.random.default_rng(0), skipped)
    assert skipped == {"broken image": 1}
    monkeypatch.setattr(bounds.CLIP, "limit", 3 * 64)
    assert builder("video")(record, np.random.default_rng(0), skipped).media[0].shape[0] == 3


def test_the_shuffle_buffer_is_bounded_in_bytes(tmp_path: Path, monkeypatch) -> None:
    paths = numbered_pairs(tmp_path, 2, 8)
    monkeypatch.setattr(bounds.BUFFER, "limit", 4 * len(picture_bytes()))

    def stream() -> SampleStream:
        return SampleStream(paths, builder("pairs"), shuffle=100)

    reader = stream()
    keys = []
    for sample in itertools.islice(reader, 16):
        keys.append(sample.key)
        assert len(reader.state_dict()["buffer"]) <= 4
        again = stream()
        again.load_state_dict(json.loads(json.dumps(reader.state_dict())))
    assert len(set(keys)) == 16 and keys != sorted(keys)
    assert [next(again).key for _ in range(9)] == [next(reader).key for _ in range(9)]
