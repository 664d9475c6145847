"""Checks of arguments that the matrices and the estimators share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax._checks import check_real_params, check_scalar, describe, leaf_mask, leaf_name

_OUTSIDE = "curvature.* loops over the data in Python: call it outside jit, vmap and grad."


def check_concrete(name: str, tree: Any) -> None:
    """Raises TypeError for an array whose values jit, vmap or grad hide."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.core.Tracer):
            where = f" for leaf {leaf_name(path)}" if path else ""
            raise TypeError(f"{name}: got a tracer, {describe(leaf)}{where}; {_OUTSIDE}")


def check_outside_jit(name: str) -> None:
    """Raises TypeError inside jit, where all that is computed is a tracer."""
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise TypeError(f"{name}: expected to be used outside of jit; {_OUTSIDE}")


def check_params(params: Any) -> Any:
    """`params` with every leaf a JAX array; raises for leaves that have no curvature or a complex one."""
    check_real_params(params, "curvature is of real parameters")
    check_concrete("params", params)
    check_outside_jit("params")
    return jax.tree.map(jnp.asarray, params)


def check_like(name: str, tree: Any, params: Any) -> None:
    """Raises unless a pytree has the structure and the shapes of params, and known values."""
    check_concrete(name, tree)
    given, expected = (
        {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(each)} for each in (tree, params)
    )
    structures: Any = jax.tree.structure(params), jax.tree.structure(tree)
    if structures[0] != structures[1]:
        odd = [leaf for leaf in expected | given if (leaf in expected) != (leaf in given)]
        hint = f"; only one of them has leaf {odd[0]}" if odd else ""
        raise ValueError(
            f"{name}: expected a pytree like params, {structures[0]}, got {structures[1]}{hint}."
        )
    for leaf, like in expected.items():
        if np.shape(given[leaf]) != like.shape:
            raise ValueError(
                f"{name}: expected shape {like.shape} for leaf {leaf}, got {np.shape(given[leaf])}."
            )


def check_tolerance(name: str, value: Any) -> None:
    """Raises unless `value` is a positive, finite number."""
    check_scalar(name, value, lambda x: 0 < x < np.inf, "a positive, finite number")


def chosen_leaves(mask: Any, params: Any) -> tuple[bool, ...]:
    """One bool for each leaf of `params`; raises ValueError if `mask` selects none."""
    flags = tuple(leaf_mask(mask, params))
    if not any(flags):
        raise ValueError("mask: selects no leaf of params.")
    return flags
