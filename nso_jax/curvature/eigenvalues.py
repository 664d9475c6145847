"""The outermost eigenvalues of a curvature matrix, with their eigenvectors."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.linalg import eigh_tridiagonal

from nso_jax._checks import check_choice, check_count
from nso_jax.curvature._checks import check_tolerance
from nso_jax.curvature._estimators import Products, estimator
from nso_jax.curvature._lanczos import Lanczos, orthogonalise
from nso_jax.curvature.operators import CurvatureMatrix

__all__ = ["Eigenpairs", "eigenvalues"]

# How much an eigenvalue is wanted: the k with the highest rank are.
_RANKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "largest": np.positive,
    "smallest": np.negative,
    "magnitude": np.abs,
}


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors of a Hessian, the most wanted first.

    Attributes:
      values: k eigenvalues in float64.
      vectors: list of k eigenvectors of unit norm, pytrees like `params`.
      residuals: `||H v - value v||` of each pair, measured: some eigenvalue is at most so far from `value`.
      num_products: Hessian-vector products that it took, those for the residuals among them.
    """

    values: np.ndarray
    vectors: list[Any]
    residuals: np.ndarray
    num_products: int


@estimator
def eigenvalues(
    key: jax.Array,
    h: CurvatureMatrix,
    *,
    k: int = 5,
    which: str = "largest",
    tol: float = 1e-6,
    max_products: int | None = None,
    callback: Callable[[int], object] | None = None,
) -> Eigenpairs:
    """Computes the k largest eigenvalues of the Hessian H of the mean loss, with their eigenvectors.

    Lanczos' method: in an orthonormal basis Q of m vectors, each the product of the one before, made
    orthogonal to all before it (full re-orthogonalisation), H is the tridiagonal T = Q^T H Q. An eigenpair
    (theta, s) of T gives the pair (theta, Q s) with the residual

        || H Q s - theta Q s || = beta_m |s_m|,

    beta_m being the norm of what is left of the last product and s_m the last entry of s. The method stops
    when this is at most `tol` times the largest |theta| for every wanted pair. Then k more products measure
    the residuals, and the values returned are the Rayleigh quotients `v^T H v` of the vectors returned.

    When Q spans an invariant subspace before that, as it does when H has few distinct eigenvalues, a new
    random direction extends it, so that repeated eigenvalues are found as often as they are there. Where an
    eigenvalue is repeated exactly among many others, the method may stop before it meets the last copies.

    The basis is kept in host memory in float64: 8 bytes for each parameter and product. The products have
    the precision of `params`: in float32, residuals end at 1e-7 to 1e-6 of the largest eigenvalue.

    Args:
      key: PRNG key for the start vector.
      h: the matrix, as `hessian` or `gauss_newton` makes it. The vectors are zero in leaves that its mask
        leaves out.
      k: how many eigenvalues.
      which: "largest" (the most positive: the sharpest directions), "smallest" (the most negative first)
        or "magnitude" (by absolute value).
      tol: largest residual to stop at, relative to the largest absolute eigenvalue. The error of an
        eigenvalue is then at most of that size, and of its square where no other one is near.
      max_products: the most products, those for the residuals included; at least 2 k. The default is
        1000 + k, or the number of parameters + k where that is less: enough for an exact result.
      callback: called with the number of products so far, whenever some are done: for a progress bar.

    Returns:
      The `Eigenpairs`, the most wanted first: with "largest", the values descend.

    Warns:
      UserWarning: `max_products` ended the iteration before the tolerance was met; the result is the best
        found, and its residuals say how good.

    Raises:
      TypeError: `key` is not a PRNG key, or `h` is not a `CurvatureMatrix`.
      ValueError: `k` is less than 1 or more than the number of parameters, `which` is unknown, `tol` is not
        positive, or `max_products` is less than 2 k.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> pairs = curvature.eigenvalues(jax.random.key(0), curvature.hessian(loss, params, batch), k=2)
      >>> pairs.values.round(3)
      array([27., 12.])
      >>> abs(pairs.vectors[0]["w"]).round(3)
      Array([0., 0., 1.], dtype=float32)

    References:
      Golub, Van Loan, Matrix Computations, 4th edition, chapter 10, Johns Hopkins University Press, 2013.
      Parlett, The Symmetric Eigenvalue Problem, chapter 13, SIAM, 1998.
    """
    check_choice("which", which, _RANKS)
    check_tolerance("tol", tol)
    check_count("k", k, 1)
    if k > h.size:
        raise ValueError(f"k: expected at most the number of parameters, {h.size}, got {k}.")
    if max_products is not None:
        check_count("max_products", max_products, 2 * k)
    products = Products(h, callback)
    steps = min(h.size, 1000 if max_products is None else max_products - k)
    target = _Target(k, _RANKS[which], tol, steps)
    krylov, settled = _krylov(key, products, target)
    # As they will be returned, in the precision of the params.
    vectors = [h.unravel(vector) for vector in _ritz_vectors(krylov, target)]
    values, residuals = _rayleigh(products, np.stack([h.ravel(vector) for vector in vectors]))
    if not settled:
        warnings.warn(
            f"eigenvalues stopped after {steps + k} products, before tol={tol}: the largest residual is "
            f"{residuals.max():.2g}. Raise max_products or tol.",
            stacklevel=3,  # the decorator is in between
        )
    order = _most_wanted(values, target)
    return Eigenpairs(values[order], [vectors[i] for i in order], residuals[order], products.count)


class _Target(NamedTuple):
    """What to find, and when to stop."""

    k: int
    rank: Callable[[np.ndarray], np.ndarray]
    tol: float  # of a wanted pair's residual, relative to the largest |theta|
    steps: int


def _krylov(key: jax.Array, products: Products, target: _Target) -> tuple[Lanczos, bool]:
    """Lanczos' method until the wanted pairs are found or the steps are over, and whether they are found.

    It begins with a random vector, and goes on with another one where the basis spans an invariant subspace
    to the tolerance, or to the products' rounding if that is coarser.
    """
    h = products.h
    krylov = Lanczos(
        _random_unit(key, np.empty((0, h.size))),
        floor=max(target.tol, h.epsilon),
        capacity=min(target.steps, 32),
    )
    closed = np.empty(0)  # eigenvalues of the blocks before the last one
    while True:
        krylov.extend(products(krylov.vector[None])[0])
        size = len(krylov.diagonal)
        ritz_values, small_vectors = krylov.last_block()
        errors = krylov.left * np.abs(small_vectors[-1])
        settled = size == h.size or _settled(ritz_values, errors, closed, target, invariant=not krylov.left)
        if settled or size == target.steps:
            return krylov, settled
        if not krylov.left:
            closed = np.concatenate([closed, ritz_values])
            krylov.restart(_random_unit(jax.random.fold_in(key, size), krylov.basis))


def _ritz_vectors(krylov: Lanczos, target: _Target) -> np.ndarray:
    """The wanted eigenvectors, a row for each."""
    ritz_values, small_vectors = eigh_tridiagonal(krylov.diagonal, krylov.off_diagonal[:-1])
    wanted = _most_wanted(ritz_values, target)
    rows: np.ndarray = small_vectors[:, wanted].T @ krylov.basis
    return rows


def _settled(
    ritz_values: np.ndarray, errors: np.ndarray, closed: np.ndarray, target: _Target, *, invariant: bool
) -> bool:
    """Whether the wanted pairs are among those found: the `closed` ones and the last block's."""
    values = np.concatenate([ritz_values, closed])
    if len(values) < target.k:
        return False
    wanted = _most_wanted(values, target)
    best = np.argmax(target.rank(ritz_values))
    allowed = target.tol * np.max(np.abs(values))
    if invariant:
        # The best of the last block is the best of all that was left when it began: no better one can follow.
        return bool(target.rank(values)[wanted[-1]] >= target.rank(ritz_values)[best] - allowed)
    errors = np.concatenate([errors, np.zeros_like(closed)])
    return bool(max(errors[wanted].max(), errors[best]) <= allowed)


def _most_wanted(values: np.ndarray, target: _Target) -> np.ndarray:
    return np.argsort(-target.rank(values), kind="stable")[: target.k]


def _random_unit(key: jax.Array, basis: np.ndarray) -> np.ndarray:
    """A random vector of norm 1, orthogonal to the basis."""
    vector = np.asarray(jax.random.normal(key, basis.shape[1:]), np.float64)
    vector = orthogonalise(vector, basis)
    return vector / np.linalg.norm(vector)


def _rayleigh(products: Products, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Rayleigh quotients of vectors that need not have norm 1, and the norms of their residuals."""
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1)
    images = products(vectors)
    values = np.sum(vectors * images, axis=1) / norms**2
    return values, np.linalg.norm(images - values[:, None] * vectors, axis=1) / norms
