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


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (("epochs",), "text"),
        (("datasets",), "integer"),
        (("steps",), "integer"),
        (("seed",), "integer"),
        (("output",), "nested"),
        (("optimizer", "betas"), "list"),
        (("model", "kernel"), "text"),
    ],
)
def test_errors_show_little_of_a_large_value(path, kind, values) -> None:
    large = {"text": "x" * 10**6, "integer": -(10**9999), "list": ["x"] * 10**6}
    large["nested"] = [[["x"] * 1000] * 1000] * 1000
    values = copy.deepcopy(values)
    (values[path[0]] if path[1:] else values)[path[-1]] = large[kind]
    with pytest.raises(ValueError, match=rf"^{'.'.join(path)}\W") as raised:
        TrainConfig.from_dict(values)
    assert len(str(raised.value)) < 500
    if kind == "integer":
        assert "got <an integer of 33216 bits>" in str(raised.value)


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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_byte_order_marks(encoding: str, values, tmp_path: Path) -> None:
    values["output"] = "läufe"
    text = yaml.safe_dump(values, allow_unicode=True)
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "run.yaml").write_bytes((mark + text).encode(encoding))
    assert TrainConfig.from_yaml(tmp_path / "run.yaml").output == "läufe"


@pytest.mark.parametrize(
    "data", [b"a: \xff\xfe", "a: 1".encode("utf-16-le"), "é".encode("latin-1")]
)
def test_other_encodings_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML: "):
        TrainConfig.from_yaml(tmp_path / "run.yaml")


def bomb(levels: int, first: str, line: str) -> str:
    repeated = [line.format(i=i, many=", ".join([f"*a{i - 1}"] * 10)) for i in range(1, levels)]
    return "\n".join([f"a0: &a0 {first}", *repeated, f"model: *a{levels - 1}"])


LONG = "x" * 100_000
HOSTILE = {
    "aliases": (bomb(30, "[x, x]", "a{i}: &a{i} [{many}]"), r"line \d+: more than 100,000 values"),
    "mappings": (
        bomb(20, "{x: y}", "a{i}: &a{i} {{p: [{many}], q: [{many}]}}"),
        r"line \d+: more than 100,000 values, counting what aliases \(\*\) repeat",
    ),
    "merges": (bomb(20, "{x: y}", "a{i}: &a{i} {{<<: [{many}]}}"), r"line \d+: more than 100,000"),
    "keys": (bomb(9, "[x, x]", "? &a{i} [{many}]\n: 1"), r"line \d+: more than 100,000 values"),
    "small": (
        bomb(3, "[x, x]", "a{i}: &a{i} [{many}]"),
        r"model must hold keys and values, got .{300}\.\.\.",
    ),
    "in a field": ("steps: &a [*a, *a]", "line 1: a value contains itself"),
    "in a mapping": ("steps: 1\nmodel: &a\n  config: *a", "line 2: a value contains itself"),
    "in itself, merged": ("model: &a {<<: *a}", "line 1: a value contains itself"),
    "deep lists": ("a: " + "[" * 50_000, "is nested too deeply"),
    "deep mappings": ("{a: " * 50_000, "is nested too deeply"),
    "deep blocks": ("- " * 50_000 + "x", "is nested too deeply"),
    "long": ("# " + "x" * 2**20, r"has more than 1,048,576 bytes"),
    "long key": (f"? {LONG}\n: 1", "x{300}[.]{3}: unknown key, given 1; known"),
    "long text": (f"steps: '{LONG}'\n", "model is missing"),
    "long tag": (
        f"a: !{LONG} x",
        "is not YAML: could not determine a constructor for",
    ),
    "long alias": (f"a: *{LONG}", "is not YAML: found undefined alias 'xx"),
    "decimal": (f"steps: 1{'0' * 9999}", "line 1: an integer of more than 64 bits: 1000"),
    "hexadecimal": (f"steps: 0x{'f' * 9999}", "line 1: an integer of more than 64 bits: 0xfff"),
    "sexagesimal": (f"steps: 1{':10' * 9999}", "line 1: an integer of more than 64 bits: 1:10"),
    "64 bits": (
        "model: x\nsteps: 9223372036854775808",
        "line 2: an integer of more than 64 bits: 9223372036854775808",
    ),
    "python tag": (
        "a: !!python/name:os.system x",
        "is not YAML: could not determine a constructor",
    ),
    "no integer": ("a: !!int ''", "has a value that does not fit its tag"),
    "no bool": ("a: !!bool x", "has a value that does not fit its tag"),
    "no date": ("a: 2024-99-99", "is not YAML: month must be in 1..12"),
    "two documents": ("a: 1\n---\nb: 1", "is not YAML: expected a single document"),
    "nothing": ("# nothing", "the configuration must hold keys and values, got None"),
    "a list": ("[a, b]", r"the configuration must hold keys and values, got \['a', 'b'\]"),
    "twice": ("steps: 1\nmodel: {}\nsteps: 2", "line 3: steps is given twice .*, first in line 1"),
    "twice, quoted": ("steps: 1\n'steps': 2", "line 2: steps is given twice"),
    "twice, below": ("model:\n  config: a\n  config: b", "line 3: config is given twice"),
    "twice, in a list": ("datasets:\n- {name: a,\n   name: b}", "line 3: name is given twice"),
    "a section twice": ("optimizer: {lr: 1}\noptimizer: {clip: 1}", "line 2: optimizer is given"),
    "twice by an alias": ("{&a steps: 1, *a : 2}", "line 1: steps is given twice"),
    "twice behind a merge": ("a: &a {x: 1}\nb: {<<: *a, x: 1, x: 2}", "line 2: x is given twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_short_line(name: str, tmp_path: Path) -> None:
    text, message = HOSTILE[name]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"run\.yaml\W? {message}") as raised:
        TrainConfig.from_yaml(file)
    assert len(str(raised.value)) < 1500 and "\n" not in str(raised.value)


def test_aliases_and_merges_work(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        """
        model: {config: tiny}
        steps: 1_000
        output: out
        datasets:
        - &pages {name: pages, kind: pairs, shards: &shards [a.tar], batch_size: 2, flip: 0.25}
        - {<<: *pages, name: more, batch_size: 3}
        - {<<: [{weight: 0.5}, *pages], name: third, shards: *shards}
        """
    )
    pages, more, third = TrainConfig.from_yaml(file).datasets
    assert (more.name, more.batch_size, more.flip) == ("more", 3, pages.flip)
    assert (third.weight, third.batch_size, third.shards) == (0.5, 2, pages.shards)
