"""A batch in parts: what `parallel.microbatch` and its NNX form do with each part, and with what it gives."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nso_jax import _backend, gradients
from nso_jax._axes import Axes, weighed
from nso_jax._calls import as_argnums, check_aux_modes
from nso_jax._checks import (
    PyTree,
    broadcast_prefix,
    check_count,
    check_function,
    check_scalar,
    describe,
    dtype_of,
    is_inexact,
    leaf_name,
)
from nso_jax._precision import widen

Batch = dict[int, PyTree]  # arguments that carry examples, by their numbers
Weight = Callable[..., Any]  # of the arguments of a loss: how much its value counts

_ADDED = ("mean", "sum")


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """How a batch is split, and what becomes of what is computed for its parts.

    Attributes:
      count: m, how many parts.
      weight: how much the loss of a part counts; None: all alike.
      aux: what becomes of auxiliary output.
      axes: along which all is averaged in the end.
    """

    count: int
    weight: Weight | None
    aux: PyTree
    axes: Axes

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what cannot be."""
        check_count("num_microbatches", self.count)
        if self.weight is not None:
            check_function("weight", self.weight, "a function of the arguments of the loss")
        check_aux_modes(self.aux, gradients.AUX_MODES)

    @property
    def modes(self) -> PyTree:
        """What becomes of `((value, aux), grads)`, as a prefix of it."""
        return "mean" if self.aux == "mean" else (("mean", self.aux), "mean")

    def call(
        self,
        fn: Callable[..., PyTree],
        key: jax.Array,
        fixed: list[Any],
        batch: Batch,
        kwargs: dict[str, Any],
    ) -> PyTree:
        """The mean of what `fn` gives for the parts of a batch."""

        def evaluate(
            i: Any, key: jax.Array, examples: Batch, others: PyTree, state: PyTree
        ) -> tuple[PyTree, PyTree]:
            fixed, kwargs = others if self.count == 1 else fold_keys(others, i)
            with _forgotten_named(fixed, batch):
                return fn(key, *join(fixed, examples), **kwargs), state

        def weight_of(examples: Batch, others: PyTree) -> Any:
            fixed, kwargs = others
            return self.weight(*join(fixed, examples), **kwargs)  # type: ignore[misc]  # only called if given

        return self.mean(evaluate, key, batch, others=(fixed, kwargs), state=(), weight_of=weight_of)[0]

    def mean(
        self,
        evaluate: Callable[[Any, jax.Array, Batch, PyTree, PyTree], tuple[PyTree, PyTree]],
        key: jax.Array,
        batch: Batch,
        *,
        others: PyTree,
        state: PyTree,
        weight_of: Callable[[Batch, PyTree], Any],
    ) -> tuple[PyTree, PyTree]:
        """The mean of `out, state = evaluate(i, key_i, part i, others, state)`, and the last state.

        `weight_of(part, others)` is how much a part counts, if there is a `weight`.
        """
        (batch, others, state), key = self.axes.localize((batch, others, state), key)
        count = self.count
        keys = jax.random.split(key, count) if count > 1 else [key]

        def on_part(i: Any, state: PyTree) -> tuple[PyTree, PyTree, Any]:
            """What a part gives, the state after it, and how much it counts."""
            examples = part_of(batch, i, count)
            out, moved = evaluate(i, keys[i], examples, others, state)
            if self.weight is None:
                return out, moved, None
            counts = _as_weight(weight_of(examples, others))
            return out, jax.tree.map(lambda new, old: _unless_zero(counts, new, old), moved, state), counts

        def add(carry: tuple[Any, PyTree], i: Any) -> tuple[tuple[Any, PyTree], list[jax.Array]]:
            so_far, state = carry
            out, state, counts = on_part(i, state)
            leaves = jax.tree.leaves(out)
            terms = _terms(leaves, reductions, counts), counts
            return (jax.tree.map(jnp.add, so_far, terms), state), _kept(leaves, reductions)

        with self.axes.copies():
            first = on_part(0, state) if count == 1 else jax.eval_shape(lambda: on_part(0, state))
            leaves, treedef = jax.tree.flatten(first[0])
            reductions = _reductions(
                broadcast_prefix("aux", self.modes, first[0]), first[0], _length(batch) // count
            )
            if count == 1:
                _, state, counts = first
                totals, kept = (
                    _terms(leaves, reductions, counts),
                    [x[None] for x in _kept(leaves, reductions)],
                )
            else:
                zeros = [
                    jnp.zeros_like(x) if reduction in _ADDED else None
                    for x, reduction in zip(leaves, reductions, strict=True)
                ]
                start = _terms(zeros, reductions, None), jax.tree.map(jnp.zeros_like, first[2])
                ((totals, counts), state), kept = _backend.loop(add, (start, state), count, key)

        out = _joined(leaves, reductions, totals, kept, count if counts is None else counts)
        over_axis = [reduction if reduction in _ADDED else "local" for reduction in reductions]
        out, state = self.axes.combine((out, state), (over_axis, "mean"), counts)
        return jax.tree.unflatten(treedef, out), state


def batch_numbers(batch_argnums: int | Sequence[int], name: str = "batch_argnums") -> tuple[int, ...]:
    """The numbers of arguments as a tuple."""
    numbers = as_argnums(name, batch_argnums)
    return numbers if isinstance(numbers, tuple) else (numbers,)


def select_batch(
    args: tuple[Any, ...], argnums: tuple[int, ...], num_microbatches: int, num_devices: int = 1
) -> tuple[list[Any], Batch]:
    """The arguments with None for those of the batch, and these, checked, by their numbers."""
    for i in argnums:
        if not -len(args) <= i < len(args):
            raise TypeError(f"batch_argnums: {i} is out of range, got {len(args)} arguments after the key.")
    batch = {i % len(args): args[i] for i in argnums}
    counts = {"microbatches": num_microbatches, "devices": num_devices}
    _check_divides(
        num_microbatches * num_devices,
        " times ".join(f"{count} {name}" for name, count in counts.items() if count > 1),
        batch,
    )
    return [None if i in batch else arg for i, arg in enumerate(args)], batch


def check_whole(numbers: tuple[int, ...], batch: Batch, count: int) -> None:
    """Raises ValueError if the batch has arguments, of so many, that are differentiated."""
    for i in numbers:
        if i % count in batch:
            raise ValueError(
                f"batch_argnums: argument {i} is differentiated, and its gradients would be averaged over "
                "different examples; leave it out."
            )


def part_of(batch: Batch, i: Any, count: int) -> Batch:
    """The examples i, i + count, i + 2 count, ..., so that a batch sharded over devices stays on them."""

    def examples(x: Any) -> jax.Array:
        interleaved = jnp.reshape(x, (x.shape[0] // count, count, *x.shape[1:]))
        return jax.lax.dynamic_index_in_dim(interleaved, i, axis=1, keepdims=False)

    return batch if count == 1 else jax.tree.map(examples, batch)


def join(fixed: list[Any], batch: Batch) -> list[Any]:
    """The arguments that `select_batch` took apart."""
    return [batch.get(i, arg) for i, arg in enumerate(fixed)]


@contextlib.contextmanager
def _forgotten_named(fixed: list[Any], batch: Batch) -> Iterator[None]:
    """Notes on an error which arguments may be missing among those of the batch."""
    try:
        yield
    except Exception as error:
        size = _length(batch)
        for i, argument in enumerate(fixed):
            if i not in batch and any(jnp.shape(x)[:1] == (size,) for x in jax.tree.leaves(argument)):
                error.add_note(
                    f"batch_argnums: args[{i}] has {size} entries, as many as the batch has examples, but is "
                    f"not among batch_argnums={tuple(batch)}, so all parts get all of it."
                )
        raise


def _reductions(modes: list[str], like: PyTree, num_examples: int) -> list[str]:
    """What becomes of each leaf over the parts: "mean", "sum", "concatenate" or, without a mean, "first"."""
    reductions = []
    for mode, (path, leaf) in zip(modes, jax.tree.leaves_with_path(like), strict=True):
        if mode == "concatenate" and leaf.shape[:1] != (num_examples,):
            raise ValueError(
                f"aux: leaf {leaf_name(path)} of what fn returns is {describe(leaf)}, but to concatenate it "
                f"needs an entry for each of {num_examples} examples along its leading axis."
            )
        reductions.append(mode if mode in ("sum", "concatenate") else "mean" if is_inexact(leaf) else "first")
    return reductions


def _terms(leaves: list[Any], reductions: list[str], counts: Any) -> list[jax.Array]:
    """A part's terms in the sums, in float32 or int32 at least; zero if it does not count."""
    terms = []
    for x, reduction in zip(leaves, reductions, strict=True):
        if reduction in _ADDED:
            term = widen(x) if is_inexact(x) else jnp.sum(jnp.asarray(x)[None], axis=0)
            if counts is not None:
                term = weighed(term, counts if reduction == "mean" else jnp.sign(counts))
            terms.append(term)
    return terms


def _kept(leaves: list[Any], reductions: list[str]) -> list[Any]:
    return [x for x, reduction in zip(leaves, reductions, strict=True) if reduction not in _ADDED]


def _joined(
    leaves: list[Any], reductions: list[str], totals: list[jax.Array], kept: list[jax.Array], counts: Any
) -> list[jax.Array]:
    """Each leaf of the result, from the sums over the parts and from what was kept of each part."""
    sums, parts = iter(totals), iter(kept)

    def join(leaf: Any, reduction: str) -> jax.Array:
        if reduction == "mean":
            total = next(sums)
            return (total / jnp.asarray(counts).astype(total.dtype)).astype(leaf.dtype)
        if reduction == "sum":
            return next(sums).astype(leaf.dtype) if is_inexact(leaf) else next(sums)
        of_parts = next(parts)
        if reduction == "first":
            return of_parts[0]
        in_order = jnp.swapaxes(of_parts, 0, 1)  # part i has the examples i, i + m, i + 2m, ...
        return in_order.reshape(-1, *in_order.shape[2:])

    return [join(leaf, reduction) for leaf, reduction in zip(leaves, reductions, strict=True)]


def _as_weight(weight: Any) -> jax.Array:
    check_scalar("weight", weight)
    weight = jnp.asarray(weight)
    return weight if weight.dtype == jnp.float64 else weight.astype(jnp.float32)


def _unless_zero(counts: jax.Array, new: Any, old: Any) -> Any:
    """A part that does not count moves no statistics either."""
    return jnp.where(counts == 0, old, new) if is_inexact(new) else new


def fold_keys(tree: PyTree, i: Any) -> PyTree:
    """A pytree whose PRNG keys, if typed, have a number folded in."""

    def fold(x: Any) -> Any:
        dtype = dtype_of(x)
        if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return x
        return jnp.vectorize(jax.random.fold_in, excluded={1})(x, i) if x.shape else jax.random.fold_in(x, i)

    return jax.tree.map(fold, tree)


def _length(batch: Batch) -> int:
    """The number of examples, which all leaves share; 1 if there are none."""
    return next((jnp.shape(leaf)[0] for leaf in jax.tree.leaves(batch)), 1)


def _check_divides(count: int, of_what: str, batch: Batch) -> None:
    """Raises unless all leaves of the batch have one length, a multiple of `count`."""
    sizes = {}
    for path, leaf in jax.tree.leaves_with_path(batch):
        where = f"args{jax.tree_util.keystr(path)}"
        if not jnp.ndim(leaf):
            raise TypeError(
                f"batch_argnums: {where} is {describe(leaf)}, without a leading axis of examples; pass it "
                "as another argument or by keyword."
            )
        sizes[where] = jnp.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{where} has {size}" for where, size in sizes.items())
        raise ValueError(f"batch_argnums: all leaves need the same number of examples, but {listed}.")
    for where, size in sizes.items():
        if size % count:
            raise ValueError(
                f"batch_argnums: {where} has {size} examples, which {of_what} do not divide; drop "
                f"the last {size % count} or add {count - size % count}."
            )
