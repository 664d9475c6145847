"""What each choice in noise stability optimization is worth: one changed at a time, at equal gradients."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from rich.progress import Progress

from benchmarks.kit import plots, tables
from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Count
from benchmarks.quality import comparison, comparison_table, images
from benchmarks.quality.comparison import Knobs, Problem
from benchmarks.tasks import augmentation
from benchmarks.training import loop, measuring, methods
from benchmarks.training.methods import METHODS, Method
from nso_jax import noise

SIGMA, SCALE = 0.02, 0.2  # of one noise for all weights, and of noise relative to the weights
STRONG_DECAY = 2e-2
DRAWS = 48  # of the gradient, for its variance
SHOWN = 12  # points of accuracy below the best that a picture has room for

Choice = Literal[
    "sigma",
    "k",
    "relative-noise",
    "microbatches",
    "one-sided-microbatches",
    "sampler",
    "sides",
    "clean-weight",
    "schedule",
    "weight-decay",
    "augmentation",
]

HEADINGS: dict[str, str] = {
    "sigma": "sigma",
    "k": "draws k",
    "relative-noise": "noise over weight",
    "microbatches": "microbatches",
    "one-sided-microbatches": "the same, one-sided",
    "sampler": "sampler",
    "sides": "sides",
    "clean-weight": "clean_weight",
    "schedule": "schedule of sigma",
    "weight-decay": "weight decay",
    "augmentation": "augmentation",
}
AMOUNTS: tuple[Choice, ...] = ("sigma", "relative-noise", "k", "microbatches", "one-sided-microbatches")


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

    choice: Choice
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
        choices: What to vary.
        rate: The learning rate.
        weight_decay: Where it is not what is varied.
    """

    choices: tuple[Choice, ...] = get_args(Choice)
    gradients: Count = 240
    points: Count = 1
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
        Variant("relative-noise", f"{scale:g}", relative(), scale) for scale in (0.05, 0.1, 0.2, 0.4, 0.8)
    ]
    made += [Variant("microbatches", str(m), relative(num_microbatches=m), SCALE) for m in (1, 2, 4, 8, 16)]
    made += [
        Variant("one-sided-microbatches", str(m), relative(num_microbatches=m, antithetic=False), SCALE)
        for m in (1, 4, 16)
    ]
    samplers = ("normal", "rademacher", "uniform", "laplace", "centered_binomial")
    made += [Variant("sampler", name, methods.nso(sampler=getattr(noise, name)), SIGMA) for name in samplers]
    made += [
        Variant("sides", name, methods.nso(antithetic=both, num_samples=k), SIGMA)
        for name, both, k in (("two", True, 1), ("one", False, 1), ("one, k = 2", False, 2))
    ]
    made += [
        Variant("clean-weight", f"{weight:g}", methods.nso(clean_weight=weight), SIGMA)
        for weight in (0.0, 0.25, 0.5, 0.75)
    ]
    made += [Variant("schedule", name, one, SIGMA, schedule=name) for name in loop.SCHEDULES]
    made += [
        Variant("weight-decay", f"{name}{', decay' * decays}", method, SIGMA, decays=decays)
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
    """Trains all variants from all seeds."""
    journal = Journal(options.work, options.settings(), resume=options.resume)
    made = [variant for variant in variants() if variant.choice in options.choices]
    problems = {
        augment: images.make_problem(dataclasses.replace(options, augment=augment), journal, progress)
        for augment in dict.fromkeys(["none", *(variant.augment for variant in made)])
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
    return {
        "settings": options.settings(),
        "data": problems["none"].sizes(),
        "variants": [
            _told(variant, problems["none"], journal)
            for variant in progress.track(made, description="noise in gradients")
        ],
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
    """Accuracy and trace for each amount of noise: how large, in how many draws and parts; as PNG."""
    return _picture(results, AMOUNTS, "How much noise, and in how many draws")


def plot_forms(results: dict[str, Any]) -> bytes:
    """Accuracy and trace for each form of noise, and what goes with it, as PNG."""
    forms = [choice for choice in get_args(Choice) if choice not in AMOUNTS]
    return _picture(results, forms, "Which form of noise, and with what")


def _picture(results: dict[str, Any], choices: Sequence[str], title: str) -> bytes:
    """A row for each variant of some choices, under the choice, with its 95 % interval; empty without any."""
    told = [variant for variant in results["variants"] if variant["choice"] in choices]
    if not told:
        return b""
    lines: list[str | dict[str, Any]] = []
    for choice, variants in itertools.groupby(told, key=lambda variant: variant["choice"]):
        lines += [choice, *variants]
    figure = Figure(figsize=(plots.WIDTH, 1.4 + 0.22 * len(lines)), layout="constrained")
    accuracy, trace = figure.subplots(1, 2, sharey=True)
    for axes, of, scale in ((accuracy, "test_accuracy", 100), (trace, "trace", 1)):
        rows = [HEADINGS[line] if isinstance(line, str) else _dot(line, results, of, scale) for line in lines]
        plots.dots(axes, rows, log=of == "trace")
    for label, line in zip(accuracy.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if isinstance(line, str) else "normal")
    # What learns nothing may leave the picture.
    means = [100 * np.mean([run["test_accuracy"] for run in _runs(line, results)]) for line in told]
    best = max(means)
    accuracy.set_xlim(left=max(accuracy.get_xlim()[0], best - SHOWN))
    for line, mean in zip(told, means, strict=True):
        if mean < best - SHOWN:
            accuracy.annotate(
                f"← {mean:.0f} %", (best - SHOWN, lines.index(line)), va="center", fontsize="small"
            )
    accuracy.set(title="Accuracy: right is better", xlabel="test accuracy (%)")
    trace.set(title="Trace: left is flatter", xlabel="Hessian trace (log scale)")
    figure.suptitle(
        f"{title}\nmean and 95 % interval, {results['settings']['seeds']} seeds", fontsize="large"
    )
    return plots.finish(figure)


def _dot(variant: dict[str, Any], results: dict[str, Any], of: str, scale: float) -> plots.Row:
    plain = variant["value"].startswith("sgd")
    values = [scale * run[of] for run in _runs(variant, results)]
    name, comma, rest = variant["value"].partition(", ")
    return plots.Row(plots.title(name) + comma + rest, values, plots.colour("sgd" if plain else "nso"))


def _told(variant: Variant, problem: Problem, journal: Journal) -> dict[str, Any]:
    noise_of = functools.partial(_noise_in_gradient, problem, variant.method, variant.strength)
    return {
        "choice": variant.choice,
        "value": variant.value,
        "strength": variant.strength,
        "gradients_per_step": variant.method.gradients_per_step,
        **journal.once(f"noise of {variant.choice} {variant.value}", noise_of),
    }


@functools.cache  # many variants have the same noise
def _noise_in_gradient(problem: Problem, method: Method, strength: float) -> dict[str, float]:
    """The variance of the step over draws of the noise, summed over the weights, over its mean's square."""
    task = problem.task
    batch = next(task.batches(0, 0))
    graphdef, state = nnx.split(task.model(0))
    update = method.update(task.loss)

    @jax.jit
    def step(key: jax.Array) -> jax.Array:
        before, after = (nnx.merge(graphdef, state, copy=True) for _ in range(2))
        optimizer = nnx.Optimizer(after, optax.sgd(1.0), wrt=nnx.Param)
        update(after, optimizer, key, jnp.float32(strength), batch)
        weights, moved = (ravel_pytree(nnx.state(model, nnx.Param))[0] for model in (before, after))
        return moved - weights

    steps = np.stack([step(key) for key in jax.random.split(jax.random.key(0), DRAWS)])
    return {"noise": float(steps.var(axis=0, ddof=1).sum() / np.square(steps.mean(axis=0)).sum())}


def _row(variant: dict[str, Any], results: dict[str, Any]) -> list[str]:
    runs = _runs(variant, results)
    return [
        variant["choice"],
        variant["value"],
        f"{results['settings']['gradients'] // variant['gradients_per_step']}",
        tables.number(variant["noise"]),
        *comparison_table.cells(runs),
    ]


def _runs(variant: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        run
        for run in results["runs"]
        if (run["choice"], run["value"]) == (variant["choice"], variant["value"])
    ]
