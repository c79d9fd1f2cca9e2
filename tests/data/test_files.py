"""What a record may name on the disk of who trains."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flamingo_kernels.data.files import DataFile
from flamingo_kernels.data.formats import SkipRecordError
from flamingo_kernels.data.shards import BrokenShardError, read_shard
from flamingo_kernels.data.stream import SampleStream
from testing.shard_files import builder, picture_bytes, shade, write_lines, write_tar

pytest.importorskip("PIL.Image")

# Every layout that names a picture: (kind, the record).
LAYOUTS = {
    "pair": ("pairs", lambda name: {"image": name, "caption": "a"}),
    "video": ("video", lambda name: {"video": name, "caption": "a"}),
    "frames": ("video", lambda name: {"frames": [name, name, name], "caption": "a"}),
    "obelics": ("interleaved", lambda name: {"texts": [None, "a"], "images": [name, None]}),
    "mmc4": (
        "interleaved",
        lambda name: {
            "text_list": ["a"],
            "image_info": [{"image_name": name, "matched_text_index": 0}],
        },
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set beside a private picture, with every way from the one to the other."""
    private, data = tmp_path / "private", tmp_path / "data"
    for path in (private, data / "sub", tmp_path / "data-two"):
        path.mkdir(parents=True)
    for path in (private, data, tmp_path / "data-two"):
        (path / "a.png").write_bytes(picture_bytes(70))
    (data / "link.png").symlink_to(private / "a.png")
    (data / "links.png").symlink_to("link.png")
    (data / "out").symlink_to(private)
    (data / "inside.png").symlink_to("sub/../a.png")
    (data / "loop.png").symlink_to("loop.png")
    (data / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(data / "pipe.png")
    return data


OUTSIDE = [
    "../private/a.png",
    "sub/../../private/a.png",
    "{folder}/../private/a.png",
    "{parent}/private/a.png",
    "../data-two/a.png",
    "link.png",
    "links.png",
    "out/a.png",
    "out/../private/a.png",
    "zero.png",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/environ",
]
NO_FILES = ["pipe.png", "sub", "", ".", "loop.png", "gone.png", "a.png\0", "x" * 300, "y/" * 9000]
INSIDE = ["a.png", "./a.png", "sub/../a.png", "{folder}/a.png", "inside.png"]


def sample(shard: str, kind: str, root: Path | None):
    (record,) = read_shard(shard)
    return builder(kind, image_root=root)(record, np.random.default_rng(0), Counter())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["jsonl", "tar"])
@pytest.mark.parametrize("rooted", [False, True], ids=["shard", "root"])
def test_pictures_are_read_in_the_folder_alone(
    layout: str, suffix: str, rooted: bool, folder: Path, tmp_path: Path
) -> None:
    kind, values = LAYOUTS[layout]
    elsewhere = tmp_path / "shards"
    elsewhere.mkdir()
    place = (elsewhere if rooted else folder) / f"s.{suffix}"

    def shard(name: str) -> str:
        path = write_lines(place, [values(name.format(folder=folder, parent=folder.parent))])
        if suffix == "jsonl":
            return path
        return write_tar(place, {"0.json": Path(path).read_bytes()})

    root = folder if rooted else None
    for name in INSIDE:
        assert shade(sample(shard(name), kind, root).media[0]) == 70, name
    for name in OUTSIDE + NO_FILES:
        with pytest.raises(SkipRecordError, match="no image"):
            sample(shard(name), kind, root)


def test_the_error_says_what_to_do(folder: Path) -> None:
    for name in OUTSIDE:
        name = name.format(folder=folder, parent=folder.parent)
        with pytest.raises(ValueError, match=r"lies outside of .*data, .*: move it there, or set"):
            DataFile(folder, name).read()
    for name in ("pipe.png", "sub", ""):
        with pytest.raises(ValueError, match="is no regular file"):
            DataFile(folder, name).read()
    with pytest.raises(ValueError, match="a name of 18000 characters is no file's"):
        DataFile(folder, "y/" * 9000).read()
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        DataFile(folder, "gone.png").read()


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "named").symlink_to(folder)
    assert DataFile(tmp_path / "named", "a.png").read() == picture_bytes(70)
    monkeypatch.chdir(tmp_path)
    assert DataFile(Path("data"), "sub/../a.png").read() == picture_bytes(70)
    monkeypatch.chdir(folder)
    assert DataFile(Path(), "a.png").read() == picture_bytes(70)
    with pytest.raises(ValueError, match="outside"):
        DataFile(Path(), "../private/a.png").read()


def test_links_and_devices_in_a_tar_are_no_pictures(folder: Path, tmp_path: Path) -> None:
    path = folder / "s.tar"
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    with tarfile.open(path, "w") as archive:
        for i, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"{i}.png")
            member.type, member.linkname = kind, str(tmp_path / "private/a.png")
            archive.addfile(member)
    assert list(read_shard(str(path))) == []


def test_a_shard_is_a_regular_file(folder: Path) -> None:
    os.mkfifo(folder / "s.jsonl")
    os.mkfifo(folder / "s.tar")
    for name in ("s.jsonl", "s.tar"):
        with pytest.raises(BrokenShardError, match="is no regular file"):
            next(read_shard(str(folder / name)))


def test_the_picture_elsewhere_is_counted(folder: Path) -> None:
    names = ["a.png", "../private/a.png", "out/a.png"]
    lines = [{"image": name, "caption": "a"} for name in names]
    stream = SampleStream([write_lines(folder / "s.jsonl", lines)], builder("pairs"), shuffle=1)
    for _ in range(2):
        next(stream)
    assert stream.skipped == {"broken image": 2, "no image": 2}
