"""Small random models of the projects whose checkpoints are converted, with open gates."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from testing.backbones import END_OF_CHUNK, IMAGE, clip, language_model
from testing.peers import open_flamingo_model

IDEFICS_VOCAB = 90
IDEFICS_IMAGE, IDEFICS_EOS = IDEFICS_VOCAB + 1, 2


def idefics(**changes: Any) -> nn.Module:
    """Build transformers' IDEFICS; ``changes`` go into its configuration."""
    import transformers

    torch.manual_seed(0)
    perceiver = {
        "use_resampler": True,
        "resampler_n_latents": 5,
        "resampler_depth": 2,
        "resampler_n_heads": 2,
        "resampler_head_dim": 12,
        "qk_layer_norms_perceiver": changes.pop("qk_layer_norms_perceiver", False),
    }
    config = transformers.IdeficsConfig(
        vocab_size=IDEFICS_VOCAB,
        additional_vocab_size=2,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_resampler=True,
        perceiver_config=perceiver,
        vision_config={
            "embed_dim": 16,
            "image_size": 16,
            "patch_size": 8,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            **changes.pop("vision_config", {}),
        },
        **changes,
    )
    model = transformers.IdeficsForVisionText2Text(config).eval()
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            parameter.data.uniform_(0.5, 1.0)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif parameter.ndim > 1:
            parameter.data.mul_(6)
    return model.requires_grad_(False)


def open_flamingo(model_type: str, every: int, vision: nn.Module | None = None) -> nn.Module:
    """Build OpenFlamingo's model with a gated block before every ``every``-th block."""
    vision = vision or clip()
    peer = open_flamingo_model(vision, language_model(model_type), every, IMAGE, END_OF_CHUNK)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in peer.named_parameters():
        if name.endswith("_gate"):
            parameter.data.uniform_(0.5, 1.0, generator=generator)
        elif "gated_cross_attn" in name and name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return peer.requires_grad_(False)


def released(peer: nn.Module) -> OrderedDict[str, Tensor]:
    """Return what OpenFlamingo's ``filter_state_dict_to_trainable`` keeps of a state dict."""
    state = OrderedDict()
    for name, tensor in peer.state_dict().items():
        if name == "lang_encoder.lm_head.weight":
            if peer.lang_encoder.config.model_type == "mpt":
                continue  # tied, and absent from the MPT that it was trained with
            name = "lang_encoder.embed_out.weight"  # the name in the transformers of that time
        block = ".decoder_layer." in name or "final" in name or "norm_f" in name
        if not block and not re.match(
            r"vision_encoder|lang_encoder\.(old_decoder_blocks|gated_cross_attn_layers)", name
        ):
            state[name] = tensor.clone()
    return state
