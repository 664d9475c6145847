"""Comparisons of trainings: what is tuned and chosen, what is told of it, and whole commands at small size."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from jax.flatten_util import ravel_pytree
from rich.progress import Progress

from benchmarks import __main__ as cli
from benchmarks.kit import plots, tables
from benchmarks.kit.journal import LINES, Journal
from benchmarks.quality import ablate, comparison, comparison_table, images
from benchmarks.quality.comparison import Knobs, Options
from benchmarks.tasks import checkpoints, models
from benchmarks.tasks.data import Examples
from benchmarks.training import loop
from benchmarks.training.methods import METHODS

ROOT = Path(__file__).parents[3]
TINY = (
    *("--per-class", "4", "--gradients", "12", "--batch-size", "8", "--points", "2", "--point-products", "4"),
    *("--final-products", "4", "--pretraining-epochs", "1", "--validation-images", "50", "--seeds", "2"),
)


def test_what_is_tried():
    options = Options(rates=(0.1, 0.2), weight_decays=(0.0, 0.5))
    assert comparison.grid(METHODS["sgd"], options) == [
        Knobs(0.0, rate, decay) for rate in (0.1, 0.2) for decay in (0.0, 0.5)
    ]
    strengths = METHODS["sam"].strengths
    assert comparison.grid(METHODS["sam"], options, 0.5) == [
        Knobs(strength, rate, 0.5) for strength in strengths for rate in (0.1, 0.2)
    ]


def test_rivals_and_noise_are_tuned_alike():
    sizes = {len(comparison.grid(method, Options())) for method in METHODS.values()}
    assert max(sizes) <= 10
    assert {len(METHODS[name].strengths) for name in METHODS if name not in ("sgd", "adam")} == {5}


def test_a_network_has_rates_and_strengths_of_its_own():
    """Four times what is usual quadruples the first step of IVON, and no other method's."""
    task = loop.Task(
        lambda seed: models.MLP((4, 3), rngs=nnx.Rngs(seed)),
        lambda seed, first: iter([Examples(np.ones((2, 4), np.float32), np.zeros(2, int))] * 2),
        num_examples=10**9,  # so that there is no noise
    )
    usual = comparison.Problem("usual", task, None)
    other = comparison.Problem("other", task, None, {"sgd": (0.5,)}, rates={"ivon": 4 * METHODS["ivon"].rate})
    assert other.methods(["sgd"])["sgd"].strengths == (0.5,)

    def step(problem, name):
        settings = loop.Settings(1, 0.01, strength=0.1)
        before, _ = ravel_pytree(nnx.state(task.model(0), nnx.Param))
        trained = loop.train(task, problem.methods([name])[name], settings).model
        return ravel_pytree(nnx.state(trained, nnx.Param))[0] - before

    for name, factor in (("ivon", 4.0), ("sgd", 1.0)):
        np.testing.assert_allclose(step(other, name), factor * step(usual, name), rtol=1e-3, atol=1e-6)


def test_every_strength_is_trained_for_every_seed():
    """Adam has as many settings to choose from as there are decays, and one to measure; SAM five of each."""
    options = Options(rates=(0.1,), weight_decays=(0.0, 0.5, 1.0), seeds=4, tuning_seeds=2)
    methods = {name: METHODS[name] for name in ("adam", "sam")}
    assert comparison.numbers_of_trainings(methods, options) == (2 * (3 + 5), 4 * (1 + 5))


def test_the_best_on_the_validation_examples_is_chosen_on_average_over_the_seeds():
    losses = {1: (0.1, 1.0), 2: (0.5, 0.4), 3: (0.3, 0.9)}
    tuning = [
        {"strength": strength, "rate": 0.1, "weight_decay": 0.0, "validation_loss": loss}
        for strength, pair in losses.items()
        for loss in pair
    ]
    assert comparison.choose(tuning) == Knobs(2, 0.1, 0.0)
    diverged = {"strength": 0, "rate": 0.1, "weight_decay": 0.0, "validation_loss": float("nan")}
    assert comparison.choose([diverged, *tuning]) == Knobs(2, 0.1, 0.0)


def test_intervals_are_student_s():
    values = np.random.default_rng(0).normal(size=(5, 2))
    expected = [scipy.stats.ttest_1samp(column, 0.0).confidence_interval() for column in values.T]
    widths = [(interval.high - interval.low) / 2 for interval in expected]
    np.testing.assert_allclose(plots.interval(values), widths)
    np.testing.assert_array_equal(plots.interval(values[:1]), 0)


def fabricated():
    """Two seeds: nso has half the trace of asam, which has the lowest of the family, and sam is most accurate."""
    figures = {"sgd": (0.5, 8.0), "sam": (0.7, 4.0), "asam": (0.6, 2.0), "nso": (0.65, 1.0)}
    runs = [
        {
            "method": name,
            "strength": 1,
            "seed": seed,
            "test_accuracy": accuracy + 0.01 * seed,
            "trace": trace * (1 + seed),
            "largest_eigenvalue": trace / 10,
            "seconds": 1.0,
        }
        for name, (accuracy, trace) in figures.items()
        for seed in range(2)
    ]
    return {"chosen": {name: {"strength": 1} for name in figures}, "runs": runs}


def test_claims_are_those_of_the_figures():
    told = comparison_table.claims(fabricated())
    assert "The Hessian trace, against that of asam" in told
    assert "nso 50 % lower (50 to 50)" in told
    assert "ahead of sam and sgd, seed by seed: nso -5.0 ± 0.0 and +15.0 ± 0.0." in told


@pytest.mark.parametrize(
    ("traces", "told"),
    [
        ((4.0, 4.0), "100 % higher (100 to 100)"),
        ((1.0, 1.0), "50 % lower (50 to 50)"),
        ((2.0, 2.0), "the same (0 to 0)"),
        ((1.9, 2.3), "5 % higher (from 69 % lower to 252 % higher)"),
    ],
)
def test_what_is_higher_and_what_is_lower_is_said_in_words(traces, told):
    """With two seeds, Student's quantile is 12.7: exp(.0447 +- 12.7 * .1351 / sqrt(2)) - 1 is the last interval."""
    assert comparison_table.against_in_words(traces, (2.0, 2.0)) == told


def test_of_traces_that_are_not_positive_there_are_no_ratios():
    results = fabricated()
    results["runs"][-1]["trace"] = -0.1
    told = comparison_table.claims(results)
    assert "The Hessian trace is not positive in every run" in told
    assert "The largest eigenvalue, against that of asam" in told


def test_gradients_that_make_no_whole_steps_are_refused(tmp_path, capsys):
    words = ["images", *TINY, "--gradients", "13", "--methods", "sam", "--work", str(tmp_path / "work")]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert (
        "--gradients: expected a multiple of 2, what sam takes in a step, got 13" in capsys.readouterr().err
    )


def test_a_network_without_a_head_is_not_fine_tuned(tmp_path, capsys):
    words = ["images", "--network", "mlp", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "argument --network mlp: needs --scratch" in capsys.readouterr().err


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    words = ["images", *TINY, "--methods", "sgd", "sam", "nso", "--rates", "0.05", "--tuning-seeds", "1"]
    assert cli.main([*words, "--work", str(folder / "work"), "--out", str(folder / "out")]) == 0
    return folder


@pytest.mark.slow
def test_a_comparison_leaves_its_figures(output):
    assert {path.name for path in (output / "out").iterdir()} == {
        "images-digits.json",
        "images-digits.md",
        "images-digits.png",
        "images-digits-front.md",
        "images-digits-front.png",
    }
    results = json.loads((output / "out" / "images-digits.json").read_text())
    assert [(run["method"], run["strength"], run["seed"]) for run in results["runs"]] == [
        (name, strength, seed)
        for name in ("sgd", "sam", "nso")
        for strength in METHODS[name].strengths
        for seed in (0, 1)
    ]
    for run in results["runs"]:
        assert run["evaluations"] == 12
        assert 0 <= run["test_accuracy"] <= 1
        assert run["largest_eigenvalue"] > 0
        chosen = results["chosen"][run["method"]]["strength"] == run["strength"]
        assert [point["evaluations"] for point in run["curve"]] == ([6, 12] if chosen else [12])
    assert {run["seed"] for run in results["tuning"]} == {comparison.TUNING_SEED}
    assert results["data"] == {"name": "digits", "train": 20, "validation": 50, "test": 507}
    for row in images.rows(results):
        assert len(row) == len(images.HEADERS)
    assert (output / "out" / "images-digits.md").read_text() == tables.markdown(images, results)


@pytest.mark.slow
def test_a_killed_comparison_ends_as_the_whole_one(output, tmp_path):
    """By SIGKILL in a process of its own, among others while it trains; figures but seconds are the same."""
    work, words = tmp_path / "work", ["--methods", "sgd", "sam", "nso", "--rates", "0.05"]
    words += ["--tuning-seeds", "1", "--work", str(work), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "benchmarks", "images", *TINY, *words, "--resume"]
    for lines in (5, 9):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:  # noqa: S603
            while process.poll() is None and _number_of_lines(work / LINES) < lines:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # noqa: S603
    whole, resumed = (
        json.loads((folder / "out" / "images-digits.json").read_text()) for folder in (output, tmp_path)
    )
    for results in (whole, resumed):
        for run in (*results["runs"], *results["tuning"]):
            del run["seconds"]
    assert resumed == whole


def _number_of_lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_variants_of_the_ablation_differ_from_the_base_in_one_thing():
    variants = ablate.variants()
    assert len({(variant.choice, variant.value) for variant in variants}) == len(variants)
    assert {variant.schedule for variant in variants} == set(loop.SCHEDULES)
    assert all(480 % variant.method.gradients_per_step == 0 for variant in variants)


@pytest.mark.slow
def test_an_ablation_leaves_its_figures(tmp_path, monkeypatch):
    few = [v for v in ablate.variants() if v.choice in ("schedule", "augmentation")]
    monkeypatch.setattr(ablate, "variants", lambda: few)
    monkeypatch.setattr(ablate, "DRAWS", 2)
    words = ["ablate", *TINY, "--scratch", "--network", "mlp"]
    words += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    results = json.loads((tmp_path / "out" / "ablate.json").read_text())
    assert len(results["runs"]) == 2 * len(few)
    rows = ablate.rows(results)
    assert [row[:2] for row in rows] == [[variant.choice, variant.value] for variant in few]
    assert all(
        float(variant["noise"]) > 0 for variant in results["variants"] if "sgd" not in variant["value"]
    )
    assert (tmp_path / "out" / "ablate-forms.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "ablate.png").exists()


@pytest.mark.parametrize(
    ("network", "scratch"), [("small-resnet", False), ("vit", False), ("resnet18", True), ("mlp", True)]
)
def test_every_network_starts_a_problem(network, scratch, tmp_path, monkeypatch):
    """Fine-tuning starts from the same weights but the head's for all seeds, and training from others."""
    monkeypatch.setattr(images, "DIGITS_TRAIN", 300)
    options = images.Options(
        network=network, scratch=scratch, per_class=4, pretraining_epochs=1, work=tmp_path / "work"
    )
    journal = Journal(options.work, options.settings(), resume=False)
    with Progress(disable=True) as progress:
        problem = images.make_problem(options, journal, progress)
    one, other = (nnx.state(problem.task.model(seed), nnx.Param) for seed in (0, 1))
    same = checkpoints.named(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))
    norms_and_biases = {name for name in same if name.endswith(("bias", "scale"))}
    equal = {name for name, flag in same.items() if flag}
    assert equal == (norms_and_biases if scratch else set(same) - {"head.kernel"})
    split = problem.split(0)
    assert split.train.inputs.shape == (4 * (10 if scratch else 5), 8, 8, 1)
    assert problem.task.model(0)(split.test.inputs[:2]).shape == (2, 10 if scratch else 5)
