"""Random weight perturbation of half a batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nso_jax import gradients
from nso_jax._calls import check_aux_modes, named_after
from nso_jax._checks import PyTree, as_key, broadcast_prefix, check_scalar, is_inexact
from nso_jax._parts import batch_numbers, check_whole, fold_keys, join, part_of, select_batch
from nso_jax._precision import widen
from nso_jax.noise import Sigma

__all__ = ["mrwp"]

_OF_AXES = ("axis_name", "independent_draws", "param_specs")


def mrwp(
    fun: Callable[..., Any],
    *,
    sigma: Sigma,
    noisy_weight: Any = 0.5,
    batch_argnums: int | Sequence[int] = (1,),
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    aux: PyTree = "mean",
    **options: Any,
) -> Callable[..., tuple[Any, PyTree]]:
    """Mixed random weight perturbation: one half of the batch sees noise, the other does not (m-RWP).

        g = lambda * grad f(W + U; examples 0, 2, ...) + (1 - lambda) * grad f(W; examples 1, 3, ...)

    One gradient of the whole batch, in two halves that do not wait for one another. The plain half keeps the
    step from going astray where the noise is large; noise alone is `nso_jax.value_and_grad` with
    `antithetic=False`, and `clean_weight` mixes both on the same examples. With `noise.adaptive` as `sigma`
    it is m-ARWP.

    Args:
      fun, argnums, has_aux: as in `nso_jax.value_and_grad`.
      sigma: standard deviation of one weight's noise, as there; its authors have
        `noise.relative(0.01, "filter")`.
      noisy_weight: lambda, a scalar in [0, 1], which may be traced.
      batch_argnums: which arguments of `fun` carry examples along the leading axis of every leaf, an even
        number of them; as in `nso_jax.parallel.microbatch`. Of a typed PRNG key among the others, as for
        dropout, half i gets `jax.random.fold_in(key, i)`. `nso_jax.nnx` and `nso_jax.parallel` say this
        themselves.
      aux: what becomes of auxiliary output: "mean" mixes float leaves as the gradients and takes others from
        the noisy half, "sum" adds up the halves. A prefix pytree of the auxiliary output mixes them.
      **options: the other arguments of `nso_jax.value_and_grad` for the noisy half, such as `sampler` and
        `mask`, or for both, such as `axis_name`.

    Returns:
      `fn(key, *args, **kwargs)`, as of `nso_jax.value_and_grad`; the value is mixed as the gradients are.

    Raises:
      TypeError: as `nso_jax.value_and_grad`, or a batch argument is missing or has no leading axis.
      ValueError: as there, `noisy_weight` is outside [0, 1], the number of examples is odd, or an argument
        with examples is differentiated.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import noise, sharpness
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> fn = sharpness.mrwp(loss, sigma=noise.relative(0.01, "filter"), noisy_weight=0.25)
      >>> value, grad = jax.jit(fn)(jax.random.key(0), jnp.ones(3), jnp.ones((8, 3)))
      >>> grad.shape
      (3,)

    References:
      Li et al., Efficient Generalization Improvement Guided by Random Weight Perturbation,
      arXiv 2211.11489, 2022.
      Li et al., Revisiting Random Weight Perturbation for Efficiently Improving Generalization,
      arXiv 2404.00357, 2024.
    """
    check_scalar("noisy_weight", noisy_weight, lambda x: 0 <= x <= 1, "a number in [0, 1]")
    check_aux_modes(aux, ("mean", "sum"))
    both = {"argnums": argnums, "has_aux": has_aux, "aux": aux, "antithetic": False}
    noisy = gradients.value_and_grad(fun, sigma=sigma, **both, **options)
    of_axes = {name: options[name] for name in _OF_AXES if name in options}
    plain = gradients.value_and_grad(fun, sigma=0.0, mask=False, **both, **of_axes)
    numbers = batch_numbers(batch_argnums)
    modes = ("mean", "mean") if not has_aux or aux == "mean" else (("mean", aux), "mean")

    def value_and_grad_fn(key: jax.Array, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        key = as_key(key)
        fixed, batch = select_batch(args, numbers, 2)
        check_whole(batch_numbers(argnums, "argnums"), batch, len(args))

        def on_half(fn: Callable[..., PyTree], i: int) -> PyTree:
            others, named = fold_keys((fixed, kwargs), i)
            return fn(key, *join(others, part_of(batch, i, 2)), **named)

        first, second = on_half(noisy, 0), on_half(plain, 1)
        leaves, treedef = jax.tree.flatten(first)
        mixed = [
            _joined(mode, noisy_weight, *halves)
            for mode, *halves in zip(
                broadcast_prefix("aux", modes, first), leaves, jax.tree.leaves(second), strict=True
            )
        ]
        return jax.tree.unflatten(treedef, mixed)

    return named_after(fun, value_and_grad_fn, "Value and gradient, half of it at perturbed weights,")


def _joined(mode: str, weight: Any, noisy: jax.Array, plain: jax.Array) -> jax.Array:
    if mode == "sum":
        return noisy + plain
    if not is_inexact(noisy):
        return noisy
    share = jnp.asarray(weight).astype(widen(noisy).real.dtype)
    return (share * widen(noisy) + (1 - share) * widen(plain)).astype(noisy.dtype)
