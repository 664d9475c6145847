"""The optax adapter: noise stability optimization as a gradient transformation."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nso_jax import noise
from nso_jax._axes import Axes, AxisName
from nso_jax._callers import check_injected, check_not_in_multi_steps
from nso_jax._checks import PyTree, as_key, describe, is_function
from nso_jax._draws import Draws
from nso_jax._updates import (
    check_like_params,
    check_update_arguments,
    checked_gradients,
    key_for_state,
    key_of_update,
)
from nso_jax.noise import Sampler, Sigma

__all__ = ["NoiseStabilityState", "noise_stability", "nso"]


class NoiseStabilityState(NamedTuple):
    """State of `noise_stability`.

    Attributes:
      count: number of updates so far, int32; it picks the next one's noise and drives a schedule of sigma.
      rng_key: the PRNG key, which never changes, as raw uint32 data: every checkpoint format and `jax.tree`
        function can handle that.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it, which hides tuple.count
    rng_key: jax.Array


def noise_stability(
    sigma: Sigma,
    *,
    key: jax.Array,
    num_samples: int = 1,
    antithetic: bool = True,
    sampler: Sampler = noise.normal,
    mask: PyTree = None,
    clean_weight: Any = 0.0,
    chunk_size: int | None = None,
    axis_name: AxisName | None = None,
    independent_draws: bool = True,
    param_specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by its average over k antithetic weight perturbations.

        g = 1/(2k) sum_j [grad f(W + U_j) + grad f(W - U_j)]
        updates = clean_weight * incoming + (1 - clean_weight) * g

    The update needs the gradient function: `tx.update(grads, state, params, grad_fn=grad_fn)`, with
    `grad_fn(params, i)` as `optax.contrib.sam` takes it in opaque mode. `i` is the evaluation's index, an
    int32 scalar in the order +1, -1, +2, -2, ...; use the same data in both members of a pair. The incoming
    updates are the gradient at `params`; with `clean_weight=0` they are ignored, and under jit their
    computation is dropped.

    A transformation that evaluates the loss must see the params, every gradient and a `grad_fn` for the batch
    at hand. So it comes first in the chain, and these wrappers stay inside, around what follows it:

    - `chain(noise_stability(...), MultiSteps(optimizer, n).gradient_transformation())`: with `MultiSteps`
      outside, only the last microbatch's `grad_fn` would count, so that is an error.
    - `chain(noise_stability(...), apply_if_finite(optimizer, n))`: outside, `apply_if_finite` would check the
      incoming gradients and not the averaged ones.
    - `chain(noise_stability(...), masked(optimizer, mask))`, and so for `partition`: outside, the loss would
      get `MaskedNode`s. To perturb some leaves only, use the argument `mask`.
    - `chain(noise_stability(...), contrib.mechanize(optimizer))`: outside, `mechanize` would tune its scale
      by the incoming gradients.
    - `chain(noise_stability(...), flatten(optimizer))`: outside, the loss would get one vector; and so for
      `contrib.split_real_and_imaginary`, which passes on no `grad_fn`. `lookahead` works on neither side.

    `inject_hyperparams` goes around a function of what is to change, or outside with all but `sigma` and
    `clean_weight` in its `static_args`, as it takes other numbers and functions for hyperparameters too:
    `inject_hyperparams(lambda sigma: noise_stability(sigma, key=key, num_samples=4))(sigma=0.1)`.

    Args:
      sigma: standard deviation of one weight's noise. A scalar, a prefix pytree of the params,
        `noise.relative`, or an optax schedule: any other function is called with the state's count, and may
        return all that `nso_jax.value_and_grad` takes, as `lambda count: noise.relative(schedule(count))`. Of
        bfloat16 weights, those above 256 to 512 times their noise do not move.
      key: a PRNG key, typed or legacy; update number n uses `jax.random.fold_in(key, n)`.
      clean_weight: lambda in [0, 1], the share of the incoming gradient.
      num_samples, antithetic, sampler, mask, chunk_size: as in `nso_jax.value_and_grad`; `grad_fn` is
        evaluated 2k times, k if not `antithetic`.
      axis_name, independent_draws, param_specs: as there, inside `shard_map` or `pmap`.

    Returns:
      A transformation whose state is a `NoiseStabilityState`.

    Raises:
      TypeError: an argument has the wrong type, as `key`, `inject_hyperparams` injects one that has to be
        static, or in `update` `grad_fn` is missing.
      ValueError: an argument is out of range, `MultiSteps` is around it, or in `update` `params` are missing
        or masked, or the incoming updates or the gradients are unlike them.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import nso_jax
      >>> loss = lambda w: jnp.sum(w**4)
      >>> tx = optax.chain(nso_jax.noise_stability(0.01, key=jax.random.key(0)), optax.sgd(0.01))
      >>> w = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(w, tx.init(w), w, grad_fn=lambda w, i: jax.grad(loss)(w))
      >>> print(updates.round(2))
      [-0.04 -0.32]

    References:
      Zhang, Li and Ju, Noise Stability Optimization for Finding Flat Minima, arXiv 2306.08553, 2023.
    """
    is_relative = isinstance(sigma, noise.Relative)
    check_injected(*["sigma"] * is_relative)
    key = as_key(key)
    draws = Draws(sigma, num_samples, antithetic, sampler, mask, clean_weight, chunk_size)
    axes = Axes(axis_name, independent_draws, param_specs)
    scheduled = is_function(sigma) and not is_relative

    def init_fn(params: PyTree) -> NoiseStabilityState:
        del params
        check_not_in_multi_steps("noise_stability")
        return NoiseStabilityState(jnp.zeros((), jnp.int32), key_for_state(key))

    def update_fn(
        updates: PyTree,
        state: NoiseStabilityState,
        params: PyTree = None,
        *,
        grad_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, NoiseStabilityState]:
        del extra_args
        check_update_arguments("noise_stability", params, grad_fn)
        check_like_params("updates", updates, params)

        def evaluate(params: PyTree, i: jax.Array) -> tuple[PyTree, tuple[()]]:
            return checked_gradients("noise_stability", grad_fn, params, i, axis_name), ()

        at_count = dataclasses.replace(draws, sigma=sigma(state.count)) if scheduled else draws
        averaged, _ = at_count.mean(
            evaluate,
            key_of_update(key, state),
            params,
            axes=axes,
            clean=lambda _: updates,
            like=updates,
        )
        count = optax.safe_increment(state.count)
        return axes.combine(averaged), state._replace(count=count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def nso(
    optimizer: optax.GradientTransformation,
    sigma: Sigma,
    *,
    key: jax.Array,
    num_samples: int = 1,
    antithetic: bool = True,
    sampler: Sampler = noise.normal,
    mask: PyTree = None,
    clean_weight: Any = 0.0,
    chunk_size: int | None = None,
    axis_name: AxisName | None = None,
    independent_draws: bool = True,
    param_specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Noise stability optimization with any optax optimizer: `chain(noise_stability(...), optimizer)`.

    Momentum, weight decay and schedules stay the optimizer's; it sees the averaged gradient.

    Args:
      optimizer: what gets the averaged gradient.
      sigma: standard deviation of one weight's noise, as in `noise_stability`.
      key, num_samples, antithetic, sampler, mask, clean_weight, chunk_size: as in `noise_stability`.
      axis_name, independent_draws, param_specs: as there.

    Returns:
      A transformation whose `update` takes `grad_fn`.

    Raises:
      TypeError: as `noise_stability`, or `optimizer` is no optax transformation.
      ValueError: as `noise_stability`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import nso_jax
      >>> loss = lambda w, batch: jnp.mean((batch @ w) ** 2)
      >>> tx = nso_jax.nso(optax.adam(1e-2), 0.05, key=jax.random.key(0))
      >>> w, batch = jnp.ones(3), jnp.ones((8, 3))
      >>> grad_fn = lambda w, i: jax.grad(loss)(w, batch)
      >>> updates, state = tx.update(grad_fn(w, 0), tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.round(3))
      [-0.01 -0.01 -0.01]

    References:
      Zhang, Li and Ju, Noise Stability Optimization for Finding Flat Minima, arXiv 2306.08553, 2023.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer: expected an optax transformation, got {describe(optimizer)}.")
    averaged = noise_stability(
        sigma,
        key=key,
        num_samples=num_samples,
        antithetic=antithetic,
        sampler=sampler,
        mask=mask,
        clean_weight=clean_weight,
        chunk_size=chunk_size,
        axis_name=axis_name,
        independent_draws=independent_draws,
        param_specs=param_specs,
    )
    return optax.chain(averaged, optimizer)
