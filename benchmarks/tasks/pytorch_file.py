"""Arrays from files that `torch.save` wrote of a network's state, read without PyTorch."""

import collections
import io
import pickle  # see _Unpickler
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.kit.files import UserError, read_file

# A file of the years before PyTorch 1.6 begins with pickles of these two numbers.
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, by their names.

    Args:
        path: A file that has a dictionary of tensors, in either format of `torch.save`.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    content = read_file(path)
    try:
        zipped = zipfile.is_zipfile(io.BytesIO(content))
        return _arrays(*(_zipped if zipped else _in_one_stream)(content))
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except Exception as error:  # a pickle that is damaged raises whatever it stumbles over
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is no file that torch.save wrote of a network's state: {told}") from error


class _Storage(NamedTuple):
    """Numbers in a row that tensors are views of.

    Attributes:
        key: What the file calls it.
        dtype: Of its numbers.
        size: How many it has.
    """

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count its numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# The numbers of a storage.
_Storages = Callable[[_Storage], np.ndarray]


class _Unpickler(pickle.Unpickler):
    """Makes dictionaries, numbers, text and tensors, and calls nothing that a file could misuse."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self._parameter
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise UserError(f"holds a {module}.{name}, and only tensors are read")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise UserError(f"holds a {kind} that is no storage of numbers")
        return self.storages.setdefault(key, _Storage(key, dtype, size))

    @staticmethod
    def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    @staticmethod
    def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
        return tensor


def _zipped(content: bytes) -> tuple[Any, _Storages]:
    """The state, and its storages, each a file of the archive."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError("is a zip archive without the data.pkl of a network's state")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise UserError("holds numbers whose first byte is the largest")

    def numbers(storage: _Storage) -> np.ndarray:
        return np.frombuffer(archive.read(f"{folder}data/{storage.key}"), _little(storage), storage.size)

    return _Unpickler(io.BytesIO(archive.read(pickles[0]))).load(), numbers


def _in_one_stream(content: bytes) -> tuple[Any, _Storages]:
    """The state, and its storages, which follow the pickles: their keys first, then a count and numbers."""
    file = io.BytesIO(content)
    for expected in (MAGIC, PROTOCOL):
        if _Unpickler(file).load() != expected:
            raise UserError("is no file that torch.save wrote")
    if not _Unpickler(file).load()["little_endian"]:
        raise UserError("holds numbers whose first byte is the largest")
    unpickler = _Unpickler(file)
    state = unpickler.load()
    found = dict(_read(file, _Unpickler(file).load(), unpickler.storages))
    return state, lambda storage: found[storage.key]


def _read(
    file: io.BytesIO, keys: list[str], storages: dict[str, _Storage]
) -> Iterator[tuple[str, np.ndarray]]:
    for key in keys:
        if key not in storages:
            raise UserError(f"holds the numbers {key}, which belong to no tensor")
        (size,) = np.frombuffer(file.read(8), "<i8")
        if size != storages[key].size:
            raise UserError(f"has {size} numbers where a tensor needs {storages[key].size}")
        dtype = _little(storages[key])
        yield key, np.frombuffer(file.read(size * dtype.itemsize), dtype, size)


def _little(storage: _Storage) -> np.dtype:
    return storage.dtype.newbyteorder("<")


def _arrays(state: Any, storages: _Storages) -> dict[str, np.ndarray]:
    if not isinstance(state, dict):
        raise UserError(f"holds no dictionary of tensors but a {type(state).__name__}")
    return {name: _array(name, item, storages) for name, item in state.items()}


def _array(name: Any, item: Any, storages: _Storages) -> np.ndarray:
    if not isinstance(item, _Tensor) or not isinstance(name, str):
        raise UserError(f"has under {name!r} no tensor but a {type(item).__name__}")
    numbers, sizes = storages(item.storage), (*item.shape, *item.strides, item.offset)
    last = item.offset + sum((length - 1) * step for length, step in zip(*item[2:], strict=True))
    if min(sizes) < 0 or (0 not in item.shape and last >= len(numbers)):
        raise UserError(f"has {len(numbers)} numbers for {name}, too few for its shape {item.shape}")
    bytes_apart = [step * numbers.itemsize for step in item.strides]
    view = np.lib.stride_tricks.as_strided(numbers[item.offset :], item.shape, bytes_apart, writeable=False)
    return np.array(view, item.storage.dtype, order="C")
