"""All comparisons in one small table: the test accuracy of four ways to train, task by task."""

import statistics
from typing import Any, NamedTuple

import numpy as np

from benchmarks.kit import plots, tables
from benchmarks.quality import comparison_table

HEADERS: tuple[str, ...] = ("task", "plain", "SAM", "NSO, in pairs", "NSO, one-sided in microbatches")


class Row(NamedTuple):
    """A task, and the methods of its results that stand in the columns, None where there is none."""

    task: str
    methods: tuple[str | None, ...]


OURS = ("sam", "nso", "wp-micro")
# By the files of the results.
TASKS = {
    "demo": Row("digits, a fifth of the labels wrong, from scratch", ("sgd", "sam", "nso", None)),
    "images-digits": Row("digits, fine-tuned on 100", ("sgd", *OURS)),
    "images-mnist": Row("MNIST, fine-tuned on 100", ("sgd", *OURS)),
    "images-cifar10": Row("CIFAR-10, fine-tuned on 100", ("sgd", *OURS)),
    "images-mnist-scratch": Row("MNIST, 1,000 from scratch", ("sgd", *OURS)),
    "images-caltech101-lite0": Row("Caltech-101, ImageNet's network on 303", ("sgd", *OURS)),
    "images-cifar100-lite0": Row("CIFAR-100, ImageNet's network on 300", ("sgd", *OURS)),
    "text-sst2": Row("SST-2 sentences, fine-tuned on 64", ("adam", *OURS)),
}


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table of the results of all tasks, by the names of their files."""
    lines = [_row(row, results[name]) for name, row in TASKS.items()]
    seeds = {name: len({run["seed"] for run in results[name]["runs"]}) for name in TASKS}
    usual = statistics.mode(seeds.values())
    others = [f"{count} ({TASKS[name].task})" for name, count in seeds.items() if count != usual]
    caption = (
        "Test accuracy in percent, mean ± 95 % interval over "
        f"{' or '.join([str(usual), *others])} seeds, and the trace of the training loss's Hessian in "
        "brackets. All methods of a task take equally many gradients, and are tuned alike on validation "
        "examples."
    )
    return f"{tables.grid([HEADERS, *lines])}\n\n{caption}\n"


def _row(row: Row, results: dict[str, Any]) -> list[str]:
    return [row.task, *(_cell(comparison_table.chosen_runs(results, name)) for name in row.methods)]


def _cell(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return "-"
    accuracies = np.array([100 * run["test_accuracy"] for run in runs])
    trace = statistics.mean(run["trace"] for run in runs)
    return f"{accuracies.mean():.1f} ± {float(plots.interval(accuracies)):.1f} ({tables.number(trace, 2)})"
