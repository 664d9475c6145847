"""The networks that are trained, and their loss."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.tasks.data import Examples


class Frozen(nnx.Variable):
    """Weights that training leaves alone, and that no checkpoint keeps."""


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


class ResNet(nnx.Module):
    """Residual blocks behind a 3x3 convolution, and a head on the mean over what is left of the image.

    Each stage but the first halves height and width. As it is by default, it is ResNet-18 for images of
    32x32: no large first convolution, no pooling behind it.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 2, 2),
        norm: Literal["batch", "group"] = "batch",
        stem_stride: int = 1,
        rngs: nnx.Rngs,
    ) -> None:
        self.stem = _convolution(channels, widths[0], 3, stem_stride, rngs)
        self.norm = _normalization(norm, widths[0], rngs)
        stack: list[ResidualBlock] = []
        features = widths[0]
        for stage, (width, number) in enumerate(zip(widths, blocks, strict=True)):
            for i in range(number):
                stride = 2 if stage > 0 and i == 0 else 1
                stack.append(ResidualBlock(features, width, stride=stride, norm=norm, rngs=rngs))
                features = width
        self.blocks = nnx.List(stack)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """The logits, of shape (n, num_classes), for images of shape (n, height, width, channels)."""
        x = nnx.relu(self.norm(self.stem(jnp.asarray(images))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class ResidualBlock(nnx.Module):
    """Two normalized 3x3 convolutions, added to the input, or to a 1x1 convolution of it of their shape."""

    def __init__(
        self,
        features: int,
        width: int,
        *,
        stride: int = 1,
        norm: Literal["batch", "group"] = "batch",
        rngs: nnx.Rngs,
    ) -> None:
        self.conv1 = _convolution(features, width, 3, stride, rngs)
        self.norm1 = _normalization(norm, width, rngs)
        self.conv2 = _convolution(width, width, 3, 1, rngs)
        self.norm2 = _normalization(norm, width, rngs)
        same_shape = features == width and stride == 1
        self.shortcut = (
            None
            if same_shape
            else nnx.Sequential(
                _convolution(features, width, 1, stride, rngs), _normalization(norm, width, rngs)
            )
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """What comes out of the block for x of shape (n, height, width, features)."""
        change = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(change + (x if self.shortcut is None else self.shortcut(x)))


def _convolution(features: int, width: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        features,
        width,
        kernel_size=(size, size),
        strides=stride,
        use_bias=False,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
    )


def _normalization(kind: Literal["batch", "group"], width: int, rngs: nnx.Rngs) -> nnx.Module:
    if kind == "batch":
        return nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
    return nnx.GroupNorm(width, num_groups=8, rngs=rngs)


def resnet18(num_classes: int = 10, *, channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-18 for images of 32x32, with batch normalization: 11.17M weights for 10 classes."""
    return ResNet(num_classes, channels=channels, rngs=rngs)


def small_resnet(num_classes: int = 10, *, channels: int = 3, stem_stride: int = 2, rngs: nnx.Rngs) -> ResNet:
    """Three blocks with group normalization, 78k weights, for CPUs.

    Args:
        num_classes: How many logits.
        channels: How many the images have.
        stem_stride: That of the first convolution: 2 for images of 28x28 or 32x32, 1 for those of 8x8.
        rngs: It draws the weights.
    """
    return ResNet(
        num_classes,
        channels=channels,
        widths=(16, 32, 64),
        blocks=(1, 1, 1),
        norm="group",
        stem_stride=stem_stride,
        rngs=rngs,
    )


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


class ViT(nnx.Module):
    """A transformer on the patches of an image; 142k weights by default."""

    def __init__(
        self,
        shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        patch: int = 4,
        width: int = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        hidden_width: int = 128,
        rngs: nnx.Rngs,
    ) -> None:
        rows, columns = shape[0] // patch, shape[1] // patch
        self.embed = nnx.Conv(
            shape[2], width, kernel_size=(patch, patch), strides=patch, padding="VALID", rngs=rngs
        )
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows * columns, width)))
        self.blocks = nnx.List([Block(width, num_heads, hidden_width, rngs=rngs) for _ in range(num_layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """The logits, of shape (n, num_classes), for images of shape (n, height, width, channels)."""
        patches = self.embed(jnp.asarray(images))
        x = patches.reshape(len(patches), -1, patches.shape[-1]) + self.positions[...]
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


def cross_entropy(
    model: Callable[[jax.Array | np.ndarray], jax.Array],
    examples: Examples,
    smoothing: float | jax.Array = 0.0,
) -> jax.Array:
    """The mean loss over the examples.

    Args:
        model: It gives the logits.
        examples: Their labels are the numbers of classes, of shape (n,), or probabilities, (n, classes).
        smoothing: The share of each label that is spread evenly over all classes.

    Returns:
        The mean, over the examples, of the cross-entropy of the smoothed labels and the model's softmax.
    """
    logits, labels = model(examples.inputs), examples.labels
    if labels.ndim == 1 and isinstance(smoothing, float) and not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, smoothing)).mean()


def accuracy(model: Callable[[jax.Array | np.ndarray], jax.Array], examples: Examples) -> jax.Array:
    """The share of the examples whose class has the largest logit."""
    return jnp.mean(jnp.argmax(model(examples.inputs), axis=-1) == examples.labels)


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
