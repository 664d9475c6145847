"""How curved the training loss of a saved network is: all that `nso_jax.curvature` tells of it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

from benchmarks.kit import options, plots
from benchmarks.kit.files import RESULTS, UserError
from benchmarks.tasks import checkpoints, data
from benchmarks.tasks.data import Examples
from nso_jax import curvature
from nso_jax.curvature import Eigenpairs, GaussNewton, LayerStructure

TOLERANCE = 1e-4  # of an eigenvalue's residual, over the largest eigenvalue
NUM_SAMPLES = 64  # draws of weight noise
SIGMAS = np.geomspace(1 / 8, 2, 9)  # over the suggested one, which is among them
BOUND_PROBES = 50
GRID_POINTS = 21  # along each of two directions
OUTLIER = 0.01  # an eigenvalue above this share of the largest one counts as large

HEADERS: tuple[str, ...] = ("what", "value", "± error", "cost")
_BLUE, _ORANGE = plots.BLUE, plots.ORANGE


class Problem(NamedTuple):
    """What is measured.

    Attributes:
        fun: The `GaussNewton` of two jitted functions, the network's outputs and the mean loss.
        loss: The mean loss as one jitted function of the weights and the examples.
        params: The trained weights.
        initial_params: The weights before training.
        examples: What the network was trained on.
    """

    fun: GaussNewton
    loss: Callable[[nnx.State, Examples], jax.Array]
    params: nnx.State
    initial_params: nnx.State
    examples: Examples


@dataclasses.dataclass(frozen=True)
class Options(options.Output):
    """Measures how curved the training loss of a saved network is.

    Attributes:
        model: Network that the demo saved.
        products: Hessian-vector products for a trace.
        eigenvalues: How many, at either end.
        probes: Probes of the spectral density.
        steps: Products for each of these probes.
    """

    model: Path = RESULTS / "demo-nso.safetensors"
    products: Annotated[int, options.at_least(4)] = 100
    eigenvalues: Annotated[int, options.at_least(2)] = 5
    probes: Annotated[int, options.at_least(2)] = 10
    steps: Annotated[int, options.at_least(2)] = 64


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Measures everything.

    Args:
        options: The settings.
        progress: Where to show how far it is.

    Returns:
        All figures, ready for JSON.

    Raises:
        UserError: There is no such model, or its loss is not finite.
    """
    network, metadata = _load(options.model)
    problem = _problem(network, metadata)
    loss = float(problem.loss(problem.params, problem.examples))
    if not math.isfinite(loss):
        raise UserError(f"{options.model}: the loss of this network is {loss}")
    largest = _eigenvalues(problem, "largest", options.eigenvalues, progress)
    smallest = _eigenvalues(problem, "smallest", options.eigenvalues, progress)
    return {
        "settings": _settings(options, metadata),
        "weights": _num_weights(problem),
        "loss": loss,
        "trace": _trace(problem, options.products, progress),
        "largest": _without_vectors(largest),
        "smallest": _without_vectors(smallest),
        "density": _density(problem, options, float(largest.values[0]), progress),
        "layers": _layers(problem, options.eigenvalues, progress),
        "noise": _noise(problem, options.products, progress),
        "bound": _bound(problem, progress),
        "surface": _surface(problem, largest, loss, progress),
    }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each figure: what it is, its value, its error and what it took."""
    large, products = results["density"]["large"], f"{results['density']['num_products']} products"
    return [
        _row("training loss", results["loss"], cost="1 evaluation"),
        *_trace_rows(results["trace"]),
        *_eigenvalue_rows("largest", results["largest"]),
        _eigenvalue_rows("smallest", results["smallest"])[0],
        _row("large eigenvalues", large["value"], large["standard_error"], products),
        *_layer_rows(results["layers"]),
        *_noise_rows(results["noise"]),
        *_bound_rows(results["bound"]),
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    trained, k = results["settings"]["trained"], results["settings"]["eigenvalues"]
    return (
        f"A {trained['network']} of {results['weights']:,} weights after {trained['steps']:,} steps of "
        f"{trained['method']} on {trained['num_train']} digits, {100 * trained['wrong_labels']:.0f} % of "
        f"them with a wrong label (seed {trained['seed']}): its mean loss over these digits, in evaluation "
        "mode, and the Hessian of that. ± error: a standard error; for an eigenvalue, the residual, which "
        f"its error does not exceed. Large eigenvalues: how many are above {100 * OUTLIER:g} % of the "
        "largest one, by the spectral density. Kronecker error: the distance of a Kronecker product from "
        "the layer's block of the Gauss-Newton matrix, over the block's norm; overlap: that of their top "
        f"{k} eigenvectors, from 0 to 1. Suggested sigma: of normal noise in the weights, with which the "
        "loss rises by a fifth or, before that, no longer with its square; what the trace predicts differs, "
        "for it knows nothing of the kinks of ReLU and max-pooling. "
        "PAC-Bayes bound: the main term of one on the generalization gap, without "
        "constants, to compare networks by. Its loss and trace are the largest of an example, its distance "
        "is that from the initial weights."
    )


def plot(results: dict[str, Any]) -> bytes:
    """The spectrum, the loss along two eigenvectors, what noise adds to it, and the layers' traces."""
    figure = Figure(figsize=(7.2, 7), layout="constrained")
    (spectrum, surface), (rise, layers) = figure.subplots(2, 2)
    _plot_spectrum(spectrum, results)
    _plot_surface(surface, results["surface"])
    _plot_rise(rise, results["noise"])
    _plot_layers(layers, results["trace"])
    return plots.finish(figure)


def _load(path: Path) -> tuple[nnx.Module, checkpoints.Metadata]:
    if not path.exists():
        raise UserError(f"no network in {path}: `python -m benchmarks demo` saves some in runs/demo")
    return checkpoints.load(path)


def _problem(network: nnx.Module, metadata: checkpoints.Metadata) -> Problem:
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)  # type: ignore[misc]  # flax types it so

    @jax.jit
    def logits(params: nnx.State, examples: Examples) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(examples.inputs)

    @jax.jit
    def loss(logits: jax.Array, examples: Examples) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels).mean()

    fun = GaussNewton(logits, loss)
    initial_params = nnx.state(checkpoints.initial(metadata), nnx.Param)
    train = data.digits(metadata.seed, metadata.num_train, metadata.wrong_labels).train
    return Problem(fun, jax.jit(fun.__call__), params, initial_params, train)


class _Task:
    """A bar of the display, called with how much is done: how much there is may turn out only at the end."""

    def __init__(self, progress: Progress, title: str, total: int | None = None) -> None:
        self.done = 0
        self._progress, self._id = progress, progress.add_task(title, total=total)

    def __call__(self, done: int) -> None:
        self.done = done
        self._progress.update(self._id, completed=done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.update(self._id, total=self.done)


def _trace(problem: Problem, products: int, progress: Progress) -> dict[str, Any]:
    """The trace, and each layer's share of it."""
    with _Task(progress, "trace", products) as task:
        trace = curvature.trace(
            jax.random.key(0),
            problem.loss,
            problem.params,
            problem.examples,
            num_products=products,
            param_labels=_layer_names,
            callback=task,
        )
    errors = trace.per_leaf_standard_error
    layers = {name: _measured(share, errors[name]) for name, share in trace.per_leaf.items()}
    return _measured(trace.value, trace.standard_error, num_products=trace.num_products, layers=layers)


def _layer_names(params: nnx.State) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[0].key, params)


def _eigenvalues(problem: Problem, which: str, k: int, progress: Progress) -> Eigenpairs:
    with _Task(progress, f"{which} eigenvalues") as task:
        return curvature.eigenvalues(
            jax.random.key(1),
            problem.loss,
            problem.params,
            problem.examples,
            k=k,
            which=which,
            tol=TOLERANCE,
            callback=task,
        )


def _without_vectors(pairs: Eigenpairs) -> dict[str, Any]:
    return {
        "values": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "num_products": pairs.num_products,
    }


def _density(problem: Problem, options: Options, largest: float, progress: Progress) -> dict[str, Any]:
    """The spectral density, and how many eigenvalues are large by it."""
    with _Task(progress, "spectral density", options.probes * options.steps) as task:
        density = curvature.spectral_density(
            jax.random.key(2),
            problem.loss,
            problem.params,
            problem.examples,
            num_probes=options.probes,
            num_steps=options.steps,
            num_points=500,
            callback=task,
        )
    shares = np.sum(density.weights, axis=1, where=density.nodes > OUTLIER * largest)
    counts = _num_weights(problem) * shares
    error = float(counts.std(ddof=1)) / math.sqrt(len(counts))
    return _listed(density._asdict()) | {"large": _measured(float(counts.mean()), error)}


def _layers(problem: Problem, k: int, progress: Progress) -> dict[str, Any]:
    """The dense layers' blocks of the Gauss-Newton matrix, by the path of their weights."""
    with _Task(progress, "layers") as task:
        structures = curvature.layer_structure(
            jax.random.key(3),
            problem.fun,
            problem.params,
            problem.examples,
            k=k,
            mask=_matrices,
            callback=task,
        )
    names = [name for name, leaf in checkpoints.named(problem.params).items() if leaf.ndim == 2]
    blocks = {name: _block(found) for name, found in zip(names, structures.values(), strict=True)}
    return {"num_products": task.done, "blocks": blocks}


def _matrices(params: nnx.State) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def _block(structure: LayerStructure) -> dict[str, Any]:
    kronecker = structure.kronecker
    assert kronecker, structure.reason  # noqa: S101
    return _without_vectors(structure.eigenpairs) | {
        "kronecker_eigenvalues": kronecker.eigenvalues.tolist(),
        "kronecker_error": _measured(kronecker.error, kronecker.error_standard_error),
        "overlap": kronecker.overlap,
    }


def _noise(problem: Problem, products: int, progress: Progress) -> dict[str, Any]:
    """How much noise the loss bears, and how much it rises with noise of about that size."""
    key, on = jax.random.key(4), (problem.loss, problem.params, problem.examples)
    with _Task(progress, "suggested sigma"):
        found = curvature.suggest_sigma(key, *on, num_samples=NUM_SAMPLES, num_products=products)
    sigmas = (found.sigma * SIGMAS).tolist()
    with _Task(progress, "noise", 1 + 2 * NUM_SAMPLES * len(sigmas)) as task:
        gap = curvature.noise_stability_gap(
            key, *on, sigmas=sigmas, num_samples=NUM_SAMPLES, num_products=products, callback=task
        )
    return {
        "suggested": {
            "sigma": found.sigma,
            "gap": _measured(found.gap, found.standard_error),
            "quadratic": _measured(
                found.sigma**2 / 2 * found.trace.value, found.sigma**2 / 2 * found.trace.standard_error
            ),
            "tried": found.table.sigma.tolist(),
        },
        "num_samples": NUM_SAMPLES,
        "num_evaluations": task.done,
        "trace": _measured(gap.trace.value, gap.trace.standard_error, num_products=gap.trace.num_products),
        **_listed({name: value for name, value in gap._asdict().items() if name not in {"loss", "trace"}}),
    }


def _bound(problem: Problem, progress: Progress) -> dict[str, Any]:
    """A PAC-Bayes bound with all its parts."""
    leaves = len(jax.tree.leaves(problem.params))
    with _Task(progress, "PAC-Bayes bound", BOUND_PROBES * leaves) as task:
        bound = curvature.pac_bayes_bound(
            jax.random.key(5),
            problem.loss,
            problem.params,
            problem.examples,
            initial_params=problem.initial_params,
            num_probes=BOUND_PROBES,
            callback=task,
        )
    parts = {name: checkpoints.named(getattr(bound, name)) for name in ("leaf_traces", "leaf_distances")}
    return bound._asdict() | parts | {"num_derivatives": task.done}


def _surface(problem: Problem, pairs: Eigenpairs, loss: float, progress: Progress) -> dict[str, Any]:
    """The losses on a grid in the plane of the top two eigenvectors.

    Along the first one, a quadratic loss would triple towards the edge.
    """
    edge = 2 * math.sqrt(loss / float(pairs.values[0]))
    distances = np.linspace(-edge, edge, GRID_POINTS)
    directions = pairs.vectors[:2]
    losses = np.empty((GRID_POINTS, GRID_POINTS))
    with _Task(progress, "surface", losses.size) as task:
        for done, (i, j) in enumerate(np.ndindex(losses.shape), start=1):
            steps = distances[i], distances[j]
            losses[i, j] = _loss_beside(problem.loss, problem.params, directions, steps, problem.examples)
            task(done)
    # Eigenvectors have no sign: the steeper side goes to the right, and up.
    if losses[0].mean() > losses[-1].mean():
        losses = losses[::-1]
    if losses[:, 0].mean() > losses[:, -1].mean():
        losses = losses[:, ::-1]
    return {"distances": distances.tolist(), "losses": losses.tolist()}


@functools.partial(jax.jit, static_argnames="loss")
def _loss_beside(
    loss: Callable[[nnx.State, Examples], jax.Array],
    params: nnx.State,
    directions: list[nnx.State],
    steps: tuple[float, float],
    examples: Examples,
) -> jax.Array:
    moved = jax.tree.map(lambda w, u, v: w + steps[0] * u + steps[1] * v, params, *directions)
    return loss(moved, examples)


def _num_weights(problem: Problem) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(problem.params))


def _measured(value: float, error: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "standard_error": error, **more}


def _listed(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in figures.items()}


def _settings(options: Options, metadata: checkpoints.Metadata) -> dict[str, Any]:
    return {
        "model": options.model.name,
        "trained": metadata._asdict(),
        "products": options.products,
        "eigenvalues": options.eigenvalues,
        "tolerance": TOLERANCE,
        "probes": options.probes,
        "steps": options.steps,
    }


def _row(what: str, value: float, error: float | None = None, cost: str = "") -> list[str]:
    return [what, f"{value:.4g}", "" if error is None else f"{error:.2g}", cost]


def _trace_rows(trace: dict[str, Any]) -> list[list[str]]:
    rows = [_row("trace", trace["value"], trace["standard_error"], f"{trace['num_products']} products")]
    for name, share in trace["layers"].items():
        rows.append(_row(f"of {name}", share["value"], share["standard_error"]))
    return rows


def _eigenvalue_rows(name: str, pairs: dict[str, Any]) -> list[list[str]]:
    costs = [f"{pairs['num_products']} products", *[""] * (len(pairs["values"]) - 1)]
    return [
        _row(f"{name} eigenvalue {i}", *figures)
        for i, figures in enumerate(zip(pairs["values"], pairs["residuals"], costs, strict=True), start=1)
    ]


def _layer_rows(layers: dict[str, Any]) -> list[list[str]]:
    rows, cost = [], f"{layers['num_products']} products"
    for name, block in layers["blocks"].items():
        error = block["kronecker_error"]
        rows += [
            _row(f"Kronecker error, {name}", error["value"], error["standard_error"], cost),
            _row(f"Kronecker overlap, {name}", block["overlap"]),
        ]
        cost = ""
    return rows


def _noise_rows(noise: dict[str, Any]) -> list[list[str]]:
    suggested = noise["suggested"]
    gap, quadratic = suggested["gap"], suggested["quadratic"]
    evaluations = 2 * noise["num_samples"] * len(suggested["tried"])
    return [
        _row("suggested sigma", suggested["sigma"], cost=f"{evaluations} evaluations"),
        _row("rise with such noise", gap["value"], gap["standard_error"]),
        _row("as the trace predicts it", quadratic["value"], quadratic["standard_error"]),
    ]


def _bound_rows(bound: dict[str, Any]) -> list[list[str]]:
    return [
        _row("PAC-Bayes bound", bound["value"], cost=f"{bound['num_derivatives']} derivatives"),
        _row("the same, layerwise", bound["layerwise"]),
        _row("its largest loss", bound["max_loss"]),
        _row("its largest trace", bound["max_trace"], bound["max_trace_standard_error"]),
        _row("its distance", bound["distance"]),
    ]


def _plot_spectrum(axes: Axes, results: dict[str, Any]) -> None:
    density, count = results["density"], results["weights"]
    grid, middle, error = (np.array(density[name]) for name in ("grid", "density", "standard_error"))
    # What a single eigenvalue would show at its peak.
    single = 1 / (density["width"] * math.sqrt(2 * math.pi))
    peaks = count * middle
    low, high = (np.maximum(peaks + sign * count * error, single / 1e3) for sign in (-1, 1))
    axes.plot(grid, peaks, color=_BLUE, linewidth=1, label="density ± standard error")
    axes.fill_between(grid, low, high, color=_BLUE, alpha=0.3, linewidth=0)
    axes.plot(
        results["largest"]["values"],
        [0.03] * len(results["largest"]["values"]),
        "|",
        color=_ORANGE,
        markersize=12,
        markeredgewidth=2,
        transform=axes.get_xaxis_transform(),
        label="largest eigenvalues",
    )
    axes.set(title="Spectrum of the Hessian", xlabel="eigenvalue", ylabel="eigenvalues per unit (log scale)")
    axes.set(yscale="log", ylim=(single / 30, 10 * peaks.max()))
    axes.legend(frameon=False, fontsize="small")


def _plot_surface(axes: Axes, surface: dict[str, Any]) -> None:
    distances, losses = np.array(surface["distances"]), np.array(surface["losses"])
    # Evenly spaced lines where the loss is quadratic.
    levels = losses.min() + np.ptp(losses) * np.linspace(0, 1, 11) ** 2
    axes.contourf(distances, distances, losses.T, levels, cmap="Blues")
    lines = axes.contour(distances, distances, losses.T, levels[1:-1], colors="black", linewidths=0.5)
    axes.clabel(lines, levels[1:5], fmt="%.2g", fontsize="small")
    lowest = np.unravel_index(losses.argmin(), losses.shape)
    axes.plot(*distances[list(lowest)], "o", color=_ORANGE, markersize=10, label="minimum")
    axes.plot(0, 0, "+", color="black", markersize=10, markeredgewidth=2, label="the network")
    axes.set(
        title="Training loss around the network",
        xlabel="along the top eigenvector",
        ylabel="along the second one",
    )
    axes.set_aspect("equal")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize="small", frameon=False)


def _plot_rise(axes: Axes, noise: dict[str, Any]) -> None:
    suggested = noise["suggested"]["sigma"]
    axes.plot(noise["sigma"], noise["quadratic"], color="black", linewidth=1, label=r"$\sigma^2/2$ · trace")
    axes.errorbar(
        noise["sigma"],
        noise["gap"],
        yerr=noise["standard_error"],
        fmt="o",
        markersize=3,
        capsize=3,
        color=_BLUE,
        label="measured",
    )
    axes.axvline(suggested, color=_ORANGE, linestyle="--", label=rf"suggested $\sigma$ = {suggested:.2g}")
    axes.set(
        title="Rise of the loss by noise, ± std. error",
        xlabel=r"$\sigma$ of a weight's noise (log scale)",
    )
    axes.set(xscale="log", yscale="log", ylabel="rise (log scale)")
    plots.label_log_axis(axes.xaxis)
    axes.legend(frameon=False, fontsize="small")


def _plot_layers(axes: Axes, trace: dict[str, Any]) -> None:
    shares = trace["layers"].values()
    axes.barh(
        list(trace["layers"]),
        [share["value"] for share in shares],
        xerr=[share["standard_error"] for share in shares],
        color=_BLUE,
        capsize=3,
    )
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.set(title="Share of each layer in the trace", xlabel="trace ± standard error")
