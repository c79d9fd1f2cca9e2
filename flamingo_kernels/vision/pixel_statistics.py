"""How encoders want their pixels normalised: by architecture, or by a folder of transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from flamingo_kernels.bounds import read_json
from flamingo_kernels.fields import is_integer, is_number
from flamingo_kernels.vision.protocol import Channels


class PixelStatistics(NamedTuple):
    """Per-channel constants that normalise pixels in [0, 1]: (pixel - mean) / std."""

    mean: Channels
    std: Channels


IMAGENET = PixelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = PixelStatistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = PixelStatistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# transformers has them in its processors, not its models. These are the ones of the published
# weights, which a processor's defaults need not be (DINOv2, DeiT, Swin).
_BY_MODEL_TYPE = {
    **dict.fromkeys(
        (
            "aimv2_vision_model",
            "altclip_vision_model",
            "blip_2_vision_model",
            "blip_vision_model",
            "chinese_clip_vision_model",
            "clip_vision_model",
            "flava_image_model",
            "git_vision_model",
            "groupvit_vision_model",
            "instructblip_vision_model",
            "kosmos_2_vision_model",
            "metaclip_2_vision_model",
            "mlcd_vision_model",
            "owlv2_vision_model",
            "owlvit_vision_model",
            "xclip_vision_model",
        ),
        _CLIP,
    ),
    **dict.fromkeys(
        (
            "beit",
            "data2vec-vision",
            "idefics2_vision",
            "idefics3_vision",
            "siglip2_vision_model",
            "siglip_vision_model",
            "smolvlm_vision",
            "vit",
        ),
        _HALF,
    ),
    **dict.fromkeys(
        (
            "deit",
            "dinov2",
            "dinov2_with_registers",
            "dinov3_vit",
            "internvl_vision",
            "pvt",
            "pvt_v2",
            "swin",
            "swinv2",
            "vit_mae",
            "vit_msn",
        ),
        IMAGENET,
    ),
}
# Where transformers writes them: alone, or as a part of a processor for pictures and text.
_FILES = (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))
_LARGEST_FILE = 2**20  # bytes
_LARGEST_SIDE = 2**14  # pixels


class Preprocessing(NamedTuple):
    """What a folder of transformers says about pictures; None where it says nothing."""

    statistics: PixelStatistics | None = None
    image_size: int | None = None


def statistics_of(model_type: str | None) -> PixelStatistics | None:
    """Return the statistics that the published weights of an architecture were trained with."""
    return _BY_MODEL_TYPE.get(model_type or "")


def checked_channels(name: str, values: object, *, positive: bool = False) -> Channels:
    """Return three finite numbers as a tuple of floats.

    Raises
    ------
    ValueError
        ``values`` are anything else, or not positive where they must be.
    """
    if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(is_number, values)):
        raise ValueError(f"{name} must be three numbers, got {_short(values)}")
    red, green, blue = (float(value) for value in values)
    for value in (red, green, blue):
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(
                f"{name} must be finite{' and positive' if positive else ''}, got {_short(values)}"
            )
    return red, green, blue


def read_preprocessing(folder: Path) -> Preprocessing:
    """Read how pictures are prepared from ``preprocessor_config.json``, if the folder has it.

    transformers may also write it as a part of ``processor_config.json``. Statistics of pixels that
    are not rescaled to [0, 1] are converted.

    Raises
    ------
    ValueError
        The file is damaged or too large, or its values cannot be right.
    """
    for name, part in _FILES:
        file = folder / name
        if file.is_file():
            values: Any = read_json(file, _LARGEST_FILE)
            if part is not None:
                values = values.get(part)
            if isinstance(values, dict):
                try:
                    return Preprocessing(_statistics(values), _size(values))
                except (ArithmeticError, TypeError, ValueError) as error:
                    raise ValueError(f"{file}: {error}") from error
    return Preprocessing()


def _statistics(values: dict[str, Any]) -> PixelStatistics | None:
    """Return the statistics for pixels in [0, 1]; None if the file leaves them open."""
    if _flag(values, "do_flip_channel_order", False):
        raise ValueError("do_flip_channel_order is true: pictures in BGR are not supported")
    if _flag(values, "do_normalize", True):
        given = values.get("image_mean"), values.get("image_std")
        if None in given:
            return None
    else:
        given = (0.0, 1.0)
    mean = checked_channels("image_mean", _three(given[0]))
    std = checked_channels("image_std", _three(given[1]), positive=True)
    factor = values.get("rescale_factor")
    factor = 1 / 255 if factor is None else factor
    if not _flag(values, "do_rescale", True):
        factor = 1.0
    if not is_number(factor) or not math.isfinite(factor) or factor <= 0:
        raise ValueError(f"rescale_factor must be a positive number, got {_short(factor)}")
    offset = 1.0 if _flag(values, "rescale_offset", False) else 0.0
    # They are ((255 * factor * pixel - offset) - mean) / std of a pixel in [0, 1].
    scale = 255 * factor
    if math.isclose(scale, 1.0, rel_tol=1e-6) and not offset:
        scaled = PixelStatistics(mean, std)
    else:
        red, green, blue = ((m + offset) / scale for m in mean)
        wide = tuple(s / scale for s in std)
        scaled = PixelStatistics(
            (red, green, blue), checked_channels("image_std", wide, positive=True)
        )
    if not all(0 <= m <= 1 and s <= 1 for m, s in zip(*scaled, strict=True)):
        raise ValueError(
            f"image_mean {_short(mean)} and image_std {_short(std)} are not those of pixels in "
            f"0..{scale:g}: check do_rescale and rescale_factor"
        )
    return scaled


def _size(values: dict[str, Any]) -> int | None:
    """Return the side of the square pictures that come out, or None."""
    cropped = values.get("crop_size") if _flag(values, "do_center_crop", True) else None
    size = cropped or values.get("size")
    if isinstance(size, dict):
        sides = {size.get("height"), size.get("width")} - {None} or {size.get("shortest_edge")}
        size = sides.pop() if len(sides) == 1 else None
    if size is not None and not (is_integer(size) and 0 < size <= _LARGEST_SIDE):
        raise ValueError(f"size must be in 1..{_LARGEST_SIDE}, got {_short(size)}")
    return size


def _flag(values: dict[str, Any], name: str, default: bool) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {_short(value)}")
    return default if value is None else value


def _three(value: object) -> object:
    return [value] * 3 if is_number(value) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."
