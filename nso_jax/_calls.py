"""A loss as a function of what is differentiated, and what it returns, as `jax.value_and_grad` has them."""

import contextlib
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax

from nso_jax._axes import own_loss
from nso_jax._checks import (
    PyTree,
    check_inexact,
    check_loss,
    describe,
    is_numeric,
    leaf_name,
)

Loss = Callable[[PyTree], tuple[jax.Array, PyTree]]
Argnums = int | tuple[int, ...]


def as_argnums(name: str, argnums: Any) -> Argnums:
    """Numbers of arguments as one int or a tuple; raises TypeError if they are neither."""
    try:
        if isinstance(argnums, Sequence) and not isinstance(argnums, str | bytes):
            return tuple(map(operator.index, argnums))
        return operator.index(argnums)
    except TypeError:
        raise TypeError(f"{name}: expected an int or a sequence of ints, got {describe(argnums)}.") from None


def bind(
    fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Argnums, *, has_aux: bool
) -> tuple[Loss, PyTree]:
    """`fun` as a function of the differentiated arguments alone, giving (loss, aux), and these arguments.

    Along axes over which results are averaged the loss is each device's own: see `own_loss`.

    Raises:
      TypeError: one of their leaves is not inexact, or, once called, the loss is not a real scalar.
    """
    params = _select(args, argnums)
    check_inexact(params, f"argnums={argnums}")

    def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
        value, aux_out = as_loss(_call(fun, _replace(args, argnums, params), kwargs), has_aux=has_aux)
        return own_loss(value), aux_out

    return loss, params


def _call(fun: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    try:
        return fun(*args, **kwargs)
    except Exception as error:
        if type(error).__name__ != "TraceContextError":  # of flax, which may not be installed
            raise
        raise TypeError(
            "fun: it changes the state of a Flax NNX module or nnx.Rngs that it gets or closes over. Use "
            "nso_jax.nnx.value_and_grad (with method=... for its rivals), which moves that once a step, and "
            "nso_jax.nnx.microbatch; or, if it should not move, model.eval() before."
        ) from error


def as_loss(out: Any, *, has_aux: bool) -> tuple[jax.Array, PyTree]:
    """What a loss function returned, as (loss, aux); raises TypeError if the loss is not a real scalar."""
    if has_aux and not (isinstance(out, tuple | list) and len(out) == 2):  # noqa: PLR2004
        raise TypeError(f"fun: has_aux is True, so expected a pair (loss, aux), got {describe(out)}.")
    value, aux_out = out if has_aux else (out, None)
    for path, leaf in jax.tree.leaves_with_path(aux_out):
        if not is_numeric(leaf):
            raise TypeError(
                f"fun: leaf {leaf_name(path)} of the auxiliary output is {describe(leaf)}, expected arrays "
                "or numbers."
            )
    returns_pair = isinstance(out, tuple) and not has_aux
    check_loss(value, " For a pair (loss, aux) set has_aux=True." if returns_pair else "")
    return value, aux_out


def named_after(fun: Callable[..., Any], fn: Callable[..., Any], what: str) -> Callable[..., Any]:
    """`fn(key, ...)` with the name and signature of `fun`, as in `jax.value_and_grad`, and a docstring."""
    name = getattr(fun, "__name__", type(fun).__name__)
    fn.__name__ = fn.__qualname__ = name
    fn.__doc__ = f"{what} of {name}: fn(key, ...) -> (value, grads), or ((value, aux), grads) if it has aux."
    with contextlib.suppress(ValueError, TypeError):  # builtins and some callables have none
        key = inspect.Parameter("key", inspect.Parameter.POSITIONAL_ONLY)
        own = [p for p in inspect.signature(fun).parameters.values() if p.name != "key"]
        fn.__signature__ = inspect.Signature([key, *own])  # type: ignore[attr-defined]
    return fn


def check_aux_modes(aux: PyTree, modes: tuple[str, ...]) -> None:
    """Raises ValueError unless all leaves of `aux`, a prefix of an auxiliary output, are among the modes."""
    for mode in jax.tree.leaves(aux):
        if not isinstance(mode, str) or mode not in modes:
            raise ValueError(
                f"aux: expected one of {', '.join(map(repr, modes))}, or a pytree of them, got {mode!r}."
            )


def _select(args: tuple[Any, ...], argnums: Argnums) -> PyTree:
    if isinstance(argnums, tuple):
        selected = tuple(_select(args, i) for i in argnums)
        if len({i % len(args) for i in argnums}) < len(argnums):
            raise ValueError(f"argnums: {argnums} names one of the {len(args)} arguments twice.")
        return selected
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
