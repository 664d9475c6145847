"""The examples to train on: 1,797 digits of 8x8 pixels that scikit-learn ships, or those of Parquet files."""

import itertools
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn import datasets

from benchmarks.kit.files import UserError

NUM_TEST = 1000


class Examples(NamedTuple):
    """Inputs and what they are.

    Attributes:
        inputs: Images, float32 of shape (n, height, width, channels) in 0 to 1, or bytes of 0 to 255, or
            what else a network takes: an array, or a pytree of arrays, with one row for each example.
        labels: The numbers of their classes, int32 of shape (n,).
    """

    inputs: Any
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


def batches(examples: Examples, batch_size: int, seed: int, first: int = 0) -> Iterator[Examples]:
    """Endless batches: a new order in each epoch, without the last examples that fill no batch.

    Args:
        examples: What they are taken from.
        batch_size: How many examples a batch has.
        seed: It draws the orders.
        first: The number of the batch to start with: what goes on from there is what it would have been.

    Returns:
        The batches.

    Raises:
        UserError: There are too few examples for a batch.
    """
    number = len(examples.labels)
    if not 1 <= batch_size <= number:
        raise UserError(f"expected a batch of 1 to {number} examples, as many as there are, got {batch_size}")
    rng = np.random.default_rng([seed, 2])
    orders = (rng.permutation(number) for _ in itertools.count())
    chosen = (
        order[start : start + batch_size]
        for order in orders
        for start in range(0, number - batch_size + 1, batch_size)
    )
    arrays = jax.tree.map(np.asarray, examples)
    return (_rows_of(arrays, indices) for indices in itertools.islice(chosen, first, None))


def only_classes(examples: Examples, classes: Sequence[int]) -> Examples:
    """The examples of some classes.

    Args:
        examples: What they are taken from.
        classes: Their labels, which become 0, 1, ... in this order.

    Returns:
        The examples that have such a label, in their order.

    Raises:
        UserError: A class has no examples.
    """
    matches = np.asarray(examples.labels)[:, None] == np.asarray(classes)
    if not matches.any(axis=0).all():
        raise UserError(f"no examples of class {classes[int(matches.any(axis=0).argmin())]}")
    kept = np.flatnonzero(matches.any(axis=1))
    return _rows_of(examples, kept)._replace(labels=matches[kept].argmax(axis=1).astype(np.int32))


def few_shot(examples: Examples, per_class: int, seed: int) -> tuple[Examples, Examples]:
    """Equally many examples of each class, and the rest.

    Args:
        examples: What they are taken from.
        per_class: How many of each class.
        seed: It draws them.

    Returns:
        Those drawn and those left, both in their order.

    Raises:
        UserError: A class has fewer.
    """
    rng, labels = np.random.default_rng([seed, 3]), np.asarray(examples.labels)
    drawn = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        candidates = np.flatnonzero(labels == label)
        if len(candidates) < per_class:
            raise UserError(f"class {label} has {len(candidates)} examples, not {per_class}")
        drawn[rng.choice(candidates, per_class, replace=False)] = True
    return _rows_of(examples, np.flatnonzero(drawn)), _rows_of(examples, np.flatnonzero(~drawn))


def name(source: Path | str) -> str:
    """What the examples of a source are called: the last part of its path."""
    if "://" in str(source):
        return posixpath.basename(str(source).rstrip("/"))
    return Path(source).resolve().name


def part(examples: Examples, first: int, end: int | None = None) -> Examples:
    """The examples from one number up to another, which is not among them.

    Args:
        examples: What they are taken from.
        first: The first.
        end: Behind the last; all the rest by default.
    """
    return jax.tree.map(lambda array: array[first:end], examples)


def resized(examples: Examples, side: int) -> Examples:
    """The examples with their images as squares of three channels, in bytes: a quarter of the memory.

    Args:
        examples: Their images are numbers of 0 to 1, of one channel or three.
        side: Of the squares, in pixels.
    """
    pixels = np.round(255 * np.asarray(examples.inputs)).astype(np.uint8)
    pixels = np.repeat(pixels, 3 // pixels.shape[-1], axis=-1)
    images = [
        np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in pixels
    ]
    return examples._replace(inputs=np.stack(images))


def as_numbers(images: jax.Array | np.ndarray) -> jax.Array:
    """Images as float32 in 0 to 1, of bytes in 0 to 255 too."""
    array = jnp.asarray(images)
    return array.astype(jnp.float32) / 255 if array.dtype == jnp.uint8 else array


def _rows_of(examples: Examples, indices: np.ndarray) -> Examples:
    return jax.tree.map(lambda array: np.asarray(array)[indices], examples)
