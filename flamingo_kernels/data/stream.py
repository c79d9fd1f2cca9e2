"""Endless shuffled samples and batches of a dataset, resumable to the sample."""

from __future__ import annotations

import hashlib
import itertools
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flamingo_kernels.data import bounds
from flamingo_kernels.data.formats import BROKEN_SHARD, SkipRecordError
from flamingo_kernels.data.samples import Sample, collate, log_first
from flamingo_kernels.data.shards import (
    JSON_LINES_SUFFIXES,
    BrokenShardError,
    Record,
    read_shard,
)
from flamingo_kernels.fields import is_integer

Builder = Callable[[Record, np.random.Generator, Counter], Sample]
_LARGEST = 2**63 - 1


def _is_count(value: Any) -> bool:
    return is_integer(value) and 0 <= value <= _LARGEST


def _is_place(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


# The fields of a position, and what they hold.
_POSITION: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("epoch", "position", "offset", "draws", "made"), _is_count),
    "buffer": lambda value: isinstance(value, list) and all(map(_is_place, value)),
    "skipped": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "readers": _is_place,
    "data": lambda value: isinstance(value, str),
}
_POSITION_OF_LOADER: dict[str, Callable[[Any], bool]] = {
    "next_worker": _is_count,
    "workers": lambda value: (
        isinstance(value, list) and all(of is None or isinstance(of, dict) for of in value)
    ),
}


def _check_fields(state: dict[str, Any], fields: dict[str, Callable[[Any], bool]]) -> None:
    for name, holds in fields.items():
        if name not in state or not holds(state[name]):
            raise ValueError(f"the position's {name} is {reprlib.repr(state.get(name))}")


class _Share(NamedTuple):
    """What one reader reads of a shard: every ``of``-th record from number ``first`` on."""

    shard: int  # index
    first: int = 0
    of: int = 1


class SampleStream:
    """Samples of one reader's part of the shards, epoch after epoch.

    Each epoch visits the shards in another order, and every record once. Where there are fewer of
    them than readers, every reader reads all of a JSON-lines file and takes each n-th line. All
    random draws are functions of the seed and a position, so the position is the whole state.
    Records that wait in the shuffle buffer are named by shard and byte, and are read again on
    resuming.

    Parameters
    ----------
    shards : sequence of str
        Paths, the same for every reader.
    build : callable
        Makes a sample of a record, as ``data.samples.SampleBuilder`` does.
    seed : int
        Of all draws.
    shuffle : int
        Records in the buffer that the next one is drawn from; 1 keeps the order of a shard. Fewer
        where they would take more bytes than ``data.bounds.BUFFER``.
    part, parts : int
        This reader's number, and the number of readers (ranks x workers).

    Attributes
    ----------
    skipped : Counter
        Shards, records and images that were skipped so far, by reason.

    Raises
    ------
    ValueError
        There are fewer shards than readers, none of them JSON lines; or, from ``next``, no shard
        has a usable sample.
    """

    def __init__(
        self,
        shards: Sequence[str],
        build: Builder,
        *,
        seed: int = 0,
        shuffle: int = 1000,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.shards = list(shards)
        self._shares = _shares(self.shards, parts)
        self.build = build
        self.seed = seed
        self.shuffle = max(1, shuffle)
        self.part, self.parts = part, parts
        self.skipped: Counter[str] = Counter()
        self._epoch = self._position = self._offset = 0  # of the next record to read
        self._draws = self._made = 0  # of this run, of this epoch
        self._ordered: tuple[int, list[_Share]] = (-1, [])  # epoch, and its shares
        self._fruitless: set[_Share] = set()  # of the epochs since one gave a sample
        self._data = _fingerprint(self.shards)
        self._buffer: list[tuple[int, Record]] = []
        self._held = 0  # bytes in the buffer
        self._reader: Iterator[Record] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position, of JSON types."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "offset": self._offset,
            "draws": self._draws,
            "made": self._made,
            "buffer": [[shard, record.offset] for shard, record in self._buffer],
            "skipped": dict(self.skipped),
            "readers": [self.part, self.parts],
            "data": self._data,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position ``state``.

        Raises
        ------
        ValueError
            The state is damaged, of another number of readers, or of shards of other names or
            sizes.
        """
        self.check_state(state)
        self._epoch, self._position = state["epoch"], state["position"]
        self._offset = state["offset"]
        self._draws, self._made = state["draws"], state["made"]
        self.skipped = Counter(state["skipped"])
        self._reader = None
        self._buffer = [(shard, self._read_at(shard, at)) for shard, at in state["buffer"]]
        self._held = sum(record.size for _, record in self._buffer)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError as :meth:`load_state_dict` does, without reading a shard."""
        _check_fields(state, _POSITION)
        readers = [self.part, self.parts]
        if state["readers"] != readers:
            raise ValueError(
                f"the position was saved with readers {state['readers']}, now {readers}"
            )
        if state["data"] != self._data:
            raise ValueError(
                f"the position was saved with {state['data']}, now there are {self._data}: the "
                "data has changed since the checkpoint"
            )
        # Between epochs the position is behind the last shard.
        last = max(state["position"] - 1, *(shard for shard, _ in state["buffer"]), 0)
        if last >= len(self.shards):
            raise ValueError(f"the position is in shard {last} of {len(self.shards)}")

    def _read_at(self, shard: int, offset: int) -> Record:
        try:
            record = next(read_shard(self.shards[shard], offset))
        except (BrokenShardError, StopIteration) as error:
            raise ValueError(
                f"{self.shards[shard]} has no record at byte {offset} any more: the data has "
                "changed since the checkpoint"
            ) from error
        return record

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> Sample:
        while True:
            while (
                len(self._buffer) < self.shuffle
                and self._held < bounds.BUFFER.limit
                and (found := self._read()) is not None
            ):
                self._buffer.append(found)
                self._held += found[1].size
            if not self._buffer:
                self._next_epoch()
                continue
            draw = np.random.default_rng([self.seed, self.part, self._draws])
            self._draws += 1
            place = int(draw.integers(len(self._buffer)))
            self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
            shard, record = self._buffer.pop()
            self._held -= record.size
            generator = np.random.default_rng([self.seed, self._epoch, shard, record.offset])
            try:
                sample = self.build(record, generator, self.skipped)
            except SkipRecordError as error:
                log_first(self.skipped, error.reason, str(error))
                continue
            self._made += 1
            return sample

    def _next_epoch(self) -> None:
        # Every epoch gives this reader other shares, and all of one epoch may be broken or empty.
        self._fruitless = set() if self._made else self._fruitless.union(self._order())
        if len(self._fruitless) == len(self._shares):
            raise ValueError(
                f"no usable sample in any of {len(self.shards)} shard(s), first "
                f"{self.shards[self._order()[0].shard]}; skipped: {dict(self.skipped) or 'nothing'}"
            )
        self._epoch += 1
        self._position = self._offset = self._made = 0

    def _order(self) -> list[_Share]:
        """Return this reader's shares in this epoch."""
        if self._ordered[0] != self._epoch:
            order = np.random.default_rng([self.seed, self._epoch]).permutation(len(self._shares))
            own = [self._shares[i] for i in order[self.part :: self.parts]]
            self._ordered = (self._epoch, own)
        return self._ordered[1]

    def _read(self) -> tuple[int, Record] | None:
        """Return the index of a shard and its next record; None after the epoch's last."""
        order = self._order()
        while self._position < len(order):
            shard, first, of = order[self._position]
            if self._reader is None:
                # Except at the start, the record before the offset was one of this share.
                skip = of - 1 if self._offset else first
                records = read_shard(self.shards[shard], self._offset)
                self._reader = itertools.islice(records, skip, None, of)
            try:
                record = next(self._reader, None)
            except BrokenShardError as error:
                log_first(self.skipped, BROKEN_SHARD, str(error))
                record = None
            if record is not None:
                self._offset = record.end
                return shard, record
            self._reader = None
            self._position += 1
            self._offset = 0
        return None


def _shares(shards: Sequence[str], readers: int) -> list[_Share]:
    """Return whole shards, or with fewer of them than readers, pieces of the JSON lines too."""
    shares: list[_Share] = []
    for shard, path in enumerate(shards):
        lines = path.endswith(JSON_LINES_SUFFIXES)
        of = readers if lines and len(shards) < readers else 1
        shares += [_Share(shard, first, of) for first in range(of)]
    if len(shares) < readers:
        raise ValueError(
            f"{len(shards)} shard(s) for {readers} readers (ranks x workers), which get disjoint "
            "ones: write more shards or use fewer workers (only JSON lines are divided)"
        )
    return shares


def _fingerprint(shards: Sequence[str]) -> str:
    """Return the number of shards and a digest of their names and sizes."""
    digest = hashlib.sha256()
    for path in map(Path, shards):
        size = path.stat().st_size if path.exists() else None
        digest.update(f"{path.name} {size};".encode(errors="surrogateescape"))
    return f"{len(shards)} shard(s) {digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class _Batches(IterableDataset):
    """Batches that a worker makes, each with its keys, the worker, and the worker's state after."""

    make: Callable[[int, int], SampleStream]
    batch_size: int
    pad_token_id: int
    first_part: int
    parts: int
    workers: int
    first_worker: int
    states: tuple[dict[str, Any] | None, ...]

    def __iter__(self) -> Iterator[tuple[dict[str, Any], list[str], int, dict[str, Any]]]:
        info = get_worker_info()
        # A DataLoader begins with its worker 0, which takes the place of the next one in turn.
        worker = (self.first_worker + (info.id if info else 0)) % self.workers
        stream = self.make(self.first_part + worker, self.parts)
        if (state := self.states[worker]) is not None:
            stream.load_state_dict(state)
        while True:
            samples = [next(stream) for _ in range(self.batch_size)]
            keys = [sample.key for sample in samples]
            yield collate(samples, self.pad_token_id), keys, worker, stream.state_dict()


class BatchLoader:
    """Collated batches of a dataset, prepared in this process or by workers.

    Parameters
    ----------
    make : callable
        Makes the ``SampleStream`` of a reader from ``part`` and ``parts``.
    batch_size : int
        Rows of a batch.
    pad_token_id : int
        Fills short rows.
    rank, world_size : int
        Of this process; every reader of every rank gets its own shards, or lines.
    workers : int
        Worker processes; 0 prepares batches in this one.

    Attributes
    ----------
    keys : list of str
        The shards and records of the last batch's samples.
    """

    def __init__(
        self,
        make: Callable[[int, int], SampleStream],
        batch_size: int,
        pad_token_id: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        self.make = make
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.keys: list[str] = []  # of the last batch
        self._states: list[dict[str, Any] | None] = [None] * max(1, workers)
        self._next_worker = 0
        self._batches: Iterator[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was returned, of JSON types."""
        return {"next_worker": self._next_worker, "workers": list(self._states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position ``state``.

        Raises
        ------
        ValueError
            The state is damaged, or of another number of workers; or a worker's as
            :meth:`SampleStream.load_state_dict`.
        """
        _check_fields(state, _POSITION_OF_LOADER)
        if len(state["workers"]) != len(self._states):
            raise ValueError(
                f"the position was saved with {len(state['workers'])} worker(s), now "
                f"{len(self._states)}"
            )
        if state["next_worker"] >= len(self._states):
            raise ValueError(f"the position's next_worker is {state['next_worker']}")
        count = len(self._states)
        for worker, of_worker in enumerate(state["workers"]):
            if of_worker is not None:
                stream = self.make(self.rank * count + worker, self.world_size * count)
                stream.check_state(of_worker)
        self._states, self._next_worker = list(state["workers"]), state["next_worker"]
        self._batches = None

    @property
    def skipped(self) -> Counter[str]:
        """Numbers of shards, records and images that were skipped so far, by reason."""
        states = [state for state in self._states if state is not None]
        return sum((Counter(state["skipped"]) for state in states), Counter())

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> dict[str, Tensor | list[str]]:
        if self._batches is None:
            count = len(self._states)
            batches = _Batches(
                self.make,
                self.batch_size,
                self.pad_token_id,
                self.rank * count,
                self.world_size * count,
                count,
                self._next_worker,
                tuple(self._states),
            )
            # A DataLoader without its own generator would draw from the global one.
            self._batches = iter(
                DataLoader(
                    batches,
                    batch_size=None,
                    num_workers=self.workers,
                    collate_fn=_unchanged,
                    generator=torch.Generator().manual_seed(0),
                )
            )
        try:
            batch, self.keys, worker, state = next(self._batches)
        except ValueError as error:
            if not self.workers:
                raise
            # A DataLoader raises the worker's whole traceback as the message.
            raise ValueError(str(error).strip().rpartition("\n")[2]) from error
        self._states[worker] = state
        self._next_worker = (worker + 1) % len(self._states)
        return batch


def _unchanged(value: Any) -> Any:
    return value
