"""The shared training: every method's cost and what it does, and runs that go on as if nothing had happened."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.cost import compilers
from benchmarks.kit.files import UserError
from benchmarks.kit.journal import LINES, Journal, finish
from benchmarks.tasks import data
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import MLP, ConvNet
from benchmarks.training import loop, methods
from benchmarks.training.loop import Settings, Task
from benchmarks.training.methods import METHODS

GRADIENTS = 24
POINTS = 4


def clusters(number=256, width=16, classes=4):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, number).astype(np.int32)
    centres = rng.normal(size=(classes, width))
    points = (centres[labels] + rng.normal(size=(number, width))).astype(np.float32)
    return Examples(points.reshape(number, width // 4, 4, 1), labels)  # images, for what changes them


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
    trained = loop.train(task, method, settings_for(method, gradients=120))
    examples = clusters()
    before = np.mean(np.argmax(task.model(0)(examples.inputs), axis=1) == examples.labels)
    after = np.mean(np.argmax(trained.model(examples.inputs), axis=1) == examples.labels)
    assert after > 0.9 > before
    assert trained.curve[-1]["evaluations"] == 120
    assert [point["evaluations"] for point in trained.curve] == [30, 60, 90, 120]


# But for mixup, which draws from a beta distribution in a loop whose length nobody knows before.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "mixup"])
def test_a_step_costs_the_gradients_that_are_counted(name):
    """In the compiled program's operations, with so large a batch that what is done per weight hardly counts."""
    examples = clusters(number=8192, width=64)
    task = mlp_task(examples, batch_size=8192, widths=(64, 64, 4))

    def operations(method):
        settings = settings_for(method)
        steps = loop.compiled(task, method, GRADIENTS, "constant")
        state = loop.initial_state(task, method, settings)
        step = steps.step.lower(state, jax.random.key(0), next(task.batches(0, 0))).compile()
        return compilers.cost(step).flops

    method = METHODS[name]
    ratio = operations(method) / operations(METHODS["sgd"])
    # SEHT's penalty is no gradient: it is counted by the time that it takes a ConvNet, and here it is less.
    least = 0.95 * method.gradients_per_step if name not in ("seht", "seht-d") else 2.0
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


# The quick run has one method of each kind of state and of step; what the others do in a step changes no resuming.
KINDS = ("sgd", "swa", "bsam", "nso-micro", "seht")
BY_KIND = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("name", BY_KIND)
def test_a_resumed_training_ends_as_if_it_had_not_been_killed(name, task, tmp_path):
    _resumes_exactly(task, METHODS[name], tmp_path)


@pytest.mark.parametrize("name", ["swa", pytest.param("nso-micro", marks=pytest.mark.slow)])
def test_so_does_one_with_statistics_and_dropout(name, tmp_path):
    _resumes_exactly(conv_task(), METHODS[name], tmp_path)


def _resumes_exactly(task, method, folder):
    settings = settings_for(method)
    measure = lambda model: {"loss": float(task.loss(model, next(task.batches(1, 0))))}  # noqa: E731
    whole = loop.train(task, method, settings, measure=measure)

    def go_on(advance=lambda _: None, *, resume=True, afterwards=lambda _: None):
        journal = Journal(folder, {}, resume=resume, pause=0)
        kept = []

        def compute():
            kept.append(loop.train(task, method, settings, measure=measure, journal=journal, advance=advance))
            afterwards(1)
            return {"curve": kept[0].curve}

        return journal.once("x", compute), *kept

    for number in (10, 17):  # in the second quarter, and, counted from there, in the last
        with pytest.raises(KilledError):
            go_on(killed_after(number), resume=number > 10)
    lines = [json.loads(line) for line in (folder / LINES).read_text().splitlines()]
    steps = [line["step"] for line in lines if "figures" in line]
    assert steps == [point // method.gradients_per_step for point in (6, 12)]
    for _ in range(2):  # when all steps are done, while the network is measured
        with pytest.raises(KilledError):
            go_on(afterwards=killed_after(0))
    result, resumed = go_on()
    assert result["curve"] == resumed.curve == whole.curve
    assert equal(nnx.state(resumed.model), nnx.state(whole.model))
    assert go_on(killed_after(0)) == (result,)


def interrupted(task, folder, number=10):
    """A journal's folder as a training leaves it that is killed after so many gradients."""

    def compute():
        return loop.train(
            task, METHODS["sgd"], settings_for(METHODS["sgd"]), journal=journal, advance=killed_after(number)
        )

    journal = Journal(folder, {"seeds": 1}, resume=False, pause=0)
    with pytest.raises(KilledError):
        journal.once("x", compute)
    return folder / LINES


def resumed(task, folder):
    journal = Journal(folder, {"seeds": 1}, resume=True, pause=0)
    kept = []

    def compute():
        kept.append(loop.train(task, METHODS["sgd"], settings_for(METHODS["sgd"]), journal=journal))
        return {}

    journal.once("x", compute)
    return kept[0]


@pytest.fixture(scope="module")
def whole(task):
    return loop.train(task, METHODS["sgd"], settings_for(METHODS["sgd"]))


def test_a_torn_last_line_is_left_out(task, whole, tmp_path):
    path = interrupted(task, tmp_path)
    path.write_text(path.read_text() + '{"training": "x", "st')
    assert equal(nnx.state(resumed(task, tmp_path).model), nnx.state(whole.model))
    assert all(json.loads(line) for line in path.read_text().splitlines())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def largest(folder):
    """The file with the arrays, in which Orbax notices no flipped bit."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(largest(folder), 8 * largest(folder).stat().st_size // 2),
        lambda folder: truncate(largest(folder)),
        lambda folder: flip(folder / "_CHECKPOINT_METADATA", 100),
        lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
        lambda folder: (folder / "_CHECKPOINT_METADATA").rename(folder / "_CHECKPOINT_METADATA2"),
        lambda folder: (folder / "more").touch(),
    ],
    ids=["flipped", "truncated", "metadata", "missing", "renamed", "added"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(damage, task, whole, tmp_path):
    interrupted(task, tmp_path, number=20)
    folder = tmp_path / "checkpoints" / "x"
    assert sorted(path.name for path in folder.iterdir()) == ["12", "18"]
    damage(folder / "18")
    with pytest.warns(UserWarning, match=f"{folder / '18'} is damaged and is left out"):
        trained = resumed(task, tmp_path)
    assert trained.curve == whole.curve
    assert equal(nnx.state(trained.model), nnx.state(whole.model))


def test_without_a_good_checkpoint_a_training_starts_over(task, whole, tmp_path):
    interrupted(task, tmp_path, number=20)
    for step in ("12", "18"):
        truncate(largest(tmp_path / "checkpoints" / "x" / step))
    with pytest.warns(UserWarning, match="is damaged") as caught:
        trained = resumed(task, tmp_path)
    assert len(caught) == 2
    assert trained.curve == whole.curve
    assert equal(nnx.state(trained.model), nnx.state(whole.model))


def test_a_checkpoint_without_its_line_was_not_finished(task, whole, tmp_path):
    """It is neither taken nor told of, for it may be torn, as this one is."""
    path = interrupted(task, tmp_path, number=20)
    *lines, digest = path.read_text().splitlines()
    assert "digest" in json.loads(digest)
    path.write_text("\n".join([*lines, digest[:-5]]))
    folder = tmp_path / "checkpoints" / "x" / "18"
    flip(largest(folder), 8 * largest(folder).stat().st_size // 2)
    trained = resumed(task, tmp_path)
    assert trained.curve == whole.curve
    assert equal(nnx.state(trained.model), nnx.state(whole.model))


@pytest.mark.parametrize("number", range(2, 8))
def test_a_damaged_line_is_named_and_computed_again(number, task, whole, tmp_path):
    """In lines 2, 4 and 6 are figures, in which JSON notices no flipped bit in a digit, and in the others digests."""
    path = interrupted(task, tmp_path, number=20)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    digit = re.search(r'(evaluations": \d*|digest": "\D*)(\d)', lines[number - 1]).start(2)
    flip(path, 8 * (sum(map(len, lines[: number - 1])) + digit))
    assert json.loads(path.read_text().splitlines()[number - 1])
    with pytest.warns(UserWarning, match=f"{path}, line {number} is damaged: what it said is computed again"):
        trained = resumed(task, tmp_path)
    assert trained.curve == whole.curve
    assert equal(nnx.state(trained.model), nnx.state(whole.model))


def test_results_after_a_damaged_line_are_kept(tmp_path):
    journal, path = Journal(tmp_path, {}, resume=False), tmp_path / LINES
    for name in "abc":
        journal.once(name, lambda name=name: {"name": name})
    finish(tmp_path)
    flip(path, 100)
    with pytest.raises(UserError, match="line 1 is damaged; remove the file to start over"):
        Journal(tmp_path, {}, resume=True)
    flip(path, 100)
    flip(path, 8 * path.read_text().index('"b"') + 8)
    with pytest.warns(UserWarning, match="line 3 is damaged"):
        journal = Journal(tmp_path, {}, resume=True)
    assert [name for name in "abc" if journal.done(name)] == ["a", "c"]
    assert journal.once("b", lambda: {"name": "b"}) == {"name": "b"}
    finish(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("training") for line in lines] == [None, "a", "c", "b", None]


def test_a_finished_run_gives_its_results_again_when_resumed(tmp_path):
    """So that nothing is lost by a kill before they are written."""
    journal = Journal(tmp_path, {}, resume=False)
    journal.once("a", lambda: {"trace": 1.5})
    finish(tmp_path)
    journal = Journal(tmp_path, {}, resume=True)
    assert journal.once("a", lambda: {"trace": 0.0}) == {"trace": 1.5}
    finish(tmp_path)
    assert len((tmp_path / LINES).read_text().splitlines()) == 3
    assert not Journal(tmp_path, {}, resume=False).done("a")


def test_every_flipped_bit_of_a_line_is_noticed(tmp_path):
    journal, path = Journal(tmp_path, {"seeds": 1}, resume=False), tmp_path / LINES
    journal.once("nso .5, \N{GREEK SMALL LETTER SIGMA}", lambda: {"trace": 1e-05, "loss": float("nan")})
    good = path.read_bytes()
    line = good.splitlines()[1]
    for bit in range(8 * len(line)):
        flip(path, 8 * good.index(line) + bit)
        if path.read_bytes().count(b"\n") == 2:
            with pytest.warns(UserWarning, match="line 2 is damaged"):
                assert not Journal(tmp_path, {"seeds": 1}, resume=True)._results
        path.write_bytes(good)
    assert Journal(tmp_path, {"seeds": 1}, resume=True)._results


def test_lines_without_a_state_start_over(task, whole, tmp_path):
    interrupted(task, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    trained = resumed(task, tmp_path)
    assert len(trained.curve) == POINTS
    assert equal(nnx.state(trained.model), nnx.state(whole.model))


def test_a_run_is_neither_mixed_nor_lost(task, tmp_path):
    path = interrupted(task, tmp_path)
    before = path.read_text()
    with pytest.raises(UserError, match="go on with it by --resume, or remove it"):
        Journal(tmp_path, {"seeds": 1}, resume=False)
    with pytest.raises(UserError, match="other settings: seeds 1, not 2"):
        Journal(tmp_path, {"seeds": 2}, resume=True)
    assert path.read_text() == before
    path.write_text("nonsense\n" + before)
    with pytest.raises(UserError, match="cannot read"):
        Journal(tmp_path, {"seeds": 1}, resume=True)
    with pytest.raises(UserError, match="cannot make"):
        Journal(path / "folder", {}, resume=False)


def test_states_are_kept_every_so_often_only(task, tmp_path):
    journal = Journal(tmp_path, {}, resume=False, pause=1000)
    journal.once(
        "x",
        lambda: {
            "curve": loop.train(task, METHODS["sgd"], settings_for(METHODS["sgd"]), journal=journal).curve
        },
    )
    assert not (tmp_path / "checkpoints").exists()
    assert len((tmp_path / LINES).read_text().splitlines()) == 1 + POINTS + 1


def test_swa_averages_the_weights_of_the_second_half(task):
    method = METHODS["swa"]
    settings = Settings(8, 0.1, 1e-3, 0.5)
    steps = loop.compiled(task, method, 8, "constant")
    state, batches, seen = loop.initial_state(task, method, settings), task.batches(0, 0), []
    for _ in range(8):
        state = steps.step(state, jax.random.key(0), next(batches))
        seen.append(nnx.state(nnx.merge(steps.graphdef, state)[0], nnx.Param))
    mean = jax.tree.map(lambda *weights: np.mean(weights, axis=0), *seen[4:])
    trained = loop.train(task, method, settings)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        nnx.state(trained.model, nnx.Param),
        mean,
    )


def test_the_statistics_of_averaged_weights_are_their_own():
    """After so many batches what is left of those of the last step is .9 ** 50."""
    task = conv_task()
    trained = loop.train(task, METHODS["swa"], Settings(20, 0.1, 0.0, 1.0))
    model = nnx.clone(trained.model)
    model.train()
    for _, batch in zip(range(200), task.batches(0, 0), strict=False):
        model(batch.inputs)
    for one, other in zip(
        jax.tree.leaves(nnx.state(trained.model, nnx.BatchStat)),
        jax.tree.leaves(nnx.state(model, nnx.BatchStat)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=0.1, atol=0.05 * float(np.abs(other).max()))


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [1, 1, 1]), ("falling", [1, 0.5, 0]), ("rising", [0, 0.5, 1])]
)
def test_schedules_of_the_strength(schedule, expected):
    strengths = [loop.SCHEDULES[schedule](jnp.float32(done)) for done in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(strengths, expected, atol=1e-6)


def test_the_strength_of_a_step_follows_its_schedule(task):
    """With a method that writes its strength into the weights."""

    def update(_):
        def write(model, optimizer, key, strength, batch):
            del key, batch
            optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
            model.layers[0].bias[...] = jnp.full_like(model.layers[0].bias[...], strength)

        return write

    trained = loop.train(task, methods.Method(update), Settings(5, 0.1, 0.0, 2.0, schedule="falling"))
    np.testing.assert_allclose(trained.model.layers[0].bias[...], 1 + np.cos(0.8 * np.pi), rtol=1e-5)


def test_learning_rates_are_scaled_for_optimizers_of_another_kind(task):
    def rate(method, task):
        state = loop.initial_state(task, METHODS[method], Settings(4, 0.5))
        return float(state[1]["opt_state"].hyperparams["learning_rate"][...])

    assert rate("adam", task) == pytest.approx(0.5 * METHODS["adam"].rate)
    assert rate("adam", mlp_task(clusters(), optimizer=methods.adamw)) == 0.5
    assert rate("sam", task) == 0.5


def test_plain_methods_do_what_optax_does(task):
    """Without the harness, and without Flax's optimizer."""
    for method, optimizer in (
        (
            METHODS["sgd"],
            optax.chain(
                optax.add_decayed_weights(0.01),
                optax.sgd(optax.cosine_decay_schedule(0.1, 6), momentum=0.9),
            ),
        ),
        (METHODS["adam"], optax.adamw(optax.cosine_decay_schedule(0.1 * 0.02, 6), weight_decay=0.01)),
    ):
        graphdef, params = nnx.split(task.model(3))
        state, batches = optimizer.init(params), task.batches(3, 0)
        for _ in range(6):
            loss = lambda p, batch, graphdef=graphdef: task.loss(nnx.merge(graphdef, p), batch)  # noqa: E731
            grads = jax.grad(loss)(params, next(batches))
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        trained = loop.train(task, method, Settings(6, 0.1, 0.01, seed=3))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            nnx.state(trained.model, nnx.Param),
            params,
        )
