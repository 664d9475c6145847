"""The heart: a loss's value and gradient, averaged over antithetic perturbations of its weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nso_jax import _backend, noise
from nso_jax._axes import (
    AxisName,
    check_axes,
    combine_over_axis,
    copies_along,
    leaf_specs,
    localize,
    other_axes,
)
from nso_jax._calls import as_argnums, bind, cast_like, check_aux_modes, named_after, summed
from nso_jax._checks import (
    PyTree,
    as_key,
    broadcast_prefix,
    check_count,
    check_flag,
    check_function,
    check_sampler,
    check_scalar,
    is_inexact,
)
from nso_jax.noise import Sampler, Sigma

__all__ = ["value_and_grad"]

AUX_MODES = ("mean", "sum", "concatenate", "stack", "clean")

Evaluate = Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]]


def value_and_grad(
    fun: Callable[..., Any],
    *,
    sigma: Sigma,
    num_samples: int = 1,
    antithetic: bool = True,
    sampler: Sampler = noise.normal,
    mask: PyTree = None,
    clean_weight: Any = 0.0,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    aux: PyTree = "mean",
    chunk_size: int | None = None,
    axis_name: AxisName | None = None,
    independent_draws: bool = True,
    param_specs: PyTree = None,
) -> Callable[..., tuple[Any, PyTree]]:
    """Like `jax.value_and_grad`, of the loss smoothed by weight noise: F(W) = E[f(W + U)].

    F = f + sigma^2/2 Tr(Hessian of f) + O(sigma^4), so descending it also flattens. The estimate is
    unbiased for F and cancels every odd Taylor term of f along the noise exactly:

        g = 1/(2k) sum_j [grad f(W + U_j) + grad f(W - U_j)]
        result = clean_weight * grad f(W) + (1 - clean_weight) * g

    Everything else that the arguments carry (data, dropout key) is the same in all 2k evaluations. The
    function is pure and works under jit, vmap, scan, checkpoint, shard_map and differentiation.

    Args:
      fun: `fun(*args, **kwargs)` returning a real scalar, or a pair of that and auxiliary output.
      sigma: standard deviation of one weight's noise. A scalar, a prefix pytree of the differentiated
        argument (the tuple of them if `argnums` is one), or a function from it to such a prefix, as
        `noise.relative` gives. It may be traced: a schedule is `sigma=schedule(step)` inside the step. A
        bfloat16 weight moves only for noise above |w|/512 to |w|/256 (float16 an eighth of that), and one
        that is cast inside `fun` likewise.
      num_samples: k, the number of draws; 2k gradients are evaluated (k if not `antithetic`). More draws
        divide the estimate's variance by k. The default of 1 takes the most steps for a given cost.
      antithetic: evaluate at W + U and W - U. False gives one-sided noise ("weight-perturbed SGD"), whose
        gradient keeps the first-order term H U and so has a far larger variance.
      sampler: `sampler(key, shape, dtype)` of unit variance; see `nso_jax.noise`.
      mask: which leaves are perturbed: bools, a prefix pytree or a function giving one. Leaves that are
        not still get gradients. The default is all of them.
      clean_weight: lambda in [0, 1], the share of the plain gradient; it costs one more evaluation
        unless it is the number 0, the default.
      argnums: which positional arguments of `fun` to differentiate, as in `jax.value_and_grad`.
      has_aux: whether `fun` returns `(loss, aux)`.
      aux: what becomes of the auxiliary output. "mean" averages float leaves over the evaluations and
        takes the others from the first one, so batch statistics come out right to O(sigma^2) at no cost;
        "sum" adds up the evaluations, for counts that are divided by one another; "concatenate" is for
        leaves with an entry for each example: as "mean", but devices keep theirs; "stack" gives each leaf a
        leading axis in the order +1, -1, +2, -2, ...; "clean" spends a forward pass at W and returns what it
        gave. A prefix pytree of the auxiliary output mixes them.
      chunk_size: draws that are evaluated at once, by vmap; chunks follow one another, so memory grows with
        `chunk_size` and not with k. The default, None, is one at a time, which takes the least. On GPU and
        TPU more may be faster for a small network; on CPU a vmapped evaluation costs 2 to 6 times a single
        one. With "rbg" keys the draws depend on it, as vmap over such keys does in JAX.
      axis_name: inside `shard_map`, `pmap` or `vmap` over that axis: everything stays local until one mean
        over it, of value, gradients and auxiliary output ("sum" is summed; "stack", "concatenate" and what
        has no mean stay local). So the loss is the mean of what `fun` returns on each device, which may have
        collectives over the axis inside. Where devices have unequal numbers of examples or tokens, divide a
        `jax.lax.psum` of the losses by one of the counts.
      independent_draws: with `axis_name`, whether each device folds its index into the key, so that D
        devices average k * D draws for the price of k.
      param_specs: inside a `shard_map` that splits the params over further axes: their partition specs, a
        prefix pytree as in its `in_specs`, so that each shard draws its own noise. Needed only with
        `check_vma=False`; else JAX knows them.

    Returns:
      `fn(key, *args, **kwargs)`, returning `(value, grads)`, or `((value, aux), grads)` with `has_aux`, of
      the structure, shapes and dtypes that `jax.value_and_grad` gives. `value` is the mean loss over the
      same evaluations. Noise is added and gradients are summed in float32 at least. A non-finite
      evaluation makes the result non-finite, for `optax.apply_if_finite(optimizer, n)` to skip the step. Draw
      j uses `jax.random.split(key, k)[j]`.

    Raises:
      TypeError: an argument has the wrong type, `key` is missing or not a PRNG key, a differentiated leaf
        is not inexact, or the loss is not a real scalar.
      ValueError: `sigma` is negative or NaN, `num_samples` or `chunk_size` is below 1, `clean_weight` is
        outside [0, 1], `aux` is unknown, `argnums` names an argument twice, a prefix does not fit, nothing
        maps over `axis_name` where `fn` is called, or `param_specs` names it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nso_jax
      >>> loss = lambda w: jnp.sum(w**4)
      >>> w, key = jnp.array([1.0, 2.0]), jax.random.key(0)
      >>> value, grad = nso_jax.value_and_grad(loss, sigma=0.0)(key, w)
      >>> print(value, grad)
      17.0 [ 4. 32.]
      >>> fn = jax.jit(nso_jax.value_and_grad(loss, sigma=0.1, num_samples=1000, chunk_size=100))
      >>> print(fn(key, w)[1].round(1))  # grad f + sigma^2/2 grad Tr(H) = 4 w^3 + .12 w
      [ 4.1 32.2]

    References:
      Zhang, Li and Ju, Noise Stability Optimization for Finding Flat Minima, arXiv 2306.08553, 2023.
    """
    check_function("fun", fun)
    argnums = as_argnums("argnums", argnums)
    options = {
        "sigma": sigma,
        "num_samples": num_samples,
        "antithetic": antithetic,
        "sampler": sampler,
        "mask": mask,
        "clean_weight": clean_weight,
        "chunk_size": chunk_size,
        "axis_name": axis_name,
        "independent_draws": independent_draws,
        "param_specs": param_specs,
    }
    check_options(**options)
    check_flag("has_aux", has_aux)
    check_aux_modes(aux, AUX_MODES)

    def value_and_grad_fn(key: jax.Array, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        key = as_key(key)
        loss, params = bind(fun, args, kwargs, argnums, has_aux=has_aux)
        value_like, aux_like = jax.eval_shape(loss, params)
        modes = broadcast_prefix("aux", aux, aux_like)
        fates = _fates(modes, aux_like)

        def evaluate(params: PyTree, _: Any) -> tuple[PyTree, PyTree]:
            (value, aux_out), grads = jax.value_and_grad(loss, has_aux=True)(params)
            leaves = _by_fate(aux_out, fates)
            return (value, grads, leaves["mean"]), (leaves["first"], leaves["sum"], leaves["stack"])

        (value, grads, means), (firsts, terms, stacks) = mean_over_draws(
            evaluate,
            key,
            params,
            clean=lambda params: evaluate(params, None)[0],
            like=(value_like, params, _by_fate(aux_like, fates)["mean"]),
            **options,
        )
        leaves = {
            "mean": iter(means),
            "first": iter([leaf[0] for leaf in firsts]),
            "sum": iter(summed(terms)),
            "stack": iter(stacks),
            "clean": iter(_by_fate(loss(params)[1], fates)["clean"] if "clean" in fates else []),
        }
        aux_out = [next(leaves[fate]) for fate in fates]
        over_axis = ["mean" if mode == "clean" else mode for mode in modes]
        (value, aux_out), grads = combine_over_axis(
            ((value, aux_out), grads), axis_name, (("mean", over_axis), "mean")
        )
        aux_out = jax.tree.unflatten(jax.tree.structure(aux_like), aux_out)
        return ((value, aux_out) if has_aux else value), grads

    return named_after(fun, value_and_grad_fn, "Value and gradient, averaged over weight noise,")


def mean_over_draws(
    evaluate: Evaluate,
    key: jax.Array,
    params: PyTree,
    *,
    clean: Callable[[PyTree], PyTree],
    like: PyTree,
    sigma: Sigma,
    num_samples: int,
    antithetic: bool,
    sampler: Sampler,
    mask: PyTree,
    clean_weight: Any,
    chunk_size: int | None,
    axis_name: AxisName | None,
    independent_draws: bool,
    param_specs: PyTree,
) -> tuple[PyTree, PyTree]:
    """The mean of `evaluate` over a device's draws: what `value_and_grad` and the optax adapter share.

    Args:
      evaluate: `evaluate(params, i) -> (averaged, kept)` at perturbed params, i the evaluation's index in
        the order +1, -1, +2, -2, ...
      key: a typed PRNG key.
      params: the unperturbed params.
      clean: what `averaged` is at the unperturbed params; called only if it is weighted.
      like: a pytree like `averaged`, with the dtypes in which it is returned.
      sigma: as in `value_and_grad`, like all that follow.
      num_samples: k.
      antithetic: whether to evaluate pairs.
      sampler: the noise.
      mask: the perturbed leaves.
      clean_weight: the share of `clean`.
      chunk_size: draws at once.
      axis_name: mapped axes along which the caller will average.
      independent_draws: whether devices along them draw for themselves.
      param_specs: how other mapped axes shard the params.

    Returns:
      `averaged`, its mean, and `kept`, with the evaluations stacked along a new leading axis.
    """
    axes = other_axes(key, axis_name)
    specs = leaf_specs(params, param_specs, axes)
    params, key = localize(params, key, axis_name, independent_draws=independent_draws)
    keys = jax.random.split(key, num_samples)
    size = min(chunk_size or 1, num_samples)

    def draw(center: PyTree, keys: jax.Array) -> PyTree:
        def one(key: jax.Array) -> PyTree:
            return noise.perturbation(key, center, sigma, sampler=sampler, mask=mask, specs=specs)

        return _over_draws(one, len(keys))(keys)

    def add(total: PyTree, center: PyTree, u: PyTree, sign: int, indices: jax.Array) -> tuple[PyTree, PyTree]:
        """`total` plus the sum over a chunk's draws of what is averaged; and what is kept of each."""

        def one(u: PyTree, index: jax.Array) -> tuple[PyTree, PyTree]:
            return evaluate(_backend.computed_once(noise.perturb(center, u, sign), key), index)

        averaged, kept = _over_draws(one, len(indices))(u, indices)
        return _backend.added(total, jax.tree.map(lambda x: jnp.sum(noise.widen(x), axis=0), averaged)), kept

    def add_chunk(total: PyTree, first: Any, size: int) -> tuple[PyTree, PyTree]:
        """As `add`, for both sides of the draws first, ..., first + size - 1."""
        draws = first + jnp.arange(size, dtype=jnp.int32)
        center, of_draws = _backend.in_each_step(params, jax.lax.dynamic_slice_in_dim(keys, first, size))
        u = draw(center, of_draws)
        if not antithetic:
            return add(total, center, u, 1, draws)
        u = _backend.computed_once(u, key)
        total, kept = add(total, center, u, 1, 2 * draws)
        center, u, total = _backend.drawn_again(draw, center, of_draws, u, after=total)
        total, other = add(total, center, u, -1, 2 * draws + 1)
        return total, jax.tree.map(lambda *sides: _merge_axes(jnp.stack(sides, axis=1)), kept, other)

    with copies_along(axis_name):
        total, kept = _sum_over_chunks(add_chunk, num_samples, size, key)
        mean = jax.tree.map(lambda x: x / (2 * num_samples if antithetic else num_samples), total)
        if not _is_zero(clean_weight):
            mean = jax.tree.map(lambda c, x: _mix(clean_weight, c, x), clean(params), mean)
    return cast_like(mean, like), kept


def check_options(
    *,
    num_samples: Any,
    antithetic: Any,
    sampler: Any,
    clean_weight: Any,
    chunk_size: Any,
    independent_draws: Any,
    axis_name: Any,
    param_specs: Any,
    **unchecked: Any,
) -> None:
    """Raises TypeError or ValueError, naming the argument and its value, for options that cannot work."""
    del unchecked  # sigma and mask need the params
    check_count("num_samples", num_samples)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_flag("antithetic", antithetic)
    check_flag("independent_draws", independent_draws)
    check_sampler(sampler)
    check_axes(axis_name, param_specs)
    check_scalar("clean_weight", clean_weight, lambda x: 0 <= x <= 1, "a number in [0, 1]")


def _sum_over_chunks(
    add_chunk: Callable[[PyTree, Any, int], tuple[PyTree, PyTree]], count: int, size: int, key: jax.Array
) -> tuple[PyTree, PyTree]:
    """Runs all chunks of `count` draws, the last of which may be smaller, one after another."""
    whole, rest = divmod(count, size)
    total, stacked = _backend.sum_over(lambda total, i: add_chunk(total, size * i, size), whole, key)
    kept = jax.tree.map(_merge_axes, stacked)
    if not rest:
        return total, kept
    total, first = _backend.barrier((total, jnp.int32(size * whole)), key)
    total, last = add_chunk(total, first, rest)
    return total, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), kept, last)


def _over_draws(fun: Callable[..., PyTree], size: int) -> Callable[..., PyTree]:
    """Maps `fun` over a chunk's draws; a chunk of one calls it as it is, so that it need not be vmappable."""
    if size > 1:
        return jax.vmap(fun)
    return lambda *args: jax.tree.map(
        lambda x: jnp.asarray(x)[None], fun(*jax.tree.map(lambda x: x[0], args))
    )


def _merge_axes(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _mix(weight: Any, clean: Any, noisy: jax.Array) -> jax.Array:
    weight = jnp.asarray(weight, noisy.dtype)
    return weight * noise.widen(clean) + (1 - weight) * noisy


def _fates(modes: list[str], aux_like: PyTree) -> list[str]:
    """What becomes of each leaf over the evaluations; "first" if it has no mean."""
    return [
        mode if mode not in ("mean", "concatenate") else "mean" if is_inexact(leaf) else "first"
        for mode, leaf in zip(modes, jax.tree.leaves(aux_like), strict=True)
    ]


def _by_fate(aux_out: PyTree, fates: list[str]) -> dict[str, list[Any]]:
    leaves = jax.tree.leaves(aux_out)
    return {
        fate: [leaf for leaf, of_leaf in zip(leaves, fates, strict=True) if of_leaf == fate]
        for fate in ("mean", "first", "sum", "stack", "clean")
    }


def _is_zero(weight: Any) -> bool:
    return not isinstance(weight, jax.core.Tracer) and jax.device_get(weight) == 0
