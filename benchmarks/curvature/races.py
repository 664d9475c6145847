"""What each library takes until its error is small enough: products and seconds."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.curvature import libraries, trained_networks
from benchmarks.curvature.libraries import BASES, RATIOS, Eigenvalues, Key, Library, Trace
from benchmarks.curvature.trained_networks import Case, Problem
from benchmarks.kit import timing

Call = Callable[[], Any]
TRACE_TARGET = 0.01  # root mean square of the relative errors
NUMBERS = (24, 36, 48, 60, 78, 96, 120, 156)  # of products; XTrace takes even ones, Hutch++ threes
FEWEST_SEEDS = 3
HUTCHINSON_PRODUCTS = 24  # of the calls that show the time of one product
EIGENVALUE_TARGET = 1e-4  # the largest relative error of all
TOLERANCES = tuple(10.0**-i for i in range(1, 7))
MOST_SECONDS = 30  # of a call's repetitions together: when they are over, no further one begins


def smallest_number(curve: Sequence[Mapping[str, Any]]) -> int | None:
    """The fewest products of a curve with which the error is small enough, if there are any."""
    passed = [point["products"] for point in curve if point["relative_error"] <= TRACE_TARGET]
    return min(passed, default=None)


def extrapolated_number(relative_deviation: float) -> int:
    """How many probes, of so much deviation each, have a mean that is precise enough."""
    return math.ceil((relative_deviation / TRACE_TARGET) ** 2)


def trace_records(
    libraries: dict[str, Library], case: Case, reference: dict[str, Any], advance: Call
) -> dict[Key, dict[str, Any]]:
    """What each method takes for the trace: measured for those of few products, else extrapolated."""
    traces = {
        (name, method): call
        for name, library in libraries.items()
        for method, call in library.traces.items()
        if method in case.methods
    }
    records = {
        key: _record(key, products=smallest_number(curve), curve=curve)
        for key, curve in _curves(traces, reference["trace"], case.seeds, advance).items()
    }
    plain = {(name, "hutchinson"): library for name, library in libraries.items()}
    for key, library in plain.items():
        deviation = library.deviation(0, case.probes) / abs(reference["trace"])
        products = extrapolated_number(deviation)
        records[key] = _record(key, products=products, relative_deviation=deviation, extrapolated=True)
    advance()
    calls: dict[Key, Call] = {
        key: functools.partial(call, 0, records[key]["products"])
        for key, call in traces.items()
        if records[key]["products"]
    }
    calls |= {
        key: functools.partial(library.hutchinson, 0, HUTCHINSON_PRODUCTS) for key, library in plain.items()
    }
    for key, seconds in _turns(calls, case.repetitions, advance).items():
        factor = records[key]["products"] / HUTCHINSON_PRODUCTS if key in plain else 1
        _add_seconds(records[key], [factor * time for time in seconds])
    return records


def _curves(
    traces: Mapping[Key, Trace], true: float, num_seeds: int, advance: Call
) -> dict[Key, list[dict[str, Any]]]:
    """The errors of each method at more and more products, until they are small enough."""
    curves: dict[Key, list[dict[str, Any]]] = {key: [] for key in traces}
    for number in NUMBERS:
        open_ = {key: call for key, call in traces.items() if smallest_number(curves[key]) is None}
        for key, samples in _samples(open_, number, true, num_seeds).items():
            errors, seconds = zip(*samples, strict=True)
            curves[key].append(
                {
                    "products": number,
                    "relative_error": _rms(errors),
                    "seeds": len(samples),
                    "seconds": float(np.median(seconds)),
                }
            )
        advance()
    return curves


def _samples(
    traces: Mapping[Key, Trace], number: int, true: float, num_seeds: int
) -> dict[Key, list[tuple[float, float]]]:
    """The relative error and the seconds of each estimate, the methods in turns."""
    samples: dict[Key, list[tuple[float, float]]] = {key: [] for key in traces}
    for seed in range(num_seeds):
        for key, call in traces.items():
            if seed < FEWEST_SEEDS or not is_lost([error for error, _ in samples[key]], num_seeds):
                value, seconds = _timed(functools.partial(call, seed, number))
                samples[key].append((value / true - 1, seconds))
    return samples


def is_lost(errors: Sequence[float], num_seeds: int) -> bool:
    """Whether the root mean square over all seeds will be too large, however small the errors to come."""
    return sum(error**2 for error in errors) > num_seeds * TRACE_TARGET**2


def eigenvalue_records(
    libraries: dict[str, Library], case: Case, reference: dict[str, Any], advance: Call
) -> dict[Key, dict[str, Any]]:
    """What each library takes for the eigenvalues."""
    records, calls = {}, {}
    for name, library in libraries.items():
        key = (name, library.solver)
        rungs = _rungs(library.eigenvalues, reference["eigenvalues"])
        reached = rungs[-1]["largest_error"] <= EIGENVALUE_TARGET
        records[key] = _record(key, products=rungs[-1]["products"] if reached else None, rungs=rungs)
        if reached:
            calls[key] = functools.partial(library.eigenvalues, 0, rungs[-1]["tolerance"])
    for _ in TOLERANCES:
        advance()
    for key, seconds in _turns(calls, case.repetitions, advance).items():
        _add_seconds(records[key], seconds)
    return records


def _rungs(eigenvalues: Eigenvalues, true: Sequence[float]) -> list[dict[str, Any]]:
    """Tighter and tighter tolerances, until one is met; each is left at the first seed that misses."""
    rungs: list[dict[str, Any]] = []
    for tolerance in TOLERANCES:
        errors: list[float] = []
        for seed in range(trained_networks.EIGENVALUE_SEEDS):
            values, products = eigenvalues(seed, tolerance)
            errors.append(largest_error(values, true))
            if errors[-1] > EIGENVALUE_TARGET:
                break
        rungs.append({"tolerance": tolerance, "largest_error": max(errors), "products": products})
        if max(errors) <= EIGENVALUE_TARGET:
            break
    return rungs


def largest_error(values: Sequence[float], true: Sequence[float]) -> float:
    """The largest relative error of some eigenvalues, in whatever order they are."""
    ordered = np.sort(values)[::-1]
    return float(np.max(np.abs(ordered / np.asarray(true) - 1)))


def add_first_calls(problem: Problem, records: dict[str, dict[Key, dict[str, Any]]]) -> None:
    """Adds what compiling takes, with nothing compiled before."""
    for task, base in BASES.items():
        record = records[task][base]
        if record["seconds"] is None:
            continue
        jax.clear_caches()
        library = libraries.ours(problem)
        if task == "trace":
            _, seconds = _timed(functools.partial(library.traces[base[1]], 0, record["products"]))
        else:
            _, seconds = _timed(functools.partial(library.eigenvalues, 0, record["rungs"][-1]["tolerance"]))
        record["first_call_seconds"] = seconds - record["seconds"]["median"]


def pyhessian_defaults(problem: Problem, reference: dict[str, Any]) -> dict[str, Any]:
    """How far PyHessian comes without settings."""
    from benchmarks.curvature import torch_peers as peers  # noqa: PLC0415

    same = peers.problem(problem.model, problem.batches, str(timing.torch_device()))
    most, tol = int(libraries.PYHESSIAN_DEFAULTS["maxIter"]), libraries.PYHESSIAN_DEFAULTS["tol"]
    probes = [
        peers.pyhessian_probes(same, seed, most, tol) for seed in range(trained_networks.EIGENVALUE_SEEDS)
    ]
    values, products = peers.pyhessian_eigenvalues(same, 0, tol, trained_networks.NUM_EIGENVALUES, most)
    return {
        "trace_products": [len(samples) for samples in probes],
        "trace_errors": [float(np.mean(samples)) / reference["trace"] - 1 for samples in probes],
        "eigenvalue_products": products,
        "eigenvalue_error": largest_error(values, reference["eigenvalues"]),
    }


def _turns(calls: Mapping[Key, Call], repetitions: int, advance: Call) -> dict[Key, list[float]]:
    """Seconds of each call, compiled before, in turns and each time in another order."""
    rng, keys = np.random.default_rng(0), list(calls)
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    for _ in range(repetitions):
        for index in rng.permutation(len(keys)).tolist():
            times = seconds[keys[index]]
            if sum(times) < MOST_SECONDS:
                times.append(_timed(calls[keys[index]])[1])
        advance()
    return seconds


def _timed(call: Call) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _record(key: Key, *, products: int | None, extrapolated: bool = False, **more: Any) -> dict[str, Any]:
    library, method = key
    return {
        "library": library,
        "method": method,
        "products": products,
        "extrapolated": extrapolated,
        "repetitions": 0,
        "seconds": None,
        **more,
    }


def _add_seconds(record: dict[str, Any], seconds: Sequence[float]) -> None:
    record |= {"repetitions": len(seconds), "seconds": timing.quartiles(seconds)}


def compared(task: str, records: dict[Key, dict[str, Any]]) -> dict[str, float]:
    """Our median time over that of each other method; adds the inverse to the records."""
    ours = records[BASES[task]]["seconds"]
    if ours is None:
        return {}
    for record in records.values():
        if record["seconds"]:
            record["times_ours"] = record["seconds"]["median"] / ours["median"]
    return {
        name: 1 / records[key]["times_ours"]
        for name, key in RATIOS[task].items()
        if "times_ours" in records.get(key, {})
    }


def _rms(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
