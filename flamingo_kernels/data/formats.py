"""From records of known layouts to documents: text and references to pictures, in order."""

from __future__ import annotations

import base64
import binascii
import codecs
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
    ``text``. A JSON line has the same keys, and ``image``. In a tar shard ``image`` chooses among
    several pictures; one alone is taken, whatever its metadata say.

    Raises
    ------
    SkipRecordError
        The record lacks an image or a text, or its fields have other types.
    """
    values = _json(record) if "json" in record.fields else {}
    pictures, name = _pictures(record), values.get("image")
    if len(pictures) == 1 or (pictures and not isinstance(name, str)):
        member = _member(record, name)
        image = _own(record, pictures[0] if member is None else member)
    elif name:
        image = _media(record, name, image_root)
    else:
        raise SkipRecordError(NO_IMAGE, _place(record))
    return Document((image, _caption(record, values)))


def parse_video(record: Record, image_root: Path | None = None) -> Document:
    """Return a clip with its text; the text is as in :func:`parse_pair`.

    In a tar shard, numbered pictures (``0.jpg``, ``1.jpg``, ...) are frames, and a single picture
    is a still or animated. A JSON line has ``frames`` (a list of names) or ``video`` (one animated
    picture). In a tar shard these choose among the pictures, if they name some.

    Raises
    ------
    SkipRecordError
        As :func:`parse_pair`.
    """
    values = _json(record) if "json" in record.fields else {}
    pictures = _pictures(record)
    names = values.get("frames")
    if names is None:
        names = [] if values.get("video") is None else [values["video"]]
    members = [_member(record, name) for name in names] if isinstance(names, list) else []
    if pictures and (not members or None in members):  # what the JSON tells is about other files
        pictures.sort(key=lambda e: (not e.split(".")[0].isdigit(), len(e.split(".")[0]), e))
        frames = [_own(record, extension) for extension in pictures]
    else:
        (names,) = _lists(record, {"frames": names}, "frames")
        frames = [_media(record, name, image_root) for name in names]
    if not frames:
        raise SkipRecordError(NO_IMAGE, _place(record))
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
        # Not a number is what pandas has for null.
        values = json.loads(record.fields["json"], parse_constant=lambda _: None)
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
    """Return the first text that is there and not blank; a blank one if all are."""
    found = [_decoded(record.fields["txt"])] if "txt" in record.fields else []
    found += [values[name] for name in ("caption", "text") if values.get(name) is not None]
    if not found:
        raise SkipRecordError(NO_TEXT, _place(record))
    return next((text for value in found if (text := _text(record, value).strip())), "")


def _decoded(data: bytes) -> str:
    """Return a text in UTF-8, or in what its byte order mark says."""
    marked = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    for encoding, marks in zip(("utf-32", "utf-16"), marked, strict=True):
        if data.startswith(marks):
            return data.decode(encoding, errors="replace")
    return data.decode("utf-8-sig", errors="replace")


def _pictures(record: Record) -> list[str]:
    """Return the extensions of the members that are pictures."""
    return [e for e in record.fields if e.rpartition(".")[2] in IMAGE_SUFFIXES]


def _mmc4_image(record: Record, image: dict[str, Any], image_root: Path | None) -> Media:
    encoded = image.get("image_base64")
    if encoded is None:
        return _media(record, image.get("image_name"), image_root)
    name = f"{_place(record)}: image_base64"
    try:
        return Media(name, (base64.b64decode(encoded, validate=True),))
    except (binascii.Error, TypeError, ValueError):
        return Media(name, (b"",))  # counted as a broken image where it is decoded


def _member(record: Record, name: Any) -> str | None:
    """Return the extension of the member that is called ``name``, with or without its stem."""
    if not isinstance(name, str):
        return None
    name, stem = name.rpartition("/")[2], record.key.rpartition("/")[2]
    extensions = (name.removeprefix(f"{stem}.").lower(), name.lower())
    return next((e for e in extensions if e in record.fields), None)


def _own(record: Record, extension: str) -> Media:
    return Media(f"{_place(record)}: {extension}", (record.fields[extension],))


def _media(record: Record, name: Any, image_root: Path | None) -> Media:
    if not isinstance(name, str):
        raise _broken(record, f"the name of an image is {shown(name)}")
    if (extension := _member(record, name)) is not None:
        return _own(record, extension)
    return Media(name, (DataFile(image_root or Path(record.shard).parent, name),))
