"""Shards: which files they are, records from any place, and damage that says so."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from flamingo_kernels.data.shards import BrokenShardError, find_shards, read_shard
from testing.shard_files import write_lines, write_tar


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_tar_shard_is_read_from_any_record(name: str, tmp_path: Path) -> None:
    members = {
        "d/x.1.png": b"1",
        "d/x.json": b"{}",
        "d/x.pyd": b"pickle",
        "d/.hidden": b"",
        f"d/{'y' * 120}.txt": b"long name",
        "e/x.JPG": b"same name, other folder",
    }
    path = write_tar(tmp_path / name, members, "w:gz" if name.endswith("gz") else "w")
    records = list(read_shard(path))
    assert [sorted(r.fields) for r in records] == [["1.png", "json"], ["txt"], ["jpg"]]
    assert records[0].key == "d/x" and records[2].fields["jpg"] == b"same name, other folder"
    for i, record in enumerate(records):
        assert list(read_shard(path, record.offset)) == records[i:]
        assert list(read_shard(path, record.end)) == records[i + 1 :]


def test_json_lines(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"b": "é"}])
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(Path(plain).read_bytes() + b"\n")
    for path in (plain, str(tmp_path / "b.jsonl.gz")):
        records = list(read_shard(path))
        assert [json.loads(r.fields["json"]) for r in records] == [{"a": 1}, {"b": "é"}]
        assert list(read_shard(path, records[1].offset)) == records[1:]
    assert find_shards([str(tmp_path / "*"), plain]) == [plain, str(tmp_path / "b.jsonl.gz")]
    with pytest.raises(FileNotFoundError, match=r"no shard matches '.*none\.tar'"):
        find_shards([str(tmp_path / "none.tar")])
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.parquet is no shard: known are \.tar, "):
        find_shards([str(tmp_path / "*")])


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_byte_order_marks_of_lines(suffix: str, tmp_path: Path) -> None:
    """Also between lines, where files with marks were put together."""
    path = tmp_path / f"a.{suffix}"

    def write(data: bytes) -> None:
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)

    write('\ufeff{"a": "é"}\r\n\ufeff{"a": "b"}\n'.encode())
    records = list(read_shard(str(path)))
    assert [json.loads(r.fields["json"]) for r in records] == [{"a": "é"}, {"a": "b"}]
    assert list(read_shard(str(path), records[1].offset)) == records[1:]
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        write('\ufeff{"a": 1}\n'.encode(encoding))
        with pytest.raises(BrokenShardError, match="in UTF-16 or UTF-32: write them in UTF-8"):
            list(read_shard(str(path)))


def test_a_shard_is_found_once_and_by_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = write_lines(tmp_path / "a[1].jsonl", [{"a": 1}])
    assert find_shards(["a[1].jsonl", "./a[1].jsonl", "*.jsonl", plain]) == ["a[1].jsonl"]


def test_a_member_again_begins_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for text in (b"first", b"second"):
            for name, data in (("0.png", b"picture"), ("0.txt", text)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    assert [record.fields["txt"] for record in read_shard(str(path))] == [b"first", b"second"]


@pytest.mark.parametrize("name", ["1.png", "1.dat"])
@pytest.mark.parametrize("size", [-512, 2**50, 2**63, 2**70])
def test_a_member_of_a_damaged_size_says_so(size: int, name: str, tmp_path: Path) -> None:
    """The size is in base 256, and the header's checksum is correct."""
    header = bytearray(tarfile.TarInfo(name).tobuf())
    header[124:136] = (
        b"\x80" + size.to_bytes(11, "big") if size > 0 else size.to_bytes(12, "big", signed=True)
    )
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = Path(write_tar(tmp_path / "a.tar", {"0.txt": b"good"}))
    path.write_bytes(path.read_bytes()[:1024] + header + bytes(4096))
    records = read_shard(str(path))
    with pytest.raises(BrokenShardError, match=r"a\.tar"):
        for record in records:
            assert record.key in "01"


@pytest.mark.parametrize("cut", [0.3, 0.55, 0.7])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_truncated_shards_say_so(suffix: str, cut: float, tmp_path: Path) -> None:
    members = {f"{i}.txt": bytes(range(256)) * 9 for i in range(20)}
    path = Path(write_tar(tmp_path / f"a{suffix}", members, "w:gz" if "gz" in suffix else "w"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut) + 77])
    with pytest.raises(BrokenShardError, match=r"a\.tar"):
        list(read_shard(str(path)))


def test_damaged_headers_and_missing_files_say_so(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "a.tar", {f"{i}.txt": b"x" for i in range(4)}))
    data = bytearray(path.read_bytes())
    data[2 * 1024 : 2 * 1024 + 512] = b"\x07" * 512
    path.write_bytes(data)
    found = []
    with pytest.raises(BrokenShardError, match="damaged header at byte 2048"):
        for record in read_shard(str(path)):
            found.append(record.key)
    assert found == ["0", "1"]
    with pytest.raises(BrokenShardError, match=r"none\.tar: .*No such file"):
        list(read_shard(str(tmp_path / "none.tar")))
