"""The examples to train on: 1,797 digits of 8x8 pixels that scikit-learn ships, or those of Parquet files."""

import contextlib
import fnmatch
import io
import itertools
import json
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
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
        inputs: Images, float32 of shape (n, height, width, channels) in 0 to 1, or what else a network takes:
            an array, or a pytree of arrays, with one row for each example.
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


class TextSet(NamedTuple):
    """Texts from files; the inputs of each part are a list of strings.

    Attributes:
        train: Those of the split train.
        validation: Those of the split validation, None if there is none.
        test: Those of the split test.
        class_names: In the order of the labels; empty if the files do not tell.
    """

    train: Examples
    validation: Examples | None
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


def _rows_of(examples: Examples, indices: np.ndarray) -> Examples:
    return jax.tree.map(lambda array: np.asarray(array)[indices], examples)


def load_images(source: Path | str, num_train: int | None = None, num_test: int | None = None) -> ImageSet:
    """Images from the Parquet files of a source, `train*.parquet` and `test*.parquet`.

    They have a column `img` (or `image`) with the bytes of PNG or JPEG files, or with structs of which these
    are the field `bytes`, and a column `label` of whole numbers. The schema's metadata may have
    `class_names`, separated by commas, or what the hub's files have. Grey images get one channel, others
    three.

    Args:
        source: A folder, or a data set of the Hugging Face hub: `hf://datasets/owner/name`, or a folder of
            it. The files are there, in its folder `data`, or in the one other folder there that has some.
        num_train: How many images to take of the split train, from the first on; all by default.
        num_test: How many of the split test.

    Returns:
        The images, decoded.

    Raises:
        UserError: Something is missing or cannot be read: the folder, a split, a column, an image.
    """
    files = _files(source)
    train_files, test_files = _of_split(files, "train"), _test_files(files)
    train, test = _images(train_files, num_train), _images(test_files, num_test)
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        shapes = (part.inputs.shape[1:] for part in (train, test))
        raise UserError("{}: train has images of shape {}, test of {}".format(source, *shapes))
    return ImageSet(train, test, _class_names(train_files[0]))


def load_text(
    source: Path | str,
    num_train: int | None = None,
    num_validation: int | None = None,
    num_test: int | None = None,
) -> TextSet:
    """Texts from the Parquet files of a source; there may be `validation*.parquet` as well.

    They have a column `sentence` (or `text`) of strings and a column `label` of whole numbers.

    Args:
        source: Where the files are, as for `load_images`.
        num_train: How many texts to take of the split train, from the first on; all by default.
        num_validation: How many of the split validation.
        num_test: How many of the split test. With 0 its files, which may have no labels, are not read.

    Returns:
        The texts.

    Raises:
        UserError: Something is missing or cannot be read: the folder, a split, a column, a sentence.
    """
    files = _files(source)
    train_files, validation_files = (_of_split(files, split) for split in ("train", "validation"))
    test_files = [] if num_test == 0 else _test_files(files)
    return TextSet(
        _texts(train_files, num_train),
        _texts(validation_files, num_validation) if validation_files else None,
        _texts(test_files, num_test),
        _class_names(train_files[0]),
    )


class _File(NamedTuple):
    """A Parquet file, and what to call it in a message."""

    name: str
    system: fsspec.AbstractFileSystem
    path: str

    @contextlib.contextmanager
    def read(self) -> Iterator[Any]:
        # Imported here, so that the demo can do without it: it is large.
        import pyarrow.parquet as pq  # noqa: PLC0415

        with _readable(self.name), pq.ParquetFile(self.path, filesystem=self.system) as file:
            yield file


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what a hub's client raises is not listed
        raise UserError(f"cannot read {name}: {_first_line(error)}") from error


def _files(source: Path | str) -> list[_File]:
    """The Parquet files in the first place that has some of the split train."""
    name = str(source).rstrip("/")
    with _readable(name):
        system, root = fsspec.url_to_fs(name)

        def files(folder: str) -> list[_File]:
            return [
                _File(name + path.removeprefix(root), system, path) for path, _ in _entries(system, folder)
            ]

        try:
            folders = [path for path, kind in _entries(system, root) if kind == "directory"]
        except FileNotFoundError as error:
            raise UserError(f"no folder {name}") from error
        data = [path for path in folders if posixpath.basename(path) == "data"]
        for places in ([root], data, folders):
            found = [place for place in places if _of_split(files(place), "train")]
            if len(found) > 1:
                several = ", ".join(name + place.removeprefix(root) for place in found)
                raise UserError(f"train*.parquet in several folders, name one of {several}")
            if found:
                return files(found[0])
    raise UserError(f"no train*.parquet in {name}, its folder data or another one there")


def _entries(system: fsspec.AbstractFileSystem, folder: str) -> list[tuple[str, str]]:
    """What is in a folder, by name: paths, and whether each is a file or a directory."""
    entries = ((entry["name"].rstrip("/"), entry["type"]) for entry in system.ls(folder, detail=True))
    return sorted(entry for entry in entries if entry[0] != folder)


def _of_split(files: list[_File], split: str) -> list[_File]:
    return [file for file in files if fnmatch.fnmatch(posixpath.basename(file.path), f"{split}*.parquet")]


def _test_files(files: list[_File]) -> list[_File]:
    if chosen := _of_split(files, "test"):
        return chosen
    raise UserError(f"no test*.parquet in {posixpath.dirname(files[0].name)}")


def _images(files: list[_File], number: int | None) -> Examples:
    """The first images of some files, decoded."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for where, content, label in _labelled(files, ("img", "image"), number):
        image = _decode(where, content)
        if images and image.shape != images[0].shape:
            raise UserError(f"{where}: expected an image of shape {images[0].shape}, got {image.shape}")
        images.append(image)
        labels.append(label)
    return Examples(np.stack(images), np.array(labels, np.int32))


def _texts(files: list[_File], number: int | None) -> Examples:
    """The first texts of some files."""
    if number == 0:
        return Examples([], np.zeros(0, np.int32))
    texts: list[str] = []
    labels: list[int] = []
    for where, text, label in _labelled(files, ("sentence", "text"), number):
        if not isinstance(text, str):
            raise UserError(f"{where}: expected a string, got {type(text).__name__}")
        texts.append(text)
        labels.append(label)
    return Examples(texts, np.array(labels, np.int32))


def _labelled(
    files: list[_File], columns: tuple[str, ...], number: int | None
) -> Iterator[tuple[str, Any, int]]:
    """Of each of the first rows what to call it in a message, its content and its label."""
    rows = itertools.chain.from_iterable(_rows(file, columns) for file in files)
    empty = True
    for where, content, label in itertools.islice(rows, number):
        if not isinstance(label, int) or label not in range(2**31):
            hidden = " (the hub's SST-2 hides those of its split test)" if label == -1 else ""
            raise UserError(f"{where}: expected a label of 0, 1, ..., got {label!r}{hidden}")
        empty = False
        yield where, content, label
    if empty:
        raise UserError(f"{files[0].name}: no rows")


def _rows(file: _File, columns: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Of each row what to call it, the first of the columns that there is, and the label.

    No more is read than asked for.
    """
    with file.read() as opened:
        names = opened.schema_arrow.names
        column = next((name for name in columns if name in names), columns[0])
        if missing := [name for name in (column, "label") if name not in names]:
            raise UserError(f"{file.name}: no column {' and '.join(missing)}, only {', '.join(names)}")
        number = itertools.count()
        for batch in opened.iter_batches(batch_size=1000, columns=[column, "label"]):
            for row in batch.to_pylist():
                yield f"{file.name}, row {next(number)}", row[column], row["label"]


def _class_names(file: _File) -> tuple[str, ...]:
    with file.read() as opened:
        metadata = opened.schema_arrow.metadata or {}
        if names := metadata.get(b"class_names", b"").decode():
            return tuple(names.split(","))
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return tuple(features.get("label", {}).get("names", ()))


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
