"""Sphinx configuration; ``make docs`` builds the site into build/docs."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flamingo_kernels import __version__  # noqa: E402

project = "flamingo_kernels"
author = "the authors of flamingo_kernels"
copyright = "the authors of flamingo_kernels; Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
# Fields of dataclasses share names; types in docstrings are prose.
suppress_warnings = ["ref.python"]
# Docstrings write names in single or double backticks; both are code.
default_role = "code"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
# A list, as of parameters: several names may share a line.
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"flamingo_kernels {release}"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
# A build without network or third parties: no fonts, no scripts from elsewhere.
html_theme_options = {"top_of_page_buttons": []}

assert find_spec("torch"), "the API reference imports the package, which needs torch"


def _skip_tuple_fields(
    app: Any, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out fields of named tuples, which have no docstring of their own."""
    return True if (getattr(member, "__doc__", "") or "").startswith("Alias for field") else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", _skip_tuple_fields)
