"""Other projects' own code, imported past their factories and optional dependencies."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import files
from types import ModuleType


def open_flamingo_helpers() -> ModuleType:
    """``open_flamingo.src.helpers`` of open-flamingo 2.0.1; the package itself needs open_clip."""
    name = "open_flamingo_helpers"
    if name not in sys.modules:
        (path,) = (f for f in files("open-flamingo") if f.match("open_flamingo/src/helpers.py"))
        spec = importlib.util.spec_from_file_location(name, path.locate())
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
