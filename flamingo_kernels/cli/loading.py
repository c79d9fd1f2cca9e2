"""What the commands load: frozen parts and tokenizers from folders of transformers' files."""

from __future__ import annotations

import functools
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from flamingo_kernels import FlamingoConfig
from flamingo_kernels.data.samples import TextEncoding
from flamingo_kernels.language import ByteTokenizer

MARKER = "<image>"
LONGEST_REASON = 300  # transformers lists all architectures that it knows


def text_coding(path: Path, config: FlamingoConfig) -> tuple[Any, Any]:
    """Functions text -> ids and ids -> text."""
    own = ByteTokenizer()
    if _is_byte_level(config):
        return lambda text: own.encode(text, add_bos=True), own.decode
    tokenizer = _tokenizer(path)
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


def text_encoding(path: Path | None, config: FlamingoConfig) -> TextEncoding:
    """How training data becomes ids: bytes for the package's own decoder, or a tokenizer's folder.

    Raises
    ------
    ValueError
        No folder for a model that needs one, or no id to pad with.
    """
    if _is_byte_level(config):
        encode = ByteTokenizer().encode
    elif path is None:
        raise ValueError("model.tokenizer is missing: this language model needs one")
    else:
        encode = functools.partial(_tokenizer(path).encode, add_special_tokens=False)
    return TextEncoding(
        encode,
        config.image_token_id,
        config.end_of_chunk_token_id,
        config.bos_token_id,
        config.eos_token_id,
        config.pad_token_id,
    )


def _is_byte_level(config: FlamingoConfig) -> bool:
    own = ByteTokenizer()
    return config.language.kind == "decoder" and config.image_token_id == own.image_token_id


def _tokenizer(path: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            'reading a tokenizer needs transformers: pip install "flamingo_kernels[hf]"'
        ) from error
    return _load(AutoTokenizer, "a tokenizer", _folder(path))


def frozen_part(auto_class: str, path: Path | None) -> torch.nn.Module | None:
    """A frozen part from a folder of transformers' files: safetensors, and no code."""
    if path is None:
        return None
    import transformers

    progress(f"loading {_folder(path)}")
    what = "a language model" if auto_class == "AutoModelForCausalLM" else "a vision encoder"
    return _load(getattr(transformers, auto_class), what, path, use_safetensors=True)


def _load(auto_class: Any, what: str, path: Path, **options: Any) -> Any:
    """What transformers reads from a folder; ValueError that names it for whatever is in it."""
    options |= {"local_files_only": True, "trust_remote_code": False}
    try:
        return auto_class.from_pretrained(path, **options)
    except Exception as error:  # broken files raise what their parsers raise
        reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" ...")
        raise ValueError(f"cannot load {what} from {path}: {reason}") from error


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    return path


def progress(text: str) -> None:
    """Say what is going on, beside the output."""
    print(text, file=sys.stderr, flush=True)
