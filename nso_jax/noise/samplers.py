"""Samplers: random numbers of mean 0, variance 1 and a symmetric law."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nso_jax._backend import repeated_bits, with_fast_bits
from nso_jax._checks import as_key

__all__ = ["Sampler", "cauchy", "centered_binomial", "laplace", "normal", "rademacher", "uniform"]

Sampler = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

_UNIFORM_HALF_WIDTH = math.sqrt(3.0)
_LAPLACE_DEVIATION = math.sqrt(2.0)
_BINOMIAL_TRIALS = 8
_ANGLE_BITS = 12  # of a word's 32; the others are the radius's, which is at most 5.4 so


def normal(key: jax.Array, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
    """Gaussian noise, u ~ N(0, 1): the published choice, and the default.

    A random 32-bit word makes a pair of numbers, by the transform of Box and Muller, for two weights that are
    neighbours along an axis of even length:

        u_1 = sqrt(-2 log r) cos(2 pi t), u_2 = sqrt(-2 log r) cos(2 pi (t + 1/4)), r of 20 bits and t of 12

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
      key, shape, dtype: as in `normal`.

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
      key, shape, dtype: as in `normal`.

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
      key, shape, dtype: as in `normal`.

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
      key, shape, dtype: as in `normal`.

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
      key, shape, dtype: as in `normal`.

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
