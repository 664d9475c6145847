"""Bayesian SAM, an optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nso_jax import noise
from nso_jax._axes import Axes, AxisName
from nso_jax._backend import computed_once
from nso_jax._callers import check_injected, check_not_in_multi_steps
from nso_jax._checks import (
    PyTree,
    as_key,
    check_count,
    check_real_params,
    check_scalar,
)
from nso_jax._precision import cast_like, mixed, scaled, widen
from nso_jax._updates import check_update_arguments, checked_gradients, key_for_state, key_of_update

__all__ = ["BSAMState", "bsam"]


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
    axes = Axes(axis_name)

    def init_fn(params: PyTree) -> BSAMState:
        check_not_in_multi_steps("bsam")
        check_real_params(params, "bsam is for real weights")
        zeros = jax.tree.map(lambda w: jnp.zeros_like(widen(w)), params)
        precision = jax.tree.map(lambda m: jnp.full_like(m, initial_precision), zeros)
        return BSAMState(jnp.zeros((), jnp.int32), key_for_state(key), zeros, precision)

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
        s = state.precision
        (local, own), rng_key = axes.localize((params, s), key_of_update(key, state))

        def gradient(params: PyTree, i: int) -> PyTree:
            return jax.tree.map(widen, checked_gradients("bsam", grad_fn, params, jnp.int32(i), axis_name))

        deviation = jax.tree.map(lambda s: jax.lax.rsqrt(num_examples * s), own)
        u = noise.perturbation(rng_key, local, deviation, mask=mask)
        h = gradient(computed_once(noise.perturb(local, u), rng_key), 0)
        step = jax.tree.map(
            lambda u, h, s: None if u is None else scaled(h / s, rho), u, h, own, is_leaf=lambda x: x is None
        )
        g = gradient(noise.perturb(local, step), 1)
        size = jax.tree.map(lambda h, s: jnp.sqrt(s) * jnp.abs(h), h, own)
        g, size = axes.combine((g, size))

        decayed = jax.tree.map(lambda g, w: g + scaled(widen(w), weight_decay), g, params)
        momentum = mixed(b1, state.momentum, decayed)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        updates = cast_like(scaled(jax.tree.map(jnp.divide, momentum, s), -jnp.asarray(rate)), params)
        least = jnp.asarray(weight_decay) + damping
        precision = mixed(b2, s, jax.tree.map(lambda size: size + least.astype(size.dtype), size))
        count = optax.safe_increment(state.count)
        return updates, BSAMState(count, state.rng_key, momentum, precision)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
