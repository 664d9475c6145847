"""The batches of the data, how much each of them counts, and what may be wrong with them."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from nso_jax._checks import check_scalar, leaf_name
from nso_jax.curvature._checks import check_concrete

# How much the mean loss of a batch counts.
Weight = Callable[[Any], Any]


def check_batches(batches: Any) -> None:
    """Raises for batches that a second product would find exhausted, and for an empty list."""
    if hasattr(batches, "__next__"):
        kind = "a generator" if hasattr(batches, "gi_frame") else f"an iterator ({type(batches).__name__})"
        raise TypeError(f"batches is {kind}: it ends after one pass; give a list.")
    if isinstance(batches, list) and not batches:
        raise ValueError("batches is empty: give at least one batch.")


def each(batches: Any) -> Iterable[Any]:
    """The batches one after another, by the rule that `hessian` gives."""
    return batches if isinstance(batches, list) or is_loader(batches) else [batches]


def is_loader(batches: Any) -> bool:
    """Whether batches are given by an iterable that may make them anew in each pass."""
    no_pytree = jax.tree_util.all_leaves([batches])
    return no_pytree and isinstance(batches, Iterable) and not hasattr(batches, "shape")


def weighted(batches: Any, weight: Weight | None) -> Iterator[tuple[int, Any, float]]:
    """The batches that count, with their numbers and weights."""
    count, total = 0, 0.0
    uneven = ""
    for index, batch in enumerate(each(batches)):
        count += 1
        check_concrete(f"batches[{index}]", batch)
        if weight is None:
            uneven = uneven or unevenness(batch, index)
            if uneven and count > 1:  # of one batch alone, the size does not matter
                raise ValueError(uneven)
        value = batch_weight(batch, index, weight)
        total += value
        if value:
            yield index, batch, value
    if not count:
        raise ValueError("batches is empty: its iteration gave no batch.")
    if not total:
        raise ValueError("weight: is 0 for all batches, so that there is no mean loss.")


def batch_size(batch: Any, index: int) -> int:
    """The number of examples in a batch; 1 where no leaf has a leading axis."""
    shape = next((np.shape(leaf) for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), (1,))
    if shape[0] == 0:
        raise ValueError(f"batches[{index}] has no examples: its first array has shape {shape}.")
    return int(shape[0])


def batch_weight(batch: Any, index: int, weight: Weight | None) -> float:
    """How much a batch's mean loss counts: what `weight` says, else by its number of examples."""
    if weight is None:
        return batch_size(batch, index)
    value = weight(batch)
    name = f"weight(batches[{index}])"
    check_scalar(name, value, lambda x: 0 <= x < np.inf, "a finite number >= 0")
    return float(value)


def unevenness(batch: Any, index: int) -> str:
    """What is wrong with a batch whose leaves do not agree on the number of examples, else nothing."""
    leaves = [(path, np.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(batch)]
    lengths = {leaf_name(path): shape[0] for path, shape in leaves if shape}
    if len(set(lengths.values())) <= 1:
        return ""
    shown = ", ".join(f"{name}: {length}" for name, length in lengths.items())
    return (
        f"batches[{index}]: its leaves have leading axes of different lengths, {shown}, so that it is not "
        "clear how many examples it has; say it, as in weight=lambda batch: batch['x'].shape[0]."
    )


@contextlib.contextmanager
def explained(functions: Iterable[Callable[..., Any]], batches: Any) -> Iterator[None]:
    """Notes on an error of one of these functions of two arguments what may be wrong with the call."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TypeError) and any(map(_wants_other_arguments, functions)):
            error.add_note(
                "fun is called as fun(params, batch), with a batch as one argument: for a loss of more, pass "
                "lambda params, batch: loss(params, *batch)."
            )
        if _looks_like_many(batches):
            error.add_note(
                f"batches is a tuple of {len(batches)}: that is one batch, and fun is given all of it. Give "
                "many batches as a list."
            )
        raise


def _wants_other_arguments(function: Callable[..., Any]) -> bool:
    with contextlib.suppress(ValueError):  # of a builtin without a signature
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            return True
    return False


def _looks_like_many(batches: Any) -> bool:
    """Whether a tuple has elements of one kind, which differ in their leading axes at most."""
    if type(batches) is not tuple or len(batches) < 2:  # noqa: PLR2004
        return False
    kinds = [
        (jax.tree.structure(batch), [np.shape(leaf)[1:] for leaf in jax.tree.leaves(batch)])
        for batch in batches
    ]
    return all(kind == kinds[0] for kind in kinds[1:])
