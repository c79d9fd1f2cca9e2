"""Generate text for a prompt with images, by a saved model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.cli.loading import progress, read_backbone
from flamingo_kernels.data.images import FITS, load_image, stack_media, to_pixel_values
from flamingo_kernels.language import ByteTokenizer, encode_prompt
from flamingo_kernels.shipped import FAST_BINDING
from flamingo_kernels.transformers_models import read_folder

MARKER = "<image>"


def add(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--model", type=Path, default=FAST_BINDING, help="folder; default: the shipped model"
    )
    parser.add_argument("--image", type=Path, action="append", default=[], help="repeatable")
    parser.add_argument("--text", required=True, help="prompt; <image> marks each image's place")
    parser.add_argument("--language-model", type=Path, help="folder, if the checkpoint has none")
    parser.add_argument("--vision-encoder", type=Path, help="folder, if the checkpoint has none")
    parser.add_argument("--tokenizer", type=Path, help="folder; default: the language model's")
    parser.add_argument("--kernel", default="auto", help="auto, triton, cpp or torch")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--fit", choices=FITS, default="pad", help="pad, or crop as CLIP does")


def run(options: Namespace) -> int:
    """Print the continuation of the prompt; return 0."""
    text = mark_images(options.text, len(options.image))
    pictures = [load_image(path) for path in options.image]
    progress(f"loading {options.model}")
    model = FlamingoModel.from_pretrained(
        options.model,
        options.kernel,
        vision_encoder=read_backbone("AutoModel", options.vision_encoder),
        language_model=read_backbone("AutoModelForCausalLM", options.language_model),
    )
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = model.device
    folder = options.tokenizer or options.language_model or options.model
    encode, decode = _text_coding(folder, model.config)
    ids = torch.tensor([encode(text)], device=device)
    encoder = model.vision_encoder
    media = {}
    if pictures:
        if encoder.image_size is None:
            raise ValueError("this model takes features, not images")
        values = [
            to_pixel_values(
                picture,
                encoder.image_size,
                mean=encoder.image_mean,
                std=encoder.image_std,
                fit=options.fit,
            )
            for picture in pictures
        ]
        media = {name: tensor.to(device) for name, tensor in stack_media([values]).items()}
    progress(f"{ids.shape[1]} tokens, {len(pictures)} image(s), {device}")
    out = model.generate(
        ids, **media, max_new_tokens=options.max_new_tokens, num_beams=options.num_beams
    )
    assert isinstance(out, Tensor)  # a pair only with return_cache
    print(decode(out[0, ids.shape[1] :]))
    return 0


def mark_images(text: str, images: int) -> str:
    """Return ``text`` with one marker per image; without any marker, all images come first.

    Raises
    ------
    ValueError
        The text has some markers, but not as many as there are images.
    """
    markers = text.count(MARKER)
    if not markers:
        return MARKER * images + text
    if markers != images:
        raise ValueError(f"the text has {markers} {MARKER} marker(s), but {images} image(s) given")
    return text


def _text_coding(
    folder: Path, config: FlamingoConfig
) -> tuple[Callable[[str], list[int]], Callable[[Tensor], str]]:
    """Return the functions text -> ids and ids -> text, by the tokenizer in ``folder``."""
    if config.uses_byte_tokenizer:
        own = ByteTokenizer()
        written = own.decode([own.bos_token_id], skip_special_tokens=False)
        return lambda text: own.encode(text, add_bos=not text.startswith(written)), own.decode
    tokenizer = read_folder("AutoTokenizer", folder)
    added = {token: name for name, token in tokenizer.get_added_vocab().items()}
    marker = added.get(config.image_token_id)
    if marker is None:
        raise ValueError(
            f"the tokenizer in {folder} has no token for images with id {config.image_token_id}, "
            "which the model has: save the one that language.add_media_tokens was given"
        )
    return (
        lambda text: encode_prompt(tokenizer, text.replace(MARKER, marker)),
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )
