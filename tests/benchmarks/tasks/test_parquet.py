"""Images and texts of Parquet files, from folders and a hub."""

import functools
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image

from benchmarks.kit.files import UserError
from benchmarks.tasks import parquet


class Hub(MemoryFileSystem):
    """What `hf://` means in a test: files in memory, and a network that may fail."""

    protocol = "hf"
    store = {}  # noqa: RUF012
    failure = None

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("hf://").strip("/")

    def ls(self, path, detail=True, **kwargs):
        if self.failure:
            raise self.failure
        return super().ls(path, detail, **kwargs)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setitem(_registry, "hf", Hub)
    monkeypatch.setattr(Hub, "store", {})
    monkeypatch.setattr(Hub, "pseudo_dirs", [""])
    return Hub()


def as_parquet(columns, metadata=None):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)


IMAGES = {"image": [{"bytes": encoded(image), "path": None} for image in PIXELS], "label": [2, 0, 1]}


TEXTS = {"sentence": ["a fine film", "dull", "", "naïve"], "label": [1, 0, 0, 1]}


HUB_FEATURES = {"info": {"features": {"label": {"names": ["negative", "positive"], "_type": "ClassLabel"}}}}


def write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.mark.parametrize("place", ["", "data/", "plain_text/"])
@pytest.mark.parametrize("suffix", ["", "-00000-of-00001"])
def test_images_of_the_hub_are_those_of_a_folder(place, suffix, hub, tmp_path):
    files = {f"{place}{split}{suffix}.parquet": as_parquet(IMAGES) for split in ("train", "test")}
    write(tmp_path, files)
    for name, content in files.items():
        hub.pipe(f"hf://datasets/owner/set/{name}", content)
    sources = (tmp_path, str(tmp_path), f"{tmp_path}/", "hf://datasets/owner/set")
    for loaded in (parquet.load_images(source, num_test=2) for source in sources):
        np.testing.assert_allclose(loaded.train.inputs, PIXELS[..., None] / 255, rtol=1e-6)
        np.testing.assert_array_equal(loaded.train.labels, IMAGES["label"])
        assert len(loaded.test.labels) == 2


def test_the_folder_and_its_data_come_first_and_among_others_one_is_to_be_named(hub):
    for number, name in enumerate(["sst2", "cola"]):
        for split in ("train", "validation", "test"):
            content = as_parquet({"sentence": ["yes"], "label": [number]})
            hub.pipe(f"hf://datasets/glue/{name}/{split}-00000.parquet", content)
    with pytest.raises(UserError, match=r"name one of hf://datasets/glue/cola, hf://datasets/glue/sst2"):
        parquet.load_text("hf://datasets/glue")
    for number, name in enumerate(["sst2", "cola"]):
        assert parquet.load_text(f"hf://datasets/glue/{name}").train.labels == [number]
    for number, place in [(2, "data/"), (3, "")]:
        for split in ("train", "validation", "test"):
            content = as_parquet({"sentence": ["yes"], "label": [number]})
            hub.pipe(f"hf://datasets/glue/{place}{split}.parquet", content)
        assert parquet.load_text("hf://datasets/glue").train.labels == [number]


def test_all_splits_are_of_one_place(tmp_path):
    names = ("train.parquet", "test.parquet", "other/validation.parquet", "data/train.parquet")
    write(tmp_path, dict.fromkeys(names, as_parquet(TEXTS)))
    assert parquet.load_text(tmp_path).validation is None
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(UserError, match=rf"^no test\*\.parquet in {tmp_path}/data$"):
        parquet.load_text(tmp_path)


@pytest.mark.parametrize("load", [parquet.load_images, parquet.load_text])
@pytest.mark.parametrize("failure", [OSError("no route\nto host"), RuntimeError("no route\nto host")])
def test_a_hub_out_of_reach_is_told_in_one_line(failure, load, hub, monkeypatch):
    monkeypatch.setattr(Hub, "failure", failure)
    with pytest.raises(UserError, match=r"^cannot read hf://datasets/owner/set: no route$"):
        load("hf://datasets/owner/set")
    monkeypatch.setattr(Hub, "failure", None)
    with pytest.raises(UserError, match=r"^no folder hf://datasets/owner/set$"):
        load("hf://datasets/owner/set")


def test_a_file_of_the_hub_is_named_as_the_source_is(hub):
    hub.pipe("hf://datasets/owner/set/data/train.parquet", as_parquet(TEXTS))
    hub.pipe("hf://datasets/owner/set/data/test.parquet", as_parquet(TEXTS | {"label": [0, 1, -1, 0]}))
    with pytest.raises(UserError, match=r"^hf://datasets/owner/set/data/test\.parquet, row 2: "):
        parquet.load_text("hf://datasets/owner/set")


def test_unknown_protocols_are_told_in_one_line():
    with pytest.raises(UserError, match=r"^cannot read ftpx://a/b: Protocol not known: ftpx"):
        parquet.load_images("ftpx://a/b")


def images(pixels, labels, **options):
    return as_parquet({"img": [encoded(image, **options) for image in pixels], "label": labels})


def test_images_are_read_as_they_were_written(tmp_path):
    columns = {"img": [encoded(image) for image in PIXELS], "label": [1, 0, 1]}
    content = as_parquet(columns, {"class_names": "shirt,shoe"})
    write(tmp_path, {"train.parquet": content, "test.parquet": content})
    loaded = parquet.load_images(tmp_path)
    assert loaded.class_names == ("shirt", "shoe")
    for part in (loaded.train, loaded.test):
        assert (part.inputs.dtype, part.labels.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(part.labels, [1, 0, 1])
        np.testing.assert_allclose(part.inputs, PIXELS[..., None] / 255, rtol=1e-6)


def test_only_the_rows_asked_for_are_decoded(tmp_path):
    broken = {"img": [*(encoded(image) for image in PIXELS), b"broken"], "label": [0, 0, 0, 0]}
    write(tmp_path, {"train.parquet": as_parquet(broken), "test.parquet": images(PIXELS, [0, 0, 0])})
    loaded = parquet.load_images(tmp_path, 3, 2)
    assert [len(part.labels) for part in (loaded.train, loaded.test)] == [3, 2]
    with pytest.raises(UserError, match=r"train\.parquet, row 3: cannot decode"):
        parquet.load_images(tmp_path, 4)


def test_parts_follow_their_names(tmp_path):
    colours = np.random.default_rng(1).integers(0, 256, (5, 4, 4, 3), np.uint8)
    parts = {
        "train-00001-of-00002.parquet": images(colours[3:], [3, 4]),
        "train-00000-of-00002.parquet": images(colours[:3], [0, 1, 2]),
        "test-00000-of-00001.parquet": images(colours[:1], [0]),
    }
    loaded = parquet.load_images(write(tmp_path, parts))
    assert loaded.class_names == ()
    np.testing.assert_array_equal(loaded.train.labels, np.arange(5))
    np.testing.assert_allclose(loaded.train.inputs, colours / 255, rtol=1e-6)


def test_jpegs_come_near(tmp_path):
    content = images(np.full((3, 8, 8, 3), 100, np.uint8), [0, 1, 2], kind="JPEG")
    write(tmp_path, {"train.parquet": content, "test.parquet": content})
    np.testing.assert_allclose(parquet.load_images(tmp_path).train.inputs, 100 / 255, atol=0.01)


GOOD = encoded(PIXELS[0])


@pytest.mark.parametrize(
    ("contents", "labels", "message"),
    [
        ([GOOD, b"\x89PNG but no more"], [0, 1], r"row 1: cannot decode the image: "),
        ([GOOD, GOOD[:60]], [0, 1], r"row 1: cannot decode the image: "),
        ([GOOD, None], [0, 1], r"row 1: expected the bytes of an image, got NoneType"),
        ([{"bytes": None, "path": "a.png"}], [0], r"row 0: expected the bytes of an image, got NoneType"),
        (["a.png"], [0], r"row 0: expected the bytes of an image, got str"),
        (
            [GOOD, encoded(PIXELS[0, :, :4])],
            [0, 1],
            r"row 1: expected an image of shape \(4, 5, 1\), got \(4, 4, 1\)",
        ),
        ([GOOD], ["shoe"], r"row 0: expected a label of 0, 1, \.\.\., got 'shoe'"),
        ([GOOD], [None], r"row 0: expected a label of 0, 1, \.\.\., got None"),
    ],
)
def test_files_that_hold_no_images_are_told_in_one_line(contents, labels, message, tmp_path):
    test = as_parquet({"img": contents, "label": labels})
    write(tmp_path, {"train.parquet": images(PIXELS, [0, 1, 2]), "test.parquet": test})
    with pytest.raises(UserError, match=rf"^{tmp_path}/test\.parquet, {message}") as raised:
        parquet.load_images(tmp_path)
    assert "\n" not in str(raised.value)


def test_missing_files_are_told_in_one_line(tmp_path):
    write(tmp_path, {"test.parquet": images(PIXELS, [0, 1, 2])})
    fails = functools.partial(pytest.raises, UserError)
    with fails(match=rf"^no train\*\.parquet in {tmp_path}, its folder data or another one there$"):
        parquet.load_images(tmp_path)
    write(tmp_path, {"train.parquet": as_parquet({"pixels": [1], "label": [0]})})
    with fails(match=r"train\.parquet: no column img, only pixels, label$"):
        parquet.load_images(tmp_path)
    write(tmp_path, {"train.parquet": b"PAR1 or anything else"})
    with fails(match=r"^cannot read .*train\.parquet: ") as raised:
        parquet.load_images(tmp_path)
    assert "\n" not in str(raised.value)


def test_splits_of_different_shapes_are_told(tmp_path):
    small = images(PIXELS[:, :3, :3], [0, 1, 2])
    write(tmp_path, {"train.parquet": images(PIXELS, [0, 1, 2]), "test.parquet": small})
    with pytest.raises(UserError, match=r"train has images of shape \(4, 5, 1\), test of \(3, 3, 1\)"):
        parquet.load_images(tmp_path)


@pytest.mark.parametrize("column", ["sentence", "text"])
def test_texts_are_read_as_they_were_written(column, tmp_path):
    columns = {column: TEXTS["sentence"], "label": TEXTS["label"], "idx": [0, 1, 2, 3]}
    write(tmp_path, {f"{split}.parquet": as_parquet(columns) for split in ("train", "validation", "test")})
    loaded = parquet.load_text(tmp_path, num_train=3, num_validation=0)
    assert loaded.train.inputs == TEXTS["sentence"][:3]
    assert loaded.test.inputs == TEXTS["sentence"]
    assert loaded.train.labels.dtype == np.int32
    np.testing.assert_array_equal(loaded.test.labels, TEXTS["label"])
    assert loaded.validation.inputs == []
    assert loaded.validation.labels.shape == (0,)
    assert loaded.class_names == ()


@pytest.mark.parametrize(
    "metadata",
    [{"class_names": "negative,positive"}, {"huggingface": json.dumps(HUB_FEATURES)}],
)
def test_class_names_are_found_where_folders_and_hubs_have_them(metadata, tmp_path):
    write(tmp_path, {f"{split}.parquet": as_parquet(TEXTS, metadata) for split in ("train", "test")})
    loaded = parquet.load_text(tmp_path)
    assert loaded.class_names == ("negative", "positive")
    assert loaded.validation is None


def test_a_test_split_that_is_not_asked_for_is_not_read(tmp_path):
    write(tmp_path, {"train.parquet": as_parquet(TEXTS), "test.parquet": b"broken"})
    assert parquet.load_text(tmp_path, num_test=0).test.inputs == []
    with pytest.raises(UserError, match=r"cannot read .*test\.parquet"):
        parquet.load_text(tmp_path)
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(UserError, match=r"no test\*\.parquet in "):
        parquet.load_text(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": ["a", None], "label": [0, 1]}, r", row 1: expected a string, got NoneType"),
        ({"text": [3], "label": [0]}, r", row 0: expected a string, got int"),
        ({"sentence": ["a"], "label": [2**31]}, r", row 0: expected a label of 0, 1, \.\.\., got 2147483648"),
        ({"sentence": ["a"], "label": [0.0]}, r", row 0: expected a label of 0, 1, \.\.\., got 0\.0"),
        (
            {"sentence": ["a"], "label": [-1]},
            r", row 0: .* got -1 \(the hub's SST-2 hides those of its split",
        ),
        ({"sentence": ["a"]}, r": no column label, only sentence"),
        ({"question": ["a"]}, r": no column sentence and label, only question"),
        ({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, r": no rows"),
    ],
)
def test_files_that_hold_no_texts_are_told_in_one_line(columns, message, tmp_path):
    write(tmp_path, {"train.parquet": as_parquet(TEXTS), "validation.parquet": as_parquet(columns)})
    with pytest.raises(UserError, match=rf"^{tmp_path}/validation\.parquet{message}") as raised:
        parquet.load_text(tmp_path, num_test=0)
    assert "\n" not in str(raised.value)
