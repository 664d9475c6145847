"""What a trace and the top eigenvalues cost to a given true error: nso_jax, PyHessian, curvlinops."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, get_args

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.progress import Progress

from benchmarks.curvature import libraries, races, trained_networks
from benchmarks.curvature.libraries import (
    CURVLINOPS,
    METHODS,
    OURS,
    PYHESSIAN,
)
from benchmarks.curvature.trained_networks import Case, NetworkName
from benchmarks.kit import plots, timing
from benchmarks.kit.options import Output, OwnCount
from benchmarks.training import methods

TASKS = {"trace": "trace", "eigenvalues": "top 5"}
HEADERS: tuple[str, ...] = (
    "network",
    "task",
    "method",
    "products",
    "seconds",
    "times ours",
    "first call (s)",
)
COLOURS = {OURS: plots.BLUE, CURVLINOPS: plots.ORANGE, PYHESSIAN: plots.PURPLE}
MARKERS = {"xtrace": "o", "hutch++": "s"}


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """Times a trace and the top eigenvalues to a given true error: nso_jax, PyHessian, curvlinops.

    Attributes:
        networks: Whose Hessians to measure.
        seeds: Estimates for each error, instead of 20.
        repetitions: Measurements of each time, instead of 5, or 3 of the ConvNet.
    """

    networks: tuple[NetworkName, ...] = get_args(NetworkName)
    seeds: OwnCount = None
    repetitions: OwnCount = None


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Measures all libraries on each network."""
    results: dict[str, Any] = {"settings": _settings(), "networks": {}}
    for name, case in trained_networks.NETWORKS.items():
        if name in options.networks:
            chosen = case._replace(
                seeds=options.seeds or case.seeds, repetitions=options.repetitions or case.repetitions
            )
            results["networks"][name] = _measure(chosen, progress)
    return results


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each network, task and method: what it takes, and how long."""
    return [
        [network["title"], title, *_cells(record)]
        for network in results["networks"].values()
        for task, title in TASKS.items()
        for record in network[task]
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    versions = [f"{name} {version}" for name, version in settings["rivals"].items() if version]
    counts = {key: _range(results, key) for key in ("seeds", "probes", "repetitions")}
    text = (
        f"Hessians of the mean loss over {settings['examples']:,} digits in {settings['batches']} batches; "
        "the same weights and data for all, "
        f"on {machine['cpu_count']} CPU cores ({machine['device']}); other libraries: "
        f"{', '.join(versions) or 'none'}. Trace: to 1 %, by the fewest products with which the root mean "
        f"square of the relative errors, over {counts['seeds']} seeds, is no larger. Hutchinson's (~) are "
        f"extrapolated: from the deviation of {counts['probes']} single probes, and the time of calls of "
        f"{settings['hutchinson_products']} products. Top 5: eigenvalues at the first tolerance of 1e-1, "
        "1e-2, ... with which none is off by more than 1e-4 of itself, for "
        f"{settings['eigenvalue_seeds']} seeds. Seconds: of whole calls, medians of up to "
        f"{counts['repetitions']} in turns; -: not reached. First call: what compiling adds to it. "
    )
    return (text + " ".join(_defaults_text(network) for network in results["networks"].values())).strip()


def plot(results: dict[str, Any]) -> bytes:
    """The trace's true error against seconds, a panel for each network."""
    networks = list(results["networks"].values())
    figure = Figure(figsize=(max(plots.WIDTH, 3.2 * len(networks)), 4.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(networks)), sharey=True, squeeze=False)[0]
    for panel, network in zip(panels, networks, strict=False):
        for record in network["trace"]:
            _draw(panel, record)
        panel.axhline(100 * races.TRACE_TARGET, color=plots.BLACK, linewidth=0.8)
        panel.set(title=network["title"], xlabel="seconds (log scale)", xscale="log", yscale="log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if axis is panel.yaxis else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    figure.suptitle(
        f"Error of the trace: down and left is better; line: the target, {100 * races.TRACE_TARGET:g} %",
        fontsize="large",
    )
    panels[0].set_ylabel("root mean square error (%, log scale)")
    _label(panels[0], networks)
    return plots.finish(figure, panels[0], columns=3)


def _measure(case: Case, progress: Progress) -> dict[str, Any]:
    stages = 3 + len(races.NUMBERS) + len(races.TOLERANCES) + 2 * case.repetitions
    task = progress.add_task(case.title, total=stages)
    advance = functools.partial(progress.advance, task)
    problem = trained_networks.trained(case)
    measured = {OURS: libraries.ours(problem)} | libraries.rivals(problem)
    reference = trained_networks.reference(problem)
    advance()
    traces = races.trace_records(measured, case, reference, advance)
    eigenvalues = races.eigenvalue_records(measured, case, reference, advance)
    records = {"trace": traces, "eigenvalues": eigenvalues}
    races.add_first_calls(problem, records)
    advance()
    figures = {
        "title": case.title,
        "weights": sum(w.size for w in jax.tree.leaves(problem.params)),
        "seeds": case.seeds,
        "probes": case.probes,
        "repetitions": case.repetitions,
        "reference": reference,
        "ratios": {name: races.compared(name, each) for name, each in records.items()},
        **{name: list(each.values()) for name, each in records.items()},
    }
    if PYHESSIAN in measured:
        figures["pyhessian_defaults"] = races.pyhessian_defaults(problem, reference)
    return figures


def _cells(record: dict[str, Any]) -> list[str]:
    about = "~" if record["extrapolated"] else ""
    method = f"{record['library']}, {METHODS.get(record['method'], record['method'])}"
    if record["seconds"] is None:
        return [method, "-", "-", "-", "-"]
    seconds, times = record["seconds"]["median"], record.get("times_ours")
    first = record.get("first_call_seconds")
    return [
        method,
        f"{about}{record['products']:,}",
        about + _short(seconds),
        "-" if times is None else about + _short(times),
        "-" if first is None else _short(first),
    ]


def _short(value: float) -> str:
    """Two significant digits, and no exponent."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _range(results: dict[str, Any], key: str) -> str:
    return " or ".join(map(str, dict.fromkeys(network[key] for network in results["networks"].values())))


def _defaults_text(network: dict[str, Any]) -> str:
    found = network.get("pyhessian_defaults")
    if found is None:
        return ""
    products = found["trace_products"]
    return (
        f"PyHessian's defaults on the {network['title']}: a trace off by up to "
        f"{100 * max(map(abs, found['trace_errors'])):.1f} %, after {min(products)} to {max(products)} "
        f"products; an eigenvalue by {100 * found['eigenvalue_error']:.1g} %."
    )


def _draw(panel: Axes, record: dict[str, Any]) -> None:
    colour = COLOURS[record["library"]]
    if not record["extrapolated"]:
        seconds = [point["seconds"] for point in record["curve"]]
        errors = [100 * point["relative_error"] for point in record["curve"]]
        panel.plot(seconds, errors, color=colour, marker=MARKERS[record["method"]], markersize=5)
        return
    # From the first of our numbers of products to where the error is small enough.
    numbers = np.array([races.NUMBERS[0], record["products"]])
    errors = 100 * record["relative_deviation"] / np.sqrt(numbers)
    panel.plot(
        record["seconds"]["median"] * numbers / record["products"], errors, color=colour, linestyle="--"
    )


def _label(panel: Axes, networks: Sequence[dict[str, Any]]) -> None:
    """Names each colour and each line once."""
    shown = {record["library"] for network in networks for record in network["trace"]}
    for library, colour in COLOURS.items():
        if library in shown:
            panel.plot([], [], color=colour, linewidth=4, label=library)
    for method, marker in MARKERS.items():
        panel.plot([], [], color="#666666", marker=marker, markersize=5, label=METHODS[method])
    panel.plot([], [], color="#666666", linestyle="--", label=METHODS["hutchinson"])


def _settings() -> dict[str, Any]:
    packages = libraries.PACKAGES if timing.torch_device() else {}
    return {
        "examples": trained_networks.NUM_EXAMPLES,
        "batches": trained_networks.NUM_BATCHES,
        "epochs": trained_networks.EPOCHS,
        "training_batch_size": trained_networks.BATCH_SIZE,
        "learning_rate": trained_networks.LEARNING_RATE,
        "momentum": methods.MOMENTUM,
        "trace_target": races.TRACE_TARGET,
        "eigenvalues": trained_networks.NUM_EIGENVALUES,
        "eigenvalue_target": races.EIGENVALUE_TARGET,
        "eigenvalue_seeds": trained_networks.EIGENVALUE_SEEDS,
        "hutchinson_products": races.HUTCHINSON_PRODUCTS,
        "rivals": {name: libraries.version(package) for name, package in packages.items()},
        "pyhessian_defaults": libraries.PYHESSIAN_DEFAULTS,
    }
