"""What every command reports: where it ran, how far it is, and its figures as JSON, a table and a picture."""

import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import nso_jax
from benchmarks.kit import tables
from benchmarks.kit.tables import Tabular

PRIOR_SECONDS = 10.0  # for which the pace is what was expected, whatever the clock says


class Benchmark(Tabular, Protocol):
    """A module that is a command, with the dataclass `Options` of its settings.

    Most have `plot(results)` too, its figures as a picture, PNG; `markdown(results)` is a shorter table for
    readers. The demo, which shows its progress and names its files in its own way, has `measure(options)` and
    `published(folder)` instead of what is done here and by `benchmarks.publish`.
    """

    def run(self, options: Any, progress: Progress, /) -> dict[str, Any]:
        """Measures.

        Args:
            options: The settings, of the module's `Options`.
            progress: Where to show how far it is.

        Returns:
            All figures, ready for JSON, among them the settings.
        """


def measure(benchmark: Benchmark, name: str, options: Any) -> dict[str, str | bytes]:
    """Runs a benchmark, showing its progress and then its table.

    Args:
        benchmark: Its module.
        name: What its files are called, before the name of the data if the results have one.
        options: The settings, of its `Options`.

    Returns:
        The content of each file to write.
    """
    console = Console()
    with progress(console) as shown:
        text = tables.to_json(environment() | benchmark.run(options, shown))
    # Read back, so that the table and the picture show exactly what the file says.
    results = json.loads(text)
    print_table(console, benchmark, results)
    title = f"{name}-{results['name']}" if "name" in results else name
    files: dict[str, str | bytes] = {
        f"{title}.json": text,
        f"{title}.md": tables.markdown(benchmark, results),
    }
    return (
        files | further(benchmark, "markdown", f"{title}.md", results) | pictures(benchmark, title, results)
    )


def pictures(module: Any, title: str, results: dict[str, Any]) -> dict[str, bytes]:
    """What a module draws of its results, by file: `plot` draws title.png, and `plot_x` title-x.png."""
    drawn = {f"{title}.png": module.plot(results)} if hasattr(module, "plot") else {}
    return {
        file: each
        for file, each in (drawn | further(module, "plot", f"{title}.png", results)).items()
        if each
    }


def further(module: Any, kind: str, file: str, results: dict[str, Any]) -> dict[str, Any]:
    """What the functions `kind_x` of a module make of its results, by file: title-x.md for title.md."""
    title, _, suffix = file.rpartition(".")
    names = [name.removeprefix(f"{kind}_") for name in vars(module) if name.startswith(f"{kind}_")]
    return {f"{title}-{x.replace('_', '-')}.{suffix}": getattr(module, f"{kind}_{x}")(results) for x in names}


def environment() -> dict[str, Any]:
    """The versions and the machine that somebody needs to know to repeat a run."""
    packages = ("jax", "jaxlib", "flax", "optax")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "versions": {"python": platform.python_version(), **versions, "nso_jax": nso_jax.__version__},
        "machine": {"device": jax.devices()[0].device_kind, "cpu_count": os.cpu_count()},
    }


def progress(console: Console, unit: str = "measurements") -> Progress:
    """A display of how much is done and how long the rest will take."""
    columns = (TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn())
    left = (TextColumn(f"{unit},"), TimeRemainingColumn(), TextColumn("left"))
    # Speeds are averaged over minutes, because some steps take seconds and some a fraction of one.
    return Progress(*columns, *left, console=console, transient=True, speed_estimate_period=300)


class TimeLeft:
    """How long the rest of a run takes: from what was expected of each of its parts, and the pace so far.

    As text it is rounded, because it is a guess.
    """

    def __init__(self, expected: Mapping[str, float], shown: Progress) -> None:
        """Starts the clock.

        Args:
            expected: Seconds of each part.
            shown: Where to show how far it is, of `expected_progress`.
        """
        self._expected, self._shown, self._start = dict(expected), shown, time.perf_counter()
        self._done = self._within = 0.0
        self._task = shown.add_task("all trainings", total=sum(expected.values()) or 1.0, left=str(self))

    def advance(self, seconds: float) -> None:
        """Adds what was expected of a bit of the part under way."""
        self._within += seconds
        self._show()

    def finish(self, part: str) -> None:
        """The part under way is over."""
        self._done, self._within = self._done + self._expected.pop(part, 0.0), 0.0
        self._show()

    @property
    def seconds(self) -> float:
        """Those left."""
        done = self._done + self._within
        pace = (time.perf_counter() - self._start + PRIOR_SECONDS) / (done + PRIOR_SECONDS)
        return pace * max(0.0, sum(self._expected.values()) - self._within)

    def __str__(self) -> str:
        """Whole fives of seconds, or minutes."""
        seconds = self.seconds
        if seconds > 180:
            return f"about {seconds / 60:.0f} minutes"
        return f"about {5 * max(1, math.ceil(seconds / 5))} s"

    def _show(self) -> None:
        self._shown.update(self._task, completed=self._done + self._within, left=str(self))


def expected_progress(console: Console) -> Progress:
    """A display of a `TimeLeft`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, TextColumn("{task.fields[left]} left"), console=console, transient=True)


def print_table(console: Console, tabular: Tabular, results: dict[str, Any]) -> None:
    """Shows the table of some results, and below it the caption."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in tabular.HEADERS:
        # One word a line: then the table fits into 80 columns.
        shown.add_column(header.replace(" ", "\n"), justify="right", no_wrap=True, vertical="bottom")
    for row in tabular.rows(results):
        shown.add_row(*row)
    console.print(shown, tabular.caption(results), sep="\n", highlight=False)
