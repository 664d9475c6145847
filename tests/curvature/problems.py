"""Losses with dense Hessians, which are exact and small, for all tests of the curvature package."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from nso_jax.curvature import gauss_newton, layer_structure

KEY = jax.random.key(0)


def mlp_logits(params, x):
    first, second = params["layers"]
    hidden = jnp.tanh(x @ first["w"] + first["b"][None])
    return params["scale"] * (hidden @ second["w"])


def softmax_loss(logits, batch):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * batch[1], axis=1))


@jax.jit  # so that its product is compiled once for each shape, not once for each test
def mlp_loss(params, batch):
    return softmax_loss(mlp_logits(params, batch[0]), batch)


def mlp_params(rng, dtype):
    """Every kind of leaf: 25 weights, nested, with a None, a scalar and an empty array."""
    return {
        "layers": [
            {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype), "b": jnp.asarray(rng.normal(size=4), dtype)},
            {"w": jnp.asarray(rng.normal(size=(4, 2)), dtype), "b": None},
        ],
        "scale": jnp.asarray(1.5, dtype),
        "unused": jnp.zeros((0, 3), dtype),
    }


def mlp(dtype):
    """A network and its data."""
    rng = np.random.default_rng(0)
    params = mlp_params(rng, dtype)
    x = jnp.asarray(rng.normal(size=(30, 3)), dtype)
    y = jnp.asarray(np.eye(2)[rng.integers(2, size=30)], dtype)
    return params, (x, y)


FIRST_LAYER = slice(0, 16)  # where its weights stand in the dense Hessian of `mlp`


def dense(fun, params, batch):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda w: fun(unravel(w), batch)))(flat), np.float64)


@functools.cache
def exact_mlp_hessian(dtype):
    """In float64, of the weights and the data as they are once rounded to `dtype`."""
    with jax.enable_x64(True):
        return dense(mlp_loss, *jax.tree.map(lambda x: x.astype(jnp.float64), mlp(dtype)))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def random_tangent(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


@jax.jit
def quadratic(params, matrix):
    return params @ matrix @ params / 2


def symmetric(spectrum):
    """A dense matrix with these eigenvalues."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(spectrum), len(spectrum))))
    return jnp.asarray(basis @ np.diag(spectrum) @ basis.T)


def cut(batch, start, stop):
    """Some examples, with the scalars that they share."""
    return jax.tree.map(lambda x: x[start:stop] if x.ndim else x, batch)


def split(batch, *sizes):
    ends = itertools.accumulate(sizes, initial=0)
    return [cut(batch, a, b) for a, b in itertools.pairwise(ends)]


def convolution():
    """A small network of one, and eight images."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 1, 3, 3)), jnp.float32), "head": jnp.ones(3)}

    def loss(params, batch):
        maps = jax.lax.conv(batch, params["kernel"], (1, 1), "SAME")
        return jnp.mean((jnp.mean(jax.nn.softplus(maps), axis=(2, 3)) @ params["head"]) ** 2)

    return loss, params, jnp.asarray(rng.normal(size=(8, 1, 6, 6)), jnp.float32)


class Loader:
    """An iterable that is no pytree, like a data loader; it counts its passes."""

    def __init__(self, batches):
        self.batches = batches
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


W = {"w": jnp.ones(3)}


def cubic(params, batch):
    return jnp.mean(batch) * jnp.sum(params["w"] ** 3)


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array


@jax.jit
def network_loss(params, batch):
    x, y = batch
    logits = jax.nn.relu(x @ params["w1"] + params["b1"][None]) @ params["w2"] + params["b2"][None]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])


@functools.cache
def network():
    """A network of 2,410 weights, trained on 100 handwritten digits, in float64."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    with jax.enable_x64(True):
        batch = jnp.asarray(digits.data[:100] / 16), jnp.asarray(digits.target[:100])
        rng = np.random.default_rng(0)
        params = {
            "w1": jnp.asarray(rng.normal(size=(64, 32)) / 8),
            "b1": jnp.zeros(32),
            "w2": jnp.asarray(rng.normal(size=(32, 10)) / 6),
            "b2": jnp.zeros(10),
        }
        gradient = jax.jit(jax.grad(network_loss))
        for _ in range(60):
            params = jax.tree.map(lambda w, g: w - 0.3 * g, params, gradient(params, batch))
        return params, batch


@functools.cache
def exact_network_hessian():
    with jax.enable_x64(True):
        return dense(network_loss, *network())


# Losses whose gap under noise is known


@jax.jit
def affine_quadratic(w, matrix):
    return 2.0 + jnp.sum(w) + w @ matrix @ w / 2


@jax.jit
def per_example(params, x):
    """Not quadratic, with two leaves and a mean over examples."""
    return jnp.mean(jax.nn.softplus(jnp.tanh(x @ params["w"]) @ params["v"]))


@jax.jit
def quartic(w, batch):
    """The Hessian is I at 0, and the gap `n (sigma^2/2 + 3 c sigma^4)` for normal noise in n weights."""
    return 1 + jnp.sum(w**2) / 2 + batch * jnp.sum(w**4)


def small_network(dtype):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(3, 4)), dtype),
        "v": jnp.asarray(rng.normal(size=4), dtype),
    }
    return params, jnp.asarray(rng.normal(size=(30, 3)), dtype)


# Networks of dense layers

IN, OUT, CLASSES, EXAMPLES = 5, 4, 3, 40


def two_layers(dtype=jnp.float64):
    """Weights stored (in, out), labels one-hot."""
    rng = np.random.default_rng(0)
    params = {
        "first": {
            "w": jnp.asarray(rng.normal(size=(IN, OUT)), dtype),
            "b": jnp.asarray(rng.normal(size=OUT), dtype),
        },
        "second": {"w": jnp.asarray(rng.normal(size=(OUT, CLASSES)), dtype)},
    }
    x = jnp.asarray(rng.normal(size=(EXAMPLES, IN)) + 0.5, dtype)
    y = jnp.asarray(np.eye(CLASSES)[rng.integers(CLASSES, size=EXAMPLES)], dtype)
    return params, (x, y)


def plain(w, x):
    return x @ w


def two_layer_model(params, batch, dense=plain):
    hidden = jnp.tanh(dense(params["first"]["w"], batch[0]) + params["first"]["b"][None])
    return hidden @ params["second"]["w"]


TWO_LAYERS = functools.partial(gauss_newton, two_layer_model, softmax_loss)


def measure(matrix, params, batches, leaf, **options):
    """The structure of the leaf whose path contains `leaf`."""
    mask = jax.tree.map_with_path(lambda path, _: leaf in jax.tree_util.keystr(path), params)
    (structure,) = layer_structure(KEY, matrix(params, batches, mask=mask), **options).values()
    return structure


def inputs_and_output_hessians(layer):
    """The inputs x, and M = J^T H J by the layer's output z, of each example of `two_layers()`."""
    params, (x, _) = two_layers()
    z = x @ params["first"]["w"] + params["first"]["b"][None]
    inputs = {"first": x, "second": jnp.tanh(z)}[layer]
    head = {"first": lambda z: jnp.tanh(z) @ params["second"]["w"], "second": lambda z: z}[layer]
    outputs = {"first": z, "second": jnp.tanh(z) @ params["second"]["w"]}[layer]
    jacobians = np.asarray(jax.vmap(jax.jacobian(head))(outputs))
    p = np.asarray(jax.vmap(lambda z: jax.nn.softmax(head(z)))(outputs))
    hessians = np.einsum("nc,cd->ncd", p, np.eye(CLASSES)) - np.einsum("nc,nd->ncd", p, p)
    return np.asarray(inputs), np.einsum("nca,ncd,ndb->nab", jacobians, hessians, jacobians)


@functools.cache
def exact(layer):
    """E[x x^T], E[M] and the dense Gauss-Newton block for a weight stored (in, out)."""
    with jax.enable_x64(True):
        inputs, matrices = inputs_and_output_hessians(layer)
        params, batch = two_layers()
        w = params[layer]["w"]
        replaced = lambda w: {**params, layer: {**params[layer], "w": w}}  # noqa: E731
        logits, jacobian = (
            two_layer_model(params, batch),
            jax.jacobian(lambda w: two_layer_model(replaced(w), batch))(w),
        )
        hessian = jax.vmap(jax.hessian(lambda z, y: -jnp.sum(jax.nn.log_softmax(z) * y)))(logits, batch[1])
        rows = np.asarray(jacobian).reshape(EXAMPLES, CLASSES, -1)
        block = np.einsum("nca,ncd,ndb->ab", rows, np.asarray(hessian), rows) / EXAMPLES
        return inputs.T @ inputs / EXAMPLES, matrices.mean(axis=0), block


def stacked(vectors):
    return np.stack([np.ravel(vector) for vector in vectors])


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def reason_for(model, leaf, batch, loss=lambda outputs, batch: jnp.mean(outputs**2)):
    """Why the leaf `w` of a model is none, its eigenpairs being there all the same."""
    structure = measure(functools.partial(gauss_newton, model, loss), {"w": leaf}, batch, "w", k=1)
    assert structure.kronecker is None
    assert structure.eigenpairs.vectors[0].shape == leaf.shape
    return structure.reason


TIME, FEATURES = 3, 4  # the hidden layer is as wide as the inputs


def sequences(examples=6, time=TIME):
    """Weights stored (in, out), and inputs (examples, time, features)."""
    rng = np.random.default_rng(3)
    params = {
        "first": jnp.asarray(rng.normal(size=(FEATURES, FEATURES))),
        "second": jnp.asarray(rng.normal(size=(FEATURES, CLASSES))),
    }
    return params, jnp.asarray(rng.normal(size=(examples, time, FEATURES)) + 0.5)


def token_loss(hidden):
    """(examples, time, features) to the loss of each example."""
    return -jnp.sum(jax.nn.log_softmax(hidden)[..., 0], axis=-1)


LINEAR_LOSSES = {  # for which one form of the factors each is exact
    "expand": lambda z: jnp.sum(z**2, axis=(1, 2)),
    "reduce": lambda z: jnp.sum(jnp.mean(z, axis=1) ** 2, axis=1),
}
