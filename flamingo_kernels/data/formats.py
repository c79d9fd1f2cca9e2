"""From records of known layouts to documents: text and references to pictures, in order."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo_kernels.data.files import DataFile
from flamingo_kernels.data.shards import IMAGE_SUFFIXES, Record
from flamingo_kernels.fields import shown


class SkipRecordError(Exception):
    """A record gives no sample; skipped records are counted by ``reason``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


BROKEN_RECORD, BROKEN_IMAGE, BROKEN_SHARD = "broken record", "broken image", "broken shard"
NO_IMAGE, NO_TEXT = "no image", "no text"


@dataclass(frozen=True)
class Media:
    """A picture, an animated picture, or the frames of a clip.

    Attributes
    ----------
    name : str
        What errors call it.
    sources : tuple of bytes or DataFile
        The contents of files, or what reads them.
    """

    name: str
    sources: tuple[bytes | DataFile, ...]


@dataclass(frozen=True)
class Document:
    """Text and media in reading order."""

    parts: tuple[str | Media, ...]


def parse_interleaved(record: Record, image_root: Path | None = None) -> Document:
    """Return a web page with its images.

    Two layouts of JSON are recognised by their keys. OBELICS has ``texts`` and ``images``, lists of
    equal length; at each place one of the two has a value. MMC4 has ``text_list`` and
    ``image_info``, whose ``matched_text_index`` is the sentence that the image precedes.

    An image is the name of a file, relative to ``image_root`` or else to the folder of the shard,
    and inside of it.
    In a tar shard it may be a member of the record, by its name or extension. MMC4 may also hold
    the image itself, as ``image_base64``.

    Raises
    ------
    SkipRecordError
        The record has neither layout, or its fields have other types.
    """
    values = _json(record)
    if "texts" in values and "images" in values:
        texts, images = _lists(record, values, "texts", "images")
        if len(texts) != len(images):
            raise _broken(record, f"{len(texts)} texts and {len(images)} images")
        parts: list[str | Media] = []
        for text, image in zip(texts, images, strict=True):
            if image is not None:
                parts.append(_media(record, image, image_root))
            if text is not None:
                parts.append(_text(record, text))
        return Document(tuple(parts))
    if "text_list" in values and "image_info" in values:
        texts, images = _lists(record, values, "text_list", "image_info")
        before: dict[int, list[Media]] = {}
        for image in images:
            place = image.get("matched_text_index") if isinstance(image, dict) else None
            if not isinstance(place, int) or not 0 <= place < len(texts):
                raise _broken(
                    record, f"matched_text_index {shown(place)} of {len(texts)} sentences"
                )
            before.setdefault(place, []).append(_mmc4_image(record, image, image_root))
        parts = []
        for place, text in enumerate(texts):
            # The space between sentences goes to the first of them: none follows an image.
            last = place == len(texts) - 1 or place + 1 in before
            parts += [*before.get(place, ()), _text(record, text) + ("" if last else " ")]
        return Document(tuple(parts))
    raise _broken(record, f"keys {shown(sorted(values))}: neither OBELICS nor MMC4")


def parse_pair(record: Record, image_root: Path | None = None) -> Document:
    """Return an image with its text.

    A record of a tar shard has one picture beside ``txt``, or beside ``json`` with ``caption`` or
    ``text``. A JSON line has the same keys, and ``image``.

    Raises
    ------
    SkipRecordError
        The record lacks an image or a text, or its fields have other types.
    """
    values = _json(record) if "json" in record.fields else {}
    pictures = [e for e in record.fields if e.rpartition(".")[2] in IMAGE_SUFFIXES]
    name = values.get("image") or (pictures[0] if pictures else None)
    if name is None:
        raise SkipRecordError(NO_IMAGE, _place(record))
    return Document((_media(record, name, image_root), _caption(record, values)))


def parse_video(record: Record, image_root: Path | None = None) -> Document:
    """Return a clip with its text; the text is as in :func:`parse_pair`.

    In a tar shard, numbered pictures (``0.jpg``, ``1.jpg``, ...) are frames, and a single picture
    is a still or animated. A JSON line has ``frames`` (a list of names) or ``video`` (one animated
    picture).

    Raises
    ------
    SkipRecordError
        As :func:`parse_pair`.
    """
    values = _json(record) if "json" in record.fields else {}
    if "frames" in values:
        (names,) = _lists(record, values, "frames")
    elif "video" in values:
        names = [values["video"]]
    else:
        names = [e for e in record.fields if e.rpartition(".")[2] in IMAGE_SUFFIXES]
        names.sort(key=lambda e: (not e.split(".")[0].isdigit(), len(e.split(".")[0]), e))
    if not names:
        raise SkipRecordError(NO_IMAGE, _place(record))
    frames = [_media(record, name, image_root) for name in names]
    clip = Media(frames[0].name, tuple(source for frame in frames for source in frame.sources))
    return Document((clip, _caption(record, values)))


PARSERS: dict[str, Callable[[Record, Path | None], Document]] = {
    "interleaved": parse_interleaved,
    "pairs": parse_pair,
    "video": parse_video,
}


def _place(record: Record) -> str:
    return f"{record.shard}, record {record.key}"


def _broken(record: Record, detail: str) -> SkipRecordError:
    return SkipRecordError(BROKEN_RECORD, f"{_place(record)}: {detail}")


def _json(record: Record) -> dict[str, Any]:
    if "json" not in record.fields:
        raise _broken(record, f"no .json among {shown(sorted(record.fields))}")
    try:
        values = json.loads(record.fields["json"])
    except (ValueError, RecursionError) as error:
        raise _broken(record, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise _broken(record, f"a JSON {type(values).__name__}, not an object")
    return values


def _lists(record: Record, values: dict[str, Any], *names: str) -> list[list[Any]]:
    for name in names:
        if not isinstance(values[name], list):
            raise _broken(record, f"{name} is a {type(values[name]).__name__}, not a list")
    return [values[name] for name in names]


def _text(record: Record, value: Any) -> str:
    if not isinstance(value, str):
        raise _broken(record, f"a text is a {type(value).__name__}")
    return value


def _caption(record: Record, values: dict[str, Any]) -> str:
    if "txt" in record.fields:
        return record.fields["txt"].decode("utf-8", errors="replace").strip()
    caption = values.get("caption", values.get("text"))
    if caption is None:
        raise SkipRecordError(NO_TEXT, _place(record))
    return _text(record, caption).strip()


def _mmc4_image(record: Record, image: dict[str, Any], image_root: Path | None) -> Media:
    encoded = image.get("image_base64")
    if encoded is None:
        return _media(record, image.get("image_name"), image_root)
    name = f"{_place(record)}: image_base64"
    try:
        return Media(name, (base64.b64decode(encoded, validate=True),))
    except (binascii.Error, TypeError, ValueError):
        return Media(name, (b"",))  # counted as a broken image where it is decoded


def _media(record: Record, name: Any, image_root: Path | None) -> Media:
    if not isinstance(name, str):
        raise _broken(record, f"the name of an image is {shown(name)}")
    stem = record.key.rpartition("/")[2]
    extension = name.rpartition("/")[2].removeprefix(f"{stem}.").lower()
    if extension in record.fields:
        return Media(f"{_place(record)}: {name}", (record.fields[extension],))
    return Media(name, (DataFile(image_root or Path(record.shard).parent, name),))
