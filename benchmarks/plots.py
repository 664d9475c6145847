"""What the pictures have in common: a colour for each method, bands, bars, and PNG."""

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

# Colours of Okabe and Ito, which colour-blind readers can tell apart; and a dash pattern for print.
_STYLES = {
    "sgd": ("#000000", "-"),
    "adam": ("#000000", "--"),
    "sam": ("#E69F00", "--"),
    "asam": ("#D55E00", "-."),
    "wp-sgd": ("#CC79A7", "-."),
    "nso": ("#0072B2", "-"),
    "nso-relative": ("#0072B2", "--"),
    "nso-micro": ("#56B4E9", "-"),
    "wp-micro": ("#009E73", "--"),
}
_OTHER = ("#999999", ":")
_ORDER = {"-": 2.0, "--": 2.1, "-.": 2.2, ":": 2.3}  # a line with gaps lets the one below be seen
# Those that are followed over a training, where space is short.
FOLLOWED = tuple(name for name in _STYLES if name != "wp-sgd")


def deviation(values: np.ndarray) -> np.ndarray:
    """The standard deviation over the first axis; zero of a single value."""
    return values.std(axis=0, ddof=min(1, len(values) - 1))


def interval(values: np.ndarray) -> np.ndarray:
    """Half the width of the mean's 95 % interval over the first axis, by Student's t; 0 of a single value."""
    count = len(values)
    quantile = scipy.stats.t.ppf(0.975, max(1, count - 1))
    return quantile * deviation(values) / math.sqrt(count)


def colour(name: str) -> str:
    """That of a method."""
    return _STYLES.get(name, _OTHER)[0]


def band(
    axes: Axes,
    name: str,
    x: list[float],
    values: list[list[float]],
    *,
    log: bool = False,
    spread: Callable[[np.ndarray], np.ndarray] = deviation,
) -> None:
    """The mean over the first axis of `values`, geometric for a logarithmic axis, and what is around it."""
    # An estimate from few products can be negative, where a logarithm has none.
    scaled = np.log(np.maximum(values, 1e-3)) if log else np.asarray(values)
    mean, width = scaled.mean(axis=0), spread(scaled)
    low, middle, high = (np.exp(y) if log else y for y in (mean - width, mean, mean + width))
    colour, dashes = _STYLES.get(name, _OTHER)
    axes.plot(x, middle, color=colour, linestyle=dashes, linewidth=2, label=name, zorder=_ORDER[dashes])
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def label_log_axis(axis: Axis) -> None:
    """Labels 1, 2, 5, 10 and so on, in full; side by side over many decades only the tens have room."""
    low, high = axis.axes.get_xlim() if isinstance(axis, XAxis) else (1, 1)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def bars(axes: Axes, ratios: Mapping[Any, dict[str, float]], spec: str, **style: Any) -> None:
    """A horizontal bar up to each median, labelled with it, with a line from quartile to quartile."""
    medians = [ratio["median"] for ratio in ratios.values()]
    below = [ratio["median"] - ratio["low"] for ratio in ratios.values()]
    above = [ratio["high"] - ratio["median"] for ratio in ratios.values()]
    drawn = axes.barh(list(ratios), medians, xerr=np.array([below, above]), **style)
    axes.bar_label(drawn, [f"{median:{spec}}" for median in medians], padding=3, fontsize="small")


def finish(figure: Figure, labelled: Axes | None = None) -> bytes:
    """The picture as PNG, in the style of all: light axes, and the legend of one of them, if any, below."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    if labelled:
        handles, names = labelled.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, pil_kwargs={"optimize": True})
    return buffer.getvalue()
