"""Mixed precision: which weights small noise moves, what rounding does to the estimate, and to training."""

import dataclasses
import functools
import itertools
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.progress import Progress
from sklearn import datasets

import nso_jax
from benchmarks import arguments, plots, table
from nso_jax import curvature, noise

Params = dict[str, jax.Array]
Batch = tuple[Any, Any]
Estimated = dict[str, float | None]

WIDTHS = (64, 64, 10)
NUM_TRAIN = 800
NUM_TEST = 500
BATCH_SIZE = 64
RATE = 0.1
MOMENTUM = 0.9
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
MEASURED = ("train_loss", "test_accuracy", "trace")


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
class Options(arguments.Output):
    """Measures what 16-bit numbers do to weight noise, and to training with it.

    Attributes:
        seeds: Trainings of each kind.
        steps: Steps of each training.
        draws: Draws that an estimate at a trained network's weights is averaged over.
    """

    seeds: arguments.Count = 3
    steps: arguments.Count = 300
    draws: arguments.Count = 100


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
    train, test = _digits()
    weights = _train(MODES["float32"], 0.0, 0, options.steps // 3, train)
    records = []
    for sigma, (name, mode) in kinds:
        estimated = _estimate(mode, sigma, weights, train, options.draws if sigma else 1)
        trained = [_train(mode, sigma, seed, options.steps, train) for seed in range(options.seeds)]
        runs = [_measure(params, train, test) for params in trained]
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
            *("" if record[name] is None else table.number(record[name]) for name in ESTIMATED),
            *(_with_deviation([run[name] for run in record["runs"]]) for name in MEASURED),
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
    return table.grid([head, *lines]) + "\n"


def plot(results: dict[str, Any]) -> bytes:
    """The weights that noise leaves where they are, over its standard deviation, as PNG."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    styles = {"float16": ("#0072B2", "-"), "bfloat16": ("#D55E00", "--")}
    for dtype, (color, dashes) in styles.items():
        shares = [100 * results["still"][dtype][f"{sigma:g}"] for sigma in SIGMAS]
        axes.plot(SIGMAS, shares, color=color, linestyle=dashes, marker="o", linewidth=2, label=dtype)
    axes.set(title=f"Weights N(0, {DEVIATION:g}²) that do not move (%)", xlabel="sigma", xscale="log")
    return plots.finish(figure, axes)


def _digits() -> tuple[Batch, Batch]:
    loaded = datasets.load_digits()
    images, labels = loaded.data / 16, loaded.target
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:NUM_TRAIN], order[-NUM_TEST:]

    def part(rows: np.ndarray) -> Batch:
        return images[rows].astype(np.float32), labels[rows].astype(np.int32)

    return part(train), part(test)


def _start(seed: int) -> Params:
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    ends = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    kernels = {
        f"w{i}": jnp.sqrt(2 / n) * jax.random.normal(key, (n, m)) for i, (key, n, m) in enumerate(ends)
    }
    return kernels | {f"b{i}": jnp.zeros(m) for i, m in enumerate(WIDTHS[1:])}


def _logits(params: Params, x: Any, dtype: Any) -> jax.Array:
    cast = {name: w.astype(dtype) for name, w in params.items()}
    hidden = jax.nn.relu(jnp.asarray(x).astype(dtype) @ cast["w0"] + cast["b0"])
    return hidden @ cast["w1"] + cast["b1"]


def _loss(params: Params, batch: Batch, computed: Any = jnp.float32, scale: float = 1.0) -> jax.Array:
    """The mean cross-entropy, times `scale`; from the logits on in float32 at least."""
    logits = noise.widen(_logits(params, batch[0], computed))
    return scale * optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@functools.partial(jax.jit, static_argnums=0)
def _value_and_grad(mode: Mode, key: jax.Array, params: Params, batch: Batch, sigma: Any) -> Any:
    """With loss scaling, as a user would write it around the library."""
    loss = functools.partial(_loss, computed=mode.computed, scale=mode.scale)
    value, grads = nso_jax.value_and_grad(loss, sigma=sigma)(key, params, batch)
    return value / mode.scale, jax.tree.map(lambda g: g.astype(jnp.float32) / mode.scale, grads)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    mode: Mode, state: tuple[Params, Params], key: jax.Array, batch: Batch, sigma: Any
) -> tuple[Params, Params]:
    """SGD with momentum, both in the dtype that weights are stored in."""
    params, momentum = state
    _, grads = _value_and_grad(mode, key, params, batch, sigma)
    momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g.astype(m.dtype), momentum, grads)
    return jax.tree.map(lambda w, m: w - RATE * m, params, momentum), momentum


def _train(mode: Mode, sigma: float, seed: int, steps: int, train: Batch) -> Params:
    params = {name: w.astype(mode.stored) for name, w in _start(seed).items()}
    state = params, jax.tree.map(jnp.zeros_like, params)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    for n in range(steps):
        rows = rng.integers(len(train[1]), size=BATCH_SIZE)
        batch = (train[0][rows], train[1][rows])
        state = _step(mode, state, jax.random.fold_in(key, n), batch, sigma)
    return {name: w.astype(jnp.float32) for name, w in state[0].items()}


def _measure(params: Params, train: Batch, test: Batch) -> dict[str, float]:
    """Training loss, test accuracy and the trace of the training loss's Hessian, in float32."""
    right = jnp.argmax(_logits(params, test[0], jnp.float32), axis=-1) == test[1]
    trace = curvature.trace(jax.random.key(0), _loss, params, train, num_products=NUM_PRODUCTS)
    figures = float(_loss(params, train)), 100 * float(jnp.mean(right)), trace.value
    return dict(zip(MEASURED, figures, strict=True))


def _estimate(mode: Mode, sigma: float, weights: Params, batch: Batch, draws: int) -> Estimated:
    """In percent: weights that stay, the noise's variance that is kept, rise of the loss, gradient's error.

    The last two are of the average over draws, against float64 at the same weights with the same noise.
    Without noise only the gradient has something to show.
    """
    params = {name: w.astype(mode.stored) for name, w in weights.items()}
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
def _moved(
    mode: Mode, key: jax.Array, params: Params, sigma: Any
) -> tuple[Params, Params, dict[int, Params]]:
    """The library's first draw for a key, and the weights that the loss computes with, plain and moved."""

    def cast(tree: Params) -> Params:
        return {name: w.astype(mode.computed) for name, w in tree.items()}

    u = noise.perturbation(jax.random.split(key, 1)[0], params, sigma)
    return u, cast(params), {sign: cast(noise.perturb(params, u, sign)) for sign in (1, -1)}


def _in_float64(params: Params, u: Params, sign: int, batch: Batch) -> tuple[float, np.ndarray]:
    wide, moves = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (params, u))
    with jax.enable_x64(True):
        moved = jax.tree.map(lambda w, u: w + sign * u, wide, moves)
        value, grads = _value_and_grad_in_float64(moved, (batch[0].astype(np.float64), batch[1]))
        return float(value), _flat(grads)


@jax.jit
def _value_and_grad_in_float64(params: Params, batch: Batch) -> Any:
    return jax.value_and_grad(functools.partial(_loss, computed=jnp.float64))(params, batch)


def _flat(tree: Params) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in sorted(tree)])


def _with_deviation(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return table.with_error(statistics.mean(values), deviation)
