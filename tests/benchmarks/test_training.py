"""The shared training: every method's cost and what it does, and runs that go on as if nothing had happened."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import data, training
from benchmarks.data import Examples
from benchmarks.journal import LINES, Journal
from benchmarks.models import MLP, ConvNet
from benchmarks.training import Settings, Task
from benchmarks.ways import METHODS

GRADIENTS = 24
POINTS = 4


@pytest.fixture(autouse=True)
def strict():
    """Instead of the fixture for the library's own tests: optax's schedules need standard promotion."""


def clusters(number=256, width=16, classes=4):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, number).astype(np.int32)
    centres = rng.normal(size=(classes, width))
    return Examples((centres[labels] + rng.normal(size=(number, width))).astype(np.float32), labels)


def mlp_task(examples, batch_size=32, widths=(16, 32, 4), **options):
    return Task(
        lambda seed: MLP(widths, rngs=nnx.Rngs(seed)),
        functools.partial(data.batches, examples, batch_size),
        len(examples.labels),
        **options,
    )


@pytest.fixture(scope="module")
def task():
    return mlp_task(clusters())


def settings_for(method, gradients=GRADIENTS, **others):
    return Settings(gradients, 0.1, 1e-3, method.strengths[0], num_points=POINTS, **others)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name, task):
    method = METHODS[name]
    trained = training.train(task, method, settings_for(method, gradients=120))
    examples = clusters()
    before = np.mean(np.argmax(task.model(0)(examples.inputs), axis=1) == examples.labels)
    after = np.mean(np.argmax(trained.model(examples.inputs), axis=1) == examples.labels)
    assert after > 0.9 > before
    assert trained.curve[-1]["evaluations"] == 120
    assert [point["evaluations"] for point in trained.curve] == [30, 60, 90, 120]


@pytest.mark.parametrize("name", METHODS)
def test_a_step_costs_the_gradients_that_are_counted(name):
    """In the compiled program's operations, with so large a batch that what is done per weight hardly counts."""
    examples = clusters(number=8192, width=64)
    task = mlp_task(examples, batch_size=8192, widths=(64, 64, 4))

    def operations(method):
        settings = settings_for(method)
        steps = training.compiled(task, method, GRADIENTS, "constant")
        state = training.initial_state(task, method, settings)
        step = steps.step.lower(state, jax.random.key(0), next(task.batches(0, 0))).compile()
        return step.cost_analysis()["flops"]

    method = METHODS[name]
    ratio = operations(method) / operations(METHODS["sgd"])
    # SEHT's penalty is no gradient: it is counted by the time that it takes a ConvNet, and here it is less.
    least = 0.95 * method.gradients_per_step if name != "seht" else 2.0
    assert least < ratio < 1.05 * method.gradients_per_step


class KilledError(Exception):
    """As if the process had died."""


def killed_after(number):
    done = []

    def advance(count):
        done.append(count)
        if sum(done) > number:
            raise KilledError

    return advance


def equal(one, other):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, other)))


def conv_task():
    """A network with batch statistics and dropout, whose state has to go on too."""
    examples = data.digits(0, 100).train
    return Task(lambda seed: ConvNet(rngs=nnx.Rngs(seed)), functools.partial(data.batches, examples, 20), 100)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_training_ends_as_if_it_had_not_been_killed(name, task, tmp_path):
    _resumes_exactly(task, METHODS[name], tmp_path)


@pytest.mark.parametrize("name", ["swa", "nso-micro"])
def test_so_does_one_with_statistics_and_dropout(name, tmp_path):
    _resumes_exactly(conv_task(), METHODS[name], tmp_path)


def _resumes_exactly(task, method, folder):
    settings = settings_for(method)
    measure = lambda model: {"loss": float(task.loss(model, next(task.batches(1, 0))))}  # noqa: E731
    whole = training.train(task, method, settings, measure=measure)

    def go_on(advance=lambda _: None, *, resume=True):
        journal = Journal(folder, {}, resume=resume, pause=0)
        kept = []

        def compute():
            kept.append(
                training.train(task, method, settings, measure=measure, journal=journal, advance=advance)
            )
            return {"curve": kept[0].curve}

        return journal.once("x", compute), *kept

    for number in (10, 17):  # in the second quarter, and, counted from there, in the last
        with pytest.raises(KilledError):
            go_on(killed_after(number), resume=number > 10)
    steps = [json.loads(line).get("step") for line in (folder / LINES).read_text().splitlines()]
    assert steps == [None, *(point // method.gradients_per_step for point in (6, 12))]
    result, resumed = go_on()
    assert result["curve"] == resumed.curve == whole.curve
    assert equal(nnx.state(resumed.model), nnx.state(whole.model))
    assert go_on(killed_after(0)) == (result,)
