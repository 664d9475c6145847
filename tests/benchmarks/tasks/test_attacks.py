"""Attacks on a network whose gradients are known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.tasks import attacks

RADIUS = 0.1


class Linear:
    """A linear softmax classifier in NumPy, with the gradient in closed form, and its attacks."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.weights = rng.standard_normal((12, 4)).astype(np.float32)
        self.images = rng.random((40, 3, 4, 1), np.float32)
        self.labels = np.argmax(self.logits(self.images), axis=1).astype(np.int32)

    def logits(self, images):
        return images.reshape(len(images), -1) @ self.weights

    def gradient(self, images):
        logits = self.logits(images)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        errors = odds / odds.sum(axis=1, keepdims=True) - np.eye(4)[self.labels]
        return (errors @ self.weights.T).reshape(images.shape)

    def pgd(self, start, step_size, num_steps):
        attacked = np.array(start)
        for _ in range(num_steps):
            attacked = attacked + step_size * np.sign(self.gradient(attacked))
            offset = np.clip(attacked - self.images, -RADIUS, RADIUS)
            attacked = np.clip(self.images + offset, 0, 1)
        return attacked

    def loss(self, images, labels):
        logits = images.reshape(len(images), -1) @ self.weights
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def margin(self, images, labels):
        logits = images.reshape(len(images), -1) @ self.weights
        right = jax.nn.one_hot(labels, 4, dtype=bool)
        return jnp.where(right, -jnp.inf, logits).max(1) - jnp.where(right, logits, -jnp.inf).max(1)

    def accuracy(self, images):
        return np.mean(np.argmax(self.logits(images), axis=1) == self.labels)


@pytest.fixture(scope="module")
def linear():
    return Linear()


def test_fgsm_is_one_step_along_the_closed_form_gradient(linear):
    attacked = attacks.fgsm(linear.loss, linear.images, linear.labels, RADIUS)
    np.testing.assert_allclose(attacked, linear.pgd(linear.images, RADIUS, 1), atol=1e-6)


def test_pgd_follows_the_closed_form_gradient(linear, key):
    attacked = attacks.pgd(key, linear.loss, linear.images, linear.labels, RADIUS, 0.03, 6, num_starts=0)
    np.testing.assert_allclose(attacked, linear.pgd(linear.images, 0.03, 6), atol=1e-5)


def test_the_default_step_crosses_the_ball(linear, key):
    pgd = functools.partial(attacks.pgd, key, linear.loss, linear.images, linear.labels, RADIUS)
    np.testing.assert_array_equal(pgd(num_steps=5), pgd(num_steps=5, step_size=2.5 * RADIUS / 5))


def test_one_step_from_the_images_is_fgsm(linear, key):
    one = attacks.pgd(key, linear.loss, linear.images, linear.labels, RADIUS, RADIUS, 1, num_starts=0)
    np.testing.assert_array_equal(one, attacks.fgsm(linear.loss, linear.images, linear.labels, RADIUS))


@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_attacks_stay_in_the_ball_and_the_cube(num_steps, linear, key):
    pgd = functools.partial(attacks.pgd, key, linear.loss, linear.images, linear.labels, RADIUS)
    attacked = np.asarray(pgd(step_size=0.07, num_steps=num_steps))
    assert np.abs(attacked - linear.images).max() <= RADIUS + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert np.any(attacked != linear.images)


def test_starts_are_uniform_in_the_ball(key):
    images = jnp.full((50, 8, 8, 1), 0.5)
    start = attacks.pgd(key, lambda x, _: x.sum((1, 2, 3)), images, jnp.zeros(50), RADIUS, 0.0, 0, 1)
    offsets = np.asarray(start - images).ravel()
    np.testing.assert_allclose([offsets.min(), offsets.max()], [-RADIUS, RADIUS], rtol=0.01)
    assert offsets.std() == pytest.approx(RADIUS / 3**0.5, rel=0.05)


@pytest.mark.parametrize("score", ["loss", "margin"])
def test_of_each_example_the_start_with_the_largest_score_is_kept(score, linear, key):
    score = getattr(linear, score)
    pgd = functools.partial(
        attacks.pgd, key, linear.loss, linear.images, linear.labels, RADIUS, 0.02, 1, score=score
    )
    scores = [score(pgd(num_starts=number), linear.labels) for number in range(1, 6)]
    assert np.all(np.diff(scores, axis=0) >= 0)
    assert np.any(scores[-1] > scores[0])


def test_more_starts_never_raise_the_accuracy(linear, key):
    pgd = functools.partial(
        attacks.pgd, key, linear.loss, linear.images, linear.labels, RADIUS, 0.02, 1, score=linear.margin
    )
    accuracies = [linear.accuracy(np.asarray(pgd(num_starts=number))) for number in range(1, 8)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < accuracies[0] < 1


def test_params_are_an_argument_of_what_is_compiled(key):
    traces = []

    def loss(scale, images, labels):
        traces.append(1)
        return scale * images.sum((1, 2, 3)) + labels

    images, labels = jnp.full((3, 2, 2, 1), 0.5), jnp.zeros(3)
    for scale, expected in ((1.0, 0.6), (-1.0, 0.4)):
        partial = jax.tree_util.Partial(loss, jnp.float32(scale))
        attacked = attacks.pgd(key, partial, images, labels, RADIUS, num_steps=8)
        np.testing.assert_allclose(attacked, expected, rtol=1e-6)
    assert len(traces) == 1 + 2  # to ascend, and to score two starts
