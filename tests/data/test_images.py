from __future__ import annotations

import numpy as np
import pytest
import torch

from flamingo_kernels.data.augment import ImagePreparation
from flamingo_kernels.data.images import (
    IMAGE_MEAN,
    IMAGE_STD,
    load_image,
    sample_frames,
    stack_media,
    to_pixel_values,
)

Image = pytest.importorskip("PIL.Image")


def picture(width: int, height: int):
    """Return a picture whose red grows to the right and whose green grows downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (20, 7), (300, 1)])
def test_pad_keeps_the_whole_picture_and_pads_with_the_mean(width: int, height: int) -> None:
    values = to_pixel_values(picture(width, height), 16)
    assert values.shape == (3, 16, 16) and values.dtype == torch.float32
    seen = (values != 0).any(0)
    expected = [max(1, round(side * 16 / max(width, height))) for side in (height, width)]
    assert [int(seen.any(1).sum()), int(seen.any(0).sum())] == expected


def test_crop_takes_the_centre() -> None:
    values = to_pixel_values(picture(64, 32), 32, fit="crop")
    left = 16 * np.float32(255 / 63) / 255
    raw = values * torch.tensor(IMAGE_STD)[:, None, None] + torch.tensor(IMAGE_MEAN)[:, None, None]
    assert abs(float(raw[0, 0, 0]) - left) < 1 / 255
    assert float(raw[1, 0, 0]) == pytest.approx(0, abs=1 / 255)
    assert float(raw[1, -1, 0]) == pytest.approx(1, abs=1 / 255)


def test_a_long_strip_is_cut_before_it_is_resized() -> None:
    """Resized as a whole, the strip would have 2.5 thousand million pixels in a row."""
    strip = Image.new("L", (80_000_000, 1))
    strip.paste(255, (40_000_000, 0, 80_000_000, 1))
    pixels = to_pixel_values(strip, 32, fit="crop", mean=(0,) * 3, std=(1,) * 3)
    assert pixels.shape == (3, 32, 32) and pixels[..., 0].max() < 0.5 < pixels[..., -1].min()


def test_normalised_by_the_encoders_constants() -> None:
    white = Image.new("L", (8, 8), 255)
    values = to_pixel_values(white, 4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    assert torch.equal(values, torch.tensor([1.0, 3.0, 0.5])[:, None, None].expand(3, 4, 4))
    with pytest.raises(
        ValueError, match="pixels normalised is not known: put a preprocessor_config"
    ):
        to_pixel_values(white, 4, mean=None, std=None)
    with pytest.raises(ValueError, match="pixels normalised is not known"):
        ImagePreparation(4, None, None)
    with pytest.raises(ValueError, match="unknown fit 'stretch'; known: pad, crop"):
        to_pixel_values(white, 4, fit="stretch")


def test_files_that_are_no_pictures(tmp_path) -> None:
    good = tmp_path / "good.png"
    picture(40, 30).save(good)
    assert load_image(good).size == (40, 30)
    cut, text = tmp_path / "cut.png", tmp_path / "text.jpg"
    cut.write_bytes(good.read_bytes()[:60])
    text.write_text("not a picture")
    for file in (cut, text):
        with pytest.raises(ValueError, match=rf"cannot decode the image .*{file.name}: "):
            load_image(file)
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png")


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path) -> None:
    turned = picture(20, 10)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    turned.save(tmp_path / "a.png", exif=exif)
    plain = np.asarray(picture(20, 10))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.rot90(plain, -1))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_grey_of_16_bits_is_scaled(mode: str, tmp_path) -> None:
    grey = np.full((4, 4), 1000, dtype=np.uint16)
    grey[:2] = 0x80FF
    image = Image.fromarray(grey)
    if mode == "I":
        image = Image.fromarray(grey.astype(np.int32))
    assert image.mode == mode
    image.save(tmp_path / "a.tiff")
    loaded = to_pixel_values(load_image(tmp_path / "a.tiff"), 4)
    for values in (loaded, to_pixel_values(image, 4)):
        eight = Image.fromarray((grey >> 8).astype(np.uint8))
        assert torch.equal(values, to_pixel_values(eight, 4))
    assert len(loaded[0].unique()) == 2


def test_pictures_that_have_no_range_or_no_pixels() -> None:
    with pytest.raises(ValueError, match="grey of 0 to 70000, outside 16 bits"):
        to_pixel_values(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), 4)
    with pytest.raises(ValueError, match="mode F, floats of unknown range"):
        to_pixel_values(Image.new("F", (2, 2), 0.5), 4)
    for fit in ("pad", "crop"):
        with pytest.raises(ValueError, match=r"no pixels: its size is \(0, 5\)"):
            to_pixel_values(Image.new("RGB", (0, 5)), 4, fit=fit)


def test_frames_are_spread_over_the_clip() -> None:
    assert sample_frames(8, 8) == list(range(8))
    assert sample_frames(100, 4) == [12, 37, 62, 87]
    assert sample_frames(2, 4) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="0 available, 4 wanted"):
        sample_frames(0, 4)


def test_ragged_rows_make_one_batch() -> None:
    image, clip = torch.ones(3, 4, 4), torch.full((2, 3, 4, 4), 2.0)
    batch = stack_media([[image, clip], [], [image]])
    assert batch["pixel_values"].shape == (3, 2, 2, 3, 4, 4)
    assert batch["num_images"].tolist() == [2, 0, 1]
    assert batch["num_frames"].tolist() == [[1, 2], [1, 1], [1, 1]]
    assert torch.equal(batch["pixel_values"][0, 1], clip)
    assert not batch["pixel_values"][1].any() and not batch["pixel_values"][0, 0, 1].any()
    assert stack_media([[], []]) == {}
    with pytest.raises(ValueError, match=r"row 1 has media of shape \(1, 3, 5, 5\); all must be"):
        stack_media([[image], [torch.ones(3, 5, 5)]])
