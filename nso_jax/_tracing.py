"""What JAX knows of a traced function, and of an array in one."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun


def traced(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Jaxpr]:
    """`function`, traced at `args` once, for arguments like them, and its jaxpr."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    structure = jax.tree.structure(shapes)

    def evaluate(*args: Any) -> Any:
        return jax.tree.unflatten(structure, jaxpr_as_fun(closed)(*jax.tree.leaves(args)))

    return evaluate, closed.jaxpr


def has_primitive(jaxpr: Jaxpr, name: str) -> bool:
    """Whether a traced function, or one that it calls, has a primitive whose name starts with this."""
    return any(
        equation.primitive.name.startswith(name)
        or any(has_primitive(inner, name) for inner in inner_jaxprs(equation))
        for equation in jaxpr.eqns
    )


def inner_jaxprs(equation: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs among the parameters of an equation: bodies of loops, branches, jitted functions."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr))
    closed = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in leaves]
    return [x for x in closed if isinstance(x, Jaxpr)]


def varies(x: Any, axis: Hashable) -> bool:
    """Whether JAX knows that `x` differs along a mapped axis; without `check_vma` it knows of nothing."""
    try:
        jax.lax.pcast(x, axis, to="varying")
    except ValueError:
        return True
    return False
