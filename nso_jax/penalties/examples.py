"""Penalties of each example: of what the loss or the outputs do as the input moves, and of the outputs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import _backend, noise
from nso_jax._checks import (
    PyTree,
    as_key,
    check_count,
    check_function,
    check_inexact,
    describe,
    dtype_of,
    leaf_name,
)
from nso_jax._derivatives import hessian_product, second_derivative, slope
from nso_jax._precision import cast_like, widen

__all__ = ["confidence", "input_gradient", "input_hessian_norm", "jacobian"]


def input_hessian_norm(
    key: jax.Array,
    fun: Callable[..., Any],
    inputs: PyTree,
    *args: Any,
    num_steps: int = 1,
    step_size: Any = math.inf,
) -> jax.Array:
    """For each example the operator norm of the Hessian H of its loss with respect to its input.

    The norm is max |H v| over unit vectors v, sought by gradient ascent from a random normal one:

        g = grad_v |H v| = H u,   u = H v / |H v|,   v <- unit(v + step_size * g / |g|)

    The result is |H v| <= |H|, with the derivative of u^T H v at fixed u and v. That is exact to first order
    given v; higher derivatives take u as fixed. Where H v is zero, the result and its gradient are zero.

    Args:
      key: a PRNG key, typed or legacy.
      fun: `fun(inputs, *args)` returning the losses of the examples, each a function of its own example
        only, so without batch statistics. Their axes are the batch axes, usually one: shape (n,). A scalar is
        the loss of one example without batch axis, for use under vmap.
      inputs: a real array, or a pytree of them; the batch axes come first in each leaf.
      *args: what else `fun` takes, such as labels and params, which may also be closed over.
      num_steps: of the ascent. The default of 1 costs the least; v being forgotten between training steps,
        more of them give a closer bound.
      step_size: > 0. The default, infinity, is power iteration on H^2.

    Returns:
      An array of the shape of the losses, in float32 at least.

    Raises:
      TypeError: an argument has the wrong type, `key` is not a PRNG key, a leaf of `inputs` is not real, or
        `fun` returns something else than losses whose axes lead in each leaf.
      ValueError: `num_steps` is below 1, or `step_size` is not above 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import penalties
      >>> losses = lambda x, scales: jnp.sum(scales * x**2, axis=1)
      >>> x, scales = jnp.ones((2, 2)), jnp.array([[1.0, 0.0], [0.0, -3.0]])
      >>> penalties.input_hessian_norm(jax.random.key(0), losses, x, scales)
      Array([2., 6.], dtype=float32)

    References:
      Mustafa, Vandermeulen and Kloft, Input Hessian Regularization of Neural Networks,
      arXiv 2009.06571, 2020.
    """
    key = as_key(key)
    check_count("num_steps", num_steps)
    _check_step_size(step_size)
    inputs, losses_like = _check_inputs(fun, inputs, args)
    axes = losses_like.ndim

    def losses(x: PyTree) -> jax.Array:
        return fun(x, *args)

    varying_product = hessian_product(losses, inputs)

    def product(v: PyTree) -> PyTree:
        """H v, as a constant."""
        return jax.lax.stop_gradient(varying_product(cast_like(v, inputs)))

    def ascend(v: PyTree, _: Any) -> tuple[PyTree, None]:
        u, _ = _unit(product(v), axes)
        direction, _ = _unit(product(u), axes)
        moved = jax.tree.map(lambda d, v: d + v / jnp.asarray(step_size).astype(v.dtype), direction, v)
        return _unit(moved, axes)[0], None

    start, _ = _unit(noise.perturbation(key, inputs, 1.0, sampler=noise.normal), axes)
    v, _ = _backend.loop(ascend, start, num_steps, key)
    u, norm = _unit(product(v), axes)
    form = second_derivative(losses, inputs, cast_like(u, inputs), cast_like(v, inputs), axes)
    return _with_derivative(norm, form)


def input_gradient(fun: Callable[..., Any], inputs: PyTree, *args: Any) -> jax.Array:
    """For each example the squared norm of the gradient g of its loss with respect to its input.

    |g|^2 is also the derivative of the loss along g, and half the gradient of |g|^2 is that derivative's at
    fixed g: forward over reverse differentiation instead of reverse over reverse (double backpropagation).
    It is exact to first order; higher derivatives take g as fixed.

    Args:
      fun, inputs, *args: as in `input_hessian_norm`.

    Returns:
      An array of the shape of the losses, in float32 at least.

    Raises:
      TypeError: `fun` is not a function, a leaf of `inputs` is not real, or `fun` returns something else than
        losses whose axes lead in each leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from nso_jax import penalties
      >>> losses = lambda x: jnp.sum(x**2, axis=1)
      >>> penalties.input_gradient(losses, jnp.array([[1.0, 2.0], [0.0, 0.0]]))
      Array([20.,  0.], dtype=float32)

    References:
      Drucker and LeCun, Improving generalization performance using double backpropagation, IEEE Transactions
      on Neural Networks 3(6), 1992.
    """
    inputs, losses_like = _check_inputs(fun, inputs, args)
    return _squared_gradient(lambda x: fun(x, *args), inputs, losses_like.ndim)


def jacobian(
    key: jax.Array, fun: Callable[..., Any], inputs: PyTree, *args: Any, num_projections: int = 1
) -> jax.Array:
    """For each example an unbiased estimate of the squared Frobenius norm of the Jacobian of its outputs.

        |dz/dx|^2 = C E[|d(v . z)/dx|^2],   v uniform on the unit sphere in C dimensions

    for C outputs z, with the derivative as `input_gradient` takes it: exact to first order given v.

    Args:
      key: a PRNG key, typed or legacy.
      fun: `fun(inputs, *args)` returning the outputs, say logits, of shape (n, C); further axes count as
        outputs too. Each example's depend on that example only, so no batch statistics.
      inputs: a real array, or a pytree of them, with the batch axis first in each leaf.
      *args: what else `fun` takes, such as params, which may also be closed over.
      num_projections: k vectors v, independent for each example, number j drawn with
        `jax.random.split(key, k)[j]`; the results are averaged. The default of 1 leaves the averaging
        to the batch and the training steps.

    Returns:
      An array of shape (n,), in float32 at least.

    Raises:
      TypeError: an argument has the wrong type, `key` is not a PRNG key, a leaf of `inputs` is not real, or
        `fun` returns something else than real outputs with the batch axis first.
      ValueError: `num_projections` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import penalties
      >>> logits = lambda x, w: x @ w
      >>> penalties.jacobian(jax.random.key(0), logits, jnp.ones((2, 3)), 2 * jnp.eye(3)).round()
      Array([12., 12.], dtype=float32)

    References:
      Hoffman, Roberts and Yaida, Robust Learning with Jacobian Regularization, arXiv 1908.02729, 2019.
    """
    key = as_key(key)
    check_count("num_projections", num_projections)
    inputs, outputs_like = _check_inputs(fun, inputs, args, outputs=True)
    dtype = jax.eval_shape(widen, outputs_like).dtype
    count = math.prod(outputs_like.shape[1:])

    def estimate(key: jax.Array) -> jax.Array:
        v, _ = _unit(noise.normal(key, outputs_like.shape, dtype), 1)

        def projection(x: PyTree) -> jax.Array:
            return jnp.sum(v * widen(fun(x, *args)), axis=tuple(range(1, v.ndim)))

        return count * _squared_gradient(projection, inputs, 1)

    return _backend.mean_over(estimate, key, num_projections)


def confidence(logits: jax.Array) -> jax.Array:
    """Minus the entropy of each example's class probabilities: the sum over classes of p log p.

    To be added with a positive weight: the published loss is -log p - beta * entropy. A class of
    probability 0, such as one whose logit is minus infinity, contributes 0. The cost is that of a softmax.

    Args:
      logits: of shape (..., C), the classes last.

    Returns:
      An array of shape (...), in float32 at least, in nats: from -log C for equal probabilities to 0.

    Raises:
      TypeError: `logits` is not a real floating array.
      ValueError: it has no classes.

    Example:
      >>> import jax.numpy as jnp
      >>> from nso_jax import penalties
      >>> print(penalties.confidence(jnp.array([[0.0, 0.0], [0.0, -jnp.inf]])).round(3))
      [-0.693  0.   ]

    References:
      Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions,
      arXiv 1701.06548, 2017.
    """
    dtype = dtype_of(logits)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"logits: expected a real floating array, got {describe(logits)}.")
    if jnp.shape(logits)[-1:] in ((), (0,)):
        raise ValueError(f"logits: expected shape (..., classes), got {describe(logits)}.")
    log_p = jax.nn.log_softmax(widen(logits))
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, log_p, 0), axis=-1)


def _squared_gradient(losses: Callable[[PyTree], jax.Array], inputs: PyTree, axes: int) -> jax.Array:
    """|g|^2 for each example; along g / |g|, since the derivative along g may overflow in half precision."""
    gradient = jax.lax.stop_gradient(jax.grad(lambda x: jnp.sum(losses(x)))(inputs))
    direction, norm = _unit(gradient, axes)
    along = slope(losses, inputs, cast_like(direction, inputs), axes)
    return _with_derivative(norm**2, 2 * norm * widen(along).astype(norm.dtype))


def _with_derivative(value: jax.Array, slope: jax.Array) -> jax.Array:
    """The value of the one with the derivatives of the other."""
    slope = widen(slope).astype(value.dtype)
    return jax.lax.stop_gradient(value) + (slope - jax.lax.stop_gradient(slope))


def _unit(v: PyTree, axes: int) -> tuple[PyTree, jax.Array]:
    """`v` over its norm, and that norm, over all leaves and all but the batch axes. Zero stays zero."""
    v = jax.tree.map(widen, v)
    leaves = jax.tree.leaves(v)
    dtype = np.result_type(*[x.dtype for x in leaves])
    squares = [jnp.sum(jnp.square(x), axis=tuple(range(axes, x.ndim))).astype(dtype) for x in leaves]
    norm = jnp.sqrt(sum(squares[1:], squares[0]))
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)

    def scaled(x: jax.Array) -> jax.Array:
        return jnp.expand_dims(inverse, tuple(range(axes, x.ndim))).astype(x.dtype) * x

    return jax.tree.map(scaled, v), norm


def _check_step_size(step_size: Any) -> None:
    dtype = dtype_of(step_size)
    real = (
        dtype is not None
        and jnp.issubdtype(dtype, np.number)
        and not jnp.issubdtype(dtype, np.complexfloating)
    )
    if not real or jnp.shape(step_size) != ():
        raise TypeError(f"step_size: expected a real scalar, got {describe(step_size)}.")
    if not isinstance(step_size, jax.core.Tracer) and not jax.device_get(step_size) > 0:
        raise ValueError(f"step_size: expected a number > 0, got {step_size}.")


def _check_inputs(
    fun: Any, inputs: PyTree, args: tuple[Any, ...], *, outputs: bool = False
) -> tuple[PyTree, jax.ShapeDtypeStruct]:
    """The inputs as arrays, and the shape of what `fun` returns; raises TypeError if they do not fit."""
    check_function("fun", fun)
    check_inexact(inputs, "inputs")
    leaves = [(leaf_name(path), x) for path, x in jax.tree.leaves_with_path(inputs)]
    if not leaves:
        raise TypeError(f"inputs: expected an array or a pytree of them, got {describe(inputs)} without any.")
    for path, x in leaves:
        if jnp.iscomplexobj(x):
            raise TypeError(f"inputs: leaf {path} is {describe(x)}, expected real numbers.")
    expected = "outputs of shape (n, C)" if outputs else "losses of shape (n,), or () without a batch axis"

    def checked(x: PyTree) -> Any:
        out = fun(x, *args)
        dtype = dtype_of(out)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or (outputs and not jnp.ndim(out)):
            raise TypeError(f"fun: expected real {expected}, got {describe(out)}.")
        return out

    out = jax.eval_shape(checked, inputs)
    batch = out.shape[:1] if outputs else out.shape
    for path, x in leaves:
        if jnp.shape(x)[: len(batch)] != batch:
            raise TypeError(
                f"fun: expected {expected}, with the axes of the batch first in each leaf of inputs, got "
                f"{describe(out)} where leaf {path} is {describe(x)}."
            )
    return jax.tree.map(jnp.asarray, inputs), out
