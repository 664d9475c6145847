"""What a comparison of methods shows: its table, its claims, its picture."""

import collections
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.kit import plots, tables
from benchmarks.training.methods import METHODS

# In words; the demo's wp-sgd takes two draws in a step.
NOISES = {
    "ivon": "one-sided noise, of each weight by a running mean of the Hessian",
    "wp-sgd": "one-sided noise, one draw and so one gradient in a step",
    "lpf-sgd": "one-sided noise in proportion to each filter, anew in each of four microbatches",
    "mrwp": "noise in proportion to each filter on half of the batch, none on the other",
    "marwp": "mrwp, damped where gradients have been large",
    "nso": "a pair of draws",
    "nso-relative": "a pair, in proportion to each weight",
    "nso-micro": "a pair, in proportion to each weight, anew in each of four microbatches",
    "wp-micro": "one-sided noise in proportion to each weight, anew in each of four microbatches",
    "wp-adaptive": "wp-micro, damped where gradients have been large",
    "wp-relative": "one-sided noise in proportion to each weight, one gradient in a step",
}
FAMILY = ("sam", "asam", "usam", "rsam")  # the rivals of the paper's claims
HEADERS: tuple[str, ...] = (
    "method",
    "strength",
    "rate",
    "test accuracy (%)",
    "Hessian trace",
    "largest eigenvalue",
)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each method, with means and 95 % intervals over the seeds."""
    return [_row(name, results) for name in results["chosen"]]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, sizes, machine = results["settings"], results["data"], results["machine"]
    tried = collections.Counter(run["method"] for run in results["tuning"])
    fewest, most = (count // settings["tuning_seeds"] for count in (min(tried.values()), max(tried.values())))
    return (
        f"Mean ± 95 % interval over {settings['seeds']} seeds: of the {sizes['train']} examples to train on, "
        "their order, the weights that are not pretrained, and the noise. "
        f"{sizes['test']:,} examples to test on. Every method takes {settings['gradients']} gradient "
        f"evaluations on {settings['batch_size']} examples each{_steps(results)}. "
        f"Strength and rate: of the least loss on {sizes['validation']} validation examples, a mean over "
        f"{settings['tuning_seeds']} other seeds, of {fewest} to {most} pairs for a method. "
        f"Trace and eigenvalue: of the Hessian of the loss over {_curved(settings)} training examples, "
        "at the end. "
        f"{_named(results)}On {machine['cpu_count']} CPU cores ({machine['device']}).\n\n{claims(results)}"
    ).strip()


def _curved(settings: dict[str, Any]) -> str:
    """How many examples' loss has the Hessian that was measured."""
    number = settings.get("curvature_examples")
    return f"{number} of the" if number else "all"


def _named(results: dict[str, Any]) -> str:
    """What the names of the ways to use noise mean, for those that are there."""
    told = [f"{name}: {NOISES[name]}" for name in results["chosen"] if name in NOISES]
    return f"{'; '.join(told)}. " if told else ""


def _steps(results: dict[str, Any]) -> str:
    """How many gradients the methods take in a step, unless it is one for all."""
    names: dict[int, list[str]] = {}
    for name, knobs in results["chosen"].items():
        names.setdefault(knobs["gradients_per_step"], []).append(name)
    told = [f"{count} in a step by {', '.join(of)}" for count, of in sorted(names.items()) if count > 1]
    return f" ({'; '.join(told)})" if told else ""


def claims(results: dict[str, Any]) -> str:
    """What the run says about the paper's claims and ours, as a list in Markdown."""
    family = [name for name in FAMILY if name in results["chosen"]]
    ours = [name for name in results["chosen"] if METHODS[name].is_noise]
    if not family or not ours:
        return ""
    told = []
    for figure, what in (("trace", "Hessian trace"), ("largest_eigenvalue", "largest eigenvalue")):
        if min(min(_column(results, name, figure)) for name in (*family, *ours)) <= 0:
            told.append(f"- The {what} is not positive in every run, so that there are no ratios of it.")
            continue
        rival = min(family, key=lambda name: statistics.mean(_column(results, name, figure)))
        theirs = _column(results, rival, figure)
        against = ", ".join(
            f"{name} {against_in_words(_column(results, name, figure), theirs)}" for name in ours
        )
        told.append(f"- The {what}, against that of {rival}, the lowest of SAM's family: {against}.")
    rival = max(family, key=lambda name: statistics.mean(_column(results, name, "test_accuracy")))
    others = [rival, next(iter(results["chosen"]))]
    differences = ", ".join(
        f"{name} "
        + " and ".join(
            ahead(*(_column(results, each, "test_accuracy") for each in (name, other))) for other in others
        )
        for name in ours
    )
    told.append(f"- Points of accuracy ahead of {' and '.join(others)}, seed by seed: {differences}.")
    return "\n".join(told)


def plot(results: dict[str, Any]) -> bytes:
    """Accuracy and trace at the end, with 95 % intervals, and the trace on the way if followed, as PNG."""
    names, seeds = list(results["chosen"]), results["settings"]["seeds"]
    followed = len(results["runs"][0]["curve"]) > 1
    height = 1.3 + 0.26 * len(names)
    figure = Figure(figsize=(plots.WIDTH, height + 3.6 * followed), layout="constrained")
    grid = figure.add_gridspec(1 + followed, 2, height_ratios=[height, 3.2][: 1 + followed])
    accuracy = figure.add_subplot(grid[0, 0])
    trace = figure.add_subplot(grid[0, 1], sharey=accuracy)
    _dots(accuracy, results, lambda run: 100 * run["test_accuracy"])
    _dots(trace, results, lambda run: run["trace"], log=True)
    trace.tick_params(labelleft=False)
    accuracy.set(title="Accuracy: right is better", xlabel="test accuracy (%)")
    trace.set(title="Trace: left is flatter", xlabel="Hessian trace (log scale)")
    figure.suptitle(f"At the end: mean and 95 % interval, {seeds} seeds", fontsize="large")
    if not followed:
        return plots.finish(figure)
    way = figure.add_subplot(grid[1, :])
    for name in filter(plots.FOLLOWED.__contains__, names):
        runs = chosen_runs(results, name)
        x = [point["evaluations"] for point in runs[0]["curve"]]
        curves = [[point["trace"] for point in run["curve"]] for run in runs]
        plots.band(way, name, x, curves, log=True, spread=plots.interval)
    way.set(title="The trace on the way there: geometric mean, 95 % band", xlabel="gradient evaluations")
    way.set(ylabel="Hessian trace (log scale)", yscale="log")
    plots.label_log_axis(way.yaxis)
    return plots.finish(figure, way)


def plot_ends(results: dict[str, Any], shown: Mapping[str, Callable[[dict[str, Any]], float]]) -> bytes:
    """Figures of the runs at the end, with 95 % intervals, as PNG.

    Args:
        results: Of a comparison.
        shown: Figures by the titles of their axes, which are logarithmic where a title says so.
    """
    seeds = results["settings"]["seeds"]
    figure = Figure(figsize=(plots.WIDTH, 1.3 + 0.26 * len(results["chosen"])), layout="constrained")
    columns = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    for axes, (title, value) in zip(columns, shown.items(), strict=True):
        _dots(axes, results, value, log="log scale" in title)
        axes.set_xlabel(title)
    figure.suptitle(f"At the end: mean and 95 % interval, {seeds} seeds", fontsize="large")
    return plots.finish(figure)


def _dots(
    axes: Axes, results: dict[str, Any], value: Callable[[dict[str, Any]], float], *, log: bool = False
) -> None:
    """A figure of each method's runs, as a dot with its interval."""
    rows = [
        plots.Row(plots.title(name), [value(run) for run in chosen_runs(results, name)], plots.colour(name))
        for name in results["chosen"]
    ]
    plots.dots(axes, rows, log=log)


def _row(name: str, results: dict[str, Any]) -> list[str]:
    knobs = results["chosen"][name]
    return [
        name,
        f"{knobs['strength']:g}" if len(METHODS[name].strengths) > 1 else "",
        f"{knobs['rate']:g}",
        *cells(chosen_runs(results, name)),
    ]


def cells(runs: list[dict[str, Any]]) -> list[str]:
    """Test accuracy in percent, trace and largest eigenvalue, each with its 95 % interval."""
    columns = ([run[name] for run in runs] for name in ("test_accuracy", "trace", "largest_eigenvalue"))
    accuracy, *others = (np.array(column) for column in columns)
    return [with_interval(values) for values in (100 * accuracy, *others)]


def against_in_words(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """By how many percent the geometric mean differs, and its 95 % interval, from each seed's ratio."""
    difference = np.log(mine) - np.log(theirs)
    mean, width = difference.mean(), plots.interval(difference)
    low, middle, high = (round(100 * math.expm1(mean + shift)) for shift in (-width, 0, width))
    ends = (low, high) if middle > 0 else (high, low)
    if low < 0 < high:
        return f"{_word(middle)} (from {_word(ends[0])} to {_word(ends[1])})"
    return f"{_word(middle)} ({abs(ends[0])} to {abs(ends[1])})"


def _word(percent: int) -> str:
    """`88 % higher` or `12 % lower`: a minus sign is easily missed."""
    return f"{abs(percent)} % {'higher' if percent > 0 else 'lower'}" if percent else "the same"


def ahead(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """By how many points the mean accuracy is higher, and its 95 % interval, from each seed's difference."""
    difference = 100 * (np.array(mine) - np.array(theirs))
    return f"{difference.mean():+.1f} ± {plots.interval(difference):.1f}"


def with_interval(values: Sequence[float] | np.ndarray) -> str:
    """The mean and its 95 % interval; the mean alone of a single value."""
    array = np.asarray(values)
    return tables.with_error(float(array.mean()), float(plots.interval(array)) if len(array) > 1 else None)


def _column(results: dict[str, Any], name: str, figure: str) -> list[float]:
    return [run[figure] for run in chosen_runs(results, name)]


def chosen_runs(results: dict[str, Any], name: str | None) -> list[dict[str, Any]]:
    """Those of a method at the strength that was chosen, or all where none was to choose."""
    runs = [run for run in results["runs"] if run["method"] == name]
    if "chosen" not in results or name not in results["chosen"]:
        return runs
    return [run for run in runs if run["strength"] == results["chosen"][name]["strength"]]
