"""The chosen leaves of a pytree as one vector."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# For each leaf of the params, whether it is chosen.
Flags = tuple[bool, ...]


def select(tree: Any, flags: Flags) -> list[Any]:
    """The chosen leaves."""
    return [leaf for leaf, flag in zip(jax.tree.leaves(tree), flags, strict=True) if flag]


def parts(vector: jax.Array, chosen: list[jax.Array]) -> list[jax.Array]:
    """The stretches of a vector, in the shapes and dtypes of the chosen leaves."""
    pieces = jnp.split(vector, np.cumsum([leaf.size for leaf in chosen])[:-1])
    pairs = zip(pieces, chosen, strict=True)
    return [piece.reshape(leaf.shape).astype(leaf.dtype) for piece, leaf in pairs]


def merge(params: Any, flags: Flags, chosen: list[Any]) -> Any:
    """`params` with other arrays for the chosen leaves."""
    leaves, structure = jax.tree.flatten(params)
    moving = iter(chosen)
    merged = [next(moving) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
    return jax.tree.unflatten(structure, merged)


@functools.partial(jax.jit, static_argnums=1)
def ravel(chosen: list[Any], dtype: Any) -> jax.Array:
    """Arrays as one vector."""
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in chosen])


@functools.partial(jax.jit, static_argnums=2)
def unravel(vector: jax.Array, params: Any, flags: Flags) -> Any:
    """A pytree like params with the entries of a vector, zero in the leaves that are not chosen."""
    return merge(jax.tree.map(jnp.zeros_like, params), flags, parts(vector, select(params, flags)))


def split(rows: np.ndarray, params: Any, flags: Flags) -> list[np.ndarray]:
    """The stretch of the last axis that belongs to each leaf of params: empty for those not chosen."""
    pairs = zip(jax.tree.leaves(params), flags, strict=True)
    ends = np.cumsum([leaf.size if flag else 0 for leaf, flag in pairs])
    return np.split(rows, ends[:-1], axis=-1)
