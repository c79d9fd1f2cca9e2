"""Bad input at the model boundary: a clear error that names the value."""

from __future__ import annotations

import pytest
import torch

from testing.tiny_model import TINY, make_model, ragged_batch

IMAGE = TINY.image_token_id
MODEL = make_model()


def good() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[1, IMAGE, 2], [IMAGE, 3, 4]]),
        "pixel_values": torch.randn(2, 1, 1, 3, 32, 32),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": [[1]]}, TypeError, "input_ids must be an int64 or int32 .* got list"),
        ({"input_ids": torch.zeros(1, 2)}, TypeError, r"got torch\.float32"),
        ({"input_ids": torch.zeros(3).long()}, ValueError, r"must be \[B, T\], got shape \(3,\)"),
        ({"input_ids": torch.zeros(0, 3).long()}, ValueError, r"shape \(0, 3\): a batch needs"),
        ({"input_ids": torch.zeros(2, 0).long()}, ValueError, r"shape \(2, 0\): a batch needs"),
        (
            {"input_ids": torch.tensor([[264, 1, IMAGE], [IMAGE, 1, 1]])},
            ValueError,
            r"holds 264, outside the vocabulary 0\.\.263",
        ),
        (
            {"input_ids": torch.tensor([[-5, 1, IMAGE], [IMAGE, 1, 1]])},
            ValueError,
            "holds -5, outside the vocabulary",
        ),
        (
            {"input_ids": torch.zeros(2, 3, device="meta").long()},
            ValueError,
            "input_ids is on meta: the model reads it and needs values",
        ),
        ({"attention_mask": [[1, 1, 1]]}, TypeError, "attention_mask must be a tensor, got list"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"\(2, 3\), got \(2, 4\)"),
        (
            {"labels": torch.zeros(2, 3)},
            TypeError,
            "labels must be an int64 tensor, got torch.float32",
        ),
        ({"labels": [[1, 2, 3]]}, TypeError, "labels must be an int64 tensor, got list"),
        ({"labels": torch.zeros(2, 4).long()}, ValueError, r"shape of input_ids \(2, 3\)"),
        ({"labels": torch.full((2, 3), 999)}, ValueError, "labels holds 999"),
        ({"labels": torch.full((2, 3), -1)}, ValueError, "labels holds -1; allowed are -100"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, ValueError, r"\[B, I, F, C, H, W\]"),
        (
            {"pixel_values": torch.zeros(2, 1, 1, 3, 32, 32).byte()},
            TypeError,
            r"floating point tensor, got torch\.uint8",
        ),
        ({"pixel_values": torch.zeros(3, 1, 1, 3, 32, 32)}, ValueError, "3 rows, input_ids has 2"),
        ({"pixel_values": torch.zeros(2, 1, 0, 3, 32, 32)}, ValueError, "no frames"),
        *(
            ({"pixel_values": torch.zeros(2, 1, 1, *size)}, ValueError, f"no pixels: .*{size[0]}, ")
            for size in ((0, 32, 32), (3, 0, 32), (3, 32, 0))
        ),
        (
            {"pixel_values": torch.zeros(2, 1, 1, 3, 32, 32, device="meta")},
            ValueError,
            "pixel_values is on meta, input_ids on cpu",
        ),
        ({"num_images": torch.tensor([1])}, ValueError, r"num_images must have shape \(2,\)"),
        ({"num_images": torch.tensor([1, 2])}, ValueError, r"num_images\[1\] is 2, outside 0\.\.1"),
        ({"num_images": torch.ones(2)}, TypeError, "num_images must be an integer tensor"),
        ({"num_images": [1, 1]}, TypeError, "num_images must be an integer tensor, got list"),
        (
            {"num_images": torch.ones(2, device="meta").int()},
            ValueError,
            "num_images is on meta: the model reads it",
        ),
        ({"num_frames": [[1], [1]]}, TypeError, "num_frames must be an integer tensor, got list"),
        (
            {"num_frames": torch.ones(2, 1, device="meta").int()},
            ValueError,
            "num_frames is on meta: the model reads it",
        ),
        (
            {"num_frames": torch.tensor([[1], [2]])},
            ValueError,
            r"num_frames\[1, 0\] is 2, outside 0\.\.1",
        ),
        ({"num_frames": torch.tensor([[1], [0]])}, ValueError, r"num_frames\[1, 0\] is 0"),
        ({"pixel_values": None}, ValueError, r"row 0 has 1 <image> token\(s\) but 0 image"),
        (
            {"pixel_values": None, "num_images": torch.tensor([1, 1])},
            ValueError,
            "num_images is given without pixel_values",
        ),
        (
            {"pixel_values": None, "num_images": [1, 1]},
            TypeError,
            "num_images must be an integer tensor, got list",
        ),
        ({"assign": "both"}, ValueError, "unknown assign mode 'both'"),
    ],
)
def test_forward_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MODEL(**{**good(), **change})


def test_a_bad_call_leaves_the_cache_as_it_was() -> None:
    batch = ragged_batch("left")
    cache = MODEL(**batch.arguments(), use_cache=True).cache
    length = cache.language.length
    token = torch.tensor([[5], [6], [7]])
    for bad in ({"input_ids": token[:2]}, {"input_ids": token + 1000}, {"assign": "next"}):
        with pytest.raises(ValueError):
            MODEL(**{"input_ids": token, "cache": cache, **bad})
    assert cache.language.length == length
    assert MODEL(token, cache=cache, use_cache=True).cache.input_ids.shape[1] == length + 1


def test_one_token_and_one_row_work() -> None:
    assert MODEL(torch.tensor([[7]])).logits.shape == (1, 1, TINY.language.vocab_size)
    labels = torch.tensor([[7]])
    assert MODEL(labels, labels=labels).loss.item() == 0  # nothing to predict
