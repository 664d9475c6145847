"""One setting for all tasks: what a method of one gradient a step gives over plain training, by strength."""

import statistics
from typing import Any

from benchmarks.kit import tables
from benchmarks.quality import fronts
from benchmarks.quality.fronts import Setting
from benchmarks.training.methods import METHODS

Tasks = dict[str, dict[str, Any]]


def markdown(results: Tasks, titles: dict[str, str]) -> str:
    """The strengths tried on all tasks that have several such methods, the most accurate over them first.

    Args:
        results: Of the tasks, by their names.
        titles: What to call them in the head.
    """
    names = [name for name, method in METHODS.items() if method.is_noise and method.gradients_per_step == 1]
    results = {task: of for task, of in results.items() if len(set(names) & set(of["chosen"])) > 1}
    tasks = [titles[task] for task in results]
    headers = ["method", "strength", "points ahead, all", *tasks, "trace / plain's"]
    settings = [each for name in names for each in _everywhere(results, name)]
    settings.sort(key=lambda each: -_mean_ahead(results, each))
    return tables.grid([headers, *(_row(results, each) for each in settings)]) + "\n"


def _everywhere(results: Tasks, name: str) -> list[dict[str, Setting]]:
    """A method's settings by task, for each strength that no task lacks."""
    found = {task: {s.strength: s for s in fronts.front(of, name)} for task, of in results.items()}
    common = set.intersection(*(set(strengths) for strengths in found.values()))
    return [{task: by[strength] for task, by in found.items()} for strength in sorted(common)]


def _mean_ahead(results: Tasks, settings: dict[str, Setting]) -> float:
    """Points of accuracy ahead of plain training, over the tasks."""
    return statistics.mean(
        100 * (each.mean("test_accuracy") - fronts.plain(results[task]).mean("test_accuracy"))
        for task, each in settings.items()
    )


def _row(results: Tasks, settings: dict[str, Setting]) -> list[str]:
    one = next(iter(settings.values()))
    plain = {task: fronts.plain(results[task]) for task in settings}
    ratios = [each.mean("trace") / plain[task].mean("trace") for task, each in settings.items()]
    return [
        one.method,
        f"{one.strength:g}",
        f"{_mean_ahead(results, settings):+.1f}",
        *(fronts.ahead(each, plain[task]) for task, each in settings.items()),
        tables.number(statistics.geometric_mean(ratios), 2),
    ]
