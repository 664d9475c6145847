"""A low-rank matrix from few measurements: gradient descent fits them, weight noise finds the matrix."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress

import nso_jax
from benchmarks.kit import plots, tables
from benchmarks.kit.options import Count, Output

# The paper's problem: Zhang, Li and Ju, Noise Stability Optimization, arXiv 2306.08553.
SIZE, RANK, NUM_MEASUREMENTS = 100, 5, 2500
SIGMA = 0.08
NUM_POINTS = 50  # at which a run is measured

Gradient = Callable[[jax.Array, jax.Array, Any], jax.Array]
FIGURES = {"training": "training error", "validation": "validation error", "distance": "distance"}
SHOWN = ("validation", "distance")  # in the table, which has to fit a terminal


class Method(NamedTuple):
    """A way to descend.

    Attributes:
        learning_rate: Of all steps.
        num_steps: How many there are.
        gradient: `gradient(key, factor, problem)`, of `loss`.
        style: Colour and dashes.
    """

    learning_rate: float
    num_steps: int
    gradient: Gradient
    style: tuple[str, str]


class Problem(NamedTuple):
    """Measurements of a matrix of low rank.

    A symmetric matrix is its 5,050 entries on and above the diagonal, and a measurement its inner product
    with another, whose entries above the diagonal are doubled.

    Attributes:
        truth: The matrix.
        train: Measuring matrices, as rows, to fit.
        validation: As many others.
    """

    truth: jax.Array
    train: jax.Array
    validation: jax.Array


HEADERS: tuple[str, ...] = ("method", "rate", "steps", *(FIGURES[key] for key in SHOWN), "seconds")


MethodName = Literal["gd", "one-sided", "two-sided", "two-sided, slow"]


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """Looks for a matrix of low rank by few measurements of it.

    Attributes:
        methods: What to compare.
        seeds: Problems, each solved by all methods.
    """

    methods: tuple[MethodName, ...] = get_args(MethodName)
    seeds: Count = 5


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Solves all problems by all methods."""
    names: list[str] = list(dict.fromkeys(options.methods))
    total = options.seeds * sum(METHODS[name].num_steps for name in names)
    task = progress.add_task("steps", total=total)
    runs = []
    for seed in range(options.seeds):
        problem_key, start_key, noise_key = jax.random.split(jax.random.key(seed), 3)
        problem = make_problem(problem_key)
        start = jax.random.normal(start_key, (SIZE, SIZE))
        for name in names:
            begin = time.perf_counter()
            curve = descend(
                METHODS[name], problem, start, noise_key, functools.partial(progress.advance, task)
            )
            seconds = time.perf_counter() - begin
            runs.append({"method": name, "seed": seed, "seconds": seconds, "curve": curve})
            last = ", ".join(f"{title} {curve[-1][key]:.3g}" for key, title in FIGURES.items())
            progress.console.print(
                f"{name}, seed {seed}: {last}, {seconds:.0f} s", highlight=False, soft_wrap=True
            )
    return {"settings": _settings(options.seeds, names), "runs": runs}


def make_problem(key: jax.Array) -> Problem:
    """A product U U^T of normal factors, and normal measuring matrices, made symmetric."""
    truth_key, *keys = jax.random.split(key, 3)
    factor = jax.random.normal(truth_key, (SIZE, RANK))
    rows, columns = np.triu_indices(SIZE)
    # Above the diagonal a symmetric mean of two has variance 1/2, and counts twice.
    deviations = jnp.where(rows == columns, 1.0, math.sqrt(2.0))
    draws = [jax.random.normal(k, (NUM_MEASUREMENTS, len(rows))) * deviations.reshape(1, -1) for k in keys]
    return Problem(_entries(factor), *draws)


def descend(
    method: Method, problem: Problem, start: jax.Array, key: jax.Array, advance: Callable[[int], None]
) -> list[dict[str, float]]:
    """The errors on the way, at even distances, from the start on.

    Args:
        method: The method.
        problem: What is to be found.
        start: The factor to start from.
        key: For the noise; step i uses it folded with i.
        advance: Called with the number of steps since the last call.
    """
    every = max(1, method.num_steps // NUM_POINTS)
    factor, curve = start, [_errors(problem, start) | {"step": 0}]
    for first in range(0, method.num_steps, every):
        count = min(every, method.num_steps - first)
        factor = _steps(method.learning_rate, method.gradient, problem, factor, key, first, count)
        curve.append(_errors(problem, factor) | {"step": first + count})
        advance(count)
    return curve


def loss(factor: jax.Array, problem: Problem) -> jax.Array:
    """A quarter of the mean squared error, whose gradient is the mean of residual times A_i U."""
    residual = problem.train @ (_entries(factor) - problem.truth)
    return jnp.mean(residual**2) / 4


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each method, with means and standard deviations over the seeds."""
    return [_row(name, results) for name in results["settings"]["methods"]]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    return (
        f"Mean ± standard deviation over {settings['seeds']} seeds, after the last step: of the matrix, of "
        f"size {settings['size']} and rank {settings['rank']}, of {settings['num_measurements']:,} normal "
        "measurements of it to fit and as many for validation, of the start, a normal square factor, and of "
        f"the noise, of standard deviation {settings['sigma']:g}. Errors: mean square over that of the "
        "measurements. Distance: Frobenius norm of the difference over that of the matrix. Full gradients; "
        "gd and one-sided take one in a step, two-sided two. Rate: the learning rate. "
        f"On {machine['cpu_count']} CPU cores ({machine['device']})."
    )


def plot(results: dict[str, Any]) -> bytes:
    """The errors over the steps, a panel each, means with a band of a standard deviation, as PNG."""
    titles = {"training": "Fitted measurements", "validation": "Other measurements"}
    figure = Figure(figsize=(plots.WIDTH, 4), layout="constrained")
    panels = figure.subplots(1, len(titles))
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for name in results["settings"]["methods"]:
            curves = [run["curve"][1:] for run in results["runs"] if run["method"] == name]
            logs = np.log([[point[key] for point in curve] for curve in curves])
            mean, deviation = logs.mean(axis=0), plots.deviation(logs)
            steps = [point["step"] for point in curves[0]]
            colour, dashes = METHODS[name].style
            panel.plot(steps, np.exp(mean), dashes, color=colour, linewidth=2, label=LABELS[name])
            low, high = np.exp(mean - deviation), np.exp(mean + deviation)
            panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set(title=title, xlabel="steps (log scale)", xscale="log", yscale="log")
    seeds = results["settings"]["seeds"]
    figure.suptitle(f"Errors: mean ± standard deviation, {seeds} seeds", fontsize="large")
    panels[0].set_ylabel("relative square error (log scale)")
    return plots.finish(figure, panels[0], columns=2)


def _entries(factor: jax.Array) -> jax.Array:
    """Those of the product U U^T, on and above the diagonal."""
    return (factor @ factor.T)[np.triu_indices(SIZE)]


@functools.partial(jax.jit, static_argnames=("gradient", "count"))
def _steps(  # noqa: PLR0917  # as jit wants them
    learning_rate: float,
    gradient: Gradient,
    problem: Problem,
    factor: jax.Array,
    key: jax.Array,
    first: int,
    count: int,
) -> jax.Array:
    def step(factor: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return factor - learning_rate * gradient(jax.random.fold_in(key, i), factor, problem), None

    return jax.lax.scan(step, factor, first + jnp.arange(count))[0]


@jax.jit
def _relative_errors(problem: Problem, factor: jax.Array) -> dict[str, jax.Array]:
    found = _entries(factor)

    def error(measuring: jax.Array) -> jax.Array:
        true = measuring @ problem.truth
        return jnp.mean((measuring @ found - true) ** 2) / jnp.mean(true**2)

    twice = jnp.where(np.equal(*np.triu_indices(SIZE)), 1.0, 2.0)
    norms = (jnp.sqrt(jnp.sum(twice * x**2)) for x in (found - problem.truth, problem.truth))
    return {
        "training": error(problem.train),
        "validation": error(problem.validation),
        "distance": jnp.divide(*norms),
    }


def _errors(problem: Problem, factor: jax.Array) -> dict[str, float]:
    return {key: float(value) for key, value in _relative_errors(problem, factor).items()}


def _settings(seeds: int, names: list[str]) -> dict[str, Any]:
    problem = {"size": SIZE, "rank": RANK, "num_measurements": NUM_MEASUREMENTS, "sigma": SIGMA}
    methods = {
        name: {"learning_rate": METHODS[name].learning_rate, "steps": METHODS[name].num_steps}
        for name in names
    }
    return {"seeds": seeds, **problem, "methods": methods}


def _row(name: str, results: dict[str, Any]) -> list[str]:
    runs = [run for run in results["runs"] if run["method"] == name]
    settings = results["settings"]["methods"][name]
    return [
        name,
        f"{settings['learning_rate']:g}",
        f"{settings['steps']:,}",
        *(tables.formatted_spread([run["curve"][-1][key] for run in runs], ".2g", ".1g") for key in SHOWN),
        tables.number(statistics.mean(run["seconds"] for run in runs)),
    ]


def _plain(_: jax.Array, factor: jax.Array, problem: Problem) -> jax.Array:
    return jax.grad(loss)(factor, problem)


def _one_sided(key: jax.Array, factor: jax.Array, problem: Problem) -> jax.Array:
    return nso_jax.value_and_grad(loss, sigma=SIGMA, antithetic=False)(key, factor, problem)[1]


def _two_sided(key: jax.Array, factor: jax.Array, problem: Problem) -> jax.Array:
    return nso_jax.value_and_grad(loss, sigma=SIGMA)(key, factor, problem)[1]


METHODS = {
    "gd": Method(0.0025, 5000, _plain, (plots.BLACK, "-")),
    "one-sided": Method(0.0025, 5000, _one_sided, (plots.PURPLE, "-.")),
    "two-sided": Method(0.0025, 5000, _two_sided, (plots.BLUE, "-")),
    "two-sided, slow": Method(0.001, 20_000, _two_sided, (plots.SKY, "--")),
}
LABELS = {
    "gd": "gradient descent",
    "one-sided": "one-sided noise",
    "two-sided": "two-sided noise",
    "two-sided, slow": "two-sided, smaller rate",
}
