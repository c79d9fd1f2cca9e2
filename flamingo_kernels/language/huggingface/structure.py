"""Find the decoder blocks of a model by its structure, and check that it is causal."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from flamingo_kernels.language.huggingface.cache import CACHE_NAMES, cache_name

# Layers without keys, as configurations of transformers name them.
_RECURRENT_LAYERS = {"linear_attention", "mamba"}
# How configurations name the number of residual streams (AltUp, hyper-connections).
_STREAMS = ("altup_num_inputs", "hc_mult")


def inner_model(model: nn.Module) -> Any:
    """Return the model of transformers inside what ``torch.compile`` and PEFT put around it.

    Raises
    ------
    ValueError
        An adapter of PEFT puts tokens of its own in front of a text.
    """
    configs = getattr(model, "peft_config", None)
    if hasattr(model, "get_base_model") and isinstance(configs, dict):
        kinds = {type(c).__name__ for c in configs.values() if c.is_prompt_learning}
        if kinds:
            raise ValueError(
                f"cannot wrap a PEFT model with {', '.join(sorted(kinds))}: its virtual tokens "
                "would shift those that see images; take an adapter inside the layers, such as LoRA"
            )
        return inner_model(model.get_base_model())
    original = getattr(model, "_orig_mod", None)
    return model if original is None else inner_model(original)


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text model; ValueError if there is none."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"cannot wrap {type(model).__name__}: it has no config")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the decoder blocks of a Hugging Face causal language model.

    They are the only ``ModuleList`` with ``num_hidden_layers`` entries that is not inside another
    such list.

    Returns
    -------
    tuple of str and nn.ModuleList
        The name of the list in ``model``, and the list.

    Raises
    ------
    ValueError
        The configuration has no ``num_hidden_layers``, or no list or several lists fit.
    """
    model_name = type(model).__name__
    count = getattr(text_config(model), "num_hidden_layers", None)
    if count is None:
        raise ValueError(f"cannot wrap {model_name}: its config has no num_hidden_layers")
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [name for name, blocks in lists.items() if len(blocks) == count]
    outermost = [
        name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)
    ]
    if len(outermost) == 1:
        return outermost[0], lists[outermost[0]]
    if outermost:
        raise ValueError(
            f"cannot wrap {model_name}: several module lists have num_hidden_layers={count} "
            f"entries, so its decoder blocks are ambiguous: {', '.join(outermost)}"
        )
    found = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "none"
    raise ValueError(
        f"cannot wrap {model_name}: no module list has num_hidden_layers={count} entries; "
        f"module lists found: {found}"
    )


def check_causal(model: nn.Module) -> None:
    """Raise ValueError, with the reason, unless ``model`` can be decoded token by token."""
    why = None
    parameters = inspect.signature(model.forward).parameters
    if getattr(text_config(model), "is_encoder_decoder", False):
        why = "it is an encoder with a decoder; a causal language model is needed"
    elif getattr(model, "get_output_embeddings", lambda: None)() is None:
        why = "it has no language-model head (get_output_embeddings): take its ...ForCausalLM"
    elif not getattr(model, "can_generate", lambda: False)():
        why = "transformers cannot generate with it (can_generate), so it is not a causal model"
    elif cache_name(model) is None:
        why = (
            f"its forward takes no {' or '.join(CACHE_NAMES)}, so that decoding step by step "
            f"cannot tell which tokens are new; it takes {', '.join(parameters)}"
        )
    elif _is_recurrent(model):
        why = (
            "its cache holds states and no keys, so that decoding step by step cannot tell which "
            "tokens are new"
        )
    elif any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules()):
        why = "its positions are counted from the padding token's id on, as RoBERTa's"
    elif _is_bidirectional(model):
        why = (
            "its attention is bidirectional, so text would see images that come after it: build it "
            "as a decoder (is_decoder=True or is_causal=True in its configuration)"
        )
    elif streams := [name for name in _STREAMS if getattr(text_config(model), name, None)]:
        why = (
            f"its blocks pass on several residual streams ({', '.join(streams)}), where one "
            "[B, T, dim] is needed"
        )
    if why is not None:
        raise ValueError(f"cannot wrap {type(model).__name__}: {why}")


def _is_bidirectional(model: nn.Module) -> bool:
    """Whether the configuration or the attention of any block says so.

    Of attention that calls itself a decoder the mask is causal, whatever ``is_causal`` says.
    """
    config = text_config(model)
    if getattr(config, "is_causal", True) is False:
        return True
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return True
    for block in find_blocks(model)[1]:
        for name in ("is_decoder", "is_causal"):
            said = [getattr(m, name) for m in block.modules() if hasattr(m, name)]
            if said:
                if not any(said):
                    return True
                break
    return False


def _is_recurrent(model: nn.Module) -> bool:
    """Whether no layer of ``model`` keeps keys, by which its cache could count tokens."""
    layers = set(getattr(text_config(model), "layer_types", None) or ())
    return getattr(model, "_is_stateful", False) and layers <= _RECURRENT_LAYERS
