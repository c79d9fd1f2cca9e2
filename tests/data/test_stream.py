"""Streams: each record once, disjoint parts, exact resumption, nothing fatal."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from flamingo_kernels.data.stream import BatchLoader, SampleStream
from testing.shard_files import TOKENS, builder, numbered_pairs, picture_bytes, write_tar

pytest.importorskip("PIL.Image")


def text(sample) -> str:
    return TOKENS.decode(sample.input_ids)


def make_stream(paths: list[str], part: int = 0, parts: int = 1, shuffle: int = 4) -> SampleStream:
    return SampleStream(paths, builder("pairs"), seed=3, shuffle=shuffle, part=part, parts=parts)


def take(stream, count: int) -> list[str]:
    return [text(sample) for sample in itertools.islice(stream, count)]


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


def lines_of(folder: Path, records: int, name: str = "a.jsonl") -> str:
    """Write JSON lines of pairs whose text is their number, with blank lines between them."""
    (folder / "0.png").write_bytes(picture_bytes())
    path = folder / name
    lines = [json.dumps({"image": "0.png", "text": str(i)}) for i in range(records)]
    text = "\n\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return str(path)


@pytest.mark.parametrize("records", [1, 2, 5, 13])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_json_lines_file_is_shared(
    ranks: int, workers: int, records: int, tmp_path: Path
) -> None:
    """Every epoch of all readers together has each record once, resumed or not."""
    make = functools.partial(make_stream, [lines_of(tmp_path, records)])

    def loader(rank: int) -> BatchLoader:
        return BatchLoader(make, 1, 0, rank=rank, world_size=ranks, workers=workers)

    epochs = {epoch: Counter() for epoch in range(3)}
    for rank in range(ranks):
        reader = loader(rank)
        running = set(range(max(1, workers)))
        for i in itertools.count():
            worker = reader.state_dict()["next_worker"]
            if i == 4:  # another process continues
                position, reader = reader.state_dict(), loader(rank)
                reader.load_state_dict(json.loads(json.dumps(position)))
            (row,) = next(reader)["input_ids"]
            epoch = reader.state_dict()["workers"][worker]["epoch"]
            if epoch in epochs:
                epochs[epoch][TOKENS.decode(row[row != 0])] += 1
            else:
                running.discard(worker)
            if not running:
                break
    assert all(seen == {str(i): 1 for i in range(records)} for seen in epochs.values())


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_share_of_lines_is_resumed_to_the_sample(name: str, taken: int, tmp_path: Path) -> None:
    paths = [lines_of(tmp_path, 11, name)]
    for part in range(3):
        stream, resumed = make_stream(paths, part, 3, shuffle=2), make_stream(paths, part, 3)
        take(stream, taken)
        resumed.shuffle = 2
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert take(resumed, 20) == take(stream, 20)


def test_lines_are_divided_only_where_files_are_too_few(tmp_path: Path) -> None:
    lines = [lines_of(tmp_path, 4, f"{i}.jsonl") for i in range(2)]
    tars = numbered_pairs(tmp_path, 2, 3)

    def first_epoch(paths: list[str], parts: int) -> list[list[str]]:
        found = []
        for part in range(parts):
            stream = make_stream(paths, part, parts, shuffle=1)
            samples = itertools.takewhile(lambda _, s=stream: s.state_dict()["epoch"] == 0, stream)
            found.append([sample.key for sample in samples])
        return found

    whole = first_epoch(lines, 2)
    assert [{Path(key.split(": ")[0]).name for key in part} for part in whole] in (
        [{"0.jsonl"}, {"1.jsonl"}],
        [{"1.jsonl"}, {"0.jsonl"}],
    )
    mixed = [key for part in first_epoch(lines + tars, 5) for key in part]
    assert len(mixed) == len(set(mixed)) == 2 * 4 + 2 * 3


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
    """Each of two readers has epochs in which all its shards are broken."""
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
