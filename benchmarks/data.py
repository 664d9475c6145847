"""The images to train on: the 1,797 digits of 8x8 pixels that scikit-learn ships, or Parquet files."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn import datasets

from benchmarks.files import UserError

NUM_TEST = 1000


class Examples(NamedTuple):
    """Inputs, such as images, float32 of shape (n, height, width, channels) in 0 to 1; labels, int32 (n,)."""

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


class ImageSet(NamedTuple):
    """Images from files.

    Attributes:
        train: Those of the split train.
        test: Those of the split test.
        class_names: In the order of the labels; empty if the files do not tell.
    """

    train: Examples
    test: Examples
    class_names: tuple[str, ...]


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
    images, labels = np.asarray(examples.inputs), np.asarray(examples.labels)
    while True:
        order = rng.permutation(len(labels))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[first : first + batch_size]
            yield Examples(images[chosen], labels[chosen])


def load_images(folder: Path, num_train: int | None = None, num_test: int | None = None) -> ImageSet:
    """Images from the Parquet files of a folder, `train*.parquet` and `test*.parquet`, there or in `data`.

    They have a column `img` (or `image`) with the bytes of PNG or JPEG files, or with structs of which these
    are the field `bytes`, and a column `label` of whole numbers. The schema's metadata may have
    `class_names`, separated by commas. Grey images get one channel, others three.

    Args:
        folder: Where the files are.
        num_train: How many images to take of the split train, from the first on; all by default.
        num_test: How many of the split test.

    Raises:
        UserError: Something is missing or cannot be read: the folder, a split, a column, an image.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    train_files, test_files = (_split_files(folder, split) for split in ("train", "test"))
    train, test = _read(train_files, num_train), _read(test_files, num_test)
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        shapes = (part.inputs.shape[1:] for part in (train, test))
        raise UserError("{}: train has images of shape {}, test of {}".format(folder, *shapes))
    return ImageSet(train, test, _class_names(train_files[0]))


def _split_files(folder: Path, split: str) -> list[Path]:
    for place in (folder, folder / "data"):
        if files := sorted(place.glob(f"{split}*.parquet")):
            return files
    raise UserError(f"no {split}*.parquet in {folder} or {folder / 'data'}")


def _read(files: list[Path], number: int | None) -> Examples:
    """The first images of some files, decoded."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    rows = itertools.chain.from_iterable(_rows(path) for path in files)
    for where, content, label in itertools.islice(rows, number):
        image = _decode(where, content)
        if images and image.shape != images[0].shape:
            raise UserError(f"{where}: expected an image of shape {images[0].shape}, got {image.shape}")
        if not isinstance(label, int) or label < 0:
            raise UserError(f"{where}: expected a label of 0, 1, ..., got {label!r}")
        images.append(image)
        labels.append(label)
    if not images:
        raise UserError(f"{files[0]}: no rows")
    return Examples(np.stack(images), np.array(labels, np.int32))


def _rows(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Of each row what to call it in a message, the image and the label; no more is read than asked for."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            image = "image" if "image" in names and "img" not in names else "img"
            if missing := [name for name in (image, "label") if name not in names]:
                raise UserError(f"{path}: no column {' and '.join(missing)}, only {', '.join(names)}")
            number = itertools.count()
            for batch in file.iter_batches(batch_size=1000, columns=[image, "label"]):
                for row in batch.to_pylist():
                    yield f"{path}, row {next(number)}", row[image], row["label"]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {_first_line(error)}") from error


def _decode(where: str, content: Any) -> np.ndarray:
    """The image, of shape (height, width, channels)."""
    if isinstance(content, dict):
        content = content.get("bytes")
    if not isinstance(content, bytes):
        raise UserError(f"{where}: expected the bytes of an image, got {type(content).__name__}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB"))
    except Exception as error:  # a decoder raises whatever it stumbles over
        raise UserError(f"{where}: cannot decode the image: {_first_line(error)}") from error
    return pixels.reshape(*pixels.shape[:2], -1).astype(np.float32) / 255


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _class_names(path: Path) -> tuple[str, ...]:
    names = (pq.read_schema(path).metadata or {}).get(b"class_names", b"").decode()
    return tuple(names.split(",")) if names else ()
