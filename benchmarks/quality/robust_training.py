"""Trains with penalties on the loss around each image, or by NSO, and attacks the networks."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from jax.tree_util import Partial
from rich.progress import Progress

from benchmarks.kit.files import UserError
from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Count, Resumable, Share
from benchmarks.tasks import attacks, augmentation, data, parquet
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import StridedConvNet
from benchmarks.training import costs, loop, methods, regularizers
from benchmarks.training.loop import Settings, Task
from benchmarks.training.methods import Method
from benchmarks.training.regularizers import Loss
from nso_jax import noise, penalties

BATCH_SIZE = 50
LEARNING_RATE = 1e-3
NUM_POINTS = 10  # of a training, where it can go on after a kill
DIGITS_TRAIN = 600  # of the 797 that are not for the test
LEAST_SHARE = 7  # of the rows of a small data set, one in so many is for validation
RIVALS = ("input-hessian", "input-gradient")  # that the claim is about
PENALTIES = (*RIVALS, "hessian-trace")
MethodName = Literal["input-gradient", "input-hessian", "nso", "hessian-trace"]


class Problem(NamedTuple):
    """Images to learn and to attack, and the training."""

    name: str
    train: Examples
    validation: Examples
    test: Examples
    task: Task


@dataclasses.dataclass(frozen=True)
class Options(Resumable):
    """Attacks networks that were trained plainly, with a penalty on the loss around each image, or by NSO.

    Attributes:
        data: Folders of Parquet files or hf://datasets/..., instead of scikit-learn's digits.
        augment: What is done to images to train on.
        equal: What all trainings have the same of.
        methods: What to compare, beside plain training.
        seeds: Trainings with each strength.
        budget: Plain steps that a training may take as long as, or `--equal steps` its steps.
        penalty_every: Steps of which one has the penalty, so many times as strong.
        train_images: Images to train on.
        validation_images: Images to choose strengths by.
        test_images: Images to test and attack.
        pgd_steps: Steps of an attack.
        starts: Random starts of an attack.
        radius: How far an attack may move each pixel.
    """

    data: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="PATH [PATH ...]")] = None
    augment: augmentation.Name = "none"
    equal: Literal["time", "steps"] = "time"
    methods: tuple[MethodName, ...] = ("input-gradient", "input-hessian", "nso")
    seeds: Count = 3
    budget: Count = 8000
    penalty_every: Count = 1
    train_images: Count = 10_000
    validation_images: Count = 1000
    test_images: Count = 2000
    pgd_steps: Count = 20
    starts: Count = 2
    radius: Share = 0.1
    work: Path = Path("runs/robustness")


def problems(options: Options) -> list[Problem]:
    """The digits, or the images of each folder."""
    if options.data is None:
        digits = data.digits(0, min(options.train_images, DIGITS_TRAIN))
        sizes = {"validation": options.validation_images, "test": options.test_images}
        parts = {part: data.part(getattr(digits, part), 0, size) for part, size in sizes.items()}
        return [Problem("digits", digits.train, **parts, task=_task(digits.train, 10, options))]
    names = [data.name(source) for source in options.data]
    if len(set(names)) < len(names):
        raise UserError(f"argument --data: expected folders of different names, got {', '.join(names)}")
    return [_problem(name, source, options) for name, source in zip(names, options.data, strict=True)]


def _problem(name: str, source: str, options: Options) -> Problem:
    """The images of a folder. If there are fewer than asked for, most of them are for training."""
    wanted = options.train_images + options.validation_images
    train, test, class_names = parquet.load_images(source, wanted, options.test_images)
    total = len(train.labels)
    most = max(total - total // LEAST_SHARE, total - options.validation_images)
    num_train = min(options.train_images, most)
    largest = max(int(part.labels.max()) for part in (train, test))
    train, validation = data.part(train, 0, num_train), data.part(train, num_train)
    task = _task(train, max(len(class_names), largest + 1), options)
    return Problem(name, train, validation, test, task)


def _task(train: Examples, num_classes: int, options: Options) -> Task:
    _, *shape = train.inputs.shape
    augment = augmentation.named(options.augment, num_classes)

    def model(seed: int) -> nnx.Module:
        return StridedConvNet(tuple(shape), num_classes, rngs=nnx.Rngs(seed))

    def batches(seed: int, first: int) -> Iterator[Examples]:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return augmentation.batches(augment, key, data.batches(train, BATCH_SIZE, seed, first), first)

    return Task(model, batches, len(train.labels), methods.adamw)


def compared(options: Options) -> dict[str, Method]:
    """Plain training and the methods asked for."""
    return {
        name: methods.lazy(method, options.penalty_every) if name in PENALTIES else method
        for name, method in METHODS.items()
        if name in ("plain", *options.methods)
    }


def step_costs(
    problem: Problem, methods: dict[str, Method], options: Options, progress: Progress
) -> dict[str, dict[str, float]]:
    """Of each method the time of a step over a plain one's, as measured here and now."""
    shown = progress.add_task(f"costs, {problem.name}", total=len(methods) * (1 + costs.REPETITIONS))
    advance = functools.partial(progress.advance, shown)
    return costs.measure(problem.task, methods, options.budget, "plain", advance)


def _training_settings(strength: float, seed: int, options: Options) -> Settings:
    return Settings(options.budget, LEARNING_RATE, strength=strength, seed=seed, num_points=NUM_POINTS)


def trained(
    problems: list[Problem],
    methods: dict[str, Method],
    options: Options,
    journal: Journal,
    progress: Progress,
) -> list[dict[str, Any]]:
    """All trainings' figures; those that are new are told."""
    trainings = [
        (problem, name, strength, seed)
        for problem, (name, method) in itertools.product(problems, methods.items())
        for strength, seed in itertools.product(method.strengths, range(options.seeds))
    ]
    shown = progress.add_task("trainings", total=len(trainings))
    runs = []
    for problem, name, strength, seed in trainings:
        title = f"{problem.name}, {name} {strength:g}, seed {seed}"
        settings = _training_settings(strength, seed, options)
        compute = functools.partial(_train_and_attack, problem, methods[name], settings, options, journal)
        figures = journal.once(title, compute, functools.partial(_tell, progress, title))
        runs.append({"data": problem.name, "method": name, "strength": strength, "seed": seed, **figures})
        progress.advance(shown)
    return runs


def _train_and_attack(
    problem: Problem, method: Method, settings: Settings, options: Options, journal: Journal
) -> dict[str, Any]:
    trained = loop.train(problem.task, method, settings, journal=journal)
    return {
        "steps": loop.num_steps(method, settings.gradients),
        "seconds": trained.seconds,
        "validation": _accuracies(trained.model, problem.validation, options, ("clean", "pgd")),
        "test": _accuracies(trained.model, problem.test, options, ("clean", "fgsm", "pgd")),
    }


def _accuracies(
    model: nnx.Module, examples: Examples, options: Options, wanted: tuple[str, ...]
) -> dict[str, float]:
    losses, margins = Partial(_losses, model), Partial(_margins, model)
    images, labels = map(jnp.asarray, examples)
    radius, key = options.radius, jax.random.key(0)

    def attacked(attack: str) -> jax.Array:
        if attack == "fgsm":
            return attacks.fgsm(losses, images, labels, radius)
        if attack == "pgd":
            sizes = {"num_steps": options.pgd_steps, "num_starts": options.starts}
            return attacks.pgd(key, losses, images, labels, radius, score=margins, **sizes)
        return images

    return {attack: float(_share_right(margins, attacked(attack), labels)) for attack in wanted}


def _losses(model: Any, images: Any, labels: Any) -> jax.Array:
    """The examples' cross-entropies."""
    logits = model(images)
    if labels.ndim == logits.ndim:  # probabilities
        return optax.softmax_cross_entropy(logits, labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _margins(model: Any, images: Any, labels: Any) -> jax.Array:
    """The largest wrong logit minus the right one: positive where the network is wrong."""
    logits = model(images)
    right = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    return jnp.where(right, -jnp.inf, logits).max(axis=1) - jnp.where(right, logits, -jnp.inf).max(axis=1)


@jax.jit
def _share_right(margins: Partial, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(margins(images, labels) < 0)


def _tell(progress: Progress, title: str, run: dict[str, Any]) -> None:
    clean, fgsm, pgd = (f"{100 * run['test'][attack]:.1f}" for attack in ("clean", "fgsm", "pgd"))
    text = f"{title}: clean {clean} %, FGSM {fgsm} %, PGD {pgd} %, {run['seconds']:.1f} s"
    progress.console.print(text, highlight=False, soft_wrap=True)


def _input_gradient(loss: Loss, key: jax.Array, model: nnx.Module, batch: Examples) -> jax.Array:
    del loss, key
    losses = functools.partial(_losses, model, labels=batch.labels)
    return penalties.input_gradient(losses, batch.inputs).mean()


def _input_hessian(loss: Loss, key: jax.Array, model: nnx.Module, batch: Examples) -> jax.Array:
    del loss
    losses = functools.partial(_losses, model, labels=batch.labels)
    return penalties.input_hessian_norm(key, losses, batch.inputs).mean()


# Costs: medians on two CPU cores, for images of 28x28. Strengths: from a small effect to a loss of accuracy.
METHODS = {
    "plain": Method(methods.plain),
    "input-gradient": Method(
        regularizers.penalized(_input_gradient), 2.5, (0.1, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0, 8.0)
    ),
    "input-hessian": Method(regularizers.penalized(_input_hessian), 4.75, (0.03, 0.1, 0.3, 1.0, 2.0, 4.0)),
    # Signs, because at this batch size normal noise for all weights takes as long as a gradient.
    "nso": methods.nso(sampler=noise.rademacher, strengths=(0.04, 0.08, 0.1, 0.12, 0.16)),
    "hessian-trace": methods.METHODS["seht"]._replace(strengths=(1e-4, 1e-3, 3e-3, 1e-2)),
}
