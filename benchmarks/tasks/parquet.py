"""Images, texts and captioned images of Parquet files, from a folder or from what fsspec opens."""

import contextlib
import fnmatch
import io
import itertools
import json
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from PIL import Image

from benchmarks.kit.files import UserError
from benchmarks.tasks.data import Examples

_IMAGE = ("img", "image")  # what the column of images may be called

Rows = list[tuple[str, tuple[str, ...]]]  # what to call each in a message, and its strings


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


class Captioned(NamedTuple):
    """Images and what is said of each.

    Attributes:
        images: Of shape (n, height, width, channels), in 0 to 255.
        captions: Equally many of each.
    """

    images: np.ndarray
    captions: list[tuple[str, ...]]


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


def load_captioned(source: Path | str) -> tuple[Captioned, Captioned]:
    """Captioned images from the Parquet files of a source, those of the split train and those of test.

    They have a column `img` (or `image`) as for `load_images`, and a column `captions` of lists of strings,
    equally many in each row, or `caption` of strings.

    Args:
        source: Where the files are, as for `load_images`.

    Returns:
        Both parts, the images decoded.

    Raises:
        UserError: Something is missing or cannot be read: the folder, a split, a column, an image, a caption.
    """
    files = _files(source)
    train, test = (_captioned(of) for of in (_of_split(files, "train"), _test_files(files)))
    for what, one, other in (
        ("images of shape", train.images.shape[1:], test.images.shape[1:]),
        ("as many captions of an image as", len(train.captions[0]), len(test.captions[0])),
    ):
        if one != other:
            raise UserError(f"{source}: train has {what} {one}, test {other}")
    return train, test


def load_columns(source: Path | str, columns: tuple[str, ...]) -> tuple[Rows, Rows]:
    """The strings of some columns of a source's splits train and test.

    Args:
        source: As for images.
        columns: Those of each row.

    Returns:
        Of each row of the split train, and of the split test, what to call it in a message, and its strings.

    Raises:
        UserError: Something is missing or cannot be read: the folder, a split, a column, a string.
    """
    files = _files(source)
    train, test = (
        list(itertools.chain.from_iterable(_strings(file, columns) for file in part))
        for part in (_of_split(files, "train"), _test_files(files))
    )
    return train, test


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


def _strings(file: _File, columns: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for where, *texts in _rows(file, *((name,) for name in columns)):
        for name, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise UserError(f"{where}: expected a string as {name}, got {type(text).__name__}")
        yield where, tuple(texts)


def _images(files: list[_File], number: int | None) -> Examples:
    """The first images of some files, decoded."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for where, content, label in _labelled(files, _IMAGE, number):
        images.append(_decode(where, content, images))
        labels.append(label)
    return Examples(np.stack(images).astype(np.float32) / 255, np.array(labels, np.int32))


def _captioned(files: list[_File]) -> Captioned:
    """The images of some files, decoded, with their captions."""
    images: list[np.ndarray] = []
    captions: list[tuple[str, ...]] = []
    for file in files:
        for where, content, told in _rows(file, _IMAGE, ("captions", "caption")):
            images.append(_decode(where, content, images))
            captions.append(_captions(where, told, captions))
    if not images:
        raise UserError(f"{files[0].name}: no rows")
    return Captioned(np.stack(images), captions)


def _captions(where: str, told: Any, before: list[tuple[str, ...]]) -> tuple[str, ...]:
    """What a row says of its image, as often as the rows before it."""
    captions = tuple(told) if isinstance(told, list) else (told,)
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"{where}: expected a caption that is not empty, got {caption!r}")
    number = len(before[0]) if before else max(1, len(captions))
    if len(captions) != number:
        raise UserError(f"{where}: expected {number} captions, got {len(captions)}")
    return captions


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
    rows = itertools.chain.from_iterable(_rows(file, columns, ("label",)) for file in files)
    empty = True
    for where, content, label in itertools.islice(rows, number):
        if not isinstance(label, int) or label not in range(2**31):
            hidden = " (the hub's SST-2 hides those of its split test)" if label == -1 else ""
            raise UserError(f"{where}: expected a label of 0, 1, ..., got {label!r}{hidden}")
        empty = False
        yield where, content, label
    if empty:
        raise UserError(f"{files[0].name}: no rows")


def _rows(file: _File, *wanted: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Of each row what to call it, and what is in the columns that are wanted, each by one of some names.

    No more is read than asked for.
    """
    with file.read() as opened:
        names = opened.schema_arrow.names
        columns = [next((name for name in known if name in names), known[0]) for known in wanted]
        if missing := [name for name in columns if name not in names]:
            raise UserError(f"{file.name}: no column {' and '.join(missing)}, only {', '.join(names)}")
        number = itertools.count()
        for batch in opened.iter_batches(batch_size=1000, columns=columns):
            for row in batch.to_pylist():
                yield f"{file.name}, row {next(number)}", *(row[name] for name in columns)


def _class_names(file: _File) -> tuple[str, ...]:
    with file.read() as opened:
        metadata = opened.schema_arrow.metadata or {}
        if names := metadata.get(b"class_names", b"").decode():
            return tuple(names.split(","))
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return tuple(features.get("label", {}).get("names", ()))


def _decode(where: str, content: Any, before: list[np.ndarray]) -> np.ndarray:
    """The image, of shape (height, width, channels), which is that of the images before it."""
    if isinstance(content, dict):
        content = content.get("bytes")
    if not isinstance(content, bytes):
        raise UserError(f"{where}: expected the bytes of an image, got {type(content).__name__}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB"))
    except Exception as error:  # a decoder raises whatever it stumbles over
        raise UserError(f"{where}: cannot decode the image: {_first_line(error)}") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if before and pixels.shape != before[0].shape:
        raise UserError(f"{where}: expected an image of shape {before[0].shape}, got {pixels.shape}")
    return pixels


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
