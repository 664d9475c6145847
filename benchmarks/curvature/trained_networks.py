"""The networks whose Hessians are measured, trained on digits, and what is exact about them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.tasks import data
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import MLP, ConvNet, pure_loss
from benchmarks.training import loop, methods
from benchmarks.training.loop import Settings, Task
from nso_jax import curvature


class Case(NamedTuple):
    """A network, and how much is spent on it.

    Attributes:
        title: What it is called.
        model: `model(rngs=...)` makes it.
        methods: For the trace, besides Hutchinson's.
        seeds: Estimates of the trace at each number of products.
        probes: Single probes that show how much those of Hutchinson's method vary.
        repetitions: Measurements of each time.
    """

    title: str
    model: Callable[..., nnx.Module]
    methods: tuple[str, ...]
    seeds: int
    probes: int
    repetitions: int


class Problem(NamedTuple):
    """A trained network: `fun(params, batch)` is its mean loss over a batch, in evaluation mode."""

    model: nnx.Module
    fun: Callable[[nnx.State, Examples], jax.Array]
    params: nnx.State
    batches: list[Examples]


NETWORKS = {
    "mlp": Case(
        "MLP",
        functools.partial(MLP, (64, 256, 128, 10)),
        methods=("xtrace", "hutch++"),
        seeds=20,
        probes=300,
        repetitions=5,
    ),
    # Its products take five times as long.
    "convnet": Case(
        "ConvNet",
        functools.partial(ConvNet, dropout=0.0),
        methods=("xtrace",),
        seeds=20,
        probes=100,
        repetitions=3,
    ),
}
NUM_EXAMPLES, NUM_BATCHES = 1792, 4
EPOCHS, BATCH_SIZE, LEARNING_RATE = 10, 64, 0.05
REFERENCE_SEED, REFERENCE_TOLERANCE = 2**20, 1e-6
CHUNK = 28  # examples whose gradients are held at once
NUM_EIGENVALUES, EIGENVALUE_SEEDS = 5, 3
NetworkName = Literal["mlp", "convnet"]


def _examples() -> Examples:
    split = data.digits(0, 797)
    parts = zip(split.test, split.train, strict=True)
    return Examples(*(np.concatenate(part)[:NUM_EXAMPLES] for part in parts))


def trained(case: Case) -> Problem:
    """The network after some epochs: the loss is small, but far from zero."""
    examples = _examples()
    task = Task(
        lambda seed: case.model(rngs=nnx.Rngs(seed)),
        functools.partial(data.batches, examples, BATCH_SIZE),
        NUM_EXAMPLES,
    )
    settings = Settings(EPOCHS * (NUM_EXAMPLES // BATCH_SIZE), LEARNING_RATE)
    model = loop.train(task, methods.METHODS["sgd"], settings).model
    fun, params = pure_loss(model)
    parts = zip(*(np.split(part, NUM_BATCHES) for part in examples), strict=True)
    return Problem(model, fun, params, [Examples(*map(jnp.asarray, part)) for part in parts])


def reference(problem: Problem) -> dict[str, Any]:
    """The exact trace, and eigenvalues with their residuals."""
    model, fun, params, batches = problem
    loss, key = jax.jit(fun), jax.random.key(REFERENCE_SEED)
    h = curvature.hessian(fun, params, batches)
    pairs = curvature.eigenvalues(key, h, k=NUM_EIGENVALUES, tol=REFERENCE_TOLERANCE)
    return {
        "loss": float(np.mean([loss(params, batch) for batch in batches])),
        "trace": exact_trace(model, batches),
        "eigenvalues": pairs.values.tolist(),
        "relative_residuals": (pairs.residuals / abs(pairs.values)).tolist(),
    }


def exact_trace(model: nnx.Module, batches: Sequence[Examples]) -> float:
    """The trace of the Hessian of the mean cross-entropy, without sampling.

    The outputs z of a network of ReLUs are piecewise linear in each single weight, so that the diagonal of
    the Hessian is that of the Gauss-Newton matrix. With p = softmax(z), its trace is the mean over the
    examples of

        sum_c p_c || grad (z_c - sum_d p_d z_d) ||^2,    p being held constant.

    Args:
        model: The network, in evaluation mode.
        batches: The data.

    Returns:
        The trace.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types it so

    def weighted(params: nnx.State, image: jax.Array) -> jax.Array:
        outputs = nnx.merge(graphdef, params, rest, copy=True)(image[None])[0]
        shares = jax.lax.stop_gradient(jax.nn.softmax(outputs))
        return jnp.sqrt(shares) * (outputs - shares @ outputs)

    def squares(params: nnx.State, image: jax.Array) -> jax.Array:
        return optax.tree.norm(jax.jacrev(weighted)(params, image), squared=True)

    each = jax.jit(jax.vmap(squares, in_axes=(None, 0)))
    images = np.concatenate([batch.inputs for batch in batches])
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    return float(np.mean(np.concatenate([each(params, chunk) for chunk in chunks]), dtype=np.float64))
