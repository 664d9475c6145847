"""Improved variational online Newton, an optimizer."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nso_jax import noise
from nso_jax._axes import Axes, AxisName
from nso_jax._callers import check_injected, check_not_in_multi_steps
from nso_jax._checks import PyTree, as_key, check_count, check_real_params, check_scalar
from nso_jax._draws import Draws
from nso_jax._precision import cast_like, mixed, scaled, widen
from nso_jax._updates import check_update_arguments, checked_gradients, key_for_state, key_of_update
from nso_jax.noise import Sampler

__all__ = ["IVONState", "ivon"]


class IVONState(NamedTuple):
    """State of `ivon`.

    Attributes:
      count: number of updates so far, int32; it picks the next one's noise and drives a schedule.
      rng_key: the PRNG key, which never changes, as raw uint32 data.
      momentum: g, the running mean of the gradient, a pytree like the params, in float32 at least.
      hessian: h, a pytree like the params: a weight's posterior variance is
        1 / (num_examples * (h + weight_decay)).
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it, which hides tuple.count
    rng_key: jax.Array
    momentum: PyTree
    hessian: PyTree


def ivon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_examples: int,
    key: jax.Array,
    weight_decay: float = 2e-4,
    b1: float = 0.9,
    b2: float = 0.99999,
    initial_hessian: float = 0.5,
    num_samples: int = 1,
    antithetic: bool = False,
    sampler: Sampler = noise.normal,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Improved variational online Newton: learns each weight's variance, and adds noise of that size.

        U ~ N(0, 1 / (n (h + d))),    q = mean of grad f(W + U),    p = mean of U * grad f(W + U) * n (h + d)
        g <- b1 * g + (1 - b1) * q
        h <- b2 * h + (1 - b2) * p + (1 - b2)^2 (h - p)^2 / (2 (h + d))
        W <- W - learning_rate (h_0 + d) * (g / (1 - b1^t) + d * W) / (h + d)

    with the h from before the step on the right, but in the last line; n `num_examples`, d `weight_decay` and
    t the number of the step. E[p] is the mean of the Hessian's diagonal under the noise, and h + d stays
    positive. One gradient evaluation for a draw. The update needs the gradient function, as that of `bsam`,
    and like there wrappers such as `optax.MultiSteps` do not go around it.

    Args:
      learning_rate: a number or an optax schedule of the state's count, in the units of SGD's at the start,
        as the authors' code has it.
      num_examples: how many training examples the posterior is of; above that, noise is smaller.
      key: a PRNG key, typed or legacy; update number t uses `jax.random.fold_in(key, t - 1)`.
      weight_decay: d, the prior's precision over `num_examples`, > 0.
      b1: decay of g, in [0, 1).
      b2: decay of h, in [0, 1), close to 1: p is noisy.
      initial_hessian: h at the start, > 0: .05 to 1; with a smaller one noise starts larger.
      num_samples, antithetic, sampler: as in `nso_jax.value_and_grad`; one-sided draws by default, as
        published. With pairs the noise of p is smaller, for twice the gradients.
      axis_name: inside `shard_map` or `pmap` over that axis: each device draws for itself, and q and p are
        averaged.

    Returns:
      A transformation whose state is an `IVONState`; the learning rate is in its updates.

    Raises:
      TypeError: an argument has the wrong type, as `key`, or in `update` `grad_fn` is missing.
      ValueError: an argument is out of range, or in `update` `params` are missing or masked, or the
        gradients are unlike them.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from nso_jax import sharpness
      >>> loss = lambda w: jnp.sum(w**2)
      >>> tx = sharpness.ivon(0.1, num_examples=1000, key=jax.random.key(0))
      >>> w = jnp.array([1.0, 2.0])
      >>> grad_fn = lambda w, i: jax.grad(loss)(w)
      >>> updates, state = tx.update(w, tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.round(1))
      [-0.2 -0.4]
      >>> deviation = 1 / jnp.sqrt(1000 * (state.hessian + 2e-4))  # of the weights' posterior

    References:
      Shen et al., Variational Learning is Effective for Large Deep Networks, arXiv 2402.17641, 2024.
    """
    check_injected()
    key = as_key(key)
    check_count("num_examples", num_examples)
    for name, value in (("weight_decay", weight_decay), ("initial_hessian", initial_hessian)):
        check_scalar(name, value, lambda x: x > 0, "a number > 0")
    for name, value in (("b1", b1), ("b2", b2)):
        check_scalar(name, value, lambda b: 0 <= b < 1, "a number in [0, 1)")
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate)
    axes = Axes(axis_name)
    draws = Draws(0.0, num_samples, antithetic, sampler)

    def init_fn(params: PyTree) -> IVONState:
        check_not_in_multi_steps("ivon")
        check_real_params(params, "ivon is for real weights")
        zeros = jax.tree.map(lambda w: jnp.zeros_like(widen(w)), params)
        hessian = jax.tree.map(lambda g: jnp.full_like(g, initial_hessian), zeros)
        return IVONState(jnp.zeros((), jnp.int32), key_for_state(key), zeros, hessian)

    def damped(h: jax.Array) -> jax.Array:
        return h + jnp.asarray(weight_decay).astype(h.dtype)

    def update_fn(
        updates: PyTree, state: IVONState, params: PyTree = None, *, grad_fn: Any = None, **extra_args: Any
    ) -> tuple[PyTree, IVONState]:
        del updates, extra_args
        check_update_arguments("ivon", params, grad_fn)
        precision = jax.tree.map(lambda h: num_examples * damped(h), state.hessian)
        of_posterior = dataclasses.replace(draws, sigma=jax.tree.map(jax.lax.rsqrt, precision))

        def evaluate(moved: PyTree, i: jax.Array) -> tuple[PyTree, tuple[()]]:
            grads = checked_gradients("ivon", grad_fn, moved, i, axis_name)
            # With the noise that arrived, rounded as the weights are.
            curved = jax.tree.map(
                lambda g, v, w, s: widen(g) * (widen(v) - widen(w)) * s, grads, moved, params, precision
            )
            return (grads, curved), ()

        like = state.momentum, state.hessian
        local, _ = of_posterior.mean(
            evaluate, key_of_update(key, state), params, axes=axes, clean=lambda _: like, like=like
        )
        q, p = axes.combine(local)

        def corrected(h: jax.Array, p: jax.Array) -> jax.Array:
            share = jnp.asarray(1 - b2).astype(h.dtype)
            return h + share * (p - h) + share**2 * (h - p) ** 2 / (2 * damped(h))

        def direction(g: jax.Array, w: jax.Array, h: jax.Array) -> jax.Array:
            unbiased = g / (1 - jnp.asarray(b1).astype(g.dtype) ** count.astype(g.dtype))
            return (unbiased + scaled(widen(w), weight_decay)) / damped(h)

        momentum = mixed(b1, state.momentum, q)
        hessian = jax.tree.map(corrected, state.hessian, p)
        count = optax.safe_increment(state.count)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        start = jnp.asarray(initial_hessian) + jnp.asarray(weight_decay)
        updates = scaled(jax.tree.map(direction, momentum, params, hessian), -jnp.asarray(rate))
        updates = scaled(updates, start)
        return cast_like(updates, params), IVONState(count, state.rng_key, momentum, hessian)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
