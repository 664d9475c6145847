"""How much of one subspace lies in another."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

__all__ = ["subspace_overlap"]

# A vector of norm 1 nearer than this to the span of others is taken to lie in it.
_DEPENDENT = 1e-6


def subspace_overlap(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Computes how much of one subspace lies in another, from 0 (orthogonal) to 1 (the same).

    With the orthogonal projections P and Q on the two spans of k vectors, it is

        Tr(P Q) / k = (1/k) sum_i cos^2 theta_i,

    theta_i being the principal angles between them. For two independent random subspaces of R^n it is k/n on
    average: so much must be subtracted in thought from what is found between two models or two layers.

    Args:
      first: k vectors: arrays or pytrees. They need not be orthogonal, for their span alone counts.
      second: k vectors of the same structure and shapes.

    Returns:
      The overlap.

    Raises:
      ValueError: a list is empty, the lists differ in length, a vector differs from the first one in
        structure or shape or is not finite, or the vectors of a list are linearly dependent.

    Example:
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> x, y, z = jnp.eye(3)
      >>> round(curvature.subspace_overlap([x, y], [x + y, z]), 3)
      0.5

    References:
      Wu, Zhu, Wu, Wang, Ge, Dissecting Hessian: Understanding Common Structure of Hessian in Neural Networks,
      arXiv 2010.04261, 2020.
      Golub, Van Loan, Matrix Computations, 4th edition, section 6.4, Johns Hopkins University Press, 2013.
    """
    for name, vectors in (("first", first), ("second", second)):
        if not len(vectors):
            raise ValueError(f"{name}: expected at least one vector, got none.")
    if len(first) != len(second):
        raise ValueError(f"second: expected as many vectors as in first, {len(first)}, got {len(second)}.")
    bases = [_basis(name, vectors, first[0]) for name, vectors in (("first", first), ("second", second))]
    return float(np.sum((bases[0].T @ bases[1]) ** 2) / len(first))


def _basis(name: str, vectors: Sequence[Any], like: Any) -> np.ndarray:
    """An orthonormal basis of the span of vectors, in columns."""
    columns = np.stack([_column(name, i, vector, like) for i, vector in enumerate(vectors)], axis=1)
    if not np.isfinite(columns).all():
        raise ValueError(f"{name}: expected finite vectors, got NaN or infinity in one.")
    norms = np.linalg.norm(columns, axis=0)
    basis, triangle = np.linalg.qr(columns / np.where(norms > 0, norms, 1))
    # An entry of the diagonal is how far a vector is from the span of those before it.
    if len(triangle) < len(vectors) or np.abs(np.diag(triangle)).min() <= _DEPENDENT:
        raise ValueError(f"{name}: the {len(vectors)} vectors are linearly dependent; give a basis.")
    return basis


def _column(name: str, position: int, vector: Any, like: Any) -> np.ndarray:
    """One vector in float64, checked to be like the first one."""
    given: Any = jax.tree.structure(vector)
    expected: Any = jax.tree.structure(like)
    if given != expected:
        raise ValueError(f"{name}[{position}]: expected a pytree like first[0], {expected}, got {given}.")
    pairs = zip(jax.tree.leaves_with_path(vector), jax.tree.leaves(like), strict=True)
    for (path, leaf), like_leaf in pairs:
        if np.shape(leaf) != np.shape(like_leaf):
            where = f" for leaf {jax.tree_util.keystr(path)}" if path else ""
            raise ValueError(
                f"{name}[{position}]: expected shape {np.shape(like_leaf)}{where} as in first[0], "
                f"got {np.shape(leaf)}."
            )
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(vector)])
