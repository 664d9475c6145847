"""Penalties of the weights: the trace of the Hessian."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import _backend, noise
from nso_jax._checks import (
    PyTree,
    as_key,
    check_choice,
    check_count,
    check_function,
    check_inexact,
    check_loss,
    describe,
    leaf_mask,
)
from nso_jax._derivatives import second_derivative
from nso_jax._precision import widen
from nso_jax.noise import Sampler

__all__ = ["hessian_trace"]

_ROUNDING = 1e-6  # of a probability that is meant to be one over a whole number


def hessian_trace(
    key: jax.Array,
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    prob: float = 1.0,
    drop: Literal["weight", "leaf"] = "weight",
    num_samples: int = 1,
    mask: PyTree = None,
) -> jax.Array:
    """An unbiased estimate of the trace of the loss's Hessian with respect to the weights (SEHT).

        Tr(H) = E[v^T H v] / prob,   v_i = +1 or -1 with probability prob/2 each, else 0

    Its gradient is as unbiased for that of the trace. v^T H v is the second derivative of the loss along v,
    by forward over forward differentiation, or backward where a `jax.custom_vjp` in the loss forbids that.

    Args:
      key: a PRNG key, typed or legacy.
      fun: `fun(params, *args)` returning the loss, a real scalar.
      params: a pytree with inexact leaves. Real and imaginary parts of a complex leaf are weights each.
      *args: what else `fun` takes, such as the data.
      prob: the probability in (0, 1] with which a weight or a leaf is kept. The default of 1, Hutchinson's
        estimate, has the least variance.
      drop: what is dropped if `prob` is below 1. "weight": each weight for itself, the published form, which
        saves nothing. "leaf": the leaves are dealt in order into M = 1/prob groups with about as many
        weights each, and a sample is M v^T H v of one group drawn at random. It differentiates with respect
        to that group only, in a branch of `jax.lax.switch`, which pays in deep networks; under vmap over
        keys all branches are computed. With convolutions on CPU, which XLA runs slowly in a branch, give the
        group as `mask`, add M times the result, and jit the step once for each group.
      num_samples: k; the result is the mean of k estimates, of which number j uses
        `jax.random.split(key, k)[j]`. The default of 1 leaves the averaging to the training steps.
      mask: the leaves whose share of the trace is estimated: bools, a prefix pytree of `params` or a
        function giving one. The default is all of them.

    Returns:
      A scalar, in float32 at least.

    Raises:
      TypeError: an argument has the wrong type, `key` is not a PRNG key, a leaf of `params` is not inexact,
        or the loss is not a real scalar.
      ValueError: `prob` is outside (0, 1], or not 1/M for a whole number M of groups with `drop="leaf"`;
        `drop` is unknown, `num_samples` is below 1, or `mask` does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import penalties
      >>> loss = lambda w: jnp.sum(w**4)
      >>> penalized = lambda w, key: loss(w) + 0.1 * penalties.hessian_trace(key, loss, w)
      >>> print(jax.grad(penalized)(jnp.array([1.0, 2.0]), jax.random.key(0)))  # 4 w^3 + .1 * 24 w
      [ 6.4 36.8]

    References:
      Liu, Yu and Lin, Regularizing Deep Neural Networks with Stochastic Estimators of Hessian Trace,
      arXiv 2208.05924, 2022.
    """
    key = as_key(key)
    check_function("fun", fun)
    check_inexact(params)
    _check_probability(prob)
    check_choice("drop", drop, ("weight", "leaf"))
    check_count("num_samples", num_samples)
    leaves, treedef = jax.tree.flatten(params)
    chosen = [i for i, flag in enumerate(leaf_mask(mask, params)) if flag]
    sampler = _thinned_signs(prob) if drop == "weight" and prob < 1 else noise.rademacher

    def curvature(key: jax.Array, kept: Sequence[int]) -> jax.Array:
        """v^T H v, v being zero but in the leaves that are kept."""
        flags = jax.tree.unflatten(treedef, [i in kept for i in range(len(leaves))])
        probe = noise.perturbation(key, params, 1.0, sampler=sampler, mask=flags)
        weights = [jnp.asarray(leaves[i]) for i in kept]

        def loss(weights: list[jax.Array]) -> Any:
            merged = dict(enumerate(leaves)) | dict(zip(kept, weights, strict=True))
            value = fun(jax.tree.unflatten(treedef, merged.values()), *args)
            check_loss(value)
            return value

        v = jax.tree.map(_as_direction, jax.tree.leaves(probe), weights)
        return widen(second_derivative(loss, weights, v, v))

    if drop == "weight" or prob == 1:
        return _backend.mean_over(lambda key: curvature(key, chosen) / float(prob), key, num_samples)
    groups = [[chosen[i] for i in group] for group in _deal([np.size(leaves[i]) for i in chosen], prob)]

    def curvature_of_one_group(key: jax.Array) -> jax.Array:
        drawn = jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(groups))
        branches = [lambda key, group=group: curvature(key, group) for group in groups]
        return len(groups) * jax.lax.switch(drawn, branches, key)

    return _backend.mean_over(curvature_of_one_group, key, num_samples, vectorized=False)


def _as_direction(u: jax.Array, w: jax.Array) -> jax.Array:
    """Signs in the dtype of a leaf; those of its real and of its imaginary part, if it is complex."""
    return (math.sqrt(2.0) * u if jnp.iscomplexobj(w) else u).astype(w.dtype)


def _thinned_signs(prob: float) -> Sampler:
    """+1 and -1 with probability prob/2 each, else 0."""

    def sampler(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        u = jax.random.uniform(_backend.with_fast_bits(key), shape, dtype, -1, 1)
        return jnp.sign(u) * (jnp.abs(u) < prob).astype(dtype)

    return sampler


def _deal(sizes: Sequence[int], prob: float) -> list[range]:
    """Leaves of these sizes in 1/prob groups: runs that are never empty and sum to about as much each."""
    count = round(1 / prob)
    if count > len(sizes) or abs(count * prob - 1) > _ROUNDING:
        nearest = max(1, min(count, len(sizes)))
        raise ValueError(
            f"prob: with drop='leaf' expected 1/M, M a whole number that is at most the {len(sizes)} leaves "
            f"to choose from, got {prob}; the nearest is 1/{nearest}."
        )
    ends = np.cumsum(sizes)
    cuts = [0]
    for i in range(1, count):
        cut = 1 + int(np.argmin(abs(ends - i / count * ends[-1])))
        cuts.append(min(max(cut, cuts[-1] + 1), len(sizes) - count + i))
    return [range(*ends) for ends in itertools.pairwise([*cuts, len(sizes)])]


def _check_probability(prob: Any) -> None:
    if isinstance(prob, bool) or not isinstance(prob, int | float | np.integer | np.floating):
        raise TypeError(f"prob: expected a static real number in (0, 1], got {describe(prob)}.")
    if not 0 < prob <= 1:
        raise ValueError(f"prob: expected a number in (0, 1], got {prob}.")
