"""What depends on the platform: XLA:CPU treats loops, barriers and random bits unlike other compilers.

It is chosen when a program is lowered, for the platform that it is lowered for: an export for TPU, or what is
compiled ahead of time on a machine without one, has nothing of what stands here for CPU.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

from nso_jax._checks import PyTree
from nso_jax._tracing import has_primitive, traced, varies

_IMPL = "threefry2x32"
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def loop(
    step: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]], carry: PyTree, count: int, key: jax.Array
) -> tuple[PyTree, PyTree]:
    """`carry, out = step(carry, i)` for i = 0, ..., count - 1: the last carry, and every `out`, stacked.

    A compiled loop; but one in which there is a convolution is unrolled on CPU, where XLA runs it in a loop
    some 34 times slower than outside. The steps still follow one another.

    Args:
      step: a function of the carry and of an int32 number.
      carry: what the first step gets.
      count: how many steps.
      key: any PRNG key that the program gets from outside, as for `barrier`.
    """
    if count == 1 or not _is_traced():
        return _one_by_one(step, carry, count)
    steps = jnp.arange(count, dtype=jnp.int32)
    step, jaxpr = traced(step, carry, steps[0])
    compiled = functools.partial(jax.lax.scan, step)
    if not has_primitive(jaxpr, "conv_general_dilated"):
        return compiled(carry, steps)

    def in_order(carry: PyTree, i: jax.Array) -> tuple[PyTree, PyTree]:
        return step(*computed_once((carry, i), key))

    unrolled = functools.partial(jax.lax.scan, in_order, unroll=count)
    return jax.lax.platform_dependent(carry, steps, cpu=unrolled, default=compiled)


def sum_over(
    step: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]], count: int, key: jax.Array
) -> tuple[PyTree, PyTree]:
    """As `loop`, from zeros, for a step that adds to what it carries: `step(None, i)` is what it adds."""
    if count == 1 or not _is_traced():
        return _one_by_one(step, None, count)
    total, _ = jax.eval_shape(functools.partial(step, None), jnp.int32(0))
    return loop(step, jax.tree.map(jnp.zeros_like, total), count, key)


def mean_over(
    estimate: Callable[[jax.Array], PyTree], key: jax.Array, count: int, *, vectorized: bool = True
) -> PyTree:
    """The mean of independent estimates: on CPU, or if not `vectorized`, one after another.

    A vmapped evaluation costs 2 to 6 times a single one there.
    """
    keys = jax.random.split(key, count)

    def one_by_one(keys: jax.Array) -> PyTree:
        total, _ = sum_over(lambda total, i: (added(total, estimate(keys[i])), ()), count, key)
        return jax.tree.map(lambda x: x / count, total)

    def at_once(keys: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(estimate)(keys))

    if count == 1 or not vectorized:
        return one_by_one(keys)
    return jax.lax.platform_dependent(keys, cpu=one_by_one, default=at_once)


def added(total: PyTree, term: PyTree) -> PyTree:
    """`total + term`, or `term` if `total` is None."""
    return term if total is None else jax.tree.map(jnp.add, total, term)


def barrier(tree: PyTree, key: jax.Array) -> PyTree:
    """The arrays of `tree`, of which none is used before all are known, so that memory does not add up.

    Args:
      tree: a pytree of arrays.
      key: a PRNG key that the program gets from outside: XLA:CPU drops barriers before it schedules, but
        takes nothing through a loop that runs, for all that it knows, unless a number of the key is infinite.
    """
    return _passed(_in_line, tree, _never(jax.random.key_data(key)))


def in_each_step(params: PyTree, keys: jax.Array) -> tuple[PyTree, jax.Array]:
    """The params and the keys, for one step of a loop.

    But on CPU, these are other params to XLA in each step. What it knows of a weight, such as whether it is
    finite, it would else find out before the loop and keep for all steps.
    """
    return jax.lax.platform_dependent(
        params, keys, cpu=lambda *both: both, default=lambda *both: barrier(both, keys[0])
    )


def drawn_again(
    draw: Callable[[PyTree, jax.Array], PyTree], params: PyTree, keys: jax.Array, u: PyTree, after: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """The params, the noise and `after`, none of which is used before `after` is known.

    On CPU the noise is kept. Elsewhere it is drawn again, which takes about as long as to read it, so that it
    is not in memory beside a gradient's; and the params are others to XLA, as `in_each_step`.

    Args:
      draw: what makes noise for params of PRNG keys.
      params: what the noise is added to.
      keys: those that it was drawn with.
      u: `draw(params, keys)`.
      after: a pytree of arrays.
    """

    def kept(params: PyTree, _: jax.Array, u: PyTree, after: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        u, after = barrier((u, after), keys[0])
        return params, u, after

    def again(params: PyTree, keys: jax.Array, _: PyTree, after: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        params, keys, after = barrier((params, keys, after), keys[0])
        return params, draw(params, keys), after

    return jax.lax.platform_dependent(params, keys, u, after, cpu=kept, default=again)


def computed_once(tree: PyTree, key: jax.Array) -> PyTree:
    """The arrays of `tree`, each as an array in memory on CPU.

    XLA:CPU takes what is cheap for each entry, such as Threefry's rounds, into all that uses it: the noise of
    a bias would be drawn again for every pixel of every image, and that in each operation in turn. Batch
    normalization has many.

    Args:
      tree: a pytree of arrays.
      key: as for `barrier`.
    """
    return _passed(_unchanged, tree, _never(jax.random.key_data(key)))


def is_on_cpu(tree: PyTree) -> bool:
    """Whether arrays lie on CPUs, for what is decided about them outside of any program."""
    devices = {device for x in jax.tree.leaves(tree) for device in jnp.asarray(x).devices()}
    return {device.platform for device in devices} <= {"cpu"}


def _never(key_data: jax.Array) -> jax.Array:
    """False; but XLA cannot know that no 32-bit word of a key is above infinity."""
    return jnp.ravel(key_data)[0].astype(jnp.float32) > math.inf


def _is_traced() -> bool:
    """Whether there will be a program; else a loop in it would be compiled at each call."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _one_by_one(
    step: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]], carry: PyTree, count: int
) -> tuple[PyTree, PyTree]:
    outs = []
    for i in range(count):
        carry, out = step(carry, jnp.int32(i))
        outs.append(out)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)


def _on_numbers(fun: Callable[[list[jax.Array]], list[jax.Array]], tree: PyTree) -> PyTree:
    """`tree`, with what `fun` makes of those of its arrays that hold numbers, or PRNG keys."""
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [i for i, x in enumerate(leaves) if _is_key(x) or jnp.issubdtype(x.dtype, jnp.number)]
    numbers = fun([jax.random.key_data(leaves[i]) if _is_key(leaves[i]) else leaves[i] for i in chosen])
    for i, x in zip(chosen, numbers, strict=True):
        key = leaves[i]
        leaves[i] = jax.random.wrap_key_data(x, impl=jax.random.key_impl(key)) if _is_key(key) else x
    return jax.tree.unflatten(treedef, leaves)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@jax.jit
def _through_loop(tree: PyTree, never: jax.Array) -> PyTree:
    def negated(carry: tuple[list[jax.Array], jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        return [-x for x in carry[0]], carry[1]

    return _on_numbers(
        lambda numbers: jax.lax.while_loop(lambda carry: carry[1], negated, (numbers, never))[0], tree
    )


def _in_line(tree: PyTree, _: jax.Array) -> PyTree:
    """One barrier for all arrays that vary along the same axes: those that pass one together vary alike."""

    def by_axes(numbers: list[jax.Array]) -> list[jax.Array]:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        axes = [tuple(axis for axis in manual if varies(x, axis)) for x in numbers]
        for kind in dict.fromkeys(axes):  # in one order in all processes
            alike = [i for i, of_array in enumerate(axes) if of_array == kind]
            for i, x in zip(alike, jax.lax.optimization_barrier([numbers[i] for i in alike]), strict=True):
                numbers[i] = x
        return numbers

    return _on_numbers(by_axes, tree)


def _unchanged(tree: PyTree, _: jax.Array) -> PyTree:
    return tree


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _passed(elsewhere: Callable[[PyTree, jax.Array], PyTree], tree: PyTree, never: jax.Array) -> PyTree:
    """`tree`, through a loop on CPU and `elsewhere` elsewhere."""
    return jax.lax.platform_dependent(tree, never, cpu=_through_loop, default=elsewhere)


@_passed.defjvp
def _passed_jvp(elsewhere: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
    return _passed(elsewhere, *primals), tangents[0]


def with_fast_bits(key: jax.Array) -> jax.Array:
    """A key that gives the same random words as `key`, in a fraction of the time on CPU.

    On CPU JAX compiles the rounds of Threefry as a loop over whole arrays, each of which goes through memory
    twenty times; unrolled they are one pass. For some millions of normal numbers that is 3 to 8 times faster.
    The words are an array of their own: one loop for them and for what is made of them, such as the inverse
    error function, takes half as long again as two.
    """
    if not _counts(key, ()):
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)


def repeated_bits(key: jax.Array, shape: Sequence[int], repeats: Sequence[int]) -> jax.Array:
    """Random 32-bit words, each of them repeated so many times along each axis of `shape`.

    Except on CPU, each entry hashes the number of its word for itself. Other compilers do that where the word
    is used; what is repeated along an axis goes to memory, on TPU at least.
    """
    sizes = [size // count for size, count in zip(shape, repeats, strict=True)]

    def repeated(data: jax.Array) -> jax.Array:
        key_of = with_fast_bits(jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)))
        words = jax.random.bits(key_of, sizes, jnp.uint32)
        for axis, count in enumerate(repeats):
            words = jnp.repeat(words, count, axis)
        return words

    def hashed(data: jax.Array) -> jax.Array:
        number = jnp.zeros(shape, jnp.uint32)
        for axis, count in enumerate(repeats):
            along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis) // jnp.uint32(count)
            number += along * jnp.uint32(math.prod(sizes[axis + 1 :]))
        return _threefry(data, number)

    data = jax.random.key_data(key)
    if not _counts(key, sizes):
        return repeated(data)
    return jax.lax.platform_dependent(data, cpu=repeated, default=hashed)


def _counts(key: jax.Array, shape: Sequence[int]) -> bool:
    """Whether the i-th random word of this shape is the hash of i."""
    in_order = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    return in_order and str(jax.random.key_impl(key)) == _IMPL and math.prod(shape) < 2**32


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_bits(key_data: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    def of_jax(key_data: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.wrap_key_data(key_data, impl=_IMPL), shape, f"uint{bit_width}")

    def unrolled(key_data: jax.Array) -> jax.Array:
        words = _threefry(key_data, jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape))
        return _through_loop(words, _never(key_data))

    if bit_width != 32 or math.prod(shape) >= 2**32:  # noqa: PLR2004
        return of_jax(key_data)
    return jax.lax.platform_dependent(key_data, cpu=unrolled, default=of_jax)


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
