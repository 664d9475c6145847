"""The trace and the diagonal of a curvature matrix, estimated from random probes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from nso_jax._checks import broadcast_prefix, check_choice, check_count
from nso_jax.curvature import _vectors
from nso_jax.curvature._checks import check_tolerance
from nso_jax.curvature._estimators import Products, estimator
from nso_jax.curvature._probes import Deflation, Hutchinson
from nso_jax.curvature.operators import CurvatureMatrix

__all__ = ["Estimate", "diagonal", "trace"]

# The fewest products of a method: those of two probes.
_TRACE_METHODS = {"xtrace": 4, "hutch++": 6, "hutchinson": 2}
_DIAGONAL_METHODS = {"xdiag": 4, "hutchinson": 2}


class Estimate(NamedTuple):
    """A mean over random probes and how far off it may be.

    Attributes:
      value: the estimate.
      standard_error: one standard deviation of `value`, estimated from the probes.
      num_products: Hessian-vector products that it took.
      per_leaf: a pytree like `params`: each leaf's share of the trace, a number; or, with `param_labels`, a
        dict of each label's share.
      per_leaf_standard_error: one standard deviation of each number in `per_leaf`.
    """

    value: Any
    standard_error: Any
    num_products: int
    per_leaf: Any
    per_leaf_standard_error: Any


@estimator
def trace(
    key: jax.Array,
    h: CurvatureMatrix,
    *,
    method: str = "xtrace",
    num_products: int = 100,
    rtol: float | None = None,
    param_labels: Any = None,
    callback: Callable[[int], object] | None = None,
) -> Estimate:
    """Estimates the trace of the Hessian H of the mean loss, with its standard error.

    Hutchinson's estimate is the mean over m probes v of independent random signs of

        v^T H v,    standard error = sample standard deviation / sqrt(m).

    It has no bias, and a variance of 2/m times the sum of the squared off-diagonal entries of H: four times
    the probes halve the error. A few large eigenvalues make most of that sum. So the other methods spend
    part of the products on an orthonormal basis Q of the images H v of some vectors v, which catches these
    eigenvalues; with P = Q Q^T they compute Tr(P H) exactly, and estimate only Tr((I - P) H (I - P)).

    The standard error of XTrace counts the covariance of its estimates, which share their probes. Products
    are in float32, or float64 for float64 params; sums over their entries are in float64.

    Args:
      key: PRNG key. Probe j depends on the key and on j alone.
      h: the matrix, as `hessian` or `gauss_newton` makes it.
      method: "xtrace", where each probe serves both for the basis and, with the basis of the others, for the
        estimate; "hutch++", where a third of the products goes into each of basis, its image and other
        probes; or "hutchinson". For a network's Hessian XTrace takes a tenth of the products or less, but it
        and Hutch++ keep 16 bytes of host memory for each parameter and product, Hutchinson none.
      num_products: Hessian-vector products over all batches; the most of them when `rtol` is given. At
        least those of two probes: 4 for "xtrace", 6 for "hutch++", 2 for "hutchinson". An XTrace probe
        takes two, one of Hutch++ three. Fewer are taken when the result is exact before.
      rtol: stop as soon as the standard error is at most `rtol` times the absolute value of the estimate,
        looking after every 8 probes. Stopping at the first good-looking error makes it a little too small;
        the returned one shows whether the tolerance was reached. None: take all the products.
      param_labels: a prefix pytree of labels for the leaves, or a callable giving one, as in
        `optax.partition`: `per_leaf` is then a dict of the shares of the labels, such as layers.
      callback: called with the number of products so far, whenever some are done: for a progress bar.

    Returns:
      An `Estimate`. `per_leaf` holds an unbiased estimate of the trace of each leaf's own block of H, from
      the same products, and adds up to `value`.

    Raises:
      TypeError: `key` is not a PRNG key, or `h` is not a `CurvatureMatrix`.
      ValueError: `method` is unknown, `num_products` is too small for it, `rtol` is not positive, or
        `param_labels` does not fit the params.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> estimate = curvature.trace(jax.random.key(0), curvature.hessian(loss, params, batch))
      >>> round(estimate.value, 3), round(estimate.standard_error, 3)  # all of three dimensions: exact
      (42.0, 0.0)

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
      splines, Communications in Statistics: Simulation and Computation 19(2), 1990.
      Meyer, Musco, Musco, Woodruff, Hutch++: Optimal Stochastic Trace Estimation, arXiv 2010.09649, 2020.
      Epperly, Tropp, Webber, XTrace: Making the most of every sample in stochastic trace estimation,
      arXiv 2301.07825, 2023.
    """
    _check_options(_TRACE_METHODS, method, num_products, rtol)
    groups, tree = _grouping(param_labels, h)
    products = Products(h, callback)
    probing = _probing(method, key, products)
    whole = [[leaf for group in groups for leaf in group]]
    for floor in probing.rounds(num_products):
        if (floor or rtol) and _reached(rtol, floor, *probing.shares(whole)):
            break
    values, errors = probing.shares(whole + groups)
    trees = tree(values[1:]), tree(errors[1:])
    return Estimate(float(values[0]), float(errors[0]), products.count, *trees)


@estimator
def diagonal(
    key: jax.Array,
    h: CurvatureMatrix,
    *,
    method: str = "xdiag",
    num_products: int = 100,
    rtol: float | None = None,
    param_labels: Any = None,
    callback: Callable[[int], object] | None = None,
) -> Estimate:
    """Estimates the diagonal of the Hessian H of the mean loss, with a standard error for each entry.

    Hutchinson's estimate (of Bekas, Kokiopoulou and Saad) is the mean of `v * H v` over probes v of
    independent random signs. The other method splits H by the projection P on the images of the probes, the
    probe of each estimate left out as in XTrace:

        diag H = diag(P H + H P - P H P) + E[ v * (I - P) H (I - P) v ],

    so that its entries add up to XTrace's trace. (XDiag has `P H` and `v * (I - P) H v` instead; a symmetric
    H allows the projection on both sides, which leaves less to estimate.)

    Args:
      key: PRNG key. Probe j depends on the key and on j alone.
      h: the matrix, as in `trace`. In leaves that its mask leaves out, the entries are 0.
      method: "xdiag" or "hutchinson". XDiag keeps 16 bytes of host memory for each parameter and product,
        Hutchinson 16 for each parameter.
      num_products: Hessian-vector products, the most of them when `rtol` is given; at least 4 for "xdiag",
        which takes two for a probe, and 2 for "hutchinson".
      rtol: stop as soon as the standard errors are at most `rtol` times the estimate, both as Euclidean norms
        over all entries, looking after every 8 probes. None: take all the products.
      param_labels, callback: as in `trace`.

    Returns:
      An `Estimate` whose `value` and `standard_error` are pytrees like `params`, in float64 NumPy arrays.
      `per_leaf` holds their sums, the shares of the trace, with standard errors of their own.

    Raises:
      TypeError: as `trace`.
      ValueError: as `trace`.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> estimate = curvature.diagonal(jax.random.key(0), curvature.hessian(loss, params, batch))
      >>> estimate.value["w"].round(3)
      array([ 3., 12., 27.])

    References:
      Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix, Applied Numerical Mathematics
      57(11-12), 2007.
      Epperly, Tropp, Webber, XTrace: Making the most of every sample in stochastic trace estimation,
      arXiv 2301.07825, 2023.
    """
    _check_options(_DIAGONAL_METHODS, method, num_products, rtol)
    groups, tree = _grouping(param_labels, h)
    products = Products(h, callback)
    probing = _probing(method, key, products)
    for floor in probing.rounds(num_products):
        if (floor or rtol) and _reached(rtol, floor, *probing.entries()):
            break
    value, standard_error = (_entry_tree(h, vector) for vector in probing.entries())
    shares, errors = probing.shares(groups)
    return Estimate(value, standard_error, products.count, tree(shares), tree(errors))


def _probing(method: str, key: jax.Array, products: Products) -> Hutchinson | Deflation:
    if method == "hutchinson":
        return Hutchinson(key, products)
    return Deflation(key, products, leave_one_out=method != "hutch++")


def _reached(rtol: float | None, floor: float, value: np.ndarray, error: np.ndarray) -> bool:
    """Whether an error is small enough, or as small as rounding allows."""
    size = np.linalg.norm(error)
    return bool(size <= floor > 0) or (rtol is not None and bool(size <= rtol * np.linalg.norm(value)))


def _check_options(methods: dict[str, int], method: str, num_products: int, rtol: float | None) -> None:
    check_choice("method", method, methods)
    check_count("num_products", num_products, methods[method])
    if rtol is not None:
        check_tolerance("rtol", rtol)


def _entry_tree(h: CurvatureMatrix, vector: np.ndarray) -> Any:
    """A pytree like params of NumPy arrays with a vector's entries, zero in leaves that are not chosen."""
    leaves, structure = jax.tree.flatten(h.params)
    parts = zip(leaves, h.flags, _vectors.split(vector, h.params, h.flags), strict=True)
    filled = [part.reshape(leaf.shape) if flag else np.zeros(leaf.shape) for leaf, flag, part in parts]
    return jax.tree.unflatten(structure, filled)


def _grouping(param_labels: Any, h: CurvatureMatrix) -> tuple[list[list[int]], Callable[[np.ndarray], Any]]:
    """The leaves that make each figure, and the function that puts the figures into a pytree or a dict."""
    if param_labels is None:
        structure = jax.tree.structure(h.params)
        groups = [[leaf] for leaf in range(len(h.flags))]
        return groups, lambda figures: jax.tree.unflatten(structure, figures.tolist())
    labels = broadcast_prefix("param_labels", param_labels, h.params)
    names = list(dict.fromkeys(labels))
    groups = [[leaf for leaf, label in enumerate(labels) if label == name] for name in names]
    return groups, lambda figures: dict(zip(names, figures.tolist(), strict=True))
