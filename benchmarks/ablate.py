"""What each choice in noise stability optimization is worth: one changed at a time, at equal gradients."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

from benchmarks import arguments, augmentation, comparison, images, measuring, methods, plots, table, training
from benchmarks.comparison import Knobs, Problem
from benchmarks.journal import Journal
from benchmarks.methods import METHODS, Method
from nso_jax import noise

SIGMA, SCALE = 0.02, 0.2  # of one noise for all weights, and of noise relative to the weights
STRONG_DECAY = 2e-2
DRAWS = 48  # of the gradient, for its variance
ACCURACY, TRACE = "#0072B2", "#D55E00"


class Variant(NamedTuple):
    """One way to train.

    Attributes:
        choice: What is varied.
        value: What it is here.
        method: The method.
        strength: Its strength.
        schedule: Of the strength.
        decays: Whether weights decay strongly.
        augment: What is done to images.
    """

    choice: str
    value: str
    method: Method
    strength: float
    schedule: str = "constant"
    decays: bool = False
    augment: augmentation.Name = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(images.Options):
    """Varies noise stability optimization, in fine-tuning on images.

    Attributes:
        rate: The learning rate.
        weight_decay: Where it is not what is varied.
    """

    gradients: arguments.Count = 240
    points: arguments.Count = 1
    rate: float = 0.05
    weight_decay: float = 5e-3
    work: Path = Path("runs/ablate")


HEADERS: tuple[str, ...] = (
    "choice",
    "value",
    "steps",
    "noise in gradient",
    "test accuracy (%)",
    "Hessian trace",
    "largest eigenvalue",
)


def variants() -> list[Variant]:
    """All of them, plain training among those of some choices."""
    one, relative = methods.nso(), functools.partial(methods.nso, relative=True)
    plain = METHODS["sgd"]
    made = [Variant("sigma", f"{sigma:g}", one, sigma) for sigma in (0.005, 0.01, 0.02, 0.04, 0.08)]
    made += [Variant("k", str(k), methods.nso(num_samples=k), SIGMA) for k in (1, 2, 4, 8)]
    made += [
        Variant("relative noise", f"{scale:g}", relative(), scale) for scale in (0.05, 0.1, 0.2, 0.4, 0.8)
    ]
    made += [Variant("microbatches", str(m), relative(num_microbatches=m), SCALE) for m in (1, 2, 4, 8, 16)]
    made += [
        Variant("microbatches, one-sided", str(m), relative(num_microbatches=m, antithetic=False), SCALE)
        for m in (1, 4, 16)
    ]
    samplers = ("normal", "rademacher", "uniform", "laplace", "centered_binomial")
    made += [Variant("sampler", name, methods.nso(sampler=getattr(noise, name)), SIGMA) for name in samplers]
    made += [
        Variant("sides", name, methods.nso(antithetic=both, num_samples=k), SIGMA)
        for name, both, k in (("two", True, 1), ("one", False, 1), ("one, k = 2", False, 2))
    ]
    made += [
        Variant("clean_weight", f"{weight:g}", methods.nso(clean_weight=weight), SIGMA)
        for weight in (0.0, 0.25, 0.5, 0.75)
    ]
    made += [Variant("schedule", name, one, SIGMA, schedule=name) for name in training.SCHEDULES]
    made += [
        Variant("weight decay", f"{name}{', decay' * decays}", method, SIGMA, decays=decays)
        for (name, method), decays in itertools.product((("sgd", plain), ("nso", one)), (False, True))
    ]
    made += [
        Variant("augmentation", f"{name}, {augment}", method, SIGMA, augment=augment)
        for (name, method), augment in itertools.product(
            (("sgd", plain), ("nso", one)), ("none", "cutout", "mixup")
        )
    ]
    return made


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Trains all variants from all seeds.

    Args:
        options: The settings.
        progress: Where to show how far it is.

    Returns:
        All figures, ready for JSON.
    """
    journal = Journal(options.work, options.settings(), resume=options.resume)
    made = variants()
    problems = {
        augment: images.make_problem(dataclasses.replace(options, augment=augment), journal, progress)
        for augment in dict.fromkeys(variant.augment for variant in made)
    }
    gauge = measuring.gauge(measuring.split_network(problems["none"].task.model(0))[0])
    total = len(made) * options.seeds * options.gradients
    advance = functools.partial(progress.advance, progress.add_task("variants", total=total))
    runs = []
    for variant, seed in itertools.product(made, range(options.seeds)):
        problem = problems[variant.augment]
        decay = STRONG_DECAY if variant.decays else options.weight_decay
        settings = Knobs(variant.strength, options.rate, decay).settings(options.gradients, seed)
        settings = dataclasses.replace(settings, schedule=variant.schedule)
        compute = functools.partial(
            comparison.train_and_measure,
            problem,
            variant.method,
            settings,
            options,
            gauge=gauge,
            journal=journal,
            advance=advance,
        )
        title = f"{variant.choice} {variant.value}, seed {seed}"
        if journal.done(title):
            advance(options.gradients)
        figures = journal.once(title, compute, functools.partial(comparison.tell, progress, title))
        runs.append({"choice": variant.choice, "value": variant.value, "seed": seed, **figures})
    told = [
        {
            "choice": variant.choice,
            "value": variant.value,
            "strength": variant.strength,
            "gradients_per_step": variant.method.gradients_per_step,
            "noise": _noise_in_gradient(problems["none"], variant),
        }
        for variant in made
    ]
    sizes = {part: len(examples.labels) for part, examples in problem.split(0)._asdict().items()}
    journal.finish()
    return {
        "settings": options.settings(),
        "data": {"name": problem.name, **sizes},
        "variants": told,
        "runs": runs,
    }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each variant, with means and 95 % intervals over the seeds."""
    return [_row(variant, results) for variant in results["variants"]]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, sizes = results["settings"], results["data"]
    return (
        f"Mean ± 95 % interval over {settings['seeds']} seeds, of fine-tuning as in `images` "
        f"({settings['network']}, {sizes['name']}, {sizes['train']} images to train on, {sizes['test']:,} to "
        f"test on). All trainings take {settings['gradients']} gradients on {settings['batch_size']} images "
        f"each, at a learning rate of {settings['rate']:g}; weight decay {settings['weight_decay']:g}, or "
        f"{STRONG_DECAY:g} where it says decay. Where it is not what is varied, sigma is {SIGMA:g}, k 1, "
        f"noise normal, two-sided and constant; microbatches have noise of {SCALE:g} times each weight. "
        f"Noise in gradient: its variance over {DRAWS} draws for one batch, before training, over its mean's "
        "square."
    )


def plot(results: dict[str, Any]) -> bytes:
    """Accuracy and trace of each variant, a panel for each choice, as PNG."""
    choices = list(dict.fromkeys(variant["choice"] for variant in results["variants"]))
    columns = 5
    figure = Figure(figsize=(2.6 * columns, 2.6 * -(-len(choices) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(choices) // columns), columns, sharey=True).flatten()
    for panel, choice in zip(panels, choices, strict=False):
        _plot_choice(panel, choice, results)
    for panel in panels[len(choices) :]:
        panel.remove()
    return plots.finish(figure)


def _noise_in_gradient(problem: Problem, variant: Variant) -> float:
    """The variance of the step over draws of the noise, summed over the weights, over its mean's square."""
    task = problem.task
    batch = next(task.batches(0, 0))
    graphdef, state = nnx.split(task.model(0))
    update = variant.method.update(task.loss)

    @jax.jit
    def step(key: jax.Array) -> jax.Array:
        before, after = (nnx.merge(graphdef, state, copy=True) for _ in range(2))
        optimizer = nnx.Optimizer(after, optax.sgd(1.0), wrt=nnx.Param)
        update(after, optimizer, key, jnp.float32(variant.strength), batch)
        weights, moved = (ravel_pytree(nnx.state(model, nnx.Param))[0] for model in (before, after))
        return moved - weights

    steps = np.stack([step(key) for key in jax.random.split(jax.random.key(0), DRAWS)])
    return float(steps.var(axis=0, ddof=1).sum() / np.square(steps.mean(axis=0)).sum())


def _row(variant: dict[str, Any], results: dict[str, Any]) -> list[str]:
    runs = _runs(variant, results)
    return [
        variant["choice"],
        variant["value"],
        f"{results['settings']['gradients'] // variant['gradients_per_step']}",
        table.number(variant["noise"]),
        *comparison.cells(runs),
    ]


def _runs(variant: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        run
        for run in results["runs"]
        if (run["choice"], run["value"]) == (variant["choice"], variant["value"])
    ]


def _plot_choice(axes: Axes, choice: str, results: dict[str, Any]) -> None:
    """Test accuracy on the left axis, the trace on the right one, on a log scale."""
    chosen = [variant for variant in results["variants"] if variant["choice"] == choice]
    names = [variant["value"] for variant in chosen]
    accuracies, traces = (
        np.array([[run[figure] for run in _runs(variant, results)] for variant in chosen]).T
        for figure in ("test_accuracy", "trace")
    )
    places = np.arange(len(names))
    mean, width = 100 * accuracies.mean(axis=0), 100 * plots.interval(accuracies)
    axes.errorbar(places, mean, width, color=ACCURACY, marker="o", linewidth=1.5, capsize=2)
    other = axes.twinx()
    mean, width = np.log(traces).mean(axis=0), plots.interval(np.log(traces))
    errors = np.exp([mean, mean + width]) - np.exp([mean - width, mean])
    other.errorbar(
        places, np.exp(mean), errors, color=TRACE, marker="s", linewidth=1, capsize=2, linestyle=":"
    )
    other.set_yscale("log")
    axes.set_xticks(places, names, rotation=30, ha="right", fontsize="small")
    axes.set_title(choice, fontsize="medium")
