"""Settings of the command line that several commands have, and types that check what is given for one."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec


@dataclasses.dataclass(frozen=True)
class Output:
    """Settings of every benchmark.

    Attributes:
        out: Output folder.
    """

    out: Path = Path("runs/results")

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.out

    def settings(self) -> dict[str, Any]:
        """What somebody needs to know to go on with the run or to repeat it, ready for JSON."""
        elsewhere = {"out", "work", "resume"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in elsewhere}


@dataclasses.dataclass(frozen=True)
class Resumable(Output):
    """Settings of benchmarks that train for long.

    Attributes:
        work: Folder for what a run leaves as it goes: figures and checkpoints.
        resume: Go on with the run in that folder, from where it was stopped.
    """

    work: Path = Path("runs/work")
    resume: bool = False


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
