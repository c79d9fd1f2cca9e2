"""Text for a prompt with images, by a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flamingo_kernels import FlamingoModel
from flamingo_kernels.cli.loading import MARKER, frozen_part, progress, text_coding
from flamingo_kernels.data.images import load_image, stack_media, to_pixel_values


def run(
    model_path: Path,
    images: Sequence[Path],
    text: str,
    *,
    language_model: Path | None,
    vision_encoder: Path | None,
    tokenizer_path: Path | None,
    kernel: str,
    max_new_tokens: int,
    num_beams: int,
    fit: str,
) -> int:
    """Print the continuation of ``text``; 0."""
    text = mark_images(text, len(images))
    pictures = [load_image(path) for path in images]
    progress(f"loading {model_path}")
    model = FlamingoModel.from_pretrained(
        model_path,
        kernel,
        vision_encoder=frozen_part("AutoModel", vision_encoder),
        language_model=frozen_part("AutoModelForCausalLM", language_model),
    )
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = model.perceiver.latents.device
    encode, decode = text_coding(tokenizer_path or language_model or model_path, model.config)
    ids = torch.tensor([encode(text)], device=device)
    encoder = model.vision_encoder
    media = {}
    if pictures:
        if encoder.image_size is None:
            raise ValueError("this model takes features, not images")
        constants = {"mean": encoder.image_mean, "std": encoder.image_std}
        values = [to_pixel_values(p, encoder.image_size, fit=fit, **constants) for p in pictures]
        media = {name: tensor.to(device) for name, tensor in stack_media([values]).items()}
    progress(f"{ids.shape[1]} tokens, {len(images)} image(s), {device}")
    out = model.generate(ids, **media, max_new_tokens=max_new_tokens, num_beams=num_beams)
    print(decode(out[0, ids.shape[1] :]))
    return 0


def mark_images(text: str, images: int) -> str:
    """``text`` with one marker per image; without any, all of them come first.

    Raises
    ------
    ValueError
        Another number of markers than images.
    """
    markers = text.count(MARKER)
    if not markers:
        return MARKER * images + text
    if markers != images:
        raise ValueError(f"the text has {markers} {MARKER} marker(s), but {images} image(s) given")
    return text
