"""The demo's table, from its figures: rows, Markdown, and the copy in README.md."""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.files import UserError


class Tabular(Protocol):
    """A module that makes a table of its results, which have what `environment` gives among them."""

    HEADERS: tuple[str, ...]

    def rows(self, results: dict[str, Any], /) -> list[list[str]]:
        """The table's cells."""

    def caption(self, results: dict[str, Any], /) -> str:
        """What the table shows, in a few sentences."""


HEADERS: tuple[str, ...] = (
    "method",
    "test accuracy (%)",
    "loss gap",
    "Hessian trace",
    "its SE",
    "largest eigenvalue",
    "seconds",
)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each method, every cell a mean and a standard deviation over the seeds."""
    return [_row(name, results["runs"]) for name in results["settings"]["methods"]]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    return (
        f"Mean ± standard deviation over {settings['seeds']} seeds: of the initial weights, the data order, "
        f"the noise, and which {settings['num_train']} digits are trained on, "
        f"{100 * settings['wrong_labels']:.0f} % of them with a wrong label. "
        f"The {settings['num_test']:,} test images are always the same, with right labels. "
        f"Every method takes {settings['gradient_evaluations']:,} gradient evaluations "
        f"on {settings['batch_size']} images each. Loss gap: test loss minus training loss, "
        "with as many wrong labels in both. "
        "Trace and largest eigenvalue: of the Hessian of the training loss over all training images, in "
        "evaluation mode. Its SE: the standard error of one seed's trace, from "
        f"{settings['final_products']} Hessian-vector products. Seconds: to train one seed, without "
        f"compiling and measuring, on {machine['cpu_count']} CPU cores ({machine['device']})."
    )


def markdown(tabular: Tabular, results: dict[str, Any]) -> str:
    """A table and its caption as Markdown."""
    lines = [tabular.HEADERS, *tabular.rows(results)]
    return f"{grid(lines)}\n\n{tabular.caption(results)}\n"


def grid(lines: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """A Markdown table, the first line its head.

    Args:
        lines: The cells.
        texts: The columns that are not of numbers, and so to the left.
    """
    head, *others = lines
    ruler = ["---" if i in texts else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *others))


def replace_in(readme: str, name: str, text: str) -> str:
    """The README with a text between the two marks of a name, `<!-- name -->` and `<!-- /name -->`.

    Args:
        readme: The README.
        name: That of the marks.
        text: What goes between them.

    Raises:
        UserError: The marks are missing.
    """
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = readme.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end:
        raise UserError(f"README.md lacks the marks {marks[0]} and {marks[1]}")
    return f"{before}{begin}\n{text}{end}{after}"


def to_json(results: dict[str, Any]) -> str:
    """The figures as JSON, one line for each item of a list of records."""
    items = [f" {json.dumps(key)}: {_lines(value)}" for key, value in rounded(results).items()]
    return "{\n" + ",\n".join(items) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n ]"
    return json.dumps(value)


def _row(name: str, runs: list[dict[str, Any]]) -> list[str]:
    mine = [run for run in runs if run["method"] == name]

    def column(key: str) -> list[float]:
        return [run[key] for run in mine]

    return [
        name,
        _spread([100 * value for value in column("test_accuracy")]),
        _spread(column("loss_gap")),
        _spread(column("trace")),
        number(math.sqrt(statistics.mean(error**2 for error in column("trace_standard_error")))),
        _spread(column("largest_eigenvalue")),
        _spread(column("seconds"), digits=2),
    ]


def _spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    return with_error(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, digits)


def with_error(mean: float, error: float | None, digits: int = 3) -> str:
    """A mean ± its error, if any: two significant digits of the error, at most `digits` of the mean."""
    if error is None:
        return number(mean, digits)
    decimals = min(_decimals(mean, digits), _decimals(error, digits=2))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, but three decimals at most."""
    return f"{value:.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    """How many decimals show so many significant digits; three at most."""
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 3) if value else 3


def rounded(value: Any) -> Any:
    """JSON-ready figures with six significant digits: more than the figures have, and a third of the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
