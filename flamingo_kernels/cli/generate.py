"""Text for a prompt with images, by a saved model."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.data.images import load_image, stack_media, to_pixel_values
from flamingo_kernels.language import ByteTokenizer

MARKER = "<image>"
LONGEST_REASON = 300  # transformers lists all architectures that it knows


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
    _progress(f"loading {model_path}")
    model = FlamingoModel.from_pretrained(
        model_path,
        kernel,
        vision_encoder=_frozen("AutoModel", vision_encoder),
        language_model=_frozen("AutoModelForCausalLM", language_model),
    )
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = model.perceiver.latents.device
    encode, decode = _coding(tokenizer_path or language_model or model_path, model.config)
    ids = torch.tensor([encode(text)], device=device)
    encoder = model.vision_encoder
    media = {}
    if pictures:
        if encoder.image_size is None:
            raise ValueError("this model takes features, not images")
        constants = {"mean": encoder.image_mean, "std": encoder.image_std}
        values = [to_pixel_values(p, encoder.image_size, fit=fit, **constants) for p in pictures]
        media = {name: tensor.to(device) for name, tensor in stack_media([values]).items()}
    _progress(f"{ids.shape[1]} tokens, {len(images)} image(s), {device}")
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


def _coding(path: Path, config: FlamingoConfig) -> tuple[Any, Any]:
    """Functions text -> ids and ids -> text."""
    own = ByteTokenizer()
    if config.language.kind == "decoder" and config.image_token_id == own.image_token_id:
        return lambda text: own.encode(text, add_bos=True), own.decode
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            'reading a tokenizer needs transformers: pip install "flamingo_kernels[hf]"'
        ) from error
    tokenizer = _load(AutoTokenizer, "a tokenizer", path)
    added = {token: name for name, token in tokenizer.get_added_vocab().items()}
    marker = added.get(config.image_token_id)
    if marker is None:
        raise ValueError(
            f"the tokenizer in {path} has no token for images with id {config.image_token_id}, "
            "which the model has: save the one that language.add_media_tokens was given"
        )
    return (
        lambda text: tokenizer.encode(text.replace(MARKER, marker)),
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )


def _frozen(auto_class: str, path: Path | None) -> torch.nn.Module | None:
    """A frozen part from a folder of transformers' files: safetensors, and no code."""
    if path is None:
        return None
    import transformers

    _progress(f"loading {path}")
    what = "a language model" if auto_class == "AutoModelForCausalLM" else "a vision encoder"
    return _load(getattr(transformers, auto_class), what, path, use_safetensors=True)


def _load(auto_class: Any, what: str, path: Path, **options: Any) -> Any:
    """What transformers reads from a folder; ValueError that names it for whatever is in it."""
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    options |= {"local_files_only": True, "trust_remote_code": False}
    try:
        return auto_class.from_pretrained(path, **options)
    except Exception as error:  # broken files raise what their parsers raise
        reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" ...")
        raise ValueError(f"cannot load {what} from {path}: {reason}") from error


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
