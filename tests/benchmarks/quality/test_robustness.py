"""`python -m benchmarks robustness` on digits and on small Parquet files: its trainings, choices and claims."""

import functools
import io
import json

import fsspec
import jax
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from PIL import Image
from rich.console import Console

from benchmarks.kit import report, tables, timing
from benchmarks.kit.files import RESULTS
from benchmarks.kit.journal import Journal
from benchmarks.quality import robust_training, robustness
from benchmarks.quality.robust_training import METHODS
from benchmarks.training import costs, loop, methods
from benchmarks.training.loop import Settings
from nso_jax import penalties

TINY = ("--pgd-steps", "2", "--starts", "1", "--test-images", "30", "--validation-images", "20")


def write_images(folder, **numbers):
    """A Parquet file of noise, of three classes, for each split."""
    rng = np.random.default_rng(0)
    with fsspec.open_files([f"{folder}/{split}.parquet" for split in numbers], "wb") as files:
        for file, number in zip(files, numbers.values(), strict=True):
            images = [io.BytesIO() for _ in range(number)]
            for image in images:
                Image.fromarray(rng.integers(0, 256, (6, 5), np.uint8)).save(image, format="PNG")
            content = [image.getvalue() for image in images]
            pq.write_table(pa.table({"img": content, "label": [i % 3 for i in range(number)]}), file)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    write_images(folder, train=8, test=4)
    return folder


@pytest.fixture(scope="module")
def problem():
    """A hundred digits."""
    return robust_training.problems(robustness.Options(train_images=100))[0]


def test_margin_is_positive_where_the_network_is_wrong(problem):
    model, examples = problem.task.model(3), problem.train
    logits = np.asarray(model(examples.inputs))
    margins = robust_training._margins(model, *examples)
    wrong = np.argmax(logits, axis=1) != examples.labels
    np.testing.assert_array_equal(margins > 0, wrong)
    rivals = logits.copy()
    rivals[np.arange(100), examples.labels] = -np.inf
    expected = rivals.max(axis=1) - logits[np.arange(100), examples.labels]
    np.testing.assert_allclose(margins, expected, rtol=1e-4, atol=1e-5)


PENALTIES = {
    "input-gradient": lambda _, losses, images: penalties.input_gradient(losses, images).mean(),
    "input-hessian": lambda key, losses, images: penalties.input_hessian_norm(key, losses, images).mean(),
}


def by_hand(task, penalty, strength, *, every, num_steps):
    """Adam on the loss, and in every step whose number `every` divides on as many penalties."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, num_steps))
    graphdef, params = nnx.split(task.model(1))
    state, batches = optimizer.init(params), task.batches(1, 0)

    @jax.jit
    def grads(params, batch, key, factor):
        def total(params):
            def losses(images):
                logits = nnx.merge(graphdef, params)(images)
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)

            return losses(batch.inputs).mean() + factor * penalty(key, losses, batch.inputs)

        return jax.grad(total)(params)

    for i in range(num_steps):
        factor = every * strength if i % every == 0 else 0.0
        key = jax.random.fold_in(jax.random.key(1), i)
        updates, state = optimizer.update(grads(params, next(batches), key, factor), state, params)
        params = optax.apply_updates(params, updates)
    return params


def lazy(name, every):
    return methods.lazy(METHODS[name], every)._replace(gradients_per_step=1)


@pytest.mark.parametrize(("name", "every"), [("input-gradient", 1), ("input-hessian", 3)])
def test_a_penalty_is_in_every_nth_step(name, every, problem):
    trained = loop.train(problem.task, lazy(name, every), Settings(7, 1e-3, strength=0.5, seed=1))
    expected = by_hand(problem.task, PENALTIES[name], 0.5, every=every, num_steps=7)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(near, nnx.state(trained.model), expected)


class KilledError(Exception):
    """As if the process had died."""


def test_a_resumed_training_knows_which_steps_have_the_penalty(problem, tmp_path):
    settings = Settings(7, 1e-3, strength=0.5, num_points=3)  # after 2, 5 and 7 steps
    train = functools.partial(loop.train, problem.task, lazy("input-gradient", 3), settings)
    trained, done = [train()], []

    def go_on(advance, *, resume):
        journal = Journal(tmp_path, {}, resume=resume, pause=0)

        def compute():
            trained.append(train(journal=journal, advance=advance))
            return {}

        journal.once("x", compute)

    def killed(count):
        done.append(count)
        if len(done) == 4:
            raise KilledError

    with pytest.raises(KilledError):
        go_on(killed, resume=False)
    go_on(done.append, resume=True)
    assert done == [1, 1, 1, 1, 2, 1, 1, 1, 1, 1]
    whole, resumed = (nnx.state(one.model) for one in trained)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_without_strength_all_train_plainly(problem):
    trained = {
        name: loop.train(problem.task, METHODS[name]._replace(gradients_per_step=1), Settings(4, 1e-3))
        for name in ("plain", "nso", "hessian-trace")
    }
    for other in trained.values():
        near = functools.partial(np.testing.assert_allclose, atol=1e-5)
        jax.tree.map(near, nnx.state(other.model), nnx.state(trained["plain"].model))


@pytest.mark.parametrize("every", [1, 4])
def test_budgets_are_equal(every):
    options = robustness.Options(methods=tuple(METHODS)[1:], penalty_every=every)
    costs = {name: method.gradients_per_step for name, method in robust_training.compared(options).items()}
    for name, method in robust_training.compared(options).items():
        assert 1000 - costs[name] < loop.num_steps(method, 1000) * costs[name] <= 1000
    assert costs["input-hessian"] == 1 + (METHODS["input-hessian"].gradients_per_step - 1) / every
    assert costs["nso"] == METHODS["nso"].gradients_per_step


def made_up(method, strength, clean, pgd):
    """Runs with such accuracies of the seeds, in percent, the same in validation and test."""
    figures = [{"clean": c / 100, "fgsm": 0.5, "pgd": p / 100} for c, p in zip(clean, pgd, strict=True)]
    return [
        {"data": "x", "method": method, "strength": strength, "seed": i, "validation": of, "test": of}
        for i, of in enumerate(figures)
    ]


def test_strengths_are_chosen_by_pgd_where_clean_accuracy_is_kept():
    runs = [
        *made_up("plain", 0.0, [97, 99], [10, 20]),
        *made_up("nso", 0.1, [98, 98], [15, 15]),
        *made_up("nso", 0.2, [96, 98], [30, 10]),  # a point less on average, which is tolerated
        *made_up("nso", 0.3, [96, 97.9], [90, 90]),
        *made_up("input-gradient", 1.0, [90, 90], [90, 90]),
    ]
    assert robustness.choose(runs) == {"plain": 0.0, "nso": 0.2, "input-gradient": None}


def test_pairs_are_matched_in_clean_accuracy():
    runs = [
        *made_up("input-hessian", 0.1, [97.0, 98.0], [50, 52]),
        *made_up("input-hessian", 0.3, [95.0, 95.0], [70, 70]),
        *made_up("input-gradient", 1.0, [97.1, 98.1], [40, 40]),  # .1 points more
        *made_up("input-gradient", 2.0, [98.1, 97.5], [55, 51]),  # .3 points more, and better than 1.0
        *made_up("input-gradient", 3.0, [95.4, 95.4], [65, 65]),
    ]
    worth_taking, other = robustness.match(runs)
    assert worth_taking["strengths"] == {"input-hessian": 0.1, "input-gradient": 2.0}
    assert worth_taking["clean_difference"] == pytest.approx(-0.003)
    assert worth_taking["pgd_difference"] == pytest.approx(-0.02)
    assert worth_taking["pgd_difference_by_seed"] == pytest.approx([-0.05, 0.01])
    assert other["strengths"] == {"input-hessian": 0.1, "input-gradient": 1.0}
    assert [pair["worth_taking"] for pair in (worth_taking, other)] == [True, False]
    assert robustness.match(runs[:4]) == []


def test_the_claim_is_said_in_the_caption():
    pair = {
        "strengths": {"input-hessian": 0.1, "input-gradient": 3.0},
        "pgd_difference_by_seed": [0.01, 0.014],
    }
    results = {
        "settings": {"matched_within": 0.003, "methods": dict.fromkeys(robust_training.RIVALS)},
        "claim": {"x": [pair | {"worth_taking": True}, pair | {"worth_taking": False}], "y": []},
    }
    told = robustness._claims(results)
    assert "input-hessian and input-gradient whose clean test accuracies differ by at most 0.3 points" in told
    assert told.endswith(": x, 0.1 and 3 by 1.2 ± 0.3. y, none. ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cutout", "mixup"])
def test_training_on_changed_images(name, few_strengths, trained):
    arguments = ("--augment", name, "--methods", "input-gradient", "--seeds", "1", "--budget", "4")
    assert trained(*arguments)["settings"]["augment"] == name


@pytest.fixture
def few_strengths(monkeypatch):
    few = {name: method._replace(strengths=method.strengths[:2]) for name, method in METHODS.items()}
    monkeypatch.setattr(robust_training, "METHODS", few)
    monkeypatch.setattr(costs, "REPETITIONS", 1)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)


@pytest.fixture
def trained(measured, tmp_path):
    return functools.partial(measured, "robustness", *TINY, "--work", str(tmp_path / "work"))


@pytest.mark.slow
def test_every_training_is_reported(few_strengths, trained, capsys):
    methods = ("input-gradient", "input-hessian")
    results = trained("--methods", *methods, "--seeds", "2", "--budget", "10")
    counts = {"train": 600, "validation": 20, "test": 30}
    assert results["settings"]["data"] == {"digits": {"shape": [8, 8, 1], **counts}}
    done = [(run["method"], run["strength"], run["seed"]) for run in results["runs"]]
    assert done == [
        (name, strength, seed)
        for name in ("plain", *methods)
        for strength in METHODS[name].strengths[:2]
        for seed in range(2)
    ]
    for figures in results["runs"]:
        assert figures["steps"] == loop.num_steps(METHODS[figures["method"]], 10)
        assert figures["test"]["clean"] >= figures["test"]["pgd"]
        assert figures["validation"].keys() == {"clean", "pgd"}
    assert results["costs"]["digits"]["plain"]["median"] == 1
    assert results["costs"]["digits"].keys() == {"plain", *methods}
    assert results["chosen"] == {"digits": robustness.choose(results["runs"])}
    claim = tables.rounded(robustness.match(results["runs"]))
    assert results["claim"] == {"digits": claim}
    shown = capsys.readouterr().out
    assert shown.count("PGD") > len(done)
    for row in robustness.rows(results):
        assert len(row) == len(robustness.HEADERS)
        assert all(cell in shown for cell in row)


@pytest.mark.slow
def test_steps_may_be_equal_instead_of_time(few_strengths, trained, capsys):
    arguments = ("--equal", "steps", "--budget", "3", "--methods", "input-hessian", "nso", "--seeds", "1")
    assert {figures["steps"] for figures in trained(*arguments)["runs"]} == {3}
    assert "Every training takes 3 steps" in " ".join(capsys.readouterr().out.split())


def test_what_was_trained_is_not_trained_again(few_strengths, trained, capsys, monkeypatch):
    arguments = ("--budget", "3", "--methods", "nso", "--seeds", "1")
    first = trained(*arguments)
    told = capsys.readouterr().out
    monkeypatch.setattr(loop, "train", None)
    assert trained(*arguments, "--resume") == first
    lines, again = (set(text.splitlines()) for text in (told, capsys.readouterr().out))
    assert len(lines - again) == 3
    assert not again - lines


@pytest.mark.slow
def test_folders_and_urls_are_divided_and_trained_on(few_strengths, folder, trained, capsys):
    for source, number in ((folder, 70), ("memory://elsewhere", 140)):
        write_images(source, train=number, test=4)
    arguments = ["--methods", "input-gradient", "--seeds", "1", "--budget", "6", "--penalty-every", "2"]
    results = trained("--data", str(folder), "memory://elsewhere/", *arguments)
    counts = {"shape": [6, 5, 1], "validation": 20, "test": 4}
    assert results["settings"]["data"] == {
        "images": counts | {"train": 60, "validation": 10},
        "elsewhere": counts | {"train": 120},
    }
    assert results["claim"] == {"images": [], "elsewhere": []}
    steps = {run["method"]: run["steps"] for run in results["runs"]}
    assert steps == {"plain": 6, "input-gradient": 3}  # on average 1.75 times as long
    caption = robustness.caption(results)
    assert "A penalty is in one step out of 2, 2 times as strong." in caption
    assert "Pairs of strengths" not in caption
    capsys.readouterr()
    report.print_table(Console(width=80), robustness, results)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("name", ["robustness", "robustness-equal-steps"])
def test_published_results_are_read(name):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert len(robustness.rows(results)) == sum(1 + len(chosen) for chosen in results["chosen"].values())
    assert "one step out of" not in robustness.caption(results)
    assert robustness.plot(results).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("total", "train", "validation", "expected"),
    [(110, 100, 10, (100, 10)), (100, 100, 10, (90, 10)), (35, 100, 10, (30, 5)), (70, 20, 100, (20, 50))],
)
def test_small_data_sets_are_mostly_for_training(total, train, validation, expected, folder):
    write_images(folder, train=total)
    options = robustness.Options(train_images=train, validation_images=validation, test_images=3)
    problem = robust_training._problem("x", str(folder), options)
    assert (len(problem.train.labels), len(problem.validation.labels)) == expected
    assert len(problem.test.labels) == 3
    assert problem.task.model(0)(problem.test.inputs).shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{folder}/nowhere"], "no folder {folder}/nowhere"),
        (["--data"], "argument --data: expected at least one value"),
        (["--data", "{folder}", "{folder}"], "argument --data: expected folders of different names"),
        (["--data", "{folder}"], "7 images to train on, fewer than a batch"),
        (["--train-images", "20"], "digits: 20 images to train on, fewer than a batch"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, folder, told_of_a_mistake):
    given = [word.format(folder=folder) for word in arguments]
    assert message.format(folder=folder) in told_of_a_mistake("robustness", *given)
