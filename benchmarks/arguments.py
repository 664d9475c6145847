"""Settings of the command line that several commands have, and types that check what is given for one."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from benchmarks.files import RESULTS


@dataclasses.dataclass(frozen=True)
class Output:
    """Settings of every benchmark.

    Attributes:
        out: Output folder.
    """

    out: Path = RESULTS


def at_least(least: int) -> PrimitiveConstructorSpec[Any]:
    """Annotates a whole number that must not be smaller."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return _checked("COUNT", parse)


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"expected a number from 0 to 1, got {text!r}")
    return number


def _checked(metavar: str, parse: Callable[[str], float]) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(*words),
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


Count = Annotated[int, at_least(1)]
# None where each case has a number of its own.
OwnCount = Annotated[int | None, at_least(1)]
Share = Annotated[float, _checked("SHARE", _share)]
