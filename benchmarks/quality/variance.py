"""Fresh noise for each part of a batch: what it does to the gradient's variance, and what that is worth."""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

import nso_jax
from benchmarks.kit import options, plots
from benchmarks.tasks import data, models
from benchmarks.tasks.data import Examples, Split
from benchmarks.training import loop, measuring
from benchmarks.training.loop import Settings, Task
from benchmarks.training.measuring import Gauge, Network
from benchmarks.training.methods import METHODS, MOMENTUM, Method, nso
from nso_jax import noise, parallel
from nso_jax.noise import Sigma

MEASURED_WIDTHS = (64, 64, 10)
PARTS = (1, 2, 4, 8)
REFERENCE_DRAWS = 4  # times as many for what the other variances are divided by
NUM_EXAMPLES = 512
WARM_UP_STEPS = 100
WARM_UP_RATE = 0.1

TRAINED_WIDTHS = (64, 128, 128, 10)
BATCH_SIZE = 64
NUM_PRODUCTS = 100

CASE_COLOURS = (plots.BLUE, plots.VERMILLION, plots.PURPLE)
COUNT_COLOURS = (plots.SKY, plots.GREEN, plots.BLUE)
SHOWN = 7  # points of accuracy that a picture has room for

HEADERS = (
    "what",
    "parts",
    "variance times microbatches",
    "variance times devices",
    "test accuracy (%)",
    "Hessian trace",
)

Loss = Callable[[nnx.State, Examples], jax.Array]
Flat = Callable[[jax.Array, nnx.State, Examples], jax.Array]


class Case(NamedTuple):
    """A noise whose variance is measured.

    Attributes:
        sigma: The noise.
        num_distinct: How many of the examples differ. With an eighth of them, all parts have the same.
    """

    sigma: Sigma
    num_distinct: int = NUM_EXAMPLES


class Digits(NamedTuple):
    """Digits to learn, and what all methods have in common.

    Attributes:
        num_train: Images to train on.
        wrong_labels: The share of them with a wrong label.
        learning_rate: Where the cosine schedule starts.
        weight_decay: That of each method.
    """

    num_train: int
    wrong_labels: float
    learning_rate: float
    weight_decay: dict[str, float]


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    standard_error: float


CASES = {
    "relative 0.8": Case(noise.relative(0.8)),
    "sigma 0.05": Case(0.05),
    "0.05, same digits": Case(0.05, num_distinct=NUM_EXAMPLES // max(PARTS)),
}

# Picked by the accuracy on the validation images, a mean over the seeds 100 to 109. SGD: learning rates of
# .05, .1, .2, .4 with weight decays from 0 to 5e-2. SAM, and NSO with 1, 4 and 16 microbatches: these rates
# with one weight decay and three weight decays with one rate, each with several of RHOS or SCALES. Methods
# share a value where no other was better by more than .3 points.
TASKS = {
    "right": Digits(200, 0.0, learning_rate=0.1, weight_decay={"sgd": 1e-3, "sam": 1e-3, "nso": 1e-3}),
    "20 % wrong": Digits(400, 0.2, learning_rate=0.1, weight_decay={"sgd": 2e-2, "sam": 5e-3, "nso": 5e-3}),
}
RHOS = (0.1, 0.2, 0.35, 0.5, 0.7)
Microbatches = Literal[1, 4, 16]
SCALES = (0.5, 0.65, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class Options(options.Output):
    """Measures the variance of the averaged gradient, and trains with fresh noise for parts of a batch.

    Attributes:
        draws: Gradients that a variance is estimated from.
        seeds: Trainings of each kind.
        steps: Steps of two gradients (sgd: twice as many of one).
        microbatches: Numbers of parts to train with.
    """

    draws: Annotated[int, options.at_least(2)] = 400
    seeds: options.Count = 5
    steps: options.Count = 600
    microbatches: tuple[Microbatches, ...] = get_args(Microbatches)


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Measures the variance of the gradient's estimate, and trains with estimates that differ in it.

    Args:
        options: The settings.
        progress: Where to show how far it is.

    Returns:
        All figures, ready for JSON.
    """
    methods = _methods(options.microbatches)
    trainings = len(TASKS) * options.seeds * sum(len(method.strengths) for method in methods.values())
    shown = progress.add_task("variance", total=2 * len(CASES) * len(PARTS) + trainings)
    advance = functools.partial(progress.advance, shown)
    settings = {
        "draws": options.draws,
        "reference_draws": REFERENCE_DRAWS * options.draws,
        "seeds": options.seeds,
        "microbatches": list(options.microbatches),
        "gradient_evaluations": 2 * options.steps,
        "batch_size": BATCH_SIZE,
        "momentum": MOMENTUM,
        "measured_widths": list(MEASURED_WIDTHS),
        "trained_widths": list(TRAINED_WIDTHS),
        "num_examples": NUM_EXAMPLES,
        "warm_up_steps": WARM_UP_STEPS,
        "num_test": data.NUM_TEST,
        "products": NUM_PRODUCTS,
        "tasks": {name: digits._asdict() for name, digits in TASKS.items()},
    }
    return {
        "settings": settings,
        "variance": list(_variances(options.draws, advance)),
        "training": list(_trainings(methods, options, advance)),
    }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The variances, times the number of parts; then what each method reaches at its best strength."""
    variances = [
        [
            row["case"],
            str(row["parts"]),
            _with_error(row["microbatches"]),
            _with_error(row["devices"]),
            "",
            "",
        ]
        for row in results["variance"]
    ]
    trainings = [
        [
            f"{row['task']}: {row['method']} {row['strength'] or ''}".rstrip(),
            str(row["num_microbatches"] or ""),
            "",
            "",
            _spread([100 * accuracy for accuracy in row["test_accuracy"]]),
            _spread(row["trace"]),
        ]
        for row in results["training"]
        if row["best"]
    ]
    return variances + trainings


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings = results["settings"]
    # One network for both, in results of before.
    widths = [settings.get(f"{of}_widths", settings.get("widths")) for of in ("measured", "trained")]
    measured, trained = (", ".join(map(str, each)) for each in widths)
    tasks = ". ".join(
        f"Labels {name}: {task['num_train']} images, learning rate {task['learning_rate']:g}, "
        "weight decay " + ", ".join(f"{decay:g} ({method})" for method, decay in task["weight_decay"].items())
        for name, task in settings["tasks"].items()
    )
    return (
        f"Variance: of the gradient's estimate for {settings['num_examples']} digits, with one pair of draws "
        "for each part of them, microbatches or shares of simulated devices; over the variance with one "
        f"part, times the number of parts, ± standard error, from {settings['draws']:,} estimates, and "
        f"{settings['reference_draws']:,} with one part. It is 1 if only the number of draws counts, and "
        "more where the noise's effect differs between the parts' digits. The network is an MLP "
        f"({measured}) after {settings['warm_up_steps']} plain steps. Relative: noise over weight. Below, of "
        f"an MLP ({trained}), with relative noise and one pair for each microbatch: test accuracy and trace "
        "of the training loss's Hessian after as many gradients for all, "
        f"{settings['gradient_evaluations']:,} on {settings['batch_size']} digits each; mean ± standard "
        f"deviation over {settings['seeds']} seeds, at the rho of SAM or noise of NSO with the best "
        "validation accuracy among those in the picture. "
        f"{tasks}.{_gains(results)}"
    )


def plot(results: dict[str, Any]) -> bytes:
    """Variance against the number of parts, as PNG."""
    figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    _plot_variance(axes, results["variance"])
    return plots.finish(figure, axes, columns=2)


def plot_accuracy(results: dict[str, Any]) -> bytes:
    """Accuracy against the strength of the noise, a panel for each task, as PNG."""
    tasks = list(results["settings"]["tasks"])
    figure = Figure(figsize=(plots.WIDTH, 0.9 + 3 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
    for panel, task in zip(panels, tasks, strict=True):
        _plot_accuracy(panel, [row for row in results["training"] if row["task"] == task])
        panel.set(title=f"Labels: {task.removesuffix(' labels')}", ylabel="test accuracy (%)")
    panels[-1].set_xlabel("noise over weight")
    figure.suptitle(
        f"Accuracy with larger noise: mean ± standard deviation, {results['settings']['seeds']} seeds",
        fontsize="large",
    )
    return plots.finish(figure, panels[0], columns=3)


def _variances(draws: int, advance: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Of each case, the variance for each number of parts, over that for one, times the parts."""
    examples = data.digits(0, NUM_EXAMPLES).train
    loss, params = models.pure_loss(_warmed_up(examples))
    seeds = itertools.count()
    for name, case in CASES.items():
        one: Estimate | None = None
        for parts in PARTS:
            figures = {}
            for kind, gradient in _divided(loss, case.sigma, parts).items():
                batch = _batch(examples, case.num_distinct, kind)
                count = draws if one else REFERENCE_DRAWS * draws
                keys = jax.random.split(jax.random.key(next(seeds)), count)
                # Fetched one by one: with many steps under way simulated devices can starve each other.
                gradients = [np.asarray(gradient(key, params, batch)) for key in keys]
                estimate = _variance(np.stack(gradients))
                one = one or estimate
                figures[kind] = _times_parts(estimate, one, parts)._asdict()
                advance()
            yield {"case": name, "parts": parts, **figures}


@functools.cache
def _divided(loss: Loss, sigma: Sigma, parts: int) -> dict[str, Flat]:
    """The gradient as one vector, averaged over microbatches or devices. Cases share what is compiled."""
    mesh = jax.make_mesh(
        (parts,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:parts]
    )
    gradients = {
        "microbatches": parallel.microbatch(nso_jax.value_and_grad(loss, sigma=sigma), parts),
        "devices": parallel.value_and_grad(loss, sigma=sigma, mesh=mesh),
    }
    return {
        kind: jax.jit(lambda *args, fn=fn: ravel_pytree(fn(*args)[1])[0]) for kind, fn in gradients.items()
    }


def _batch(examples: Examples, num_distinct: int, kind: str) -> Examples:
    """The first examples, copied so that each part has all of them: a part is every m-th one, or a block."""
    copies = NUM_EXAMPLES // num_distinct

    def copy(x: Any) -> jax.Array:
        distinct = jnp.asarray(x)[:num_distinct]
        return (
            jnp.repeat(distinct, copies, axis=0)
            if kind == "microbatches"
            else jnp.concatenate(copies * [distinct])
        )

    return jax.tree.map(copy, examples)


def _variance(gradients: np.ndarray) -> Estimate:
    """The variance over the first axis, summed over the weights."""
    count, mean = len(gradients), gradients.mean(axis=0)
    squares = np.array([np.sum(np.square(x - mean)) for x in gradients]) * count / (count - 1)
    return Estimate(float(squares.mean()), float(squares.std(ddof=1)) / math.sqrt(count))


def _times_parts(estimate: Estimate, one: Estimate, parts: int) -> Estimate:
    value = parts * estimate.value / one.value
    if estimate is one:
        return Estimate(value, 0.0)
    relative = (figure.standard_error / figure.value for figure in (estimate, one))
    return Estimate(value, value * math.hypot(*relative))


def _warmed_up(examples: Examples) -> nnx.Module:
    """A network after some plain steps on all examples."""
    task = Task(_model(MEASURED_WIDTHS), lambda *_: itertools.repeat(examples), NUM_EXAMPLES)
    return loop.train(task, METHODS["sgd"], Settings(WARM_UP_STEPS, WARM_UP_RATE)).model


def _model(widths: tuple[int, ...]) -> Callable[[int], models.MLP]:
    return lambda seed: models.MLP(widths, rngs=nnx.Rngs(seed))


def _methods(microbatches: Sequence[int]) -> dict[tuple[str, int], Method]:
    """The methods by name and number of microbatches, which is 0 without noise."""
    return {
        ("sgd", 0): METHODS["sgd"],
        ("sam", 0): METHODS["sam"]._replace(strengths=RHOS),
        **{
            ("nso", count): nso(relative=True, num_microbatches=count, strengths=SCALES)
            for count in dict.fromkeys(microbatches)
        },
    }


def _trainings(
    methods: dict[tuple[str, int], Method], options: Options, advance: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """What each method reaches on each task, at each strength."""
    gauge = measuring.gauge(measuring.split_network(_model(TRAINED_WIDTHS)(0))[0])
    for task_name, digits in TASKS.items():
        splits = [data.digits(seed, digits.num_train, digits.wrong_labels) for seed in range(options.seeds)]
        task = _task(splits, digits.num_train)
        for (name, count), method in methods.items():
            settings = Settings(2 * options.steps, digits.learning_rate, digits.weight_decay[name])
            train = functools.partial(_train, task=task, method=method, settings=settings, advance=advance)
            for row in _sweep(train, method.strengths, splits, gauge):
                yield {"task": task_name, "method": name, "num_microbatches": count, **row}


def _task(splits: list[Split], num_train: int) -> Task:
    """That of the seeds with these splits."""

    def batches(seed: int, first: int) -> Iterator[Examples]:
        return data.batches(splits[seed].train, BATCH_SIZE, seed, first)

    return Task(_model(TRAINED_WIDTHS), batches, num_train)


def _train(
    strength: float,
    seed: int,
    *,
    task: Task,
    method: Method,
    settings: Settings,
    advance: Callable[[], None],
) -> Network:
    settings = dataclasses.replace(settings, strength=strength, seed=seed)
    model = loop.train(task, method, settings).model
    advance()
    return measuring.split_network(model)[1]


def _sweep(
    train: Callable[[float, int], Network], strengths: tuple[float, ...], splits: list[Split], gauge: Gauge
) -> list[dict[str, Any]]:
    """For each strength the accuracies by seed; for that of the best validation accuracy the traces too."""
    networks: dict[float, list[Network]] = {}
    swept: list[dict[str, Any]] = []
    for strength in strengths:
        networks[strength] = [train(strength, seed) for seed in range(len(splits))]
        swept.append({"strength": strength, **_accuracies(gauge, networks[strength], splits)})
    best = max(swept, key=lambda row: statistics.mean(row["validation_accuracy"]))
    best["trace"] = _traces(gauge, networks[best["strength"]], splits)
    return [{"best": row is best, **row} for row in swept]


def _accuracies(gauge: Gauge, networks: list[Network], splits: list[Split]) -> dict[str, Any]:
    def on(part: str) -> list[float]:
        pairs = zip(networks, splits, strict=True)
        return [float(gauge.accuracy(net.params, (getattr(split, part), net.rest))) for net, split in pairs]

    return {"validation_accuracy": on("validation"), "test_accuracy": on("test")}


def _traces(gauge: Gauge, networks: list[Network], splits: list[Split]) -> list[float]:
    pairs = zip(networks, splits, strict=True)
    return [measuring.measure_point(gauge, net, split, NUM_PRODUCTS)["trace"] for net, split in pairs]


def _gains(results: dict[str, Any]) -> str:
    """How much the most microbatches gained on the fewest, seed by seed."""
    counts = results["settings"]["microbatches"]
    if min(counts) == max(counts):
        return ""
    texts = []
    for task in results["settings"]["tasks"]:
        accuracies = {
            row["num_microbatches"]: np.array(row["test_accuracy"])
            for row in results["training"]
            if row["best"] and row["task"] == task
        }
        gains = 100 * (accuracies[max(counts)] - accuracies[min(counts)])
        texts.append(f"{gains.mean():+.1f} ± {_standard_error(gains):.1f} points (labels {task})")
    gained = ", ".join(texts)
    return f" From {min(counts)} to {max(counts)} microbatches, seed by seed: {gained}, ± standard error."


def _standard_error(values: np.ndarray) -> Any:
    """Of the mean over the last axis; zero for a single value."""
    count = values.shape[-1]
    return values.std(axis=-1, ddof=min(1, count - 1)) / math.sqrt(count)


def _with_error(figure: dict[str, float]) -> str:
    return f"{figure['value']:.2f} ± {figure['standard_error']:.2f}" if figure["standard_error"] else "1"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _plot_variance(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for case, colour in zip(dict.fromkeys(row["case"] for row in rows), CASE_COLOURS, strict=False):
        mine = [row for row in rows if row["case"] == case]
        parts = np.array([row["parts"] for row in mine])
        for kind, style in (("microbatches", "-"), ("devices", ":")):
            values, errors = (
                np.array([row[kind][what] for row in mine]) / parts for what in ("value", "standard_error")
            )
            label = case if kind == "microbatches" else None
            axes.errorbar(parts, values, errors, color=colour, linestyle=style, linewidth=2, label=label)
    axes.plot(parts, 1 / parts, color=plots.BLACK, linewidth=1, linestyle="--", label="1 / parts")
    plots.label_powers_of_two(axes)
    axes.set_title("Variance by noise in the gradient, ± standard error")
    axes.set_xlabel("microbatches (solid) or devices (dotted), log scale")
    axes.set_ylabel("variance / that of one part (log scale)")


def _plot_accuracy(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A line over the strength of the noise for each number of microbatches; a level for each rival."""
    for name, style in (("sgd", "-"), ("sam", "--")):
        (best,) = (row for row in rows if row["method"] == name and row["best"])
        accuracies, colour = 100 * np.array(best["test_accuracy"]), plots.colour(name)
        level, width = accuracies.mean(), plots.deviation(accuracies)
        axes.axhline(level, color=colour, linestyle=style, linewidth=1.5, label=plots.title(name))
        axes.axhspan(level - width, level + width, color=colour, alpha=0.1, linewidth=0)
    counts = sorted({row["num_microbatches"] for row in rows if row["method"] == "nso"})
    lines = {}
    for i, count in enumerate(counts):
        mine = [row for row in rows if row["num_microbatches"] == count]
        accuracies = 100 * np.array([row["test_accuracy"] for row in mine]).T
        # Side by side, so that no whisker hides another.
        x = np.array([row["strength"] for row in mine]) + 0.008 * (i - (len(counts) - 1) / 2)
        lines[count] = x, accuracies.mean(axis=0)
        label = f"NSO, {count} part{'s' * (count > 1)}"
        look: dict[str, Any] = {"color": COUNT_COLOURS[i % 3], "marker": "os^"[i % 3]}
        axes.errorbar(*lines[count], plots.deviation(accuracies), label=label, capsize=2.5, **look)
    bottom, top = axes.get_ylim()
    edge = max(bottom, top - SHOWN)
    axes.set_ylim(edge, top)  # what hardly learns may leave the picture
    for i, (x, means) in enumerate(lines.values()):
        for place, mean in zip(x[means < edge], means[means < edge], strict=True):
            text, look = f"↓ {mean:.0f} %", {"color": COUNT_COLOURS[i % 3], "ha": "right"}
            axes.annotate(text, (place, edge), (0, 4), textcoords="offset points", **look)
