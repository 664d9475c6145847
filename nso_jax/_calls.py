"""Arguments and results of loss and gradient functions, as `jax.value_and_grad` and optax have them."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nso_jax._checks import PyTree, check_inexact, check_loss, describe

Loss = Callable[[PyTree], tuple[jax.Array, PyTree]]
Argnums = int | tuple[int, ...]


def as_argnums(fun: Any, argnums: int | Sequence[int]) -> Argnums:
    """`argnums` as one int or a tuple; raises TypeError if they are not, or if `fun` is no function."""
    if not callable(fun):
        raise TypeError(f"fun: expected a function, got {type(fun).__name__}.")
    if isinstance(argnums, Sequence):
        return tuple(map(operator.index, argnums))
    return operator.index(argnums)


def bind(
    fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Argnums, *, has_aux: bool
) -> tuple[Loss, PyTree]:
    """`fun` as a function of the differentiated arguments alone, giving (loss, aux), and these arguments.

    Raises:
      TypeError: one of their leaves is not inexact, or, once called, the loss is not a real scalar.
    """
    params = _select(args, argnums)
    check_inexact(params, f"argnums={argnums}")

    def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
        return as_loss(fun(*_replace(args, argnums, params), **kwargs), has_aux=has_aux)

    return loss, params


def as_loss(out: Any, *, has_aux: bool) -> tuple[jax.Array, PyTree]:
    """What a loss function returned, as (loss, aux); raises TypeError if the loss is not a real scalar."""
    if has_aux and not (isinstance(out, tuple | list) and len(out) == 2):  # noqa: PLR2004
        raise TypeError(f"fun: has_aux is True, so expected a pair (loss, aux), got {describe(out)}.")
    value, aux_out = out if has_aux else (out, None)
    returns_pair = isinstance(out, tuple) and not has_aux
    check_loss(value, " For a pair (loss, aux) set has_aux=True." if returns_pair else "")
    return value, aux_out


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` with the dtypes of `like`, leaf by leaf."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def check_update_arguments(name: str, params: PyTree, grad_fn: Any) -> None:
    """Raises ValueError or TypeError unless a transformation got what it needs to evaluate the loss."""
    call = "call update(updates, state, params, grad_fn=grad_fn)."
    if params is None:
        raise ValueError(f"params: {name} perturbs them, but got None; {call}")
    if not callable(grad_fn):
        found = describe(grad_fn)
        raise TypeError(f"grad_fn: expected a function (params, i) -> gradients, got {found}; {call}")
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(x, optax.MaskedNode) for x in nodes):
        raise ValueError(
            "params: some are optax.MaskedNode, which no loss can take. Put optax.masked and optax.partition "
            f"inside, around what follows {name}. To perturb some leaves only, use mask."
        )


def _select(args: tuple[Any, ...], argnums: Argnums) -> PyTree:
    if isinstance(argnums, tuple):
        return tuple(_select(args, i) for i in argnums)
    if not -len(args) <= argnums < len(args):
        raise TypeError(f"argnums: {argnums} is out of range, got {len(args)} arguments after the key.")
    return args[argnums]


def _replace(args: tuple[Any, ...], argnums: Argnums, params: PyTree) -> list[Any]:
    replaced = list(args)
    for i, argument in (
        zip(argnums, params, strict=True) if isinstance(argnums, tuple) else [(argnums, params)]
    ):
        replaced[i] = argument
    return replaced
