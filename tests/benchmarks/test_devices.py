"""What the benchmarks on several devices measure, with tiny settings: the figures that are exact are tested."""

import json

import jax
import pytest
import tyro
from rich.progress import Progress

from benchmarks import communication, variance


@pytest.fixture(scope="module")
def sent():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communication, "WIDTHS", (64, 32, 10))
        patch.setattr(communication, "NUM_MICROBATCHES", 2)
        # The fixture that makes JAX strict comes after those of a module.
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            return _run(communication, samples=(2,))


@pytest.fixture(scope="module")
def varied():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variance, "MEASURED_WIDTHS", (64, 16, 10))
        patch.setattr(variance, "TRAINED_WIDTHS", (64, 16, 10))
        patch.setattr(variance, "PARTS", (1, 2))
        patch.setattr(variance, "NUM_EXAMPLES", 16)
        patch.setattr(variance, "WARM_UP_STEPS", 1)
        patch.setattr(variance, "CASES", {"same": variance.Case(0.1, num_distinct=8)})
        patch.setattr(variance, "RHOS", (0.1,))
        patch.setattr(variance, "SCALES", (0.1, 100.0))
        patch.setattr(variance, "NUM_PRODUCTS", 4)
        return _run(variance, draws=200, seeds=2, steps=10, microbatches=(1,))


def _run(module, **options):
    with Progress(disable=True) as progress:
        results = module.run(module.Options(**options), progress)
        assert progress.finished
    return json.loads(json.dumps(results, allow_nan=False))


def test_a_step_sends_what_a_plain_one_does_unless_left_to_the_compiler(sent):
    relative = {(row["step"], row["num_samples"]): row["relative"] for row in sent["data_parallel"]}
    assert relative.pop((communication.JIT, 2)) == 4
    assert relative == {
        ("plain, jit", 0): 1,
        ("plain, shard_map", 0): 1,
        (communication.SHARD_MAP, 2): 1,
        (communication.PARALLEL, 2): 1,
    }
    assert sent["data_parallel"][-1]["num_microbatches"] == 2


def test_the_plain_step_sends_its_gradient_and_the_loss(sent):
    weights = 64 * 32 + 32 + 32 * 10 + 10
    assert sent["settings"]["weights"] == weights
    reduced = sent["data_parallel"][0]["by_kind"]["all-reduce"]
    assert (reduced["arrays"], reduced["bytes"]) == (5, 4 * (weights + 1))


def test_noise_for_sharded_params_adds_nothing_to_what_is_sent(sent):
    assert len(sent["sharded"]) == 6
    for row in sent["sharded"]:
        assert row["added_arrays"] == row["added_bytes"] == 0
        assert row["arrays"] > 0


def test_with_the_same_examples_in_each_part_the_variance_is_divided_by_their_number(varied):
    one, two = varied["variance"]
    assert one["microbatches"] == {"value": 1, "standard_error": 0}
    for figure in (one["devices"], two["microbatches"], two["devices"]):
        assert figure["value"] == pytest.approx(1, abs=4 * figure["standard_error"])
        assert figure["standard_error"] < 0.2


def test_the_strength_with_the_best_validation_accuracy_is_chosen(varied):
    training = varied["training"]
    assert len(training) == 2 * (1 + 1 + 2)
    for task in variance.TASKS:
        best = [row for row in training if row["task"] == task and row["best"]]
        assert [row["strength"] for row in best] == [0, 0.1, 0.1]
    for row in training:
        assert ("trace" in row) == row["best"]
        assert len(row["test_accuracy"]) == len(row["validation_accuracy"]) == 2


def test_a_single_draw_is_refused(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(variance.Options, args=["--draws", "1"])
    assert "at least 2, got '1'" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "figures"), [(communication, "sent"), (variance, "varied")])
def test_tables_and_pictures_show_the_figures(module, figures, request):
    results = request.getfixturevalue(figures)
    rows = module.rows(results)
    assert all(len(row) == len(module.HEADERS) and all(isinstance(cell, str) for cell in row) for row in rows)
    assert len({(row[0], row[1]) for row in rows}) == len(rows)
    assert "nan" not in module.caption(results)
    picture = module.plot(results)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 150_000
