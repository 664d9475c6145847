"""Files of networks' states, made here byte by byte, and read by PyTorch too where it is installed."""

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kit.files import UserError
from benchmarks.tasks import pytorch_file
from benchmarks.tasks.pytorch_file import MAGIC, PROTOCOL, STORAGES


class Storage:
    """What a pickle refers to."""

    def __init__(self, kind, key, numbers):
        self.kind, self.key, self.numbers = kind, key, np.asarray(numbers, STORAGES[kind])


class Tensor:
    """A view of a storage, pickled as PyTorch does it."""

    def __init__(self, storage, shape, strides, offset=0):
        self.arguments = (storage, offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


@pytest.fixture
def pickled(monkeypatch):
    """`pickled(object, legacy)`, with names of PyTorch's in it."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in STORAGES:
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))
    exec("def _rebuild_tensor_v2(*_): pass", utils.__dict__)  # noqa: S102  # of that module's name
    utils._rebuild_tensor_v2.__module__ = "torch._utils"
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def dump(content, *, legacy):
        class Pickler(pickle.Pickler):
            def persistent_id(self, item):
                if not isinstance(item, Storage):
                    return None
                view = (None,) if legacy else ()
                return ("storage", getattr(torch, item.kind), item.key, "cpu", len(item.numbers), *view)

        stream = io.BytesIO()
        Pickler(stream, 2).dump(content)
        return stream.getvalue()

    return dump


@pytest.fixture
def in_one_stream(pickled):
    def made(state, *storages, little_endian=True, protocol=PROTOCOL):
        system = {"protocol_version": protocol, "little_endian": little_endian}
        keys = [each.key for each in storages]
        parts = [pickled(item, legacy=True) for item in (MAGIC, protocol, system, state, keys)]
        return b"".join(parts) + b"".join(
            struct.pack("<q", len(each.numbers)) + each.numbers.tobytes() for each in storages
        )

    return made


@pytest.fixture
def zipped(pickled):
    def made(state, *storages, byteorder="little"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("net/data.pkl", pickled(state, legacy=False))
            archive.writestr("net/byteorder", byteorder)
            for each in storages:
                archive.writestr(f"net/data/{each.key}", each.numbers.tobytes())
        return stream.getvalue()

    return made


@pytest.fixture(params=["in_one_stream", "zipped"])
def written(request, tmp_path):
    """`written(state, *storages)` is a file."""
    made = request.getfixturevalue(request.param)

    def write(*arguments, **options):
        path = tmp_path / "net.pth"
        path.write_bytes(made(*arguments, **options))
        return path

    return write


def test_tensors_are_views_of_storages(written):
    numbers = np.random.default_rng(0).standard_normal(24).astype(np.float32)
    shared, count = Storage("FloatStorage", "7", numbers), Storage("LongStorage", "8", [2**40])
    state = collections.OrderedDict(
        plain=Tensor(shared, (2, 3, 4), (12, 4, 1)),
        turned=Tensor(shared, (3, 2), (1, 4), offset=5),
        scalar=Tensor(count, (), ()),
        empty=Tensor(shared, (0, 3), (3, 1)),
    )
    arrays = pytorch_file.load(written(state, shared, count))
    assert list(arrays) == list(state)
    np.testing.assert_array_equal(arrays["plain"], numbers.reshape(2, 3, 4))
    np.testing.assert_array_equal(
        arrays["turned"], [[numbers[5 + i + 4 * j] for j in (0, 1)] for i in range(3)]
    )
    assert arrays["scalar"] == 2**40
    assert arrays["empty"].shape == (0, 3)
    assert [array.dtype for array in arrays.values()] == [np.float32, np.float32, np.int64, np.float32]
    assert all(array.flags.c_contiguous for array in arrays.values())


@pytest.mark.parametrize("kind", STORAGES)
def test_every_type_of_number(kind, written):
    storage = Storage(kind, "0", [0, 1, 1, 0])
    (array,) = pytorch_file.load(written({"x": Tensor(storage, (4,), (1,))}, storage)).values()
    assert array.dtype == STORAGES[kind]
    np.testing.assert_array_equal(array.astype(np.float32), [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (((5,), (1,)), "has 4 numbers for x, too few for its shape (5,)"),
        (((2, 2), (3, 1)), "has 4 numbers for x, too few for its shape (2, 2)"),
        (((2,), (1,), 3), "has 4 numbers for x, too few for its shape (2,)"),
        (((2,), (-1,), 1), "has 4 numbers for x, too few for its shape (2,)"),
        (((2,), (1,), -1), "has 4 numbers for x, too few for its shape (2,)"),
    ],
)
def test_a_tensor_beyond_its_storage(tensor, told, written):
    storage = Storage("FloatStorage", "0", np.ones(4))
    fails(written({"x": Tensor(storage, *tensor)}, storage), told)


def test_what_is_no_state(written):
    storage = Storage("FloatStorage", "0", np.ones(4))
    tensor = Tensor(storage, (4,), (1,))
    fails(written({"state_dict": {"x": tensor}}, storage), "has under 'state_dict' no tensor but a dict")
    fails(written({3: tensor}, storage), "has under 3 no tensor but a _Tensor")
    fails(written({"epoch": 3}), "has under 'epoch' no tensor but a int")
    fails(written([1, 2]), "holds no dictionary of tensors but a list")


def test_nothing_else_is_called(written, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    fails(written({"x": Harmful()}), f"holds a {os.mkdir.__module__}.mkdir, and only tensors are read")
    fails(written({"x": np.dtype("f4")}), "holds a numpy.dtype, and only tensors are read")
    assert not (tmp_path / "made").exists()


def test_another_order_of_bytes(tmp_path, in_one_stream, zipped):
    for content in (in_one_stream({}, little_endian=False), zipped({}, byteorder="big")):
        (tmp_path / "net.pth").write_bytes(content)
        fails(tmp_path / "net.pth", "holds numbers whose first byte is the largest")


def test_a_file_cut_short(written):
    storage = Storage("FloatStorage", "0", np.ones(100))
    path = written({"x": Tensor(storage, (100,), (1,))}, storage)
    content = path.read_bytes()
    for length in (0, 1, 20, 60, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        fails(path, "is no file that torch.save wrote")


def test_files_of_other_kinds(tmp_path, in_one_stream):
    path = tmp_path / "net.pth"
    for content in (b"", b"\x89PNG\r\n", b"weights", pickle.dumps(3), in_one_stream({}, protocol=1000)):
        path.write_bytes(content)
        fails(path, "is no file that torch.save wrote")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b")
    fails(path, "is a zip archive without the data.pkl of a network's state")
    path.unlink()
    with pytest.raises(UserError, match=r"^cannot read .*net\.pth: No such file"):
        pytorch_file.load(path)


def test_what_pytorch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    state = layers.state_dict() | {"half": torch.ones(3, dtype=torch.bfloat16), "t": torch.rand(3, 4).T[1:]}
    state["parameter"] = layers[0].weight
    for zipped in (True, False):
        torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
        arrays = pytorch_file.load(tmp_path / "net.pth")
        assert list(arrays) == list(state)
        for name, tensor in state.items():
            assert arrays[name].shape == tuple(tensor.shape)
            expected = tensor.detach().float().numpy()
            np.testing.assert_array_equal(arrays[name].astype(np.float32), expected)
        assert arrays["half"].dtype == jnp.bfloat16


def fails(path, told):
    with pytest.raises(UserError) as caught:
        pytorch_file.load(path)
    line = str(caught.value)
    assert line.startswith(f"{path} {told}")
    assert "\n" not in line
