"""How fast the gradient of the smoothed loss falls, against the rate that theory gives and cannot better."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

import nso_jax
from benchmarks.kit import plots
from benchmarks.kit.options import Count, Output, at_least
from nso_jax import parallel

# C, D and the noise of an example of Zhang, Li and Ju, arXiv 2306.08553, in units that make them 1: the
# largest curvature; the root of the gap between F at the start and its least value; the standard deviation.
LIPSCHITZ, GAP, NOISE = 1.0, 1.0, 1.0
CURVATURES = LIPSCHITZ * 2.0 ** -np.arange(0, 10.25, 0.25)
RATES = 2.0 ** -np.arange(0, 9.25, 0.25) / LIPSCHITZ
MOMENTUM = 0.9
HALVINGS = 4  # of the number of steps
RESAMPLINGS = 1000  # of the seeds
THEORY = -0.5
AVERAGED = {"all": "all iterates", "late": "second half"}


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A function of one weight for each of `CURVATURES`, which all have the gap and an L-Lipschitz gradient.

    Attributes:
        loss: f of each weight.
        start: The weights to start from.
        gradient: That of F(W) = E[f(W + U)], `gradient(weights, sigma)`.
    """

    loss: Callable[[jax.Array], jax.Array]
    start: np.ndarray
    gradient: Callable[[jax.Array, float], jax.Array]


class Method(NamedTuple):
    """A way to descend, with its colour and dashes."""

    antithetic: bool
    momentum: float
    style: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """Measures the rate at which noise stability optimization finds stationary points.

    Attributes:
        seeds: Runs of each method.
        draws: Pairs of perturbations in a step, or single ones; each with an example of its own.
        steps: The most steps of a run.
        sigmas: Standard deviations of the noise in a weight: the first for slopes, all for what pairs gain.
    """

    seeds: Count = 32
    draws: tuple[Count, ...] = (1, 2, 4)
    steps: Annotated[int, at_least(2 ** (HALVINGS + 1))] = 16_384
    sigmas: tuple[float, ...] = (1.0, 3.0)


class Run(NamedTuple):
    """What is descended, how, with which noise and how many draws in a step."""

    problem: str
    method: str
    sigma: float
    draws: int


Worst = dict[Run, dict[str, np.ndarray]]


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Descends by all methods on all problems, and fits the slopes."""
    first, *others = dict.fromkeys(options.sigmas)
    draws = sorted(set(options.draws))
    runs = [
        *itertools.starmap(Run, itertools.product(PROBLEMS, METHODS, [first], draws)),
        *itertools.starmap(Run, itertools.product(PROBLEMS, ("pairs", "one-sided"), others, draws)),
    ]
    task, weights, worst = progress.add_task("runs", total=len(runs)), resamplings(options.seeds), {}
    for each in runs:
        squares = descend(each, options)
        worst[each] = {of: minimax(weights, found) for of, found in squares.items()}
        progress.advance(task)
    return {
        "settings": options.settings() | {"momentum": MOMENTUM, "theory": THEORY},
        "slopes": list(_slopes(worst, first, options.steps)),
        "advantages": list(_advantages(worst)),
        "points": [
            {**each._asdict(), "steps": t, **{of: _interval(found[:, i]) for of, found in values.items()}}
            for each, values in worst.items()
            for i, t in enumerate(checkpoints(options.steps))
        ],
    }


def checkpoints(steps: int) -> list[int]:
    """After how many steps the gradients are measured."""
    return [steps // 2**i for i in range(HALVINGS, -1, -1)]


def descend(run: Run, options: Options) -> dict[str, np.ndarray]:
    """Mean squared gradients of F at the iterates of T steps, and at those of their second half.

    Returns:
        Both by seed, learning rate, curvature and T.
    """
    problem, method = PROBLEMS[run.problem], METHODS[run.method]
    keys = jax.random.split(jax.random.key(0), options.seeds)
    state = _initial(problem, method, options.seeds)
    ends = [checkpoints(options.steps)[0] // 2, *checkpoints(options.steps)]
    totals = [np.zeros((options.seeds, len(RATES), len(CURVATURES)))]
    for first, end in itertools.pairwise([0, *ends]):
        state, total = _steps(problem, method, run.draws, run.sigma, keys, state, first, end)
        totals.append(totals[-1] + np.asarray(total, float))  # between checkpoints in double precision
    _, half, *whole = np.stack(totals, axis=-1).transpose(3, 0, 1, 2)
    late = [(after - before) for before, after in itertools.pairwise([half, *whole])]
    return {
        "all": np.stack(whole, axis=-1) / ends[1:],
        "late": np.stack(late, axis=-1) / np.diff(ends),
    }


def example_loss(problem: Problem, weights: jax.Array, examples: jax.Array) -> jax.Array:
    """f(W) + z . W, summed over the problems and averaged over examples z, whose mean is zero."""
    return jnp.sum(problem.loss(weights)) + jnp.mean(examples @ weights)


def estimate(
    problem: Problem, method: Method, num_draws: int, sigma: Any
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`estimate(key, weights, examples)` of the gradient of F, one draw for each of so many examples."""
    loss = functools.partial(example_loss, problem)
    gradient = nso_jax.value_and_grad(loss, sigma=sigma, antithetic=method.antithetic)
    averaged = parallel.microbatch(gradient, num_draws)
    return lambda key, weights, examples: averaged(key, weights, examples)[1]


def _optimizer(method: Method, rate: Any) -> optax.GradientTransformation:
    """SGD that goes as far with momentum as without."""
    return optax.sgd(rate * (1 - method.momentum), momentum=method.momentum)


def _initial(problem: Problem, method: Method, seeds: int) -> tuple[jax.Array, Any]:
    weights = jnp.broadcast_to(jnp.asarray(problem.start, jnp.float32), (seeds, len(RATES), len(CURVATURES)))
    return weights, _optimizer(method, 0.0).init(weights)


@functools.partial(jax.jit, static_argnames=("problem", "method", "num_draws", "sigma"))
def _steps(  # noqa: PLR0917  # as jit wants them
    problem: Problem,
    method: Method,
    num_draws: int,
    sigma: float,
    keys: jax.Array,
    state: tuple[jax.Array, Any],
    first: Any,
    end: Any,
) -> tuple[tuple[jax.Array, Any], jax.Array]:
    """The state after steps from number `first` to `end`, and the sum of the squared gradients before each.

    The learning rates of a seed see the same noise.
    """
    gradient = estimate(problem, method, num_draws, sigma)
    rates = jnp.asarray(RATES, jnp.float32)[None, :, None]

    def of_seed(key: jax.Array, weights: jax.Array, i: jax.Array) -> jax.Array:
        noise_key, example_key = jax.random.split(jax.random.fold_in(key, i))
        examples = NOISE * jax.random.normal(example_key, (num_draws, len(CURVATURES)))
        return jax.vmap(lambda weights: gradient(noise_key, weights, examples))(weights)

    def step(i: jax.Array, carried: Any) -> Any:
        weights, inner, total = carried
        total += problem.gradient(weights, sigma) ** 2
        gradients = jax.vmap(of_seed, in_axes=(0, 0, None))(keys, weights, i)
        updates, inner = _optimizer(method, rates).update(gradients, inner)
        return optax.apply_updates(weights, updates), inner, total

    weights, inner, total = jax.lax.fori_loop(first, end, step, (*state, jnp.zeros_like(state[0])))
    return (weights, inner), total


def resamplings(seeds: int) -> np.ndarray:
    """Weights of the seeds in means: all alike, and then as often as drawn with replacement."""
    counts = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLINGS)
    return np.concatenate([np.ones((1, seeds)), counts]) / seeds


def minimax(weights: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """The least, over learning rates, of the largest mean, over curvatures, for each set of weights."""
    return np.tensordot(weights, squares, axes=1).max(axis=2).min(axis=1)


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """That of the line of least squares through y over x, along the last axis."""
    centred = x - x.mean()
    return y @ centred / (centred @ centred)


def _slopes(worst: Worst, sigma: float, steps: int) -> Iterator[dict[str, Any]]:
    draws = sorted({run.draws for run in worst})
    x = np.log(np.outer(draws, checkpoints(steps))).ravel()
    for problem, method, of in itertools.product(PROBLEMS, METHODS, AVERAGED):
        values = _by_draws(worst, Run(problem, method, sigma, 0), of, draws)
        found = _interval(slope(x, np.log(values).reshape(len(values), -1)))
        yield {"problem": problem, "method": method, "of": of, **found}


def _advantages(worst: Worst) -> Iterator[dict[str, Any]]:
    """One-sided noise's squared gradients over those of pairs: geometric means over all draws and steps."""
    draws, sigmas = (sorted({getattr(run, name) for run in worst}) for name in ("draws", "sigma"))
    for problem, sigma, of in itertools.product(PROBLEMS, sigmas, AVERAGED):
        one, two = (
            np.log(_by_draws(worst, Run(problem, method, sigma, 0), of, draws))
            for method in ("one-sided", "pairs")
        )
        # Pairs take twice the gradients in a step, so that one-sided noise has twice the steps.
        for equal, difference in (("steps", one - two), ("gradients", one[..., 1:] - two[..., :-1])):
            found = _interval(np.exp(difference.mean(axis=(1, 2))))
            yield {"problem": problem, "sigma": sigma, "of": of, "equal": equal, **found}


def _by_draws(worst: Worst, run: Run, of: str, draws: list[int]) -> np.ndarray:
    """The values of a run for so many draws, by resampling, draws and steps."""
    return np.stack([worst[run._replace(draws=k)][of] for k in draws], axis=1)


def _interval(values: np.ndarray) -> dict[str, float]:
    """A value and its 95 % interval, from the resampled ones behind it."""
    low, high = np.percentile(values[1:], [2.5, 97.5]).tolist()
    return {"value": values[0].item(), "low": low, "high": high}


def bound(num_draws: Any, steps: Any) -> Any:
    """What the mean of pairs on a quadratic cannot exceed at the best learning rate, by the descent lemma.

    F falls by eta (1 - C eta / 2) |grad F|^2 in a step, less C eta^2 noise^2 / 2k, and by D^2 in all.
    """
    values = [
        (GAP**2 / (rate * steps) + LIPSCHITZ * rate * NOISE**2 / (2 * num_draws)) / (1 - LIPSCHITZ * rate / 2)
        for rate in RATES
    ]
    return np.min(values, axis=0)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The slopes for each problem and method, then one-sided noise's squared norms over those of pairs."""
    theory = f"{results['settings']['theory']:g}"
    lines = [
        [problem, method, *_cells(results["slopes"], problem=problem, method=method), theory]
        for problem, method in itertools.product(PROBLEMS, METHODS)
    ]
    sigmas = sorted(dict.fromkeys(results["settings"]["sigmas"]))
    for problem, sigma, equal in itertools.product(PROBLEMS, sigmas, ("steps", "gradients")):
        cells = _cells(results["advantages"], problem=problem, sigma=sigma, equal=equal)
        expected = f"{expected_advantage(sigma, equal):.2f}" if problem == "quadratic" else ""
        lines.append([problem, f"ratio, {sigma:g}, {equal}", *cells, expected])
    return lines


def expected_advantage(sigma: float, equal: str) -> float:
    """The ratio on a quadratic: the rate goes with the root of the variance over the number of steps."""
    variance = (NOISE**2 + (LIPSCHITZ * sigma) ** 2) / NOISE**2
    return math.sqrt(variance / (2 if equal == "gradients" else 1))


def _cells(records: list[dict[str, Any]], **wanted: Any) -> list[str]:
    """The figures of some records with half the width of their intervals."""
    found = [record for record in records if wanted.items() <= record.items()]
    return [f"{each['value']:.3f} ± {(each['high'] - each['low']) / 2:.3f}" for each in found]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    draws, sigmas = (", ".join(f"{x:g}" for x in settings[name]) for name in ("draws", "sigmas"))
    steps = ", ".join(f"{t:,}" for t in checkpoints(settings["steps"]))
    return (
        "Slope of the logarithm of the mean squared norm of F's gradient over that of kT, by least squares, "
        f"± half its 95 % interval over {RESAMPLINGS:,} resamplings of {settings['seeds']} seeds. k: {draws} "
        f"draws in a step. T: {steps} steps. The mean is over the iterates of all T steps or of their second "
        "half. Each figure is of the learning rate that is best for k and T on the curvature that is worst "
        f"for it, of {len(CURVATURES)} curvatures from C/{LIPSCHITZ / CURVATURES[-1]:,.0f} to C and "
        f"{len(RATES)} rates from 1/{1 / RATES[-1]:,.0f}C to 1/C. C = D = 1; noise of deviation 1 in an "
        f"example's gradient, of {settings['sigmas'][0]:g} in a weight; momentum {settings['momentum']:g}. "
        "Ratio: one-sided noise's squared norm over that of pairs, a geometric mean over k and T, with a "
        f"weight's noise of {sigmas}, at equal steps or at equal gradients, where one-sided noise takes "
        f"twice the steps. On {machine['cpu_count']} CPU cores ({machine['device']})."
    )


def plot(results: dict[str, Any]) -> bytes:
    """Mean squared gradients over kT, a panel for each problem, with lines through them, as PNG."""
    figure = Figure(figsize=(plots.WIDTH, 4), layout="constrained")
    panels = figure.subplots(1, len(PROBLEMS), sharey=True)
    for panel, problem in zip(panels, PROBLEMS, strict=True):
        for method in METHODS:
            _plot_points(panel, _points(results, problem, method), method)
        panel.set(title=problem, xlabel="draws times steps, kT (log scale)", xscale="log", yscale="log")
    points = _points(results, "quadratic", "pairs")
    x, y = np.array(sorted((p["draws"] * p["steps"], bound(p["draws"], p["steps"])) for p in points)).T
    panels[0].plot(x, y, ":", color=plots.BLACK, linewidth=1.2, label="upper bound for pairs")
    for panel in panels:
        plots.label_log_axis(panel.xaxis)
        plots.label_log_axis(panel.yaxis)
    panels[0].set_ylabel("squared gradient norm of F (log scale)")
    figure.suptitle("Worst curvature, best learning rate: 95 % intervals, fitted lines", fontsize="large")
    return plots.finish(figure, panels[0], columns=2)


def _points(results: dict[str, Any], problem: str, method: str) -> list[dict[str, Any]]:
    wanted = {"problem": problem, "method": method, "sigma": results["settings"]["sigmas"][0]}
    return [point for point in results["points"] if wanted.items() <= point.items()]


def _plot_points(axes: Axes, points: list[dict[str, Any]], method: str) -> None:
    x = np.array([point["draws"] * point["steps"] for point in points])
    y, low, high = (np.array([point["all"][of] for point in points]) for of in ("value", "low", "high"))
    colour, dashes = METHODS[method].style
    logs = np.log(x), np.log(y)
    fitted = np.exp(logs[1].mean() + slope(*logs) * (logs[0] - logs[0].mean()))
    ends = [np.argmin(x), np.argmax(x)]
    axes.plot(x[ends], fitted[ends], dashes, color=colour, linewidth=1.5, label=method)
    axes.errorbar(x, y, [y - low, high - y], color=colour, linestyle="", marker="o", markersize=3, capsize=2)


_PITCHES = np.sqrt(CURVATURES) / GAP
PROBLEMS = {
    # F is f and a constant, and a pair's noise cancels.
    "quadratic": Problem(
        lambda w: jnp.asarray(CURVATURES / 2, w.dtype) * w**2,
        GAP * np.sqrt(2 / CURVATURES),
        lambda w, _: jnp.asarray(CURVATURES, w.dtype) * w,
    ),
    # Not convex; E[sin(b + u)] = sin(b) exp(-var(u) / 2).
    "cosine": Problem(
        lambda w: GAP**2 * (1 - jnp.cos(jnp.asarray(_PITCHES, w.dtype) * w)),
        np.pi / 2 / _PITCHES,
        lambda w, sigma: (
            jnp.asarray(GAP**2 * _PITCHES * np.exp(-((sigma * _PITCHES) ** 2) / 2), w.dtype)
            * jnp.sin(jnp.asarray(_PITCHES, w.dtype) * w)
        ),
    ),
}
METHODS = {
    "pairs": Method(antithetic=True, momentum=0.0, style=(plots.BLUE, "-")),
    "pairs, momentum": Method(antithetic=True, momentum=MOMENTUM, style=(plots.SKY, "--")),
    "one-sided": Method(antithetic=False, momentum=0.0, style=(plots.PURPLE, "-.")),
}
HEADERS: tuple[str, ...] = ("problem", "method", *AVERAGED.values(), "theory")
