"""What every command reports: where it ran, how far it is, and its figures as JSON, a table and a picture."""

import importlib.metadata
import json
import os
import platform
from typing import Any, Protocol

import jax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import nso_jax
from benchmarks import table
from benchmarks.table import Tabular


class Benchmark(Tabular, Protocol):
    """A module that is a command. Most have `plot(results)` too, its figures as a picture, PNG."""

    def run(self, options: Any, progress: Progress, /) -> dict[str, Any]:
        """The figures, ready for JSON, among them the settings."""


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
        text = table.to_json(environment() | benchmark.run(options, shown))
    # Read back, so that the table and the picture show exactly what the file says.
    results = json.loads(text)
    print_table(console, benchmark, results)
    title = f"{name}-{results['name']}" if "name" in results else name
    files: dict[str, str | bytes] = {
        f"{title}.json": text,
        f"{title}.md": table.markdown(benchmark, results),
    }
    return files | pictures(benchmark, title, results)


def pictures(module: Any, title: str, results: dict[str, Any]) -> dict[str, bytes]:
    """What a module draws of its results, by file: `plot` draws title.png, and `plot_x` title-x.png."""
    names = [name for name in vars(module) if name.partition("_")[0] == "plot"]
    drawn = {f"{title}{name[4:].replace('_', '-')}.png": getattr(module, name)(results) for name in names}
    return {file: picture for file, picture in drawn.items() if picture}


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


def print_table(console: Console, tabular: Tabular, results: dict[str, Any]) -> None:
    """Shows the table of some results, and below it the caption."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in tabular.HEADERS:
        # One word a line: then the table fits into 80 columns.
        shown.add_column(header.replace(" ", "\n"), justify="right", no_wrap=True, vertical="bottom")
    for row in tabular.rows(results):
        shown.add_row(*row)
    console.print(shown, tabular.caption(results), sep="\n", highlight=False)
