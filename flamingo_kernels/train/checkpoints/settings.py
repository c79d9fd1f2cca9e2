"""Settings of a run and of its continuation, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What says how long to run, what to write, and how fast: no number of the run depends on it. The
# base model is compared by its fingerprint, and folders may have moved.
_FREE = {
    "steps",
    "log_every",
    "save_every",
    "keep",
    "model.config",
    "model.pretrained",
    "model.language_model",
    "model.vision_encoder",
    "model.tokenizer",
    "model.kernel",
    "model.activation_checkpointing",
}
# What may change on purpose. Anything else makes data positions or draws those of another run.
_CHANGEABLE = ("optimizer.", "model.compute")
_CHANGEABLE_OF_A_DATASET = ("weight", "loss_before_first_image", "image_root")


def compare(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the settings that a continuation changes and may change, in words.

    Parameters
    ----------
    folder : Path
        The checkpoint, for the error.
    before, now : dict
        ``TrainConfig.to_dict()``, without the output, of the run that wrote the checkpoint, and of
        its continuation.

    Raises
    ------
    ValueError
        Settings differ that the data positions or the random draws depend on.
    """
    old, new = _flat("", before), _flat("", now)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    words = {name: f"{name} {_shown(new, name)} instead of {_shown(old, name)}" for name in changed}
    words = {name: text for name, text in words.items() if name not in _FREE}
    fixed = [text for name, text in words.items() if not _may_change(name)]
    if fixed:
        raise ValueError(
            f"{folder} was saved by a run with other settings: {'; '.join(fixed[:4])}"
            f"{f' and {len(fixed) - 4} more' if fixed[4:] else ''}. Continue with those of the "
            "run, or train into another output folder from what flamingo-kernels export writes"
        )
    return list(words.values())


def _may_change(name: str) -> bool:
    if name.startswith("datasets."):
        return name.rpartition(".")[2] in _CHANGEABLE_OF_A_DATASET
    return name.startswith(_CHANGEABLE)


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return leaves by dotted names; datasets by their own names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key == "datasets":
            value = {section["name"]: section for section in value}
        if isinstance(value, dict):
            found |= _flat(f"{prefix}{key}.", value)
        else:
            found[f"{prefix}{key}"] = value
    return found


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"
