"""Saved models: one ``model.safetensors`` that holds the config in its header; no pickle."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flamingo_kernels.bare_modules import is_plain_tensor
from flamingo_kernels.bounds import TooLargeError, bounded_building, check_counts
from flamingo_kernels.language import HuggingFaceLanguageModel, build_language_model
from flamingo_kernels.language.media_tokens import resize_embeddings
from flamingo_kernels.model.backbones import as_language_model, as_vision_encoder
from flamingo_kernels.model.bridge import build_connector, build_cross_attention, connector_name
from flamingo_kernels.model.config import FlamingoConfig
from flamingo_kernels.model.network import FlamingoNetwork, Network
from flamingo_kernels.vision import build_vision_encoder

WEIGHTS_FILE = "model.safetensors"
_LARGEST_SIDE = 8192  # pixels
# One file, so that config and weights are replaced in one step.
CONFIG_KEY = "flamingo_kernels.config"


def save(network: FlamingoNetwork, path: str | PathLike, include_frozen: bool) -> None:
    """Write ``network``; see ``FlamingoModel.save_pretrained``."""
    tensors = network.state_dict()
    if not include_frozen:
        wanted = network.trainable_parameters().keys() | network.saved_frozen
        tensors = {name: tensor for name, tensor in tensors.items() if name in wanted}
    _check_can_be_written(network, tensors.keys())
    write(tensors, network.config, path)


def write(tensors: dict[str, Tensor], config: FlamingoConfig, path: str | PathLike) -> None:
    """Write a checkpoint; errors are those of ``FlamingoModel.save_pretrained``.

    A crash leaves either the old file or the new one.
    """
    distinct = {name: tensors[name].detach().contiguous() for name in _owners(tensors)}
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())}
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / WEIGHTS_FILE
    if file.exists() and not _is_ours(file):
        raise FileExistsError(
            f"{file} holds weights that are not a checkpoint of flamingo_kernels: give another "
            "folder"
        )
    temporary = directory / f".{WEIGHTS_FILE}.{secrets.token_hex(8)}"
    try:
        write_tensors(distinct, temporary, metadata)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of any new file.

    safetensors writes files that their owner alone can read, whatever the umask says.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata)
    file.chmod(mode)


def _is_ours(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as stored:
            return CONFIG_KEY in (stored.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _check_can_be_written(network: FlamingoNetwork, names: Set[str]) -> None:
    """Raise ValueError unless the parameters ``names`` are plain numbers in memory."""
    faults = [
        f"{name} ({type(parameter).__name__} of {parameter.dtype} on {parameter.device})"
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if name in names
        and (
            parameter.is_meta or not is_plain_tensor(parameter) or not parameter.is_floating_point()
        )
    ]
    if faults:
        raise ValueError(
            f"cannot write {len(faults)} parameters that are quantised, sharded or offloaded, the "
            f"first of which is {faults[0]}: save the model as it was before, and quantise it "
            "again after loading; without include_frozen the frozen parts may be any of these"
        )


def load(
    network_class: type[Network],
    path: str | PathLike,
    kernel: str,
    *,
    vision_encoder: nn.Module | int | None,
    language_model: nn.Module | None,
) -> Network:
    """Read the checkpoint at ``path``; see ``FlamingoModel.from_pretrained``."""
    file = Path(path) / WEIGHTS_FILE
    config, tensors = read(file)
    if vision_encoder is not None:
        vision_encoder = as_vision_encoder(vision_encoder, config)
    if language_model is not None:
        language_model = as_language_model(language_model)
    given = {"vision_encoder": vision_encoder, "language_model": language_model}
    for part, module in given.items():
        stored = any(name.startswith(f"{part}.") for name in tensors)
        stored |= part == "vision_encoder" and config.vision.kind == "features"
        if not stored and module is None:
            raise ValueError(
                f"{file} holds no {part}; pass {part}=, the one that the checkpoint was trained "
                "with"
            )
    check_buildable(config, tensors, file, given)
    if isinstance(language_model, HuggingFaceLanguageModel):
        _resize_to_checkpoint(language_model, config, tensors, file)
    try:
        with _bounds(tensors, file):
            network = network_class(config, kernel, **given)
    except ValueError:
        raise
    except Exception as error:  # other libraries' configurations raise all kinds
        raise ValueError(f"cannot build the model that {file} describes: {error}") from error

    def is_given(name: str) -> bool:
        return given.get(name.split(".", 1)[0]) is not None

    expected = network.state_dict()
    needed = {name for name in _owners(expected) if not is_given(name) or name in tensors}
    faults = misfits(tensors, expected, needed)
    faults["of another kind"] = sorted(
        f"{name} {tensor.dtype} instead of {expected[name].dtype}"
        for name, tensor in tensors.items()
        if name in expected and tensor.is_floating_point() != expected[name].is_floating_point()
    )
    if problems := described(faults):
        raise ValueError(f"{file} does not fit its config {config.name!r}: tensors {problems}")
    for name, parameter in network.named_parameters():
        # A part that was given keeps its own dtype: one tensor of another would not run with it.
        if name in tensors and not is_given(name):
            parameter.data = parameter.data.to(tensors[name].dtype)
    network.load_state_dict(tensors, strict=False)
    network.saved_frozen = set(filter(is_given, tensors))
    return network


def check_buildable(
    config: FlamingoConfig,
    tensors: Mapping[str, Tensor],
    file: Path,
    given: Mapping[str, nn.Module | None],
) -> None:
    """Refuse a configuration that describes a model far larger than its file, before building it.

    The parts that are not ``given`` are built on the meta device, which takes no memory.

    Raises
    ------
    ValueError
        The configuration asks for more layers, tensors or values than ``tensors`` can be.
    """
    check_counts(config.to_dict(), len(tensors), str(file))
    side = getattr(config.vision, "image_size", 0)
    if side > _LARGEST_SIDE:  # no tensor of a convolutional encoder depends on it
        raise TooLargeError(f"{file}: its config has images of {side} pixels a side")
    build: dict[str, Callable[[], nn.Module]] = {
        "vision_encoder": lambda: build_vision_encoder(config.vision),
        "language_model": lambda: build_language_model(config.language),
        connector_name(config): lambda: build_connector(config, "torch"),
        "gated_cross_attn_layers": lambda: build_cross_attention(config, "torch"),
    }
    with _bounds(tensors, file), torch.device("meta"):
        for part, make in build.items():
            if given.get(part) is None:
                try:
                    make()
                except TooLargeError:
                    raise
                except Exception:  # other faults are told where the network is built
                    continue


def _bounds(tensors: Mapping[str, Tensor], file: Path) -> AbstractContextManager[None]:
    values = sum(tensor.numel() for tensor in tensors.values())
    return bounded_building(len(tensors), values, str(file))


def misfits(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], needed: Set[str]
) -> dict[str, list[str]]:
    """Find the names of tensors that do not fit a model.

    Parameters
    ----------
    tensors, expected : mapping of str to Tensor
        What there is, and the model's state dict.
    needed : set of str
        Names that must be among ``tensors``.

    Returns
    -------
    dict of str to list of str
        Sorted names by fault, the shapes added where they differ. A list may be empty.
    """
    return {
        "missing": sorted(needed - tensors.keys()),
        "unknown": sorted(tensors.keys() - expected.keys()),
        "of another shape": sorted(
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name].shape
        ),
    }


def described(faults: Mapping[str, list[str]]) -> str:
    """Return what :func:`misfits` found in words, the first names of each fault; "" for nothing."""
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in faults.items()
        if names
    )


def _resize_to_checkpoint(
    language_model: HuggingFaceLanguageModel,
    config: FlamingoConfig,
    tensors: Mapping[str, Tensor],
    file: Path,
) -> None:
    """Resize the embeddings if the checkpoint knows all rows that they lack; ValueError if not."""
    inner = language_model.model
    rows, wanted = language_model.vocab_size, config.language.vocab_size
    embeddings = f"language_model.model.{_name_of(inner, inner.get_input_embeddings())}.weight"
    # No other row is read: labels at padding do not count.
    known = {*config.new_token_ids, config.pad_token_id}
    if embeddings in tensors or (rows < wanted and known.issuperset(range(rows, wanted))):
        resize_embeddings(inner, wanted)
    elif rows != wanted:
        raise ValueError(
            f"the language model has {rows} embeddings, {file} was trained with {wanted}: call "
            "add_media_tokens on it with the tokenizer first, or pass the one it was trained with"
        )


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _owners(tensors: dict[str, Tensor]) -> list[str]:
    """Return the first name of each memory, since tied embeddings have several names."""
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        seen.setdefault(place if not tensor.is_meta else name, name)
    return list(seen.values())


def read(file: Path) -> tuple[FlamingoConfig, dict[str, Tensor]]:
    """Read what :func:`write` wrote; FileNotFoundError or ValueError if ``file`` is not that."""
    if not file.is_file():
        raise FileNotFoundError(
            f"no {file.name} in {file.parent}: not a flamingo_kernels checkpoint"
        )
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt or not a safetensors file: {error}") from error
    if CONFIG_KEY not in metadata:
        raise ValueError(
            f"{file} has no {CONFIG_KEY!r} in its header: not written by flamingo_kernels"
        )
    try:
        config = FlamingoConfig.from_dict(json.loads(metadata[CONFIG_KEY]))
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"the config in {file} is not one of flamingo_kernels: {error}") from error
    return config, tensors
