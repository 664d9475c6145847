"""What `step_cost` times: training steps of several networks, in JAX and in PyTorch, and noise alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nso_jax
from benchmarks.kit import timing
from benchmarks.kit.timing import Call
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import MLP, ConvNet, StridedConvNet, Transformer, pure_loss
from nso_jax import noise, parallel

SIGMA, RHO, LEARNING_RATE, MOMENTUM = 0.01, 0.05, 1e-3, 0.9
RELATIVE_SCALE, NUM_PARTS = 0.5, 4  # of one-sided noise in microbatches
NOISE_SHAPE = (2000, 2000)

Loss = Callable[[nnx.State, Examples], jax.Array]
Gradient = Callable[[jax.Array, nnx.State, Examples], tuple[jax.Array, nnx.State]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the size of its batch.

    Attributes:
        title: What it is called.
        model: Makes the network.
        shape: Of the batch.
        vocabulary: How many tokens there are; None for images.
        without: Steps that take too long to compile.
    """

    title: str
    model: Callable[..., nnx.Module]
    shape: tuple[int, ...]
    vocabulary: int | None = None
    without: tuple[str, ...] = ()


CASES = {
    "convnet": Case("ConvNet, 8x8", functools.partial(ConvNet, dropout=0.0), (52, 8, 8, 1)),
    "convnet-28": Case("ConvNet, 28x28", StridedConvNet, (64, 28, 28, 1)),
    "mlp-64": Case("MLP, batch 64", MLP, (64, 28, 28, 1)),
    "mlp-512": Case("MLP, batch 512", MLP, (512, 28, 28, 1)),
    "transformer": Case(
        "Transformer",
        Transformer,
        (16, 64),
        vocabulary=1000,
        without=("nso-signs-k4",),
    ),
}


def step_calls(case: Case) -> tuple[int, dict[str, Call]]:
    """How many weights a case's network has, and what is to be timed of it.

    Args:
        case: The case.

    Returns:
        The number, and calls: each takes a whole training step, or evaluates only a gradient.
    """
    model, batch = case.model(rngs=nnx.Rngs(0)), _batch(case)
    loss, params = pure_loss(model)
    num_weights = sum(w.size for w in jax.tree.leaves(params))
    calls = _jax_calls(loss, params, batch, case.without)
    if device := timing.torch_device():
        from benchmarks.cost import torch_steps  # noqa: PLC0415

        network = type(model).__name__
        if network in torch_steps.MODELS:
            torch_weights, rivals = torch_steps.steps(
                network,
                batch,
                device,
                sigma=SIGMA,
                rho=RHO,
                learning_rate=LEARNING_RATE,
                momentum=MOMENTUM,
            )
            assert torch_weights == num_weights, f"{torch_weights} weights in PyTorch, {num_weights} in JAX"  # noqa: S101
            calls |= rivals
    return num_weights, calls


def noise_calls() -> dict[str, Call]:
    """Calls that add a constant, or noise, to an array of weights."""
    key, weights = jax.random.key(0), jnp.zeros(NOISE_SHAPE)

    def adding(sampler: noise.Sampler) -> Call:
        def add(key: jax.Array, weights: jax.Array) -> jax.Array:
            return noise.perturb(weights, noise.perturbation(key, weights, SIGMA, sampler=sampler))

        return functools.partial(jax.jit(add), key, weights)

    return {
        "constant": functools.partial(jax.jit(jnp.add), weights, jnp.float32(SIGMA)),
        "signs": adding(noise.rademacher),
        "normal": adding(noise.normal),
        "jax-normal": adding(jax.random.normal),
    }


def _batch(case: Case) -> Examples:
    rng = np.random.default_rng(0)
    tokens = rng.integers(case.vocabulary or 1, size=case.shape)
    inputs = jnp.asarray(tokens if case.vocabulary else rng.standard_normal(case.shape, np.float32))
    return Examples(inputs, jnp.asarray(rng.integers(10, size=len(inputs))))


def _jax_calls(loss: Loss, params: nnx.State, batch: Examples, without: tuple[str, ...]) -> dict[str, Call]:
    sgd = optax.sgd(LEARNING_RATE, MOMENTUM)
    gradients = {name: g for name, g in _gradients(loss).items() if name not in without}
    calls = {name: _training(loss, g, sgd, params, batch) for name, g in gradients.items()}
    calls["sam"] = _training(loss, gradients["plain"], _sam_of_optax(sgd), params, batch)
    key = jax.random.key(0)
    for name in ("plain", "nso", "nso-signs"):
        calls[f"{name}-gradient"] = functools.partial(jax.jit(gradients[name]), key, params, batch)
    return calls


def _gradients(loss: Loss) -> dict[str, Gradient]:
    nso = functools.partial(nso_jax.value_and_grad, loss, sigma=SIGMA)

    def plain(_: jax.Array, params: nnx.State, batch: Examples) -> tuple[jax.Array, nnx.State]:
        return jax.value_and_grad(loss)(params, batch)

    return {
        "plain": plain,
        "nso": nso(),
        "nso-signs": nso(sampler=noise.rademacher),
        "nso-k4": nso(num_samples=4),
        "nso-signs-k4": nso(num_samples=4, sampler=noise.rademacher),
        "one-sided": nso(antithetic=False),
        "one-sided-signs": nso(antithetic=False, sampler=noise.rademacher),
        "plain-parts": parallel.microbatch(plain, NUM_PARTS),
        "one-sided-parts": parallel.microbatch(
            nso(sigma=noise.relative(RELATIVE_SCALE), antithetic=False), NUM_PARTS
        ),
    }


def _sam_of_optax(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(optimizer, ascent, opaque_mode=True)


def _training(
    loss: Loss,
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    params: nnx.State,
    batch: Examples,
) -> Call:
    """A call that takes one step, each from where the last one ended."""
    key = jax.random.key(0)
    optimizer = optax.with_extra_args_support(optimizer)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: nnx.State, state: optax.OptState, key: jax.Array, batch: Examples) -> Any:
        value, grads = gradient(key, params, batch)
        grad_fn = lambda params, _: jax.grad(loss)(params, batch)  # noqa: E731
        updates, state = optimizer.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, value

    present = jax.tree.map(jnp.copy, (params, optimizer.init(params)))

    def call() -> Any:
        nonlocal present
        *present, value = step(*present, key, batch)
        return present, value

    return call
