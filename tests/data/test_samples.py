"""From documents to samples: structure tokens, windows, broken pictures, batches."""

from __future__ import annotations

import base64
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flamingo_kernels.data.augment import ImagePreparation
from flamingo_kernels.data.formats import Document, Media, SkipRecordError
from flamingo_kernels.data.samples import Sample, choose_window, collate, encode_document
from flamingo_kernels.data.shards import Record
from testing.shard_files import ENCODING, TOKENS, builder, picture_bytes, shade

Image = pytest.importorskip("PIL.Image")
PET = Media("pet", (b"",))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def record(fields: dict[str, bytes] | None = None, **values: object) -> Record:
    return Record("x.tar", "a/0001", 0, 1, {**(fields or {}), "json": json.dumps(values).encode()})


def shown(sample) -> str:
    return TOKENS.decode(sample.input_ids, skip_special_tokens=False)


def test_the_papers_example() -> None:
    """Figure 7: end-of-chunk before an image and at the end of the document."""
    parts = ("Cute pics!", PET, "My puppy.", PET, "My cat.")
    ids, media = encode_document(Document(parts), ENCODING)
    text = TOKENS.decode(ids, skip_special_tokens=False)
    assert text == "<BOS>Cute pics!<EOC><image>My puppy.<EOC><image>My cat.<EOC><EOS>"
    assert media == [PET, PET]


def test_adjacent_images_and_structure_written_out_in_text() -> None:
    ids, _ = encode_document(Document((PET, PET, "a <image>b<EOC>", PET)), ENCODING)
    text = TOKENS.decode(ids, skip_special_tokens=False)
    assert text == "<BOS><image><image>a b<EOC><image><EOS>"


def test_windows() -> None:
    """All starts are drawn, and an image too many ends the window."""
    ids = [1, 9, 2, 9, 3, 9, 4, 5, 6]
    windows = {choose_window(ids, 4, 2, 9, rng(seed)) for seed in range(100)}
    assert windows == {(0, 4), (1, 5), (2, 6), (3, 7), (4, 8), (5, 9)}
    assert {choose_window(ids, 20, 1, 9, rng(seed)) for seed in range(5)} == {(0, 3)}
    assert {choose_window(ids, 6, 1, 9, rng(s)) for s in range(50)} == {
        (0, 3),
        (1, 3),
        (2, 5),
        (3, 5),
    }


def test_a_window_takes_its_own_images() -> None:
    fields = {f"{i}.png": picture_bytes(20 * i) for i in range(6)}
    texts = [text for i in range(6) for text in (None, f"{i}")]
    images = [name for i in range(6) for name in (f"{i}.png", None)]
    build = builder(max_tokens=7, max_images=2)
    starts = set()
    for seed in range(30):
        sample = build(record(fields, texts=texts, images=images), rng(seed), Counter())
        text = shown(sample)
        followed = [part[0] for part in text.split("<image>")[1:] if part]
        assert len(sample.media) == text.count("<image>") <= 2
        for digit, media in zip(followed, sample.media, strict=False):
            assert shade(media) == 20 * int(digit)
        starts.add(text[0])
    assert len(starts) > 2


def test_mmc4_puts_images_before_their_sentence(tmp_path: Path) -> None:
    inline = base64.b64encode(picture_bytes(50)).decode()
    (tmp_path / "p.png").write_bytes(picture_bytes(70))
    values = {
        "text_list": ["One.", "Two.", "Three."],
        "image_info": [
            {"image_name": "p.png", "matched_text_index": 2},
            {"image_base64": inline, "matched_text_index": 0},
        ],
    }
    sample = builder(image_root=tmp_path)(record(**values), rng(), Counter())
    assert shown(sample) == "<BOS><image>One. Two.<EOC><image>Three.<EOC><EOS>"
    assert [shade(media) for media in sample.media] == [50, 70]


def test_assignment_is_drawn_per_document() -> None:
    page = record({"0.png": picture_bytes()}, texts=[None, "a"], images=["0001.0.png", None])
    drawn = Counter(builder(p_next=0.5)(page, rng(s), Counter()).assign for s in range(200))
    assert 70 < drawn["next"] < 130 and drawn.total() == 200
    assert builder(p_next=1.0)(page, rng(), Counter()).assign == "next"


@pytest.mark.parametrize(
    ("p_next", "expected"),
    [
        (0.0, "<BOS>a<EOC><image>b<EOC><image>d<EOC><EOS>"),
        (1.0, "<BOS>a<EOC><image>c<EOC><image>d<EOC><EOS>"),
    ],
)
def test_the_text_of_a_broken_image_goes_with_it(p_next: float, expected: str) -> None:
    fields = {"0.png": picture_bytes(10), "1.png": b"no picture", "2.png": picture_bytes(30)}
    images = [None, "0.png", None, "1.png", None, "2.png", None]
    texts = ["a", None, "b", None, "c", None, "d"]
    skipped: Counter[str] = Counter()
    page = record(fields, texts=texts, images=images)
    sample = builder(p_next=p_next)(page, rng(), skipped)
    assert shown(sample) == expected
    assert [shade(media) for media in sample.media] == [10, 30]
    assert skipped == {"broken image": 1}


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("interleaved", {"texts": ["a"], "images": []}, "broken record: .*1 texts and 0 images"),
        (
            "interleaved",
            {"texts": "a", "images": []},
            "broken record: .*texts is a str, not a list",
        ),
        ("interleaved", {"texts": [3], "images": [None]}, "broken record: .*a text is a int"),
        ("interleaved", {"url": "a"}, "broken record: .*neither OBELICS nor MMC4"),
        (
            "interleaved",
            {"text_list": ["a"], "image_info": [{"matched_text_index": 1}]},
            "of 1 sent",
        ),
        ("interleaved", {"texts": ["a"], "images": [None]}, "no image"),
        ("interleaved", {"texts": [None, "\ud800"], "images": ["0.png", None]}, "no text"),
        ("interleaved", {"texts": [None, " "], "images": ["0.png", None]}, "no text"),
        (
            "interleaved",
            {"texts": [None, "a"], "images": ["gone.png", None]},
            "no image: .*decoded",
        ),
        ("pairs", {"url": "a"}, "no text"),
        ("pairs", {"caption": None, "text": None}, "no text"),
        ("pairs", {"caption": " ", "text": ""}, "no text"),
        ("pairs", {"caption": ["a"]}, "broken record: .*a text is a list"),
    ],
)
def test_records_that_give_no_sample(kind: str, values: dict, reason: str) -> None:
    with pytest.raises(SkipRecordError, match=reason):
        builder(kind)(record({"0.png": picture_bytes()}, **values), rng(), Counter())


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("pairs", {"text": "a", "image": 4}, "broken record: .*the name of an image is 4"),
        ("pairs", {"text": "a", "image": None}, "no image"),
        ("pairs", {"text": "a", "image": ""}, "no image"),
        ("video", {"text": "a", "frames": []}, "no image"),
        ("video", {"text": "a", "frames": 4}, "broken record: .*frames is a int, not a list"),
        ("video", {"text": "a", "frames": [4]}, "broken record: .*the name of an image is 4"),
        ("video", {"text": "a", "video": None}, "no image"),
    ],
)
def test_lines_that_give_no_sample(kind: str, values: dict, reason: str) -> None:
    with pytest.raises(SkipRecordError, match=reason):
        builder(kind)(record(**values), rng(), Counter())


METADATA = [17, 2.5, True, None, [], [1], {"bytes": None, "path": "x.png"}, "train/17.png", ""]


@pytest.mark.parametrize("image", METADATA)
def test_one_picture_beside_json_is_the_picture(image: object, tmp_path: Path) -> None:
    """COCO has a number there, exports of Hugging Face an object, others the original's path."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "17.png").write_bytes(picture_bytes(200))
    for kind, key in (("pairs", "image"), ("video", "video"), ("video", "frames")):
        for extension in ("png", "0.png"):
            fields = {extension: picture_bytes(90)}
            build = builder(kind, image_root=tmp_path)
            sample = build(record(fields, **{key: image, "text": "a"}), rng(), Counter())
            assert {shade(frame) for frame in sample.media[0]} == {90}


def test_json_chooses_among_several_pictures(tmp_path: Path) -> None:
    (tmp_path / "17.png").write_bytes(picture_bytes(200))
    fields = {"0.png": picture_bytes(10), "1.png": picture_bytes(20), "2.png": picture_bytes(30)}

    def shades(kind: str, **values: object) -> list[int]:
        build = builder(kind, image_root=tmp_path)
        sample = build(record(fields, text="a", **values), rng(), Counter())
        return [shade(frame) for frame in sample.media[0]]

    assert shades("pairs", image="1.png") == shades("pairs", image="0001.1.PNG") == [20]
    assert shades("pairs", image="17.png") == [200]
    assert shades("pairs", image=17) == shades("pairs") == [10]
    assert shades("video", frames=["2.png", "1.png", "a/0001.0.png"]) == [30, 20, 10]
    for metadata in ({"frames": ["17.png"] * 3}, {"frames": 3}, {"video": "17.mp4"}, {}):
        assert shades("video", **metadata) == [10, 20, 30]
    assert shades("video", video="1.png") == [20, 20, 20]


def test_a_record_called_as_its_frames_are() -> None:
    fields = {f"{i}.png": picture_bytes(10 * i) for i in range(3)}
    clip = Record("x.tar", "0", 0, 1, {**fields, "txt": b"a"})
    sample = builder("video")(clip, rng(), Counter())
    assert [shade(frame) for frame in sample.media[0]] == [0, 10, 20]


@pytest.mark.parametrize("kind", ["pairs", "video"])
@pytest.mark.parametrize(
    ("values", "txt"),
    [
        ({"caption": None, "text": "a cat"}, None),
        ({"caption": "a cat", "text": None}, None),
        ({"caption": " ", "text": "a cat"}, None),
        ({"caption": float("nan"), "text": "a cat"}, None),
        ({"caption": "a cat", "text": "another"}, None),
        ({"text": " a cat\n"}, None),
        ({"caption": "a cat"}, b" \n"),
        ({"caption": "another"}, b"a cat"),
        ({"caption": None, "text": None}, b"a cat"),
        ({}, "\ufeffa cat".encode()),
        ({}, "a cat".encode("utf-16")),
        ({}, "\ufeffa cat".encode("utf-16-be")),
        ({}, "a cat".encode("utf-32")),
        ({}, "\ufeffa cat".encode("utf-32-be")),
    ],
)
def test_the_text_that_is_there(kind: str, values: dict, txt: bytes | None) -> None:
    fields = {"png": picture_bytes()} | ({} if txt is None else {"txt": txt})
    sample = builder(kind)(record(fields, **values), rng(), Counter())
    assert shown(sample) == "<BOS><image>a cat<EOC><EOS>"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_members_of_any_unicode(encoding: str) -> None:
    text = json.dumps({"text": "a cät"}, ensure_ascii=False)
    fields = {"png": picture_bytes(), "json": text.encode(encoding)}
    sample = builder("pairs")(Record("x.tar", "1", 0, 1, fields), rng(), Counter())
    assert shown(sample) == "<BOS><image>a cät<EOC><EOS>"


def test_half_of_a_character_gives_no_sample_whatever_the_tokenizer_raises() -> None:
    def encode(text: str) -> list[int]:
        raise TypeError("not a text")

    build = replace(builder(), encoding=replace(ENCODING, encode=encode))
    with pytest.raises(SkipRecordError, match="no text"):
        build(record(texts=["half \ud83d", None], images=[None, "a.png"]), rng(), Counter())


def test_pairs() -> None:
    fields = {"png": picture_bytes(90), "txt": b" A cat.\n"}
    pair = Record("x.tar", "a/0001", 0, 1, fields)
    sample = builder("pairs")(pair, rng(), Counter())
    assert shown(sample) == "<BOS><image>A cat.<EOC><EOS>" and shade(sample.media[0]) == 90
    assert "<image> A cat." in shown(builder("pairs", leading_space=1.0)(pair, rng(), Counter()))
    assert shown(builder("pairs", max_tokens=4)(pair, rng(), Counter())) == "<BOS><image>A "
    caption = record({"jpg": picture_bytes(20)}, caption="A dog.")
    assert "<image>A dog.<EOC>" in shown(builder("pairs")(caption, rng(), Counter()))


def test_clips() -> None:
    frames = {f"{i}.png": picture_bytes(20 * i) for i in range(12)}
    clip = Record("x.tar", "a", 0, 1, {**frames, "txt": b"ball"})
    sample = builder("video")(clip, rng(), Counter())
    assert sample.media[0].shape == (3, 3, 8, 8)
    assert [shade(frame) for frame in sample.media[0]] == [40, 120, 200]
    animated = Record("x.tar", "a", 0, 1, {"gif": picture_bytes(10, 3), "txt": b"ball"})
    sample = builder("video")(animated, rng(), Counter())
    assert [shade(frame) for frame in sample.media[0]] == [10, 50, 90]


def test_augmentation_changes_all_frames_of_a_clip_alike() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    frames = [Image.fromarray(pixels)] * 2
    plain = ImagePreparation(8)(frames, rng())
    assert torch.equal(ImagePreparation(8, flip=1.0)(frames, rng()), plain.flip(-1))
    assert torch.equal(ImagePreparation(8, flip=0.0)(frames, rng()), plain)
    changed = ImagePreparation(8, colour=0.4)
    first, again, other = (changed(frames, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], first[1]) and torch.equal(first, again)
    assert not torch.equal(first, plain) and not torch.equal(first, other)


def test_a_ragged_batch_is_what_the_model_takes() -> None:
    fields = {"0.png": picture_bytes(1), "1.png": picture_bytes(2)}
    build = builder()
    one = record(fields, texts=[None, "ab"], images=["0.png", None])
    two = record(fields, texts=[None, "c", None, "d"], images=["0.png", None, "1.png", None])
    batch = collate([build(r, rng(), Counter()) for r in (one, two)], TOKENS.pad_token_id)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [6, 8]
    assert batch["labels"][0].tolist() == [257, 259, 97, 98, 260, 258, -100, -100]
    assert batch["input_ids"][0, 6:].tolist() == [TOKENS.pad_token_id] * 2
    assert batch["pixel_values"].shape == (2, 2, 1, 3, 8, 8)
    assert batch["num_images"].tolist() == [1, 2] and batch["assign"] == ["previous", "previous"]
    alone = collate([Sample("text", [1, 2], [])], TOKENS.pad_token_id)
    assert "pixel_values" not in alone and alone["labels"].tolist() == [[1, 2]]
