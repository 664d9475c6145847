"""The rivals in the same calling form: gradients at the top of a small ascent (SAM and its family).

`sam`, `usam`, `asam` and `rsam` take the place of `nso_jax.value_and_grad`; the key that only `rsam` needs
is there in all, so that one line changes. `bsam` is an optimizer of its own, an optax transformation.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nso_jax import noise
from nso_jax._axes import (
    AxisName,
    check_axes,
    check_own_gradients,
    combine_over_axis,
    copies_along,
    leaf_specs,
    localize,
    other_axes,
)
from nso_jax._backend import computed_once
from nso_jax._callers import check_injected, check_not_in_multi_steps
from nso_jax._calls import (
    as_argnums,
    bind,
    cast_like,
    check_aux_modes,
    check_like_params,
    check_update_arguments,
    named_after,
    summed,
)
from nso_jax._checks import (
    PyTree,
    as_key,
    broadcast_prefix,
    check_count,
    check_flag,
    check_function,
    check_inexact,
    check_sampler,
    check_scalar,
    describe,
    leaf_mask,
    leaf_name,
)
from nso_jax.noise import Sampler, Sigma

__all__ = ["BSAMState", "asam", "bsam", "rsam", "sam", "usam"]

AUX_MODES = ("mean", "sum", "concatenate")

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
      fun: `fun(*args, **kwargs)` returning a real scalar, or a pair of that and auxiliary output.
      rho: the distance, a scalar >= 0, in the units of the weights; .05 is the paper's usual choice. It may
        be traced: a schedule is `rho=schedule(step)` inside the step.
      mask: which leaves are moved: bools, a prefix pytree or a function giving one. Leaves that are not
        still get gradients, and do not count in the norm. The default is all of them.
      argnums: which positional arguments of `fun` to differentiate, as in `jax.value_and_grad`.
      has_aux: whether `fun` returns `(loss, aux)`.
      aux: what `axis_name` does to auxiliary output: "mean" averages float leaves, "sum" adds up, and with
        "concatenate", for leaves with an entry for each example, devices keep theirs. A prefix pytree of the
        auxiliary output mixes them.
      axis_name: inside `shard_map`, `pmap` or `vmap` over that axis: results are averaged over it. The loss
        is the mean of what `fun` returns on each device, which may have collectives over the axis inside.
      global_ascent: with `axis_name`, whether all devices climb together, along the mean of their gradients,
        for one more all-reduce. By default each climbs the loss of its own examples, as the authors do
        ("m-sharpness": m examples share an ascent, and fewer generalize better), and nothing is
        communicated but the result. On one device `nso_jax.parallel.microbatch` does the same.
      param_specs: inside a `shard_map` that splits the params over further axes: their partition specs, a
        prefix pytree as in its `in_specs`, so that norms are those of whole params. Needed only with
        `check_vma=False`; else JAX knows them.

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


class BSAMState(NamedTuple):
    """State of `bsam`.

    Attributes:
      count: number of updates so far, int32; it picks the next one's noise and drives a schedule.
      rng_key: the PRNG key, which never changes, as raw uint32 data.
      momentum: the running mean of the regularized gradient, a pytree like the params, in float32 at least.
      precision: s, a pytree like the params: a weight's posterior variance is 1 / (num_examples * s).
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it, which hides tuple.count
    rng_key: jax.Array
    momentum: PyTree
    precision: PyTree


def bsam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_examples: int,
    key: jax.Array,
    rho: float = 0.01,
    weight_decay: float = 2e-4,
    damping: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    initial_precision: float = 1.0,
    mask: PyTree = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bayesian SAM: an optimizer like Adam, whose second moment is a precision that scales the ascent too.

        h = grad f(W + z / sqrt(num_examples * s)),    z standard normal
        g = grad f(W + rho * h / s)
        m <- b1 * m + (1 - b1) * (g + weight_decay * W)
        W <- W - learning_rate * m / s
        s <- b2 * s + (1 - b2) * (sqrt(s) |h| + weight_decay + damping)

    with the s from before the step in the first four lines, as in the authors' code. Two gradient
    evaluations. The update needs the gradient function: `tx.update(grads, state, params, grad_fn=grad_fn)`,
    with `grad_fn(params, i)` as `optax.contrib.sam` takes it in opaque mode, i = 0 for h and 1 for g. The
    incoming updates are ignored; under jit their computation is dropped. As of all transformations that
    evaluate the loss, wrappers such as `optax.MultiSteps` and `optax.masked` do not go around it. But
    `optax.apply_if_finite` does: it looks at the incoming updates, so pass the gradient at W, and a batch
    that makes that NaN or infinite leaves weights and state as they were.

    Args:
      learning_rate: a number or an optax schedule of the state's count. As updates are divided by s, which
        starts at 1, it is nearer to that of SGD than to that of Adam: the paper has .5.
      num_examples: how many training examples the posterior is of.
      key: a PRNG key, typed or legacy; update number n uses `jax.random.fold_in(key, n)`.
      rho: the ascent, >= 0.
      weight_decay: delta >= 0, the prior's precision over `num_examples`; the default is the authors' 10 for
        the 50,000 images of CIFAR-10.
      damping: gamma >= 0, which keeps s away from zero, with `weight_decay`.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the precision, in [0, 1).
      initial_precision: s at the start, > 0.
      mask: which leaves get noise and ascend: bools, a prefix pytree or a function giving one. The others
        move by the same rule. All by default.
      axis_name: inside `shard_map` or `pmap` over that axis: each device draws and ascends for itself, as
        the authors do with parts of a batch, and g and sqrt(s) |h| are averaged.

    Returns:
      A transformation whose state is a `BSAMState`; the learning rate is in its updates.

    Raises:
      TypeError: an argument has the wrong type, as `key`, or in `update` `grad_fn` is missing.
      ValueError: an argument is out of range, or in `update` `params` are missing or masked, or the
        gradients are unlike them.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from nso_jax import sharpness
      >>> loss = lambda w: jnp.sum(w**2)
      >>> tx = sharpness.bsam(0.1, num_examples=1000, key=jax.random.key(0))
      >>> w = jnp.array([1.0, 2.0])
      >>> grad_fn = lambda w, i: jax.grad(loss)(w)
      >>> updates, state = tx.update(grad_fn(w, 0), tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.round(2))
      [-0.02 -0.04]
      >>> deviation = 1 / jnp.sqrt(1000 * state.precision)  # of the weights' posterior

    References:
      Moellenhoff and Khan, SAM as an Optimal Relaxation of Bayes, arXiv 2210.01620, 2022.
    """
    check_injected()
    key = as_key(key)
    check_count("num_examples", num_examples)
    for name, value in (("rho", rho), ("weight_decay", weight_decay), ("damping", damping)):
        check_scalar(name, value)
    for name, value in (("b1", b1), ("b2", b2)):
        check_scalar(name, value, lambda b: 0 <= b < 1, "a number in [0, 1)")
    check_scalar("initial_precision", initial_precision, lambda s: s > 0, "a number > 0")
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate)
    check_axes(axis_name)

    def init_fn(params: PyTree) -> BSAMState:
        check_not_in_multi_steps("bsam")
        _check_real(params)
        copy = jnp.array(jax.random.key_data(key))  # the state may be donated, the caller's key may not
        zeros = jax.tree.map(lambda w: jnp.zeros_like(noise.widen(w)), params)
        precision = jax.tree.map(lambda m: jnp.full_like(m, initial_precision), zeros)
        return BSAMState(jnp.zeros((), jnp.int32), copy, zeros, precision)

    def update_fn(
        updates: PyTree,
        state: BSAMState,
        params: PyTree = None,
        *,
        grad_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, BSAMState]:
        del updates, extra_args
        check_update_arguments("bsam", params, grad_fn)
        rng_key = jax.random.wrap_key_data(state.rng_key, impl=jax.random.key_impl(key))
        rng_key = jax.random.fold_in(rng_key, state.count)
        s = state.precision
        (local, own), rng_key = localize((params, s), rng_key, axis_name, independent_draws=True)

        def gradient(params: PyTree, i: int) -> PyTree:
            check_own_gradients("bsam", lambda w: grad_fn(w, jnp.int32(i)), params, axis_name)
            grads = grad_fn(params, jnp.int32(i))
            check_like_params("grad_fn", grads, params)
            return jax.tree.map(noise.widen, grads)

        deviation = jax.tree.map(lambda s: jax.lax.rsqrt(num_examples * s), own)
        u = noise.perturbation(rng_key, local, deviation, mask=mask)
        h = gradient(computed_once(noise.perturb(local, u), rng_key), 0)
        step = jax.tree.map(
            lambda u, h, s: None if u is None else _scaled(h / s, rho), u, h, own, is_leaf=lambda x: x is None
        )
        g = gradient(noise.perturb(local, step), 1)
        size = jax.tree.map(lambda h, s: jnp.sqrt(s) * jnp.abs(h), h, own)
        g, size = combine_over_axis((g, size), axis_name)

        decayed = jax.tree.map(lambda g, w: g + _scaled(noise.widen(w), weight_decay), g, params)
        momentum = _mixed(b1, state.momentum, decayed)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        updates = cast_like(_scaled(jax.tree.map(jnp.divide, momentum, s), -jnp.asarray(rate)), params)
        least = jnp.asarray(weight_decay) + damping
        precision = _mixed(b2, s, jax.tree.map(lambda size: size + least.astype(size.dtype), size))
        count = optax.safe_increment(state.count)
        return updates, BSAMState(count, state.rng_key, momentum, precision)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    check_aux_modes(aux, AUX_MODES)
    check_flag("global_ascent", global_ascent)
    if global_ascent and axis_name is None:
        raise ValueError("global_ascent: True needs axis_name, the devices that are to climb together.")
    check_axes(axis_name, param_specs)

    def value_and_grad_fn(key: jax.Array, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        key = as_key(key)
        loss, params = bind(fun, args, kwargs, argnums, has_aux=has_aux)
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        axes = other_axes(key, axis_name)
        specs = leaf_specs(params, param_specs, axes)
        params, key = localize(params, key, axis_name, independent_draws=not global_ascent)

        with copies_along(axis_name):
            if smoothing is None:
                out, gradient = value_and_grad(params)
            else:
                u = noise.perturbation(
                    key, params, smoothing.sigma, sampler=smoothing.sampler, mask=mask, specs=specs
                )
                out, gradient = loss(params), value_and_grad(computed_once(noise.perturb(params, u), key))[1]
            uphill = jax.tree.map(lambda g: jnp.conj(noise.widen(g)), gradient)
            if global_ascent:
                uphill = combine_over_axis(uphill, axis_name)
            if smoothing is not None:
                uphill = noise.perturb(_scaled(uphill, smoothing.gradient_weight), u)
            step = _step_up(params, uphill, climb, rho=rho, mask=mask, specs=specs)
            _, grads = value_and_grad(noise.perturb(params, step))

        value, aux_out = out
        leaves, treedef = jax.tree.flatten(aux_out)
        modes = broadcast_prefix("aux", aux, aux_out)
        leaves = [
            summed([x[None]])[0] if mode == "sum" else x
            for x, mode in zip(map(jnp.asarray, leaves), modes, strict=True)
        ]
        (value, leaves), grads = combine_over_axis(
            ((value, leaves), grads), axis_name, (("mean", modes), "mean")
        )
        return ((value, jax.tree.unflatten(treedef, leaves)) if has_aux else value), grads

    return named_after(fun, value_and_grad_fn, "Value, and gradient after an ascent,")


def _step_up(
    params: PyTree, uphill: PyTree, climb: Climb, *, rho: Any, mask: PyTree, specs: PyTree
) -> PyTree:
    """The step, in float32 at least, as a pytree like `params` with None where `mask` is False."""
    flags = leaf_mask(mask, params)
    splits = [noise.axes_of(spec) for spec in broadcast_prefix("param_specs", specs, params)]

    def chosen(leaves: Sequence[Any]) -> list[Any]:
        return [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

    weights = [noise.widen(w) for w in chosen(jax.tree.leaves(params))]
    directions = chosen(jax.tree.leaves(uphill))
    steps = iter(_scaled(climb(weights, directions, functools.partial(_norm, chosen(splits))), rho))
    return jax.tree.unflatten(jax.tree.structure(params), [next(steps) if flag else None for flag in flags])


def _normalized(_: Leaves, direction: Leaves, norm: Norm) -> Leaves:
    return _divide(direction, norm(direction))


def _unchanged(_weights: Leaves, direction: Leaves, _norm: Norm) -> Leaves:
    return direction


def _divide(leaves: Leaves, norm: jax.Array) -> Leaves:
    """The leaves over their norm; zeros where it is zero."""
    divisor = jnp.where(norm == 0, jnp.ones_like(norm), norm)
    return [x / divisor.astype(x.dtype) for x in leaves]


def _scaled(tree: PyTree, factor: Any) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(factor).astype(x.dtype) * x, tree)


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


def _mixed(weight: Any, old: PyTree, new: PyTree) -> PyTree:
    """Weight * old + (1 - weight) * new."""
    weight = jnp.asarray(weight)
    return jax.tree.map(jnp.add, _scaled(old, weight), _scaled(new, 1 - weight))


def _check_real(params: PyTree) -> None:
    check_inexact(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"params: leaf {leaf_name(path)} is {describe(leaf)}, but bsam is for real weights; give "
                "the real and the imaginary part as two leaves."
            )
