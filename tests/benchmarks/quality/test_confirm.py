"""`confirm`: trainings of published results, repeated from their own seeds, are as accurate as was published."""

import json

import pytest

from benchmarks import __main__ as cli
from benchmarks.kit import tables
from benchmarks.quality import confirm

TASK = "images-digits-scratch"
TINY = (
    *("--network", "mlp", "--scratch", "--per-class", "4", "--gradients", "8", "--batch-size", "8"),
    *("--validation-images", "20", "--seeds", "2", "--tuning-seeds", "1", "--rates", "0.1"),
    *("--weight-decays", "0.001", "--points", "1", "--final-products", "4", "--methods", "sgd", "wp-micro"),
)


def row(method, seed, accuracy):
    return {"method": method, "strength": 0.1 * (method != "sgd"), "seed": seed, "test_accuracy": accuracy}


def results(task, differences):
    runs = [row("sgd", seed, 0.5) for seed in range(len(differences))]
    runs += [row("wp-micro", seed, 0.5 + difference) for seed, difference in enumerate(differences)]
    settings = {"results": task, "method": "wp-micro"}
    return {"data": {"name": "short"}, "settings": settings, "runs": runs}


def test_points_ahead_are_of_each_seed():
    """Differences of 1, 2 and 3 points: their standard error is 1 / sqrt(3), Student's t of two degrees 4.303."""
    (cells,) = confirm.rows(results("images-mnist", [0.01, 0.02, 0.03]))
    assert cells[:4] == ["short", "wp-micro", "0.1", "3"]
    assert cells[-2:] == ["+2.0 ± 2.5", "3"]
    (cells,) = confirm.rows(results("images-mnist", [0.01, -0.01, 0.0]))
    assert cells[-2:] == ["+0.0 ± 2.5", "1"]


def test_all_tasks_stand_in_the_order_of_the_summary():
    lines = confirm.all_tasks([results("text-sst2", [0.01, 0.02]), results("images-digits", [0.01, 0.02])])
    told = [line.split(" | ")[0] for line in lines.splitlines()[2:4]]
    assert told == ["| digits, fine-tuned on 100", "| SST-2 sentences, fine-tuned on 64"]


@pytest.mark.slow
def test_trainings_from_the_published_seeds_are_the_published_ones(tmp_path, monkeypatch):
    words = ["images", *TINY, "--work", str(tmp_path / "images"), "--out", str(tmp_path / "published")]
    assert cli.main(words) == 0
    published = json.loads((tmp_path / "published" / f"{TASK}.json").read_text())
    monkeypatch.setattr(confirm, "RESULTS", tmp_path / "published")
    monkeypatch.setattr(confirm, "FIRST_SEED", 1)
    words = ["confirm", "--results", TASK, "--seeds", "2", "--work", str(tmp_path / "work")]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    confirmed = json.loads((tmp_path / "out" / f"confirm-{TASK}-wp-micro.json").read_text())
    assert [(run["method"], run["seed"]) for run in confirmed["runs"]] == [
        *[("sgd", 1), ("wp-micro", 1)],
        *[("sgd", 2), ("wp-micro", 2)],
    ]
    picked = {run["method"]: run["strength"] for run in confirmed["runs"]}
    for run in published["runs"]:
        if run["seed"] == 1 and run["strength"] == picked[run["method"]]:
            (same,) = [x for x in confirmed["runs"] if (x["method"], x["seed"]) == (run["method"], 1)]
            assert "trace" not in same
            for name in ("test_accuracy", "test_loss", "validation_loss"):
                assert same[name] == pytest.approx(run[name], rel=1e-5)
    text = (tmp_path / "out" / f"confirm-{TASK}-wp-micro.md").read_text()
    assert text == tables.markdown(confirm, confirmed)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--results", "images-mnits"],
            "argument --results images-mnits: expected one of images-caltech101-lite0, ",
        ),
        (["--results", "rates"], "argument --results rates: expected one of images-caltech101-lite0, "),
        (
            ["--results", "images-mnist"],
            "argument --data: images-mnist is of other examples: expected where mnist lies, got None",
        ),
        (
            ["--data", "runs/mnist"],
            "argument --data: images-digits is of other examples: expected the digits, without --data, got mnist",
        ),
        (["--method", "sgd"], "argument --method sgd: expected one of sam, "),
    ],
)
def test_mistakes_are_told_before_anything_is_written(words, expected, told_of_a_mistake, tmp_path):
    assert expected in told_of_a_mistake("confirm", *words, "--work", str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()
