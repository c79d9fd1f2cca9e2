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
        ("pairs", {"text": "a", "image": 4}, "broken record: .*the name of an image is 4"),
        ("pairs", {"url": "a"}, "no text"),
        ("video", {"text": "a", "frames": []}, "no image"),
    ],
)
def test_records_that_give_no_sample(kind: str, values: dict, reason: str) -> None:
    with pytest.raises(SkipRecordError, match=reason):
        builder(kind)(record({"0.png": picture_bytes()}, **values), rng(), Counter())


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
