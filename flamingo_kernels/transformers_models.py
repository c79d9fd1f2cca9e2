"""Models of transformers: built from plain options, or read from a folder.

transformers is imported when one is built or read.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, Protocol

from torch import nn

# What a configuration of transformers writes about itself and its weights, and labels of
# classifiers.
_NOT_OPTIONS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}

_KINDS = {
    "AutoModel": "a vision encoder",
    "AutoModelForCausalLM": "a language model",
    "AutoTokenizer": "a tokenizer",
}
_LONGEST_REASON = 300  # characters; transformers lists all architectures that it knows


class TransformersConfig(Protocol):
    """The fields of a configuration that :func:`build_model` reads."""

    model_type: str
    options: dict[str, Any]


def build_model(auto_class: str, what: str, config: TransformersConfig) -> nn.Module:
    """Build the model with random weights, or without any on the meta device.

    Parameters
    ----------
    auto_class : str
        Class of transformers that builds it, such as ``"AutoModel"``.
    what : str
        Kind of model, for the error.
    config : TransformersConfig
        Architecture and options.

    Raises
    ------
    ImportError
        transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"building a {config.model_type!r} {what} needs transformers: "
            'pip install "flamingo_kernels[hf]"'
        ) from error
    options = transformers.AutoConfig.for_model(config.model_type, **config.options)
    return getattr(transformers, auto_class).from_config(options)


def check_declared_sizes(config: TransformersConfig, **built: int) -> None:
    """Raise ValueError unless ``config`` declares the sizes of the model that it built."""
    for name, value in built.items():
        declared = getattr(config, name)
        if declared != value:
            raise ValueError(
                f"config declares {name}={declared}, but {config.model_type!r} with its options "
                f"has {value}"
            )


def plain_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a transformers configuration as JSON gives them back."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: kept(v) for k, v in value.items() if k not in _NOT_OPTIONS}

    return json.loads(json.dumps(kept(values)))


def read_folder(auto_class: str, folder: Path) -> Any:
    """Return what a folder of transformers' files holds; no code in it is run.

    Parameters
    ----------
    auto_class : {"AutoModel", "AutoModelForCausalLM", "AutoTokenizer"}
        The class of transformers that reads it. Weights are read from safetensors alone.
    folder : Path

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    ImportError
        transformers is not installed.
    ValueError
        The folder cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    what = _KINDS[auto_class]
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f'reading {what} needs transformers: pip install "flamingo_kernels[hf]"'
        ) from error
    options = {"local_files_only": True, "trust_remote_code": False}
    if auto_class != "AutoTokenizer":
        options["use_safetensors"] = True
    try:
        return getattr(transformers, auto_class).from_pretrained(folder, **options)
    except Exception as error:  # damaged files raise whatever their parsers raise
        reason = textwrap.shorten(str(error), _LONGEST_REASON, placeholder=" ...")
        raise ValueError(f"cannot load {what} from {folder}: {reason}") from error
