"""Tiny random transformers models of many architectures, and a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

DIM, DEPTH, VOCAB, IMAGE, END_OF_CHUNK = 32, 3, 97, 95, 96
_HEADED = {"num_hidden_layers": DEPTH, "num_attention_heads": 4}
_GROUPED = {"hidden_size": DIM, "intermediate_size": 48, "num_key_value_heads": 2, **_HEADED}
LANGUAGE_OPTIONS = {
    "llama": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": _GROUPED,
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 6},
    "phi": {"hidden_size": DIM, "intermediate_size": 48, **_HEADED},
    "gpt_neox": {"hidden_size": DIM, "intermediate_size": 48, **_HEADED},
    "opt": {
        "hidden_size": DIM,
        "word_embed_proj_dim": DIM,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        **_HEADED,
    },
    "gpt2": {"n_embd": DIM, "n_layer": DEPTH, "n_head": 4, "n_positions": 64},
    "mpt": {"d_model": DIM, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": 64},
    "falcon": {"hidden_size": DIM, **_HEADED},
    "bloom": {"hidden_size": DIM, "n_layer": DEPTH, "n_head": 4},
    "gptj": {"n_embd": DIM, "n_layer": DEPTH, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
}
_MIXED = {**_GROUPED, "num_hidden_layers": 2, "head_dim": 8}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
}
_EXPERTS = {
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    **{f"linear_num_{kind}_heads": 2 for kind in ("key", "value")},
    **{f"linear_{kind}_head_dim": 8 for kind in ("key", "value")},
}
# Language models with recurrent or convolution states beside keys and values.
HYBRID_OPTIONS = {
    "granitemoehybrid": {**_MIXED, **_MAMBA, **_EXPERTS, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {**_MIXED, **_MAMBA, "mamba_d_ssm": 64},
    "bamba": {**_MIXED, **_MAMBA, "attn_layer_indices": [1]},
    "qwen3_next": {**_MIXED, **_LINEAR, **_EXPERTS},
    "olmo_hybrid": {**_MIXED, **_LINEAR},
    "lfm2": {**_MIXED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "jamba": {
        **_MIXED,
        **_EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "minimax": {**_MIXED, **_EXPERTS, "layer_types": ["full_attention", "linear_attention"]},
    "recurrent_gemma": {
        **_MIXED,
        "block_types": ["recurrent", "attention"],
        "lru_width": DIM,
        "attention_window_size": 64,
    },
}
EAGER_ONLY = ("bloom", "gptj", "mpt")
SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def sharpen(model: nn.Module) -> nn.Module:
    """Scale weights up: at transformers' initialisation attention hardly shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


def language_model(model_type: str, attention: str | None = None, **changes: object) -> nn.Module:
    """Build a transformers causal language model in evaluation mode, with the ids of media tokens.

    ``attention`` is transformers' ``attn_implementation``; ``changes`` go into the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = {**SPECIAL, **{**LANGUAGE_OPTIONS, **HYBRID_OPTIONS}[model_type], **changes}
    config = AutoConfig.for_model(model_type, **options)
    config.image_token_id, config.end_of_chunk_token_id = IMAGE, END_OF_CHUNK
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return sharpen(model.eval())


def clip() -> nn.Module:
    """Build a tiny CLIP vision model."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    return CLIPVisionModel(CLIPVisionConfig(**_TOWER)).eval()


def siglip() -> nn.Module:
    """Build a tiny SigLIP vision model without a head."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(1)
    return SiglipVisionModel(SiglipVisionConfig(**_TOWER, vision_use_head=False)).eval()


def open_gates(model: nn.Module) -> nn.Module:
    """Set the gates to random values, so that the images matter."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.uniform_(0.5, 1.0, generator=generator)
    return model


def state_of(*models: nn.Module) -> list[object]:
    """Return everything that wrapping or loading could change: modes, hooks, parameters, config."""
    found: list[object] = []
    for model in models:
        for name, module in model.named_modules():
            attributes = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int))}
            found.append((name, attributes, len(module._forward_pre_hooks)))
        found += [
            (n, p.requires_grad, p.dtype, tuple(p.shape)) for n, p in model.named_parameters()
        ]
        found.append(model.config.to_dict())
    return found


def word_tokenizer(*words: str) -> Any:
    """Build a transformers tokenizer that splits at spaces; id 0 is for unknown words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(("[UNK]", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
