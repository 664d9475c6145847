"""Fronts: the rule that picks a strength, the area, what is claimed at these strengths, and the picture."""

import math

import numpy as np
import pytest

from benchmarks.quality import comparison_table, fronts, recipes, summary

SEEDS = 3


def runs(name, strength, *, loss, accuracy, trace, spread=0.0):
    """One run for each seed: losses spread evenly around their mean."""
    return [
        {
            "method": name,
            "strength": strength,
            "rate": 0.1,
            "seed": seed,
            "validation_loss": loss + spread * (seed - 1),
            "test_accuracy": accuracy,
            "test_loss": loss,
            "trace": trace,
            "largest_eigenvalue": trace / 10,
            "curve": [{"evaluations": 4}],
        }
        for seed in range(SEEDS)
    ]


def results(*given):
    """Each method's first setting is the one that the least validation loss has chosen."""
    listed = [run for each in given for run in each]
    chosen: dict[str, dict[str, float]] = {}
    for run in listed:
        chosen.setdefault(run["method"], {"strength": run["strength"], "rate": 0.1, "gradients_per_step": 1})
    return {"chosen": chosen, "runs": listed, "settings": {"seeds": SEEDS}}


def setting(losses, strength=1.0):
    return fronts.Setting("nso", tuple({"strength": strength, "validation_loss": loss} for loss in losses))


def test_the_rule_takes_the_strongest_within_a_standard_error():
    """Losses of .9, 1 and 1.1 have the standard error .1 / sqrt(3) = .0577."""
    best = setting((0.9, 1.0, 1.1), 0.1)
    within, beyond = setting((1.05,) * 3, 0.2), setting((1.06,) * 3, 0.4)
    assert fronts.by_one_standard_error([best, within, beyond]) is within
    assert fronts.by_one_standard_error([best, beyond]) is best
    assert fronts.by_one_standard_error([setting((2.0,) * 3, 0.05), best, beyond, within]) is within


def test_of_one_seed_the_rule_takes_the_best():
    best = setting((1.0,), 0.1)
    assert fronts.by_one_standard_error([best, setting((1.0001,), 0.2)]) is best


def test_a_setting_with_which_a_training_diverged_is_left_out():
    whole = results(
        runs("sgd", 0.0, loss=1, accuracy=0.9, trace=10),
        runs("nso", 0.01, loss=1, accuracy=0.9, trace=5),
        runs("nso", 0.02, loss=math.nan, accuracy=0.1, trace=5),
    )
    for run in whole["runs"][-2:]:
        del run["trace"]
    assert [each.strength for each in fronts.front(whole, "nso")] == [0.01]
    assert len(fronts.rows(whole)) == 2


def test_the_area_is_that_of_the_union_of_rectangles():
    """Against a count on a grid: what is to the right of a setting and below it is reached."""
    generator = np.random.default_rng(0)
    settings = [
        fronts.Setting(name, tuple(runs(name, k, loss=1, accuracy=accuracy, trace=trace)))
        for name in ("sam", "nso")
        for k, (accuracy, trace) in enumerate(
            zip(generator.uniform(0.9, 0.95, 5), np.exp(generator.normal(2, 1, 5)), strict=True)
        )
    ]
    floor = max(each.mean("test_accuracy") for each in settings) - 0.02
    good = [math.log(each.mean("trace")) for each in settings if each.mean("test_accuracy") >= floor]
    centres = (np.arange(1000) + 0.5) / 1000
    x = min(good) + centres * (max(good) - min(good))
    y = floor + 0.02 * centres
    for mine in (settings[:5], settings[5:]):
        reached = np.zeros((1000, 1000), bool)
        for each in mine:
            reached |= (x[:, None] >= math.log(each.mean("trace"))) & (y <= each.mean("test_accuracy"))
        assert fronts.area(mine, settings, "trace") == pytest.approx(reached.mean(), abs=2e-3)
    assert fronts.area(settings, settings, "trace") <= 1


def claimed():
    """At the strongest that is as good, nso has half of asam's trace; sam is flatter, but not as good there."""
    return results(
        runs("sgd", 0.0, loss=1, accuracy=0.90, trace=40),
        runs("sam", 0.1, loss=1, accuracy=0.93, trace=20, spread=0.1),
        runs("sam", 0.2, loss=2, accuracy=0.93, trace=1),
        runs("asam", 1.0, loss=1, accuracy=0.92, trace=12, spread=0.1),
        runs("asam", 2.0, loss=1.01, accuracy=0.92, trace=8),
        runs("nso", 0.01, loss=1, accuracy=0.94, trace=16, spread=0.1),
        runs("nso", 0.02, loss=1.05, accuracy=0.91, trace=4),
        runs("wp-micro", 0.1, loss=1, accuracy=0.95, trace=16),
    )


def test_claims_are_those_of_the_settings_that_the_rule_picks():
    told = fronts.claims(claimed())
    assert "The Hessian trace of nso, the lowest of noise, against asam" in told
    assert "50 % lower (50 to 50); its accuracy is -1.0 ± 0.0 points ahead" in told
    assert [row[:2] for row in fronts.rows(claimed())] == [
        ["sgd", ""],
        ["sam", "0.1"],
        ["asam", "2"],
        ["nso", "0.02"],
        ["wp-micro", "0.1"],
    ]


def test_the_summary_has_a_row_for_each_task():
    table = fronts.summary({"a": claimed(), "b": claimed()}, {"a": "task one", "b": "task two"})
    *_, row = table.splitlines()
    assert row.split(" | ")[0] == "| task two"
    assert "nso / asam | 50 % lower (50 to 50) | -1.0 ± 0.0" in row
    assert row.endswith("+5.0 ± 0.0 |")


def test_tables_and_pictures_of_chosen_strengths_do_not_see_the_others():
    whole = claimed()
    alone = whole | {
        "runs": [run for run in whole["runs"] if run["strength"] in (0.0, 0.01) or run["strength"] == 1.0]
    }
    for name in ("sgd", "asam", "nso"):
        assert comparison_table.chosen_runs(whole, name) == comparison_table.chosen_runs(alone, name)
        row = summary.Row("a task", (name,))
        assert summary._row(row, whole) == summary._row(row, alone)


def test_the_picture_is_of_several_strengths():
    assert fronts.plot(claimed()).startswith(b"\x89PNG")
    assert fronts.plot(results(runs("sgd", 0.0, loss=1, accuracy=0.9, trace=40))) == b""


def test_a_recipe_is_one_setting_for_all_tasks():
    """Of the strengths that both tasks have, with the mean of both differences and of the traces' ratios.

    The third has but one method of one gradient a step, so that it compares none.
    """
    one = results(
        runs("sgd", 0.0, loss=1, accuracy=0.90, trace=40),
        runs("nso", 0.01, loss=1, accuracy=0.99, trace=1),  # two gradients a step
        runs("wp-sgd", 0.01, loss=1, accuracy=0.92, trace=20),
        runs("wp-sgd", 0.02, loss=1, accuracy=0.91, trace=10),
        runs("wp-micro", 0.1, loss=1, accuracy=0.91, trace=10),
    )
    other = results(
        runs("sgd", 0.0, loss=1, accuracy=0.80, trace=10),
        runs("nso", 0.01, loss=1, accuracy=0.99, trace=1),
        runs("wp-sgd", 0.02, loss=1, accuracy=0.84, trace=10),
        runs("wp-sgd", 0.04, loss=1, accuracy=0.89, trace=10),
        runs("wp-micro", 0.2, loss=1, accuracy=0.91, trace=10),
    )
    third = results(
        runs("sgd", 0.0, loss=1, accuracy=0.80, trace=10),
        runs("wp-micro", 0.1, loss=1, accuracy=0.81, trace=10),
    )
    tasks, titles = {"a": one, "b": other, "c": third}, {"a": "A", "b": "B", "c": "C"}
    head, _, *lines = recipes.markdown(tasks, titles).splitlines()
    assert head == "| method | strength | points ahead, all | A | B | trace / plain's |"
    assert lines == ["| wp-sgd | 0.02 | +2.5 | +1.0 ± 0.0 | +4.0 ± 0.0 | 0.50 |"]
