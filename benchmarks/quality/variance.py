"""Fresh noise for each part of a batch: what it does to the gradient's variance, and what that is worth."""

import functools
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

from benchmarks.kit import plots, tables
from benchmarks.quality import gradient_variance, microbatch_training
from benchmarks.quality.microbatch_training import Options
from benchmarks.tasks import data
from benchmarks.training.methods import MOMENTUM

CASE_COLOURS = (plots.BLUE, plots.VERMILLION, plots.PURPLE)
COUNT_COLOURS = (plots.SKY, plots.GREEN, plots.BLUE)
SHOWN = 7  # points of accuracy that a picture has room for

HEADERS = (
    "what",
    "parts",
    "variance times microbatches",
    "variance times devices",
    "test accuracy (%)",
    "Hessian trace",
)


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Measures the variance of the gradient's estimate, and trains with estimates that differ in it."""
    methods = microbatch_training.compared(options.microbatches)
    estimates = 2 * len(gradient_variance.CASES) * len(gradient_variance.PARTS)
    strengths = sum(len(method.strengths) for method in methods.values())
    trainings = len(microbatch_training.TASKS) * options.seeds * strengths
    shown = progress.add_task("variance", total=estimates + trainings)
    advance = functools.partial(progress.advance, shown)
    settings = {
        "draws": options.draws,
        "reference_draws": gradient_variance.REFERENCE_DRAWS * options.draws,
        "seeds": options.seeds,
        "microbatches": list(options.microbatches),
        "gradient_evaluations": 2 * options.steps,
        "batch_size": microbatch_training.BATCH_SIZE,
        "momentum": MOMENTUM,
        "measured_widths": list(gradient_variance.MEASURED_WIDTHS),
        "trained_widths": list(microbatch_training.TRAINED_WIDTHS),
        "num_examples": gradient_variance.NUM_EXAMPLES,
        "warm_up_steps": gradient_variance.WARM_UP_STEPS,
        "num_test": data.NUM_TEST,
        "products": microbatch_training.NUM_PRODUCTS,
        "tasks": {name: digits._asdict() for name, digits in microbatch_training.TASKS.items()},
    }
    return {
        "settings": settings,
        "variance": list(gradient_variance.relative_variances(options.draws, advance)),
        "training": list(microbatch_training.trainings(methods, options, advance)),
    }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The variances, times the number of parts; then what each method reaches at its best strength."""
    variances = [
        [
            row["case"],
            str(row["parts"]),
            _with_error(row["microbatches"]),
            _with_error(row["devices"]),
            "",
            "",
        ]
        for row in results["variance"]
    ]
    trainings = [
        [
            f"{row['task']}: {row['method']} {row['strength'] or ''}".rstrip(),
            str(row["num_microbatches"] or ""),
            "",
            "",
            tables.formatted_spread([100 * accuracy for accuracy in row["test_accuracy"]]),
            tables.formatted_spread(row["trace"]),
        ]
        for row in results["training"]
        if row["best"]
    ]
    return variances + trainings


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings = results["settings"]
    # One network for both, in results of before.
    widths = [settings.get(f"{of}_widths", settings.get("widths")) for of in ("measured", "trained")]
    measured, trained = (", ".join(map(str, each)) for each in widths)
    tasks = ". ".join(
        f"Labels {name}: {task['num_train']} images, learning rate {task['learning_rate']:g}, "
        "weight decay " + ", ".join(f"{decay:g} ({method})" for method, decay in task["weight_decay"].items())
        for name, task in settings["tasks"].items()
    )
    return (
        f"Variance: of the gradient's estimate for {settings['num_examples']} digits, with one pair of draws "
        "for each part of them, microbatches or shares of simulated devices; over the variance with one "
        f"part, times the number of parts, ± standard error, from {settings['draws']:,} estimates, and "
        f"{settings['reference_draws']:,} with one part. It is 1 if only the number of draws counts, and "
        "more where the noise's effect differs between the parts' digits. The network is an MLP "
        f"({measured}) after {settings['warm_up_steps']} plain steps. Relative: noise over weight. Below, of "
        f"an MLP ({trained}), with relative noise and one pair for each microbatch: test accuracy and trace "
        "of the training loss's Hessian after as many gradients for all, "
        f"{settings['gradient_evaluations']:,} on {settings['batch_size']} digits each; mean ± standard "
        f"deviation over {settings['seeds']} seeds, at the rho of SAM or noise of NSO with the best "
        "validation accuracy among those in the picture. "
        f"{tasks}.{_gains(results)}"
    )


def plot(results: dict[str, Any]) -> bytes:
    """Variance against the number of parts, as PNG."""
    figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    _plot_variance(axes, results["variance"])
    return plots.finish(figure, axes, columns=2)


def plot_accuracy(results: dict[str, Any]) -> bytes:
    """Accuracy against the strength of the noise, a panel for each task, as PNG."""
    tasks = list(results["settings"]["tasks"])
    figure = Figure(figsize=(plots.WIDTH, 0.9 + 3 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
    for panel, task in zip(panels, tasks, strict=True):
        _plot_accuracy(panel, [row for row in results["training"] if row["task"] == task])
        panel.set(title=f"Labels: {task.removesuffix(' labels')}", ylabel="test accuracy (%)")
    panels[-1].set_xlabel("noise over weight")
    figure.suptitle(
        f"Accuracy with larger noise: mean ± standard deviation, {results['settings']['seeds']} seeds",
        fontsize="large",
    )
    return plots.finish(figure, panels[0], columns=3)


def _gains(results: dict[str, Any]) -> str:
    """How much the most microbatches gained on the fewest, seed by seed."""
    counts = results["settings"]["microbatches"]
    if min(counts) == max(counts):
        return ""
    texts = []
    for task in results["settings"]["tasks"]:
        accuracies = {
            row["num_microbatches"]: np.array(row["test_accuracy"])
            for row in results["training"]
            if row["best"] and row["task"] == task
        }
        gains = 100 * (accuracies[max(counts)] - accuracies[min(counts)])
        texts.append(f"{gains.mean():+.1f} ± {_standard_error(gains):.1f} points (labels {task})")
    gained = ", ".join(texts)
    return f" From {min(counts)} to {max(counts)} microbatches, seed by seed: {gained}, ± standard error."


def _standard_error(values: np.ndarray) -> Any:
    """Of the mean over the last axis; zero for a single value."""
    count = values.shape[-1]
    return values.std(axis=-1, ddof=min(1, count - 1)) / math.sqrt(count)


def _with_error(figure: dict[str, float]) -> str:
    return f"{figure['value']:.2f} ± {figure['standard_error']:.2f}" if figure["standard_error"] else "1"


def _plot_variance(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for case, colour in zip(dict.fromkeys(row["case"] for row in rows), CASE_COLOURS, strict=False):
        mine = [row for row in rows if row["case"] == case]
        parts = np.array([row["parts"] for row in mine])
        for kind, style in (("microbatches", "-"), ("devices", ":")):
            values, errors = (
                np.array([row[kind][what] for row in mine]) / parts for what in ("value", "standard_error")
            )
            label = case if kind == "microbatches" else None
            axes.errorbar(parts, values, errors, color=colour, linestyle=style, linewidth=2, label=label)
    axes.plot(parts, 1 / parts, color=plots.BLACK, linewidth=1, linestyle="--", label="1 / parts")
    plots.label_powers_of_two(axes)
    axes.set_title("Variance by noise in the gradient, ± standard error")
    axes.set_xlabel("microbatches (solid) or devices (dotted), log scale")
    axes.set_ylabel("variance / that of one part (log scale)")


def _plot_accuracy(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A line over the strength of the noise for each number of microbatches; a level for each rival."""
    for name, style in (("sgd", "-"), ("sam", "--")):
        (best,) = (row for row in rows if row["method"] == name and row["best"])
        accuracies, colour = 100 * np.array(best["test_accuracy"]), plots.colour(name)
        level, width = accuracies.mean(), plots.deviation(accuracies)
        axes.axhline(level, color=colour, linestyle=style, linewidth=1.5, label=plots.title(name))
        axes.axhspan(level - width, level + width, color=colour, alpha=0.1, linewidth=0)
    counts = sorted({row["num_microbatches"] for row in rows if row["method"] == "nso"})
    lines = {}
    for i, count in enumerate(counts):
        mine = [row for row in rows if row["num_microbatches"] == count]
        accuracies = 100 * np.array([row["test_accuracy"] for row in mine]).T
        # Side by side, so that no whisker hides another.
        x = np.array([row["strength"] for row in mine]) + 0.008 * (i - (len(counts) - 1) / 2)
        lines[count] = x, accuracies.mean(axis=0)
        label = f"NSO, {count} part{'s' * (count > 1)}"
        look: dict[str, Any] = {"color": COUNT_COLOURS[i % 3], "marker": "os^"[i % 3]}
        axes.errorbar(*lines[count], plots.deviation(accuracies), label=label, capsize=2.5, **look)
    bottom, top = axes.get_ylim()
    edge = max(bottom, top - SHOWN)
    axes.set_ylim(edge, top)  # what hardly learns may leave the picture
    for i, (x, means) in enumerate(lines.values()):
        for place, mean in zip(x[means < edge], means[means < edge], strict=True):
            text, look = f"↓ {mean:.0f} %", {"color": COUNT_COLOURS[i % 3], "ha": "right"}
            axes.annotate(text, (place, edge), (0, 4), textcoords="offset points", **look)
