"""What the pictures have in common: a name and colour for each method, bands, bars, whiskers, and PNG."""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from PIL import Image

WIDTH = 6.4  # inches: then text of 10 points can be read where a page shows the picture 700 pixels wide
BLUE, SKY, ORANGE, VERMILLION, GREEN, PURPLE, BLACK, GREY = (
    "#0072B2",
    "#56B4E9",
    "#E69F00",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#707070",
)
# Colours of Okabe and Ito, which colour-blind readers can tell apart; and a dash pattern for print.
_STYLES = {
    "sgd": (BLACK, "-"),
    "adam": (BLACK, "--"),
    "sam": (ORANGE, "--"),
    "usam": (ORANGE, ":"),
    "rsam": (VERMILLION, ":"),
    "bsam": (ORANGE, "-."),
    "asam": (VERMILLION, "-."),
    "wp-sgd": (PURPLE, "-."),
    "nso": (BLUE, "-"),
    "nso-relative": (BLUE, "--"),
    "nso-micro": (SKY, "-"),
    "wp-relative": (GREEN, "-."),
    "wp-micro": (GREEN, "--"),
    "wp-adaptive": (GREEN, "-"),
    "lpf-sgd": (GREEN, ":"),
    "mrwp": (PURPLE, ":"),
    "marwp": (PURPLE, "--"),
    "ivon": (VERMILLION, "--"),
}
_OTHER = (GREY, ":")
_NAMES = {
    "adam": "Adam",
    "label-smoothing": "label smoothing",
    "confidence": "confidence penalty",
    "jacobian": "Jacobian",
    "mrwp": "m-RWP",
    "marwp": "m-ARWP",
    "nso-relative": "NSO-relative",
    "nso-micro": "NSO-micro",
    "wp-relative": "WP-relative",
    "wp-micro": "WP-micro",
    "wp-adaptive": "WP-adaptive",
}
_ACRONYMS = {
    *("sgd", "swa", "sam", "usam", "asam", "rsam", "bsam", "ivon", "wp-sgd", "lpf-sgd", "nso"),
    *("seht", "seht-d"),
}
_ORDER = {"-": 2.0, "--": 2.1, "-.": 2.2, ":": 2.3}  # a line with gaps lets the one below be seen
# Those that are followed over a training, where space is short.
FOLLOWED = ("sgd", "adam", "sam", "asam", "nso", "nso-relative", "nso-micro", "wp-micro")


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
    return style(name)[0]


def style(name: str) -> tuple[str, str]:
    """A method's colour and its dashes."""
    return _STYLES.get(name, _OTHER)


def title(name: str) -> str:
    """What a method is called in all pictures: `NSO-relative` for `nso-relative`."""
    return name.upper() if name in _ACRONYMS else _NAMES.get(name, name)


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
    colour, dashes = style(name)
    axes.plot(
        x, middle, color=colour, linestyle=dashes, linewidth=2, label=title(name), zorder=_ORDER[dashes]
    )
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def label_log_axis(axis: Axis) -> None:
    """Labels 1, 2, 5, 10 and so on, in full; side by side over many decades only the tens have room."""
    low, high = axis.axes.get_xlim() if isinstance(axis, XAxis) else (1, 1)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_powers_of_two(axes: Axes) -> None:
    """Makes both axes logarithmic, with a label at each power of two."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())


def bars(axes: Axes, ratios: Mapping[Any, dict[str, float]], spec: str, **style: Any) -> None:
    """A horizontal bar up to each median, labelled with it, with a line from quartile to quartile."""
    medians = [ratio["median"] for ratio in ratios.values()]
    below = [ratio["median"] - ratio["low"] for ratio in ratios.values()]
    above = [ratio["high"] - ratio["median"] for ratio in ratios.values()]
    drawn = axes.barh(list(ratios), medians, xerr=np.array([below, above]), **style)
    axes.bar_label(drawn, [f"{median:{spec}}" for median in medians], padding=3, fontsize="small")


class Row(NamedTuple):
    """A line of a picture of dots.

    Attributes:
        label: What stands before it.
        values: Of each seed.
        colour: That of its dot.
    """

    label: str
    values: Sequence[float]
    colour: str


def dots(
    axes: Axes,
    rows: Iterable[Row | str],
    *,
    log: bool = False,
    spread: Callable[[np.ndarray], np.ndarray] = interval,
) -> None:
    """A dot at each row's mean, with a whisker on either side, from the top down; a text heads other rows."""
    labels, lowest = [], math.inf
    for y, row in enumerate(rows):
        labels.append(row if isinstance(row, str) else row.label)
        if isinstance(row, str):
            continue
        # An estimate from few products can be negative, where a logarithm has none.
        values = np.maximum(row.values, 1e-3) if log else np.array(row.values)
        mean, width = values.mean(), spread(values)
        # Where a whisker reaches zero, which a logarithmic axis has not, it ends at the picture's edge.
        below = mean - max(mean - width, values.min() / 4) if log else width
        lowest = min(lowest, max(mean - below, values.min() / 2) if log else mean - below)
        axes.errorbar(
            mean, y, xerr=[[below], [width]], color=row.colour, marker="o", markersize=5, capsize=2.5
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    if log:
        axes.set_xscale("log")
        if math.isfinite(lowest):
            axes.set_xlim(left=lowest / 1.2)
        left, right = axes.get_xlim()
        # As many labels as half of a picture has room for.
        subs = (1, 3) if right / left > 30 else (1, 2, 5) if right / left > 4 else (1, 1.5, 2, 3, 4, 5, 7)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def finish(figure: Figure, labelled: Axes | None = None, *, columns: int = 4) -> bytes:
    """The picture as PNG, in the style of all: light axes, and the legend of one of them, if any, below."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    # Matplotlib fills columns; these are to be read line by line.
    if told := list(zip(*labelled.get_legend_handles_labels(), strict=True)) if labelled else []:
        columns = min(columns, len(told))
        told = [each for column in range(columns) for each in told[column::columns]]
        handles, names = zip(*told, strict=True)
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    if layout := figure.get_layout_engine():
        layout.set(w_pad=0.1, h_pad=0.1)  # type: ignore[call-arg]  # inches: a margin on a dark page
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=200)
    # 256 colours are all that lines and areas need, at a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(256).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
