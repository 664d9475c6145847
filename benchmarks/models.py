"""The networks that are trained, and their loss."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.data import Examples


class ConvNet(nnx.Module):
    """Two convolutions with batch normalization and two dense layers with dropout, for images of 8x8."""

    def __init__(self, *, dropout: float = 0.2, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(32 * 4 * 4, 64, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """The logits, of shape (n, 10), for images of shape (n, 8, 8, 1)."""
        x = nnx.relu(self.norm1(self.conv1(jnp.asarray(images))))
        x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.relu(self.dense1(x.reshape(len(x), -1)))
        return self.dense2(self.dropout(x))


class StridedConvNet(nnx.Module):
    """Two convolutions with stride 2 and two dense layers; an example's logits depend on no other example."""

    def __init__(
        self, shape: tuple[int, int, int] = (28, 28, 1), num_classes: int = 10, *, rngs: nnx.Rngs
    ) -> None:
        height, width, channels = shape
        self.conv1 = nnx.Conv(channels, 16, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.dense1 = nnx.Linear(32 * math.ceil(height / 4) * math.ceil(width / 4), 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """The logits, of shape (n, num_classes), for images of shape (n, height, width, channels)."""
        x = nnx.relu(self.conv1(jnp.asarray(images)))
        x = nnx.relu(self.conv2(x))
        return self.dense2(nnx.relu(self.dense1(x.reshape(len(x), -1))))


class MLP(nnx.Module):
    """Dense layers with ReLU between them; as it is by default, for images of 28x28, it has 670k weights."""

    def __init__(self, widths: Sequence[int] = (784, 512, 512, 10), *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(*ends, rngs=rngs) for ends in itertools.pairwise(widths)])

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """The logits, of shape (n, 10), for images with as many entries each as the first layer is wide."""
        *hidden, last = self.layers
        x = jnp.asarray(images).reshape(len(images), -1)
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


class Transformer(nnx.Module):
    """An encoder with normalization before each part, and a head on its mean; 5M weights by default."""

    def __init__(
        self,
        num_layers: int = 6,
        width: int = 256,
        num_heads: int = 4,
        hidden_width: int = 1024,
        *,
        vocabulary: int = 1000,
        length: int = 64,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width)))
        self.blocks = nnx.List([Block(width, num_heads, hidden_width, rngs=rngs) for _ in range(num_layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, tokens: jax.Array | np.ndarray) -> jax.Array:
        """The logits, of shape (n, 10), for token numbers of shape (n, length)."""
        x = self.embed(jnp.asarray(tokens)) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


class Block(nnx.Module):
    """Self-attention and two dense layers, each added to what it gets."""

    def __init__(self, width: int, num_heads: int, hidden_width: int, *, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.queries_keys_values = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.dense1 = nnx.Linear(width, hidden_width, rngs=rngs)
        self.dense2 = nnx.Linear(hidden_width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """What comes out of the block for x of shape (n, length, width), of the same shape."""
        x = x + self.out(self._attend(self.queries_keys_values(self.norm1(x))))
        return x + self.dense2(nnx.relu(self.dense1(self.norm2(x))))

    def _attend(self, x: jax.Array) -> jax.Array:
        heads = x.reshape(*x.shape[:2], 3, self.num_heads, -1)
        mixed = jax.nn.dot_product_attention(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2])
        return mixed.reshape(*x.shape[:2], -1)


def cross_entropy(model: Callable[[jax.Array | np.ndarray], jax.Array], examples: Examples) -> jax.Array:
    """The mean loss over the examples."""
    logits = model(examples.inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels).mean()


def pure_loss(model: nnx.Module) -> tuple[Callable[[nnx.State, Examples], jax.Array], nnx.State]:
    """The mean loss as a function of the weights, and the weights.

    Args:
        model: It stays as it is: what its layers do to their statistics and random streams is discarded.

    Returns:
        `loss(params, examples)` and `params`.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types it so

    def loss(params: nnx.State, examples: Examples) -> jax.Array:
        return cross_entropy(nnx.merge(graphdef, params, rest, copy=True), examples)

    return loss, params
