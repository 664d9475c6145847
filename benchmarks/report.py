"""What every command reports: where it ran, how far it is, and its figures as JSON, a table and a picture."""

import argparse
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
from benchmarks.table import rounded


class Tabular(Protocol):
    """A module that makes a table of its results, which have what `environment` gives among them."""

    HEADERS: tuple[str, ...]

    def rows(self, results: dict[str, Any], /) -> list[list[str]]:
        """The table's cells."""

    def caption(self, results: dict[str, Any], /) -> str:
        """What the table shows, in a few sentences."""


class Benchmark(Tabular, Protocol):
    """A module that is a command."""

    def run(self, options: argparse.Namespace, progress: Progress, /) -> dict[str, Any]:
        """The figures, ready for JSON, among them the settings."""

    def plot(self, results: dict[str, Any], /) -> bytes:
        """The figures as a picture, PNG."""


def measure(benchmark: Benchmark, name: str, options: argparse.Namespace) -> dict[str, str | bytes]:
    """Runs a benchmark, showing its progress and then its table.

    Args:
        benchmark: Its module.
        name: What its files are called.
        options: Those of the command line.

    Returns:
        The content of each file to write.
    """
    console = Console()
    with progress(console) as shown:
        text = json.dumps(rounded(environment() | benchmark.run(options, shown)), indent=1) + "\n"
    # Read back, so that the table and the picture show exactly what the file says.
    results = json.loads(text)
    print_table(console, benchmark, results)
    return {f"{name}.json": text, f"{name}.png": benchmark.plot(results)}


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


def print_table(console: Console, table: Tabular, results: dict[str, Any]) -> None:
    """Shows the table of some results, and below it the caption."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in table.HEADERS:
        # One word a line: then the table fits into 80 columns.
        shown.add_column(header.replace(" ", "\n"), justify="right", no_wrap=True, vertical="bottom")
    for row in table.rows(results):
        shown.add_row(*row)
    console.print(shown, table.caption(results), sep="\n", highlight=False)
