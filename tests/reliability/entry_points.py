"""The ways to call the library: each takes a step on one small problem."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nso_jax
import nso_jax.nnx
from nso_jax import parallel, sharpness

Params = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array]
# fn(key, params, batch, hit) -> (value, or a pair of it and auxiliary output; gradients)
Method = Callable[[jax.Array, Params, Batch, jax.Array], tuple[Any, Params]]

NUM_EXAMPLES = 32
PATIENCE = 3  # consecutive bad steps that are skipped
RATE = 0.02
STRENGTH = 0.02  # sigma or rho of the steps that are good


class Inputs(NamedTuple):
    """What a step gets: a fault changes some of it."""

    key: jax.Array
    params: Params
    batch: Batch
    hit: jax.Array
    strength: jax.Array


class Entry(NamedTuple):
    """A way to call the library.

    Attributes:
        method: From the strength to a function of key, params, batch and hit.
        of_one_point: Whether all it returns comes from the same evaluations: the rivals' value is that at W.
    """

    method: Callable[[jax.Array], Method]
    of_one_point: bool = True


class _Bilinear(nnx.Module):
    def __init__(self, params: Params) -> None:
        self.w1, self.w2 = nnx.Param(params["w1"]), nnx.Param(params["w2"])


def make_problem(rng: np.random.Generator, dtype: Any = jnp.float32) -> tuple[Params, Batch]:
    """Weights to start from, and what other weights make of normal inputs."""

    def draw() -> Params:
        return {
            "w1": jnp.asarray(rng.normal(size=(4, 8)) / 2, dtype),
            "w2": jnp.asarray(rng.normal(size=8) / 2, dtype),
        }

    x = jnp.asarray(rng.normal(size=(NUM_EXAMPLES, 4)), jnp.float32)
    return draw(), (x, _outputs(draw(), x))


def _outputs(params: Params, x: jax.Array) -> jax.Array:
    w1, w2 = (params[name].astype(jnp.float32) for name in ("w1", "w2"))
    return jax.nn.silu(x @ w1) @ w2


def mean_squared_error(params: Params, batch: Batch, hit: Any = jnp.inf) -> jax.Array:
    """The mean squared error; infinite where a certain weight is above `hit`."""
    x, y = batch
    factor = jnp.where(params["w2"][0].astype(jnp.float32) > hit, jnp.inf, 1.0)
    return jnp.mean((_outputs(params, x) - y) ** 2) * factor


def error_and_aux(params: Params, batch: Batch, hit: Any = jnp.inf) -> tuple[jax.Array, Any]:
    loss = mean_squared_error(params, batch, hit)
    return loss, {"loss": loss}


def _loss_of_module(model: _Bilinear, batch: Batch, hit: Any) -> jax.Array:
    return mean_squared_error({"w1": model.w1[...], "w2": model.w2[...]}, batch, hit)


def gradient_functions() -> dict[str, Entry]:
    """The functions that return a value and gradients."""
    mesh = device_mesh(jax.device_count())
    split = jax.P("data")

    def on_module(s: jax.Array) -> Method:
        fn = nso_jax.nnx.value_and_grad(_loss_of_module, sigma=s)

        def method(key: jax.Array, params: Params, batch: Batch, hit: jax.Array) -> tuple[Any, Params]:
            value, grads = fn(key, _Bilinear(params), batch, hit)
            return value, nnx.to_pure_dict(grads)

        return method

    def mapped(s: jax.Array) -> Method:
        fn = nso_jax.value_and_grad(mean_squared_error, sigma=s, axis_name="data")
        return jax.shard_map(fn, mesh=mesh, in_specs=(jax.P(), jax.P(), split, jax.P()), out_specs=jax.P())

    def many(s: jax.Array) -> Method:
        return nso_jax.value_and_grad(
            error_and_aux, sigma=s, num_samples=8, chunk_size=3, clean_weight=0.5, has_aux=True
        )

    return {
        "value_and_grad": Entry(lambda s: nso_jax.value_and_grad(mean_squared_error, sigma=s)),
        "value_and_grad of 8 draws in chunks, with mean aux and clean_weight": Entry(many),
        "nnx.value_and_grad": Entry(on_module),
        "parallel.value_and_grad": Entry(
            lambda s: parallel.value_and_grad(mean_squared_error, sigma=s, mesh=mesh)
        ),
        "shard_map": Entry(mapped),
        "parallel.microbatch": Entry(
            lambda s: parallel.microbatch(nso_jax.value_and_grad(mean_squared_error, sigma=s), 4)
        ),
        "sam": Entry(lambda s: sharpness.sam(mean_squared_error, rho=s), of_one_point=False),
        "usam": Entry(lambda s: sharpness.usam(mean_squared_error, rho=s), of_one_point=False),
        "asam": Entry(lambda s: sharpness.asam(mean_squared_error, rho=s), of_one_point=False),
        "rsam": Entry(
            lambda s: sharpness.rsam(mean_squared_error, rho=s, sigma=STRENGTH), of_one_point=False
        ),
    }


def device_mesh(size: int) -> jax.sharding.Mesh:
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((size,), ("data",), axis_types, devices=jax.devices()[:size])


def training_step(entry: Entry) -> Any:
    """A training step with the recipe: `init(params)`, `update(inputs, state) -> params, state, seen`."""
    optimizer = optax.apply_if_finite(optax.sgd(RATE, momentum=0.9), PATIENCE)

    @jax.jit
    def update(inputs: Inputs, state: Any) -> tuple[Params, Any, Any]:
        key, params, batch, hit, strength = inputs
        out, grads = entry.method(strength)(key, params, batch, hit)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (out, grads)

    return optimizer.init, update


def transformations() -> dict[str, Any]:
    """The same of the optax adapter, which goes before `apply_if_finite`, and of BSAM, which goes inside."""
    key = jax.random.key(0)

    def averaged(strength: Any) -> tuple[Any, Any]:
        first = nso_jax.noise_stability(strength, key=key, num_samples=2)
        rest = optax.apply_if_finite(optax.sgd(RATE, momentum=0.9), PATIENCE)
        return first, optax.chain(first, rest)

    def bayesian(_: Any) -> tuple[Any, Any]:
        first = sharpness.bsam(5 * RATE, num_examples=1000, key=key)
        return first, optax.apply_if_finite(first, PATIENCE)

    def step(make: Callable[[Any], tuple[Any, Any]]) -> Any:
        @jax.jit
        def update(inputs: Inputs, state: Any) -> tuple[Params, Any, Any]:
            _, params, batch, hit, strength = inputs
            first, tx = make(strength)

            def grad_fn(params: Params, _: Any) -> Params:
                return jax.grad(mean_squared_error)(params, batch, hit)

            plain = grad_fn(params, 0)
            own = states_in(state, nso_jax.NoiseStabilityState | sharpness.BSAMState)[0]
            seen, _ = first.update(plain, own, params, grad_fn=grad_fn)
            updates, state = tx.update(plain, state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), state, ((), seen)

        return make(STRENGTH)[1].init, update

    return {"noise_stability": step(averaged), "bsam": step(bayesian)}


def states_in(state: Any, kind: Any) -> list[Any]:
    """The states of some kind within an optimizer's."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [node for node in nodes if isinstance(node, kind)]
