"""What tests of the commands share."""

import functools
import json

import jax
import pytest

from benchmarks import __main__ as cli
from benchmarks import registry
from benchmarks.kit import tables


@pytest.fixture(autouse=True)
def strict():
    """Instead of the fixture for the library's own tests: optax's schedules and Flax need standard promotion."""


@pytest.fixture
def as_strict_as_the_library():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def run(folder, name, *words):
    """A command's results, after checks of its files."""
    assert cli.main([name, *words, "--out", str(folder)]) == 0
    results = json.loads((folder / f"{name}.json").read_text())
    study, pictures = registry.module(name), list(folder.glob("*.png"))
    assert {path.stem for path in folder.iterdir()} == {name} | {path.stem for path in pictures}
    assert (folder / f"{name}.md").read_text() == tables.markdown(study, results)
    assert pictures
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < 150_000
    return results


def assert_shown(study, results):
    """A table without gaps, whose rows the first two cells tell apart, and a picture of a fair size."""
    rows = study.rows(results)
    assert all(len(row) == len(study.HEADERS) and all(isinstance(cell, str) for cell in row) for row in rows)
    assert len({(row[0], row[1]) for row in rows}) == len(rows)
    assert "nan" not in study.caption(results)
    picture = study.plot(results)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 150_000


@pytest.fixture
def told_of_a_mistake(tmp_path, capsys):
    """`told_of_a_mistake("robustness", "--data", ...)` is the one line that a command ends with."""

    def told(name, *words):
        assert cli.main([name, *words, "--out", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"python -m benchmarks {name}: ")
        assert line.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return line

    return told


@pytest.fixture
def measured(tmp_path):
    """`measured("rivals", "--cases", "mlp")` are a command's results, after checks of its files."""
    return functools.partial(run, tmp_path / "out")


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory):
    """The same for the tests of a module."""
    return functools.partial(run, tmp_path_factory.mktemp("measured") / "out")
