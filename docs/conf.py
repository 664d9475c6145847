"""Sphinx's settings: `make docs` builds docs/_build/html, and needs no network for it."""

import importlib.metadata
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import nso_jax

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "nso_jax"
author = "the nso_jax authors"
project_copyright = f"2026, {author}"
release = version = nso_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
# `name` in a docstring is code, and a link where Sphinx knows the name.
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they are stored; the tests run them

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings say what is expected, more precisely
autosummary_generate = False
python_maximum_signature_line_length = 90
add_module_names = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "nso_jax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_theme_options = {
    "repository_url": PROJECT["urls"]["Repository"],
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search field
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}
# A file of ours, copied by `setup`: pages show their formulas without a network.
mathjax_path = "tex-svg.js"

FORMULA_ENDS = re.compile(r"^(Args|Attributes|Returns|Raises|Warns|Example|References):$")
ENTRY = re.compile(r"^(\s+)(\*{1,2})(\w+:)")


def mark_up(_: Sphinx, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Makes reStructuredText of docstrings: formulas are blocks as they stand, `|` and `*` are themselves."""
    del kind, name, value, options
    marked, in_summary, in_formula = [], True, False
    for line, before in zip(list(lines), ["", *lines], strict=False):
        in_summary = in_summary and not FORMULA_ENDS.match(line)
        starts = in_summary and line.startswith("    ") and not before.strip()
        if starts and not in_formula:
            marked += [".. code-block:: text", ""]
        in_formula = starts or (in_formula and (line.startswith("    ") or not line.strip()))
        is_code = in_formula or line.lstrip().startswith((">>>", "..."))
        marked.append(line if is_code else _escaped(line))
    lines[:] = marked


def _escaped(line: str) -> str:
    """What Sphinx would take for mark-up, outside of backticks, is text."""
    entry = ENTRY.match(line)
    start = entry.end() if entry else 0
    parts = re.split(r"(`[^`]*`)", line[start:])
    return line[:start] + "".join(
        part if part.startswith("`") else re.sub(r"(?<!\\)([|*])", r"\\\1", part) for part in parts
    )


def skip_fields(_: Sphinx, kind: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out a named tuple's fields, which its docstring explains."""
    del kind, name, skip, options
    return True if type(value).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """Puts the notebooks and MathJax where Sphinx looks for them."""
    notebooks = DOCS / "notebooks"
    notebooks.mkdir(exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(path, notebooks)
    files = importlib.metadata.files("django-static-mathjax") or []
    (mathjax,) = [file for file in files if file.match("es5/tex-svg.js")]
    shutil.copy(Path(str(mathjax.locate())), DOCS / "_static")
    app.connect("autodoc-process-docstring", mark_up, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_fields)
