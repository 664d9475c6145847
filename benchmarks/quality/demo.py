"""Trains a small network by each method at the same cost, and measures where that led."""

import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from benchmarks.kit import plots, report, tables
from benchmarks.kit.files import UserError, read_file, write_files
from benchmarks.kit.journal import Journal
from benchmarks.quality import demo_options
from benchmarks.quality.demo_options import METHODS, Options
from benchmarks.tasks import checkpoints, data
from benchmarks.tasks.checkpoints import Metadata
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import ConvNet
from benchmarks.training import loop, measuring
from benchmarks.training.loop import Task
from benchmarks.training.measuring import Gauge

PUBLISHED = {
    "results.json": "demo.json",
    "training.png": "demo-training.png",
    "surface.png": "demo-surface.png",
    "sgd.safetensors": "demo-sgd.safetensors",
    "nso.safetensors": "demo-nso.safetensors",
}


HEADERS: tuple[str, ...] = (
    "method",
    "test accuracy (%)",
    "loss gap",
    "Hessian trace",
    "its SE",
    "largest eigenvalue",
    "seconds",
)


def measure(options: Options) -> dict[str, str | bytes]:
    """Runs the demo, showing its progress and then its table.

    Args:
        options: What to run.

    Returns:
        The content of each file to write.
    """
    console = Console()
    this: Any = sys.modules[__name__]
    with report.expected_progress(console) as progress:
        text = tables.to_json(report.environment() | run(options, progress))
    # Read back, so that the table and the pictures show exactly what the file says.
    results = json.loads(text)
    report.print_table(console, this, results)
    console.print(f"\n{options.folder / 'training.png'} shows: {finding(results)}", highlight=False)
    return {
        "results.json": text,
        "table.md": tables.markdown(this, results),
        "training.png": plot_training(results),
        "surface.png": plot_surface(results),
        **{_file(name): read_file(options.work / _file(name)) for name in options.names},
    }


def published(folder: Path) -> dict[str, bytes]:
    """What is published of a full demo's files, under the names that it has there.

    Args:
        folder: The demo's output folder.

    Raises:
        UserError: There is none, or it was a quick one.
    """
    contents = {new: read_file(folder / old) for old, new in PUBLISHED.items()}
    settings = json.loads(contents["demo.json"])["settings"]
    if tuple(settings[name] for name in demo_options.Size._fields) != demo_options.FULL:
        raise UserError(
            f"{folder} has a quick demo: `python -m benchmarks demo --full` makes what is published"
        )
    return contents


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Trains and measures with every method and seed.

    Returns:
        All figures, ready for JSON. The networks of each method's first seed are in the folder `work`.
    """
    settings, size = options.settings(), options.size
    tell = functools.partial(progress.console.print, highlight=False, markup=False, soft_wrap=True)
    journal = Journal(options.work, settings, resume=options.resume)
    trainings = itertools.product(options.names, range(size.seeds))
    left = report.TimeLeft(
        {
            _title(name, seed): _expected(name, seed, options)
            for name, seed in trainings
            if not journal.done(_title(name, seed))
        },
        progress,
    )
    last = len(options.names) + 1
    tell(
        f"{size.seeds} trainings by each of {len(options.names)} methods, on {settings['num_train']} digits, "
        f"{100 * options.wrong_labels:.0f} % of them with a wrong label; {left} left.\n"
        f"Of each you read how many of {data.NUM_TEST:,} test digits it gets right, and the Hessian's trace: "
        "small is flat."
    )
    task, runs = make_task(options.wrong_labels), []
    gauge = measuring.gauge(measuring.split_network(task.model(0))[0])
    for number, name in enumerate(options.names, 1):
        place = f"[{number}/{last}] {name}"
        tell(f"{place}: {METHODS[name].words}")
        if not all(journal.done(_title(name, seed)) for seed in range(size.seeds)):
            start = time.perf_counter()
            _compiled(name, task, options)
            left.advance(METHODS[name].compiling)
            tell(f"{place}: compiled in {time.perf_counter() - start:.1f} s; {left} left")
        for seed in range(size.seeds):
            train = functools.partial(
                _train, name, seed, options=options, task=task, gauge=gauge, journal=journal, left=left
            )
            figures = journal.once(_title(name, seed), train)
            left.finish(_title(name, seed))
            tell(
                f"{place}: seed {seed + 1} of {size.seeds}, "
                f"{100 * figures['test_accuracy']:.1f} % right, trace {figures['trace']:.3g}, "
                f"{figures['seconds']:.1f} s; {left} left"
            )
            runs.append({"method": name, "seed": seed, **figures})
    counts = {run["evaluations"] for run in runs}
    assert counts == {options.gradients}, f"the methods took {counts} gradient evaluations"  # noqa: S101
    tell(f"[{last}/{last}] the table and the pictures")
    return {"settings": settings, "runs": runs}


def make_task(wrong_labels: float) -> Task:
    """The digits of each seed, and the network that learns them."""

    def batches(seed: int, first: int) -> Iterator[Examples]:
        return data.batches(
            data.digits(seed, demo_options.NUM_TRAIN, wrong_labels).train,
            demo_options.BATCH_SIZE,
            seed,
            first,
        )

    return Task(lambda seed: ConvNet(rngs=nnx.Rngs(seed)), batches, demo_options.NUM_TRAIN)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each method, every cell a mean and a standard deviation over the seeds."""
    return [_row(name, results["runs"]) for name in results["settings"]["methods"]]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    return (
        f"Mean ± standard deviation over {settings['seeds']} seeds: of the initial weights, the data order, "
        f"the noise, and which {settings['num_train']} digits are trained on, "
        f"{100 * settings['wrong_labels']:.0f} % of them with a wrong label. "
        f"The {settings['num_test']:,} test images are always the same, with right labels. "
        f"Every method takes {settings['gradient_evaluations']:,} gradient evaluations "
        f"on {settings['batch_size']} images each. wp-sgd: one-sided, two draws in a step; nso: a pair. "
        "Loss gap: test loss minus training loss, "
        "with as many wrong labels in both. "
        "Trace and largest eigenvalue: of the Hessian of the training loss over all training images, in "
        "evaluation mode. Its SE: the standard error of one seed's trace, from "
        f"{settings['final_products']} Hessian-vector products. Seconds: to train one seed, without "
        f"compiling and measuring, on {machine['cpu_count']} CPU cores ({machine['device']})."
    )


def finding(results: dict[str, Any]) -> str:
    """What the picture of the trainings shows, in a sentence."""
    settings = results["settings"]
    names = [name for name in ("nso", "sgd") if name in settings["methods"]]

    def spread(key: str, scale: float = 1.0) -> list[str]:
        return [
            tables.spread([scale * run[key] for run in results["runs"] if run["method"] == name])
            for name in names
        ]

    if len(names) < 2:
        return "means over the seeds, in bands of a standard deviation."
    accuracy, trace = spread("test_accuracy", 100), spread("trace")
    return (
        f"with {100 * settings['wrong_labels']:.0f} % of the labels wrong, nso gets "
        f"{accuracy[0]} % of the test digits right and sgd {accuracy[1]} %, at the same number of gradients; "
        f"the Hessian's trace, which is small where the loss is flat, is {trace[0]} against {trace[1]}."
    )


def plot_training(results: dict[str, Any]) -> bytes:
    """Test accuracy and the Hessian's trace over training: means, with a band of a standard deviation."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, trace = figure.subplots(1, 2)
    for name in results["settings"]["methods"]:
        curves = [run["curve"] for run in results["runs"] if run["method"] == name]
        x = [point["evaluations"] for point in curves[0]]
        plots.band(accuracy, name, x, [[100 * point["test_accuracy"] for point in curve] for curve in curves])
        plots.band(trace, name, x, [[point["trace"] for point in curve] for curve in curves], log=True)
    accuracy.set(title="Test accuracy (%)", xlabel="gradient evaluations")
    trace.set(title="Trace of the Hessian of the training loss", xlabel="gradient evaluations", yscale="log")
    plots.label_log_axis(trace.yaxis)
    return plots.finish(figure, accuracy)


def plot_surface(results: dict[str, Any]) -> bytes:
    """Losses along two lines through each solution: means, with a band of a standard deviation."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    relative, absolute = "distance / size of each filter", "distance in weight space"
    wanted = (
        ("random", "train", "Training loss along\na random direction", relative),
        ("random", "test", "Test loss along\na random direction", relative),
        ("eigenvector", "train", "Training loss along\nthe top Hessian eigenvector", absolute),
    )
    for panel, (direction, part, title, xlabel) in zip(panels, wanted, strict=True):
        for name in results["settings"]["methods"]:
            losses = [run["slices"][direction][part] for run in results["runs"] if run["method"] == name]
            plots.band(panel, name, results["settings"]["slice_distances"][direction], losses)
        panel.set(title=title, xlabel=xlabel)
    panels[0].set(ylabel="cross-entropy", ylim=(0, None))
    return plots.finish(figure, panels[0])


def _train(
    name: str,
    seed: int,
    *,
    options: Options,
    task: Task,
    gauge: Gauge,
    journal: Journal,
    left: report.TimeLeft,
) -> dict[str, Any]:
    """Trains once and measures on the way and at the end."""
    method, settings = METHODS[name].method, options.training(name, seed)
    split = data.digits(seed, demo_options.NUM_TRAIN, options.wrong_labels)

    def advance(gradients: float) -> None:
        left.advance(gradients * METHODS[name].gradient)

    def figures(model: nnx.Module, num_products: int = options.size.point_products) -> dict[str, float]:
        return measuring.measure_point(gauge, measuring.split_network(model)[1], split, num_products)

    model, curve, seconds = loop.train(
        task, method, settings, measure=figures, journal=journal, advance=advance
    )
    if seed == 0:
        steps = loop.num_steps(method, options.gradients)
        metadata = Metadata(ConvNet.__name__, name, seed, steps, demo_options.NUM_TRAIN, options.wrong_labels)
        write_files({options.work / _file(name): checkpoints.save(model, metadata)})
    return {
        "evaluations": curve[-1]["evaluations"],
        "seconds": seconds,
        **figures(model, options.size.final_products),
        **measuring.measure_surface(gauge, measuring.split_network(model)[1], split, seed),
        "curve": curve,
    }


def _compiled(name: str, task: Task, options: Options) -> loop.Steps:
    """The steps of a method, which all its trainings share."""
    settings = options.training(name, 0)
    return loop.compiled(task, METHODS[name].method, settings.gradients, settings.schedule)


def _title(name: str, seed: int) -> str:
    """That of a training in the journal."""
    return f"{name}, seed {seed}"


def _expected(name: str, seed: int, options: Options) -> float:
    """Seconds that a training takes with compiling and measuring, on one core in 2025."""
    size, tuned = options.size, METHODS[name]
    products = size.num_points * size.point_products + size.final_products
    compiling = tuned.compiling if seed == 0 else 0.0
    return compiling + options.gradients * tuned.gradient + 0.6 + 0.016 * products


def _file(name: str) -> str:
    """That of a method's network."""
    return f"{name}.safetensors"


def _row(name: str, runs: list[dict[str, Any]]) -> list[str]:
    mine = [run for run in runs if run["method"] == name]

    def column(key: str) -> list[float]:
        return [run[key] for run in mine]

    return [
        name,
        tables.spread([100 * value for value in column("test_accuracy")]),
        tables.spread(column("loss_gap")),
        tables.spread(column("trace")),
        tables.number(math.sqrt(statistics.mean(error**2 for error in column("trace_standard_error")))),
        tables.spread(column("largest_eigenvalue")),
        tables.spread(column("seconds"), digits=2),
    ]
