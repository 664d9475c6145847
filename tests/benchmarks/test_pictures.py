"""The pictures of the published results: drawn from the figures alone, and showing what the tables say."""

import io
import json

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import __main__ as cli
from benchmarks.kit import plots, report
from benchmarks.kit.files import RESULTS

SUFFIXES = {"ablate": ("-forms",), "variance": ("-accuracy",)}


def drawn(name):
    module = cli.importlib.import_module(cli.MODULES[cli.TABLES[name]])
    return report.pictures(module, name, json.loads((RESULTS / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", cli.DRAWN)
def test_published_figures_are_drawn(name):
    """Of the size of those that lie beside them, or else these are of before: python -m benchmarks pictures."""
    for file, picture in drawn(name).items():
        fresh, published = (Image.open(io.BytesIO(x)) for x in (picture, (RESULTS / file).read_bytes()))
        assert fresh.size == published.size, file
        assert len(picture) < 150_000
        corners = {
            fresh.convert("RGB").getpixel((x, y)) for x in (0, fresh.width - 1) for y in (0, fresh.height - 1)
        }
        assert corners == {(255, 255, 255)}  # so that it can be read on a dark page


def test_no_published_picture_is_of_nothing():
    made = {f"{name}{suffix}.png" for name in cli.DRAWN for suffix in ("", *SUFFIXES.get(name, ()))}
    found = {path.name for path in RESULTS.glob("*.png") if not path.name.startswith("demo-")}
    assert found == made - {"reliability.png"}


@pytest.mark.parametrize("log", [False, True])
def test_dots_have_the_mean_and_its_interval(log):
    values = [3.0, 4.0, 6.0, 5.0]
    axes = Figure().subplots()
    plots.dots(axes, ["a heading", plots.Row("a row", values, "black")], log=log)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a heading", "a row"]
    ((dot, _, (whisker,)),) = axes.containers
    np.testing.assert_allclose(dot.get_xydata(), [[4.5, 1]])
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(whisker.get_segments()[0], [[low, 1], [high, 1]])


@pytest.mark.parametrize("values", [[1.0, 9.0], [-1.0, 2.0]])
def test_a_whisker_beyond_zero_leaves_a_logarithmic_picture(values):
    axes = Figure().subplots()
    plots.dots(axes, [plots.Row("a row", values, "black")], log=True)
    ((_, _, (whisker,)),) = axes.containers
    assert 0 < whisker.get_segments()[0][0][0] < axes.get_xlim()[0] < max(values)


def test_legends_are_read_line_by_line():
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for name in "abcde":
        axes.plot([0, 1], label=name)
    plots.finish(figure, axes, columns=3)
    # Matplotlib goes down the columns, the first of which are the longer ones: a b c over d e.
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list("adbec")


def test_pictures_are_written_beside_their_figures(tmp_path, monkeypatch):
    (tmp_path / "precision.json").write_bytes((RESULTS / "precision.json").read_bytes())
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    assert cli.main(["pictures", "--names", "precision"]) == 0
    assert (tmp_path / "precision.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_figures_are_refused(capsys):
    assert cli.main(["pictures", "--names", "prescision"]) == 2
    assert "argument --names prescision: expected some of ablate, " in capsys.readouterr().err
