"""Derivatives of functions in which `jax.custom_vjp`, that has no forward mode, may stand somewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from nso_jax import _tracing
from nso_jax._axes import localize_like, own_loss
from nso_jax._checks import PyTree
from nso_jax._precision import widen


def traced(function: Callable[[PyTree], Any], x: PyTree) -> tuple[Callable[[PyTree], Any], bool]:
    """`function`, traced at x for arguments like it, and whether it is to be differentiated backward only."""
    evaluate, jaxpr = _tracing.traced(function, x)
    return evaluate, _tracing.has_primitive(jaxpr, "custom_vjp_call")


def linearize(function: Callable[[PyTree], Any], x: PyTree) -> tuple[Any, Any, Any]:
    """The value at x, and the products v -> J v and w -> J^T w, pytrees that a jitted function may return."""
    evaluate, backward_only = traced(function, x)
    _, pull = jax.vjp(evaluate, x)
    backward = jax.tree_util.Partial(_first, pull)
    if not backward_only:
        return *_linearize(evaluate, x), backward
    value = evaluate(x)
    with _explained():  # J v is the derivative of v^T J^T w by w, the same at any w
        _, push = jax.vjp(backward, jax.tree.map(jnp.zeros_like, value))
    return value, jax.tree_util.Partial(_first, push), backward


def linearize_gradient(gradient: Callable[[PyTree], PyTree], x: PyTree) -> Any:
    """The product v -> H v with the symmetric derivative of a gradient, as `linearize` gives it."""
    evaluate, backward_only = traced(gradient, x)
    with _explained():
        if backward_only:
            return jax.tree_util.Partial(_first, jax.vjp(evaluate, x)[1])
        return _linearize(evaluate, x)[1]


def _linearize(function: Callable[[PyTree], Any], x: PyTree) -> tuple[Any, Any]:
    """`jax.linearize`, also where the derivative is zero, which leaks a tracer out of jit in jax 0.8."""
    return jax.linearize(lambda x: jax.lax.optimization_barrier((function(x), x))[0], x)


def _first(pull: Any, cotangent: Any) -> Any:
    return pull(cotangent)[0]


def hessian_product(losses: Callable[[PyTree], jax.Array], x: PyTree) -> Callable[[PyTree], PyTree]:
    """The product v -> H v with the Hessian of the sum of losses."""
    evaluate, backward_only = traced(jax.grad(lambda x: jnp.sum(losses(x))), x)

    def product(v: PyTree) -> PyTree:
        with _explained():
            if backward_only:
                return jax.vjp(evaluate, x)[1](v)[0]
            return jax.jvp(evaluate, (x,), (v,))[1]

    return product


def slope(losses: Callable[[PyTree], jax.Array], x: PyTree, v: PyTree, axes: int = 0) -> jax.Array:
    """The derivative of losses along v.

    The losses have `axes` batch axes, which come first in each leaf of x. Each depends on its own example
    alone, so that backward the gradient of their sum is that of each of them.
    """
    evaluate, backward_only = traced(losses, x)
    if backward_only:
        return _slope_backward(losses, localize_like(x, evaluate(x)), v, axes)
    return jax.jvp(evaluate, (x,), (v,))[1]


def second_derivative(
    losses: Callable[[PyTree], jax.Array], x: PyTree, u: PyTree, v: PyTree, axes: int = 0
) -> jax.Array:
    """u^T H v, of losses as in `slope`: forward over forward where that goes."""
    evaluate, backward_only = traced(losses, x)
    if backward_only:
        own = localize_like(x, evaluate(x))
        with _explained():
            return slope(lambda x: _slope_backward(losses, x, v, axes), own, u, axes)
    return jax.jvp(lambda x: jax.jvp(evaluate, (x,), (v,))[1], (x,), (u,))[1]


def _slope_backward(losses: Callable[[PyTree], jax.Array], x: PyTree, v: PyTree, axes: int) -> jax.Array:
    """`slope`, for each device's own copy of x: JAX would sum the gradient by a common one over devices."""
    values, pull = jax.vjp(lambda x: own_loss(losses(x)), x)
    dtype = widen(values).dtype

    def product(g: jax.Array, v: jax.Array) -> jax.Array:
        # JAX's gradient by a complex number is the conjugate of the direction of ascent.
        terms = jnp.real(widen(g) * widen(v))
        return jnp.sum(terms, axis=tuple(range(axes, terms.ndim))).astype(dtype)

    products: list[jax.Array] = jax.tree.leaves(jax.tree.map(product, pull(jnp.ones_like(values))[0], v))
    return sum(products[1:], start=products[0])


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Notes on an error that JAX raises for want of a second derivative where that may come from."""
    try:
        yield
    except Exception as error:
        error.add_note(
            "Here the derivative of a gradient is taken. If fun has a jax.custom_vjp whose backward rule has "
            "no derivative of its own, such as that of a fused kernel, give the same loss without it."
        )
        raise
