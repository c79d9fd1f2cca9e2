"""Rules of the source that a machine can check: layers, lean import, banned patterns."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flamingo_kernels"

# A module may import from its own layer and from those below it.
LAYERS = (
    ("cli", "tools", "__main__"),
    ("info", "train"),
    ("convert",),
    ("model", "data"),
    ("language", "vision", "nn"),
    ("ops",),
    ("_triton", "_cpp"),
    ("transformers_models", "bounds"),
    ("bare_modules", "env", "fields", "precision", "saved_tensors", "shipped"),
)
RANK = {name: len(LAYERS) - i for i, layer in enumerate(LAYERS) for name in layer}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported_modules(path: Path) -> list[str]:
    """Absolute names of all modules that ``path`` imports, inside functions and by string too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"flamingo_kernels(\.\w+)+", node.value):
                names.append(node.value)
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            if match := re.match(r"flamingo_kernels(\.\w+)+", str(node.values[0].value)):
                names.append(match.group())
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


def test_every_part_has_a_layer() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources(PACKAGE)}
    assert parts - {"__init__"} == set(RANK)


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
    """The parser finds nested and aliased imports, and those by string."""
    file = tmp_path / "sample.py"
    file.write_text(
        "def f(op):\n    from flamingo_kernels import model\nimport flamingo_kernels.nn\n"
        "import_module('flamingo_kernels.ops.spans')\n"
        "import_module(f'flamingo_kernels.train.{op}.impl')\n"
    )
    found = {part(m) for m in imported_modules(file)}
    assert {"model", "nn", "ops", "train"} <= found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph(paths: list[Path]) -> dict[str, set[str]]:
    """Module -> modules among ``paths`` that it imports, anywhere in it.

    "from package import module" imports the module; the package is its place. What a package
    re-exports is an import of the package, which imports the module that has it.
    """
    known = {module_name(path) for path in paths}
    graph = {}
    for path in paths:
        name, imported = module_name(path), imported_modules(path)
        found = [module for module in imported if module in known]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                if names <= known and node.module in found:
                    found.remove(node.module)
        graph[name] = set(found) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports, one for each module that a search comes back to."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


@pytest.mark.parametrize("folder", ["flamingo_kernels", "benchmarks", "examples", "testing"])
def test_there_is_no_circle_of_imports(folder: str) -> None:
    assert circles(import_graph(sources(ROOT / folder))) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(graph) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


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
    for path in PACKAGE.glob("ops/*/impl_*"):
        for file in sources(path) if path.is_dir() else [path]:
            for module in imported_modules(file):
                own = module.startswith(module_name(path))
                assert own or ".impl_" not in module, f"{file} imports {module}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_are_imported_by_name(path: Path) -> None:
    """But for the package's own lazy names: an import by string hides where it leads."""
    if path != PACKAGE / "__init__.py":
        assert "import_module" not in path.read_text() and "__import__" not in path.read_text()


def test_what_knows_no_op_names_none() -> None:
    """``_triton`` and ``_cpp`` serve every op."""
    ops = [path.name for path in (PACKAGE / "ops").iterdir() if (path / "api.py").exists()]
    assert len(ops) == 5
    for path in (*sources(PACKAGE / "_triton"), *sources(PACKAGE / "_cpp")):
        assert not any(op in path.read_text() for op in ops), path


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


def test_pictures_are_opened_in_one_place() -> None:
    """Where the list of formats is: Pillow alone would start a program for some of them."""
    for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "examples", ROOT / "testing"):
        opening = [path.name for path in sources(folder) if "Image.open(" in path.read_text()]
        assert opening == (["decode.py"] if folder == PACKAGE else [])


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


@pytest.mark.parametrize("folder", ["tests", "testing", "benchmarks", "examples", "reference"])
def test_tests_are_not_imported_and_shared_code_points_one_way(folder: str) -> None:
    """Tests are no library; ``testing`` is, for tests, benchmarks and examples, which are peers."""
    banned = {
        "testing": {"tests", "benchmarks", "examples"},
        "benchmarks": {"tests", "examples"},
        "examples": {"tests", "benchmarks"},
    }.get(folder, {"tests"})
    for path in sources(ROOT / folder):
        found = {module.split(".")[0] for module in imported_modules(path)}
        assert not found & banned, f"{path} imports {sorted(found & banned)}"
