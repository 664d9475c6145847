"""The variance of the gradient and trainings that differ in it, with tiny settings."""

import json

import pytest
from rich.progress import Progress

from benchmarks.quality import gradient_variance, microbatch_training, variance
from tests.benchmarks.conftest import assert_shown


def _run(module, **options):
    with Progress(disable=True) as progress:
        results = module.run(module.Options(**options), progress)
        assert progress.finished
    return json.loads(json.dumps(results, allow_nan=False))


@pytest.fixture(scope="module")
def varied():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_variance, "MEASURED_WIDTHS", (64, 16, 10))
        patch.setattr(microbatch_training, "TRAINED_WIDTHS", (64, 16, 10))
        patch.setattr(gradient_variance, "PARTS", (1, 2))
        patch.setattr(gradient_variance, "NUM_EXAMPLES", 16)
        patch.setattr(gradient_variance, "WARM_UP_STEPS", 1)
        patch.setattr(gradient_variance, "CASES", {"same": gradient_variance.Case(0.1, num_distinct=8)})
        patch.setattr(microbatch_training, "RHOS", (0.1,))
        patch.setattr(microbatch_training, "SCALES", (0.1, 100.0))
        patch.setattr(microbatch_training, "NUM_PRODUCTS", 4)
        return _run(variance, draws=200, seeds=2, steps=10, microbatches=(1,))


def test_with_the_same_examples_in_each_part_the_variance_is_divided_by_their_number(varied):
    one, two = varied["variance"]
    assert one["microbatches"] == {"value": 1, "standard_error": 0}
    for figure in (one["devices"], two["microbatches"], two["devices"]):
        assert figure["value"] == pytest.approx(1, abs=4 * figure["standard_error"])
        assert figure["standard_error"] < 0.2


def test_the_strength_with_the_best_validation_accuracy_is_chosen(varied):
    training = varied["training"]
    assert len(training) == 2 * (1 + 1 + 2)
    for task in microbatch_training.TASKS:
        best = [row for row in training if row["task"] == task and row["best"]]
        assert [row["strength"] for row in best] == [0, 0.1, 0.1]
    for row in training:
        assert ("trace" in row) == row["best"]
        assert len(row["test_accuracy"]) == len(row["validation_accuracy"]) == 2


def test_table_and_picture_show_the_figures(varied):
    assert_shown(variance, varied)
