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
    """What a seed works with.

    Attributes:
        train: What it trains on, some labels wrong.
        validation: What the methods were tuned on, with right labels.
        test: What they are compared on, with right labels.
        mislabelled_test: The same with labels wrong as often as in training: the loss on it differs from the
            training loss only by what was learnt by heart.
    """

    train: Examples
    validation: Examples
    test: Examples
    mislabelled_test: Examples


def digits(seed: int, num_train: int, wrong_labels: float = 0.0) -> Split:
    """The digits, split.

    Args:
        seed: It draws the training images. The 1,000 test images are the same for every seed.
        num_train: How many of the other 797 images to train on; the rest is for validation.
        wrong_labels: The share of the training images that get a wrong label.

    Returns:
        The parts of the data.
    """
    loaded = datasets.load_digits()
    images, labels = loaded.images[..., None] / 16, loaded.target
    # Shuffled first, because the images come writer by writer.
    test, rest = np.split(np.random.default_rng(0).permutation(len(labels)), [NUM_TEST])
    rng = np.random.default_rng([seed, 1])
    train, validation = np.split(rng.permutation(rest), [num_train])
    mislabelled = labels.copy()
    for part in (train, test):
        wrong = rng.permutation(part)[: round(wrong_labels * len(part))]
        mislabelled[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10

    def select(indices: np.ndarray, labels: np.ndarray) -> Examples:
        return Examples(jnp.asarray(images[indices], jnp.float32), jnp.asarray(labels[indices], jnp.int32))

    return Split(
        select(train, mislabelled),
        select(validation, labels),
        select(test, labels),
        select(test, mislabelled),
    )


def batches(examples: Examples, batch_size: int, seed: int) -> Iterator[Examples]:
    """Endless batches: a new order in each epoch, without the last images that fill no batch."""
    rng = np.random.default_rng([seed, 2])
    images, labels = np.asarray(examples.images), np.asarray(examples.labels)
    while True:
        order = rng.permutation(len(labels))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[first : first + batch_size]
            yield Examples(images[chosen], labels[chosen])
