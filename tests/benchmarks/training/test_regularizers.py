"""Steps with penalties and with changed examples, each against another way to compute its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from flax import nnx

from benchmarks.tasks import augmentation, data, models
from benchmarks.tasks.data import Examples
from benchmarks.tasks.models import MLP, ConvNet, cross_entropy
from benchmarks.training import costs, regularizers
from benchmarks.training.methods import METHODS
from nso_jax import penalties

STRENGTH = 0.3


@pytest.fixture
def batch(key):
    images = jax.random.uniform(key, (6, 4, 4, 1))
    return Examples(images, jnp.arange(6) % 3)


def descent(name, model, batch, key):
    """The gradient by which a step of a method moves the weights."""
    before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))  # the step replaces them
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    METHODS[name].update(cross_entropy)(model, optimizer, key, jnp.float32(STRENGTH), batch)
    return jax.tree.map(lambda a, b: a - b, before, nnx.state(model, nnx.Param))


def close(one, other, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), one, other)


def test_the_confidence_penalty_s_gradient_is_that_of_the_formula(key, batch):
    """Of the last layer: by the logits, (p - y) for the loss and p (log p + entropy) for the penalty."""
    model = MLP((16, 5, 3), rngs=nnx.Rngs(0))
    (first, last), x = model.layers, np.array(batch.inputs, float).reshape(6, -1)
    hidden = np.maximum(x @ np.array(first.kernel[...], float) + np.array(first.bias[...], float), 0)
    logits = hidden @ np.array(last.kernel[...], float) + np.array(last.bias[...], float)
    p = scipy.special.softmax(logits, axis=1)
    entropy = scipy.stats.entropy(p, axis=1)[:, None]
    by_logits = (p - np.eye(3)[batch.labels] + STRENGTH * p * (np.log(p) + entropy)) / 6
    moved = descent("confidence", model, batch, key)["layers"][1]
    np.testing.assert_allclose(moved["bias"][...], by_logits.sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved["kernel"][...], hidden.T @ by_logits, rtol=1e-4, atol=1e-6)


def test_the_jacobian_of_one_output_is_its_gradient(key, batch):
    """With one output the projection is a sign, which its square does not show."""
    model = MLP((16, 1), rngs=nnx.Rngs(0))
    found = regularizers.jacobian(cross_entropy, key, model, batch)
    assert float(found) == pytest.approx(float(jnp.sum(model.layers[0].kernel[...] ** 2) / 2), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"prob": regularizers.KEPT}])
def test_seht_penalizes_the_trace_of_the_loss_s_hessian(options, key, batch):
    model = MLP((16, 5, 3), rngs=nnx.Rngs(0))
    loss, params = models.pure_loss(model)
    found = regularizers.hessian_trace(**options)(cross_entropy, key, model, batch)
    expected = penalties.hessian_trace(key, loss, params, batch, **options)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["cutout", "mixup"])
def test_changed_examples_are_those_of_the_augmentation(name, key, batch):
    model = MLP((16, 5, 3), rngs=nnx.Rngs(0))
    loss, params = models.pure_loss(model)
    change = {
        "cutout": functools.partial(augmentation.cutout, share=STRENGTH),
        "mixup": functools.partial(augmentation.mixup, num_classes=3, alpha=STRENGTH),
    }[name]
    expected = jax.grad(loss)(params, change(key, batch))
    assert not np.allclose(jax.tree.leaves(expected)[0], jax.tree.leaves(jax.grad(loss)(params, batch))[0])
    close(descent(name, model, batch, key), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4, 0.5])
def test_a_square_s_side_may_be_computed(share, key):
    images = Examples(jnp.ones((20, 28, 28, 1)), jnp.zeros(20, int))
    fixed = augmentation.cutout(key, images, share)
    traced = jax.jit(augmentation.cutout)(key, images, jnp.float32(share))
    np.testing.assert_array_equal(fixed.inputs, traced.inputs)
    assert (fixed.inputs == 0).sum(axis=(1, 2)).max() == round(28 * share) ** 2


@pytest.mark.parametrize("name", ["label-smoothing", "confidence", "jacobian", "seht", "seht-d"])
def test_statistics_move_once_in_a_step(name, key):
    batch = data.part(data.digits(0, 100).train, 0, 20)
    states = {}
    for of in (name, "sgd"):
        model = ConvNet(rngs=nnx.Rngs(0))
        model.train()
        descent(of, model, batch, key)
        states[of] = nnx.state(model, nnx.BatchStat)
    close(states[name], states["sgd"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradients", [480, 1000])
def test_costs_make_whole_steps_near_the_measured_ones(gradients):
    for cost in np.geomspace(0.9, 8, 50):
        found = costs.in_whole_steps(cost, gradients)
        assert gradients % found == 0
        assert found * int(gradients / found) == gradients
        assert abs(np.log(found / cost)) < 0.17  # by a sixth at most


def test_costs_are_those_of_the_time(monkeypatch, batch):
    """Of a plain step itself, measured as another method, the cost is about 1; of lazy ones it is per step."""
    monkeypatch.setattr(costs, "REPETITIONS", 1)
    task = costs.Task(
        lambda seed: MLP((16, 5, 3), rngs=nnx.Rngs(seed)), lambda *_: iter(lambda: batch, None), 6
    )
    done = []
    found = costs.measure(
        task, {name: METHODS[name] for name in ("sgd", "mixup")}, 4, "sgd", lambda: done.append(1)
    )
    assert found["sgd"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert found["mixup"]["median"] > 0
    assert len(done) == 2 * 2
