"""The heart: a loss's value and gradient, averaged over antithetic perturbations of its weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from nso_jax import noise
from nso_jax._axes import Axes, AxisName
from nso_jax._calls import as_argnums, bind, check_aux_modes, named_after
from nso_jax._checks import PyTree, as_key, broadcast_prefix, check_flag, check_function, is_inexact
from nso_jax._draws import Draws
from nso_jax._precision import summed
from nso_jax.noise import Sampler, Sigma

__all__ = ["value_and_grad"]

AUX_MODES = ("mean", "sum", "concatenate", "stack", "clean")


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
    draws = Draws(sigma, num_samples, antithetic, sampler, mask, clean_weight, chunk_size)
    axes = Axes(axis_name, independent_draws, param_specs)
    check_flag("has_aux", has_aux)
    check_aux_modes(aux, AUX_MODES)

    def value_and_grad_fn(key: jax.Array, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        key = as_key(key)
        loss, params = bind(fun, args, kwargs, argnums, has_aux=has_aux)
        value_like, aux_like = jax.eval_shape(loss, params)
        modes = broadcast_prefix("aux", aux, aux_like)
        reductions = _reductions(modes, aux_like)

        def evaluate(params: PyTree, _: Any) -> tuple[PyTree, PyTree]:
            (value, aux_out), grads = jax.value_and_grad(loss, has_aux=True)(params)
            leaves = _by_reduction(aux_out, reductions)
            return (value, grads, leaves["mean"]), (leaves["first"], leaves["sum"], leaves["stack"])

        (value, grads, means), (firsts, terms, stacks) = draws.mean(
            evaluate,
            key,
            params,
            axes=axes,
            clean=lambda params: evaluate(params, None)[0],
            like=(value_like, params, _by_reduction(aux_like, reductions)["mean"]),
        )
        leaves = {
            "mean": iter(means),
            "first": iter([leaf[0] for leaf in firsts]),
            "sum": iter(summed(terms)),
            "stack": iter(stacks),
            "clean": iter(
                _by_reduction(loss(params)[1], reductions)["clean"] if "clean" in reductions else []
            ),
        }
        aux_out = [next(leaves[reduction]) for reduction in reductions]
        over_axis = ["mean" if mode == "clean" else mode for mode in modes]
        (value, aux_out), grads = axes.combine(((value, aux_out), grads), (("mean", over_axis), "mean"))
        aux_out = jax.tree.unflatten(jax.tree.structure(aux_like), aux_out)
        return ((value, aux_out) if has_aux else value), grads

    return named_after(fun, value_and_grad_fn, "Value and gradient, averaged over weight noise,")


def _reductions(modes: list[str], aux_like: PyTree) -> list[str]:
    """What becomes of each leaf over the evaluations; "first" if it has no mean."""
    return [
        mode if mode not in ("mean", "concatenate") else "mean" if is_inexact(leaf) else "first"
        for mode, leaf in zip(modes, jax.tree.leaves(aux_like), strict=True)
    ]


def _by_reduction(aux_out: PyTree, reductions: list[str]) -> dict[str, list[Any]]:
    leaves = jax.tree.leaves(aux_out)
    return {
        reduction: [leaf for leaf, of_leaf in zip(leaves, reductions, strict=True) if of_leaf == reduction]
        for reduction in ("mean", "first", "sum", "stack", "clean")
    }
