"""Where a model uses a leaf as a dense layer's weight, found in its jaxpr; shifts of its outputs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from nso_jax.curvature._batches import batch_size

# Primitives that give back the arrays that they are given.
_KEEPING = {"convert_element_type", "copy", "copy_p", "name", "optimization_barrier", "sharding_constraint"}
# Primitives that evaluate a jaxpr once, and differentiate it by its own equations.
_CALLING = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
_MATRIX = 2  # dimensions


class NotDenseError(Exception):
    """Says why a leaf has no Kronecker factors."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Use:
    """The matrix product that takes a leaf.

    The leaf is a matrix in it, without moving an entry: its first axes together are one of the matrix's, and
    its last ones together the other.
    """

    inputs: jax.Array  # (*free, in): what the leaf is multiplied with
    axis: int = dataclasses.field(metadata={"static": True})  # of the matrix, along which the product sums
    size: int = dataclasses.field(metadata={"static": True})  # out
    # Relative rounding error of the coarsest operand or result.
    epsilon: float = dataclasses.field(metadata={"static": True})


class Layout(NamedTuple):
    """Where the examples are in the free axes of a layer's inputs; all else there is the example's positions.

    The axis is of `outer * examples * inner` vectors: the examples alone, or folded with positions.
    """

    axis: int
    outer: int
    inner: int | None  # None: whatever a batch has

    def rows(self, inputs: Any, examples: int) -> Any:
        """The inputs (*free, in) as (examples, positions, in)."""
        *free, size = inputs.shape
        split = inputs.reshape(*self._split(free, examples), size)
        module = np if isinstance(inputs, np.ndarray) else jnp
        return module.moveaxis(split, self.axis + 1, 0).reshape(examples, -1, size)

    def unrows(self, rows: jax.Array, free: Sequence[int]) -> jax.Array:
        """The inverse: from (examples, positions, out) to (*free, out)."""
        examples, _, size = rows.shape
        split = self._split(free, examples)
        del split[self.axis + 1]
        apart = rows.reshape(examples, *split, size)
        return jnp.moveaxis(apart, 0, self.axis + 1).reshape(*free, size)

    def _split(self, free: Sequence[int], examples: int) -> list[int]:
        inner, rest = divmod(free[self.axis], self.outer * examples)
        if rest or self.inner not in {None, inner}:
            raise _number_error(free, examples)
        return [*free[: self.axis], self.outer, examples, inner, *free[self.axis + 1 :]]


# Gives what is added to a layer's outputs, (examples, positions, out), from the first two numbers.
Shift = Callable[[int, int], jax.Array]


def tapped(
    model: Callable[[Any, Any], Any],
    position: int,
    params: Any,
    batch: Any,
    shift: tuple[Layout, Shift] | None = None,
) -> tuple[Any, Use]:
    """The model's outputs, with a shift of those of a layer, and how its weight, a leaf, is used."""
    closed, shapes = jax.make_jaxpr(model, return_shape=True)(params, batch)
    arguments = jax.tree.leaves((params, batch))
    leaf = arguments[position]
    axes: list[_Axes] = [tuple(range(leaf.ndim)) if i == position else None for i in range(len(arguments))]
    layer = _Layer(shift, batch_size(batch, 0), [])
    outputs, output_axes = _evaluate(closed, arguments, axes, layer)
    if any(output_axes):
        raise NotDenseError("the leaf is among the outputs of the model.")
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs), _only(layer.uses, leaf.shape)


def find_layout(use_of: Callable[[Any, Any], Use], params: Any, batch: Any) -> tuple[Use, Layout]:
    """How a leaf is used (by its shapes), and where the examples are in the layer's inputs.

    Where there are more vectors than examples, shapes alone do not tell: the axes of time and of examples may
    be of one length or folded into one. So the examples of the batch are rotated by one, and the place is
    that in which the layer's inputs rotate with them.
    """
    use = jax.eval_shape(use_of, params, batch)
    examples = batch_size(batch, 0)
    free = use.inputs.shape[:-1]
    candidates = _layouts(free, examples)
    if not candidates:
        raise _number_error(free, examples)
    if math.prod(free) == examples:
        return use, candidates[0]
    before, after = (
        np.asarray(use_of(params, one).inputs, np.float64) for one in (batch, _rotated(batch, examples))
    )
    allowed = np.sqrt(use.epsilon) * np.linalg.norm(before)
    for layout in candidates:
        expected = np.roll(layout.rows(before, examples), 1, axis=0)
        if np.linalg.norm(layout.rows(after, examples) - expected) <= allowed:
            return use, layout
    raise NotDenseError(
        f"the layer is applied to {math.prod(free)} vectors in a batch of {examples}, and which are of one "
        "example cannot be told: its inputs do not keep to their examples when these change places."
    )


def _layouts(free: Sequence[int], examples: int) -> list[Layout]:
    """Where the examples may be: an axis of their own comes first, then one folded with positions."""
    own = [Layout(axis, 1, 1) for axis, size in enumerate(free) if size == examples]
    folded = [
        Layout(axis, outer, None if outer == 1 else size // examples // outer)
        for axis, size in enumerate(free)
        if size % examples == 0 and size > examples
        for outer in range(1, size // examples + 1)
        if size // examples % outer == 0
    ]
    return own + folded


def _rotated(batch: Any, examples: int) -> Any:
    """The batch with its last example first."""
    return jax.tree.map(
        lambda leaf: jnp.roll(leaf, 1, axis=0) if np.shape(leaf)[:1] == (examples,) else leaf, batch
    )


def _number_error(free: Sequence[int], examples: int) -> NotDenseError:
    shape = " x ".join(map(str, free))
    return NotDenseError(f"the layer is applied to {shape} vectors in a batch of {examples} examples.")


# For each value in a jaxpr: which of the leaf's axes its own axes are if it is the leaf, else None.
_Axes = tuple[int, ...] | None


class _Layer(NamedTuple):
    """What to do where the leaf is found."""

    shift: tuple[Layout, Shift] | None
    examples: int
    uses: list[Use | str]  # the name of a primitive that is no matrix product with vectors


def _only(uses: list[Use | str], shape: tuple[int, ...]) -> Use:
    """The one use of a leaf, if it is a dense layer's."""
    if not uses:
        raise NotDenseError("the model does not use the leaf.")
    if len(uses) > 1:
        names = [use if isinstance(use, str) else "dot_general" for use in uses]
        raise NotDenseError(
            f"the leaf is used more than once, in {', '.join(names[:-1])} and {names[-1]}: its block is the "
            "sum of a term for each use and one for each pair, which the factors of one layer do not give."
        )
    (use,) = uses
    if isinstance(use, Use):
        return use
    if len(shape) != _MATRIX:
        raise NotDenseError(f"the leaf has shape {shape}, and the weight of a dense layer is a matrix.")
    raise NotDenseError(f"the leaf goes into {use}, and not into the matrix product of a dense layer.")


def _evaluate(
    closed: ClosedJaxpr, arguments: list[Any], axes: list[_Axes], layer: _Layer
) -> tuple[list[Any], list[_Axes]]:
    """Evaluates a jaxpr equation by equation, following the leaf."""
    jaxpr = closed.jaxpr
    values: dict[Var, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    leaf_axes: dict[Var, _Axes] = dict(zip(jaxpr.invars, axes, strict=True))

    def read(atoms: Sequence[Any]) -> tuple[list[Any], list[_Axes]]:
        return (
            [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms],
            [None if isinstance(atom, Literal) else leaf_axes.get(atom) for atom in atoms],
        )

    for equation in jaxpr.eqns:
        operands, operand_axes = read(equation.invars)
        result_axes: list[_Axes] = [None] * len(equation.outvars)
        if any(operand_axes) and equation.primitive.name in _CALLING:
            results, result_axes = _evaluate(_called(equation), operands, operand_axes, layer)
        else:
            results = _apply(jaxpr, equation, operands)
            if any(operand_axes):
                results, result_axes = _follow(equation, operands, operand_axes, results, layer)
        values.update(zip(equation.outvars, results, strict=True))
        leaf_axes.update(zip(equation.outvars, result_axes, strict=True))
    return read(jaxpr.outvars)


def _apply(jaxpr: Jaxpr, equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    """The results of one equation of a jaxpr."""
    pairs = zip(equation.invars, operands, strict=True)
    given = {atom: operand for atom, operand in pairs if isinstance(atom, Var)}
    alone = jaxpr.replace(constvars=[], invars=list(given), outvars=equation.outvars, eqns=[equation])
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*given.values())


def _called(equation: JaxprEqn) -> ClosedJaxpr:
    parameters = equation.params
    inner = parameters["jaxpr"] if "jaxpr" in parameters else parameters["call_jaxpr"]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _follow(
    equation: JaxprEqn, operands: list[Any], axes: list[_Axes], results: list[Any], layer: _Layer
) -> tuple[list[Any], list[_Axes]]:
    """What becomes of an equation's results, the leaf being among its operands."""
    name = equation.primitive.name
    if name in _KEEPING:
        return results, axes
    if name == "transpose" and axes[0]:
        return results, [tuple(axes[0][i] for i in equation.params["permutation"])]
    if name == "dot_general":
        return [_product(equation, operands, axes, results[0], layer)], [None]
    # Recorded only: another use may follow, which says more.
    layer.uses.append(name)
    return results, [None] * len(results)


def _product(
    equation: JaxprEqn, operands: list[Any], axes: list[_Axes], result: jax.Array, layer: _Layer
) -> jax.Array:
    """Records the matrix product of the leaf with the layer's inputs, and shifts it."""
    side = 0 if axes[0] else 1
    weight, inputs = operands[side], operands[1 - side]
    leaf_axes: Any = axes[side]
    contracted, batched = equation.params["dimension_numbers"]
    if all(axes):
        layer.uses.extend(["dot_general", "dot_general"])
        return result
    summed = [leaf_axes[i] for i in contracted[side]]
    kept = [axis for axis in leaf_axes if axis not in summed]
    free = [i for i in range(inputs.ndim) if i not in contracted[1 - side]]
    if batched[side] or not summed or not free:
        raise NotDenseError(
            f"the leaf is multiplied with an array of shape {inputs.shape}, not with vectors of examples."
        )
    if sorted(summed) != list(range(len(summed))) and sorted(kept) != list(range(len(kept))):
        raise NotDenseError(
            f"the leaf is multiplied along its axes {sorted(summed)}, neither its first nor its last ones, "
            "so it is no matrix there."
        )
    # Axes of inputs and outputs in the leaf's order, so that its entries keep their places.
    order = [contracted[1 - side][i] for i in np.argsort(summed)]
    vectors = inputs.transpose(*free, *order)
    vectors = vectors.reshape(*vectors.shape[: len(free)], -1)
    shape = [weight.shape[leaf_axes.index(axis)] for axis in sorted(kept)]
    epsilon = max(float(jnp.finfo(array.dtype).eps) for array in (weight, result))
    layer.uses.append(Use(vectors, 0 if 0 in summed else 1, math.prod(shape), epsilon))
    if layer.shift is None:
        return result
    layout, new_shift = layer.shift
    rows = new_shift(layer.examples, math.prod(vectors.shape[:-1]) // layer.examples)
    shift = layout.unrows(rows, vectors.shape[:-1]).reshape(*vectors.shape[:-1], *shape)
    leading, trailing = range(len(free)), [len(free) + sorted(kept).index(axis) for axis in kept]
    shift = shift.transpose(*leading, *trailing) if side else shift.transpose(*trailing, *leading)
    return result + shift.astype(result.dtype)
