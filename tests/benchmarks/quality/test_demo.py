"""`python -m benchmarks`: a tiny run from end to end, every mistake a user can make, and the table."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks.cost import jax_steps, memory, rivals, step_cost
from benchmarks.curvature import peers
from benchmarks.kit import files, report, tables
from benchmarks.kit.journal import Journal
from benchmarks.quality import demo, matrix_sensing, robustness
from benchmarks.tasks import data
from benchmarks.training import loop, measuring

ROOT = Path(__file__).parents[3]
FILES = {"results.json", "table.md", "training.png", "surface.png"}
NETWORKS = {f"{name}.safetensors" for name in demo.METHODS}
LOADING = "Loading JAX and Flax ...\n"
STEPS = 3
FULL = demo.Size(seeds=2, steps=STEPS, num_points=10, point_products=4, final_products=4)


@pytest.fixture(autouse=True)
def strict():
    """Instead of the fixture for the library's own tests: optax's schedules need standard promotion."""


@contextlib.contextmanager
def short():
    """The measuring of a real run would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "SLICE_DISTANCES", {"random": [-1.0, 0.0, 1.0], "eigenvector": [-0.5, 0.5]})
        patch.setattr(demo, "FULL", FULL)
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
    method, settings = demo.METHODS[name].method, demo.Options(steps=STEPS).training(name, seed=0)
    task = demo.make_task(0.2)
    step = loop.compiled(task, method, settings.gradients, settings.schedule).step
    state = loop.initial_state(task, method, settings)
    hlo = step.lower(state, jax.random.key(0), next(task.batches(0, 0))).as_text()
    assert hlo.count("stablehlo.convolution") == 5 * method.gradients_per_step


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
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    assert cli.main(["publish", "--out", str(output)]) == 2
    assert "has a quick demo: `python -m benchmarks demo --full` makes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_publish_copies_results_of_other_commands(tmp_path, monkeypatch):
    out, results, page = tmp_path / "out", tmp_path / "results", tmp_path / "page.md"
    out.mkdir(), results.mkdir()
    for name in ("precision.json", "precision.png"):
        shutil.copy(ROOT / "benchmarks" / "results" / name, out)
    (out / "precision.md").write_text("")
    page.write_text("<!-- precision-table --><!-- /precision-table -->\n")
    monkeypatch.setattr(cli, "RESULTS", results)
    monkeypatch.setattr(cli, "PAGES", (page,))
    assert cli.main(["publish", "--out", str(out)]) == 0
    assert {path.name for path in results.iterdir()} == {"precision.json", "precision.png"}
    assert "| weights in | sigma 0.0001 |" in page.read_text()


def test_no_command_writes_to_the_published_results_by_default():
    for name in cli.MEASUREMENTS:
        options = cli._load(name).Options
        assert name == "demo" or options.out.parts[0] == "runs"


def test_a_quick_run_and_a_full_one_lie_apart():
    quick, full = demo.Options(), demo.Options(full=True)
    assert quick.folder != full.folder
    assert quick.folder.parts[0] == full.folder.parts[0] == "runs"
    assert (quick.size, full.size) == (demo.QUICK, demo.FULL)
    assert demo.Options(full=True, seeds=7, steps=9).size == demo.FULL._replace(seeds=7, steps=9)
    published = json.loads((cli.RESULTS / "demo.json").read_text())["settings"]
    assert tuple(published[name] for name in demo.Size._fields) == demo.FULL


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


def test_the_time_left_follows_the_pace(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    with report.expected_progress(Console(quiet=True)) as shown:
        left = report.TimeLeft({"first": 30.0, "second": 60.0}, shown)
        assert str(left) == "about 90 s"
        left.advance(10.0)
        clock[0] = 30.0  # three times as slow
        assert left.seconds == pytest.approx(80 * (30 + 10) / (10 + 10))
        left.finish("first")
        clock[0] = 30.0 + report.PRIOR_SECONDS + 30.0
        assert left.seconds == pytest.approx(60 * 2)
        left.finish("second")
        assert left.seconds == 0
        assert str(left) == "about 5 s"


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
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    monkeypatch.setattr(cli, "PAGES", (page, other))
    shutil.copy(ROOT / "benchmarks" / "results" / "precision.json", tmp_path)
    page.write_text("before\n<!-- demo-table -->\nold\n<!-- /demo-table -->\nafter\n")
    marks = "".join(
        f"<!-- {name}-table --><!-- /{name}-table -->\n" for name in ("precision", "precision-figures")
    )
    other.write_text(marks)
    monkeypatch.setattr(demo, "FULL", FULL)
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "train: expected a command, one of demo, step-cost,"),
        ([], "python -m benchmarks: expected a command"),
        (["demo", "--methods"], "argument --methods: expected at least one value"),
        (["demo", "--out", "a-file"], "a-file"),
        (["demo", "--out", "a-file/folder"], "a-file/folder"),
        (["demo", "--out", "/proc/x"], "/proc/x"),
        (["demo", "--out", "/dev/null/x"], "/dev/null/x"),
        (["demo", "--out", "new/" + 300 * "x"], "name too long"),
        (["publish", "--out", "nowhere"], "nowhere/results.json"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("mine")
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out in ("", LOADING)
    assert expected.lower() in shown.err.lower()
    assert shown.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]
    assert (tmp_path / "a-file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo", "--methods", "sgd", "adam"], "'adam'"),
        (["demo", "--seeds", "0"], "--seeds: expected a whole number of at least 1, got '0'"),
        (["demo", "--steps", "many"], "--steps: expected a whole number of at least 1, got 'many'"),
        (["demo", "--epochs", "3"], "Unrecognized options: --epochs"),
        (["demo", "--wrong-labels", "nan"], "--wrong-labels: expected a number from 0 to 1, got 'nan'"),
        (["publish", "--seeds", "3"], "Unrecognized options: --seeds"),
        (["tables", "now"], ": now"),
    ],
)
def test_wrong_options_are_told(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    shown = capsys.readouterr()
    assert shown.out in ("", LOADING)
    assert expected in " ".join(re.sub("[\u2500-\u257f]", " ", shown.err).split())
    assert not list(tmp_path.iterdir())


def test_help_names_the_commands_and_imports_none(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_load", None)
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    measurements, maintenance = shown.split("\n\nfor maintainers:\n")
    for name, command in cli.MEASUREMENTS.items():
        assert re.search(
            f"^  {name} +{command.minutes} min  {re.escape(command.help)}$", measurements, re.MULTILINE
        )
    for name, command in cli.MAINTENANCE.items():
        assert re.search(f"^  {name} +{re.escape(command.help)}$", maintenance, re.MULTILINE)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_explains_its_options(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert f"python -m benchmarks {name} " in shown
    assert (name in cli.MEASUREMENTS) == bool(re.search(r"Takes\s+about\s+(a|\d+)\s+minute", shown))
    assert not re.search(r"--[a-z-]+ \S+ +[(]default", shown)


@pytest.mark.parametrize("package", ["tyro", "flax", "sklearn", "matplotlib", "rich", "safetensors"])
def test_a_missing_package_is_told_in_one_line(package, tmp_path):
    code = (
        f"import sys; sys.modules[{package!r}] = None; from benchmarks.__main__ import main; sys.exit(main())"
    )
    _fails_in_one_line(["-c", code, "demo"], f"needs {package}, of the 'benchmarks' extra", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_exit_code_is_that_of_main(tmp_path):
    _fails_in_one_line(["-m", "benchmarks", "train"], "expected a command", tmp_path)


def _fails_in_one_line(arguments, expected, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # noqa: S603
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout in ("", LOADING)
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_our_own_is_not_taken_for_a_missing_package():
    fault = ImportError("cannot import name 'x' from 'nso_jax.noise'", name="nso_jax.noise")
    assert cli._missing_package(fault) is fault


def test_ctrl_c_leaves_one_line_and_no_folder(monkeypatch, tmp_path, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path / "new" / "folder")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


def test_files_are_written_all_or_none(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(files.UserError, match="cannot write"):
        files.write_files({tmp_path / "a": "new", tmp_path / "none" / "b": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    files.write_files({tmp_path / "a": "new"})
    assert (tmp_path / "a").read_text() == "new"


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


@pytest.mark.parametrize("page", ["# nso_jax\n", "<!-- demo-table -->\n", "<!-- /demo-table -->\n"])
def test_a_page_without_both_marks_is_refused(page):
    with pytest.raises(files.UserError, match="demo-table"):
        tables.replace_in(page, "demo-table", "")


def test_a_mark_of_no_results_is_refused(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("<!-- demos-table --><!-- /demos-table -->")
    monkeypatch.setattr(cli, "PAGES", (tmp_path / "page.md",))
    with pytest.raises(files.UserError, match="demos-table -->: expected one of ablate, "):
        cli._pages_with({})


def test_the_pages_have_the_tables_of_the_published_results():
    pages = cli._pages_with({})
    for page, text in pages.items():
        assert page.read_text() == text, f"{page}: run python -m benchmarks tables"
    marked = {name for text in pages.values() for name in tables.marked(text)}
    assert marked >= cli.TABLES.keys() | {"summary"}


def test_published_figures_are_of_equal_cost_and_small():
    runs = json.loads((cli.RESULTS / "demo.json").read_text())["runs"]
    assert len({run.get("evaluations") or run["gradient_evaluations"] for run in runs}) == 1
    assert all(math.isfinite(run["trace"]) for run in runs)
    for name in ("demo-training.png", "demo-surface.png"):
        assert (cli.RESULTS / name).stat().st_size < 150_000


@pytest.mark.parametrize(
    ("choices", "known"),
    [
        (demo.MethodName, demo.METHODS),
        (step_cost.CaseName, (*jax_steps.CASES, step_cost.NOISE)),
        (memory.CaseName, memory.CASES),
        (memory.NumSamples, memory.SAMPLES),
        (rivals.CaseName, rivals.CASES),
        (peers.NetworkName, peers.NETWORKS),
        (matrix_sensing.MethodName, matrix_sensing.METHODS),
        (robustness.MethodName, tuple(robustness.METHODS)[1:]),
    ],
)
def test_the_command_line_knows_all_choices(choices, known):
    assert get_args(choices) == tuple(known)


def test_digits_are_split_without_overlap():
    first, second = data.digits(0, 200), data.digits(1, 200)
    assert [len(part.labels) for part in first] == [200, 597, 1000, 1000]
    everything = np.concatenate([part.inputs for part in first[:3]]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == len(np.unique(_all_digits(), axis=0))
    np.testing.assert_array_equal(first.test.inputs, second.test.inputs)
    assert not np.array_equal(first.train.inputs, second.train.inputs)
    np.testing.assert_array_equal(first.train.inputs, data.digits(0, 200).train.inputs)


def test_wrong_labels_are_as_many_as_asked_for_and_only_in_training():
    clean, noisy = data.digits(3, 400), data.digits(3, 400, wrong_labels=0.2)
    np.testing.assert_array_equal(clean.train.inputs, noisy.train.inputs)
    assert np.sum(clean.train.labels != noisy.train.labels) == 80
    np.testing.assert_array_equal(clean.validation.labels, noisy.validation.labels)
    np.testing.assert_array_equal(clean.test.labels, noisy.test.labels)
    np.testing.assert_array_equal(noisy.test.inputs, noisy.mislabelled_test.inputs)
    assert np.sum(noisy.test.labels != noisy.mislabelled_test.labels) == 200
    assert set(np.unique(noisy.train.labels)) == set(range(10))


def _all_digits():
    return np.concatenate([part.inputs for part in data.digits(5, 100)[:3]]).reshape(1797, -1)


def test_an_epoch_of_batches_has_every_example_once():
    examples = data.Examples(np.arange(10.0), np.arange(10))
    stream = data.batches(examples, batch_size=5, seed=0)
    epochs = [[next(stream), next(stream)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(np.concatenate([batch.labels for batch in epoch])) == list(range(10))
        for batch in epoch:
            np.testing.assert_array_equal(batch.inputs, batch.labels)
    assert not np.array_equal(epochs[0][0].labels, epochs[1][0].labels)


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
