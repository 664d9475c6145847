"""The demo: a tiny run from end to end, and its table."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil

import jax
import pytest
from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks import publish
from benchmarks.cost import compilers
from benchmarks.kit import report, tables
from benchmarks.kit.files import RESULTS
from benchmarks.kit.journal import Journal
from benchmarks.quality import demo, demo_options
from benchmarks.training import loop, measuring

FILES = {"results.json", "table.md", "training.png", "surface.png"}
NETWORKS = {f"{name}.safetensors" for name in demo.METHODS}
LOADING = "Loading JAX and Flax ...\n"
STEPS = 3
FULL = demo_options.Size(seeds=2, steps=STEPS, num_points=10, point_products=4, final_products=4)


@contextlib.contextmanager
def short():
    """The measuring of a real run would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "SLICE_DISTANCES", {"random": [-1.0, 0.0, 1.0], "eigenvector": [-0.5, 0.5]})
        patch.setattr(demo_options, "FULL", FULL)
        yield patch


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with short():
        assert cli.main(["demo", "--full", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(output):
    return json.loads((output / "results.json").read_text())


def test_all_files_are_written_and_nothing_else(output):
    assert {path.name for path in output.iterdir()} == FILES | NETWORKS | {"work"}
    assert {path.name for path in (output / "work").iterdir()} == NETWORKS | {"metrics.jsonl"}
    for path in output.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000


def test_json_has_every_figure_of_every_seed(results):
    runs = results["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == list(itertools.product(demo.METHODS, (0, 1)))
    for run in runs:
        assert 0 <= run["test_accuracy"] <= 1
        assert run["train_loss"] > 0
        assert run["test_loss"] > 0
        assert math.isfinite(run["loss_gap"])
        assert run["trace_standard_error"] > 0
        assert run["eigenvalue_residual"] <= 1e-2 * abs(run["largest_eigenvalue"])
        assert run["seconds"] > 0
        assert run["curve"][-1]["evaluations"] == run["evaluations"]
        assert run["curve"][-1]["test_accuracy"] == run["test_accuracy"]
        assert run["slices"]["random"]["train"][1] == pytest.approx(run["train_loss"], rel=1e-4)
    assert set(results["versions"]) == {"python", "jax", "jaxlib", "flax", "optax", "nso_jax"}
    assert results["machine"]["cpu_count"] == os.cpu_count()
    assert results["settings"]["methods"] == list(demo.METHODS)


def test_all_methods_evaluate_as_many_gradients(results):
    assert {run["evaluations"] for run in results["runs"]} == {2 * STEPS}
    assert results["settings"]["gradient_evaluations"] == 2 * STEPS


@pytest.mark.parametrize("name", demo.METHODS)
def test_a_step_evaluates_the_gradients_that_are_counted(name):
    """Counted in the compiled program: a gradient of the network has five convolutions (two forward,
    two for the kernels and one for the first layer's output)."""
    method, settings = (
        demo.METHODS[name].method,
        demo.Options(steps=STEPS).training(name, seed=0),
    )
    task = demo.make_task(0.2)
    step = loop.compiled(task, method, settings.gradients, settings.schedule).step
    state = loop.initial_state(task, method, settings)
    compiled = step.lower(state, jax.random.key(0), next(task.batches(0, 0))).compile()
    assert compilers.count(compiled, "convolution") == 5 * method.gradients_per_step


def test_table_and_markdown_agree_with_the_figures(output, results):
    assert (output / "table.md").read_text() == tables.markdown(demo, results)
    assert [row[0] for row in demo.rows(results)] == list(demo.METHODS)


def test_an_interrupted_run_goes_on_and_a_finished_one_gives_way(results, tmp_path, capsys):
    arguments = ["demo", "--methods", "sgd", "--full", "--out", str(tmp_path)]
    calls, measure = itertools.count(), measuring.measure_point

    def interrupted(*args):
        if next(calls) == 2 * STEPS + 3:  # the points of the first seed, its end, and two of the second's
            raise KeyboardInterrupt
        return measure(*args)

    with short() as patch:
        patch.setattr(measuring, "measure_point", interrupted)
        patch.setattr(demo, "Journal", functools.partial(Journal, pause=0))
        assert cli.main(arguments) == 130
        assert [path.name for path in tmp_path.iterdir()] == ["work"]
        assert cli.main(arguments) == 2
        assert "go on with it by --resume, or remove it" in capsys.readouterr().err
        assert cli.main([*arguments, "--resume"]) == 0
        assert {path.name for path in tmp_path.iterdir()} == FILES | {"sgd.safetensors", "work"}
        assert next(calls) == 2 * (2 * STEPS + 1) + 1
        written = json.loads((tmp_path / "results.json").read_text())["runs"]
        assert [run | {"seconds": 0} for run in written] == [
            run | {"seconds": 0} for run in results["runs"] if run["method"] == "sgd"
        ]
        assert cli.main(arguments) == 0
    assert next(calls) == 4 * (2 * STEPS + 1) + 2


def test_a_quick_run_is_not_published(output, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    assert cli.main(["publish", "--out", str(output)]) == 2
    assert "has a quick demo: `python -m benchmarks demo --full` makes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_quick_run_and_a_full_one_lie_apart():
    quick, full = demo.Options(), demo.Options(full=True)
    assert quick.folder != full.folder
    assert quick.folder.parts[0] == full.folder.parts[0] == "runs"
    assert (quick.size, full.size) == (demo_options.QUICK, demo_options.FULL)
    assert demo.Options(full=True, seeds=7, steps=9).size == demo_options.FULL._replace(seeds=7, steps=9)
    published = json.loads((RESULTS / "demo.json").read_text())["settings"]
    assert tuple(published[name] for name in demo_options.Size._fields) == demo_options.FULL


def test_a_pipe_gets_lines_with_the_step_and_the_time_left(tmp_path, capsys):
    with short():
        cli.main(["demo", "--methods", "sgd", "sam", "--full", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] + "\n" == LOADING
    assert re.fullmatch(r"2 trainings by each of 2 methods, .* about \d+ s left\.", lines[1])
    told = [line for line in lines if line.startswith("[")]
    assert told[0] == "[1/3] sgd: plain training with momentum"
    assert re.fullmatch(r"\[1/3\] sgd: compiled in [\d.]+ s; about \d+ s left", told[1])
    for place, line in zip(("1 of 2", "2 of 2"), told[2:4], strict=True):
        figures = r"[\d.]+ % right, trace [-\d.e+]+, [\d.]+ s; about \d+ s left"
        assert re.fullmatch(rf"\[1/3\] sgd: seed {place}, {figures}", line)
    assert told[4].startswith("[2/3] sam")
    assert told[-1].startswith("[3/3]")


def test_the_finding_compares_the_two():
    results = {
        "settings": {"methods": ["sgd", "nso"], "wrong_labels": 0.2},
        "runs": [
            {"method": "sgd", "test_accuracy": 0.8, "trace": 100.0},
            {"method": "nso", "test_accuracy": 0.9, "trace": 25.0},
        ],
    }
    told = demo.finding(results)
    assert "with 20 % of the labels wrong, nso gets 90.0 % of the test digits right and sgd 80.0 %" in told
    assert told.endswith("is 25.0 against 100.")
    results["settings"]["methods"] = ["nso"]
    assert demo.finding(results).startswith("means over the seeds")


def test_a_run_that_had_done_nothing_gives_way(tmp_path):
    for seeds in (1, 2):
        Journal(tmp_path, {"seeds": seeds}, resume=False)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["settings"] == {"seeds": 2}


def test_publish_copies_to_the_results_and_the_pages(output, results, tmp_path, monkeypatch):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    monkeypatch.setattr(publish, "PAGES", (page, other))
    shutil.copy(RESULTS / "precision.json", tmp_path)
    page.write_text("before\n<!-- demo-table -->\nold\n<!-- /demo-table -->\nafter\n")
    marks = "".join(
        f"<!-- {name}-table --><!-- /{name}-table -->\n" for name in ("precision", "precision-figures")
    )
    other.write_text(marks)
    monkeypatch.setattr(demo_options, "FULL", FULL)
    assert cli.main(["publish", "--out", str(output)]) == 0
    assert json.loads((tmp_path / "demo.json").read_text()) == results
    assert (tmp_path / "demo-surface.png").read_bytes() == (output / "surface.png").read_bytes()
    for method in ("sgd", "nso"):
        published = (tmp_path / f"demo-{method}.safetensors").read_bytes()
        assert published == (output / f"{method}.safetensors").read_bytes()
    text, figures = page.read_text(), other.read_text()
    assert tables.markdown(demo, results) in text
    assert "\nold\n" not in text
    assert text.startswith("before\n<!-- demo-table -->\n")
    assert text.endswith("-table -->\nafter\n")
    assert "| weights in | sigma 0.0001 |" in figures
    assert "| weights in | sigma | do not move (%) |" in figures
    cli.main(["tables"])
    assert (page.read_text(), other.read_text()) == (text, figures)


def _results(values, errors):
    runs = [
        {
            "method": "nso",
            "test_accuracy": value,
            "loss_gap": 0.01,
            "trace": 1000 * value,
            "trace_standard_error": error,
            "largest_eigenvalue": 0.0,
            "seconds": 12.34,
        }
        for value, error in zip(values, errors, strict=True)
    ]
    settings = {
        "methods": ["nso"],
        "seeds": len(values),
        "num_train": 400,
        "wrong_labels": 0.2,
        "num_test": 1000,
        "gradient_evaluations": 2400,
        "batch_size": 50,
        "final_products": 100,
    }
    return {"machine": {"device": "cpu", "cpu_count": 2}, "settings": settings, "runs": runs}


def test_table_shows_mean_and_standard_deviation():
    row = demo.rows(_results([0.90, 0.92], [3.0, 4.0]))[0]
    assert row == [
        "nso",
        "91.0 ± 1.4",
        "0.010 ± 0.000",
        "910 ± 14",
        "3.54",
        "0.000 ± 0.000",
        "12 ± 0",
    ]


def test_table_fits_into_80_columns(results, capsys):
    runs = [run | {"seconds": 10.0 + run["seed"]} for run in results["runs"]]
    report.print_table(Console(width=80), demo, results | {"runs": runs})
    shown = capsys.readouterr().out
    for row in demo.rows(results | {"runs": runs}):
        for cell in row:
            assert cell in shown


def test_table_of_one_seed_has_no_deviation():
    assert demo.rows(_results([0.9], [3.0]))[0][1:4] == ["90.0", "0.010", "900"]


def test_published_figures_are_of_equal_cost_and_small():
    runs = json.loads((RESULTS / "demo.json").read_text())["runs"]
    assert len({run.get("evaluations") or run["gradient_evaluations"] for run in runs}) == 1
    assert all(math.isfinite(run["trace"]) for run in runs)
    for name in ("demo-training.png", "demo-surface.png"):
        assert (RESULTS / name).stat().st_size < 150_000


def test_a_step_is_compiled_once_for_all_seeds():
    plain, task, traced = demo.METHODS["sgd"].method, demo.make_task(0.0), []

    def update(loss):
        inner = plain.update(loss)

        def counted(*args):
            traced.append(1)
            inner(*args)

        return counted

    for seed in (0, 1):
        settings = demo.Options(steps=STEPS).training("sgd", seed)
        loop.train(task, plain._replace(update=update), settings)
    assert len(traced) == 1
