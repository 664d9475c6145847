"""The contrastive loss against NumPy, retrieval against a count, and encoders that keep examples apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.tasks import clip
from benchmarks.tasks.bert import Tokens
from benchmarks.tasks.clip import Clip, Pairs
from benchmarks.tasks.data import Examples


class Given(nnx.Module):
    """An encoder whose vectors are its input."""

    def __call__(self, x):
        return x


class Words(nnx.Module):
    """The same for captions."""

    def __call__(self, captions):
        return jnp.asarray(captions.tokens, jnp.float32)


@pytest.fixture
def given():
    """A model without weights but the temperature's, and vectors; images go from 0..255 to -1..1 first."""
    rng = np.random.default_rng(0)
    images, captions = rng.uniform(0, 255, (6, 4)), rng.normal(size=(6, 4)).astype(np.float32)
    model = Clip(Given(), Words())
    model.log_fall[...] = jnp.asarray(-1.2)
    return model, Examples(Pairs(images, Tokens(captions, np.ones((6, 4)))), np.arange(6))


def by_hand(images, captions, temperature, smoothing=0.0):
    """A loop over pairs in float64."""
    u, v = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images / 127.5 - 1, captions.astype(float))
    )
    count, total = len(u), 0.0
    for logits in (u @ v.T / temperature, v @ u.T / temperature):
        for i, row in enumerate(logits):
            logs = row - np.log(np.exp(row).sum())
            total -= (1 - smoothing) * logs[i] + smoothing * logs.mean()
    return total / (2 * count)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_numpys(given, smoothing):
    model, examples = given
    images, (captions, _) = examples.inputs
    expected = by_hand(images, captions, clip.TEMPERATURE * np.exp(1.2), smoothing)
    np.testing.assert_allclose(clip.info_nce(model, examples, smoothing), expected, rtol=2e-6)


def test_the_temperature_learns(given):
    """Its gradient is that of the loss by hand, by central differences in float64."""
    model, examples = given
    images, (captions, _) = examples.inputs
    grads = nnx.grad(clip.info_nce)(model, examples)
    high, low = (by_hand(images, captions, clip.TEMPERATURE * np.exp(1.2 - step)) for step in (1e-5, -1e-5))
    np.testing.assert_allclose(grads["log_fall"][...], (high - low) / 2e-5, rtol=1e-4)


def test_the_loss_of_a_batch_is_not_the_mean_over_its_parts(given):
    model, examples = given
    halves = (jax.tree.map(lambda x, k=k: x[3 * k : 3 * k + 3], examples) for k in (0, 1))
    parts = np.mean([clip.info_nce(model, half) for half in halves])
    assert parts < clip.info_nce(model, examples) - 0.1


def test_matched_counts_both_ways(given):
    model, examples = given
    images, (captions, _) = examples.inputs
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images / 127.5 - 1, captions))
    count = sum(int(np.argmax(u[i] @ v.T) == i) + int(np.argmax(v[i] @ u.T) == i) for i in range(6))
    np.testing.assert_allclose(clip.matched(model, examples), count / 12, rtol=1e-6)


def test_recall_is_a_count(given, monkeypatch):
    """Six images with two captions each; in chunks as at once."""
    model, examples = given
    rng = np.random.default_rng(1)
    captions = rng.normal(size=(6, 2, 4)).astype(np.float32)
    images = examples.inputs.images
    found = clip.retrieval(model, images, Tokens(captions, np.ones_like(captions)), (1, 3))
    u = images / 127.5 - 1
    v = captions.reshape(12, 4)
    cosines = (u / np.linalg.norm(u, axis=1, keepdims=True)) @ (
        v / np.linalg.norm(v, axis=1, keepdims=True)
    ).T
    for depth in (1, 3):
        texts = sum(any(j // 2 == i for j in np.argsort(-cosines[i])[:depth]) for i in range(6))
        pictures = sum(j // 2 in np.argsort(-cosines[:, j])[:depth] for j in range(12))
        assert found[f"image_to_text_{depth}"] == texts / 6
        assert found[f"text_to_image_{depth}"] == pictures / 12
    monkeypatch.setattr(clip, "CHUNK", 5)
    assert clip.retrieval(model, images, Tokens(captions, np.ones_like(captions)), (1, 3)) == found


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_equal_or_undefined_vectors_find_nothing(value):
    np.testing.assert_array_equal(clip.ranks(np.full((3, 3), value), np.eye(3, dtype=bool)), [2, 2, 2])


def test_zero_shot_is_a_count(given):
    model, examples = given
    images, captions = examples.inputs
    classes = jax.tree.map(lambda x: x[:3], captions)
    labels = np.array([0, 1, 2, 0, 1, 2])
    right = sum(
        int(
            np.argmax(
                (image / 127.5 - 1) @ (classes.tokens / np.linalg.norm(classes.tokens, axis=1)[:, None]).T
            )
        )
        == label
        for image, label in zip(images, labels, strict=True)
    )
    assert clip.zero_shot(model, Examples(images, labels), classes) == right / 6


@pytest.fixture(scope="module")
def small():
    return clip.small_clip(3, 300, 8, widths=(8, 16), width=16, rngs=nnx.Rngs(0))


def test_a_vector_depends_on_no_other_example_and_not_on_padding(small):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (4, 16, 16, 3), np.uint8)
    tokens = rng.integers(1, 300, (4, 8)).astype(np.int32)
    mask = (np.arange(8) < 5).astype(np.int32) * np.ones((4, 1), np.int32)
    together = small.embed_images(images), small.embed_captions(Tokens(tokens, mask))
    alone = small.embed_images(images[:1]), small.embed_captions(Tokens(tokens[:1], mask[:1]))
    others = np.where(mask == 1, tokens, 7)
    padded = small.embed_captions(Tokens(others, mask))
    for vectors, first in zip(together, alone, strict=True):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(vectors[:1], first, atol=1e-6)
    np.testing.assert_allclose(padded, together[1], atol=1e-6)


def test_the_gradient_of_a_vector_that_vanishes_is_finite(given):
    model, examples = given
    images, captions = examples.inputs
    zeros = examples._replace(inputs=Pairs(np.full_like(images, 127.5), captions))
    assert np.isfinite(
        jax.grad(lambda x: clip.info_nce(model, examples._replace(inputs=Pairs(x, captions))))(
            jnp.asarray(zeros.inputs.images)
        )
    ).all()
