"""What optax transformations that evaluate the loss share: their calls, their keys, their gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nso_jax._axes import AxisName, check_own_gradients
from nso_jax._callers import check_not_in_multi_steps
from nso_jax._checks import PyTree, check_inexact, describe, is_numeric, leaf_name


def check_update_arguments(name: str, params: PyTree, grad_fn: Any) -> None:
    """Raises ValueError or TypeError unless a transformation got what it needs to evaluate the loss."""
    check_not_in_multi_steps(name)
    call = "call update(updates, state, params, grad_fn=grad_fn)."
    if params is None:
        raise ValueError(f"params: {name} perturbs them, but got None; {call}")
    if not callable(grad_fn):
        found = describe(grad_fn)
        raise TypeError(f"grad_fn: expected a function (params, i) -> gradients, got {found}; {call}")
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(x, optax.MaskedNode) for x in nodes):
        raise ValueError(
            "params: some are optax.MaskedNode, which no loss can take. Put optax.masked and optax.partition "
            f"inside, around what follows {name}. To perturb some leaves only, use mask."
        )
    check_inexact(params)


def check_like_params(name: str, grads: PyTree, params: PyTree) -> None:
    """Raises ValueError or TypeError unless gradients have the structure and shapes of the params."""
    given: Any = jax.tree.structure(grads)
    expected: Any = jax.tree.structure(params)
    if given != expected:
        raise ValueError(f"{name}: expected a pytree like params, {expected}, got {given}.")
    for (path, leaf), w in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(params), strict=True):
        if not is_numeric(leaf) or jnp.shape(leaf) != jnp.shape(w):
            raise ValueError(
                f"{name}: leaf {leaf_name(path)} is {describe(leaf)}, expected the shape of {describe(w)}."
            )
    check_inexact(grads, name)


def key_for_state(key: jax.Array) -> jax.Array:
    """A key's data, copied: a state may be donated, the caller's key may not."""
    return jnp.array(jax.random.key_data(key))


def key_of_update(key: jax.Array, state: Any) -> jax.Array:
    """The key of the update that a state with `rng_key` and `count` is at, of the same kind as `key`."""
    rng_key = jax.random.wrap_key_data(state.rng_key, impl=jax.random.key_impl(key))
    return jax.random.fold_in(rng_key, state.count)


def checked_gradients(name: str, grad_fn: Any, params: PyTree, i: Any, axis_name: AxisName | None) -> PyTree:
    """`grad_fn(params, i)`; raises ValueError or TypeError if it may be but a part, or is none."""
    check_own_gradients(name, lambda w: grad_fn(w, i), params, axis_name)
    grads = grad_fn(params, i)
    check_like_params("grad_fn", grads, params)
    return grads
