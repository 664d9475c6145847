"""What an optax transformation that evaluates the loss is called with."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

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
