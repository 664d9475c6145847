"""SEHT and the regularizers that its paper compares it with, beside NSO, at equal time."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Count
from benchmarks.quality import comparison, comparison_table, images
from benchmarks.quality.comparison import Problem
from benchmarks.training import costs, regularizers
from benchmarks.training.methods import Method, Name, Regularizer

PLAIN = "sgd"
HEADERS: tuple[str, ...] = (
    "method",
    "strength",
    "cost",
    "steps",
    "test accuracy (%)",
    "ahead of sgd",
    "Hessian trace",
)
plot = comparison_table.plot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(images.Options):
    """Compares regularizers and NSO at equal time, as SEHT's paper does with what was known before it.

    Attributes:
        methods: What to compare, beside plain SGD.
        gradients: Plain steps that a training may take as long as.
        scratch: Train a fresh network on all classes.
    """

    methods: tuple[Name | Regularizer, ...] = (  # type: ignore[assignment]  # more than elsewhere
        *("label-smoothing", "confidence", "jacobian", "cutout", "mixup", "seht", "seht-d"),
        *("nso", "nso-relative", "wp-micro"),
    )
    gradients: Count = 480
    scratch: bool = True
    per_class: Count = 50
    front: bool = False
    points: Count = 1
    work: Path = Path("runs/regularizers")


@dataclasses.dataclass(frozen=True, eq=False)
class TimedProblem(Problem):
    """A problem whose methods get as many steps as take the same time.

    Attributes:
        costs: The time of each method's step over a plain one's.
    """

    costs: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def methods(self, names: Sequence[str]) -> dict[str, Method]:
        """The methods of these names, plain training first, each at its cost here."""
        made = super().methods(names).items()
        return {name: method._replace(gradients_per_step=self.costs[name]) for name, method in made}


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Measures what a step of each method costs, and compares them.

    Raises:
        UserError: The images cannot be read or are too few, or the network cannot be fine-tuned.
    """
    images.check(options)
    names: tuple[Any, ...] = tuple(dict.fromkeys((PLAIN, *options.methods)))
    options = dataclasses.replace(options, methods=names)
    journal = Journal(options.work, options.settings(), resume=options.resume)
    problem = images.make_problem(options, journal, progress)
    measured = journal.once("costs", functools.partial(_costs, problem, options, progress))
    timed = TimedProblem(
        f"{problem.name.removesuffix('-scratch')}-{options.network}",
        problem.task,
        problem.split,
        problem.strengths,
        rates=problem.rates,
        costs={
            name: costs.in_whole_steps(cost["median"], options.gradients) for name, cost in measured.items()
        },
    )
    return comparison.compare(timed, options, journal, progress) | {"costs": measured}


def _costs(problem: Problem, options: Options, progress: Progress) -> dict[str, dict[str, float]]:
    methods = problem.methods(options.methods)
    shown = progress.add_task("costs", total=len(methods) * (1 + costs.REPETITIONS))
    advance = functools.partial(progress.advance, shown)
    return costs.measure(problem.task, methods, options.gradients, PLAIN, advance)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each method, with means and 95 % intervals over the seeds."""
    return [_row(name, results) for name in results["chosen"]]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, sizes, machine = results["settings"], results["data"], results["machine"]
    return (
        f"{sizes['name']}: mean ± 95 % interval over {settings['seeds']} seeds, of the "
        f"{sizes['train']:,} examples to train on, their order, the weights and the noise. "
        f"{sizes['test']:,} examples to test on. Cost: a step's time over a plain one's, the median of "
        f"{costs.REPETITIONS} measured in turns. Every training may take as long as {settings['gradients']} "
        f"plain steps on {settings['batch_size']} examples each, by that cost, to the nearest one that makes "
        "whole steps. Strength, learning rate, and plain SGD's weight decay for all: of the least loss on "
        f"{sizes['validation']:,} validation examples, a mean over {settings['tuning_seeds']} other seeds. "
        "Ahead: in points of accuracy, seed by seed. Trace: of the Hessian of the loss over all training "
        f"examples, unpenalized, at the end. SEHT-D keeps a weight with probability {regularizers.KEPT:g}. "
        f"On {machine['cpu_count']} CPU cores ({machine['device']})."
    )


def _row(name: str, results: dict[str, Any]) -> list[str]:
    knobs = results["chosen"][name]
    runs, plain = (comparison_table.chosen_runs(results, of) for of in (name, PLAIN))
    accuracy, trace, _ = comparison_table.cells(runs)
    mine, theirs = ([run["test_accuracy"] for run in group] for group in (runs, plain))
    return [
        name,
        f"{knobs['strength']:g}" if knobs["strength"] else "",
        f"{results['costs'][name]['median']:.2f}",
        f"{results['settings']['gradients'] / knobs['gradients_per_step']:.0f}",
        accuracy,
        "" if name == PLAIN else comparison_table.ahead(mine, theirs),
        trace,
    ]
