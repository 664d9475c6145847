"""Fronts: the accuracy and the curvature of every strength of every method, and what they say of the methods.

How flat a method ends depends on its strength, so methods are compared at the strengths that one rule picks.
The one-standard-error rule (Breiman, Friedman, Olshen and Stone, Classification and Regression Trees, 1984)
takes the strongest whose validation loss is within a standard error of the method's best: what flatness is to
be had for no loss that could be told.
"""

import math
import statistics
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.kit import plots, tables
from benchmarks.quality import comparison_table
from benchmarks.quality.comparison_table import FAMILY
from benchmarks.training.methods import METHODS

FIGURES = {"trace": "Hessian trace", "largest_eigenvalue": "largest eigenvalue"}
POINTS = 2.0  # of accuracy below the best: what is further below counts for nothing in an area
SHOWN = 3.0  # the same, in a picture

HEADERS: tuple[str, ...] = (
    "method",
    "strength",
    "rate",
    "test accuracy (%)",
    "test loss",
    "Hessian trace",
    "largest eigenvalue",
    "area (trace)",
    "area (eigenvalue)",
)
SUMMARY_HEADERS: tuple[str, ...] = (
    "task",
    "noise / rival",
    "trace",
    "points ahead",
    "noise / rival (eigenvalue)",
    "largest eigenvalue",
    "points ahead there",
    "wp-micro ahead of plain",
)


class Setting(NamedTuple):
    """A method at one strength: its runs, one for each seed."""

    method: str
    runs: tuple[dict[str, Any], ...]

    @property
    def strength(self) -> float:
        """That of the method."""
        return float(self.runs[0]["strength"])

    def column(self, figure: str) -> list[float]:
        """A figure of each seed."""
        return [run[figure] for run in self.runs]

    def mean(self, figure: str) -> float:
        """Over the seeds: geometric for curvature, whose pictures are logarithmic."""
        return (statistics.geometric_mean if figure in FIGURES else statistics.mean)(self.column(figure))


def front(results: dict[str, Any], name: str) -> list[Setting]:
    """A method's settings, from the weakest on, without those with which a training diverged."""
    runs = [run for run in results["runs"] if run["method"] == name]
    strengths = sorted({run["strength"] for run in runs})
    settings = [Setting(name, tuple(run for run in runs if run["strength"] == s)) for s in strengths]
    return [each for each in settings if all(run.get("trace", 0.0) > 0 for run in each.runs)]


def has_front(results: dict[str, Any]) -> bool:
    """Whether some method was measured at several strengths."""
    return "chosen" in results and any(len(front(results, name)) > 1 for name in results["chosen"])


def plain(results: dict[str, Any]) -> Setting:
    """Plain training, which has one setting."""
    (only,) = front(results, next(iter(results["chosen"])))
    return only


def by_one_standard_error(settings: list[Setting]) -> Setting:
    """The strongest whose mean validation loss is within a standard error of the least one."""
    best = min(settings, key=lambda each: each.mean("validation_loss"))
    losses = best.column("validation_loss")
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return next(
        each
        for each in reversed(settings)
        if each.mean("validation_loss") <= best.mean("validation_loss") + error
    )


def area(settings: list[Setting], everything: list[Setting], figure: str) -> float:
    """The share of a rectangle that a method reaches: the higher, the more accurate at the same curvature.

    Its sides: the logarithm of the figure, from the flattest to the sharpest of all settings that are within
    2 points of the best accuracy; and those points. Each setting reaches what is sharper and less accurate
    than itself (the hypervolume of Zitzler and Thiele, 1999).

    Args:
        settings: The method's.
        everything: Those of all methods.
        figure: Of the curvature.
    """
    floor = max(each.mean("test_accuracy") for each in everything) - POINTS / 100
    good = [math.log(each.mean(figure)) for each in everything if each.mean("test_accuracy") >= floor]
    left, right = min(good), max(good)
    if left == right:
        return 1.0
    reached, height = 0.0, 0.0
    # From the left, each setting that is more accurate than all flatter ones adds a strip to the right side.
    for x, accuracy in sorted((math.log(each.mean(figure)), each.mean("test_accuracy")) for each in settings):
        above = max(accuracy - floor, 0.0) - height
        if above > 0 and x < right:
            reached += above * (right - x)
            height += above
    return reached / ((right - left) * POINTS / 100)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each method, at the strength that the one-standard-error rule picks."""
    fronts = _fronts(results)
    everything = [each for settings in fronts.values() for each in settings]
    return [_row(settings, everything) for settings in fronts.values()]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings = results["settings"]
    return (
        "Each method at the strongest setting whose validation loss is within one standard error of the "
        f"method's best, of {max(len(each) for each in _fronts(results).values())} strengths, each with the "
        f"learning rate that suits it; mean ± 95 % interval over {settings['seeds']} seeds. Areas: the share "
        "that a method's settings reach of the rectangle between the flattest and the sharpest setting of "
        f"all, and between the best accuracy and {POINTS:g} points below it.\n\n{claims(results)}"
    ).strip()


def markdown(results: dict[str, Any]) -> str:
    """The table and its caption, if some method was measured at several strengths."""
    if not has_front(results):
        return ""
    return f"{tables.grid([HEADERS, *rows(results)])}\n\n{caption(results)}\n"


def claims(results: dict[str, Any]) -> str:
    """What the run says at these strengths about noise against the family of SAM, as a list in Markdown."""
    told = []
    for figure, what in FIGURES.items():
        if not (pair := rivals(results, figure)):
            return ""
        ours, theirs = pair
        told.append(
            f"- The {what} of {ours.method}, the lowest of noise, against {theirs.method}, the lowest "
            f"of SAM's family: {against(ours, theirs, figure)}; its accuracy is {ahead(ours, theirs)} points "
            "ahead."
        )
    return "\n".join(told)


def rivals(results: dict[str, Any], figure: str) -> tuple[Setting, Setting] | None:
    """The flattest of noise and the flattest of SAM's family, at the strengths that the rule picks."""
    picked = {name: by_one_standard_error(settings) for name, settings in _fronts(results).items()}
    ours = [each for name, each in picked.items() if METHODS[name].is_noise]
    theirs = [each for name, each in picked.items() if name in FAMILY]
    if not ours or not theirs:
        return None
    return min(ours, key=lambda each: each.mean(figure)), min(theirs, key=lambda each: each.mean(figure))


def against(mine: Setting, theirs: Setting, figure: str) -> str:
    """By how many percent a figure differs, in words."""
    return comparison_table.against_in_words(mine.column(figure), theirs.column(figure))


def ahead(mine: Setting, theirs: Setting) -> str:
    """By how many points the accuracy is higher."""
    return comparison_table.ahead(mine.column("test_accuracy"), theirs.column("test_accuracy"))


def summary(results: dict[str, dict[str, Any]], titles: dict[str, str]) -> str:
    """The claims of all tasks in one table, by the names of their files."""
    lines = [_summary_row(title, results[name]) for name, title in titles.items()]
    return tables.grid([SUMMARY_HEADERS, *lines], texts=(0, 1, 4)) + "\n"


def plot(results: dict[str, Any]) -> bytes:
    """Accuracy against trace and against the largest eigenvalue, a line for each method, as PNG."""
    if not has_front(results):
        return b""
    fronts = _fronts(results)
    figure = Figure(figsize=(plots.WIDTH, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    everything = [each for settings in fronts.values() for each in settings]
    best = 100 * max(each.mean("test_accuracy") for each in everything)
    shown = [each for each in everything if 100 * each.mean("test_accuracy") >= best - SHOWN]
    for axes, (of, title) in zip(panels, FIGURES.items(), strict=True):
        for name, settings in fronts.items():
            _draw(axes, name, settings, of)
        ends = [end([each.mean(of) for each in shown]) for end in (min, max)]
        axes.set(title=title, xlabel="log scale: left is flatter", xscale="log")
        axes.set_xlim(ends[0] / 1.2, ends[1] * 1.2)
        plots.label_log_axis(axes.xaxis)
    panels[0].set(ylabel="test accuracy (%)", ylim=(best - SHOWN, best + SHOWN / 6))
    return plots.finish(figure, panels[0])


def _draw(axes: Axes, name: str, settings: list[Setting], figure: str) -> None:
    """A method's line through its strengths, with a ring around the one that the rule picks."""
    x = [each.mean(figure) for each in settings]
    y = [100 * each.mean("test_accuracy") for each in settings]
    colour, dashes = plots.style(name)
    axes.plot(
        x, y, color=colour, linestyle=dashes, linewidth=1.2, marker="o", markersize=3, label=plots.title(name)
    )
    picked = settings.index(by_one_standard_error(settings))
    errors = [
        [float(plots.interval(np.array(settings[picked].column(of)))) * scale]
        for of, scale in ((figure, 1), ("test_accuracy", 100))
    ]
    below = [[min(errors[0][0], 0.8 * x[picked])], errors[0]]
    axes.errorbar(
        x[picked],
        y[picked],
        xerr=below,
        yerr=errors[1],
        color=colour,
        marker="o",
        markersize=8,
        markerfacecolor="none",
        linewidth=0.6,
        alpha=0.5,
    )


def _fronts(results: dict[str, Any]) -> dict[str, list[Setting]]:
    fronts = {name: front(results, name) for name in results["chosen"]}
    return {name: settings for name, settings in fronts.items() if settings}


def _row(settings: list[Setting], everything: list[Setting]) -> list[str]:
    picked = by_one_standard_error(settings)
    accuracy, *others = comparison_table.cells(list(picked.runs))
    return [
        picked.method,
        f"{picked.strength:g}" if len(METHODS[picked.method].strengths) > 1 else "",
        f"{picked.runs[0]['rate']:g}",
        accuracy,
        comparison_table.with_interval(picked.column("test_loss")),
        *others,
        *(f"{area(settings, everything, figure):.2f}" for figure in FIGURES),
    ]


def _summary_row(title: str, results: dict[str, Any]) -> list[str]:
    row = [title]
    for figure in FIGURES:
        pair = rivals(results, figure)
        row += (
            ["-"] * 3
            if pair is None
            else [f"{pair[0].method} / {pair[1].method}", against(*pair, figure), ahead(*pair)]
        )
    micro = front(results, "wp-micro")
    return [*row, ahead(by_one_standard_error(micro), plain(results)) if micro else "-"]
