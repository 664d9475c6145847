"""Noise for weights: samplers of unit variance, scales, and a perturbation of a whole pytree.

A sampler is `sampler(key, shape, dtype) -> array` with mean 0, variance 1 and a symmetric law, so that
sigma means the same for each and any `jax.random` function of that form fits.
"""

import dataclasses
import functools
import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax._backend import repeated_bits, with_fast_bits
from nso_jax._callers import check_injected
from nso_jax._checks import (
    PyTree,
    as_key,
    broadcast_prefix,
    check_choice,
    check_count,
    check_inexact,
    check_mapped,
    check_nonnegative,
    check_real,
    check_sampler,
    check_scalar,
    describe,
    is_function,
    leaf_mask,
    leaf_name,
)

__all__ = [
    "Relative",
    "cauchy",
    "centered_binomial",
    "laplace",
    "normal",
    "perturb",
    "perturbation",
    "rademacher",
    "relative",
    "uniform",
]

Sampler = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Sigma = Any  # a scalar, a prefix pytree of the params, or a function from the params to one

_UNIFORM_HALF_WIDTH = math.sqrt(3.0)
_LAPLACE_DEVIATION = math.sqrt(2.0)
_BINOMIAL_TRIALS = 8
_ANGLE_BITS = 12  # of a word's 32; the others are the radius's, which is at most 5.4 so
_DEVIATION = "a standard deviation"


def normal(key: jax.Array, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
    """Gaussian noise, u ~ N(0, 1): the published choice, and the default.

    A random 32-bit word makes a pair of numbers, by the transform of Box and Muller, for two weights that are
    neighbours along an axis of even length:

        u_1 = sqrt(-2 log r) cos(2 pi t), u_2 = sqrt(-2 log r) cos(2 pi (t + 1/4)), r of 20 bits and t of 12

    On CPU that takes less than half the time of `jax.random.normal`.

    Args:
      key: a PRNG key.
      shape: the shape of the result.
      dtype: its floating dtype; float64 is left to `jax.random.normal`, which has all its digits.

    Returns:
      An array of independent draws with mean 0 and variance 1; |u| is at most 5.4.

    Raises:
      TypeError: `key` is not a PRNG key.

    Example:
      >>> import jax
      >>> from nso_jax import noise
      >>> noise.normal(jax.random.key(0), (1000,)).std().round(1)
      Array(1., dtype=float32)

    References:
      Box and Muller, A Note on the Generation of Random Normal Deviates, Annals of Mathematical Statistics
      29, 1958.
    """
    key = as_key(key)
    if jnp.finfo(dtype).bits > 32:  # noqa: PLR2004
        return jax.random.normal(with_fast_bits(key), shape, dtype)
    return _box_muller(key, tuple(shape)).astype(dtype)


def rademacher(key: jax.Array, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
    """Random signs, u = +1 or -1 with probability 1/2 each, at about the price of a copy.

    u_i^2 = 1 always, so the diagonal of the Hessian enters u^T H u without any variance. Up to 32 weights
    share a random 32-bit word, as many as the factors of 2 in the sizes of the axes allow.

    Args:
      key: a PRNG key.
      shape: the shape of the result.
      dtype: its floating dtype.

    Returns:
      An array of independent draws with mean 0 and variance 1.

    Raises:
      TypeError: `key` is not a PRNG key.

    Example:
      >>> import jax
      >>> from nso_jax import noise
      >>> abs(noise.rademacher(jax.random.key(0), (3,)))
      Array([1., 1., 1.], dtype=float32)
    """
    return 1 - 2 * _random_fields(key, shape, 1).astype(dtype)


def uniform(key: jax.Array, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
    """Bounded noise, u ~ U(-sqrt(3), sqrt(3)).

    Args:
      key: a PRNG key.
      shape: the shape of the result.
      dtype: its floating dtype.

    Returns:
      An array of independent draws with mean 0 and variance 1.

    Raises:
      TypeError: `key` is not a PRNG key.

    Example:
      >>> import jax
      >>> from nso_jax import noise
      >>> bool(abs(noise.uniform(jax.random.key(0), (1000,))).max() <= 3**0.5)
      True
    """
    return jax.random.uniform(
        with_fast_bits(as_key(key)), shape, dtype, -_UNIFORM_HALF_WIDTH, _UNIFORM_HALF_WIDTH
    )


def laplace(key: jax.Array, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
    """Heavier tails than a Gaussian: density exp(-sqrt(2) |u|) / sqrt(2).

    Args:
      key: a PRNG key.
      shape: the shape of the result.
      dtype: its floating dtype.

    Returns:
      An array of independent draws with mean 0 and variance 1.

    Raises:
      TypeError: `key` is not a PRNG key.

    Example:
      >>> import jax
      >>> from nso_jax import noise
      >>> noise.laplace(jax.random.key(0), (2, 3)).shape
      (2, 3)
    """
    return jax.random.laplace(with_fast_bits(as_key(key)), shape, dtype) / _LAPLACE_DEVIATION


def centered_binomial(key: jax.Array, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
    """A coarse Gaussian from 8 random bits: u = (B - 4) / sqrt(2) with B ~ Binomial(8, 1/2).

    Args:
      key: a PRNG key.
      shape: the shape of the result.
      dtype: its floating dtype.

    Returns:
      An array of independent draws with mean 0 and variance 1; |u| is at most sqrt(8).

    Raises:
      TypeError: `key` is not a PRNG key.

    Example:
      >>> import jax
      >>> from nso_jax import noise
      >>> bool(abs(noise.centered_binomial(jax.random.key(0), (1000,))).max() <= 8**0.5)
      True
    """
    heads = jax.lax.population_count(_random_fields(key, shape, _BINOMIAL_TRIALS)).astype(dtype)
    return (heads - _BINOMIAL_TRIALS / 2) * (2 / math.sqrt(_BINOMIAL_TRIALS))


def cauchy(key: jax.Array, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
    """Cauchy noise, density 1 / (pi (1 + u^2)).

    It has no variance, so sigma is its half width at half maximum, and F = f + sigma^2/2 Tr(H) + ...
    does not hold: the pair still cancels every odd term, but now and then a draw is enormous.

    Args:
      key: a PRNG key.
      shape: the shape of the result.
      dtype: its floating dtype.

    Returns:
      An array of independent draws with median 0.

    Raises:
      TypeError: `key` is not a PRNG key.

    Example:
      >>> import jax
      >>> from nso_jax import noise
      >>> noise.cauchy(jax.random.key(0), (4,)).shape
      (4,)
    """
    return jax.random.cauchy(with_fast_bits(as_key(key)), shape, dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Relative:
    """What `relative` returns: a function from params to one standard deviation per weight.

    Attributes:
      scale: noise over weight, or over a root mean square of weights.
      per: what the root mean square is of: `"weight"`, `"channel"` or `"tensor"`.
      channel_axis: the axis, or axes, that count output channels.
      stack_axes: how many leading axes stack layers: an int, a prefix pytree of them or a function to one.
    """

    scale: Any
    per: Literal["weight", "channel", "tensor"]
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
        if self.per == "channel":
            axes -= {stack + axis for axis in self._channels(magnitude.shape[stack:], leaf)}
        count = max(1, math.prod(magnitude.shape[axis] for axis in axes))  # an empty leaf has no mean
        squares = jnp.sum(jnp.square(magnitude), axis=tuple(axes), keepdims=True)
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
    per: Literal["weight", "channel", "tensor"] = "weight",
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
        but `channel_axis`; `"tensor"`: scale times the root mean square of the whole leaf.
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
      ValueError: `scale` is negative, NaN or not a scalar, `per` is none of the three, `stack_axes` is
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
    """
    check_choice("per", per, ("weight", "channel", "tensor"))
    check_scalar("scale", scale, expected=f"{_DEVIATION} >= 0")
    if isinstance(stack_axes, int | float):
        check_count("stack_axes", stack_axes, 0)
    return Relative(scale, per, _as_axes(channel_axis), stack_axes)


def perturbation(
    key: jax.Array,
    params: PyTree,
    sigma: Sigma,
    *,
    sampler: Sampler = normal,
    mask: PyTree = None,
    specs: PyTree = None,
) -> PyTree:
    """One draw of noise for every leaf: U_l = sigma_l * sampler(key_l, shape_l).

    key_l depends on `key` and on the leaf's path alone: adding, removing or reordering other leaves leaves
    a leaf's noise as it was. A complex leaf gets noise with E|u|^2 = sigma^2, half of it in each part.

    Args:
      key: a PRNG key, typed or legacy.
      params: a pytree with inexact leaves.
      sigma: standard deviation of one weight's noise: a scalar, a prefix pytree of `params`, or a
        function from `params` to such a prefix. Each leaf broadcasts to the leaf that it scales.
      sampler: `sampler(key, shape, dtype)` of unit variance.
      mask: which leaves get noise: bools, a prefix pytree of `params` or a function from it to one. The
        default, None, is all of them.
      specs: inside `shard_map`: the partition specs of `params`, a prefix pytree; each shard of a leaf then
        gets its own noise. The default, None, is for leaves that are whole.

    Returns:
      A pytree like `params`, in float32 (float64 for float64 leaves), with None where `mask` is False.

    Raises:
      TypeError: a leaf is not inexact, `key` is not a PRNG key, `sigma` or what the sampler returned is not
        real, or `mask` has other leaves than bools and `specs` others than partition specs.
      ValueError: `sigma` is negative, NaN or does not fit, `mask` or `specs` does not fit, or the sampler
        returned another shape than it was asked for.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import noise
      >>> params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
      >>> u = noise.perturbation(jax.random.key(0), params, 0.1, mask={"w": True, "b": False})
      >>> u["w"].shape, u["b"]
      ((2, 3), None)
    """
    key = as_key(key)
    check_sampler(sampler)
    check_inexact(params)
    deviations = _deviations(sigma, params)
    flags = leaf_mask(mask, params)
    splits = broadcast_prefix("specs", jax.P() if specs is None else specs, params)
    _check_specs(splits)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not leaves:
        return params
    keys = _leaf_keys(key, [jax.tree_util.keystr(path) for path, _ in leaves])
    draws = [
        _scaled_draw(_shard_key(leaf_key, spec), leaf, deviation, sampler, leaf_name(path)) if flag else None
        for leaf_key, spec, (path, leaf), deviation, flag in zip(
            keys, splits, leaves, deviations, flags, strict=True
        )
    ]
    return jax.tree.unflatten(treedef, draws)


def perturb(params: PyTree, noise: PyTree, sign: Any = 1) -> PyTree:
    """W + sign * U, added in float32 (float64 for float64 leaves) and rounded once to the leaf's dtype.

    A finite weight that this takes beyond the dtype's range becomes NaN, and not infinite: at infinite
    weights a loss that saturates, and its gradient, may well be finite.

    Args:
      params: a pytree with inexact leaves.
      noise: what `perturbation` returned for it: None leaves stay as they are.
      sign: a scalar, +1 or -1.

    Returns:
      A pytree like `params`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nso_jax import noise
      >>> params = {"w": jnp.zeros(3)}
      >>> u = noise.perturbation(jax.random.key(0), params, 0.1, sampler=noise.rademacher)
      >>> abs(noise.perturb(params, u)["w"])
      Array([0.1, 0.1, 0.1], dtype=float32)
    """

    def add(u: jax.Array | None, w: Any) -> Any:
        if u is None:
            return w
        moved = (widen(w) + jnp.asarray(sign, u.dtype) * u).astype(jnp.result_type(w))
        # Infinity minus itself is NaN, and what stays in range loses nothing.
        return moved - jnp.where(jnp.isinf(moved) & jnp.isfinite(w), moved, 0)

    return jax.tree.map(add, noise, params, is_leaf=lambda u: u is None)


def widen(x: Any) -> jax.Array:
    """`x` in the precision in which noise is added and gradients are summed: float32 at least."""
    x = jnp.asarray(x)
    if jnp.finfo(x.dtype).bits >= 32:  # noqa: PLR2004  (float32, float64 and their complex kin)
        return x
    return x.astype(jnp.float32)


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


def _deviations(sigma: Sigma, params: PyTree) -> list[Any]:
    """One standard deviation for each leaf."""
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


def _random_fields(key: jax.Array, shape: tuple[int, ...], width: int) -> jax.Array:
    """`width` random bits for each entry, of 32-bit words that as many entries share as divide the axes."""
    words, number = _shared_words(key, shape, 32 // width)
    return (words >> (jnp.uint32(width) * number)) & jnp.uint32(2**width - 1)


def _shared_words(key: jax.Array, shape: tuple[int, ...], count: int) -> tuple[jax.Array, jax.Array]:
    """A random word for each entry, which up to `count` share, and its number among those that share it.

    The axes are divided without padding, so that an array sharded over any of them keeps its sharding: from
    the one with the most factors of 2, and the last one last, along which TPUs have to move what is divided.
    """
    lanes, free = [1] * len(shape), count
    ranks = [(axis + 1 < len(shape), math.gcd(size, count), axis) for axis, size in enumerate(shape)]
    for *_, axis in sorted(ranks, reverse=True):
        lanes[axis] = math.gcd(shape[axis], free)
        free //= lanes[axis]
    number, stride = jnp.zeros((1,) * len(shape), jnp.uint32), 1
    for axis, lane in enumerate(lanes):
        along = [size if i == axis else 1 for i, size in enumerate(shape)]
        number += jnp.uint32(stride) * (jax.lax.broadcasted_iota(jnp.uint32, along, axis) % jnp.uint32(lane))
        stride *= lane
    return repeated_bits(as_key(key), shape, lanes), number


@functools.partial(jax.jit, static_argnums=1)
def _box_muller(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    words, number = _shared_words(key, shape, 2)
    radius = jnp.sqrt(-2 * jnp.log(_midpoint(words >> jnp.uint32(_ANGLE_BITS), 32 - _ANGLE_BITS)))
    quarters = number << jnp.uint32(_ANGLE_BITS - 2)
    turns = _midpoint((words + quarters) & jnp.uint32(2**_ANGLE_BITS - 1), _ANGLE_BITS)
    return radius * _cosine(turns - 0.5)  # half a turn is a change of the sign


def _midpoint(i: jax.Array, bits: int) -> jax.Array:
    """(i + 1/2) / 2^bits: the middle of one of 2^bits parts of (0, 1)."""
    return (i.astype(jnp.int32).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-bits)


def _cosine(turns: jax.Array) -> jax.Array:
    """cos(2 pi x) for |x| <= 1/2, by the series of the sine of a quarter turn at most: to rounding."""
    x = 0.25 - jnp.abs(turns)
    total = jnp.zeros_like(x)
    for n in range(11, 0, -2):
        total = total * x * x + jnp.float32((-1) ** (n // 2) * math.tau**n / math.factorial(n))
    return total * x


def _leaf_keys(key: jax.Array, paths: list[str]) -> jax.Array:
    """One key per path, from 64 bits of its hash; with 32, leaves of a large model might well collide."""
    digests = b"".join(hashlib.blake2b(path.encode(), digest_size=8).digest() for path in paths)
    words = np.frombuffer(digests, "<u4").reshape(len(paths), 2).astype(np.uint32)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(jax.random.fold_in)(fold(key, words[:, 0]), words[:, 1])


def _shard_key(key: jax.Array, spec: jax.P) -> jax.Array:
    axes = axes_of(spec)
    return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key


def _check_specs(specs: list[Any]) -> None:
    for spec in specs:
        if not isinstance(spec, jax.P):
            raise TypeError(f"specs: expected partition specs, got {describe(spec)}.")
        check_mapped("specs", axes_of(spec))


def axes_of(spec: jax.P) -> tuple[str, ...]:
    """The mesh axes that a partition spec names."""
    entries = [entry for entry in spec if entry is not None]
    return tuple(axis for entry in entries for axis in (entry if isinstance(entry, tuple) else (entry,)))


def _scaled_draw(key: jax.Array, leaf: Any, sigma: Any, sampler: Sampler, path: str) -> jax.Array:
    w = widen(leaf)
    real = jnp.finfo(w.dtype).dtype
    check_nonnegative("sigma", sigma, path, _DEVIATION)
    if not _broadcasts_to(np.shape(sigma), w.shape):
        raise ValueError(
            f"sigma: shape {np.shape(sigma)} does not broadcast to leaf {path} of shape {w.shape}."
        )

    def draw(key: jax.Array) -> jax.Array:
        u = _sampled(sampler, key, w.shape, real)
        check_real("sampler", u, f" for each weight of leaf {path}")
        if jnp.shape(u) != w.shape:
            raise ValueError(f"sampler: returned shape {jnp.shape(u)} for leaf {path} of shape {w.shape}.")
        return jnp.asarray(sigma).astype(real) * jnp.asarray(u, real)

    if jnp.iscomplexobj(w):
        return jax.lax.complex(*map(draw, jax.random.split(key))) / math.sqrt(2.0)
    return draw(key)


def _sampled(sampler: Sampler, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    try:
        return sampler(key, shape, dtype)
    except Exception as error:
        error.add_note(
            "sampler: it was called as sampler(key, shape, dtype), for draws of mean 0 and variance 1. "
            "Random signs are nso_jax.noise.rademacher."
        )
        raise


def _broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False
