"""What strangers get: the wheel, files where they were asked for, and no format that can run code."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

from benchmarks.tasks import pytorch_file
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


# What reads a network's weights as PyTorch keeps them, by an unpickler that makes nothing but tensors, and its tests.
RESTRICTED = {"pytorch_file.py", "test_pytorch_file.py", "test_efficientnet.py"}


def test_nothing_is_pickled():
    found = {path.name: names for path in SOURCES if (names := list(pickling(path)))}
    assert found.keys() == RESTRICTED
    assert len(SOURCES) > 50


def test_what_reads_weights_unpickles_by_its_own_rules_alone():
    tree = ast.parse(inspect.getsource(pytorch_file))
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert {node.attr for node in used if ast.unparse(node.value) == "pickle"} == {"Unpickler"}
    assert "find_class" in vars(pytorch_file._Unpickler)
