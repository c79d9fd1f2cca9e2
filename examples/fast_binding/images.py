"""Pictures: glyphs drawn from random strokes, and scikit-learn's handwritten digits.

A glyph class is a few curved strokes. Each drawing of it moves their control points, transforms the
glyph (affine) and changes the pen's width. A class is known by its number alone, so it can be drawn
again without a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
HELD_OUT_DIGITS = (1, 3, 5, 7, 9)
TRAINING_DIGITS = tuple(set(range(10)) - set(HELD_OUT_DIGITS))
# Digit, mirrored, quarter turns. Left out are turns that look like the digit itself or like a
# held-out digit: a 6 upside down is a 9.
_DIGIT_CLASSES = (
    *((digit, False, 0) for digit in TRAINING_DIGITS),
    *((digit, False, 1) for digit in (2, 6, 8)),
    *((4, False, turns) for turns in (1, 2, 3)),
    (6, False, 3),
    *((digit, True, turns) for digit in (4, 6) for turns in range(4)),
)
# Held-out glyph classes have numbers from here on, training classes have smaller ones.
FIRST_HELD_OUT_GLYPH = 1_000_000
HELD_OUT_DRAWINGS = 40
_SHEET_CLASSES, _SHEET_DRAWINGS = 4, 20

_STROKES = (2, 3, 4)
_POINTS_ON_STROKE = 12
_ROWS_AT_ONCE = 500


def _strokes(glyph: int) -> np.ndarray:
    """Return the control points [strokes, 3, 2] of a glyph class, in -1..1."""
    draw = np.random.default_rng([7, glyph])
    count = int(draw.choice(_STROKES))
    points = draw.uniform(-0.8, 0.8, (count, 3, 2))
    for i in range(1, count):  # a pen often continues from where it is
        if draw.random() < 0.5:
            points[i, 0] = points[i - 1, 2]
    middle = (points[:, 0] + points[:, 2]) / 2
    points[:, 1] = middle + draw.normal(0, 0.45, (count, 2))
    low, high = points.min((0, 1)), points.max((0, 1))
    return (points - (low + high) / 2) * (1.6 / (high - low).max())


def draw_glyphs(glyphs: np.ndarray, generator: np.random.Generator) -> Tensor:
    """Draw each glyph class once: [N, SIZE, SIZE] in 0..1."""
    count, most = len(glyphs), max(_STROKES)
    points = np.zeros((count, most, 3, 2))
    for row, glyph in enumerate(glyphs):
        strokes = _strokes(int(glyph))
        points[row, : len(strokes)] = strokes
        points[row, len(strokes) :] = strokes[-1]
    points = points + generator.normal(0, 0.07, points.shape)
    angle = generator.normal(0, 0.12, count)
    scale = generator.uniform(0.8, 1.1, (count, 2))
    shear = generator.normal(0, 0.12, count)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.stack(
        (
            np.stack((cos * scale[:, 0], sin * scale[:, 0] + shear), -1),
            np.stack((-sin * scale[:, 1], cos * scale[:, 1]), -1),
        ),
        1,
    )
    points = np.einsum("nsci,nij->nscj", points, matrix)
    points = points + generator.normal(0, 0.06, (count, 1, 1, 2))
    t = np.linspace(0, 1, _POINTS_ON_STROKE)[:, None]
    a, b, c = (points[:, :, i, None] for i in range(3))
    curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c  # [N, strokes, points, 2]
    width = generator.uniform(0.07, 0.16, count)
    return _degrade(
        _render(torch.from_numpy(curve).float(), torch.from_numpy(width).float()), generator
    )


def _render(curve: Tensor, width: Tensor) -> Tensor:
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    start, end = curve[:, :, :-1].flatten(1, 2), curve[:, :, 1:].flatten(1, 2)  # [N, segments, 2]
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flip(-1).flatten(0, 1)
    along = end - start
    length2 = along.square().sum(-1).clamp(min=1e-6)
    # Position of the nearest point of each segment: ((p - start) . along) / |along|^2
    offset = (start * along).sum(-1)
    t = (torch.einsum("pi,nsi->nps", pixels, along) - offset[:, None]) / length2[:, None]
    t = t.clamp(0, 1)
    dx = pixels[None, :, None, 0] - start[:, None, :, 0] - t * along[:, None, :, 0]
    dy = pixels[None, :, None, 1] - start[:, None, :, 1] - t * along[:, None, :, 1]
    nearest = (dx.square_().add_(dy.square_())).amin(-1)
    return torch.exp(-nearest / width[:, None].square()).unflatten(1, (SIZE, SIZE))


def _degrade(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Make half of the images as coarse as the digits, which are 8 x 8."""
    coarse = F.interpolate(
        F.avg_pool2d(images[:, None], 4), size=SIZE, mode="bilinear", align_corners=False
    )[:, 0]
    chosen = torch.from_numpy(generator.random(len(images)) < 0.5)
    return torch.where(chosen[:, None, None], (coarse * 1.4).clamp(max=1), images)


def digits(which: Sequence[int]) -> Tensor:
    """Return handwritten digits [classes, drawings, SIZE, SIZE] in 0..1, equally many of each.

    They are enlarged from 8 x 8 as ``data.images.to_pixel_values`` does it.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    fewest = int(np.bincount(found.target).min())
    pictures = [
        [
            np.asarray(Image.fromarray((image * 15.9375).astype(np.uint8)).resize((SIZE, SIZE)))
            for image in found.images[found.target == digit][:fewest]
        ]
        for digit in which
    ]
    return torch.from_numpy(np.array(pictures)).float() / 255


def training_digits() -> Tensor:
    """Return the digits to train on; a turned or mirrored digit is a class of its own."""
    drawn = dict(zip(TRAINING_DIGITS, digits(TRAINING_DIGITS), strict=True))
    return torch.stack(
        [
            (drawn[digit].flip(-1) if mirrored else drawn[digit]).rot90(turns, (-2, -1))
            for digit, mirrored, turns in _DIGIT_CLASSES
        ]
    )


def training_glyphs(classes: int, drawings: int, seed: int) -> Tensor:
    """Return drawings [classes, drawings, SIZE, SIZE] of the glyphs to train on."""
    return _draw_classes(0, classes, drawings, seed)


def held_out_glyphs(classes: int, seed: int) -> Tensor:
    """Return drawings of other glyphs, as many of each as the longest episode shows."""
    return _draw_classes(FIRST_HELD_OUT_GLYPH, classes, HELD_OUT_DRAWINGS, seed)


def save_sheet(pictures: Tensor, path: Path) -> None:
    """Save some of pictures [classes, drawings, SIZE, SIZE] as one picture, a class in each row."""
    from PIL import Image

    some = pictures[:_SHEET_CLASSES, :_SHEET_DRAWINGS].permute(0, 2, 1, 3)
    levels = (some.flatten(2).flatten(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(levels.numpy()).save(path)


def _draw_classes(first: int, classes: int, drawings: int, seed: int) -> Tensor:
    numbers = np.repeat(np.arange(first, first + classes), drawings)
    parts = np.array_split(numbers, -(-len(numbers) // _ROWS_AT_ONCE))
    return torch.cat(
        [
            draw_glyphs(part, np.random.default_rng([seed, first, place]))
            for place, part in enumerate(parts)
        ]
    ).unflatten(0, (classes, drawings))


def jitter(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Turn, scale, shear and move each picture a little."""
    count = len(images)
    angle = generator.normal(0, 0.1, count)
    scale = generator.uniform(0.9, 1.2, (count, 2))
    shear = generator.normal(0, 0.1, count)
    shift = generator.normal(0, 0.06, (count, 2))
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.stack(
        (
            np.stack((cos * scale[:, 0], sin * scale[:, 0] + shear, shift[:, 0]), -1),
            np.stack((-sin * scale[:, 1], cos * scale[:, 1], shift[:, 1]), -1),
        ),
        1,
    )
    grid = F.affine_grid(torch.from_numpy(matrix).float(), [count, 1, SIZE, SIZE], False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
