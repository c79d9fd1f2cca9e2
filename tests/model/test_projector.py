"""Models without a resampler: images of different numbers of tiles, and so of keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reference
from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.model.config import ProjectorConfig
from testing.budgets import assert_close_to_reference, assert_gradients_close
from testing.tiny_model import TINY, make_model, ragged_batch

IMAGE = TINY.image_token_id
LLAMA = {"attend": "last_group", "feed_forward_without_media": False}


def projecting_model(kernel: str = "auto", bias: bool = True, **cross: object) -> FlamingoModel:
    """Build the tiny model with a projector to 48 channels, and two key/value heads of four."""
    model = make_model(kernel, projector=ProjectorConfig(dim=48, bias=bias), kv_heads=2, **cross)
    return model


def batch_of_tiles(side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """Return arguments of rows with 0, 1 and 5 images of one to three tiles, and the tiles.

    Tiles that are padding hold NaN.
    """
    batch = ragged_batch(side)
    tiles = torch.tensor([[1] * 5, [3, 1, 1, 1, 1], [2, 1, 3, 1, 2]])
    pixels = torch.randn(3, 5, 3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    unused = torch.arange(3) >= tiles[..., None]
    unused |= (torch.arange(5) >= batch.num_images[:, None])[..., None]
    pixels[unused] = float("nan")
    return {**batch.arguments(), "pixel_values": pixels, "num_frames": tiles}, tiles


def row_alone(arguments: dict[str, Tensor], row: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the arguments of one row without padding, and the places of its tokens."""
    real = arguments["attention_mask"][row].bool()
    count = int(arguments["num_images"][row])
    alone = {
        "input_ids": arguments["input_ids"][row : row + 1, real],
        "pixel_values": arguments["pixel_values"][row : row + 1, :count],
        "num_frames": arguments["num_frames"][row : row + 1, :count],
    }
    return alone, real


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
@pytest.mark.parametrize(
    "cross", [{}, {"attend": "previous"}, LLAMA], ids=["last", "previous", "llama"]
)
def test_whole_model_equals_reference(kernel: str, cross: dict) -> None:
    """Loss, logits and every gradient, in fp64."""
    model = projecting_model(kernel, **cross).double()
    oracle = reference.Flamingo(model.config).double()
    oracle.load_state_dict(model.state_dict(), strict=True)
    arguments, _ = batch_of_tiles("left")
    arguments["pixel_values"] = arguments["pixel_values"].double()
    arguments["labels"] = arguments["input_ids"]
    out, expected = model(**arguments), oracle(**arguments)
    real = arguments["attention_mask"].bool()
    assert_close_to_reference(out.logits[real], expected.logits[real], torch.float64, "logits")
    assert_close_to_reference(out.loss, expected.loss, torch.float64, "loss")
    out.loss.backward()
    expected.loss.backward()
    truth = {n: p.grad for n, p in oracle.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.trainable_parameters().items()}
    assert set(ours) == set(truth)
    assert_gradients_close(ours, truth, torch.float64)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_equals_alone(side: str) -> None:
    model = projecting_model(**LLAMA)
    arguments, _ = batch_of_tiles(side)
    with torch.no_grad():
        out = model(**arguments)
        for row in range(3):
            alone, real = row_alone(arguments, row)
            expected = model(**alone).logits[0]
            assert_close_to_reference(out.logits[row, real], expected, torch.float32, f"row {row}")


def test_tiles_that_are_padding_are_not_projected() -> None:
    """Neither the encoder nor the projections see them."""
    model = projecting_model()
    arguments, tiles = batch_of_tiles()
    used = tiles * (torch.arange(5) < arguments["num_images"][:, None])
    seen: list[int] = []
    parts = [model.vision_encoder, model.projector]
    parts += [layer.attn.to_kv for layer in model.gated_cross_attn_layers]
    hooks = [
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1].numel()))
        for part in parts[1:]
    ]
    encoded: list[int] = []
    hooks.append(parts[0].register_forward_pre_hook(lambda _, given: encoded.append(len(given[0]))))
    with torch.no_grad():
        context = model.encode_context(
            arguments["input_ids"],
            arguments["pixel_values"],
            num_images=arguments["num_images"],
            num_frames=tiles,
        )
    for hook in hooks:
        hook.remove()
    total, widest = int(used.sum()), int(used.sum(1).max())
    size = context.media[0].key.shape[1] // widest
    assert encoded == [total]
    assert seen == [total * size] * (1 + len(model.gated_cross_attn_layers))
    assert context.media[0].key.shape == (3, widest * size, 1, 2, 16)


@pytest.mark.parametrize("grown", [False, True])
def test_images_appended_to_a_cache(grown: bool) -> None:
    """Turns with images of other numbers of tiles give what one forward gives."""
    model = projecting_model(attend="previous")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (2, 30), generator=generator)
    for row, places in enumerate([(2, 13, 14, 25), (1, 3, 12, 22)]):
        ids[row, list(places)] = IMAGE
    pixels = torch.randn(2, 4, 3, 3, 32, 32, generator=generator)
    tiles = torch.tensor([[3, 1, 2, 1], [1, 2, 2, 3]])
    with torch.set_grad_enabled(not grown):  # in place without gradients, else by copies
        whole = model(ids, pixels, num_frames=tiles).logits
        parts, cache, used = [], None, torch.zeros(2, dtype=torch.int64)
        for start, end in ((0, 10), (10, 11), (11, 20), (20, 30)):
            piece = ids[:, start:end]
            count = (piece == IMAGE).sum(1)
            slots = (used[:, None] + torch.arange(int(count.max()))).clamp(max=3)
            rows = torch.arange(2)[:, None]
            media = {"num_images": count, "num_frames": tiles[rows, slots]}
            given = pixels[rows, slots] if slots.numel() else None
            out = model(
                piece, given, cache=cache, use_cache=True, **(media if slots.numel() else {})
            )
            parts.append(out.logits)
            cache, used = out.cache, used + count
            if start == 10:  # two copies of which one is continued
                cache = cache.select_rows(torch.arange(2))
    assert cache.lengths.sum(1).tolist() == (tiles.sum(1) * cache.lengths[0, 0] // 3).tolist()
    assert_close_to_reference(torch.cat(parts, 1), whole, torch.float32)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generation_of_a_ragged_batch_equals_alone(options: dict) -> None:
    model = projecting_model(**LLAMA)
    arguments, _ = batch_of_tiles("left")
    together = model.generate(**arguments, max_new_tokens=4, **options)
    for row in range(3):
        alone, _ = row_alone(arguments, row)
        expected = model.generate(**alone, max_new_tokens=4, **options)
        new = expected.shape[1] - alone["input_ids"].shape[1]
        assert torch.equal(together[row, -4:][:new], expected[0, -new:])


def test_images_of_different_numbers_of_features() -> None:
    """Features of images of any sizes are frames of one feature each."""
    torch.manual_seed(0)
    features = {"kind": "features", "output_dim": 12}
    values = {**projecting_model().config.to_dict(), "vision": features}
    model = FlamingoModel(FlamingoConfig.from_dict(values)).eval()
    for layer in model.gated_cross_attn_layers:
        layer.attn_gate.data.fill_(1)
    ids = torch.tensor([[IMAGE, 5, IMAGE, 6, 7]])
    given = [torch.randn(n, 12) for n in (7, 3)]
    padded = torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=float("nan"))
    with torch.no_grad():
        logits = model(ids, padded[None, :, :, None], num_frames=torch.tensor([[7, 3]])).logits
        first = model(ids[:, :2], given[0][None, None, :, None]).logits
    assert_close_to_reference(logits[:, :2], first, torch.float32)


def test_saved_and_loaded(tmp_path) -> None:
    model = projecting_model(bias=False)
    model.save_pretrained(tmp_path)
    backbones = {"vision_encoder": model.vision_encoder, "language_model": model.language_model}
    again = FlamingoModel.from_pretrained(tmp_path, **backbones).eval()
    assert again.config == model.config
    arguments, _ = batch_of_tiles()
    with torch.no_grad():
        assert torch.equal(again(**arguments).logits, model(**arguments).logits)


def test_tracing_is_refused() -> None:
    """Its program would be wrong for other numbers of images."""
    pixels = torch.randn(1, 1, 1, 3, 32, 32)
    with pytest.raises(ValueError, match="a model with a projector is not traced"):
        torch.jit.trace(
            lambda ids, images: projecting_model()(ids, images).logits,
            (torch.tensor([[IMAGE, 5]]), pixels),
        )


@pytest.mark.parametrize("sections", [("resampler", "projector"), ()])
def test_a_config_has_one_connector(sections: tuple[str, ...]) -> None:
    values = {**TINY.to_dict(), "projector": {"dim": 8}}
    for name in {"resampler", "projector"} - set(sections):
        del values[name]
    with pytest.raises(ValueError, match="exactly one of the sections resampler and projector"):
        FlamingoConfig.from_dict(values)


def test_key_value_heads_divide_the_heads() -> None:
    with pytest.raises(ValueError, match="multiple of kv_heads, got 4 and 3"):
        replace(TINY.cross_attention, kv_heads=3)
