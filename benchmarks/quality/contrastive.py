"""Contrastive learning: two small encoders learn from scratch which caption goes with which photograph."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import Progress

from benchmarks.kit.files import UserError
from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Count, at_least
from benchmarks.quality import comparison, comparison_table, fronts
from benchmarks.quality.comparison import Problem, Split
from benchmarks.tasks import captions, clip, data, parquet
from benchmarks.tasks.data import Examples
from benchmarks.training import loop
from benchmarks.training.loop import Task
from benchmarks.training.methods import Method

WIDTHS, WIDTH = (16, 48, 96, 192), 128  # 1.38 million weights with 2,048 tokens
WARMUP = 0.1  # of the steps
PROMPT = "a photo of a {}"
DEPTHS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")
# In 800 gradients, from a temperature of 0.07 on, the validation loss rose with a rho of 0.03, a sigma of
# 0.003, a ratio of 0.1 and more.
STRENGTHS = {
    "sam": (0.003, 0.01, 0.03),
    "asam": (0.03, 0.1, 0.3),
    "nso": (0.001, 0.003, 0.01),
    "nso-relative": (0.025, 0.05, 0.1),
    "wp-relative": (0.025, 0.05, 0.1),
}
HEADERS = (
    "method",
    "strength",
    "rate",
    "captions found at 1, 5, 10 (%)",
    "images found at 1, 5, 10 (%)",
    "mean recall at 10 (%)",
    "zero-shot accuracy (%)",
    "Hessian trace",
    "largest eigenvalue",
)

plot_front, markdown_front = fronts.plot, fronts.markdown

# Not those that split a batch: its parts lack the others' negatives, so theirs would be another loss.
MethodName = Literal[
    "adam", "label-smoothing", "sam", "usam", "asam", "wp-sgd", "wp-relative", "nso", "nso-relative"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(comparison.Options):
    """Compares methods on photographs and captions: contrastive training of two encoders from scratch.

    Attributes:
        data: A folder of Parquet files such as Flickr8k's, or hf://datasets/...
        zero_shot: Images with class names, on which the trained encoders are tried as a classifier.
        zero_shot_images: How many of them.
        vocabulary: Tokens, of a tokenizer trained on the captions to train on.
        length: Tokens of a caption; what is longer is cut.
        validation_pairs: Photographs to choose strengths and rates by; all others are trained on.
        measured_pairs: Of those trained on, the ones that training loss and curvature are measured on.
    """

    data: str
    zero_shot: str | None = None
    zero_shot_images: Count = 1000
    vocabulary: Annotated[int, at_least(captions.LEAST_VOCABULARY)] = 2048
    length: Count = 24
    validation_pairs: Count = 500
    measured_pairs: Count = 250
    methods: tuple[MethodName, ...] = ("adam", "sam", "nso", "wp-relative")
    gradients: Count = 320
    batch_size: Count = 64
    rates: tuple[float, ...] = (3e-4,)  # ten times that does not train at all
    weight_decays: tuple[float, ...] = (1e-2, 1e-1, 1.0)
    front: bool = False
    seeds: Count = 3
    tuning_seeds: Count = 1
    points: Count = 1
    point_products: Count = 4
    final_products: Count = 16
    eigenvalue_tol: float = 1e-2
    work: Path = Path("runs/contrastive")

    def settings(self) -> dict[str, Any]:
        """What somebody needs to know to go on with the run or to repeat it, ready for JSON."""
        made = super().settings()
        return made | {"zero_shot": self.zero_shot and data.name(self.zero_shot)}


class Classes(NamedTuple):
    """Images of classes that have names.

    Attributes:
        examples: As large as the photographs, in 0 to 255.
        names: Of the classes.
    """

    examples: Examples
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class WarmedUp(Problem):
    """One whose plain training is by its task's own optimizer."""

    def methods(self, names: Sequence[str]) -> dict[str, Method]:
        """The methods of these names, plain training first."""
        made = super().methods(names)
        return {
            name: method._replace(optimizer=method.optimizer and self.task.optimizer)
            for name, method in made.items()
        }


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Compares how the methods train both encoders.

    Raises:
        UserError: Photographs, captions or classes cannot be read or are too few.
    """
    problem = make_problem(options)
    journal = Journal(options.work, options.settings(), resume=options.resume)
    results = comparison.compare(problem, options, journal, progress)
    weights = jax.tree.leaves(nnx.state(problem.task.model(0), nnx.Param))
    return results | {
        "num_weights": sum(w.size for w in weights),
        "num_pairs": problem.task.num_examples,
    }


def make_problem(options: Options) -> Problem:
    """The pairs and the encoders."""
    train, test = parquet.load_captioned(options.data)
    count = len(train.images) - options.validation_pairs
    least = max(options.batch_size, options.measured_pairs)
    if count < least:
        raise UserError(
            f"{options.data}: {len(train.images)} photographs to train on, too few to validate "
            f"on {options.validation_pairs} and train on {least}"
        )
    classes = _classes(options, test.images.shape[1:]) if options.zero_shot else None
    tokenizer = captions.train_tokenizer(
        (text for texts in train.captions[:count] for text in texts), options.vocabulary
    )
    pool, unseen = (captions.tokenize_all(tokenizer, part, options.length) for part in (train, test))
    learnt, left = pool.at(slice(0, count)), pool.at(slice(count, None))
    split = Split(learnt.at(slice(0, options.measured_pairs)).pairs(), left.pairs(), unseen.pairs())
    prompts = classes and captions.tokenize(
        tokenizer, [PROMPT.format(name.replace("_", " ")) for name in classes.names], options.length
    )

    def model(seed: int) -> nnx.Module:
        return clip.small_clip(
            train.images.shape[-1],
            options.vocabulary,
            options.length,
            widths=WIDTHS,
            width=WIDTH,
            rngs=nnx.Rngs(seed),
        )

    def batches(seed: int, first: int) -> Iterator[Examples]:
        return captions.batches(learnt, options.batch_size, seed, first)

    def retrieval(model: Any, _: Split) -> dict[str, float]:
        figures = clip.retrieval(model, unseen.images, unseen.captions, DEPTHS)
        if classes and prompts:
            figures["zero_shot"] = clip.zero_shot(model, classes.examples, prompts)
        return figures

    task = Task(model, batches, count, adamw, clip.info_nce, clip.matched)
    return WarmedUp(data.name(options.data), task, lambda _: split, STRENGTHS, retrieval)


def _classes(options: Options, shape: tuple[int, ...]) -> Classes:
    """The first images of the classes, brought to the size of the photographs."""
    source = str(options.zero_shot)
    _, test, names = parquet.load_images(source, 1, options.zero_shot_images)
    if len(names) <= int(test.labels.max()):
        raise UserError(
            f"{source}: the metadata names {len(names)} classes, expected {test.labels.max() + 1}"
        )
    if test.inputs.shape[-1] != shape[-1]:
        raise UserError(f"{source}: images have {test.inputs.shape[-1]} channels, photographs {shape[-1]}")
    images = jax.image.resize(test.inputs, (len(test.labels), *shape), "linear")
    return Classes(test._replace(inputs=np.asarray(255 * images)), names)


def adamw(
    learning_rate: Any, weight_decay: Any, strength: Any, *, num_steps: int, **_: Any
) -> optax.GradientTransformation:
    """Adam whose rate rises to what it is told and falls along a cosine; only matrices decay."""
    del strength
    rising = max(1, round(WARMUP * num_steps))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / rising, learning_rate, rising),
            optax.cosine_decay_schedule(learning_rate, max(1, num_steps - rising)),
        ],
        [rising],
    )
    return optax.adamw(schedule, weight_decay=weight_decay, mask=_matrices)


def _matrices(params: Any) -> Any:
    """Neither biases and scales nor the temperature."""
    return jax.tree.map(lambda w: jnp.ndim(w) > 1, params)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for each method, with means over the seeds."""
    return [_row(name, results) for name in results["chosen"]]


def _row(name: str, results: dict[str, Any]) -> list[str]:
    runs, knobs = comparison_table.chosen_runs(results, name), results["chosen"][name]
    found = (
        " / ".join(f"{100 * statistics.mean(run[f'{way}_{depth}'] for run in runs):.1f}" for depth in DEPTHS)
        for way in WAYS
    )
    zero_shot = [100 * run["zero_shot"] for run in runs if "zero_shot" in run]
    return [
        name,
        f"{knobs['strength']:g}" if knobs["strength"] else "",
        f"{knobs['rate']:g}",
        *found,
        comparison_table.with_interval([_recall(run) for run in runs]),
        comparison_table.with_interval(zero_shot) if zero_shot else "-",
        comparison_table.with_interval([run["trace"] for run in runs]),
        comparison_table.with_interval([run["largest_eigenvalue"] for run in runs]),
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, sizes, machine = results["settings"], results["data"], results["machine"]
    chance = " / ".join(f"{100 * depth / sizes['test']:.1f}" for depth in DEPTHS)
    zero_shot = noise = ""
    if "wp-relative" in results["chosen"]:
        noise = (
            "wp-relative: one-sided noise in proportion to each weight, one draw and so one gradient in a "
            "step, without parts of a batch. "
        )
    if settings["zero_shot"]:
        zero_shot = (
            f"Zero-shot: of {settings['zero_shot_images']:,} images of {settings['zero_shot']}, those that "
            f'are nearest to "{PROMPT.format("...")}" with the name of their own class. '
        )
    return (
        f"Two encoders of {results['num_weights']:,} weights together, trained from scratch on "
        f"{results['num_pairs']:,} photographs of {results['data']['name']}, each time with another of their "
        f"captions. Every method takes {settings['gradients']} gradient evaluations on "
        f"{settings['batch_size']} pairs each. Found: of {sizes['test']:,} unseen photographs, those with "
        "one of their own captions among the nearest of all photographs' captions, and the captions with "
        f"their photograph among the nearest; by chance {chance} %. {zero_shot}"
        f"Mean ± 95 % interval over {settings['seeds']} seeds: of the first weights, the order, the captions "
        f"and the noise. Strength, rate and decay: of the least loss on {sizes['validation']} other pairs, "
        f"over {settings['tuning_seeds']} other seeds. "
        f"Trace and eigenvalue: of the Hessian of the loss on {sizes['train']} of the pairs to train on, in "
        f"batches of at most {loop.CHUNK}, at the end. "
        f"{noise}On {machine['cpu_count']} CPU cores ({machine['device']})."
    )


def plot(results: dict[str, Any]) -> bytes:
    """Recall, accuracy on classes if measured, and trace at the end, with 95 % intervals, as PNG."""
    shown = {"mean recall at 10 (%)": _recall, "Hessian trace (log scale)": lambda run: run["trace"]}
    if results["settings"]["zero_shot"]:
        shown["zero-shot accuracy (%)"] = lambda run: 100 * run["zero_shot"]
    return comparison_table.plot_ends(results, shown)


def _recall(run: dict[str, Any]) -> float:
    """The mean of both ways at the last depth, in percent."""
    return 100 * statistics.mean(run[f"{way}_{DEPTHS[-1]}"] for way in WAYS)
