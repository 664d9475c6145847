"""Accuracy under attack, after plain training, with a penalty on the loss around each image, and by NSO."""

import functools
import itertools
import operator
import statistics
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

from benchmarks.kit import plots, tables
from benchmarks.kit.files import UserError
from benchmarks.kit.journal import Journal
from benchmarks.quality import robust_training
from benchmarks.quality.robust_training import RIVALS, Options, Problem
from benchmarks.training.methods import Method

TOLERATED_LOSS = 0.01  # of clean accuracy, where strengths are chosen
MATCHED_WITHIN = 0.003


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Trains with every method, strength and seed, and attacks the networks.

    Raises:
        UserError: The images cannot be read or are too few, or the journal's folder has another run.
    """
    problems = robust_training.problems(options)
    for problem in problems:
        if (number := len(problem.train.labels)) < robust_training.BATCH_SIZE:
            raise UserError(f"{problem.name}: {number} images to train on, fewer than a batch")
    methods = robust_training.compared(options)
    told = _settings(options, problems, methods)
    if options.equal == "steps":
        methods = {name: method._replace(gradients_per_step=1) for name, method in methods.items()}
    journal = Journal(options.work, options.settings(), resume=options.resume)
    costs = {}
    for problem in problems:
        compute = functools.partial(robust_training.step_costs, problem, methods, options, progress)
        costs[problem.name] = journal.once(f"{problem.name}, costs", compute)
    runs = robust_training.trained(problems, methods, options, journal, progress)
    per_data = {problem.name: [run for run in runs if run["data"] == problem.name] for problem in problems}
    return {
        "settings": told,
        "costs": costs,
        "chosen": {name: choose(runs) for name, runs in per_data.items()},
        "claim": {name: match(runs) for name, runs in per_data.items()},
        "runs": runs,
    }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """For each data set its name, then one row for each method at the strength chosen."""
    lines = []
    for name, chosen in results["chosen"].items():
        lines.append([name, *[""] * (len(HEADERS) - 1)])
        runs = [run for run in results["runs"] if run["data"] == name]
        lines.extend(_row(method, strength, runs, results["settings"]) for method, strength in chosen.items())
    return lines


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    sizes = "; ".join(
        f"{name}: {of['train']:,} images to train on, {of['validation']:,} for validation, {of['test']:,} to "
        "test and attack"
        for name, of in settings["data"].items()
    )
    every, budget = settings["penalty_every"], f"{settings['budget']:,}"
    equal = f"takes {budget} steps"
    if settings["equal"] == "time":
        equal = f"may take as long as {budget} plain steps"
    lazy = f"A penalty is in one step out of {every}, {every} times as strong. " if every > 1 else ""
    if settings["augment"] != "none":
        lazy += f"Images to train on are changed by {settings['augment']}. "
    return (
        f"Mean ± standard deviation over {settings['seeds']} seeds: of the initial weights, the order of the "
        f"images and the noise. {sizes}. Every training {equal} "
        f"on {settings['batch_size']} images each; cost: a step's time over a plain one's. {lazy}FGSM "
        f"and PGD: accuracy where an attack may move each pixel by {settings['radius']:g}; PGD with "
        f"{settings['pgd_steps']} steps from each of {settings['starts']} random starts, of which one is "
        "enough to fool the network. Behind a method stands its strength, the factor of the penalty or sigma "
        "of NSO (of random signs): the one of the best accuracy under PGD on the validation images, among "
        f"those that lose at most {100 * settings['tolerated_loss']:g} point of clean accuracy there (filled "
        "in the picture); -: there is none. "
        f"{_claims(results)}Time: to train one seed, without compiling, on {machine['cpu_count']} CPU cores "
        f"({machine['device']})."
    )


def plot(results: dict[str, Any]) -> bytes:
    """Clean accuracy against that under PGD, a panel for each data set, a line for each method, as PNG."""
    names = list(results["chosen"])
    figure = Figure(figsize=(max(plots.WIDTH, 3.4 * len(names)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        runs = [run for run in results["runs"] if run["data"] == name]
        for method in results["settings"]["methods"]:
            _plot_method(panel, method, runs, results["chosen"][name][method])
        panel.set(title=name, xlabel="accuracy without attack (%)")
    panels[0].set_ylabel(f"accuracy under PGD, radius {results['settings']['radius']:g} (%)")
    seeds = results["settings"]["seeds"]
    figure.suptitle(
        f"Up and right is better: mean ± standard deviation, {seeds} seeds\n"
        "filled: the strength that the validation images chose",
        fontsize="large",
    )
    return plots.finish(figure, panels[0])


def choose(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """The strength of each method that is most robust on the validation images and keeps clean accuracy.

    Args:
        runs: Those of one data set, plain ones among them.

    Returns:
        For each method the strength of the best accuracy under PGD, among those whose clean accuracy is at
        most `TOLERATED_LOSS` below plain training's; None if there are none.
    """
    names = dict.fromkeys(run["method"] for run in runs)
    points = {
        name: {strength: _means(mine, "validation") for strength, mine in _by_strength(runs, name).items()}
        for name in names
    }
    least = points["plain"][0.0][0] - TOLERATED_LOSS - 1e-9
    chosen = {}
    for name in names:
        kept = {strength: pgd for strength, (clean, pgd) in points[name].items() if clean >= least}
        chosen[name] = max(kept, key=kept.__getitem__) if kept else None
    return chosen


def match(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of the `RIVALS`' strengths whose clean test accuracies differ by at most `MATCHED_WITHIN`.

    Args:
        runs: Those of one data set.

    Returns:
        A record for each pair, with the difference of their accuracies under PGD on the test images, the mean
        and that of each seed. Those come first whose strengths are both worth taking: no other strength of
        the same method is better in clean accuracy and under PGD.
    """
    first, second = (_by_strength(runs, name) for name in RIVALS)
    fronts = _front(first), _front(second)
    pairs = []
    for strengths in itertools.product(first, second):
        both = first[strengths[0]], second[strengths[1]]
        clean, pgd = (_difference(*both, attack) for attack in ("clean", "pgd"))
        if abs(clean.mean()) <= MATCHED_WITHIN + 1e-9:
            pairs.append(
                {
                    "strengths": dict(zip(RIVALS, strengths, strict=True)),
                    "worth_taking": all(map(operator.contains, fronts, strengths)),
                    "clean_difference": clean.mean().item(),
                    "pgd_difference": pgd.mean().item(),
                    "pgd_difference_by_seed": pgd.tolist(),
                }
            )
    return sorted(pairs, key=lambda pair: not pair["worth_taking"])


def _difference(runs: list[dict[str, Any]], others: list[dict[str, Any]], attack: str) -> np.ndarray:
    mine, theirs = ([run["test"][attack] for run in group] for group in (runs, others))
    return np.subtract(mine, theirs)


def _front(by_strength: dict[float, list[dict[str, Any]]]) -> list[float]:
    """The strengths to which no other one is superior in mean test accuracy, clean and under PGD."""
    points = {strength: _means(runs, "test") for strength, runs in by_strength.items()}
    return [
        strength
        for strength, (clean, pgd) in points.items()
        if not any(c >= clean and p >= pgd and (c, p) != (clean, pgd) for c, p in points.values())
    ]


def _means(runs: list[dict[str, Any]], part: str) -> tuple[float, float]:
    """The mean accuracies, clean and under PGD."""
    clean, pgd = (statistics.mean(run[part][attack] for run in runs) for attack in ("clean", "pgd"))
    return clean, pgd


def _by_strength(runs: list[dict[str, Any]], method: str) -> dict[float, list[dict[str, Any]]]:
    """A method's runs by its strengths, both in the order that they came in."""
    mine = [run for run in runs if run["method"] == method]
    return {
        strength: [run for run in mine if run["strength"] == strength]
        for strength in dict.fromkeys(run["strength"] for run in mine)
    }


def _settings(options: Options, problems: list[Problem], methods: dict[str, Method]) -> dict[str, Any]:
    """What somebody needs to know to repeat the run."""
    wanted = ("seeds", "equal", "budget", "penalty_every", "augment", "radius", "pgd_steps", "starts")
    told = {
        name: {"strengths": list(method.strengths), "cost": method.gradients_per_step}
        for name, method in methods.items()
    }
    sizes = {
        problem.name: {
            "shape": list(problem.train.inputs.shape[1:]),
            **{part: len(getattr(problem, part).labels) for part in ("train", "validation", "test")},
        }
        for problem in problems
    }
    return {
        **{option: getattr(options, option) for option in wanted},
        "batch_size": robust_training.BATCH_SIZE,
        "learning_rate": robust_training.LEARNING_RATE,
        "tolerated_loss": TOLERATED_LOSS,
        "matched_within": MATCHED_WITHIN,
        "methods": told,
        "data": sizes,
    }


def _row(
    method: str, strength: float | None, runs: list[dict[str, Any]], settings: dict[str, Any]
) -> list[str]:
    """A method's cells; without accuracies if it has no strength that was chosen."""
    by_strength = _by_strength(runs, method)
    mine = next(iter(by_strength.values())) if strength is None else by_strength[strength]
    cells = [
        tables.formatted_spread([100 * run["test"][attack] for run in mine])
        for attack in ("clean", "fgsm", "pgd")
    ]
    shown = "-" if strength is None else f"{strength:g}"
    return [
        method if method == "plain" else f"{method} {shown}",
        *(["-"] * len(cells) if strength is None else cells),
        f"{settings['methods'][method]['cost']:.3g}",
        f"{mine[0]['steps']:,}",
        f"{statistics.mean(run['seconds'] for run in mine):.3g}",
    ]


def _claims(results: dict[str, Any]) -> str:
    """What the run says about the claim, if both rivals were trained."""
    if not set(RIVALS) <= results["settings"]["methods"].keys():
        return ""
    text = (
        f"Pairs of strengths of {' and '.join(RIVALS)} whose clean test accuracies differ by at most "
        f"{100 * results['settings']['matched_within']:g} points, and by how much the first is better under "
        "PGD (of strengths that no other one beats in both accuracies):"
    )
    for name, pairs in results["claim"].items():
        told = [_pair(pair) for pair in pairs if pair["worth_taking"]]
        text += f" {name}, {', '.join(told) or 'none'}."
    return f"{text} "


def _pair(pair: dict[str, Any]) -> str:
    first, second = pair["strengths"].values()
    difference = tables.formatted_spread([100 * difference for difference in pair["pgd_difference_by_seed"]])
    return f"{first:g} and {second:g} by {difference}"


def _plot_method(axes: Axes, method: str, runs: list[dict[str, Any]], chosen: float | None) -> None:
    """A line through the method's strengths, with standard deviations; the chosen one is filled."""
    by_strength = _by_strength(runs, method)
    accuracies = np.array(
        [
            [[100 * run["test"][attack] for run in group] for attack in ("clean", "pgd")]
            for group in by_strength.values()
        ]
    )
    deviations = plots.deviation(accuracies.transpose(2, 0, 1))
    (x, y), (xerr, yerr) = accuracies.mean(axis=2).T, deviations.T
    colour, marker = STYLES[method]
    style: dict[str, Any] = {"color": colour, "marker": marker}
    widths: dict[str, Any] = {"linewidth": 1.5, "elinewidth": 0.8, "capsize": 2}
    axes.errorbar(x, y, yerr, xerr, markerfacecolor="white", label=LABELS[method], **style, **widths)
    for i, strength in enumerate(by_strength):
        if strength == chosen:
            axes.plot(x[i], y[i], zorder=3, **style)


STYLES = {
    "plain": (plots.BLACK, "*"),
    "input-gradient": (plots.GREEN, "o"),
    "input-hessian": (plots.VERMILLION, "s"),
    "nso": (plots.BLUE, "^"),
    "hessian-trace": (plots.PURPLE, "v"),
}
LABELS = {
    "plain": "plain",
    "input-gradient": "input gradient",
    "input-hessian": "input Hessian",
    "nso": "NSO",
    "hessian-trace": "Hessian trace",
}
HEADERS: tuple[str, ...] = ("method", "clean (%)", "FGSM (%)", "PGD (%)", "cost", "steps", "time (s)")
