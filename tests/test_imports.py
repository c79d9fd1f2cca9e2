"""Rules of the source that a machine can check: layers, lean import, banned patterns."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flamingo_kernels"

# A module may import from its own layer and from those below it.
LAYERS = (
    ("cli", "__main__"),
    ("info", "train"),
    ("model", "data", "convert"),
    ("language", "vision", "nn"),
    ("ops",),
    ("_triton", "_cpp"),
    ("env", "models"),
)
RANK = {name: len(LAYERS) - i for i, layer in enumerate(LAYERS) for name in layer}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported_modules(path: Path) -> list[str]:
    """Absolute names of all modules that ``path`` imports, function bodies included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                inside = path.parent.relative_to(ROOT).parts
                base = ".".join(inside[: len(inside) - node.level + 1])
                names.append(f"{base}.{node.module}" if node.module else base)
            else:
                names.append(node.module)
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part(module: str) -> str | None:
    """First-level part of the package that a dotted name lies in."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "flamingo_kernels" and len(pieces) > 1 else None


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module in imported_modules(path):
        target = part(module)
        if target in RANK:
            assert RANK[target] <= RANK[own], f"{own} must not import {module}"
    if own == "data":
        assert not any(part(m) == "model" for m in imported_modules(path))


def test_the_rule_sees_violations(tmp_path: Path) -> None:
    """The parser finds relative, nested and aliased imports."""
    file = tmp_path / "sample.py"
    file.write_text(
        "def f():\n    from flamingo_kernels import model\nimport flamingo_kernels.nn\n"
    )
    found = {part(m) for m in imported_modules(file)}
    assert {"model", "nn"} <= found


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_in_the_package_imports_the_reference_but_the_demo(path: Path) -> None:
    if path == PACKAGE / "cli" / "demo.py":
        return
    assert not any(m.split(".")[0] == "reference" for m in imported_modules(path))


@pytest.mark.parametrize("path", sources(ROOT / "reference"), ids=lambda p: p.name)
def test_the_reference_imports_torch_alone(path: Path) -> None:
    allowed = {"torch", "reference", *sys.stdlib_module_names}
    assert {m.split(".")[0] for m in imported_modules(path)} <= allowed


def test_implementations_of_an_op_do_not_import_each_other() -> None:
    for path in PACKAGE.glob("ops/*/impl_*.py"):
        for module in imported_modules(path):
            assert ".impl_" not in module, f"{path} imports {module}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_environment_and_pickle_stay_out(path: Path) -> None:
    text = path.read_text()
    if path != PACKAGE / "env.py":
        assert "os.environ" not in text and "getenv" not in text
    if path == PACKAGE / "convert" / "files.py":  # other projects' files, as data alone
        assert text.count("torch.load(") == text.count(", weights_only=True)") == 1
        text = text.replace("torch.load(", "").replace("import pickle", "")
    for banned in ("import pickle", "pickle.load", "torch.load(", "eval(compile", "yaml.load("):
        assert banned not in text


def test_import_is_lean() -> None:
    """Importing the package and its ops loads no optional package, no Triton, no library."""
    code = (
        "import sys;"
        "import flamingo_kernels, flamingo_kernels.ops, flamingo_kernels._cpp.library as c;"
        "heavy = {'transformers', 'triton', 'sklearn', 'matplotlib', 'PIL', 'torch._dynamo'};"
        "print(sorted(heavy & set(sys.modules)), c._outcome.cache_info().currsize)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "[] 0"


def test_top_level_import_does_not_import_torch() -> None:
    code = "import sys, flamingo_kernels; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
