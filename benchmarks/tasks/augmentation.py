"""Training images changed at random, as a function `augment(key, number, examples) -> examples`."""

import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from benchmarks.tasks.data import Examples, as_numbers

Name = Literal["none", "cutout", "mixup"]

# With the key of a training and the number of the batch in it.
Augment = Callable[[jax.Array, int, Examples], Examples]


def unchanged(key: jax.Array, number: int, examples: Examples) -> Examples:
    """The examples as they are."""
    del key, number
    return examples


def cutout(key: jax.Array, examples: Examples, share: float | jax.Array = 0.5) -> Examples:
    """A black square in each image, its centre anywhere, so that part of it may lie outside.

    Args:
        key: For the centres.
        examples: The images, of shape (n, height, width, channels), and their labels.
        share: The square's side over the image's shorter one; half is the authors' choice for CIFAR-10.

    Returns:
        The changed images with the same labels.

    References:
        DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout,
        arXiv 1708.04552, 2017.
    """
    images = jnp.asarray(examples.inputs)
    number, *sizes = images.shape[:3]
    side = jnp.round(share * min(sizes)).astype(int)
    inside = jnp.ones((number, 1, 1, 1), bool)
    for axis, (size, axis_key) in enumerate(zip(sizes, jax.random.split(key), strict=True), start=1):
        first = jax.random.randint(axis_key, (number, 1), 0, size) - side // 2
        places = jnp.arange(size).reshape(1, -1)
        hit = (places >= first) & (places < first + side)
        inside &= jnp.expand_dims(hit, tuple({1, 2, 3} - {axis}))
    return Examples(jnp.where(inside, jnp.zeros((), images.dtype), images), examples.labels)


def mixup(key: jax.Array, examples: Examples, num_classes: int, alpha: float | jax.Array = 0.2) -> Examples:
    """Weighted means of pairs of images and of their labels: s x + (1 - s) x', s ~ Beta(alpha, alpha).

    Args:
        key: For the share s, one for the batch as published, and the pairs.
        examples: The images and their labels, whole numbers.
        num_classes: How many classes there are.
        alpha: The smaller, the more often one of the two has nearly all the weight.

    Returns:
        The means, with labels as probabilities, of shape (n, num_classes).

    References:
        Zhang, Cisse, Dauphin and Lopez-Paz, mixup: Beyond Empirical Risk Minimization, arXiv 1710.09412,
        2017.
    """
    share_key, order_key = jax.random.split(key)
    share = jax.random.beta(share_key, alpha, alpha)
    order = jax.random.permutation(order_key, len(examples.labels))
    labels = jax.nn.one_hot(examples.labels, num_classes)

    def mixed(x: jax.Array) -> jax.Array:
        return share.astype(x.dtype) * x + (1 - share).astype(x.dtype) * x[order]

    return Examples(mixed(as_numbers(examples.inputs)), mixed(labels))


@functools.cache
def named(name: Name, num_classes: int) -> Augment:
    """The one of a name: "none", "cutout" or "mixup", compiled once."""
    if name == "none":
        return unchanged
    changes: dict[str, Callable[[jax.Array, Examples], Examples]] = {
        "cutout": cutout,
        "mixup": functools.partial(mixup, num_classes=num_classes),
    }
    change = changes[name]
    return jax.jit(lambda key, number, examples: change(jax.random.fold_in(key, number), examples))


def batches(augment: Augment, key: jax.Array, drawn: Iterator[Examples], first: int) -> Iterator[Examples]:
    """Batches changed one after another.

    Args:
        augment: What is done to each.
        key: That of the training.
        drawn: The batches.
        first: The number of the first in the training.
    """
    return (augment(key, number, batch) for number, batch in enumerate(drawn, first))
