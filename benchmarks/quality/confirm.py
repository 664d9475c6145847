"""Whether a published method gains accuracy over plain training: both trained anew, from many more seeds.

A comparison of many methods has few seeds for each, so that its intervals are wide, and picks settings by
some of what it measures. Here nothing is picked: two methods are trained with the settings that were
published, from seeds that nothing was chosen by, each with its own examples, start and noise.
"""

import dataclasses
import functools
import itertools
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.kit import tables
from benchmarks.kit.files import RESULTS, UserError, read_file
from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Count, Resumable
from benchmarks.quality import comparison, comparison_table, fronts, images, summary, text
from benchmarks.quality.comparison import Knobs, Trainings
from benchmarks.quality.fronts import Setting
from benchmarks.tasks import data
from benchmarks.training.methods import Name

STUDIES: dict[str, Any] = {"images": images, "text": text}  # by what their results' names begin with
FIRST_SEED = 1000  # beyond all that comparisons choose by or measure with
HEADERS: tuple[str, ...] = (
    "task",
    "method",
    "strength",
    "seeds",
    "plain (%)",
    "test accuracy (%)",
    "points ahead",
    "seeds ahead",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Resumable):
    """Trains a published method and plain training from further seeds, for their accuracy alone.

    Attributes:
        results: What was published: images-... or text-... of benchmarks/results.
        data: Where its examples lie, unless they are scikit-learn's digits.
        method: The method, with the strength that the one-standard-error rule picked.
        seeds: Trainings of each of the two.
    """

    results: str = "images-digits"
    data: str | None = None
    method: Name = "wp-micro"
    seeds: Count = 30
    work: Path = Path("runs/confirm")

    def settings(self) -> dict[str, Any]:
        """What somebody needs to know to go on with the run or to repeat it, ready for JSON."""
        return super().settings() | {"data": None if self.data is None else data.name(self.data)}


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Trains both from all seeds.

    Raises:
        UserError: There are no such results, they lack the method, or are of other examples, or these cannot
            be read.
    """
    published = _published(options.results)
    compared = _options(published["settings"], options)
    pair = fronts.plain(published), _picked(published, options)
    journal = Journal(options.work, options.settings(), resume=options.resume)
    problem = _study(options.results).make_problem(compared, journal, progress)
    methods = problem.methods([each.method for each in pair])
    what = f"{options.seeds} trainings of {' and of '.join(each.method for each in pair)}"
    trainings = Trainings(problem, methods, compared, journal, progress)
    trainings.announce(what, len(pair) * options.seeds)
    train = functools.partial(comparison.train_and_evaluate, parts=("validation", "test"))
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    return {
        "name": f"{options.results}-{options.method}",
        "settings": options.settings(),
        "data": problem.sizes(),
        "runs": [
            trainings.figures(each.method, Knobs.of(each.runs[0]), seed, train)
            for seed, each in itertools.product(seeds, pair)
        ],
    }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row: the task, and how far the method is ahead of plain training."""
    runs, name = results["runs"], results["settings"]["method"]
    ours = [run for run in runs if run["method"] == name]
    plain = [run for run in runs if run["method"] != name]
    theirs, mine = ([run["test_accuracy"] for run in group] for group in (plain, ours))
    return [
        [
            results["data"]["name"],
            name,
            f"{ours[0]['strength']:g}",
            str(len(mine)),
            *(comparison_table.with_interval(100 * np.array(each)) for each in (theirs, mine)),
            comparison_table.ahead(mine, theirs),
            str(sum(map(operator.gt, mine, theirs))),
        ]
    ]


def caption(_: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    return (
        "Test accuracy, mean ± 95 % interval over seeds that nothing was chosen by, of the method and of "
        "plain training, which takes as many gradients. Both with the strength, learning rate and weight "
        "decay of the published comparison. Points ahead: seed by seed, on the same examples from the "
        "same start. Seeds ahead: those of which the method is the more accurate."
    )


def all_tasks(confirmed: Sequence[dict[str, Any]]) -> str:
    """One table of the results of several tasks, in the order of the summary."""
    lines = []
    for task, results in itertools.product(summary.TASKS, confirmed):
        if results["settings"]["results"] == task:
            lines += [[summary.TASKS[task].task, *row[1:]] for row in rows(results)]
    return f"{tables.grid([HEADERS, *lines], texts=(0, 1))}\n\n{caption({})}\n"


def _published(name: str) -> dict[str, Any]:
    known = [path.stem for path in RESULTS.glob("*.json")]
    known = sorted(each for each in known if _study(each) is not None)
    if name not in known:
        raise UserError(f"argument --results {name}: expected one of {', '.join(known)}")
    results: dict[str, Any] = json.loads(read_file(RESULTS / f"{name}.json"))
    return results


def _study(results: str) -> Any:
    return STUDIES.get(results.partition("-")[0])


def _options(settings: dict[str, Any], options: Options) -> comparison.Options:
    """Those of the published comparison, on the examples of this one."""
    if (named := options.settings()["data"]) != settings["data"]:
        wanted = (
            "the digits, without --data" if settings["data"] is None else f"where {settings['data']} lies"
        )
        raise UserError(
            f"argument --data: {options.results} is of other examples: expected {wanted}, got {named}"
        )
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    made: comparison.Options = _study(options.results).Options(
        **settings | lists | {"data": options.data, "work": options.work}
    )
    return made


def _picked(published: dict[str, Any], options: Options) -> Setting:
    _, *others = published["chosen"]
    if options.method not in others:
        raise UserError(f"argument --method {options.method}: expected one of {', '.join(others)}")
    return fronts.by_one_standard_error(fronts.front(published, options.method))
