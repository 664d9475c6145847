"""Methods side by side on one task: tuned alike, trained from several seeds, and their curvature measured."""

import collections
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress

from benchmarks.kit import options, plots, tables
from benchmarks.kit.files import UserError
from benchmarks.kit.journal import Journal
from benchmarks.tasks import data
from benchmarks.tasks.data import Examples
from benchmarks.training import loop, measuring
from benchmarks.training.loop import Settings, Task, Trained
from benchmarks.training.measuring import Gauge
from benchmarks.training.methods import METHODS, Method, Name
from nso_jax import curvature

TUNING_SEED = 100  # and those after it; they draw other examples than the seeds of the results
CHUNK = 250  # examples evaluated at once
# In words; the demo's wp-sgd takes two draws in a step.
NOISES = {
    "wp-sgd": "one-sided noise, one draw and so one gradient in a step",
    "nso": "a pair of draws",
    "nso-relative": "a pair, in proportion to each weight",
    "nso-micro": "the same, anew in each of four microbatches",
    "wp-micro": "its one-sided form, one gradient in a step",
}
FAMILY = ("sam", "asam", "usam", "rsam")  # the rivals of the paper's claims


class Split(NamedTuple):
    """The examples of a seed: to train on, to choose by, and to report."""

    train: Examples
    validation: Examples
    test: Examples


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is to be learnt, and on which examples.

    Attributes:
        name: What it is called.
        task: The training.
        split: `split(seed)`.
        strengths: What is tried of the methods' strengths, where it is not what `METHODS` says.
    """

    name: str
    task: Task
    split: Callable[[int], Split]
    strengths: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def sizes(self) -> dict[str, Any]:
        """What it is called, and how many examples each part of a split has, ready for JSON."""
        parts = self.split(0)._asdict().items()
        return {"name": self.name, **{part: len(examples.labels) for part, examples in parts}}

    def methods(self, names: Sequence[str]) -> dict[str, Method]:
        """The methods of these names, plain training first."""
        made = {
            name: METHODS[name]._replace(strengths=self.strengths.get(name, METHODS[name].strengths))
            for name in sorted(dict.fromkeys(names), key=list(METHODS).index)
        }
        return dict(sorted(made.items(), key=lambda item: item[1].optimizer is not self.task.optimizer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options.Resumable):
    """How methods are compared.

    Attributes:
        methods: What to compare.
        gradients: Gradient evaluations of a training, whatever the method.
        batch_size: Examples in a batch.
        rates: Learning rates to try with each of a method's strengths.
        weight_decays: Weight decays to try where a method has no strength; plain SGD's or Adam's is for all.
        seeds: Trainings of each method for the results.
        tuning_seeds: Trainings of each method with each strength and rate that is tried.
        points: How often to measure in a training.
        point_products: Hessian-vector products for a trace on the way.
        final_products: The most of them for a trace at the end.
        rtol: Its standard error, over the trace, that is small enough.
        trace_method: How it is estimated: see `nso_jax.curvature.trace`.
        eigenvalue_tol: The largest eigenvalue's residual, over it, that is small enough.
    """

    methods: tuple[Name, ...] = get_args(Name)
    gradients: options.Count = 480
    batch_size: options.Count = 48
    rates: tuple[float, ...] = (0.05, 0.1)
    weight_decays: tuple[float, ...] = (1e-3, 5e-3, 2e-2)
    seeds: options.Count = 5
    tuning_seeds: options.Count = 2
    points: options.Count = 8
    point_products: options.Count = 10
    final_products: options.Count = 60
    rtol: float = 0.02
    trace_method: Literal["xtrace", "hutchinson"] = "xtrace"
    eigenvalue_tol: float = 1e-3

    def settings(self) -> dict[str, Any]:
        """What somebody needs to know to go on with the run or to repeat it, ready for JSON."""
        made = super().settings()
        # Of a source its name alone: where it lies is of no interest to others.
        return made | {key: data.name(made[key]) for key in ("data", "model") if made.get(key)}


class Knobs(NamedTuple):
    """What is tuned."""

    strength: float
    rate: float
    weight_decay: float

    def settings(self, gradients: int, seed: int, num_points: int = 1) -> Settings:
        """Those of a training with them."""
        return Settings(
            gradients, self.rate, self.weight_decay, self.strength, seed=seed, num_points=num_points
        )


def compare(problem: Problem, options: Options, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Tunes the methods on the validation examples, and then trains and measures them.

    Args:
        problem: What to learn.
        options: By which methods, how often and how long.
        journal: What was done before is taken from it.
        progress: Where to show how far it is.

    Returns:
        The figures, ready for JSON: `tuning`, `chosen` and `runs`.

    Raises:
        UserError: The gradients make no whole number of a method's steps.
    """
    methods = problem.methods(options.methods)
    for name, method in methods.items():
        if options.gradients % method.gradients_per_step:
            wanted = f"a multiple of {method.gradients_per_step}, what {name} takes in a step"
            raise UserError(f"argument --gradients: expected {wanted}, got {options.gradients}")
    number = sum(len(grid(method, options)) for method in methods.values()) * options.tuning_seeds
    total = (number + options.seeds * len(methods)) * options.gradients
    advance = functools.partial(progress.advance, progress.add_task(problem.name, total=total))
    gauge = measuring.gauge(measuring.split_network(problem.task.model(0))[0])

    def figures(name: str, knobs: Knobs, seed: int, *, tuned: bool) -> dict[str, Any]:
        title = f"{name} {knobs.strength:g}, rate {knobs.rate:g}, decay {knobs.weight_decay:g}, seed {seed}"
        settings = knobs.settings(options.gradients, seed, options.points if tuned else 1)
        train = train_and_measure if tuned else train_and_validate
        compute = functools.partial(
            train, problem, methods[name], settings, options, gauge=gauge, journal=journal, advance=advance
        )
        if journal.done(title):
            advance(options.gradients)
        measured = journal.once(title, compute, functools.partial(tell, progress, title))
        return {"method": name, **knobs._asdict(), "seed": seed, **measured}

    tuning: list[dict[str, Any]] = []
    chosen: dict[str, Knobs] = {}
    seeds = range(TUNING_SEED, TUNING_SEED + options.tuning_seeds)
    for name, method in methods.items():
        plain = next(iter(chosen.values()), None)
        tried = itertools.product(grid(method, options, plain and plain.weight_decay), seeds)
        runs = [figures(name, knobs, seed, tuned=False) for knobs, seed in tried]
        tuning += runs
        chosen[name] = choose(runs)
    runs = [
        figures(name, knobs, seed, tuned=True)
        for (name, knobs), seed in itertools.product(chosen.items(), range(options.seeds))
    ]
    assert len({run["evaluations"] for run in runs}) == 1, "methods differ in gradient evaluations"  # noqa: S101
    return {
        "name": problem.name,
        "settings": options.settings(),
        "data": problem.sizes(),
        "chosen": {
            name: {"gradients_per_step": methods[name].gradients_per_step, **knobs._asdict()}
            for name, knobs in chosen.items()
        },
        "tuning": tuning,
        "runs": runs,
    }


def grid(method: Method, options: Options, weight_decay: float | None = None) -> list[Knobs]:
    """What is tried: strengths and learning rates, or weight decays and these where there is one strength.

    Args:
        method: The method.
        options: Those of the comparison.
        weight_decay: That of methods with strengths; by default the first one.
    """
    if len(method.strengths) == 1:
        return [
            Knobs(method.strengths[0], *knobs)
            for knobs in itertools.product(options.rates, options.weight_decays)
        ]
    decay = options.weight_decays[0] if weight_decay is None else weight_decay
    return [Knobs(*knobs, decay) for knobs in itertools.product(method.strengths, options.rates)]


def choose(tuning: list[dict[str, Any]]) -> Knobs:
    """The knobs of the least mean validation loss, which tells more from few examples than the accuracy."""
    by_knobs: dict[Knobs, list[float]] = {}
    for run in tuning:
        by_knobs.setdefault(Knobs(*(run[name] for name in Knobs._fields)), []).append(run["validation_loss"])
    return min(by_knobs, key=lambda knobs: statistics.mean(by_knobs[knobs]))


def train_and_validate(
    problem: Problem,
    method: Method,
    settings: Settings,
    _: Options,
    *,
    gauge: Gauge,
    **keywords: Any,
) -> dict[str, Any]:
    """Trains once and evaluates on the validation examples alone, by which settings are chosen."""
    trained = loop.train(problem.task, method, settings, **keywords)
    return _figures(trained, gauge, problem.split(settings.seed))


def train_and_measure(
    problem: Problem,
    method: Method,
    settings: Settings,
    options: Options,
    *,
    gauge: Gauge,
    **keywords: Any,
) -> dict[str, Any]:
    """Trains once, and measures all that is reported, on the way too."""
    split = problem.split(settings.seed)

    def measure(model: nnx.Module) -> dict[str, float]:
        return measure_point(gauge, model, split, options)

    trained = loop.train(problem.task, method, settings, measure=measure, **keywords)
    figures = _figures(trained, gauge, split)
    return figures | measure_end(gauge, trained.model, split, options) | {"curve": trained.curve}


def _figures(trained: Trained, gauge: Gauge, split: Split) -> dict[str, Any]:
    return {
        "evaluations": trained.curve[-1]["evaluations"],
        "seconds": trained.seconds,
        **_evaluated(gauge, trained.model, split.validation, "validation"),
    }


def measure_point(gauge: Gauge, model: nnx.Module, split: Split, options: Options) -> dict[str, float]:
    """The figures followed over training."""
    trace = _trace(gauge, model, split.train, options, num_products=options.point_products)
    return {
        **_evaluated(gauge, model, split.train, "train"),
        **_evaluated(gauge, model, split.test, "test"),
        "trace": trace.value,
    }


def measure_end(gauge: Gauge, model: nnx.Module, split: Split, options: Options) -> dict[str, float]:
    """The figures at the end, with the largest eigenvalue of the training loss's Hessian."""
    products = {"num_products": options.final_products, "rtol": options.rtol}
    trace = _trace(gauge, model, split.train, options, **products)
    params, batches = _batches(model, split.train)
    key, tol = jax.random.key(0), options.eigenvalue_tol
    pairs = curvature.eigenvalues(key, gauge.loss, params, batches, k=1, tol=tol)
    return {
        **_evaluated(gauge, model, split.train, "train"),
        **_evaluated(gauge, model, split.test, "test"),
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
        "largest_eigenvalue": float(pairs.values[0]),
    }


def accuracy(model: nnx.Module, examples: Examples) -> float:
    """The share of the examples that a model gets right."""
    gauge = measuring.gauge(measuring.split_network(model)[0])
    return _evaluated(gauge, model, examples, "")["_accuracy"]


def _trace(
    gauge: Gauge, model: nnx.Module, examples: Examples, options: Options, **products: Any
) -> curvature.Estimate:
    # The same probes for all networks, so that differences between them are less noisy than each.
    key, (params, batches) = jax.random.key(0), _batches(model, examples)
    return curvature.trace(key, gauge.loss, params, batches, method=options.trace_method, **products)


def _evaluated(gauge: Gauge, model: nnx.Module, examples: Examples, part: str) -> dict[str, float]:
    params, batches = _batches(model, examples)
    sizes = [len(batch.labels) for batch, _ in batches]

    def mean(fun: Callable[..., jax.Array]) -> float:
        return float(np.average([fun(params, batch) for batch in batches], weights=sizes))

    return {f"{part}_accuracy": mean(gauge.accuracy), f"{part}_loss": mean(gauge.loss)}


def _batches(model: nnx.Module, examples: Examples) -> tuple[nnx.State, list[tuple[Examples, nnx.State]]]:
    """The weights, and the examples in parts, each with the rest of the model's state."""
    params, rest = measuring.split_network(model)[1]
    starts = range(0, len(examples.labels), CHUNK)
    return params, [(data.part(examples, first, first + CHUNK), rest) for first in starts]


def tell(progress: Progress, title: str, figures: dict[str, Any]) -> None:
    """Shows the figures of a training in a line."""
    text = f"{title}: validation {100 * figures['validation_accuracy']:.1f} %"
    if "trace" in figures:
        text += (
            f", test {100 * figures['test_accuracy']:.1f} %, trace {figures['trace']:.3g}, "
            f"eigenvalue {figures['largest_eigenvalue']:.3g}"
        )
    progress.console.print(f"{text}, {figures['seconds']:.1f} s", highlight=False, soft_wrap=True)


HEADERS: tuple[str, ...] = (
    "method",
    "strength",
    "rate",
    "test accuracy (%)",
    "Hessian trace",
    "largest eigenvalue",
)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each method, with means and 95 % intervals over the seeds."""
    return [_row(name, results) for name in results["chosen"]]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, sizes, machine = results["settings"], results["data"], results["machine"]
    tried = collections.Counter(run["method"] for run in results["tuning"])
    fewest, most = (count // settings["tuning_seeds"] for count in (min(tried.values()), max(tried.values())))
    return (
        f"Mean ± 95 % interval over {settings['seeds']} seeds: of the {sizes['train']} examples to train on, "
        "their order, the weights that are not pretrained, and the noise. "
        f"{sizes['test']:,} examples to test on. Every method takes {settings['gradients']} gradient "
        f"evaluations on {settings['batch_size']} examples each{_steps(results)}. "
        f"Strength and rate: of the least loss on {sizes['validation']} validation examples, a mean over "
        f"{settings['tuning_seeds']} other seeds, of {fewest} to {most} pairs for a method. "
        "Trace and eigenvalue: of the Hessian of the loss over all training examples, at the end. "
        f"{_named(results)}On {machine['cpu_count']} CPU cores ({machine['device']}).\n\n{claims(results)}"
    ).strip()


def _named(results: dict[str, Any]) -> str:
    """What the names of the ways to use noise mean, for those that are there."""
    told = [f"{name}: {NOISES[name]}" for name in results["chosen"] if name in NOISES]
    return f"{'; '.join(told)}. " if told else ""


def _steps(results: dict[str, Any]) -> str:
    """How many gradients the methods take in a step, unless it is one for all."""
    names: dict[int, list[str]] = {}
    for name, knobs in results["chosen"].items():
        names.setdefault(knobs["gradients_per_step"], []).append(name)
    told = [f"{count} in a step by {', '.join(of)}" for count, of in sorted(names.items()) if count > 1]
    return f" ({'; '.join(told)})" if told else ""


def claims(results: dict[str, Any]) -> str:
    """What the run says about the paper's claims and ours, as a list in Markdown."""
    family = [name for name in FAMILY if name in results["chosen"]]
    ours = [name for name in results["chosen"] if METHODS[name].is_noise]
    if not family or not ours:
        return ""
    told = []
    for figure, what in (("trace", "Hessian trace"), ("largest_eigenvalue", "largest eigenvalue")):
        rival = min(family, key=lambda name: statistics.mean(_column(results, name, figure)))
        against = ", ".join(f"{name} {_against(results, name, rival, figure)}" for name in ours)
        told.append(f"- The {what}, against that of {rival}, the lowest of SAM's family: {against}.")
    rival = max(family, key=lambda name: statistics.mean(_column(results, name, "test_accuracy")))
    others = [rival, next(iter(results["chosen"]))]
    ahead = ", ".join(
        f"{name} " + " and ".join(_ahead(results, name, other) for other in others) for name in ours
    )
    told.append(f"- Points of accuracy ahead of {' and '.join(others)}, seed by seed: {ahead}.")
    return "\n".join(told)


def plot(results: dict[str, Any]) -> bytes:
    """Accuracy and trace at the end, with 95 % intervals, and the trace on the way if followed, as PNG."""
    names, seeds = list(results["chosen"]), results["settings"]["seeds"]
    followed = len(results["runs"][0]["curve"]) > 1
    height = 1.3 + 0.26 * len(names)
    figure = Figure(figsize=(plots.WIDTH, height + 3.6 * followed), layout="constrained")
    grid = figure.add_gridspec(1 + followed, 2, height_ratios=[height, 3.2][: 1 + followed])
    accuracy = figure.add_subplot(grid[0, 0])
    trace = figure.add_subplot(grid[0, 1], sharey=accuracy)
    for axes, of, scale in ((accuracy, "test_accuracy", 100), (trace, "trace", 1)):
        columns = {name: [scale * x for x in _column(results, name, of)] for name in names}
        rows = [plots.Row(plots.title(name), columns[name], plots.colour(name)) for name in names]
        plots.dots(axes, rows, log=of == "trace")
    trace.tick_params(labelleft=False)
    accuracy.set(title="Accuracy: right is better", xlabel="test accuracy (%)")
    trace.set(title="Trace: left is flatter", xlabel="Hessian trace (log scale)")
    figure.suptitle(f"At the end: mean and 95 % interval, {seeds} seeds", fontsize="large")
    if not followed:
        return plots.finish(figure)
    way = figure.add_subplot(grid[1, :])
    for name in filter(plots.FOLLOWED.__contains__, names):
        runs = _runs(results, name)
        x = [point["evaluations"] for point in runs[0]["curve"]]
        curves = [[point["trace"] for point in run["curve"]] for run in runs]
        plots.band(way, name, x, curves, log=True, spread=plots.interval)
    way.set(title="The trace on the way there: geometric mean, 95 % band", xlabel="gradient evaluations")
    way.set(ylabel="Hessian trace (log scale)", yscale="log")
    plots.label_log_axis(way.yaxis)
    return plots.finish(figure, way)


def _row(name: str, results: dict[str, Any]) -> list[str]:
    knobs = results["chosen"][name]
    return [
        name,
        f"{knobs['strength']:g}" if len(METHODS[name].strengths) > 1 else "",
        f"{knobs['rate']:g}",
        *cells(_runs(results, name)),
    ]


def cells(runs: list[dict[str, Any]]) -> list[str]:
    """Test accuracy in percent, trace and largest eigenvalue, each with its 95 % interval."""
    columns = ([run[name] for run in runs] for name in ("test_accuracy", "trace", "largest_eigenvalue"))
    accuracy, *others = (np.array(column) for column in columns)
    return [_with_interval(values) for values in (100 * accuracy, *others)]


def _against(results: dict[str, Any], name: str, rival: str, figure: str) -> str:
    """By how many percent the geometric mean differs, and its 95 % interval, from each seed's ratio."""
    mine, theirs = (np.log(_column(results, of, figure)) for of in (name, rival))
    difference = mine - theirs
    mean, width = difference.mean(), plots.interval(difference)
    low, middle, high = (round(100 * math.expm1(mean + shift)) for shift in (-width, 0, width))
    ends = (low, high) if middle > 0 else (high, low)
    if low < 0 < high:
        return f"{_word(middle)} (from {_word(ends[0])} to {_word(ends[1])})"
    return f"{_word(middle)} ({abs(ends[0])} to {abs(ends[1])})"


def _word(percent: int) -> str:
    """`88 % higher` or `12 % lower`: a minus sign is easily missed."""
    return f"{abs(percent)} % {'higher' if percent > 0 else 'lower'}" if percent else "the same"


def _ahead(results: dict[str, Any], name: str, rival: str) -> str:
    mine, theirs = (np.array(_column(results, of, "test_accuracy")) for of in (name, rival))
    difference = 100 * (mine - theirs)
    return f"{difference.mean():+.1f} ± {plots.interval(difference):.1f}"


def _with_interval(values: np.ndarray) -> str:
    return tables.with_error(float(values.mean()), float(plots.interval(values)) if len(values) > 1 else None)


def _column(results: dict[str, Any], name: str, figure: str) -> list[float]:
    return [run[figure] for run in _runs(results, name)]


def _runs(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if run["method"] == name]
