"""Methods side by side on one task: tuned alike, trained from several seeds, and their curvature measured.

Where a front is wanted every strength of every method is trained and measured, with the learning rate that
suits it: see `fronts`.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.progress import Progress

from benchmarks.kit import timing
from benchmarks.kit.files import UserError
from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Count, OwnCount, Resumable
from benchmarks.tasks import data
from benchmarks.tasks.data import Examples
from benchmarks.training import loop, measuring
from benchmarks.training.loop import Settings, Task, Trained
from benchmarks.training.measuring import Gauge
from benchmarks.training.methods import COMPARED, METHODS, Method, Name
from nso_jax import curvature

TUNING_SEED = 100  # and those after it; they draw other examples than the seeds of the results


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
        further: Figures of a trained model on a split that the task has beside loss and accuracy.
        rates: What methods multiply learning rates by, where it is not what `METHODS` says.
    """

    name: str
    task: Task
    split: Callable[[int], Split]
    strengths: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    further: Callable[[nnx.Module, Split], dict[str, float]] = lambda *_: {}
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def sizes(self) -> dict[str, Any]:
        """What it is called, and how many examples each part of a split has, ready for JSON."""
        parts = self.split(0)._asdict().items()
        return {"name": self.name, **{part: len(examples.labels) for part, examples in parts}}

    def methods(self, names: Sequence[str]) -> dict[str, Method]:
        """The methods of these names, plain training first."""
        made = {
            name: METHODS[name]._replace(
                strengths=self.strengths.get(name, METHODS[name].strengths),
                rate=self.rates.get(name, METHODS[name].rate),
            )
            for name in sorted(dict.fromkeys(names), key=list(METHODS).index)
        }
        return dict(sorted(made.items(), key=lambda item: item[1].optimizer is not self.task.optimizer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Resumable):
    """How methods are compared.

    Attributes:
        methods: What to compare.
        gradients: Gradient evaluations of a training, whatever the method.
        batch_size: Examples in a batch.
        rates: Learning rates to try with each of a method's strengths.
        weight_decays: Weight decays to try where a method has no strength; plain SGD's or Adam's is for all.
        front: Measure every strength of a method, not only the chosen one.
        seeds: Trainings of each method with a strength for the results.
        tuning_seeds: Trainings of each method with each strength and rate that is tried.
        points: How often to measure in a training of the chosen strength.
        point_products: Hessian-vector products for a trace on the way.
        final_products: The most of them for a trace at the end.
        rtol: Its standard error, over the trace, that is small enough.
        trace_method: How it is estimated: see `nso_jax.curvature.trace`.
        eigenvalue_tol: The largest eigenvalue's residual, over it, that is small enough.
        curvature_examples: Of those to train on, the ones whose loss has the Hessian; all by default.
    """

    methods: tuple[Name, ...] = COMPARED
    gradients: Count = 480
    batch_size: Count = 48
    rates: tuple[float, ...] = (0.05, 0.1)
    weight_decays: tuple[float, ...] = (1e-3, 5e-3, 2e-2)
    front: bool = True
    seeds: Count = 5
    tuning_seeds: Count = 2
    points: Count = 8
    point_products: Count = 10
    final_products: Count = 60
    rtol: float = 0.02
    trace_method: Literal["xtrace", "hutchinson"] = "xtrace"
    eigenvalue_tol: float = 1e-3
    curvature_examples: OwnCount = None

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

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> "Knobs":
        """Those of a run."""
        return cls(*(run[name] for name in cls._fields))

    def settings(self, gradients: int, seed: int, num_points: int = 1) -> Settings:
        """Those of a training with them."""
        return Settings(
            gradients, self.rate, self.weight_decay, self.strength, seed=seed, num_points=num_points
        )


class Trainings:
    """Those of a study, each under a name of its own: what the journal has is not done again."""

    def __init__(
        self,
        problem: Problem,
        methods: Mapping[str, Method],
        options: Options,
        journal: Journal,
        progress: Progress,
    ) -> None:
        """Trains nothing yet.

        Args:
            problem: What to learn.
            methods: By which, plain training first.
            options: How long, and what is measured.
            journal: What was done before is taken from it.
            progress: Where to show how far it is.
        """
        self._problem, self._methods, self._options = problem, methods, options
        self._journal, self._progress = journal, progress
        self._shown = progress.add_task(problem.name, total=None)
        graphdef, _ = measuring.split_network(problem.task.model(0))
        self._gauge = measuring.gauge(graphdef, problem.task.loss, problem.task.accuracy, problem.task.chunk)

    def announce(self, what: str, number: int) -> None:
        """Says how long they will take.

        Args:
            what: They are, in words.
            number: How many there are.
        """
        gradients, plain = self._options.gradients, next(iter(self._methods.values()))
        seconds = number * gradients * seconds_of_a_gradient(self._problem.task, plain, self._options)
        self._progress.console.print(
            f"{self._problem.name}: {what}, of {gradients} gradients each: about {math.ceil(seconds / 60)} "
            "minutes here in all, and what compiling and measuring take. Stopped at any moment, it goes on "
            "by --resume.",
            highlight=False,
            soft_wrap=True,
        )
        self._progress.update(self._shown, total=number * gradients)

    def figures(
        self, name: str, knobs: Knobs, seed: int, train: Callable[..., dict[str, Any]], points: int = 1
    ) -> dict[str, Any]:
        """Those of a training.

        Args:
            name: The method's.
            knobs: Its settings.
            seed: Of the examples, their order, the weights and the noise.
            train: `train_and_evaluate` or `train_and_measure`.
            points: How often to measure.
        """
        title = f"{name} {knobs.strength:g}, rate {knobs.rate:g}, decay {knobs.weight_decay:g}, seed {seed}"
        advance = functools.partial(self._progress.advance, self._shown)
        compute = functools.partial(
            train,
            self._problem,
            self._methods[name],
            knobs.settings(self._options.gradients, seed, points),
            self._options,
            gauge=self._gauge,
            journal=self._journal,
            advance=advance,
        )
        if self._journal.done(title):
            advance(self._options.gradients)
        measured = self._journal.once(title, compute, functools.partial(tell, self._progress, title))
        return {"method": name, **knobs._asdict(), "seed": seed, **measured}


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
    tuned, measured = numbers_of_trainings(methods, options)
    what = f"{tuned} trainings to choose by and {measured} to measure"
    trainings = Trainings(problem, methods, options, journal, progress)
    trainings.announce(what, tuned + measured)

    tuning: list[dict[str, Any]] = []
    chosen: dict[str, Knobs] = {}
    tried: list[tuple[str, Knobs]] = []
    seeds = range(TUNING_SEED, TUNING_SEED + options.tuning_seeds)
    for name, method in methods.items():
        plain = next(iter(chosen.values()), None)
        settings = itertools.product(grid(method, options, plain and plain.weight_decay), seeds)
        runs = [trainings.figures(name, knobs, seed, train_and_evaluate) for knobs, seed in settings]
        tuning += runs
        chosen[name] = choose(runs)
        strengths = method.strengths if options.front else (chosen[name].strength,)
        tried += [(name, choose([run for run in runs if run["strength"] == s])) for s in strengths]
    runs = [
        trainings.figures(
            name, knobs, seed, train_and_measure, options.points if knobs == chosen[name] else 1
        )
        for (name, knobs), seed in itertools.product(tried, range(options.seeds))
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


def numbers_of_trainings(methods: Mapping[str, Method], options: Options) -> tuple[int, int]:
    """How many trainings choose the knobs, and how many are measured."""
    tuned = sum(len(grid(method, options)) for method in methods.values())
    measured = sum(len(method.strengths) if options.front else 1 for method in methods.values())
    return tuned * options.tuning_seeds, measured * options.seeds


@functools.cache  # so that a study that tells more of its own cost measures once
def seconds_of_a_gradient(task: Task, method: Method, options: Options) -> float:
    """Those that a step takes here, over its gradients; the median of a few steps, after compiling."""
    steps = loop.compiled(task, method, options.gradients, "constant")
    state = loop.initial_state(task, method, Settings(options.gradients, options.rates[0]))
    key, batch = jax.random.key(0), next(task.batches(0, 0))
    calls = {"step": lambda: steps.step(state, key, batch)}
    taken = timing.interleaved(calls, 3, advance=lambda: None)["step"]
    return statistics.median(taken) / method.gradients_per_step


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
        by_knobs.setdefault(Knobs.of(run), []).append(run["validation_loss"])
    means = {knobs: statistics.mean(losses) for knobs, losses in by_knobs.items()}
    # A training that diverged has no loss, and NaN is neither less nor more than a number.
    return min(means, key=lambda knobs: means[knobs] if math.isfinite(means[knobs]) else math.inf)


def train_and_evaluate(
    problem: Problem,
    method: Method,
    settings: Settings,
    _: Options,
    *,
    gauge: Gauge,
    parts: Sequence[str] = ("validation",),
    **keywords: Any,
) -> dict[str, Any]:
    """Trains once and evaluates on parts of the split, by default that by which settings are chosen."""
    trained = loop.train(problem.task, method, settings, **keywords)
    return _figures(trained, gauge, problem.split(settings.seed), parts)


def train_and_measure(
    problem: Problem,
    method: Method,
    settings: Settings,
    options: Options,
    *,
    gauge: Gauge,
    **keywords: Any,
) -> dict[str, Any]:
    """Trains once, and measures all that is reported, on the way too if at more than one point."""
    split = problem.split(settings.seed)

    def measure(model: nnx.Module) -> dict[str, float]:
        return measure_point(gauge, model, split, options) if settings.num_points > 1 else {}

    trained = loop.train(problem.task, method, settings, measure=measure, **keywords)
    figures = _figures(trained, gauge, split)
    if not math.isfinite(figures["validation_loss"]):
        return figures | {"curve": trained.curve}  # it diverged: there is no curvature
    figures |= measure_end(gauge, trained.model, split, options) | problem.further(trained.model, split)
    return figures | {"curve": trained.curve}


def _figures(
    trained: Trained, gauge: Gauge, split: Split, parts: Sequence[str] = ("validation",)
) -> dict[str, Any]:
    figures = {"evaluations": trained.curve[-1]["evaluations"], "seconds": trained.seconds}
    for part in parts:
        figures |= evaluated(gauge, trained.model, getattr(split, part), part)
    return figures


def measure_point(gauge: Gauge, model: nnx.Module, split: Split, options: Options) -> dict[str, float]:
    """The figures followed over training."""
    trace = _trace(gauge, model, split, options, num_products=options.point_products)
    return {
        **evaluated(gauge, model, split.train, "train"),
        **evaluated(gauge, model, split.test, "test"),
        "trace": trace.value,
    }


def measure_end(gauge: Gauge, model: nnx.Module, split: Split, options: Options) -> dict[str, float]:
    """The figures at the end, with the largest eigenvalue of the training loss's Hessian."""
    products = {"num_products": options.final_products, "rtol": options.rtol}
    trace = _trace(gauge, model, split, options, **products)
    params, batches = _curved(gauge, model, split, options)
    key, tol = jax.random.key(0), options.eigenvalue_tol
    pairs = curvature.eigenvalues(key, gauge.hessian(params, batches), k=1, tol=tol)
    return {
        **evaluated(gauge, model, split.train, "train"),
        **evaluated(gauge, model, split.test, "test"),
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
        "largest_eigenvalue": float(pairs.values[0]),
    }


def accuracy(model: nnx.Module, examples: Examples) -> float:
    """The share of the examples that a model gets right."""
    gauge = measuring.gauge(measuring.split_network(model)[0])
    return evaluated(gauge, model, examples, "")["_accuracy"]


def _trace(
    gauge: Gauge, model: nnx.Module, split: Split, options: Options, **products: Any
) -> curvature.Estimate:
    # The same probes for all networks, so that differences between them are less noisy than each.
    key, h = jax.random.key(0), gauge.hessian(*_curved(gauge, model, split, options))
    return curvature.trace(key, h, method=options.trace_method, **products)


def _curved(
    gauge: Gauge, model: nnx.Module, split: Split, options: Options
) -> tuple[nnx.State, list[tuple[Examples, nnx.State]]]:
    """The weights, and the examples whose loss has the Hessian."""
    return _batches(gauge, model, data.part(split.train, 0, options.curvature_examples))


def evaluated(gauge: Gauge, model: nnx.Module, examples: Examples, part: str) -> dict[str, float]:
    """A model's accuracy and loss on the examples of a part, named after it."""
    params, batches = _batches(gauge, model, examples)
    sizes = [len(batch.labels) for batch, _ in batches]

    def mean(fun: Callable[..., jax.Array]) -> float:
        return float(np.average([fun(params, batch) for batch in batches], weights=sizes))

    return {f"{part}_accuracy": mean(gauge.accuracy), f"{part}_loss": mean(gauge.loss)}


def _batches(
    gauge: Gauge, model: nnx.Module, examples: Examples
) -> tuple[nnx.State, list[tuple[Examples, nnx.State]]]:
    """The weights, and the examples in parts, each with the rest of the model's state."""
    params, rest = measuring.split_network(model)[1]
    starts = range(0, len(examples.labels), gauge.chunk)
    return params, [(data.part(examples, first, first + gauge.chunk), rest) for first in starts]


def tell(progress: Progress, title: str, figures: dict[str, Any]) -> None:
    """Shows the figures of a training in a line."""
    text = f"{title}: validation {100 * figures['validation_accuracy']:.1f} %"
    if "trace" in figures:
        text += (
            f", test {100 * figures['test_accuracy']:.1f} %, trace {figures['trace']:.3g}, "
            f"eigenvalue {figures['largest_eigenvalue']:.3g}"
        )
    progress.console.print(f"{text}, {figures['seconds']:.1f} s", highlight=False, soft_wrap=True)
