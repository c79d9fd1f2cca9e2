"""Shards and streams: each record once, disjoint shares, exact resumption, nothing fatal."""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import tarfile
from pathlib import Path

import pytest
import torch

from flamingo_kernels.data.shards import BrokenShardError, find_shards, read_shard
from flamingo_kernels.data.stream import BatchLoader, SampleStream
from testing.shard_files import (
    TOKENS,
    builder,
    numbered_pairs,
    picture_bytes,
    write_lines,
    write_tar,
)

pytest.importorskip("PIL.Image")


def text(sample) -> str:
    return TOKENS.decode(sample.input_ids)


def make_stream(paths: list[str], part: int = 0, parts: int = 1, shuffle: int = 4) -> SampleStream:
    return SampleStream(paths, builder("pairs"), seed=3, shuffle=shuffle, part=part, parts=parts)


def take(stream, count: int) -> list[str]:
    return [text(sample) for sample in itertools.islice(stream, count)]


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
    """Sizes in base 256 under a correct checksum."""
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


@pytest.mark.parametrize("shuffle", [1, 4, 100])
def test_an_epoch_has_every_record_once(shuffle: int, tmp_path: Path) -> None:
    paths = numbered_pairs(tmp_path, 3, 5)
    everything = {f"{shard}.{record}" for shard in range(3) for record in range(5)}
    stream = make_stream(paths, shuffle=shuffle)
    first, second = take(stream, 15), take(stream, 15)
    assert set(first) == set(second) == everything
    assert first != second
    if shuffle == 1:  # shards in random order, records in theirs
        assert all(first[i : i + 5] == sorted(first[i : i + 5]) for i in (0, 5, 10))
    else:
        assert first[:5] != sorted(first[:5])


def test_readers_get_disjoint_shards_that_cover_all(tmp_path: Path) -> None:
    paths = numbered_pairs(tmp_path, 5, 2)
    shares = [set(take(make_stream(paths, part, 2), count)) for part, count in ((0, 6), (1, 4))]
    assert not shares[0] & shares[1] and len(shares[0] | shares[1]) == 10
    with pytest.raises(ValueError, match=r"5 shard\(s\) for 6 readers"):
        make_stream(paths, 0, 6)


@pytest.mark.parametrize("taken", [0, 1, 7, 13, 14, 15, 31])
def test_resumed_to_the_sample(taken: int, tmp_path: Path) -> None:
    paths = numbered_pairs(tmp_path, 3, 5)
    stream = make_stream(paths)
    take(stream, taken)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = make_stream(paths)
    resumed.load_state_dict(state)
    assert take(resumed, 20) == take(stream, 20)
    assert resumed.state_dict() == stream.state_dict()


def test_a_position_of_other_data_is_refused(tmp_path: Path) -> None:
    paths = numbered_pairs(tmp_path, 2, 5)
    stream = make_stream(paths)
    take(stream, 2)
    state = stream.state_dict()
    with pytest.raises(ValueError, match=r"saved with readers \[0, 1\], now \[1, 2\]"):
        make_stream(paths, 1, 2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"with 2 shard\(s\) \w+, now there are 1 shard\(s\)"):
        make_stream(paths[:1]).load_state_dict(state)
    for path in map(Path, paths):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"has no record at byte .* the data has changed"):
        make_stream(paths).load_state_dict(state)
    Path(paths[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 shard\(s\) .*: the data has changed"):
        make_stream(paths).load_state_dict(state)


def test_a_reader_goes_on_while_other_shards_are_good(tmp_path: Path) -> None:
    """Of two readers each has epochs of broken shards alone."""
    paths = numbered_pairs(tmp_path, 2, 5)
    for name in ("torn", "empty"):
        (tmp_path / f"{name}.tar").write_bytes(b"not a tar")
        paths.append(str(tmp_path / f"{name}.tar"))
    for part in range(2):
        stream = make_stream(paths, part, 2)
        assert len(take(stream, 60)) == 60
        assert stream.skipped["broken shard"] > 1
    with pytest.raises(ValueError, match=r"no usable sample in any of 2 shard"):
        next(make_stream(paths[2:], 0, 2))


def test_an_error_of_a_worker_is_one_line(tmp_path: Path) -> None:
    empty = write_tar(tmp_path / "a.tar", {})
    make = functools.partial(SampleStream, [empty], builder("pairs"))
    loader = BatchLoader(lambda part, parts: make(part=part, parts=parts), 2, 0, workers=1)
    with pytest.raises(ValueError, match=r"^ValueError: no usable sample in any of 1 shard.*$"):
        next(loader)


def test_what_is_broken_is_skipped_counted_and_reported(tmp_path: Path, caplog) -> None:
    pairs = {
        "0.png": picture_bytes(),
        "0.txt": b"good",
        "1.png": b"no picture",
        "1.txt": b"bad image",
        "2.json": b"{",
        "3.txt": b"no image",
        "4.png": picture_bytes(),
    }
    good = write_tar(tmp_path / "a.tar", pairs)
    torn = tmp_path / "b.tar"
    torn.write_bytes(b"not a tar")
    stream = SampleStream([good, str(torn)], builder("pairs"))
    assert take(stream, 2) == ["good", "good"]
    expected = {
        "broken image": 1,
        "no image": 2,
        "broken record": 1,
        "broken shard": 1,
        "no text": 1,
    }
    # The second sample is of a second epoch, which has met some of them again.
    first = {"broken image", "no image", "broken record", "broken shard", "no text"}
    assert set(stream.skipped) == first
    assert all(expected[r] <= stream.skipped[r] <= 2 * expected[r] for r in first)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 5 and any("b.tar" in message for message in messages)


def test_datasets_without_a_sample_are_an_error(tmp_path: Path) -> None:
    empty = write_tar(tmp_path / "a.tar", {})
    with pytest.raises(ValueError, match=r"no usable sample in any of 1 shard.*nothing"):
        next(make_stream([empty]))
    only_text = write_tar(tmp_path / "b.tar", {"0.txt": b"a", "1.txt": b"b"})
    with pytest.raises(ValueError, match=r"b\.tar; skipped: \{'no image': 2\}"):
        next(make_stream([only_text]))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_exactly_with_and_without_workers(workers: int, tmp_path: Path) -> None:
    paths = numbered_pairs(tmp_path, 4, 3)

    def loader() -> BatchLoader:
        make = functools.partial(make_stream, paths)
        return BatchLoader(make, 2, TOKENS.pad_token_id, workers=workers)

    before = torch.get_rng_state()
    whole = loader()
    batches = [next(whole) for _ in range(9)]
    assert torch.equal(torch.get_rng_state(), before)
    part = loader()
    for _ in range(3):
        next(part)
    resumed = loader()
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    for expected in batches[3:]:
        batch = next(resumed)
        assert batch.keys() == expected.keys()
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert resumed.state_dict() == whole.state_dict() and resumed.keys == whole.keys
    with pytest.raises(ValueError, match=r"saved with 1 worker\(s\), now 3"):
        BatchLoader(loader().make, 2, 0, workers=3).load_state_dict(
            {"next_worker": 0, "workers": [None]}
        )


def test_ranks_and_workers_together_see_every_record_once(tmp_path: Path) -> None:
    paths = numbered_pairs(tmp_path, 4, 3)
    seen = []
    for rank in range(2):
        loader = BatchLoader(
            functools.partial(make_stream, paths), 3, 0, rank=rank, world_size=2, workers=2
        )
        for _ in range(2):
            seen += [TOKENS.decode(row[row != 0]) for row in next(loader)["input_ids"]]
    assert len(seen) == len(set(seen)) == 12
