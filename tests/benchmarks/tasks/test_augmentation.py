"""What is done to images to train on."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks import augmentation, data


def test_cutout_blackens_a_square_of_each_image(key):
    examples = data.Examples(jnp.ones((500, 8, 6, 3)), jnp.arange(500))
    images, labels = augmentation.named("cutout", 10)(key, 0, examples)
    np.testing.assert_array_equal(labels, examples.labels)
    black = np.asarray(images[..., 0] == 0)
    assert np.all((images == 0) == black[..., None])
    rows, columns = black.any(2), black.any(1)
    np.testing.assert_array_equal(black, rows[:, :, None] & columns[:, None])  # each is a rectangle
    assert set(rows.sum(1)) <= {1, 2, 3}  # of side 3, or less at the border
    assert {3} < set(columns.sum(1)) <= {1, 2, 3}
    share, error = rows.mean(0)[2:-2], 5 * (3 / 8 * 5 / 8 / 500) ** 0.5
    assert np.all(abs(share - 3 / 8) < error)  # centres are uniform


def test_mixup_mixes_images_as_it_does_labels(key):
    labels = jnp.arange(6) % 3
    images = jax.nn.one_hot(labels, 3).reshape(6, 1, 1, 3)
    mixed, probabilities = augmentation.named("mixup", 3)(key, 0, data.Examples(images, labels))
    np.testing.assert_allclose(mixed.reshape(6, 3), probabilities, rtol=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    assert np.any((probabilities > 0) & (probabilities < 1))
