"""How curved the training loss of a saved network is: all that `nso_jax.curvature` tells of it."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

from benchmarks.curvature import figures
from benchmarks.kit import plots
from benchmarks.kit.files import RESULTS, UserError
from benchmarks.kit.options import Output, at_least
from benchmarks.tasks import checkpoints

HEADERS: tuple[str, ...] = ("what", "value", "± error", "cost")
_BLUE, _ORANGE = plots.BLUE, plots.ORANGE


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """Measures how curved the training loss of a saved network is.

    Attributes:
        model: Network that the demo saved.
        products: Hessian-vector products for a trace.
        eigenvalues: How many, at either end.
        probes: Probes of the spectral density.
        steps: Products for each of these probes.
    """

    model: Path = RESULTS / "demo-nso.safetensors"
    products: Annotated[int, at_least(4)] = 100
    eigenvalues: Annotated[int, at_least(2)] = 5
    probes: Annotated[int, at_least(2)] = 10
    steps: Annotated[int, at_least(2)] = 64


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Measures everything.

    Raises:
        UserError: There is no such model, or its loss is not finite.
    """
    network, metadata = figures.load(options.model)
    problem = figures.problem(network, metadata)
    h = problem.hessian
    loss = float(jax.jit(h.fun)(h.params, h.batches))
    if not math.isfinite(loss):
        raise UserError(f"{options.model}: the loss of this network is {loss}")
    largest = figures.eigenvalues(problem, "largest", options.eigenvalues, progress)
    smallest = figures.eigenvalues(problem, "smallest", options.eigenvalues, progress)
    return {
        "settings": _settings(options, metadata),
        "weights": figures.num_weights(problem),
        "loss": loss,
        "trace": figures.trace(problem, options.products, progress),
        "largest": figures.without_vectors(largest),
        "smallest": figures.without_vectors(smallest),
        "density": figures.density(
            problem, options.probes, options.steps, float(largest.values[0]), progress
        ),
        "layers": figures.layers(problem, options.eigenvalues, progress),
        "noise": figures.noise(problem, options.products, progress),
        "bound": figures.bound(problem, progress),
        "surface": figures.surface(problem, largest, loss, progress),
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
        f"its error does not exceed. Large eigenvalues: how many are above {100 * figures.OUTLIER:g} % of "
        "the largest one, by the spectral density. Kronecker error: the distance of a Kronecker product from "
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


def _settings(options: Options, metadata: checkpoints.Metadata) -> dict[str, Any]:
    return {
        "model": options.model.name,
        "trained": metadata._asdict(),
        "products": options.products,
        "eigenvalues": options.eigenvalues,
        "tolerance": figures.TOLERANCE,
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
