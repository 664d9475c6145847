"""Gradients at the top of a small ascent: SAM and its family."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import noise
from nso_jax._axes import Axes, AxisName, axes_of
from nso_jax._backend import computed_once
from nso_jax._calls import as_argnums, bind, check_aux_modes, named_after
from nso_jax._checks import (
    PyTree,
    as_key,
    broadcast_prefix,
    check_flag,
    check_function,
    check_sampler,
    check_scalar,
    leaf_mask,
)
from nso_jax._precision import scaled, summed, widen
from nso_jax.noise import Sampler, Sigma

__all__ = ["asam", "rsam", "sam", "usam"]

_AUX_MODES = ("mean", "sum", "concatenate")

Leaves = list[jax.Array]
Norm = Callable[[Leaves], jax.Array]
# The step up for rho = 1, from the weights, the direction to climb and the norm to measure with.
Climb = Callable[[Leaves, Leaves, Norm], Leaves]


def sam(
    fun: Callable[..., Any],
    *,
    rho: Any,
    mask: PyTree = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    aux: PyTree = "mean",
    axis_name: AxisName | None = None,
    global_ascent: bool = False,
    param_specs: PyTree = None,
) -> Callable[..., tuple[Any, PyTree]]:
    """Sharpness-aware minimization: the gradient at distance rho up the slope.

        g = grad f(W + rho * h / ||h||),    h = grad f(W)

    To first order in rho this descends f(W) + rho ||grad f(W)||. Two gradient evaluations. Where h = 0 the
    result is the plain gradient.

    Args:
      fun, argnums, has_aux: as in `nso_jax.value_and_grad`.
      rho: the distance, a scalar >= 0, in the units of the weights; .05 is the paper's usual choice. It may
        be traced: a schedule is `rho=schedule(step)` inside the step.
      mask: which leaves are moved, as there. The others do not count in the norm.
      aux: what `axis_name` does to auxiliary output, "mean", "sum" or "concatenate", as there.
      axis_name: what results are averaged over, as there.
      global_ascent: with `axis_name`, whether all devices climb together, along the mean of their gradients,
        for one more all-reduce. By default each climbs the loss of its own examples, as the authors do
        ("m-sharpness": m examples share an ascent, and fewer generalize better), and nothing is
        communicated but the result. On one device `nso_jax.parallel.microbatch` does the same.
      param_specs: how further axes split the params, as there, so that norms are those of whole params.

    Returns:
      `fn(key, *args, **kwargs)`, returning `(value, grads)`, or `((value, aux), grads)` with `has_aux`, of
      the structure, shapes and dtypes that `jax.value_and_grad` gives. `value` and `aux` are those at W. The
      key is not used.

    Raises:
      TypeError: an argument has the wrong type, `key` is missing or not a PRNG key, a differentiated leaf
        is not inexact, or the loss is not a real scalar.
      ValueError: `rho` is negative or NaN, `aux` is unknown, `argnums` names an argument twice, a prefix does
        not fit, nothing maps over `axis_name` where `fn` is called, `param_specs` names it, or
        `global_ascent` is set without it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import sharpness
      >>> loss = lambda w: jnp.sum(w**2)
      >>> fn = jax.jit(sharpness.sam(loss, rho=0.5))
      >>> value, grad = fn(jax.random.key(0), jnp.array([3.0, 4.0]))
      >>> print(value, grad)  # 2 (W + .5 W / ||W||)
      25.0 [6.6 8.8]

    References:
      Foret, Kleiner, Mobahi and Neyshabur, Sharpness-Aware Minimization for Efficiently Improving
      Generalization, arXiv 2010.01412, 2020.
    """
    return _after_ascent(
        fun,
        _normalized,
        rho=rho,
        mask=mask,
        argnums=argnums,
        has_aux=has_aux,
        aux=aux,
        axis_name=axis_name,
        global_ascent=global_ascent,
        param_specs=param_specs,
    )


def usam(fun: Callable[..., Any], *, rho: Any, **options: Any) -> Callable[..., tuple[Any, PyTree]]:
    """SAM without normalization: the step up is proportional to the gradient.

        g = grad f(W + rho * grad f(W))

    To first order in rho this descends f(W) + rho/2 ||grad f(W)||^2. Two gradient evaluations.

    Args:
      fun: as in `sam`.
      rho: the step up, a scalar >= 0, in weights per gradient; it may be traced.
      **options: the other arguments of `sam`.

    Returns:
      `fn(key, *args, **kwargs)`, as `sam` gives.

    Raises:
      TypeError: as `sam`.
      ValueError: as `sam`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import sharpness
      >>> fn = sharpness.usam(lambda w: jnp.sum(w**2), rho=0.5)
      >>> print(fn(jax.random.key(0), jnp.array([3.0, 4.0]))[1])  # 2 (W + .5 * 2 W)
      [12. 16.]

    References:
      Andriushchenko and Flammarion, Towards Understanding Sharpness-Aware Minimization, arXiv 2206.06232,
      2022.
    """
    return _after_ascent(fun, _unchanged, rho=rho, **options)


def asam(
    fun: Callable[..., Any], *, rho: Any, eta: float = 0.01, **options: Any
) -> Callable[..., tuple[Any, PyTree]]:
    """Adaptive SAM: the ascent is measured in units of each weight, so that rescaling layers changes nothing.

        g = grad f(W + rho * T^2 h / ||T h||),    h = grad f(W),    T = |W| + eta, weight by weight

    Two gradient evaluations.

    Args:
      fun: as in `sam`.
      rho: the distance in units of the weights' sizes, a scalar >= 0; 0.5 to 2 are usual. It may be traced.
      eta: what weights of size zero still move by, >= 0; .01 as published.
      **options: the other arguments of `sam`.

    Returns:
      `fn(key, *args, **kwargs)`, as `sam` gives.

    Raises:
      TypeError: as `sam`.
      ValueError: as `sam`, or `eta` is negative or NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import sharpness
      >>> fn = sharpness.asam(lambda w: jnp.sum(w**2), rho=0.5, eta=0.0)
      >>> print(fn(jax.random.key(0), jnp.array([0.0, 4.0]))[1])  # 2 * (4 + .5 * 4)
      [ 0. 12.]

    References:
      Kwon, Kim, Park and Choi, ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
      Deep Neural Networks, arXiv 2102.11600, 2021.
    """
    check_scalar("eta", eta)

    def climb(weights: Leaves, gradient: Leaves, norm: Norm) -> Leaves:
        sizes = [(jnp.abs(w) + jnp.asarray(eta).astype(w.real.dtype)).astype(w.dtype) for w in weights]
        scaled = [t * g for t, g in zip(sizes, gradient, strict=True)]
        return [t * g for t, g in zip(sizes, _divide(scaled, norm(scaled)), strict=True)]

    return _after_ascent(fun, climb, rho=rho, **options)


def rsam(
    fun: Callable[..., Any],
    *,
    rho: Any,
    sigma: Sigma,
    gradient_weight: Any = 1.0,
    sampler: Sampler = noise.normal,
    **options: Any,
) -> Callable[..., tuple[Any, PyTree]]:
    """Random SAM: the ascent starts at randomly moved weights, which smooths the loss that it climbs.

        g = grad f(W + rho * d / ||d||),    d = U + gradient_weight * grad f(W + U),    U = sigma * noise

    Two gradient evaluations, and a forward pass for the value at W; under jit it is dropped if neither value
    nor auxiliary output is used. With `sigma=0` it is `sam`, and with a large `gradient_weight` the ascent
    only starts at W + U and goes from W along the gradient found there.

    The formula is ours, after what the paper's abstract says (one step of ascent on randomly smoothed
    weights): noise and gradient are scaled to rho together, so that the distance is that of SAM. There are
    implementations that stay at W + U and take all of SAM's step from there.

    Args:
      fun: as in `sam`.
      rho: the distance, as in `sam`.
      sigma: standard deviation of one weight's noise: a scalar, a prefix pytree of the differentiated
        argument, or a function from it to one. The authors scale it by the norm of each filter, for which
        there is `noise.relative(scale, per="channel")`.
      gradient_weight: the gradient's share beside the noise's, a scalar >= 0; it may be traced.
      sampler: `sampler(key, shape, dtype)` of unit variance; see `nso_jax.noise`.
      **options: the other arguments of `sam`. With `axis_name` each device draws for itself, unless
        `global_ascent` is set.

    Returns:
      `fn(key, *args, **kwargs)`, as `sam` gives.

    Raises:
      TypeError: as `sam`.
      ValueError: as `sam`, or `sigma` or `gradient_weight` is negative or NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import sharpness
      >>> loss = lambda w: jnp.sum(w**2)
      >>> fn = jax.jit(sharpness.rsam(loss, rho=0.5, sigma=0.01))
      >>> value, grad = fn(jax.random.key(0), jnp.array([3.0, 4.0]))
      >>> print(value, grad.round(1))
      25.0 [6.6 8.8]

    References:
      Liu, Mai, Cheng, Chen, Hsieh and You, Random Sharpness-Aware Minimization, NeurIPS, 2022.
    """
    check_scalar("gradient_weight", gradient_weight)
    check_sampler(sampler)
    return _after_ascent(
        fun,
        _normalized,
        rho=rho,
        smoothing=_Smoothing(sigma, sampler, gradient_weight),
        **options,
    )


class _Smoothing(NamedTuple):
    """Noise before the ascent."""

    sigma: Sigma
    sampler: Sampler
    gradient_weight: Any


def _after_ascent(
    fun: Callable[..., Any],
    climb: Climb,
    *,
    rho: Any,
    mask: PyTree = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    aux: PyTree = "mean",
    axis_name: AxisName | None = None,
    global_ascent: bool = False,
    param_specs: PyTree = None,
    smoothing: _Smoothing | None = None,
) -> Callable[..., tuple[Any, PyTree]]:
    """What all of the family share: value at W, a step up, gradient there."""
    check_function("fun", fun)
    argnums = as_argnums("argnums", argnums)
    check_scalar("rho", rho)
    check_flag("has_aux", has_aux)
    check_aux_modes(aux, _AUX_MODES)
    check_flag("global_ascent", global_ascent)
    if global_ascent and axis_name is None:
        raise ValueError("global_ascent: True needs axis_name, the devices that are to climb together.")
    axes = Axes(axis_name, not global_ascent, param_specs)

    def value_and_grad_fn(key: jax.Array, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        key = as_key(key)
        loss, params = bind(fun, args, kwargs, argnums, has_aux=has_aux)
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        specs = axes.specs(params, key)
        params, key = axes.localize(params, key)

        with axes.copies():
            if smoothing is None:
                out, gradient = value_and_grad(params)
            else:
                options = {"sampler": smoothing.sampler, "mask": mask, "param_specs": specs}
                u = noise.perturbation(key, params, smoothing.sigma, **options)
                out, gradient = loss(params), value_and_grad(computed_once(noise.perturb(params, u), key))[1]
            uphill = jax.tree.map(lambda g: jnp.conj(widen(g)), gradient)
            if global_ascent:
                uphill = axes.combine(uphill)
            if smoothing is not None:
                uphill = noise.perturb(scaled(uphill, smoothing.gradient_weight), u)
            step = _step_up(params, uphill, climb, rho=rho, mask=mask, specs=specs)
            _, grads = value_and_grad(noise.perturb(params, step))

        value, aux_out = out
        leaves, treedef = jax.tree.flatten(aux_out)
        modes = broadcast_prefix("aux", aux, aux_out)
        leaves = [
            summed([x[None]])[0] if mode == "sum" else x
            for x, mode in zip(map(jnp.asarray, leaves), modes, strict=True)
        ]
        (value, leaves), grads = axes.combine(((value, leaves), grads), (("mean", modes), "mean"))
        return ((value, jax.tree.unflatten(treedef, leaves)) if has_aux else value), grads

    return named_after(fun, value_and_grad_fn, "Value, and gradient after an ascent,")


def _step_up(
    params: PyTree, uphill: PyTree, climb: Climb, *, rho: Any, mask: PyTree, specs: PyTree
) -> PyTree:
    """The step, in float32 at least, as a pytree like `params` with None where `mask` is False."""
    flags = leaf_mask(mask, params)
    splits = [axes_of(spec) for spec in broadcast_prefix("param_specs", specs, params)]

    def chosen(leaves: Sequence[Any]) -> list[Any]:
        return [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

    weights = [widen(w) for w in chosen(jax.tree.leaves(params))]
    directions = chosen(jax.tree.leaves(uphill))
    steps = iter(scaled(climb(weights, directions, functools.partial(_norm, chosen(splits))), rho))
    return jax.tree.unflatten(jax.tree.structure(params), [next(steps) if flag else None for flag in flags])


def _normalized(_: Leaves, direction: Leaves, norm: Norm) -> Leaves:
    return _divide(direction, norm(direction))


def _unchanged(_weights: Leaves, direction: Leaves, _norm: Norm) -> Leaves:
    return direction


def _divide(leaves: Leaves, norm: jax.Array) -> Leaves:
    """The leaves over their norm; zeros where it is zero."""
    divisor = jnp.where(norm == 0, jnp.ones_like(norm), norm)
    return [x / divisor.astype(x.dtype) for x in leaves]


def _norm(splits: list[tuple[Hashable, ...]], leaves: Leaves) -> jax.Array:
    """The Euclidean norm of leaves that mesh axes split, without overflow or underflow of the squares."""
    if not leaves:
        return jnp.float32(0)
    wide = np.result_type(*(x.real.dtype for x in leaves))
    magnitudes = [jnp.abs(x).astype(wide) for x in leaves]
    pairs = list(zip(magnitudes, splits, strict=True))
    largest = functools.reduce(jnp.maximum, [_over(jax.lax.pmax, jnp.max(x, initial=0), s) for x, s in pairs])
    unit = jax.lax.stop_gradient(jnp.where(largest == 0, jnp.ones_like(largest), largest))
    squares = [_over(jax.lax.psum, jnp.sum(jnp.square(x / unit)), s) for x, s in pairs]
    return unit * jnp.sqrt(functools.reduce(jnp.add, squares))


def _over(collective: Callable[..., jax.Array], x: jax.Array, axes: tuple[Hashable, ...]) -> jax.Array:
    return collective(x, axes) if axes else x
