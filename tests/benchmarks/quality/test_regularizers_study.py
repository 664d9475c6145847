"""`regularizers` at small size: every method gets as many steps as its cost allows, and its row."""

import json

import pytest

from benchmarks import __main__ as cli
from benchmarks.kit import tables
from benchmarks.quality import comparison, regularizers
from benchmarks.training import costs
from benchmarks.training.loop import Task
from benchmarks.training.methods import METHODS

TINY = (
    *("--network", "mlp", "--per-class", "2", "--gradients", "8", "--batch-size", "8", "--seeds", "2"),
    *("--validation-images", "20", "--tuning-seeds", "1", "--rates", "0.1", "--weight-decays", "0.001"),
    *("--point-products", "4", "--final-products", "4"),
)


def test_methods_get_the_steps_that_they_have_time_for():
    task = Task(model=None, batches=None, num_examples=8)
    problem = regularizers.TimedProblem(
        "name", task, None, {"seht": (1.0, 2.0)}, costs={"seht": 4.0, "sgd": 1.0}
    )
    methods = problem.methods(["seht", "sgd"])
    assert {name: method.gradients_per_step for name, method in methods.items()} == {"sgd": 1, "seht": 4}
    assert methods["seht"].strengths == (1.0, 2.0)
    assert METHODS["seht"].gradients_per_step == 3


def test_the_other_comparisons_do_not_have_them_by_default():
    assert not {"seht-d", "jacobian", "confidence", "cutout", "mixup"} & set(comparison.Options().methods)


@pytest.mark.slow
def test_the_command_leaves_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "REPETITIONS", 1)
    monkeypatch.setattr(costs.timing, "LEAST_SECONDS", 0.0)
    words = ["regularizers", *TINY, "--methods", "mixup", "confidence", "seht-d"]
    assert cli.main([*words, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "regularizers-digits-mlp.json").read_text())
    assert list(results["costs"]) == ["sgd", "seht-d", "confidence", "mixup"]
    for name, knobs in results["chosen"].items():
        assert knobs["gradients_per_step"] == costs.in_whole_steps(results["costs"][name]["median"], 8)
    assert {run["evaluations"] for run in results["runs"]} == {8}
    rows = regularizers.rows(results)
    assert [row[0] for row in rows] == ["sgd", "seht-d", "confidence", "mixup"]
    assert all(len(row) == len(regularizers.HEADERS) for row in rows)
    text = (tmp_path / "out" / "regularizers-digits-mlp.md").read_text()
    assert text == tables.markdown(regularizers, results)


def test_a_network_without_a_head_is_not_fine_tuned(tmp_path, capsys):
    words = ["regularizers", "--network", "mlp", "--no-scratch", "--work", str(tmp_path / "work")]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "argument --network mlp: needs --scratch" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
