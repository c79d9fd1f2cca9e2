"""Configuration of a training run, from YAML; every error names the key and its value."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from flamingo_kernels.data.formats import PARSERS
from flamingo_kernels.data.images import FITS
from flamingo_kernels.fields import (
    build,
    check_known,
    check_positive,
    check_types,
    shortened,
    shown,
    unknown_and_missing,
)
from flamingo_kernels.ops.dispatch import KERNELS
from flamingo_kernels.train.yaml_file import read_yaml

T = TypeVar("T")
COMPUTE_DTYPES = ("float32", "bfloat16")
STRATEGIES = ("ddp", "fsdp")
_FLOATS = (float, float | None, tuple[float, ...])
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model to train.

    Attributes
    ----------
    config : str or None
        Name of a configuration, or a JSON file.
    pretrained : str or None
        Folder of a checkpoint, in place of ``config``.
    language_model, vision_encoder, tokenizer : str or None
        Folders of transformers' files.
    kernel : str
        ``auto``, ``triton``, ``cpp`` or ``torch``.
    compute : {"float32", "bfloat16"}
        Dtype of activations, gradients and frozen parts; master weights are always float32.
    activation_checkpointing : bool
    """

    config: str | None = None
    pretrained: str | None = None
    language_model: str | None = None
    vision_encoder: str | None = None
    tokenizer: str | None = None
    kernel: str = "auto"
    compute: str = "float32"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_known(self, "compute", COMPUTE_DTYPES)
        check_known(self, "kernel", ("auto", *KERNELS))
        given = [self.config, self.pretrained, self.language_model]
        if given == [None, None, None]:
            raise ValueError("ModelSection.config is missing: or give pretrained or language_model")
        if self.config is not None and self.pretrained is not None:
            raise ValueError("ModelSection.pretrained has a config of its own: leave config out")

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder of the tokenizer: ``tokenizer``, or else where the language model is."""
        folder = self.tokenizer or self.language_model or self.pretrained
        return None if folder is None else Path(folder)


@dataclass(frozen=True, kw_only=True)
class DatasetSection:
    """One dataset; see ``data.samples.SampleBuilder`` for the options of its samples.

    Attributes
    ----------
    name : str
        What log lines, checkpoints and errors call it.
    shards : tuple of str
        File names and glob patterns.
    batch_size : int
        Rows per process.
    image_root : str or None
        Folder that image names are relative to and may not leave; None: the shard's.
    weight : float
        The lambda of its loss (1.0 for M3W, 0.2 for image-text pairs, 0.03 for video).
    fit, flip, colour : str, float, float
        See ``data.augment.ImagePreparation``.
    shuffle : int
        Records in the buffer that the next one is drawn from.
    workers : int
        Processes that prepare batches; 0 prepares them in the training process.
    loss_before_first_image : bool
        Whether text before the first image counts in the loss; OpenFlamingo leaves it out.
    """

    name: str
    kind: str
    shards: tuple[str, ...]
    batch_size: int
    weight: float = 1.0
    max_tokens: int = 256
    max_images: int = 5
    p_next: float = 0.5
    frames: int = 8
    leading_space: float = 0.5
    image_root: str | None = None
    fit: str = "pad"
    flip: float = 0.5
    colour: float = 0.1
    shuffle: int = 1000
    workers: int = 0
    loss_before_first_image: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_known(self, "kind", tuple(PARSERS))
        check_known(self, "fit", FITS)
        check_positive(
            self, "batch_size", "weight", "max_tokens", "max_images", "frames", "shuffle"
        )
        for name in ("p_next", "leading_space", "flip", "colour"):
            _in_range(self, name, 0, 1)
        _in_range(self, "workers", 0, None)
        if not self.shards:
            raise ValueError("DatasetSection.shards is empty; give file names or glob patterns")


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """Options of AdamW; the defaults are the paper's (appendix B.1.2).

    The paper gives no betas and no eps.

    Attributes
    ----------
    lr : float
        Peak learning rate. The rate grows linearly to it over ``warmup_steps``, and stays.
    gate_lr : float or None
        Peak rate of the gates; None: ``lr``. Behind a closed gate gradients are tiny, but Adam
        normalises them to full-size steps, so layers behind slow-opening gates drift to noise. A
        higher rate opens the gates earlier.
    warmup_steps : int
    weight_decay : float
        Of all parameters but the resampler and the rows of new tokens, which have none.
    betas, eps : tuple of two floats, float
    clip : float
        Global norm that gradients are clipped to.
    """

    lr: float = 1e-4
    gate_lr: float | None = None
    warmup_steps: int = 5000
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "lr", "gate_lr", "eps", "clip")
        _in_range(self, "warmup_steps", 0, None)
        _in_range(self, "weight_decay", 0, None)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                "OptimizerSection.betas must be two numbers in [0, 1), got "
                + shown(list(self.betas))
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes
    ----------
    model, datasets, optimizer
        The sections.
    steps : int
        Updates to make.
    output : str
        Folder that gets ``log.jsonl`` and the checkpoints ``step_00001000`` and so on.
    distributed : {"ddp", "fsdp"}
        What each process of ``torchrun`` holds: a whole model (``ddp``) or shards of it (``fsdp``).
    seed : int
        Seed of new weights and of all draws from the data.
    log_every, save_every : int
        Steps between lines of the log, and between checkpoints.
    keep : int
        The newest checkpoints that are kept.
    """

    model: ModelSection
    datasets: tuple[DatasetSection, ...]
    steps: int
    output: str
    optimizer: OptimizerSection = dataclasses.field(default_factory=OptimizerSection)
    distributed: str = "ddp"
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "steps", "log_every", "save_every", "keep")
        check_known(self, "distributed", STRATEGIES)
        _in_range(self, "seed", 0, _LARGEST_SEED)
        names = [dataset.name for dataset in self.datasets]
        if not names:
            raise ValueError("TrainConfig.datasets is empty; training needs at least one")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"TrainConfig.datasets: name {shown(repeated[0])} is given twice")

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts of JSON types, the folders of the model absolute.

        :meth:`from_dict` reads them.
        """
        values = dataclasses.asdict(self)
        model = values["model"]
        for name in ("pretrained", "language_model", "vision_encoder", "tokenizer"):
            if model[name] is not None:
                model[name] = str(Path(model[name]).absolute())
        if model["config"] is not None and model["config"].endswith(".json"):
            model["config"] = str(Path(model["config"]).absolute())
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Return the configuration of nested dicts and lists.

        Raises
        ------
        ValueError
            A key or value is wrong; the message names it.
        """
        values = dict(_mapping(values, "the configuration"))
        datasets = values.get("datasets", ())
        if not isinstance(datasets, (list, tuple)):
            raise ValueError(f"datasets must be a list, got {shown(datasets)}")
        if "model" in values:
            values["model"] = _build(ModelSection, values["model"], "model")
        if "optimizer" in values:
            values["optimizer"] = _build(OptimizerSection, values["optimizer"], "optimizer")
        values["datasets"] = tuple(
            _build(DatasetSection, section, f"datasets[{i}]") for i, section in enumerate(datasets)
        )
        return _build(cls, values, "")

    @classmethod
    def from_yaml(cls, path: str | PathLike) -> TrainConfig:
        """Return the configuration in a YAML file.

        Relative paths in it are relative to the working directory.

        Raises
        ------
        FileNotFoundError, ImportError
            No such file, or no PyYAML.
        ValueError
            See :func:`flamingo_kernels.train.yaml_file.read_yaml`; or a key or value is wrong, and
            the message names it.
        """
        values = read_yaml(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold keys and values, got {shown(values)}")
    return values


def _build(section: type[T], values: Any, where: str) -> T:
    if isinstance(values, section):
        return values
    prefix = f"{where}." if where else ""
    unknown, missing = unknown_and_missing(section, _mapping(values, where))
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(section))
        key = unknown[0]
        raise ValueError(
            f"{prefix}{shortened(str(key))}: unknown key, given {shown(values[key])}; "
            f"known: {known}"
        )
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing")
    hints = get_type_hints(section)
    # YAML 1.1 reads 1e-4 as text.
    values = {k: _numbers(v) if hints[k] in _FLOATS else v for k, v in values.items()}
    return build(section, values, prefix)


def _numbers(value: Any) -> Any:
    """Return the numbers that texts write, also those in a list; anything else as it is."""
    return tuple(map(_number, value)) if isinstance(value, (list, tuple)) else _number(value)


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _in_range(config: Any, name: str, low: float, high: float | None) -> None:
    value = getattr(config, name)
    if not low <= value < math.inf or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{type(config).__name__}.{name} must be {allowed}, got {shown(value)}")
