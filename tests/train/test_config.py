"""Configurations from YAML, and errors that name the key and the value."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest

from flamingo_kernels.train import TrainConfig

yaml = pytest.importorskip("yaml")


def test_from_yaml(values, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values) + "seed: 7\n")
    config = TrainConfig.from_yaml(file)
    assert config.seed == 7 and config.datasets[1].weight == 0.2
    assert config.datasets[0].weight == 1.0 and config.optimizer.weight_decay == 0.1
    file.write_text(file.read_text().replace("lr: 0.01", "lr: 1e-3"))
    assert TrainConfig.from_yaml(file).optimizer.lr == 1e-3
    values["optimizer"] = {"gate_lr": "1e-2", "betas": [0.9, "9e-1"]}
    optimizer = TrainConfig.from_dict(values).optimizer
    assert optimizer.gate_lr == 1e-2 and optimizer.betas == (0.9, 0.9)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("optimizer", "lr"), "fast", "optimizer.lr must be float, got 'fast'"),
        (("optimizer", "lr"), -1, "optimizer.lr must be positive, got -1"),
        (("optimizer", "betas"), [0.9], r"optimizer.betas must be two numbers .* got \[0.9\]"),
        (
            ("optimizer", "warmup"),
            3,
            "optimizer.warmup: unknown key, given 3; known: lr, gate_lr, warmup_st",
        ),
        (("datasets", 1, "kind"), "photos", r"datasets\[1\].kind: unknown 'photos'; known: inter"),
        (("datasets", 0, "p_next"), 1.5, r"datasets\[0\].p_next must be in 0..1, got 1.5"),
        (("datasets", 0, "shards"), [], r"datasets\[0\].shards is empty"),
        (("datasets", 0, "shards"), "a.tar", r"datasets\[0\].shards must be tuple\[str, ...\]"),
        (("datasets", 0, "workers"), -1, r"datasets\[0\].workers must be at least 0, got -1"),
        (("datasets", 1, "name"), "pages", "datasets: name 'pages' is given twice"),
        (("datasets",), [], "datasets is empty"),
        (("datasets",), {"a": 1}, "datasets must be a list"),
        (("datasets",), [3], r"datasets\[0\] must hold keys and values, got 3"),
        (("model",), {}, "model.config is missing"),
        (("model", "compute"), "fp8", "model.compute: unknown 'fp8'; known: float32, bfloat16"),
        (("model", "pretrained"), "x", "model.pretrained has a config of its own"),
        (("steps",), 0, "steps must be positive, got 0"),
        (("optimizer", "gate_lr"), 0, "optimizer.gate_lr must be positive, got 0"),
        (("optimizer", "lr"), math.inf, "optimizer.lr must be finite, got inf"),
        (("optimizer", "weight_decay"), math.nan, "optimizer.weight_decay must be at least 0, got"),
        (("datasets", 0, "p_next"), math.nan, r"datasets\[0\].p_next must be in 0..1, got nan"),
        (("seed",), 2**70, "seed must be in 0..9223372036854775807, got 1180591620717411303424"),
        (("model", "kernel"), "fast", "model.kernel: unknown 'fast'; known: auto, triton"),
        (("epochs",), 3, "epochs: unknown key, given 3"),
    ],
)
def test_errors_name_the_key_and_the_value(path, value, message, values) -> None:
    values = copy.deepcopy(values)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig.from_dict(values)


def test_missing_keys_and_files(values, tmp_path: Path) -> None:
    del values["datasets"][1]["batch_size"]
    with pytest.raises(ValueError, match=r"^datasets\[1\].batch_size is missing"):
        TrainConfig.from_dict(values)
    for text, message in (("a: [", "is not YAML: "), ("3", "must hold keys and values, got 3")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=rf"bad\.yaml.*{message}"):
            TrainConfig.from_yaml(tmp_path / "bad.yaml")
    (tmp_path / "tag.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="is not YAML: could not determine a constructor"):
        TrainConfig.from_yaml(tmp_path / "tag.yaml")
