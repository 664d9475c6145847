"""Every Python block of the README and of each page of the documentation runs, as a reader would paste them."""

import importlib.util
import os
import re
import tomllib
from pathlib import Path

import jax
import pytest

from tests.test_api import PUBLIC

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
API = ROOT / "docs" / "api"
PAGES = [README, *sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)]
# What only one page uses, and the tests do without where it is not installed.
OPTIONAL = {"haiku": "haiku", "keras": "keras"}


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT))
)
# Third parties' warnings, which readers get too.
@pytest.mark.filterwarnings("default::DeprecationWarning:haiku", "default::DeprecationWarning:keras")
def test_the_code_of_a_page_runs(page, monkeypatch):
    package = OPTIONAL.get(page.stem)
    if package and not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    run(page)


def run(page):
    """Its blocks, one after another, in one namespace."""
    namespace = {"__name__": "page"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, block in enumerate(blocks(page), 1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)  # noqa: S102


def test_the_readme_is_short_and_shows_both_commands():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    for command in ("make demo", "make test"):
        assert command in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_leads_to_exist(page):
    """Sphinx makes docs/notebooks of notebooks/."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        path = (page.parent / target).resolve()
        if path.parent == ROOT / "docs" / "notebooks" and path.suffix == ".ipynb":
            path = ROOT / "notebooks" / path.name
        assert path.exists(), target


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^   nso_jax\.(\S+)$", (API / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PUBLIC)
    of_curvature = re.findall(r"^.. auto\w+:: (\w+)$", (API / "curvature.md").read_text(), re.MULTILINE)
    assert [f"curvature.{name}" for name in of_curvature] == [name for name in listed if "curvature" in name]


def test_on_pypi_the_readme_has_no_links_to_files_beside_it():
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = README.read_text()
    for substitution in hook["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert all(target.startswith("https://") for target in targets)
    assert any(target.endswith("/main/docs/_static/valley.png") for target in targets)
