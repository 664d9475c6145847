"""In which precision noise is added and gradients are summed, and results are returned."""

from typing import Any

import jax
import jax.numpy as jnp

from nso_jax._checks import PyTree, is_inexact


def widen(x: PyTree) -> jax.Array:
    """`x` in float32 at least."""
    x = jnp.asarray(x)
    if jnp.finfo(x.dtype).bits >= 32:  # noqa: PLR2004  (float32, float64 and their complex kin)
        return x
    return x.astype(jnp.float32)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` with the dtypes of `like`, leaf by leaf."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def summed(stacks: list[jax.Array]) -> list[jax.Array]:
    """The sums over the leading axes, in float32 or int32 at least; floats are rounded once."""
    return [
        jnp.sum(widen(x), axis=0).astype(x.dtype) if is_inexact(x) else jnp.sum(x, axis=0) for x in stacks
    ]


def scaled(tree: PyTree, factor: Any) -> PyTree:
    """`factor * tree`, in the dtypes of the tree."""
    return jax.tree.map(lambda x: jnp.asarray(factor).astype(x.dtype) * x, tree)


def mixed(weight: Any, old: PyTree, new: PyTree) -> PyTree:
    """`weight * old + (1 - weight) * new`."""
    weight = jnp.asarray(weight)
    return jax.tree.map(jnp.add, scaled(old, weight), scaled(new, 1 - weight))
