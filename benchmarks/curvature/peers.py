"""What a trace and the top eigenvalues cost to a given true error: nso_jax, PyHessian, curvlinops."""

import dataclasses
import functools
import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.progress import Progress

from benchmarks.cost import jax_steps
from benchmarks.kit import options, plots, timing
from benchmarks.tasks import data
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import MLP, ConvNet, pure_loss
from benchmarks.training import loop, methods
from benchmarks.training.loop import Settings, Task
from nso_jax import curvature

Call = Callable[[], Any]
# A library and a method of it.
Key = tuple[str, str]
Trace = Callable[[int, int], float]
Eigenvalues = Callable[[int, float], tuple[Sequence[float], int]]


class Case(NamedTuple):
    """A network, and how much is spent on it.

    Attributes:
        title: What it is called.
        model: `model(rngs=...)` makes it.
        methods: For the trace, besides Hutchinson's.
        seeds: Estimates of the trace at each number of products.
        probes: Single probes that show how much those of Hutchinson's method vary.
        repetitions: Measurements of each time.
    """

    title: str
    model: Callable[..., nnx.Module]
    methods: tuple[str, ...]
    seeds: int
    probes: int
    repetitions: int


class Problem(NamedTuple):
    """A trained network: `fun(params, batch)` is its mean loss over a batch, in evaluation mode."""

    model: nnx.Module
    fun: Callable[[nnx.State, Examples], jax.Array]
    params: nnx.State
    batches: list[Examples]


class Library(NamedTuple):
    """What a library offers. Its random streams are numbered: a `seed` is a whole number.

    Attributes:
        traces: `estimate(seed, num_products)` for each method that needs few products.
        hutchinson: The same for Hutchinson's method.
        deviation: `deviation(seed, num_probes)`: the standard deviation of one of its probes.
        solver: How it finds eigenvalues.
        eigenvalues: `eigenvalues(seed, tol)`: the largest, and how many products that took.
    """

    traces: Mapping[str, Trace]
    hutchinson: Trace
    deviation: Trace
    solver: str
    eigenvalues: Eigenvalues


NETWORKS = {
    "mlp": Case(
        "MLP",
        functools.partial(MLP, (64, 256, 128, 10)),
        methods=("xtrace", "hutch++"),
        seeds=20,
        probes=300,
        repetitions=5,
    ),
    # Its products take five times as long.
    "convnet": Case(
        "ConvNet",
        functools.partial(ConvNet, dropout=0.0),
        methods=("xtrace",),
        seeds=20,
        probes=100,
        repetitions=3,
    ),
}
NUM_EXAMPLES, NUM_BATCHES = 1792, 4
EPOCHS, BATCH_SIZE, LEARNING_RATE = 10, 64, 0.05

TRACE_TARGET = 0.01  # root mean square of the relative errors
NUMBERS = (24, 36, 48, 60, 78, 96, 120, 156)  # of products; XTrace takes even ones, Hutch++ threes
FEWEST_SEEDS = 3
HUTCHINSON_PRODUCTS = 24  # of the calls that show the time of one product
REFERENCE_SEED, REFERENCE_TOLERANCE = 2**20, 1e-6
CHUNK = 28  # examples whose gradients are held at once

NUM_EIGENVALUES, EIGENVALUE_SEEDS = 5, 3
EIGENVALUE_TARGET = 1e-4  # the largest relative error of all
TOLERANCES = tuple(10.0**-i for i in range(1, 7))
MOST_SECONDS = 30  # of a call's repetitions together: when they are over, no further one begins

OURS, PYHESSIAN, CURVLINOPS = "nso_jax", "PyHessian", "curvlinops"
PYHESSIAN_DEFAULTS = {"maxIter": 100, "tol": 1e-3}
PACKAGES = {"torch": "torch", PYHESSIAN: "PyHessian", CURVLINOPS: "curvlinops-for-pytorch"}
METHODS = {"xtrace": "XTrace", "hutch++": "Hutch++", "hutchinson": "Hutchinson"}
TASKS = {"trace": "trace", "eigenvalues": "top 5"}
# What is ours, and whose times are compared with it.
BASES: dict[str, Key] = {"trace": (OURS, "xtrace"), "eigenvalues": (OURS, "Lanczos")}
RATIOS: dict[str, dict[str, Key]] = {
    "trace": {PYHESSIAN: (PYHESSIAN, "hutchinson"), CURVLINOPS: (CURVLINOPS, "xtrace")},
    "eigenvalues": {PYHESSIAN: (PYHESSIAN, "power iteration"), CURVLINOPS: (CURVLINOPS, "eigsh")},
}
HEADERS: tuple[str, ...] = (
    "network",
    "task",
    "method",
    "products",
    "seconds",
    "times ours",
    "first call (s)",
)
COLOURS = {OURS: plots.BLUE, CURVLINOPS: plots.ORANGE, PYHESSIAN: plots.PURPLE}
MARKERS = {"xtrace": "o", "hutch++": "s"}


NetworkName = Literal["mlp", "convnet"]


@dataclasses.dataclass(frozen=True)
class Options(options.Output):
    """Times a trace and the top eigenvalues to a given true error: nso_jax, PyHessian, curvlinops.

    Attributes:
        networks: Whose Hessians to measure.
        seeds: Estimates for each error, instead of 20.
        repetitions: Measurements of each time, instead of 5, or 3 of the ConvNet.
    """

    networks: tuple[NetworkName, ...] = get_args(NetworkName)
    seeds: options.OwnCount = None
    repetitions: options.OwnCount = None


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Measures all libraries on each network.

    Args:
        options: The settings.
        progress: Where to show how far it is.

    Returns:
        All figures, ready for JSON.
    """
    results: dict[str, Any] = {"settings": _settings(), "networks": {}}
    for name, case in NETWORKS.items():
        if name in options.networks:
            chosen = case._replace(
                seeds=options.seeds or case.seeds, repetitions=options.repetitions or case.repetitions
            )
            results["networks"][name] = _measure(chosen, progress)
    return results


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each network, task and method: what it takes, and how long."""
    return [
        [network["title"], title, *_cells(record)]
        for network in results["networks"].values()
        for task, title in TASKS.items()
        for record in network[task]
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    versions = [f"{name} {version}" for name, version in settings["rivals"].items() if version]
    counts = {key: _range(results, key) for key in ("seeds", "probes", "repetitions")}
    text = (
        f"Hessians of the mean loss over {NUM_EXAMPLES:,} digits in {NUM_BATCHES} batches; the same weights "
        f"and data for all, on {machine['cpu_count']} CPU cores ({machine['device']}); other libraries: "
        f"{', '.join(versions) or 'none'}. Trace: to 1 %, by the fewest products with which the root mean "
        f"square of the relative errors, over {counts['seeds']} seeds, is no larger. Hutchinson's (~) are "
        f"extrapolated: from the deviation of {counts['probes']} single probes, and the time of calls of "
        f"{HUTCHINSON_PRODUCTS} products. Top 5: eigenvalues at the first tolerance of 1e-1, 1e-2, ... with "
        f"which none is off by more than 1e-4 of itself, for {EIGENVALUE_SEEDS} seeds. Seconds: of whole "
        f"calls, medians of up to {counts['repetitions']} in turns; -: not reached. First call: what "
        "compiling adds to it. "
    )
    return (text + " ".join(_defaults_text(network) for network in results["networks"].values())).strip()


def plot(results: dict[str, Any]) -> bytes:
    """The trace's true error against seconds, a panel for each network."""
    networks = list(results["networks"].values())
    figure = Figure(figsize=(max(plots.WIDTH, 3.2 * len(networks)), 4.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(networks)), sharey=True, squeeze=False)[0]
    for panel, network in zip(panels, networks, strict=False):
        for record in network["trace"]:
            _draw(panel, record)
        panel.axhline(100 * TRACE_TARGET, color=plots.BLACK, linewidth=0.8)
        panel.set(title=network["title"], xlabel="seconds (log scale)", xscale="log", yscale="log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if axis is panel.yaxis else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    figure.suptitle(
        f"Error of the trace: down and left is better; line: the target, {100 * TRACE_TARGET:g} %",
        fontsize="large",
    )
    panels[0].set_ylabel("root mean square error (%, log scale)")
    _label(panels[0], networks)
    return plots.finish(figure, panels[0], columns=3)


def smallest_number(curve: Sequence[Mapping[str, Any]]) -> int | None:
    """The fewest products of a curve with which the error is small enough, if there are any."""
    passed = [point["products"] for point in curve if point["relative_error"] <= TRACE_TARGET]
    return min(passed, default=None)


def extrapolated_number(relative_deviation: float) -> int:
    """How many probes, of so much deviation each, have a mean that is precise enough."""
    return math.ceil((relative_deviation / TRACE_TARGET) ** 2)


def _measure(case: Case, progress: Progress) -> dict[str, Any]:
    stages = 3 + len(NUMBERS) + len(TOLERANCES) + 2 * case.repetitions
    task = progress.add_task(case.title, total=stages)
    advance = functools.partial(progress.advance, task)
    problem = _trained(case)
    libraries = {OURS: _ours(problem)} | _rivals(problem)
    reference = _reference(problem)
    advance()
    traces = _trace_records(libraries, case, reference, advance)
    eigenvalues = _eigenvalue_records(libraries, case, reference, advance)
    records = {"trace": traces, "eigenvalues": eigenvalues}
    _add_first_calls(problem, records)
    advance()
    figures = {
        "title": case.title,
        "weights": sum(w.size for w in jax.tree.leaves(problem.params)),
        "seeds": case.seeds,
        "probes": case.probes,
        "repetitions": case.repetitions,
        "reference": reference,
        "ratios": {name: _compared(name, each) for name, each in records.items()},
        **{name: list(each.values()) for name, each in records.items()},
    }
    if PYHESSIAN in libraries:
        figures["pyhessian_defaults"] = _pyhessian_defaults(problem, reference)
    return figures


def _examples() -> Examples:
    split = data.digits(0, 797)
    parts = zip(split.test, split.train, strict=True)
    return Examples(*(np.concatenate(part)[:NUM_EXAMPLES] for part in parts))


def _trained(case: Case) -> Problem:
    """The network after some epochs: the loss is small, but far from zero."""
    examples = _examples()
    task = Task(
        lambda seed: case.model(rngs=nnx.Rngs(seed)),
        functools.partial(data.batches, examples, BATCH_SIZE),
        NUM_EXAMPLES,
    )
    settings = Settings(EPOCHS * (NUM_EXAMPLES // BATCH_SIZE), LEARNING_RATE)
    model = loop.train(task, methods.METHODS["sgd"], settings).model
    fun, params = pure_loss(model)
    parts = zip(*(np.split(part, NUM_BATCHES) for part in examples), strict=True)
    return Problem(model, fun, params, [Examples(*map(jnp.asarray, part)) for part in parts])


def _ours(problem: Problem) -> Library:
    """With a loss that is compiled anew."""
    _, fun, params, batches = problem
    loss = jax.jit(fun)

    def estimate(method: str, seed: int, num_products: int) -> curvature.Estimate:
        key = jax.random.key(seed)
        return curvature.trace(key, loss, params, batches, method=method, num_products=num_products)

    def value(method: str, seed: int, num_products: int) -> float:
        return float(estimate(method, seed, num_products).value)

    def deviation(seed: int, num_probes: int) -> float:
        return float(estimate("hutchinson", seed, num_probes).standard_error) * math.sqrt(num_probes)

    def eigenvalues(seed: int, tol: float) -> tuple[Sequence[float], int]:
        key = jax.random.key(seed)
        pairs = curvature.eigenvalues(key, loss, params, batches, k=NUM_EIGENVALUES, tol=tol)
        return pairs.values.tolist(), pairs.num_products

    traces = {method: functools.partial(value, method) for method in MARKERS}
    hutchinson = functools.partial(value, "hutchinson")
    return Library(traces, hutchinson, deviation, BASES["eigenvalues"][1], eigenvalues)


def _rivals(problem: Problem) -> dict[str, Library]:
    """Those that are installed, after a check that they have the same network."""
    device = jax_steps.torch_device()
    if device is None:
        return {}
    from benchmarks.curvature import torch_peers as peers  # noqa: PLC0415

    same = peers.problem(problem.model, problem.batches, device)
    check_agreement(problem, same)
    rivals = {}
    if peers.PYHESSIAN is not None:
        probes = functools.partial(peers.pyhessian_probes, same)
        rivals[PYHESSIAN] = Library(
            {},
            lambda seed, number: float(np.mean(probes(seed, number))),
            lambda seed, number: float(np.std(probes(seed, number), ddof=1)),
            RATIOS["eigenvalues"][PYHESSIAN][1],
            functools.partial(peers.pyhessian_eigenvalues, same, count=NUM_EIGENVALUES),
        )
    if peers.CURVLINOPS is not None:
        traces = {method: functools.partial(peers.curvlinops_trace, same, method) for method in METHODS}
        hutchinson = traces.pop("hutchinson")
        rivals[CURVLINOPS] = Library(
            traces,
            hutchinson,
            lambda seed, number: float(np.std([hutchinson(seed + i, 1) for i in range(number)], ddof=1)),
            RATIOS["eigenvalues"][CURVLINOPS][1],
            functools.partial(peers.curvlinops_eigenvalues, same, count=NUM_EIGENVALUES),
        )
    return rivals


def check_agreement(problem: Problem, same: Any) -> None:
    """Raises RuntimeError unless the loss, and a Hessian-vector product, are the same in PyTorch.

    Args:
        problem: The network in JAX.
        same: Its `torch_peers.Problem`.
    """
    from benchmarks.curvature import torch_peers as peers  # noqa: PLC0415

    fun, params, batches = jax.jit(problem.fun), problem.params, problem.batches
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(REFERENCE_SEED), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    tangent = jax.tree.unflatten(structure, drawn)
    product = curvature.hvp(fun, params, batches)(tangent)
    theirs_loss, theirs = peers.loss_and_product(same, peers.tensors(problem.model, tangent))
    loss = float(np.mean([fun(params, batch) for batch in batches]))
    pairs = zip(peers.tensors(problem.model, product), theirs, strict=True)
    distance = math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in pairs))
    norm = float(optax.tree.norm(product))
    if not (abs(loss - theirs_loss) <= 1e-5 and distance <= 1e-3 * norm):
        raise RuntimeError(
            f"The network in PyTorch is another one: its loss is {theirs_loss:.7g}, not {loss:.7g}, and its "
            f"Hessian-vector product is {distance:.2g} away from one of norm {norm:.2g}."
        )


def _reference(problem: Problem) -> dict[str, Any]:
    """The exact trace, and eigenvalues with their residuals."""
    model, fun, params, batches = problem
    loss, key = jax.jit(fun), jax.random.key(REFERENCE_SEED)
    pairs = curvature.eigenvalues(key, loss, params, batches, k=NUM_EIGENVALUES, tol=REFERENCE_TOLERANCE)
    return {
        "loss": float(np.mean([loss(params, batch) for batch in batches])),
        "trace": exact_trace(model, batches),
        "eigenvalues": pairs.values.tolist(),
        "relative_residuals": (pairs.residuals / abs(pairs.values)).tolist(),
    }


def exact_trace(model: nnx.Module, batches: Sequence[Examples]) -> float:
    """The trace of the Hessian of the mean cross-entropy, without sampling.

    The outputs z of a network of ReLUs are piecewise linear in each single weight, so that the diagonal of
    the Hessian is that of the Gauss-Newton matrix. With p = softmax(z), its trace is the mean over the
    examples of

        sum_c p_c || grad (z_c - sum_d p_d z_d) ||^2,    p being held constant.

    Args:
        model: The network, in evaluation mode.
        batches: The data.

    Returns:
        The trace.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types it so

    def weighted(params: nnx.State, image: jax.Array) -> jax.Array:
        outputs = nnx.merge(graphdef, params, rest, copy=True)(image[None])[0]
        shares = jax.lax.stop_gradient(jax.nn.softmax(outputs))
        return jnp.sqrt(shares) * (outputs - shares @ outputs)

    def squares(params: nnx.State, image: jax.Array) -> jax.Array:
        return optax.tree.norm(jax.jacrev(weighted)(params, image), squared=True)

    each = jax.jit(jax.vmap(squares, in_axes=(None, 0)))
    images = np.concatenate([batch.inputs for batch in batches])
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    return float(np.mean(np.concatenate([each(params, chunk) for chunk in chunks]), dtype=np.float64))


def _trace_records(
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


def _eigenvalue_records(
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
        for seed in range(EIGENVALUE_SEEDS):
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


def _add_first_calls(problem: Problem, records: dict[str, dict[Key, dict[str, Any]]]) -> None:
    """Adds what compiling takes, with nothing compiled before."""
    for task, base in BASES.items():
        record = records[task][base]
        if record["seconds"] is None:
            continue
        jax.clear_caches()
        library = _ours(problem)
        if task == "trace":
            _, seconds = _timed(functools.partial(library.traces[base[1]], 0, record["products"]))
        else:
            _, seconds = _timed(functools.partial(library.eigenvalues, 0, record["rungs"][-1]["tolerance"]))
        record["first_call_seconds"] = seconds - record["seconds"]["median"]


def _pyhessian_defaults(problem: Problem, reference: dict[str, Any]) -> dict[str, Any]:
    """How far PyHessian comes without settings."""
    from benchmarks.curvature import torch_peers as peers  # noqa: PLC0415

    same = peers.problem(problem.model, problem.batches, str(jax_steps.torch_device()))
    most, tol = int(PYHESSIAN_DEFAULTS["maxIter"]), PYHESSIAN_DEFAULTS["tol"]
    probes = [peers.pyhessian_probes(same, seed, most, tol) for seed in range(EIGENVALUE_SEEDS)]
    values, products = peers.pyhessian_eigenvalues(same, 0, tol, NUM_EIGENVALUES, most)
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


def _compared(task: str, records: dict[Key, dict[str, Any]]) -> dict[str, float]:
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


def _cells(record: dict[str, Any]) -> list[str]:
    about = "~" if record["extrapolated"] else ""
    method = f"{record['library']}, {METHODS.get(record['method'], record['method'])}"
    if record["seconds"] is None:
        return [method, "-", "-", "-", "-"]
    seconds, times = record["seconds"]["median"], record.get("times_ours")
    first = record.get("first_call_seconds")
    return [
        method,
        f"{about}{record['products']:,}",
        about + _short(seconds),
        "-" if times is None else about + _short(times),
        "-" if first is None else _short(first),
    ]


def _short(value: float) -> str:
    """Two significant digits, and no exponent."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _range(results: dict[str, Any], key: str) -> str:
    return " or ".join(map(str, dict.fromkeys(network[key] for network in results["networks"].values())))


def _defaults_text(network: dict[str, Any]) -> str:
    found = network.get("pyhessian_defaults")
    if found is None:
        return ""
    products = found["trace_products"]
    return (
        f"PyHessian's defaults on the {network['title']}: a trace off by up to "
        f"{100 * max(map(abs, found['trace_errors'])):.1f} %, after {min(products)} to {max(products)} "
        f"products; an eigenvalue by {100 * found['eigenvalue_error']:.1g} %."
    )


def _draw(panel: Axes, record: dict[str, Any]) -> None:
    colour = COLOURS[record["library"]]
    if not record["extrapolated"]:
        seconds = [point["seconds"] for point in record["curve"]]
        errors = [100 * point["relative_error"] for point in record["curve"]]
        panel.plot(seconds, errors, color=colour, marker=MARKERS[record["method"]], markersize=5)
        return
    # From the first of our numbers of products to where the error is small enough.
    numbers = np.array([NUMBERS[0], record["products"]])
    errors = 100 * record["relative_deviation"] / np.sqrt(numbers)
    panel.plot(
        record["seconds"]["median"] * numbers / record["products"], errors, color=colour, linestyle="--"
    )


def _label(panel: Axes, networks: Sequence[dict[str, Any]]) -> None:
    """Names each colour and each line once."""
    shown = {record["library"] for network in networks for record in network["trace"]}
    for library, colour in COLOURS.items():
        if library in shown:
            panel.plot([], [], color=colour, linewidth=4, label=library)
    for method, marker in MARKERS.items():
        panel.plot([], [], color="#666666", marker=marker, markersize=5, label=METHODS[method])
    panel.plot([], [], color="#666666", linestyle="--", label=METHODS["hutchinson"])


def _settings() -> dict[str, Any]:
    packages = PACKAGES if jax_steps.torch_device() else {}
    return {
        "examples": NUM_EXAMPLES,
        "batches": NUM_BATCHES,
        "epochs": EPOCHS,
        "training_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "momentum": methods.MOMENTUM,
        "trace_target": TRACE_TARGET,
        "eigenvalues": NUM_EIGENVALUES,
        "eigenvalue_target": EIGENVALUE_TARGET,
        "eigenvalue_seeds": EIGENVALUE_SEEDS,
        "hutchinson_products": HUTCHINSON_PRODUCTS,
        "rivals": {name: _version(package) for name, package in packages.items()},
        "pyhessian_defaults": PYHESSIAN_DEFAULTS,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
