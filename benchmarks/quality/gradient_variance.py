"""The variance that noise gives to the gradient, with fresh noise for each part of a batch."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

import nso_jax
from benchmarks.tasks import data, models
from benchmarks.tasks.data import Examples
from benchmarks.training import loop
from benchmarks.training.loop import Settings, Task
from benchmarks.training.methods import METHODS
from nso_jax import noise, parallel
from nso_jax.noise import Sigma

MEASURED_WIDTHS = (64, 64, 10)
PARTS = (1, 2, 4, 8)
REFERENCE_DRAWS = 4  # times as many for what the other variances are divided by
NUM_EXAMPLES = 512
WARM_UP_STEPS = 100
WARM_UP_RATE = 0.1
Loss = Callable[[nnx.State, Examples], jax.Array]
Flat = Callable[[jax.Array, nnx.State, Examples], jax.Array]


class Case(NamedTuple):
    """A noise whose variance is measured.

    Attributes:
        sigma: The noise.
        num_distinct: How many of the examples differ. With an eighth of them, all parts have the same.
    """

    sigma: Sigma
    num_distinct: int = NUM_EXAMPLES


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    standard_error: float


CASES = {
    "relative 0.8": Case(noise.relative(0.8)),
    "sigma 0.05": Case(0.05),
    "0.05, same digits": Case(0.05, num_distinct=NUM_EXAMPLES // max(PARTS)),
}


def relative_variances(draws: int, advance: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Of each case, the variance for each number of parts, over that for one, times the parts."""
    examples = data.digits(0, NUM_EXAMPLES).train
    loss, params = models.pure_loss(_warmed_up(examples))
    seeds = itertools.count()
    for name, case in CASES.items():
        one: Estimate | None = None
        for parts in PARTS:
            figures = {}
            for kind, gradient in _divided(loss, case.sigma, parts).items():
                batch = _batch(examples, case.num_distinct, kind)
                count = draws if one else REFERENCE_DRAWS * draws
                keys = jax.random.split(jax.random.key(next(seeds)), count)
                # Fetched one by one: with many steps under way simulated devices can starve each other.
                gradients = [np.asarray(gradient(key, params, batch)) for key in keys]
                estimate = _variance(np.stack(gradients))
                one = one or estimate
                figures[kind] = _times_parts(estimate, one, parts)._asdict()
                advance()
            yield {"case": name, "parts": parts, **figures}


@functools.cache
def _divided(loss: Loss, sigma: Sigma, parts: int) -> dict[str, Flat]:
    """The gradient as one vector, averaged over microbatches or devices. Cases share what is compiled."""
    mesh = jax.make_mesh(
        (parts,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:parts]
    )
    gradients = {
        "microbatches": parallel.microbatch(nso_jax.value_and_grad(loss, sigma=sigma), parts),
        "devices": parallel.value_and_grad(loss, sigma=sigma, mesh=mesh),
    }
    return {
        kind: jax.jit(lambda *args, fn=fn: ravel_pytree(fn(*args)[1])[0]) for kind, fn in gradients.items()
    }


def _batch(examples: Examples, num_distinct: int, kind: str) -> Examples:
    """The first examples, copied so that each part has all of them: a part is every m-th one, or a block."""
    copies = NUM_EXAMPLES // num_distinct

    def copy(x: Any) -> jax.Array:
        distinct = jnp.asarray(x)[:num_distinct]
        return (
            jnp.repeat(distinct, copies, axis=0)
            if kind == "microbatches"
            else jnp.concatenate(copies * [distinct])
        )

    return jax.tree.map(copy, examples)


def _variance(gradients: np.ndarray) -> Estimate:
    """The variance over the first axis, summed over the weights."""
    count, mean = len(gradients), gradients.mean(axis=0)
    squares = np.array([np.sum(np.square(x - mean)) for x in gradients]) * count / (count - 1)
    return Estimate(float(squares.mean()), float(squares.std(ddof=1)) / math.sqrt(count))


def _times_parts(estimate: Estimate, one: Estimate, parts: int) -> Estimate:
    value = parts * estimate.value / one.value
    if estimate is one:
        return Estimate(value, 0.0)
    relative = (figure.standard_error / figure.value for figure in (estimate, one))
    return Estimate(value, value * math.hypot(*relative))


def _warmed_up(examples: Examples) -> nnx.Module:
    """A network after some plain steps on all examples."""
    task = Task(mlp(MEASURED_WIDTHS), lambda *_: itertools.repeat(examples), NUM_EXAMPLES)
    return loop.train(task, METHODS["sgd"], Settings(WARM_UP_STEPS, WARM_UP_RATE)).model


def mlp(widths: tuple[int, ...]) -> Callable[[int], models.MLP]:
    """`model(seed)`, a network of these widths."""
    return lambda seed: models.MLP(widths, rngs=nnx.Rngs(seed))
