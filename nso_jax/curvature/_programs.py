"""A loss, and what is compiled for it: the linearization of its gradient, and sums of products."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from nso_jax._checks import check_loss
from nso_jax._derivatives import linearize, linearize_gradient
from nso_jax.curvature._vectors import Flags, merge, parts, ravel, select


class Loss(NamedTuple):
    """A mean loss of params and a batch, and its two parts where they make a Gauss-Newton matrix.

    Attributes:
      fun: `fun(params, batch)`.
      model: `model(params, batch)`, or None for a Hessian.
      of_outputs: `of_outputs(model(params, batch), batch)`, or None.
    """

    fun: Callable[[Any, Any], jax.Array]
    model: Callable[[Any, Any], Any] | None = None
    of_outputs: Callable[[Any, Any], jax.Array] | None = None

    @classmethod
    def of_parts(cls, model: Callable[[Any, Any], Any], of_outputs: Callable[[Any, Any], jax.Array]) -> Self:
        """The loss of a model's outputs."""

        def fun(params: Any, batch: Any) -> jax.Array:
            return of_outputs(model(params, batch), batch)

        return cls(fun, model, of_outputs)

    def of(self, traced: Callable[[Any, Any], Any]) -> "Loss":
        """The same with another function in the place of `traced`."""
        return Loss.of_parts(traced, self.of_outputs) if self.of_outputs else Loss(traced)

    @property
    def traced(self) -> Callable[[Any, Any], Any]:
        """What depends on the params: beyond its outputs there are none."""
        return self.model or self.fun

    @property
    def functions(self) -> list[Callable[[Any, Any], Any]]:
        """Those that were given."""
        return [self.model, self.of_outputs] if self.model and self.of_outputs else [self.fun]


class Programs:
    """Functions of a loss, compiled once for each form of arguments and kept while this is."""

    def __init__(self, loss: Loss) -> None:
        # JAX keeps what it has traced by the function: functions of this instance alone are traced anew.
        own: list[Any] = [None if function is None else functools.partial(function) for function in loss]
        self.loss = Loss(*own)
        self._compiled: dict[Hashable, Any] = {}
        self.linearize = self.compiled(_linearized, static_argnames="flags")
        self.add = self.compiled(_add, donate_argnums=0)
        self.evaluate = self.compiled(_evaluated)

    def compiled(self, function: Callable[..., Any], **options: Any) -> Any:
        """`function(loss, ...)` jitted: the same program whenever it is asked for."""
        if function not in self._compiled:
            self._compiled[function] = jax.jit(functools.partial(function, self.loss), **options)
        return self._compiled[function]

    @functools.cached_property
    def of_hessian(self) -> "Programs":
        """The same for the Hessian of the loss."""
        return Programs(Loss(self.loss.fun)) if self.loss.model else self


def _evaluated(loss: Loss, params: Any, batch: Any) -> jax.Array:
    return loss.fun(params, batch)


def checked_loss(value: Any) -> Any:
    """The loss; raises TypeError unless it is a real scalar."""
    check_loss(value)
    return value


def _linearized(loss: Loss, params: Any, batch: Any, *, flags: Flags) -> Any:
    """The product with the matrix of a batch, a linear function of arrays like the chosen leaves."""
    chosen = select(params, flags)
    with_chosen = functools.partial(merge, params, flags)
    if loss.model is not None and loss.of_outputs is not None:
        return _gauss_newton(loss.model, loss.of_outputs, with_chosen, chosen, batch)
    gradient = jax.grad(lambda chosen: checked_loss(loss.fun(with_chosen(chosen), batch)))
    return linearize_gradient(gradient, chosen)


def _gauss_newton(
    model: Callable[[Any, Any], Any],
    of_outputs: Callable[[Any, Any], jax.Array],
    with_chosen: Callable[[list[Any]], Any],
    chosen: list[Any],
    batch: Any,
) -> Any:
    """The linear function v -> J^T H J v."""
    outputs, forward, backward = linearize(lambda chosen: model(with_chosen(chosen), batch), chosen)
    gradient = jax.grad(lambda outputs: checked_loss(of_outputs(outputs, batch)))
    curve = linearize_gradient(gradient, outputs)
    return jax.tree_util.Partial(_backward_curve_forward, backward, curve, forward)


def _backward_curve_forward(backward: Any, curve: Any, forward: Any, tangent: Any) -> Any:
    return backward(curve(forward(tangent)))


def _add(
    _: Loss, sums: Any, weight: jax.Array, chosen: list[jax.Array], linear: Any, vectors: jax.Array
) -> tuple[Any, jax.Array]:
    """Adds a batch's products with vectors to those of the batches before; says whether they are finite."""
    total, excess = sums  # excess: what the last rounding added too much
    product = jax.vmap(lambda v: ravel(linear(parts(v, chosen)), v.dtype))(vectors)
    term = weight * product - excess
    new_total = total + term
    return (new_total, (new_total - total) - term), jnp.all(jnp.isfinite(product))
