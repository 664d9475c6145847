"""Whether the states of optimizers come back from files and from JAX's tree functions as they were."""

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import nso_jax
from nso_jax import sharpness
from tests.reliability.outcome import Advance, Outcome

State = Any
Optimizer = Callable[[jax.Array], optax.GradientTransformationExtraArgs]

NUM_STEPS = 3  # before the trip, so that no leaf is as it was at the start

OPTIMIZERS: dict[str, Optimizer] = {
    "noise_stability": lambda key: nso_jax.noise_stability(0.1, key=key),
    "chain": lambda key: optax.chain(
        nso_jax.noise_stability(optax.linear_schedule(0.1, 0.0, 8), key=key, num_samples=2),
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(1e-2, 8)),
    ),
    "nso": lambda key: nso_jax.nso(optax.adam(1e-2), 0.1, key=key),
    "nnx.Optimizer": lambda key: nso_jax.nso(optax.adam(1e-2), 0.1, key=key),
    "bsam": lambda key: sharpness.bsam(0.1, num_examples=100, key=key),
}

KEYS: dict[str, Callable[[int], jax.Array]] = {
    "typed": jax.random.key,
    "legacy": jax.random.PRNGKey,
    "rbg": functools.partial(jax.random.key, impl="rbg"),
}


class Training(NamedTuple):
    """A training of a few weights.

    Attributes:
        init: `init(seed)`, the weights and the optimizer's state.
        step: `step(state) -> state`, compiled.
    """

    init: Callable[[int], State]
    step: Callable[[State], State]


@functools.cache
def training(optimizer: str, key: str) -> Training:
    """The training by an optimizer of `OPTIMIZERS`, with a key of `KEYS`."""
    inputs = jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)

    def make(seed: int) -> optax.GradientTransformationExtraArgs:
        return OPTIMIZERS[optimizer](KEYS[key](seed))

    def init(seed: int) -> State:
        params = {"kernel": jnp.full((4, 3), 0.1 * seed), "bias": jnp.full(3, 0.5 * seed, jnp.bfloat16)}
        return params, make(seed).init(params)

    def grad_fn(params: Any, _: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.tanh(inputs @ params["kernel"] + params["bias"].astype(jnp.float32)) ** 2)

        return jax.grad(loss)(params)

    @jax.jit
    def step(state: State) -> State:
        params, opt_state = state
        updates, opt_state = make(0).update(grad_fn(params, 0), opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    def made_nnx(seed: int) -> tuple[nnx.Module, nnx.Optimizer]:
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(seed))
        return model, nnx.Optimizer(model, make(seed), wrt=nnx.Param)

    @jax.jit
    def step_nnx(state: State) -> State:
        model, optimizer = nnx.merge(nnx.graphdef(made_nnx(0)), state)
        optimizer.update(model, grad_fn(nnx.state(model, nnx.Param), 0), grad_fn=grad_fn)
        return nnx.state((model, optimizer))

    if optimizer == "nnx.Optimizer":
        return Training(lambda seed: nnx.state(made_nnx(seed)), step_nnx)
    return Training(init, step)


def _orbax(state: State, like: State, folder: Path) -> State:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", like)


def _orbax_by_shapes(state: State, like: State, folder: Path) -> State:
    return _orbax(state, jax.tree.map(ocp.tree.to_shape_dtype_struct, like), folder)


def _msgpack(state: State, like: State, _: Path) -> State:
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def _state_dict(state: State, like: State, _: Path) -> State:
    return flax.serialization.from_state_dict(like, flax.serialization.to_state_dict(state))


def _pure(route: Callable[[State, State, Path], State]) -> Callable[[State, State, Path], State]:
    """With a `nnx.State` as a dictionary, which `flax.serialization` needs."""

    def travel(state: State, like: State, folder: Path) -> State:
        if not isinstance(state, nnx.State):
            return route(state, like, folder)
        nnx.replace_by_pure_dict(like, route(nnx.to_pure_dict(state), nnx.to_pure_dict(like), folder))
        return like

    return travel


def _flatten(state: State, like: State, _: Path) -> State:
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(state))


def _map(state: State, like: State, _: Path) -> State:
    return jax.tree.map(lambda leaf, _: jnp.copy(leaf), state, like)


def _numpy(state: State, _like: State, _folder: Path) -> State:
    return jax.tree.map(np.asarray, state)


# `route(state, like, folder)`, with the state of another training of the same kind.
ROUTES: dict[str, Callable[[State, State, Path], State]] = {
    "Orbax": _orbax,
    "Orbax, by shapes": _orbax_by_shapes,
    "msgpack": _pure(_msgpack),
    "state dict": _pure(_state_dict),
    "flatten": _flatten,
    "map": _map,
    "NumPy": _numpy,
}


def lost(optimizer: str, key: str, route: str) -> list[str]:
    """What differs after a round trip: paths of leaves, and those of the state after one more step.

    Args:
        optimizer: One of `OPTIMIZERS`.
        key: One of `KEYS`.
        route: One of `ROUTES`.
    """
    init, step = training(optimizer, key)
    state = init(1)
    for _ in range(NUM_STEPS):
        state = step(state)
    with tempfile.TemporaryDirectory() as folder:
        back = ROUTES[route](state, init(2), Path(folder))
    return _differences(state, back) + [f"next {path}" for path in _differences(step(state), step(back))]


def round_trips(advance: Advance = lambda _: None) -> Outcome:
    """Sends the state of each optimizer, with each kind of key, on each route.

    Args:
        advance: Called with 1 after each trip.

    Returns:
        The trips, with those after which neither a leaf nor the next step differed in a bit.
    """
    survived = []
    for trip in itertools.product(OPTIMIZERS, KEYS, ROUTES):
        survived.append(not lost(*trip))
        advance(1)
    note = f"by {', '.join(ROUTES)}: all leaves and the next step are the same, to the bit"
    return Outcome("round trip of an optimizer's state", len(survived), sum(survived), note)


def _differences(one: State, other: State) -> list[str]:
    structures: list[Any] = [jax.tree.structure(one), jax.tree.structure(other)]
    if structures[0] != structures[1]:
        return ["structure"]
    pairs = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True)
    return [jax.tree_util.keystr(path) for (path, a), b in pairs if _bits(a) != _bits(b)]


def _bits(leaf: Any) -> tuple[Any, ...]:
    array = np.asarray(leaf)
    return array.dtype, array.shape, array.tobytes()
