"""Models of transformers: built from plain options, or read from a folder.

transformers is imported when one is built or read.
"""

from __future__ import annotations

import inspect
import json
import re
import reprlib
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import nn

from flamingo_kernels.bounds import bounded_building, check_counts, read_json

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

# Keys that name code, files or weights to load, whatever the architecture says they are.
_LOADING = re.compile(
    r".*_implementation.*|_?auto_(map|class)|quantization_config|(torch_)?dtype|(use_)?kernels?"
    r"|kernel_config|trust_remote_code|_?name_or_path|backbone|backbone_kwargs"
    r"|(use_)?pretrained(_backbone|_cfg.*)?|checkpoint_path"
)
# Words that configuration classes set although they do not declare them.
_MORE_WORDS = {
    "attention_layers",
    "dense_act_fn",
    "hidden_act",
    "layer_types",
    "out_features",
    "rope_parameters",
    "stage_names",
}
_CONFIG_FILE = "config.json"
_WORD = re.compile(r"[\w.^ -]{0,64}")

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
    ValueError
        An option could load code or files; see :func:`check_options`.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"building a {config.model_type!r} {what} needs transformers: "
            'pip install "flamingo_kernels[hf]"'
        ) from error
    check_options(config.model_type, config.options)
    options = transformers.AutoConfig.for_model(config.model_type, **config.options)
    return getattr(transformers, auto_class).from_config(options)


def _check_folder(folder: Path) -> int:
    """Refuse a ``config.json`` that asks the hub for code, or for far more than the folder holds.

    Returns
    -------
    int
        Tensors in the folder.
    """
    tensors = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            tensors += len(stored.keys())
    if (folder / _CONFIG_FILE).is_file():
        values = read_json(folder / _CONFIG_FILE)
        _check_implementations(_CONFIG_FILE, values)
        check_counts(values, tensors, str(folder))
    return tensors


def _check_implementations(name: str, value: Any) -> None:
    """Refuse kernels of the hub, which are named ``owner/repository``."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_implementations(str(key), part)
    elif "_implementation" in name and isinstance(value, str) and not _WORD.fullmatch(value):
        raise ValueError(f"{name}={reprlib.repr(value)} could load code: take it out of the config")


def check_options(model_type: str, options: Mapping[str, Any]) -> None:
    """Refuse options that are not plain values of an architecture.

    They come from files of others. Options that the architecture's own configuration class
    declares may be words, numbers, and lists and mappings of them. Others may be numbers. Those
    that name code, kernels, files or weights, and text that could, are refused.

    Raises
    ------
    ValueError
        Such an option, or an architecture that transformers does not know.
    """
    own = _own_options(model_type)
    for name, value in options.items():
        _check_option(f"options.{name}", name, value, words=name in own)


def _check_option(where: str, name: str, value: Any, *, words: bool) -> None:
    if _LOADING.fullmatch(name) and value is not None and value is not False:
        raise ValueError(
            f"{where}={reprlib.repr(value)} could load code or files: build that model yourself, "
            "and pass it in place of its configuration"
        )
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_option(f"{where}.{key}", str(key), part, words=words)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check_option(where, name, part, words=words)
    elif not (value is None or isinstance(value, (bool, int, float))):
        if not (words and isinstance(value, str) and _WORD.fullmatch(value)):
            what = "not a plain word" if words else "not an option of its architecture"
            raise ValueError(f"{where}={reprlib.repr(value)} is {what}")


def _own_options(model_type: str) -> set[str]:
    """Return the options that a configuration class declares itself, and their other names."""
    import transformers

    try:
        config_class = transformers.CONFIG_MAPPING[model_type]
    except KeyError:
        raise ValueError(f"transformers knows no model_type {reprlib.repr(model_type)}") from None
    names = _MORE_WORDS | set(getattr(config_class, "attribute_map", {}))
    for part in config_class.__mro__:
        if part is transformers.PretrainedConfig:
            break
        names |= inspect.get_annotations(part).keys()
        if "__init__" in vars(part):
            names |= inspect.signature(part.__init__).parameters.keys()
    return names


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
    """Return the options of a transformers configuration as JSON gives them back.

    What :func:`check_options` refuses, such as the name of a tokenizer's class, is left out.
    """

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            k: kept(v)
            for k, v in value.items()
            if k not in _NOT_OPTIONS and not _LOADING.fullmatch(str(k))
        }

    plain, found = json.loads(json.dumps(kept(values))), {}
    for name, value in plain.items():
        with suppress(ValueError):
            check_options(values["model_type"], {name: value})
            found[name] = value
    return found


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
        tensors = _check_folder(folder)  # a tokenizer reads the configuration of its model too
        with bounded_building(tensors, None, str(folder)):
            return getattr(transformers, auto_class).from_pretrained(folder, **options)
    except Exception as error:  # damaged files raise whatever their parsers raise
        reason = textwrap.shorten(str(error), _LONGEST_REASON, placeholder=" ...")
        raise ValueError(f"cannot load {what} from {folder}: {reason}") from error
