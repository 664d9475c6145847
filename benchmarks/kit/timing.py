"""Times of calls, measured in turns, and the ratios between them."""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Call = Callable[[], Any]

LEAST_SECONDS = 0.05  # of one measurement: short calls are repeated until then


class Ratio(NamedTuple):
    """One call's time over `times` another's."""

    numerator: str
    times: int
    denominator: str


def interleaved(
    calls: Mapping[str, Call], repetitions: int, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each call, measured in turns and each time in another order: other loads strike all alike.

    Args:
        calls: What to time; what they return is waited for.
        repetitions: Measurements of each.
        advance: Called after every measurement, the first of which compiles and does not count.

    Returns:
        Seconds of a call, for each repetition.
    """
    counts = {}
    for name, call in calls.items():
        _seconds(call, 1)  # compiles
        counts[name] = max(1, round(LEAST_SECONDS / _seconds(call, 1)))
        advance()
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name in rng.permutation(list(calls)).tolist():
            seconds[name].append(_seconds(calls[name], counts[name]))
            advance()
    return seconds


def first_calls(calls: Mapping[str, Call]) -> dict[str, float]:
    """Seconds of the first call of each, in which it is traced and compiled."""
    return {name: _seconds(call, 1) for name, call in calls.items()}


def ratios(
    seconds: Mapping[str, Sequence[float]], wanted: Mapping[str, Ratio]
) -> dict[str, dict[str, float]]:
    """Medians and quartiles over the repetitions of those ratios whose two calls were timed."""
    return {
        name: quartiles(np.divide(seconds[ratio.numerator], seconds[ratio.denominator]) / ratio.times)
        for name, ratio in wanted.items()
        if {ratio.numerator, ratio.denominator} <= seconds.keys()
    }


def quartiles(values: Any) -> dict[str, float]:
    """The three quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high}


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / count


def torch_device() -> str | None:
    """JAX's device under PyTorch's name for it, if PyTorch is there and can use it."""
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if device is None or importlib.util.find_spec("torch") is None:
        return None
    import torch  # noqa: PLC0415

    return device if device == "cpu" or torch.cuda.is_available() else None
