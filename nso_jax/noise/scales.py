"""Scales: how large the noise of a weight is."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax._callers import check_injected
from nso_jax._checks import (
    PyTree,
    broadcast_prefix,
    check_choice,
    check_count,
    check_inexact,
    check_nonnegative,
    check_scalar,
    describe,
    is_function,
    leaf_name,
)
from nso_jax._precision import widen

__all__ = ["Relative", "Sigma", "adaptive", "relative"]

Per = Literal["weight", "channel", "tensor", "filter"]
Sigma = Any  # a scalar, a prefix pytree of the params, or a function from the params to one

_DEVIATION = "a standard deviation"


@dataclasses.dataclass(frozen=True, eq=False)
class Relative:
    """What `relative` returns: a function from params to one standard deviation per weight.

    Attributes:
      scale: noise over weight, or over a root mean square or norm of weights.
      per: what that is of: `"weight"`, `"channel"`, `"tensor"` or `"filter"`.
      channel_axis: the axis, or axes, that count output channels.
      stack_axes: how many leading axes stack layers: an int, a prefix pytree of them or a function to one.
    """

    scale: Any
    per: Per
    channel_axis: int | tuple[int, ...]
    stack_axes: PyTree

    def __call__(self, params: PyTree) -> PyTree:
        """Standard deviations for `params`: a pytree like it, each leaf of a shape that broadcasts."""
        check_injected("sigma")
        check_inexact(params)
        stacks = broadcast_prefix("stack_axes", self.stack_axes, params)
        leaves, treedef = jax.tree.flatten_with_path(params)
        return jax.tree.unflatten(
            treedef, [self._deviation(*leaf, stack) for leaf, stack in zip(leaves, stacks, strict=True)]
        )

    def _deviation(self, path: tuple[Any, ...], w: Any, stack: Any) -> jax.Array:
        size = self._size(jnp.abs(widen(w)), leaf_name(path), stack)
        return jnp.asarray(self.scale).astype(size.dtype) * size

    def _size(self, magnitude: jax.Array, leaf: str, stack: Any) -> jax.Array:
        _check_stack(stack, leaf, magnitude.shape)
        if self.per == "weight":
            return magnitude
        axes = set(range(stack, magnitude.ndim))
        if self.per == "channel" or (self.per == "filter" and len(axes) > 1):
            axes -= {stack + axis for axis in self._channels(magnitude.shape[stack:], leaf)}
        squares = jnp.sum(jnp.square(magnitude), axis=tuple(axes), keepdims=True)
        if self.per == "filter":
            return jnp.sqrt(squares)
        count = max(1, math.prod(magnitude.shape[axis] for axis in axes))  # an empty leaf has no mean
        return jnp.sqrt(squares / count)

    def _channels(self, shape: tuple[int, ...], leaf: str) -> set[int]:
        """The axes of one layer's leaf that count its channels."""
        axes = self.channel_axis if isinstance(self.channel_axis, tuple) else (self.channel_axis,)
        if len(shape) < 2:  # noqa: PLR2004  (each entry of a vector is its own channel)
            return set(range(len(shape)))
        for axis in axes:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"channel_axis: {axis} is out of range for leaf {leaf} of shape {shape}, one layer's."
                )
        channels = {axis % len(shape) for axis in axes}
        if len(channels) < len(axes):
            raise ValueError(
                f"channel_axis: {axes} names an axis twice for leaf {leaf} of shape {shape}, one layer's."
            )
        return channels


def relative(
    scale: Any,
    per: Per = "weight",
    *,
    channel_axis: int | Sequence[int] = -1,
    stack_axes: PyTree = 0,
) -> Relative:
    """Noise in proportion to the weights: sigma = scale * |w|, or scale times a root mean square.

    A network whose layers are rescaled without changing its function gets rescaled noise, so one
    `scale` serves layers of very different size. A weight that is exactly zero gets none (`"weight"`).

    Args:
      scale: noise over weight, >= 0; .1 to 1 are usual. It may be traced, so a schedule is
        `relative(schedule(step))` inside the step.
      per: `"weight"`: sigma = scale * |w|; `"channel"`: scale times the root mean square over all axes
        but `channel_axis`; `"tensor"`: scale times the root mean square of the whole leaf; `"filter"`:
        scale times the Euclidean norm of all weights of a channel, and of a vector as a whole, as LPF-SGD
        and RWP have it: noise as long as the filter is at 1 over the root of its size, .01 or less.
      channel_axis: the axis that counts output channels: the last one in Flax kernels (the default), the
        first one in Equinox and PyTorch weights. Several for a layer that splits its outputs over axes, as
        `(-2, -1)` for attention kernels (features, heads, head_dim). Negative ones count from the end. In a
        vector each entry is its own channel, and so is each weight of a leaf that has no other axes.
      stack_axes: how many leading axes of a leaf stack layers, as for `jax.lax.scan` over them: an int, a
        prefix pytree of the params such as `{"layers": 1, "embed": 0}`, or a function from them to one. Each
        layer of a stack gets the root mean squares that it would get alone, and `channel_axis` counts its own
        axes. With the default, 0, they are over the layers, too.

    Returns:
      A function from params to a pytree of standard deviations, to be given as `sigma`.

    Raises:
      TypeError: `scale` is not a real number, `channel_axis` is no int or sequence of ints, or `stack_axes`
        has a leaf that is no int.
      ValueError: `scale` is negative, NaN or not a scalar, `per` is none of the four, `stack_axes` is
        negative, or, once there are params, it does not fit or is more than the axes of a leaf, or
        `channel_axis` is out of range, or names an axis twice, for a layer with two axes or more.

    Example:
      >>> import jax.numpy as jnp
      >>> from nso_jax import noise
      >>> noise.relative(0.5)({"w": jnp.array([2.0, -4.0])})
      {'w': Array([1., 2.], dtype=float32)}
      >>> stacked = jnp.array([[[3.0, 4.0]], [[30.0, 40.0]]])  # two layers
      >>> noise.relative(1.0, "tensor", stack_axes=1)(stacked).ravel().round(2)
      Array([ 3.54, 35.36], dtype=float32)

    References:
      Li et al., Visualizing the Loss Landscape of Neural Nets, arXiv 1712.09913, 2018 (why per channel).
      Bisla, Wang and Choromanska, Low-Pass Filtering SGD for Recovering Flat Optima in the Deep Learning
      Optimization Landscape, arXiv 2201.08025, 2022 (per filter).
    """
    check_choice("per", per, get_args(Per))
    check_scalar("scale", scale, expected=f"{_DEVIATION} >= 0")
    if isinstance(stack_axes, int | float):
        check_count("stack_axes", stack_axes, 0)
    return Relative(scale, per, _as_axes(channel_axis), stack_axes)


def adaptive(sigma: Sigma, squares: PyTree, eta: Any = 1.0) -> Callable[[PyTree], PyTree]:
    """Less noise where gradients are large: a standard deviation over a root of their mean square.

        sigma_i / sqrt(1 + eta * F_i),    F_i a running mean of the squared gradients of weight i

    As an optimizer divides its steps by about the root of F, noise then has the steps' proportions. F stands
    in the state of Adam and its kin, from the step before: `optax.tree.get(opt_state, "nu")`.

    Args:
      sigma: what is divided: a scalar, a prefix pytree of the params, or a function from them to one, as
        `relative` gives.
      squares: F, a pytree with the leaves of the params, >= 0; at the start, zeros, it changes nothing. Of an
        `nnx.Optimizer` it is `optax.tree.get(optimizer.opt_state, "nu")`.
      eta: in units of one over squared gradients, a scalar >= 0. It may be traced. With a large one noise is
        in proportion to 1 / sqrt(F).

    Returns:
      A function from params to a pytree of standard deviations, to be given as `sigma`.

    Raises:
      TypeError: `eta` is not a real number.
      ValueError: `eta` is negative, NaN or not a scalar, or, once there are params, `sigma` is no prefix of
        them or `squares` has not leaves of their shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from nso_jax import noise
      >>> noise.adaptive(0.1, jnp.array([0.0, 3.0]))(jnp.ones(2))
      Array([0.1 , 0.05], dtype=float32)

    References:
      Li et al., Revisiting Random Weight Perturbation for Efficiently Improving Generalization,
      arXiv 2404.00357, 2024 (ARWP).
    """
    check_scalar("eta", eta)

    def deviations(params: PyTree) -> PyTree:
        check_inexact(params)
        found, named = jax.tree.leaves(squares), jax.tree.leaves_with_path(params)
        # An NNX optimizer's state has the params' leaves, but not in the containers that hold them.
        if [np.shape(square) for square in found] != [np.shape(w) for _, w in named]:
            names = ", ".join(f"{leaf_name(path)} {np.shape(w)}" for path, w in named)
            raise ValueError(
                f"squares: expected an array for each leaf of params, of its shape ({names}), got "
                f"{', '.join(str(np.shape(square)) for square in found) or 'none'}."
            )

        def divided(sigma: Any, square: Any) -> jax.Array:
            square = widen(square)
            return sigma / jnp.sqrt(1 + jnp.asarray(eta).astype(square.dtype) * square)

        leaves = zip(leaf_deviations(sigma, params), found, strict=True)
        return jax.tree.unflatten(jax.tree.structure(params), [divided(*pair) for pair in leaves])

    return deviations


def leaf_deviations(sigma: Sigma, params: PyTree) -> list[Any]:
    """One standard deviation for each leaf of params."""
    if not is_function(sigma) or isinstance(sigma, Relative):
        return broadcast_prefix("sigma", sigma, params)
    hint = "A function gets the params; for a schedule of the step write sigma=schedule(step), in the step."
    if (getattr(sigma, "__module__", None) or "").split(".")[0] == "optax":
        raise TypeError(f"sigma: an optax schedule takes the step's number. {hint}")
    try:
        return broadcast_prefix("sigma", sigma, params)
    except Exception as error:
        error.add_note(f"sigma: it was called with the params. {hint}")
        raise


def check_deviation(sigma: Any, path: str, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless `sigma` is known to be >= 0 and broadcasts to a leaf."""
    check_nonnegative("sigma", sigma, path, _DEVIATION)
    if not _broadcasts_to(np.shape(sigma), shape):
        raise ValueError(
            f"sigma: shape {np.shape(sigma)} does not broadcast to leaf {path} of shape {shape}."
        )


def _broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _as_axes(channel_axis: Any) -> int | tuple[int, ...]:
    is_several = isinstance(channel_axis, Sequence) and not isinstance(channel_axis, str | bytes)
    for axis in channel_axis if is_several else (channel_axis,):
        if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
            raise TypeError(f"channel_axis: expected an int or a sequence of ints, got {describe(axis)}.")
    return tuple(map(operator.index, channel_axis)) if is_several else operator.index(channel_axis)


def _check_stack(stack: Any, leaf: str, shape: tuple[int, ...]) -> None:
    check_count(f"stack_axes for leaf {leaf}", stack, 0)
    if stack > len(shape):
        raise ValueError(f"stack_axes: {stack} are more than leaf {leaf} of shape {shape} has.")
