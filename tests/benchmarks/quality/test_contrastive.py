"""Contrastive training: the command at small size, what is refused, and what its methods have in common."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import __main__ as cli
from benchmarks.kit import tables
from benchmarks.quality import contrastive
from benchmarks.quality.contrastive import Options
from benchmarks.tasks import parquet

ROOT = Path(__file__).parents[3]
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
TINY = (
    *("--validation-pairs", "6", "--measured-pairs", "12", "--batch-size", "8", "--gradients", "4"),
    *("--vocabulary", "270", "--length", "6", "--seeds", "2", "--rates", "1e-3", "--weight-decays", "0.1"),
    *("--point-products", "4", "--final-products", "4", "--eigenvalue-tol", "0.3"),
)


def encoded(colour, size, rng):
    pixels = np.clip(np.array(colour) + rng.integers(-20, 20, (size, size, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def photographs(number, size=16):
    rng, names = np.random.default_rng(number), list(COLOURS) * number
    return {
        "img": [encoded(COLOURS[name], size, rng) for name in names[:number]],
        "captions": [[f"A {name} wall .", f"something {name}"] for name in names[:number]],
    }


def written(folder, metadata=None, **splits):
    folder.mkdir()
    for split, columns in splits.items():
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def walls(tmp_path):
    return written(tmp_path / "walls", train=photographs(30), test=photographs(9))


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(folder, *words)` is what the command says of it, in one line, and nothing is left behind."""

    def told(folder, *words):
        places = ("--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"))
        assert cli.main(["contrastive", "--data", str(folder), *TINY, *places, *words]) == 2
        line = capsys.readouterr().err
        assert line.startswith("python -m benchmarks contrastive: ")
        assert line.count("\n") == 1
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "work").exists()
        return line

    return told


@pytest.mark.slow
def test_a_comparison_leaves_its_figures(walls, tmp_path, monkeypatch):
    monkeypatch.setattr(contrastive, "WIDTHS", (8, 16))
    monkeypatch.setattr(contrastive, "WIDTH", 16)
    monkeypatch.setattr(contrastive, "STRENGTHS", {"sam": (0.1,), "wp-relative": (0.1,)})
    labelled = {"img": photographs(9, 20)["img"], "label": [0, 1, 2] * 3}
    classes = written(tmp_path / "classes", {"class_names": "red,green,blue"}, train=labelled, test=labelled)
    words = ["--zero-shot", str(classes), "--methods", "wp-relative", "sam", "adam"]
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert cli.main(["contrastive", "--data", str(walls), *TINY, *words, *places]) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        f"contrastive-walls.{kind}" for kind in ("json", "md", "png")
    }
    results = json.loads((out / "contrastive-walls.json").read_text())
    assert results["data"] == {"name": "walls", "train": 12, "validation": 6, "test": 9}
    assert (results["num_pairs"], results["settings"]["zero_shot"]) == (24, "classes")
    assert [(run["method"], run["seed"]) for run in results["runs"]] == [
        (name, seed) for name in ("adam", "sam", "wp-relative") for seed in (0, 1)
    ]
    for run in results["runs"]:
        assert run["evaluations"] == 4
        recalls = [run[f"{way}_{depth}"] for way in contrastive.WAYS for depth in contrastive.DEPTHS]
        assert all(0 <= recall <= 1 for recall in (*recalls, run["zero_shot"]))
        assert recalls[:3] == sorted(recalls[:3])
        assert run["text_to_image_10"] == 1  # of nine
        assert run["largest_eigenvalue"] > 0
    for row in contrastive.rows(results):
        assert len(row) == len(contrastive.HEADERS)
        assert "nan" not in " ".join(row)
    assert (out / "contrastive-walls.md").read_text() == tables.markdown(contrastive, results)
    del results["settings"]["zero_shot"]
    for run in results["runs"]:
        del run["zero_shot"]
    results["settings"]["zero_shot"] = None
    assert {row[6] for row in contrastive.rows(results)} == {"-"}
    assert contrastive.plot(results).startswith(b"\x89PNG")


def test_a_missing_column_is_told(tmp_path, refused):
    columns = photographs(30)
    del columns["captions"]
    folder = written(tmp_path / "walls", train=columns, test=photographs(9))
    assert f"{folder}/train.parquet: no column captions, only img" in refused(folder)


@pytest.mark.parametrize(
    ("captions", "told"),
    [
        (["a", " "], "expected a caption that is not empty, got ' '"),
        (["a", None], "expected a caption that is not empty, got None"),
        (["a"], "expected 2 captions, got 1"),
        ([], "expected 2 captions, got 0"),
        (None, "expected a caption that is not empty, got None"),
    ],
)
def test_a_missing_caption_is_told_with_its_row(captions, told, tmp_path, refused):
    columns = photographs(9)
    columns["captions"][4] = captions
    folder = written(tmp_path / "walls", train=photographs(30), test=columns)
    assert f"{folder}/test.parquet, row 4: {told}" in refused(folder)


def test_an_image_of_another_size_is_told(tmp_path, refused):
    columns = photographs(30)
    columns["img"][7] = photographs(1, 20)["img"][0]
    folder = written(tmp_path / "walls", train=columns, test=photographs(9))
    told = "train.parquet, row 7: expected an image of shape (16, 16, 3), got (20, 20, 3)"
    assert told in refused(folder)


def test_splits_that_differ_are_told(tmp_path, refused):
    folder = written(tmp_path / "large", train=photographs(30), test=photographs(9, 20))
    assert f"{folder}: train has images of shape (16, 16, 3), test (20, 20, 3)" in refused(folder)
    columns = photographs(9)
    columns["captions"] = [captions[:1] for captions in columns["captions"]]
    folder = written(tmp_path / "few", train=photographs(30), test=columns)
    assert f"{folder}: train has as many captions of an image as 2, test 1" in refused(folder)


def test_too_few_photographs_are_told(walls, refused):
    told = f"{walls}: 30 photographs to train on, too few to validate on 6 and train on 25"
    assert told in refused(walls, "--batch-size", "25")
    assert "too few to validate on 6 and train on 26" in refused(walls, "--measured-pairs", "26")


def test_one_caption_of_each_image_will_do(tmp_path):
    columns = photographs(9)
    columns["caption"] = [captions[0] for captions in columns.pop("captions")]
    folder = written(tmp_path / "walls", train=columns, test=columns)
    options = Options(data=str(folder), validation_pairs=1, measured_pairs=2, batch_size=2, vocabulary=260)
    split = contrastive.make_problem(options).split(0)
    assert split.test.inputs.captions.tokens.shape == (9, options.length)


@pytest.mark.parametrize(
    ("metadata", "size", "told"),
    [
        (None, (8, 8, 3), "the metadata names 0 classes, expected 2"),
        ({"class_names": "a"}, (8, 8, 3), "the metadata names 1 classes, expected 2"),
        ({"class_names": "a,b"}, (8, 8), "images have 1 channels, photographs 3"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(metadata, size, told, walls, tmp_path, refused):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(size, np.uint8)).save(buffer, format="PNG")
    columns = {"img": [buffer.getvalue()] * 2, "label": [0, 1]}
    folder = written(tmp_path / "classes", metadata, train=columns, test=columns)
    assert f"{folder}: {told}" in refused(walls, "--zero-shot", str(folder))


def test_methods_that_split_a_batch_are_no_choice(walls, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["contrastive", "--data", str(walls), "--methods", "wp-micro"])
    assert "wp-micro" in capsys.readouterr().err


def test_a_missing_package_is_told_in_one_line(walls, tmp_path):
    code = (
        "import sys; sys.modules['tokenizers'] = None; from benchmarks.__main__ import main; sys.exit(main())"
    )
    words = ["contrastive", "--data", str(walls), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "needs tokenizers, of the 'benchmarks' extra" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def problem(walls):
    options = Options(data=str(walls), validation_pairs=6, measured_pairs=12, batch_size=8, vocabulary=270)
    return contrastive.make_problem(options)


def test_all_methods_share_one_optimizer_and_plain_training_comes_first(problem):
    methods = problem.methods(("nso", "wp-relative", "adam", "sam"))
    assert list(methods) == ["adam", "sam", "nso", "wp-relative"]
    assert {method.optimizer for method in methods.values()} <= {None, problem.task.optimizer}
    assert methods["adam"].optimizer is problem.task.optimizer
    assert [method.gradients_per_step for method in methods.values()] == [1, 2, 2, 1]


def test_what_is_trained_on_is_not_validated_on(problem, walls):
    """The last six photographs of the split train; captions too, with which the tokenizer is trained."""
    batches = problem.task.batches(0, 0)
    assert {row for _ in range(3) for row in next(batches).labels.tolist()} == set(range(24))
    train, _ = parquet.load_captioned(walls)
    np.testing.assert_array_equal(problem.split(0).validation.inputs.images, train.images[24:])
    np.testing.assert_array_equal(problem.split(0).train.inputs.images, train.images[:12])


def test_the_rate_rises_and_falls_and_only_matrices_decay():
    """Twenty steps of a constant gradient: Adam's are of the rate's size."""
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2), "t": jnp.ones(())}
    optimizer = contrastive.adamw(jnp.float32(0.1), 0.5, 0.0, num_steps=20)
    state, moved = optimizer.init(params), []
    grads = jax.tree.map(jnp.ones_like, params)
    for _ in range(20):
        updates, state = optimizer.update(grads, state, params)
        moved.append({name: -float(x.ravel()[0]) for name, x in updates.items()})
    rates = [0.05, 0.1, *(0.05 * (1 + np.cos(np.pi * (step - 2) / 18)) for step in range(3, 20))]
    expected = [rates[0], 0.075, 0.1, *rates[2:]]
    np.testing.assert_allclose([step["b"] for step in moved], expected, rtol=1e-4)
    np.testing.assert_allclose([step["t"] for step in moved], expected, rtol=1e-4)
    np.testing.assert_allclose([step["w"] for step in moved], 1.5 * np.array(expected), rtol=1e-4)
