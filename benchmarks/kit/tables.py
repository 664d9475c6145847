"""Figures as text: numbers, tables in Markdown, their copies in README.md and docs, and JSON."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.kit.files import UserError


class Tabular(Protocol):
    """A module that makes a table of its results, which have what `environment` gives among them."""

    HEADERS: tuple[str, ...]

    def rows(self, results: dict[str, Any], /) -> list[list[str]]:
        """The table's cells."""

    def caption(self, results: dict[str, Any], /) -> str:
        """What the table shows, in a few sentences."""


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


def marked(page: str) -> list[str]:
    """The names of the tables that a page has marks for, as `<!-- name-table -->`."""
    return re.findall(r"<!-- ([\w-]+)-table -->", page)


def replace_in(page: str, name: str, text: str) -> str:
    """The page with a text between the two marks of a name, `<!-- name -->` and `<!-- /name -->`.

    Args:
        page: The page.
        name: That of the marks.
        text: What goes between them.

    Raises:
        UserError: The marks are missing.
    """
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end:
        raise UserError(f"the page lacks the marks {marks[0]} and {marks[1]}")
    return f"{before}{begin}\n{text}{end}{after}"


def to_json(results: dict[str, Any]) -> str:
    """The figures as JSON, one line for each item of a list of records."""
    items = [f" {json.dumps(key)}: {_lines(value)}" for key, value in rounded(results).items()]
    return "{\n" + ",\n".join(items) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n ]"
    return json.dumps(value)


def with_error(mean: float, error: float | None, digits: int = 3) -> str:
    """A mean ± its error, if any: two significant digits of the error, at most `digits` of the mean."""
    if error is None:
        return number(mean, digits)
    decimals = min(_decimals(mean, digits), _decimals(error, digits=2))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation, as `with_error` shows them; the mean alone of a single value."""
    error = statistics.stdev(values) if len(values) > 1 else None
    return with_error(statistics.mean(values), error, digits)


def formatted_spread(values: Sequence[float], mean: str = ".1f", deviation: str = ".1f") -> str:
    """The same in these formats."""
    shown = f"{statistics.mean(values):{mean}}"
    return f"{shown} ± {statistics.stdev(values):{deviation}}" if len(values) > 1 else shown


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
