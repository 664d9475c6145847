"""What rounding to 16 bits does to weight noise and to the estimate of the gradient."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nso_jax
import nso_jax.nnx
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import MLP
from nso_jax import noise

Estimated = dict[str, float | None]
WIDTHS = (64, 64, 10)
DEVIATION = 0.05  # of the weights whose moves are counted
NUM_WEIGHTS = 100_000
SIGMAS = (1e-4, 1e-3, 1e-2, 1e-1)
NOISES = {
    **{f"{sigma:g}": sigma for sigma in SIGMAS},
    **{f"{scale:g} of the weight": noise.relative(scale) for scale in (1e-3, 1e-2, 1e-1)},
}
ESTIMATED = ("still", "variance", "rise", "error")  # in percent


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


def cast(tree: Any, dtype: Any) -> Any:
    """All leaves in a dtype."""
    return jax.tree.map(lambda w: w.astype(dtype), tree)


def network(seed: int, dtype: Any) -> MLP:
    """A fresh network with its weights in a dtype."""
    model = MLP(WIDTHS, rngs=nnx.Rngs(seed))
    nnx.update(model, cast(nnx.state(model), dtype))
    return model


def scaled_loss(mode: Mode, model: nnx.Module, batch: Examples) -> jax.Array:
    """The mean cross-entropy, times the mode's factor; from the logits on in float32 at least."""
    graphdef, params = nnx.split(model)
    logits = nnx.merge(graphdef, cast(params, mode.computed))(jnp.asarray(batch.inputs, mode.computed))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch.labels)
    return mode.scale * losses.mean()


def unscaled(mode: Mode, grads: Any) -> Any:
    """Gradients without the mode's factor, in float32."""
    return jax.tree.map(lambda g: g.astype(jnp.float32) / mode.scale, grads)


def estimate(mode: Mode, sigma: float, weights: nnx.State, batch: Examples, draws: int) -> Estimated:
    """In percent: weights that stay, the noise's variance that is kept, rise of the loss, gradient's error.

    The last two are of the average over draws, against float64 at the same weights with the same noise.
    Without noise only the gradient has something to show.
    """
    params = cast(weights, mode.stored)
    unmoved, variances, values, grads, true_values, true_grads = [], [], [], [], [], []
    for n in range(draws):
        key = jax.random.fold_in(jax.random.key(1), n)
        u, before, sides = _moved(mode, key, params, sigma)
        for sign, after in sides.items():
            moves = flat(after) - flat(before)
            unmoved.append(np.mean(moves == 0))
            variances.append(np.mean(moves**2))
            value, grad = _in_float64(params, u, sign, batch)
            true_values.append(value)
            true_grads.append(grad)
        value, grad = _value_and_grad(mode, key, params, batch, sigma)
        values.append(float(value))
        grads.append(flat(grad))
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
    return value / mode.scale, unscaled(mode, grads)


def _loss_of_params(mode: Mode, params: nnx.State, batch: Examples) -> jax.Array:
    return scaled_loss(mode, nnx.merge(graphdef(), params), batch)


@functools.cache
def graphdef() -> nnx.GraphDef[Any]:
    """The network's structure."""
    return nnx.graphdef(network(0, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _moved(
    mode: Mode, key: jax.Array, params: nnx.State, sigma: Any
) -> tuple[nnx.State, nnx.State, dict[int, nnx.State]]:
    """The library's first draw for a key, and the weights that the loss computes with, plain and moved."""
    u = noise.perturbation(jax.random.split(key, 1)[0], params, sigma)
    moved = {sign: cast(noise.perturb(params, u, sign), mode.computed) for sign in (1, -1)}
    return u, cast(params, mode.computed), moved


def _in_float64(params: nnx.State, u: nnx.State, sign: int, batch: Examples) -> tuple[float, np.ndarray]:
    wide, moves = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (params, u))
    with jax.enable_x64(True):
        moved = jax.tree.map(lambda w, u: w + sign * u, wide, moves)
        value, grads = _value_and_grad_in_float64(moved, batch)
        return float(value), flat(grads)


@jax.jit
def _value_and_grad_in_float64(params: nnx.State, batch: Examples) -> Any:
    mode = Mode(jnp.float64, jnp.float64)
    return jax.value_and_grad(functools.partial(_loss_of_params, mode))(params, batch)


def flat(tree: nnx.State) -> np.ndarray:
    """All leaves in one float64 vector."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
