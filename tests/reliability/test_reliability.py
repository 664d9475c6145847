"""`reliability` from the command line to the files, and the long training that it begins with."""

import json

import jax
import pytest

from benchmarks import __main__ as cli
from benchmarks.kit import tables
from benchmarks.quality import demo
from tests.reliability import command, soak
from tests.reliability.outcome import Outcome


@pytest.fixture(autouse=True)
def strict():
    """Instead of the fixture for the library's own tests: optax's schedules need standard promotion."""


FLAT = soak.Soak([*range(1, 101)], [600.0] * 100, [50] * 100, 0)


@pytest.mark.slow
def test_a_long_training_neither_grows_nor_compiles_again():
    soaked = soak.apart(1000)
    row = soak.outcome(soaked)
    assert len(soaked.steps) == len(soaked.mebibytes) == len(soaked.arrays) == 100
    assert (soaked.steps[-1], soaked.traced) == (1000, 0)
    assert soaked.arrays[soaked.warm] == soaked.arrays[-1]
    assert (row.tried, row.survived) == (1000, 1000), row.note


@pytest.mark.parametrize(
    "grown", [{"traced": 1}, {"arrays": [*range(100)]}, {"mebibytes": [600 + 0.01 * i for i in range(100)]}]
)
def test_what_grows_is_a_loss(grown):
    assert soak.outcome(FLAT).survived == 100
    assert soak.outcome(FLAT._replace(mebibytes=[600.0] * 70 + [603.0] * 30)).survived == 100
    assert soak.outcome(FLAT._replace(**grown)).survived == 0


@pytest.mark.slow
def test_a_leak_is_seen(monkeypatch):
    """Of one array in each step."""
    kept, make = [], demo.make_task

    def leaking(**options):
        task = make(**options)
        batches = task.batches

        def kept_batches(seed, first):
            for batch in batches(seed, first):
                kept.append(jax.numpy.zeros(1))
                yield batch

        return soak.dataclasses.replace(task, batches=kept_batches)

    monkeypatch.setattr(demo, "make_task", leaking)
    soaked = soak.soak(20)
    assert soaked.arrays[-1] - soaked.arrays[soaked.warm] == 20 - soaked.steps[soaked.warm]
    assert soak.outcome(soaked).survived == 0


def test_the_command_leaves_its_figures(tmp_path, monkeypatch):
    checks = {
        "good": lambda _, advance: [advance(2) or Outcome("a good one", 2, 2, "all well")],
        "bad": lambda options, _: [Outcome("a bad one", options.times, 1, "not so well")],
    }
    monkeypatch.setattr(command, "CHECKS", checks)
    monkeypatch.setattr(soak, "apart", lambda _: FLAT)
    assert cli.main(["reliability", "--times", "3", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "reliability.json").read_text())
    made = command.rows(results)
    assert [row[0] for row in made[1:]] == ["a good one", "a bad one"]
    assert [row[1:] for row in made] == [["100", "100", "0"], ["2", "2", "0"], ["3", "1", "2"]]
    assert (tmp_path / "reliability.md").read_text() == tables.markdown(command, results)
    assert "*a bad one*: not so well." in command.caption(results)
    assert not list(tmp_path.glob("*.png"))  # what does not change needs no picture


def test_property_tests_that_do_not_run_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(command.PROPERTIES, "random input", ((str(tmp_path / "nowhere.py"),), ""))
    with pytest.raises(cli.UserError, match="the property tests did not run"):
        command._properties("random input", command.Options(profile="test"), lambda _: None)
