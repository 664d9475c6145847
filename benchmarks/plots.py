"""The demo's pictures, from its figures, as PNG."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers can tell apart; and a dash pattern for print.
_STYLES = {
    "sgd": ("#000000", "-"),
    "sam": ("#E69F00", "--"),
    "wp-sgd": ("#CC79A7", "-."),
    "nso": ("#0072B2", "-"),
}


def training(results: dict[str, Any]) -> bytes:
    """Test accuracy and the Hessian's trace over training: means, with a band of a standard deviation."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, trace = figure.subplots(1, 2)
    for name in results["settings"]["methods"]:
        curves = [run["curve"] for run in results["runs"] if run["method"] == name]
        x = [point["gradient_evaluations"] for point in curves[0]]
        _band(accuracy, name, x, [[100 * point["test_accuracy"] for point in curve] for curve in curves])
        _band(trace, name, x, [[point["trace"] for point in curve] for curve in curves], log=True)
    accuracy.set(title="Test accuracy (%)", xlabel="gradient evaluations")
    trace.set(title="Trace of the Hessian of the training loss", xlabel="gradient evaluations", yscale="log")
    return _finish(figure, accuracy)


def surface(results: dict[str, Any]) -> bytes:
    """Losses along two lines through each solution: means, with a band of a standard deviation."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    wanted = (
        ("random", "train", "Training loss,\nrandom direction", "distance / size of each filter"),
        ("random", "test", "Test loss,\nrandom direction", "distance / size of each filter"),
        ("eigenvector", "train", "Training loss,\ntop Hessian eigenvector", "distance"),
    )
    for panel, (direction, part, title, xlabel) in zip(panels, wanted, strict=True):
        for name in results["settings"]["methods"]:
            losses = [run["slices"][direction][part] for run in results["runs"] if run["method"] == name]
            _band(panel, name, results["settings"]["slice_distances"][direction], losses)
        panel.set(title=title, xlabel=xlabel)
        panel.set_ylim(bottom=0)
    return _finish(figure, panels[0])


def _band(axes: Axes, name: str, x: list[float], values: list[list[float]], *, log: bool = False) -> None:
    """The mean over the first axis of `values`, geometric for a logarithmic axis, and what is around it."""
    scaled = np.log(values) if log else np.asarray(values)
    mean, deviation = scaled.mean(axis=0), scaled.std(axis=0, ddof=min(1, len(values) - 1))
    low, middle, high = (np.exp(y) if log else y for y in (mean - deviation, mean, mean + deviation))
    colour, dashes = _STYLES[name]
    axes.plot(x, middle, color=colour, linestyle=dashes, linewidth=2, label=name)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _finish(figure: Figure, labelled: Axes) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    handles, names = labelled.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, pil_kwargs={"optimize": True})
    return buffer.getvalue()
