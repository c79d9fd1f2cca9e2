"""The models of the papers, as the nested values that ``FlamingoConfig.from_dict`` reads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flamingo_kernels.language.byte_tokenizer import ByteTokenizer
from flamingo_kernels.language.config import DecoderConfig, HuggingFaceLanguageConfig
from flamingo_kernels.vision.config import NFNET_VARIANTS, HuggingFaceVisionConfig, NFNetConfig


def _tiny() -> dict[str, Any]:
    vision = NFNetConfig(
        image_size=32, widths=(32, 64), depths=(1, 1), stem_width=16, group_width=16
    )
    tokens = ByteTokenizer()
    language = DecoderConfig(vocab_size=tokens.vocab_size, dim=64, depth=4, heads=4, head_dim=16)
    return {
        "vision": asdict(vision),
        "language": asdict(language),
        "resampler": {
            "dim": 64,
            "depth": 2,
            "heads": 4,
            "head_dim": 16,
            "num_latents": 16,
            "input_dim": vision.output_dim,
        },
        "cross_attention": {"every": 2, "heads": 4, "head_dim": 16},
        "image_token_id": tokens.image_token_id,
        "end_of_chunk_token_id": tokens.end_of_chunk_token_id,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }


def _flamingo(dim: int, depth: int, heads: int, every: int) -> dict[str, Any]:
    """Return a model of the paper (tables 4 and 5, B.1.1).

    Table 4 gives the 9B 40 layers; the parameter counts of table 5 fit 32.
    """
    text_vocab = 32_000
    widths, depths = NFNET_VARIANTS["F6"].widths, NFNET_VARIANTS["F6"].depths
    vision = NFNetConfig(image_size=320, widths=widths, depths=depths)
    # <image> and <EOC> take the last two rows of a vocabulary rounded up to 64.
    language = DecoderConfig(
        vocab_size=text_vocab + 64, dim=dim, depth=depth, heads=heads, head_dim=128
    )
    return {
        "vision": asdict(vision),
        "language": asdict(language),
        "resampler": {"dim": 1536, "heads": 16, "head_dim": 128, "input_dim": vision.output_dim},
        "cross_attention": {"every": every, "heads": heads, "head_dim": 128},
        "image_token_id": text_vocab,
        "end_of_chunk_token_id": text_vocab + 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _open_flamingo(
    language: HuggingFaceLanguageConfig, every: int, image_token_id: int
) -> dict[str, Any]:
    """Return an OpenFlamingo v2: CLIP ViT-L/14, 8 x 64 heads, insertion at each group's end."""
    clip = HuggingFaceVisionConfig(
        model_type="clip_vision_model",
        options={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 224,
            "projection_dim": 768,
        },
        image_size=224,
        output_dim=1024,
        drop_class_token=True,
    )
    return {
        "vision": asdict(clip),
        "language": asdict(language),
        "resampler": {
            "dim": 1024,
            "heads": 8,
            "head_dim": 64,
            "activation": "gelu",
            "max_num_frames": None,
            "final_norm": True,
        },
        "cross_attention": {
            "every": every,
            "offset": every - 1,
            "heads": 8,
            "head_dim": 64,
            "activation": "gelu",
            "media_norm": False,
        },
        "image_token_id": image_token_id,
        "end_of_chunk_token_id": image_token_id - 1,
        "eos_token_id": 0,
        "pad_token_id": image_token_id + 1,
        "new_token_ids": (image_token_id - 1, image_token_id),
    }


def _mpt(dim: int, depth: int, heads: int) -> HuggingFaceLanguageConfig:
    vocab_size = 50_280
    return HuggingFaceLanguageConfig(
        model_type="mpt",
        options={
            "d_model": dim,
            "n_layers": depth,
            "n_heads": heads,
            "vocab_size": vocab_size,
            "max_seq_len": 2048,
        },
        dim=dim,
        depth=depth,
        vocab_size=vocab_size,
    )


def _gpt_neox_3b() -> HuggingFaceLanguageConfig:
    """Return the configuration of RedPajama-INCITE 3B."""
    dim, depth, vocab_size = 2560, 32, 50_280
    return HuggingFaceLanguageConfig(
        model_type="gpt_neox",
        options={
            "hidden_size": dim,
            "num_hidden_layers": depth,
            "num_attention_heads": 32,
            "intermediate_size": 4 * dim,
            "vocab_size": vocab_size,
            "rotary_pct": 1.0,
            "use_parallel_residual": False,
        },
        dim=dim,
        depth=depth,
        vocab_size=vocab_size,
    )


NAMED_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": _tiny(),
    "flamingo-3b": _flamingo(2048, 24, 16, 1),
    "flamingo-9b": _flamingo(4096, 32, 32, 4),
    "flamingo-80b": _flamingo(8192, 80, 64, 7),
    "open-flamingo-3b": _open_flamingo(_mpt(2048, 24, 16), 1, 50_278),
    "open-flamingo-4b": _open_flamingo(_gpt_neox_3b(), 2, 50_278),
    "open-flamingo-9b": _open_flamingo(_mpt(4096, 32, 32), 4, 50_278),
}
