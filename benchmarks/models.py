"""The networks that are trained, and their loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.data import Examples


class ConvNet(nnx.Module):
    """Two convolutions with batch normalization and two dense layers with dropout, for images of 8x8."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(32 * 4 * 4, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """The logits, of shape (n, 10), for images of shape (n, 8, 8, 1)."""
        x = nnx.relu(self.norm1(self.conv1(jnp.asarray(images))))
        x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.relu(self.dense1(x.reshape(len(x), -1)))
        return self.dense2(self.dropout(x))


def cross_entropy(model: Callable[[jax.Array | np.ndarray], jax.Array], examples: Examples) -> jax.Array:
    """The mean loss over the examples."""
    logits = model(examples.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels).mean()
