"""The handwritten digits that scikit-learn ships: 1,797 images of 8x8 pixels, nothing to download."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

NUM_TEST = 1000


class Examples(NamedTuple):
    """Images, float32 of shape (n, 8, 8, 1) between 0 and 1, and their labels, int32 of shape (n,)."""

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray


class Split(NamedTuple):
    """What a seed trains on, what the methods were tuned on, and what they are compared on."""

    train: Examples
    validation: Examples
    test: Examples


def digits(seed: int, num_train: int, wrong_labels: float = 0.0) -> Split:
    """The digits, split.

    Args:
        seed: It draws the training images. The 1,000 test images are the same for every seed.
        num_train: How many of the other 797 images to train on; the rest is for validation.
        wrong_labels: The share of the training images that get a wrong label.

    Returns:
        The three parts of the data.
    """
    loaded = datasets.load_digits()
    images, labels = loaded.images[..., None] / 16, loaded.target.copy()

    def select(indices: np.ndarray) -> Examples:
        return Examples(jnp.asarray(images[indices], jnp.float32), jnp.asarray(labels[indices], jnp.int32))

    # Shuffled first, because the images come writer by writer.
    test, rest = np.split(np.random.default_rng(0).permutation(len(labels)), [NUM_TEST])
    rng = np.random.default_rng([seed, 1])
    train, validation = np.split(rng.permutation(rest), [num_train])
    wrong = train[: round(wrong_labels * num_train)]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return Split(select(train), select(validation), select(test))


def batches(examples: Examples, batch_size: int, seed: int) -> Iterator[Examples]:
    """Endless batches: a new order in each epoch, without the last images that fill no batch."""
    rng = np.random.default_rng([seed, 2])
    images, labels = np.asarray(examples.images), np.asarray(examples.labels)
    while True:
        order = rng.permutation(len(labels))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[first : first + batch_size]
            yield Examples(images[chosen], labels[chosen])
