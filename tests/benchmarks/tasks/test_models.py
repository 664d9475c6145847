"""The networks of `benchmarks.tasks.models` against NumPy, and what their loss gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.tasks import data, models
from benchmarks.tasks.data import Examples


@nnx.jit
def outputs(model, images):
    """Compiled whole, which is faster here than layer by layer."""
    return model(images)


def num_weights(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolved(x, kernel, stride=1):
    """With zeros around, as many before as after or one less."""
    rows, columns = (-(-length // stride) for length in x.shape[1:3])
    missing = [
        max((number - 1) * stride + size - length, 0)
        for number, size, length in zip((rows, columns), kernel.shape, x.shape[1:3], strict=False)
    ]
    x = np.pad(x, [(0, 0), *((number // 2, number - number // 2) for number in missing), (0, 0)])
    out = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i, j in np.ndindex(rows, columns):
        window = x[:, i * stride :, j * stride :][:, : kernel.shape[0], : kernel.shape[1]]
        out[:, i, j] = np.tensordot(window, kernel, axes=3)
    return out


def normalized(x, layer):
    """By groups of channels, or by what the batch has in each."""
    if isinstance(layer, nnx.GroupNorm):
        groups = x.reshape(len(x), -1, 8, x.shape[-1] // 8)
        mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
        x = ((groups - mean) / np.sqrt(variance + layer.epsilon)).reshape(x.shape)
    else:
        x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + layer.epsilon)
    return x * layer.scale[...] + layer.bias[...]


def block_output(x, block, stride):
    change = convolved(x, block.conv1.kernel[...], stride)
    change = np.maximum(normalized(change, block.norm1), 0)
    change = normalized(convolved(change, block.conv2.kernel[...]), block.norm2)
    if block.shortcut is not None:
        convolution, norm = block.shortcut.layers
        x = normalized(convolved(x, convolution.kernel[...], stride), norm)
    return np.maximum(change + x, 0)


def randomize(model):
    """So that scales are not 1, nor biases 0."""
    params = nnx.state(model, nnx.Param)
    rng = np.random.default_rng(1)
    nnx.update(model, jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), params))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("features", "width", "stride"), [(16, 16, 1), (8, 16, 1), (16, 16, 2), (8, 24, 2)])
def test_residual_blocks_agree_with_numpy(features, width, stride, norm):
    block = models.ResidualBlock(features, width, stride=stride, norm=norm, rngs=nnx.Rngs(0))
    randomize(block)
    x = normal(3, 6, 5, features)
    expected = block_output(x, block, stride)
    assert (block.shortcut is None) == (features == width and stride == 1)
    assert expected.shape == (3, -(-6 // stride), -(-5 // stride), width)
    np.testing.assert_allclose(outputs(block, x), expected, rtol=1e-4, atol=1e-4)


def test_residual_networks_agree_with_numpy():
    model = models.ResNet(5, widths=(8, 16), blocks=(1, 2), norm="group", stem_stride=2, rngs=nnx.Rngs(0))
    randomize(model)
    x = images = normal(2, 9, 8, 3)
    x = np.maximum(normalized(convolved(x, model.stem.kernel[...], stride=2), model.norm), 0)
    for block, stride in zip(model.blocks, (1, 2, 1), strict=True):
        x = block_output(x, block, stride)
    expected = x.mean((1, 2)) @ model.head.kernel[...] + model.head.bias[...]
    np.testing.assert_allclose(outputs(model, images), expected, rtol=1e-4, atol=1e-4)


def test_resnet18_has_its_weights():
    model = nnx.eval_shape(lambda: models.resnet18(rngs=nnx.Rngs(0)))
    assert num_weights(model) == 11_173_962
    assert num_weights(nnx.eval_shape(lambda: models.resnet18(100, rngs=nnx.Rngs(0)))) == 11_220_132


@pytest.mark.parametrize(
    ("shape", "stem_stride", "weights"),
    [((32, 32, 3), 2, 78_042), ((28, 28, 1), 2, 77_754), ((8, 8, 1), 1, 77_754)],
)
def test_the_small_resnet_takes_images_of_every_set(shape, stem_stride, weights):
    def build():
        return models.small_resnet(channels=shape[-1], stem_stride=stem_stride, rngs=nnx.Rngs(0))

    logits = nnx.eval_shape(outputs, nnx.eval_shape(build), jax.ShapeDtypeStruct((2, *shape), jnp.float32))
    assert logits.shape == (2, 10)
    assert num_weights(nnx.eval_shape(build)) == weights
    # Each stage has two convolutions of 3x3, each with a scale and a bias for every channel, and a
    # shortcut where the width changes.
    stages = [(16, 16), (16, 32), (32, 64)]
    branches = sum(9 * a * b + 9 * b * b + 4 * b for a, b in stages)
    shortcuts = sum(a * b + 2 * b for a, b in stages[1:])
    assert weights == 9 * shape[-1] * 16 + 2 * 16 + branches + shortcuts + 64 * 10 + 10


def test_convolutions_start_with_the_variance_of_he():
    model = models.ResNet(10, widths=(64, 128), blocks=(1, 1), rngs=nnx.Rngs(0))
    for convolution in (model.blocks[0].conv1, model.blocks[1].conv2, model.blocks[1].shortcut.layers[0]):
        kernel = convolution.kernel[...]
        assert np.var(kernel) == pytest.approx(2 / np.prod(kernel.shape[:-1]), rel=0.05)


def test_batch_normalization_learns_its_statistics():
    model = models.ResNet(10, widths=(8,), blocks=(1,), rngs=nnx.Rngs(0))
    images = normal(4, 8, 8, 3)
    stem = convolved(images, model.stem.kernel[...])
    model(images)
    np.testing.assert_allclose(model.norm.mean[...], 0.1 * stem.mean((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("build", [models.small_resnet, models.ViT])
def test_an_example_s_logits_depend_on_no_other(build):
    model = build(rngs=nnx.Rngs(0))
    images = normal(6, 32, 32, 3)
    np.testing.assert_allclose(outputs(model, images)[:2], outputs(model, images[:2]), rtol=1e-4, atol=1e-5)


def test_vit_agrees_with_numpy_up_to_its_blocks():
    model = models.ViT((8, 12, 3), 7, patch=4, width=16, num_layers=2, num_heads=2, rngs=nnx.Rngs(0))
    randomize(model)
    images = normal(2, 8, 12, 3)
    patches = images.reshape(2, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 48)
    x = patches @ np.reshape(model.embed.kernel[...], (48, 16)) + model.embed.bias[...] + model.positions[...]
    for block in model.blocks:
        x = np.asarray(block(jnp.asarray(x, jnp.float32)))
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.norm.epsilon)
    x = (x * model.norm.scale[...] + model.norm.bias[...]).mean(1)
    np.testing.assert_allclose(
        outputs(model, images), x @ model.head.kernel[...] + model.head.bias[...], rtol=1e-4, atol=1e-4
    )


def test_vit_has_as_many_weights_as_its_parts():
    block = 2 * 2 * 64 + 64 * 192 + 192 + 64 * 64 + 64 + 64 * 128 + 128 + 128 * 64 + 64
    expected = (48 * 64 + 64) + 64 * 64 + 4 * block + 2 * 64 + (64 * 10 + 10)
    assert num_weights(models.ViT(rngs=nnx.Rngs(0))) == expected


def logits_of(inputs):
    return jnp.asarray(inputs)


LABELS = np.array([0, 3, 2, 1, 3], np.int32)
EXAMPLES = data.Examples(normal(5, 4), LABELS)


def smoothed_loss(targets, smoothing):
    logits = np.asarray(EXAMPLES.inputs, np.float64)
    log_odds = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -np.mean(np.sum(((1 - smoothing) * targets + smoothing / 4) * log_odds, axis=1))


@pytest.mark.parametrize("smoothing", [(), (0.0,)])
def test_without_smoothing_the_loss_is_that_of_the_labels_to_the_bit(smoothing):
    expected = optax.softmax_cross_entropy_with_integer_labels(EXAMPLES.inputs, LABELS).mean()
    assert models.cross_entropy(logits_of, EXAMPLES, *smoothing) == expected
    jaxprs = [
        jax.make_jaxpr(loss)(EXAMPLES)
        for loss in (
            lambda examples: models.cross_entropy(logits_of, examples, *smoothing),
            lambda examples: optax.softmax_cross_entropy_with_integer_labels(*examples).mean(),
        )
    ]
    assert str(jaxprs[0]) == str(jaxprs[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_spreads_a_share_of_each_label(smoothing):
    expected = smoothed_loss(np.eye(4)[LABELS], smoothing)
    loss = models.cross_entropy(logits_of, EXAMPLES, smoothing=smoothing)
    assert loss == pytest.approx(expected, rel=1e-6)
    traced = jax.jit(lambda smoothing: models.cross_entropy(logits_of, EXAMPLES, smoothing))
    assert traced(smoothing) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_may_be_probabilities(smoothing):
    odds = np.exp(normal(5, 4, seed=1))
    odds /= odds.sum(1, keepdims=True)
    loss = models.cross_entropy(logits_of, EXAMPLES._replace(labels=odds), smoothing)
    assert loss == pytest.approx(smoothed_loss(odds, smoothing), rel=1e-6)
    certain = EXAMPLES._replace(labels=np.eye(4, dtype=np.float32)[LABELS])
    losses = [models.cross_entropy(logits_of, examples, smoothing) for examples in (certain, EXAMPLES)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def _num_weights(model):
    return sum(w.size for w in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_sizes_of_the_networks():
    assert _num_weights(models.MLP(rngs=nnx.Rngs(0))) == 669_706
    assert _num_weights(models.Transformer(rngs=nnx.Rngs(0))) == 5_014_026


def test_transformer_sees_all_tokens_and_their_places():
    model = models.Transformer(1, 16, 2, 16, vocabulary=10, length=8, rngs=nnx.Rngs(0))
    tokens = np.arange(8)[None]
    logits = model(tokens)
    assert logits.shape == (1, 10)
    assert not np.allclose(model(tokens[:, ::-1]), logits, atol=1e-6)
    assert not np.allclose(model(np.where(tokens == 3, 9, tokens)), logits, atol=1e-6)


def test_pure_loss_is_the_models_and_leaves_it_alone():
    model = models.ConvNet(dropout=0.0, rngs=nnx.Rngs(0))
    batch = Examples(jnp.ones((4, 8, 8, 1)), jnp.arange(4))
    statistics = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    loss, params = models.pure_loss(model)
    value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.BatchStat), statistics)
    np.testing.assert_allclose(value, models.cross_entropy(model, batch), rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 7, 3)])
def test_network_takes_any_shape_and_examples_do_not_mix(shape):
    model = models.StridedConvNet(shape, 4, rngs=nnx.Rngs(0))
    images = jax.random.uniform(jax.random.key(0), (3, *shape))
    logits = nnx.jit(model)(images)
    assert logits.shape == (3, 4)
    np.testing.assert_allclose(nnx.jit(model)(images[1:2])[0], logits[1], rtol=1e-4, atol=1e-5)
