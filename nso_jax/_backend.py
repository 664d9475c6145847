"""What depends on the backend: XLA:CPU treats loops, barriers and random bits unlike other compilers."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

from nso_jax._checks import PyTree

_IMPL = "threefry2x32"
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def on_cpu() -> bool:
    """Whether what is being traced will run on a CPU."""
    device = getattr(jax.config, "jax_default_device", None)
    return (getattr(device, "platform", device) or jax.default_backend()) == "cpu"


def loop(
    step: Callable[[PyTree, Any], tuple[PyTree, PyTree]], carry: PyTree, count: int
) -> tuple[PyTree, PyTree]:
    """`carry, out = step(carry, i)` for i = 0, ..., count - 1: the last carry, and every `out`, stacked.

    A compiled loop, but unrolled on CPU, where XLA runs a convolution inside a loop body some 34 times slower
    than outside. Then each `i` is known only after the carry, so that the steps still follow one another. A
    sum may start from None, if `step(None, 0)` begins it.
    """
    if on_cpu() or count == 1:
        outs = []
        for i in range(count):
            carry, out = step(carry, i + zero_once_computed(carry) if i else 0)
            outs.append(out)
        return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)
    if carry is None:
        carry = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: step(None, 0)[0]))
    return jax.lax.scan(step, carry, jnp.arange(count, dtype=jnp.int32))


def zero_once_computed(tree: PyTree) -> Any:
    """The int32 zero, but known only after `tree` is: what uses it waits, so that memory does not add up."""
    leaves = [x for x in jax.tree.leaves(tree) if x.size]
    if not on_cpu():
        return jax.lax.optimization_barrier((leaves, jnp.int32(0)))[1]
    if jax.device_count() > 1:  # an entry of a sharded leaf would have to be communicated
        return 0
    # XLA:CPU drops barriers before it schedules. No number is above infinity, but XLA does not know.
    entries = [jnp.real(x[(0,) * x.ndim]).astype(jnp.float32) for x in leaves]
    return (sum(entries, start=jnp.float32(0)) > math.inf).astype(jnp.int32)


def for_each_weight(scale: jax.Array, w: jax.Array) -> jax.Array:
    """`scale`, in the shape of `w`.

    XLA:CPU moves a scalar factor of the noise into both W + U and W - U, and draws the noise in each of them
    again: a step of a small network then takes twice as long. One for each weight stays where it is.
    """
    full = jnp.broadcast_to(scale, w.shape)
    if not on_cpu() or scale.shape == w.shape:
        return full
    # For NaN, which no noise makes better, it may be anything, but XLA does not know.
    return jnp.where(jnp.isnan(w), jnp.zeros((), full.dtype), full)


def computed_once(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x`, of the shape of `w`, as an array in memory.

    XLA:CPU takes what is cheap for each entry, such as Threefry's rounds, into all that uses it: the noise of
    a bias would be drawn again for every pixel of every image, and that in each operation in turn. Batch
    normalization has many. It takes nothing out of a loop, though this one is over before it begins.
    """
    if not on_cpu() or jax.device_count() > 1 or not w.size:  # as in zero_once_computed
        return x
    return _behind_loop(x, _never(jnp.real(w[(0,) * w.ndim])))


def _never(number: jax.Array) -> jax.Array:
    return number.astype(jnp.float32) > math.inf  # XLA does not know


@jax.custom_jvp
@jax.jit
def _behind_loop(x: jax.Array, never: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda _: never, jnp.negative, x)


@_behind_loop.defjvp
def _behind_loop_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, Any]:
    return _behind_loop(*primals), tangents[0]


def with_fast_bits(key: jax.Array) -> jax.Array:
    """A key that gives the same random words as `key`, in a fraction of the time on CPU.

    On CPU JAX compiles the rounds of Threefry as a loop over whole arrays, each of which goes through memory
    twenty times; unrolled they are one pass. For some millions of normal numbers that is 3 to 8 times faster.
    The words are an array of their own: one loop for them and the inverse error function takes half as long
    again as two.
    """
    in_order = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]  # word i is the hash of i
    if not (on_cpu() and in_order and str(jax.random.key_impl(key)) == _IMPL):
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_bits(key_data: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    if bit_width != 32 or math.prod(shape) >= 2**32:  # noqa: PLR2004
        return jax.random.bits(jax.random.wrap_key_data(key_data, impl=_IMPL), shape, f"uint{bit_width}")
    words = _threefry(key_data, jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape))
    return _behind_loop(words, _never(key_data[0]))


def _threefry(key_data: jax.Array, count: jax.Array) -> jax.Array:
    """Threefry-2x32 with 20 rounds, of (0, count), its two words joined by exclusive or.

    References:
      Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    keys = (key_data[0], key_data[1], key_data[0] ^ key_data[1] ^ jnp.uint32(_PARITY))
    x, y = jnp.zeros_like(count) + keys[0], count + keys[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << jnp.uint32(distance)) | (y >> jnp.uint32(32 - distance)))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x ^ y


def _on_data(fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda data, *args: jax.random.key_data(fun(jax.random.wrap_key_data(data, impl=_IMPL), *args))


_UNROLLED = define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl=_IMPL)),
    split=_on_data(jax.random.split),
    random_bits=_random_bits,
    fold_in=_on_data(jax.random.fold_in),
    name="threefry2x32 unrolled",
    tag="threefry2x32 unrolled",
)
