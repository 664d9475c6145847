"""What strangers get: the wheel, files where they were asked for, and no format that can run code."""

import ast
import sys
from pathlib import Path

import pytest

from tests.reliability import installation

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("nso_jax", "benchmarks", "tests", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@pytest.mark.slow
def test_the_wheel_works_without_the_repository():
    with installation.clean_environment() as (wheel, python):
        row = installation.wheel(wheel, python)
    assert row.survived == row.tried == 5, row.note


@pytest.mark.timing
def test_the_import_takes_hardly_longer_than_that_of_optax():
    row = installation.imports(Path(sys.executable), 5)
    assert row.survived == row.tried == 5, row.note


def test_no_source_of_data_leads_out_of_the_output_folder():
    row = installation.paths()
    assert row.survived == row.tried == len(installation.HOSTILE)


def pickling(path):
    """The names in a module that stand for pickles."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from {module.partition(".")[0] for module in modules} & PICKLING
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from {f"{node.value.id}.{node.attr}"} & {"torch.load", "torch.save"}
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield node.arg


def test_nothing_is_pickled():
    assert {path.name: found for path in SOURCES if (found := list(pickling(path)))} == {}
    assert len(SOURCES) > 50
