"""Mixed precision: which weights small noise moves, what rounding does to the estimate, and to training."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from rich.progress import Progress

import nso_jax
import nso_jax.nnx
from benchmarks.kit import plots, tables
from benchmarks.kit.options import Count, Output
from benchmarks.quality import rounding
from benchmarks.quality.rounding import ESTIMATED, MODES, NOISES, SIGMAS, Mode
from benchmarks.tasks import data
from benchmarks.tasks.data import Examples, Split
from benchmarks.training import loop, measuring, methods
from benchmarks.training.loop import Settings, Task
from benchmarks.training.measuring import Gauge
from benchmarks.training.methods import Method
from benchmarks.training.regularizers import Loss, Update

NUM_TRAIN = 700
BATCH_SIZE = 64
RATE = 0.1
NUM_PRODUCTS = 40

TRAINED_SIGMAS = (0.0, 1e-3, 1e-1)
MEASURED = {"train_loss": 1, "test_accuracy": 100, "trace": 1}  # and what to show them times


HEADERS: tuple[str, ...] = (
    "weights in",
    "sigma",
    "do not move (%)",
    "variance kept (%)",
    "rise of the loss (%)",
    "gradient's error (%)",
    "training loss",
    "test accuracy (%)",
    "Hessian trace",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Measures what 16-bit numbers do to weight noise, and to training with it.

    Attributes:
        seeds: Trainings of each kind.
        steps: Steps of each training.
        draws: Draws that an estimate at a trained network's weights is averaged over.
    """

    seeds: Count = 3
    steps: Count = 300
    draws: Count = 100


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Counts the weights that noise moves, and estimates and trains in every mode.

    Returns:
        All figures, ready for JSON: the shares of weights that do not move, and a record for every mode and
        sigma, in which what needs noise to be measured is None without.
    """
    kinds = list(itertools.product(TRAINED_SIGMAS, MODES.items()))
    advance = functools.partial(progress.advance, progress.add_task("precision", total=len(kinds)))
    weights = nnx.state(_train(MODES["float32"], 0.0, 0, options.steps // 3))
    records = []
    for sigma, (name, mode) in kinds:
        estimated = rounding.estimate(mode, sigma, weights, _split().train, options.draws if sigma else 1)
        trained = [_train(mode, sigma, seed, options.steps) for seed in range(options.seeds)]
        runs = [_measure(model) for model in trained]
        records.append({"mode": name, "sigma": sigma, **estimated, "runs": runs})
        advance()
    return {
        "settings": options.settings(),
        "num_weights": len(rounding.flat(weights)),
        "still": rounding.still(),
        "records": records,
    }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for every mode and sigma."""
    return [
        [
            record["mode"],
            f"{record['sigma']:g}",
            *("" if record[name] is None else tables.number(record[name]) for name in ESTIMATED),
            *(
                tables.spread([times * run[name] for run in record["runs"]])
                for name, times in MEASURED.items()
            ),
        ]
        for record in results["records"]
    ]


def caption(results: dict[str, Any]) -> str:
    """What the table shows, in a few sentences."""
    settings, machine = results["settings"], results["machine"]
    return (
        f"An MLP of {results['num_weights']:,} weights on digits. Do not move: weights that are the same "
        "after the noise, in the dtype that the loss computes in. Variance kept: that of the moves there, "
        f"over sigma². Rise of the loss: the mean over {settings['draws']} draws, minus the loss without "
        "noise, over what float64 gives for the same draws. Gradient's error: that of the mean over these "
        "draws, in norm, against float64 at the weights as they are stored; all four at the weights after "
        f"{settings['steps'] // 3} steps in float32. Training loss, test accuracy and Hessian trace: after "
        f"{settings['steps']} steps of SGD with momentum, mean ± standard deviation over {settings['seeds']} "
        f"seeds, measured in float32. float16: the loss is scaled by {MODES['float16'].scale:,.0f}. "
        f"On {machine['cpu_count']} CPU cores ({machine['device']})."
    )


def markdown(results: dict[str, Any]) -> str:
    """The table for readers who choose a dtype: weights N(0, 0.05^2) that noise leaves where they are."""
    head = ["weights in", *(f"sigma {name}" for name in NOISES)]
    lines = [
        [dtype, *(f"{100 * share:.1f} %" for share in shares.values())]
        for dtype, shares in results["still"].items()
    ]
    return tables.grid([head, *lines]) + "\n"


def plot(results: dict[str, Any]) -> bytes:
    """The weights that noise leaves where they are, over its standard deviation, as PNG."""
    figure = Figure(figsize=(plots.WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    styles = {"float16": (plots.SKY, "-"), "bfloat16": (plots.VERMILLION, "--")}
    for dtype, (color, dashes) in styles.items():
        shares = [100 * results["still"][dtype][f"{sigma:g}"] for sigma in SIGMAS]
        axes.plot(SIGMAS, shares, color=color, linestyle=dashes, marker="o", linewidth=2, label=dtype)
        for sigma, share in zip(SIGMAS, shares, strict=True):
            # Where both are near zero there is room for one number.
            if dtype == "bfloat16" or share > 1:
                axes.annotate(f"{share:.2g}", (sigma, share), (3, 7), textcoords="offset points", color=color)
    axes.margins(x=0.1, y=0.12)
    axes.set(title=f"Weights of deviation {rounding.DEVIATION:g} that noise leaves where they are")
    axes.set(xlabel=r"$\sigma$ of the noise (log scale)", ylabel="weights that do not move (%)", xscale="log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return plots.finish(figure, axes)


@functools.cache
def _split() -> Split:
    return data.digits(0, NUM_TRAIN)


@functools.cache
def _task(mode: Mode) -> Task:
    def batches(seed: int, first: int) -> Iterator[Examples]:
        return data.batches(_split().train, BATCH_SIZE, seed, first)

    loss = functools.partial(rounding.scaled_loss, mode)
    return Task(lambda seed: rounding.network(seed, mode.stored), batches, NUM_TRAIN, _momentum, loss)


def _momentum(learning_rate: Any, *_: Any, **__: Any) -> optax.GradientTransformation:
    """SGD with momentum, both in the dtype that weights are stored in."""
    return optax.sgd(learning_rate, momentum=methods.MOMENTUM)


@functools.cache
def _method(mode: Mode) -> Method:
    """Noise stability optimization with loss scaling, as a user would write it around the library."""

    def of(loss: Loss) -> Update:
        def update(
            model: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, sigma: jax.Array, batch: Examples
        ) -> None:
            _, grads = nso_jax.nnx.value_and_grad(loss, sigma=sigma)(key, model, batch)
            optimizer.update(model, rounding.cast(rounding.unscaled(mode, grads), mode.stored))

        return update

    return Method(of, 2)


def _train(mode: Mode, sigma: float, seed: int, steps: int) -> nnx.Module:
    """The network after so many steps, in float32."""
    settings = Settings(2 * steps, RATE, strength=sigma, seed=seed)
    model = loop.train(_task(mode), _method(mode), settings).model
    nnx.update(model, rounding.cast(nnx.state(model), jnp.float32))
    return model


def _measure(model: nnx.Module) -> dict[str, float]:
    """Training loss, test accuracy and the trace of the training loss's Hessian, in float32."""
    network = measuring.split_network(model)[1]
    point = measuring.measure_point(_gauge(), network, _split(), NUM_PRODUCTS)
    return {name: point[name] for name in MEASURED}


@functools.cache
def _gauge() -> Gauge:
    return measuring.gauge(rounding.graphdef())
