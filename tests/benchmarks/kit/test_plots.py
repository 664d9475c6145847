"""What the pictures have in common."""

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

from benchmarks.kit import plots


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
