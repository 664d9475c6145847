"""Trains with fresh noise for each part of a batch, at several strengths."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

from benchmarks.kit.options import Count, Output, at_least
from benchmarks.quality import gradient_variance
from benchmarks.tasks import data
from benchmarks.tasks.data import Examples, Split
from benchmarks.training import loop, measuring
from benchmarks.training.loop import Settings, Task
from benchmarks.training.measuring import Gauge, Network
from benchmarks.training.methods import METHODS, Method, nso

TRAINED_WIDTHS = (64, 128, 128, 10)
BATCH_SIZE = 64
NUM_PRODUCTS = 100


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
class Options(Output):
    """Measures the variance of the averaged gradient, and trains with fresh noise for parts of a batch.

    Attributes:
        draws: Gradients that a variance is estimated from.
        seeds: Trainings of each kind.
        steps: Steps of two gradients (sgd: twice as many of one).
        microbatches: Numbers of parts to train with.
    """

    draws: Annotated[int, at_least(2)] = 400
    seeds: Count = 5
    steps: Count = 600
    microbatches: tuple[Microbatches, ...] = get_args(Microbatches)


def compared(microbatches: Sequence[int]) -> dict[tuple[str, int], Method]:
    """The methods by name and number of microbatches, which is 0 without noise."""
    return {
        ("sgd", 0): METHODS["sgd"],
        ("sam", 0): METHODS["sam"]._replace(strengths=RHOS),
        **{
            ("nso", count): nso(relative=True, num_microbatches=count, strengths=SCALES)
            for count in dict.fromkeys(microbatches)
        },
    }


def trainings(
    methods: dict[tuple[str, int], Method], options: Options, advance: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """What each method reaches on each task, at each strength."""
    gauge = measuring.gauge(measuring.split_network(gradient_variance.mlp(TRAINED_WIDTHS)(0))[0])
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

    return Task(gradient_variance.mlp(TRAINED_WIDTHS), batches, num_train)


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
