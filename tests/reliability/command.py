"""What training may meet and survive: faults, odd inputs, long runs, other machines."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.progress import Progress

from benchmarks.kit.files import ROOT, UserError
from benchmarks.kit.options import Count, Output
from tests.reliability import determinism, installation, kills, nonfinite, round_trips, soak
from tests.reliability.outcome import Advance, Outcome

# What Hypothesis tries: the row's name, the files of tests, and what they try.
PROPERTIES = {
    "random input": (
        ("test_properties.py", "test_bad_input.py"),
        "random trees, dtypes, shapes, prefixes and options, valid and not, against the exact identities",
    ),
    "random meshes": (
        ("devices/test_meshes.py",),
        (
            "1 to 8 devices, losses with and without collectives, masks, metrics, dropout, microbatches, in "
            "shard_map with and without check_vma, pmap, vmap and on meshes, for value_and_grad, the rivals, "
            "NNX, Equinox and the optax adapter: value, gradient and metrics as on one device"
        ),
    ),
}

HEADERS: tuple[str, ...] = ("fault or input", "times tried", "survived", "lost")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Tries faults and odd inputs, and counts what is lost.

    Attributes:
        times: How often to kill each kind of training, and to time an import.
        seeds: How often to try each kind of number that is not finite.
        steps: Steps of the long training.
        profile: Of the property tests: `test` has 200 inputs and 100 meshes, `nightly` 2,000 of each.
    """

    times: Count = 20
    seeds: Count = 3
    steps: Count = 10_000
    profile: str = "nightly"


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Makes every row of the table.

    Returns:
        All figures, ready for JSON: the `rows`, and what the `soak` read of memory.
    """
    rows = []

    def add(outcome: Outcome, start: float) -> None:
        seconds = time.perf_counter() - start
        rows.append({**outcome._asdict(), "seconds": seconds})
        told = f"{outcome.fault}: {outcome.survived:,} of {outcome.tried:,} survived, {seconds:.0f} s"
        progress.console.print(told, highlight=False, soft_wrap=True)

    start = time.perf_counter()
    soaked = soak.apart(options.steps)
    add(soak.outcome(soaked), start)
    for name, check in CHECKS.items():
        advance = functools.partial(progress.advance, progress.add_task(name, total=None))
        start = time.perf_counter()
        for outcome in check(options, advance):
            add(outcome, start)
            start = time.perf_counter()
    return {"settings": options.settings(), "rows": rows, "soak": soaked._asdict()}


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each kind of fault or input."""
    return [
        [row["fault"], *(f"{row[name]:,}" for name in ("tried", "survived")), f"{_lost(row):,}"]
        for row in results["rows"]
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, row by row."""
    machine, seconds = results["machine"], sum(row["seconds"] for row in results["rows"])
    notes = "\n".join(f"- *{row['fault']}*: {row['note']}." for row in results["rows"])
    return (
        f"{notes}\n\nAll in {seconds / 60:.0f} minutes "
        f"on {machine['cpu_count']} CPU cores ({machine['device']})."
    )


def _lost(row: dict[str, Any]) -> int:
    return row["tried"] - row["survived"]


def _properties(name: str, options: Options, advance: Advance) -> Outcome:
    """A row of property tests, run as `make nightly` does."""
    files, note = PROPERTIES[name]
    tests = [str(ROOT / "tests" / file) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"HYPOTHESIS_PROFILE": options.profile}
    done = subprocess.run(  # noqa: S603  # a command of ours
        [*command, "--hypothesis-show-statistics"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    counts = re.findall(r"- (\d+) passing, (\d+) failing, and \d+ invalid", done.stdout)
    if not counts:
        raise UserError(f"the property tests did not run: {(done.stdout + done.stderr).strip()[-500:]}")
    passing, failing = (sum(map(int, column)) for column in zip(*counts, strict=True))
    advance(passing + failing)
    return Outcome(name, passing + failing, passing, note)


def _damage(options: Options, advance: Advance) -> Iterator[Outcome]:
    yield kills.damaged(advance)
    yield kills.damaged_lines(options.times, advance)


def _wheel(options: Options, advance: Advance) -> Iterator[Outcome]:
    with installation.clean_environment() as (wheel, python):
        yield installation.wheel(wheel, python, advance)
        yield installation.imports(python, options.times, advance)


# The rows besides that of the long training.
CHECKS: dict[str, Callable[[Options, Advance], Any]] = {
    "kills": lambda options, advance: [kills.harness(options.times, advance)],
    "kills of a script": lambda options, advance: [kills.script(options.times, advance)],
    "damage": _damage,
    "round trips": lambda _, advance: [round_trips.round_trips(advance)],
    "non-finite": lambda options, advance: [nonfinite.nonfinite(options.seeds, advance)],
    "determinism": lambda _, advance: [determinism.determinism(advance)],
    "random input": lambda options, advance: [_properties("random input", options, advance)],
    "random meshes": lambda options, advance: [_properties("random meshes", options, advance)],
    "wheel": _wheel,
    "paths": lambda _, advance: [installation.paths(advance)],
}
