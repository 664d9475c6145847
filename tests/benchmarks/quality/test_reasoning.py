"""The study of reasoning, with a tiny made-up model and made-up problems."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

pytest.importorskip("gguf")

from benchmarks import __main__ as cli
from benchmarks.kit.journal import Journal
from benchmarks.quality import comparison, reasoning
from benchmarks.tasks import models, smollm
from benchmarks.tasks.data import part
from benchmarks.training import loop, measuring
from benchmarks.training.methods import METHODS
from tests.benchmarks import language_model
from tests.benchmarks.conftest import assert_shown

SIZES = {"train_problems": 5, "validation_problems": 3, "test_problems": 6, "solved_problems": 2}
TINY = {"length": 110, "rank": 2, "gradients": 4, "batch_size": 2, "seeds": 2, "final_products": 3, **SIZES}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with problems and a model."""
    folder = tmp_path_factory.mktemp("sums")
    language_model.write(folder / "tiny.gguf")
    for split in ("train", "test"):
        sums = [(i, i + 3 + (split == "test")) for i in range(12)]
        questions = [f"{a} and {b}?" for a, b in sums] + ["Why? " * 40]
        answers = [f"{'It is ' * (a % 3)}{a}+{b}.\n#### {a + b}" for a, b in sums] + ["So.\n#### 1"]
        pq.write_table(pa.table({"question": questions, "answer": answers}), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def options(source):
    return reasoning.Options(data=str(source), model=source / "tiny.gguf", **TINY)


@pytest.fixture(scope="module")
def problem(options):
    return reasoning.make_problem(options)[0]


def test_long_problems_are_left_out(options):
    assert reasoning.make_problem(options)[1] == 24 / 26


def test_seeds_have_problems_of_their_own(problem):
    split, other = problem.split(0), problem.split(1)
    train, validation = ({row.tobytes() for row in p.labels} for p in (split.train, split.validation))
    assert not train & validation
    assert [len(p.labels) for p in split] == [5, 3, 6]
    assert {row.tobytes() for row in other.train.labels} != train
    np.testing.assert_array_equal(split.test.labels, other.test.labels)


@pytest.fixture(scope="module")
def trained(problem):
    settings = loop.Settings(6, learning_rate=0.1, seed=0)
    return loop.train(problem.task, METHODS["adam"], settings).model


def by_hand(model, examples):
    """The mean loss over all tokens that count, and the share of them that is right."""
    logits = np.asarray(model(examples.inputs))
    counted = np.asarray(examples.inputs.weights) > 0
    logs = np.asarray(jax.nn.log_softmax(logits))
    losses = -np.take_along_axis(logs, examples.labels[..., None], axis=-1)[..., 0]
    return losses[counted].mean(), (logits.argmax(-1) == examples.labels)[counted].mean()


def test_figures_in_parts_are_means_over_all_tokens(problem, trained):
    """Five problems in parts of four and one, of different numbers of tokens."""
    task, train = problem.task, problem.split(0).train
    gauge = measuring.gauge(measuring.split_network(trained)[0], task.loss, task.accuracy, task.chunk)
    figures = comparison.evaluated(gauge, trained, train, "train")
    counted = np.asarray(train.inputs.weights) > 0
    assert len({row.sum() for row in counted}) > 1
    loss, accuracy = by_hand(trained, train)
    assert figures["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["train_accuracy"] == pytest.approx(accuracy, rel=1e-6)


def test_the_hessian_of_parts_is_that_of_the_mean_over_all_tokens(problem, trained):
    task, train = problem.task, problem.split(0).train
    graphdef, (params, rest) = measuring.split_network(trained)
    gauge = measuring.gauge(graphdef, task.loss, task.accuracy, task.chunk)
    tangent = jax.tree.map(lambda w: jax.random.normal(jax.random.key(0), w.shape), params)
    product = gauge.hessian(*comparison._batches(gauge, trained, train))(tangent)

    def mean(params):
        logits = nnx.merge(graphdef, params, rest)(train.inputs)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), train.labels[..., None], axis=-1)[..., 0]
        counted = train.inputs.weights > 0
        return -jnp.sum(jnp.where(counted, chosen, 0)) / counted.sum()

    expected = jax.jvp(jax.grad(mean), (params,), (tangent,))[1]
    for one, other in zip(jax.tree.leaves(product), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()))


def test_gradients_of_equal_parts_average_to_that_of_the_batch(problem, trained):
    """As microbatches have it, whatever their numbers of tokens."""
    batch = part(problem.split(0).train, 0, 4)
    whole = nnx.grad(smollm.loss)(trained, batch)
    parts = [nnx.grad(smollm.loss)(trained, part(batch, i, i + 1)) for i in range(4)]
    for one, *others in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
        np.testing.assert_allclose(one, sum(others) / 4, atol=2e-5 * float(jnp.abs(one).max()))


def test_a_stopped_training_goes_on_as_if_it_had_not_been(problem, tmp_path):
    settings = loop.Settings(6, learning_rate=0.01, seed=0, num_points=3)

    points, resumed = [], []

    def stop(_):
        points.append(0)
        if len(points) == 3:
            raise KeyboardInterrupt
        return {}

    def train(journal=None, measure=lambda _: {}):
        return loop.train(problem.task, METHODS["adam"], settings, measure=measure, journal=journal).model

    whole = train()
    first = Journal(tmp_path, {}, resume=False, pause=0)
    with pytest.raises(KeyboardInterrupt):
        first.once("it", lambda: train(first, stop))
    again = Journal(tmp_path, {}, resume=True, pause=0)
    again.once("it", lambda: resumed.append(train(again)) or {})
    for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (whole, resumed[0])), strict=True):
        np.testing.assert_array_equal(one, other)


def test_frozen_weights_are_in_no_checkpoint(problem, monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(Journal, "save", lambda self, step, state, figures: saved.append(state))
    settings = loop.Settings(2, learning_rate=0.01)
    loop.train(problem.task, METHODS["adam"], settings, journal=Journal(tmp_path, {}, resume=False))
    (state,) = saved
    assert not nnx.filter_state(state, models.Frozen)
    assert nnx.filter_state(state, nnx.Param)


def test_a_training_leaves_frozen_weights_as_they_are(problem, trained):
    fresh = problem.task.model(0)
    for one, other in zip(
        *(jax.tree.leaves(nnx.state(m, models.Frozen)) for m in (fresh, trained)), strict=True
    ):
        assert one is other or one.unsafe_buffer_pointer() == other.unsafe_buffer_pointer()


def words_of(source, **changes):
    words = []
    for name, value in (TINY | changes).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return [*words, "--data", str(source), "--model", str(source / "tiny.gguf")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_problems": 10}, "of the split train 12 problems have at most 110 tokens, and 13 are needed"),
        ({"test_problems": 13}, "of the split test 12 problems have at most 110 tokens, and 13 are needed"),
        ({"gradients": 3}, "argument --gradients: expected a multiple of 2"),
    ],
)
def test_what_is_too_few_is_told(changes, told, source, told_of_a_mistake, tmp_path):
    line = told_of_a_mistake("reasoning", *words_of(source, **changes), "--work", str(tmp_path / "work"))
    assert told in line


@pytest.mark.slow
def test_a_run_leaves_its_figures(source, problem, measured_reasoning):
    results = measured_reasoning
    assert results["data"] == {"name": source.name, "train": 5, "validation": 3, "test": 6, "kept": 0.923077}
    assert list(results["chosen"]) == ["adam", "sam", "nso", "wp-micro"]
    for run in results["runs"]:
        assert run["evaluations"] == 4
        assert run["test_solved"] in {0, 0.5, 1}
        assert run["test_result_loss"] > 0
    before = results["untrained"]
    expected = by_hand(problem.task.model(0), problem.split(0).test)
    assert (before["test_loss"], before["test_accuracy"]) == pytest.approx(expected, rel=1e-5)
    assert before["test_solved"] in {0, 0.5, 1}
    assert_shown(reasoning, results)
    assert "that have at most 110 tokens" in reasoning.caption(results)


@pytest.fixture(scope="module")
def measured_reasoning(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = [*words_of(source, batch_size=4), "--work", str(folder / "work"), "--out", str(folder / "out")]
    assert cli.main(["reasoning", *words]) == 0
    (path,) = (folder / "out").glob("*.json")
    return json.loads(path.read_text())
