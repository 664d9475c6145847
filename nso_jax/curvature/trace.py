"""The trace of the Hessian of the mean loss, estimated from random probes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax._checks import as_key, check_count
from nso_jax.curvature.operators import (
    check_params,
    check_tolerance,
    chosen_leaves,
    mean_hessian_product,
)

_METHODS = ("hutchinson",)

# With fewer probes, the standard error is itself too uncertain to stop by: 24 % at ten of them.
_MIN_PRODUCTS = 10


class Estimate(NamedTuple):
    """A mean over random probes and how far off it may be.

    Attributes:
      value: the estimate.
      standard_error: one standard deviation of `value`, estimated from the probes.
      num_products: Hessian-vector products that it took.
      per_leaf: a pytree like `params`: how much of `value` each leaf contributes, as numbers.
    """

    value: float
    standard_error: float
    num_products: int
    per_leaf: Any


def trace(
    key: jax.Array,
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    *,
    method: str = "hutchinson",
    num_products: int = 100,
    rtol: float | None = None,
    mask: Any = None,
) -> Estimate:
    """Estimates the trace of the Hessian H of the mean loss, with its standard error.

    Hutchinson's estimate with m probes v of independent random signs, one product each:

        Tr H  ~  (1/m) sum_j v_j^T H v_j,    standard error = sample standard deviation / sqrt(m).

    It has no bias. Its variance is 2/m times the sum of the squared off-diagonal entries of H, so a diagonal
    Hessian needs one probe, and four times the probes halve the error. The probes' own sums are in float64.

    Args:
      key: PRNG key. Probe j depends on the key and on j alone, so more products extend fewer.
      fun: `fun(params, batch)` is the mean loss over the batch, a real scalar, as in `hvp`.
      params: any pytree of real arrays.
      batches: one batch, or a list or other re-iterable of batches, by the rule of `hvp`.
      method: "hutchinson", the only one yet.
      num_products: probes, each with one Hessian-vector product over all batches; the most of them when
        `rtol` is given. At least 2, because one probe says nothing about its error.
      rtol: stop as soon as the standard error is at most `rtol` times the absolute value of the estimate,
        after 10 probes at the earliest. Stopping at the first good-looking error makes it a little too
        small; the returned one shows whether the tolerance was reached. None: take all the probes.
      mask: bools, a prefix pytree of `params` or a callable giving one: only these leaves' block of H.

    Returns:
      An `Estimate`. `per_leaf` holds the mean of `v_l . (H v)_l` for each leaf l, an unbiased estimate of
      the trace of that leaf's own block of H, and adds up to `value`. It is noisier, relative to its
      size, than `value`: for one layer's trace, mask the others.

    Raises:
      TypeError: `key` is not a PRNG key, or `fun`, `params` or `batches` is none that `hvp` takes.
      ValueError: `method` is unknown, `num_products` is less than 2, `rtol` is not positive, or `mask` does
        not fit `params` or selects nothing.
      FloatingPointError: the product of a batch is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nso_jax import curvature
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"]) ** 2) / 2
      >>> params, batch = {"w": jnp.zeros(3)}, jnp.diag(jnp.array([3.0, 6.0, 9.0]))
      >>> estimate = curvature.trace(jax.random.key(0), loss, params, batch, num_products=10)
      >>> round(estimate.value, 3), round(estimate.standard_error, 3)  # a diagonal H: exact
      (42.0, 0.0)

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
      splines, Communications in Statistics: Simulation and Computation 19(2), 1990.
    """
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}.")
    key = as_key(key)
    check_count("num_products", num_products, 2)
    if rtol is not None:
        check_tolerance("rtol", rtol)
    params = check_params(params)
    flags = tuple(chosen_leaves(mask, params))
    product = mean_hessian_product(fun, params, batches)

    samples: list[np.ndarray] = []
    while len(samples) < num_products and not _precise(samples, rtol):
        probe = _probe(jax.random.fold_in(key, len(samples)), params, flags)
        samples.append(_leaf_products(probe, product(probe)))
    value, standard_error = _mean_and_error(samples)
    per_leaf = jax.tree.unflatten(jax.tree.structure(params), np.mean(samples, axis=0).tolist())
    return Estimate(value, standard_error, len(samples), per_leaf)


@functools.partial(jax.jit, static_argnames="flags")
def _probe(key: jax.Array, params: Any, flags: tuple[bool, ...]) -> Any:
    """Independent signs in the chosen leaves, zeros in the others."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    draw = [
        jax.random.rademacher(k, leaf.shape, leaf.dtype) if flag else jnp.zeros_like(leaf)
        for k, leaf, flag in zip(keys, leaves, flags, strict=True)
    ]
    return jax.tree.unflatten(structure, draw)


def _leaf_products(probe: Any, product: Any) -> np.ndarray:
    """v_l . (H v)_l for each leaf l: signs lose nothing in any precision, the sums run in float64."""
    signed = jax.tree.map(lambda v, h: v.astype(h.dtype) * h, probe, product)
    return np.array([np.sum(leaf, dtype=np.float64) for leaf in jax.device_get(jax.tree.leaves(signed))])


def _mean_and_error(samples: list[np.ndarray]) -> tuple[float, float]:
    totals = np.sum(samples, axis=1)
    return float(np.mean(totals)), float(np.std(totals, ddof=1) / np.sqrt(len(totals)))


def _precise(samples: list[np.ndarray], rtol: float | None) -> bool:
    if rtol is None or len(samples) < _MIN_PRODUCTS:
        return False
    value, standard_error = _mean_and_error(samples)
    return standard_error <= rtol * abs(value)
