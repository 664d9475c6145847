"""Mixed precision: which weights small noise moves, what rounding does to the estimate, and to training."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from rich.progress import Progress

import nso_jax
import nso_jax.nnx
from benchmarks.kit import options, plots, tables
from benchmarks.tasks import data
from benchmarks.tasks.data import Examples, Split
from benchmarks.tasks.models import MLP
from benchmarks.training import loop, measuring, methods
from benchmarks.training.loop import Settings, Task
from benchmarks.training.measuring import Gauge
from benchmarks.training.methods import Loss, Method, Update
from nso_jax import noise

Estimated = dict[str, float | None]

WIDTHS = (64, 64, 10)
NUM_TRAIN = 700
BATCH_SIZE = 64
RATE = 0.1
NUM_PRODUCTS = 40

DEVIATION = 0.05  # of the weights whose moves are counted
NUM_WEIGHTS = 100_000
SIGMAS = (1e-4, 1e-3, 1e-2, 1e-1)
NOISES = {
    **{f"{sigma:g}": sigma for sigma in SIGMAS},
    **{f"{scale:g} of the weight": noise.relative(scale) for scale in (1e-3, 1e-2, 1e-1)},
}
TRAINED_SIGMAS = (0.0, 1e-3, 1e-1)
ESTIMATED = ("still", "variance", "rise", "error")  # in percent
MEASURED = {"train_loss": 1, "test_accuracy": 100, "trace": 1}  # and what to show them times


class Mode(NamedTuple):
    """What weights are kept in and what the loss is computed in, with the factor that keeps it in range."""

    stored: Any
    computed: Any
    scale: float = 1.0


MODES = {
    "float32": Mode(jnp.float32, jnp.float32),
    "bfloat16": Mode(jnp.bfloat16, jnp.bfloat16),
    "float32, cast to bfloat16 in the loss": Mode(jnp.float32, jnp.bfloat16),
    "float16": Mode(jnp.float16, jnp.float16, 2.0**10),
    "float32, cast to float16 in the loss": Mode(jnp.float32, jnp.float16, 2.0**10),
}


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
class Options(options.Output):
    """Measures what 16-bit numbers do to weight noise, and to training with it.

    Attributes:
        seeds: Trainings of each kind.
        steps: Steps of each training.
        draws: Draws that an estimate at a trained network's weights is averaged over.
    """

    seeds: options.Count = 3
    steps: options.Count = 300
    draws: options.Count = 100


def run(options: Options, progress: Progress) -> dict[str, Any]:
    """Counts the weights that noise moves, and estimates and trains in every mode.

    Args:
        options: The settings.
        progress: Where to show how far it is.

    Returns:
        All figures, ready for JSON: the shares of weights that do not move, and a record for every mode and
        sigma, in which what needs noise to be measured is None without.
    """
    kinds = list(itertools.product(TRAINED_SIGMAS, MODES.items()))
    advance = functools.partial(progress.advance, progress.add_task("precision", total=len(kinds)))
    weights = nnx.state(_train(MODES["float32"], 0.0, 0, options.steps // 3))
    records = []
    for sigma, (name, mode) in kinds:
        estimated = _estimate(mode, sigma, weights, _split().train, options.draws if sigma else 1)
        trained = [_train(mode, sigma, seed, options.steps) for seed in range(options.seeds)]
        runs = [_measure(model) for model in trained]
        records.append({"mode": name, "sigma": sigma, **estimated, "runs": runs})
        advance()
    return {
        "settings": options.settings(),
        "num_weights": len(_flat(weights)),
        "still": still(),
        "records": records,
    }


def still() -> dict[str, dict[str, float]]:
    """The shares of weights N(0, 0.05^2) that noise leaves where they are, for each dtype and noise."""
    key_w, key_u = jax.random.split(jax.random.key(0))
    shares = {}
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        w = (DEVIATION * jax.random.normal(key_w, (NUM_WEIGHTS,))).astype(dtype)
        shares[jnp.dtype(dtype).name] = {
            name: float(np.mean(noise.perturb(w, noise.perturbation(key_u, w, sigma)) == w))
            for name, sigma in NOISES.items()
        }
    return shares


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row for every mode and sigma."""
    return [
        [
            record["mode"],
            f"{record['sigma']:g}",
            *("" if record[name] is None else tables.number(record[name]) for name in ESTIMATED),
            *(_cell(record["runs"], name, times) for name, times in MEASURED.items()),
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
    axes.set(title=f"Weights of deviation {DEVIATION:g} that noise leaves where they are")
    axes.set(xlabel=r"$\sigma$ of the noise (log scale)", ylabel="weights that do not move (%)", xscale="log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return plots.finish(figure, axes)


def _as(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda w: w.astype(dtype), tree)


def _network(seed: int, dtype: Any) -> MLP:
    model = MLP(WIDTHS, rngs=nnx.Rngs(seed))
    nnx.update(model, _as(nnx.state(model), dtype))
    return model


def _loss(mode: Mode, model: nnx.Module, batch: Examples) -> jax.Array:
    """The mean cross-entropy, times the mode's factor; from the logits on in float32 at least."""
    graphdef, params = nnx.split(model)
    logits = nnx.merge(graphdef, _as(params, mode.computed))(jnp.asarray(batch.inputs, mode.computed))
    losses = optax.softmax_cross_entropy_with_integer_labels(noise.widen(logits), batch.labels)
    return mode.scale * losses.mean()


@functools.cache
def _split() -> Split:
    return data.digits(0, NUM_TRAIN)


@functools.cache
def _task(mode: Mode) -> Task:
    def batches(seed: int, first: int) -> Iterator[Examples]:
        return data.batches(_split().train, BATCH_SIZE, seed, first)

    loss = functools.partial(_loss, mode)
    return Task(lambda seed: _network(seed, mode.stored), batches, NUM_TRAIN, _momentum, loss)


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
            optimizer.update(model, _as(_unscaled(mode, grads), mode.stored))

        return update

    return Method(of, 2)


def _unscaled(mode: Mode, grads: Any) -> Any:
    return jax.tree.map(lambda g: g.astype(jnp.float32) / mode.scale, grads)


def _train(mode: Mode, sigma: float, seed: int, steps: int) -> nnx.Module:
    """The network after so many steps, in float32."""
    settings = Settings(2 * steps, RATE, strength=sigma, seed=seed)
    model = loop.train(_task(mode), _method(mode), settings).model
    nnx.update(model, _as(nnx.state(model), jnp.float32))
    return model


def _measure(model: nnx.Module) -> dict[str, float]:
    """Training loss, test accuracy and the trace of the training loss's Hessian, in float32."""
    network = measuring.split_network(model)[1]
    point = measuring.measure_point(_gauge(), network, _split(), NUM_PRODUCTS)
    return {name: point[name] for name in MEASURED}


@functools.cache
def _gauge() -> Gauge:
    return measuring.gauge(_graphdef())


def _estimate(mode: Mode, sigma: float, weights: nnx.State, batch: Examples, draws: int) -> Estimated:
    """In percent: weights that stay, the noise's variance that is kept, rise of the loss, gradient's error.

    The last two are of the average over draws, against float64 at the same weights with the same noise.
    Without noise only the gradient has something to show.
    """
    params = _as(weights, mode.stored)
    unmoved, variances, values, grads, true_values, true_grads = [], [], [], [], [], []
    for n in range(draws):
        key = jax.random.fold_in(jax.random.key(1), n)
        u, before, sides = _moved(mode, key, params, sigma)
        for sign, after in sides.items():
            moves = _flat(after) - _flat(before)
            unmoved.append(np.mean(moves == 0))
            variances.append(np.mean(moves**2))
            value, grad = _in_float64(params, u, sign, batch)
            true_values.append(value)
            true_grads.append(grad)
        value, grad = _value_and_grad(mode, key, params, batch, sigma)
        values.append(float(value))
        grads.append(_flat(grad))
    plain, _ = _value_and_grad(mode, jax.random.key(0), params, batch, 0.0)
    true_plain, _ = _in_float64(params, jax.tree.map(jnp.zeros_like, params), 1, batch)
    true = np.mean(true_grads, axis=0)
    error = 100 * float(np.linalg.norm(np.mean(grads, axis=0) - true) / np.linalg.norm(true))
    if not sigma:
        return dict.fromkeys(ESTIMATED) | {"error": error}
    rise = (np.mean(values) - float(plain)) / (np.mean(true_values) - true_plain)
    kept = np.mean(variances) / sigma**2
    return {"still": 100 * np.mean(unmoved), "variance": 100 * kept, "rise": 100 * rise, "error": error}


@functools.partial(jax.jit, static_argnums=0)
def _value_and_grad(mode: Mode, key: jax.Array, params: nnx.State, batch: Examples, sigma: Any) -> Any:
    loss = functools.partial(_loss_of_params, mode)
    value, grads = nso_jax.value_and_grad(loss, sigma=sigma)(key, params, batch)
    return value / mode.scale, _unscaled(mode, grads)


def _loss_of_params(mode: Mode, params: nnx.State, batch: Examples) -> jax.Array:
    return _loss(mode, nnx.merge(_graphdef(), params), batch)


@functools.cache
def _graphdef() -> nnx.GraphDef[Any]:
    return nnx.graphdef(_network(0, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _moved(
    mode: Mode, key: jax.Array, params: nnx.State, sigma: Any
) -> tuple[nnx.State, nnx.State, dict[int, nnx.State]]:
    """The library's first draw for a key, and the weights that the loss computes with, plain and moved."""
    u = noise.perturbation(jax.random.split(key, 1)[0], params, sigma)
    moved = {sign: _as(noise.perturb(params, u, sign), mode.computed) for sign in (1, -1)}
    return u, _as(params, mode.computed), moved


def _in_float64(params: nnx.State, u: nnx.State, sign: int, batch: Examples) -> tuple[float, np.ndarray]:
    wide, moves = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (params, u))
    with jax.enable_x64(True):
        moved = jax.tree.map(lambda w, u: w + sign * u, wide, moves)
        value, grads = _value_and_grad_in_float64(moved, batch)
        return float(value), _flat(grads)


@jax.jit
def _value_and_grad_in_float64(params: nnx.State, batch: Examples) -> Any:
    mode = Mode(jnp.float64, jnp.float64)
    return jax.value_and_grad(functools.partial(_loss_of_params, mode))(params, batch)


def _flat(tree: nnx.State) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def _cell(runs: list[dict[str, float]], name: str, times: float) -> str:
    values = [times * run[name] for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return tables.with_error(statistics.mean(values), deviation)
