"""Dense layers are found in every form and order, and what is none is told."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from problems import (
    CLASSES,
    FEATURES,
    IN,
    KEY,
    LINEAR_LOSSES,
    OUT,
    TIME,
    exact,
    measure,
    normal,
    plain,
    reason_for,
    sequences,
    softmax_loss,
    stacked,
    token_loss,
    two_layer_model,
    two_layers,
)

from nso_jax.curvature import gauss_newton, hessian, layer_structure

# One dense layer, in every form that leaves it one: `x` is a batch, `w` is (in, out) or (out, in).


def without_inputs_last(w, x):
    return (w.T @ x.T).T


@jax.jit
def copied_in_jit(w, x):
    return x @ jnp.copy(
        jax.lax.with_sharding_constraint(w, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    )


def checkpointed(w, x):
    return jax.checkpoint(lambda w: x @ checkpoint_name(jax.lax.optimization_barrier(w), "weight"))(w)


def transposed_in_jit(w, x):
    return x @ jax.jit(jnp.transpose)(w)


def vmapped(w, x):
    return jax.vmap(lambda x: w @ x)(x)


def vmapped_jit_and_checkpoint(w, x):
    return jax.vmap(jax.jit(jax.checkpoint(lambda x: w @ x)))(x)


def einsum(w, x):
    return jnp.einsum("oi,ni->no", w, x)


STORED_IN_OUT = [plain, without_inputs_last, copied_in_jit, checkpointed]


STORED_OUT_IN = [transposed_in_jit, vmapped, vmapped_jit_and_checkpoint, einsum]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dense", STORED_IN_OUT + STORED_OUT_IN)
def test_layer_is_found_in_every_form_and_layout(dense):
    params, batch = two_layers()
    inputs, outputs, block = exact("first")
    if dense in STORED_OUT_IN:
        params["first"]["w"] = params["first"]["w"].T
        block = block.reshape(IN, OUT, IN, OUT).transpose(1, 0, 3, 2).reshape(IN * OUT, IN * OUT)
    product = np.kron(outputs, inputs) if dense in STORED_OUT_IN else np.kron(inputs, outputs)
    fun = functools.partial(
        gauss_newton, jax.jit(functools.partial(two_layer_model, dense=dense)), softmax_loss
    )
    factors = measure(fun, params, batch, "['first']['w']", k=3, tol=1e-9).kronecker
    np.testing.assert_allclose(factors.input, inputs, rtol=1e-12)
    np.testing.assert_allclose(factors.output, outputs, rtol=0, atol=1e-14)
    vectors = stacked(factors.vectors)
    assert factors.vectors[0].shape == params["first"]["w"].shape
    np.testing.assert_allclose(vectors @ product, factors.eigenvalues[:, None] * vectors, rtol=0, atol=1e-12)
    error = np.linalg.norm(block - product) / np.linalg.norm(block)
    assert abs(factors.error - error) <= 5 * factors.error_standard_error
    projections = np.linalg.eigh(block)[1][:, -3:].T @ np.linalg.eigh(product)[1][:, -3:]
    np.testing.assert_allclose(factors.overlap, np.sum(projections**2) / 3, rtol=1e-6)


def test_mixed_precision_follows_the_cast():
    params, batch = two_layers(jnp.float32)

    def half(w, x):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)

    fun = functools.partial(gauss_newton, functools.partial(two_layer_model, dense=half), softmax_loss)
    factors = measure(fun, params, batch, "['first']['w']", k=2, tol=1e-2).kronecker
    inputs, outputs, _ = exact("first")
    np.testing.assert_allclose(factors.input, inputs, rtol=0, atol=0.02 * np.linalg.norm(inputs))
    np.testing.assert_allclose(factors.output, outputs, rtol=0, atol=0.02 * np.linalg.norm(outputs))


# With many inputs, in every form and order: `w` is (in, out), `x` is (examples, time, in).


def folded(w, x):
    return (x.reshape(-1, x.shape[2]) @ w).reshape(*x.shape[:2], -1)


def time_first(w, x):
    return (x.transpose(1, 0, 2) @ w).transpose(1, 0, 2)


def time_first_folded(w, x):
    return folded(w, x.transpose(1, 0, 2)).transpose(1, 0, 2)


def features_first(w, x):
    return jax.vmap(lambda x: (w.T @ x.T).T)(x)


def time_twice(w, x):
    return jnp.einsum("nabi,io->nabo", x[:, None], w)[:, 0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("examples", [6, TIME, 1])
@pytest.mark.parametrize("dense", [plain, folded, time_first, time_first_folded, features_first, time_twice])
def test_inputs_of_an_example_are_found_in_every_order(dense, examples):
    """As many examples as time steps, too. The factors of reduce tell which inputs are of one example."""
    params, x = sequences(examples)
    loss = lambda p, x: jnp.mean(LINEAR_LOSSES["reduce"](dense(p["first"], x) @ p["second"]))  # noqa: E731
    options = {"k": 1, "num_probes": 2, "weight_sharing": "reduce"}
    factors = measure(functools.partial(hessian, loss), params, x, "first", **options).kronecker
    means = np.asarray(x).mean(axis=1)
    np.testing.assert_allclose(factors.input, means.T @ means / examples, rtol=1e-12)
    np.testing.assert_allclose(factors.output, 2 * params["second"] @ params["second"].T, rtol=1e-12)
    np.testing.assert_allclose(factors.error, 0, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_leaves_of_more_dimensions_are_matrices():
    """The kernels of attention: (in, heads, out of each) and back, here with axes in another order."""
    params, x = sequences()
    first, second = params["first"].reshape(FEATURES, 2, 2), params["second"].reshape(2, 2, CLASSES)

    def loss(p, x):
        z = jnp.einsum("nti,ihd->hntd", x, p["first"])
        return jnp.mean(token_loss(jnp.einsum("hntd,ohd->nto", jnp.tanh(z), p["second"])))

    as_matrices = jax.jit(lambda p, x: jnp.mean(token_loss(jnp.tanh(x @ p["first"]) @ p["second"])))
    given = {"first": first, "second": second.transpose(2, 0, 1)}
    found = layer_structure(KEY, hessian(loss, given, x), k=2, num_probes=2)
    expected = layer_structure(KEY, hessian(as_matrices, params, x), k=2, num_probes=2)
    for name, leaf in given.items():
        factors, matrices = found[f"['{name}']"].kronecker, expected[f"['{name}']"].kronecker
        np.testing.assert_allclose(factors.input, matrices.input, rtol=1e-10)
        np.testing.assert_allclose(factors.output, matrices.output, rtol=0, atol=1e-13)
        np.testing.assert_allclose(factors.eigenvalues, matrices.eigenvalues, rtol=1e-9)
        np.testing.assert_allclose(factors.overlap, matrices.overlap, rtol=1e-2)
        assert factors.vectors[0].shape == leaf.shape
    np.testing.assert_allclose(
        found["['first']"].kronecker.error, expected["['first']"].kronecker.error, rtol=1e-9
    )


# Layers of the libraries


def assert_has_the_factors_of_the_network(model, params, batch, leaf, layout):
    inputs, outputs, _ = exact("first")
    fun = functools.partial(gauss_newton, jax.jit(model), softmax_loss)
    factors = measure(fun, params, batch, leaf, k=2).kronecker
    np.testing.assert_allclose(factors.input, inputs, rtol=1e-12)
    np.testing.assert_allclose(factors.output, outputs, rtol=0, atol=1e-14)
    assert factors.vectors[0].shape == layout
    assert factors.error < 1
    assert 0.4 < factors.overlap < 1


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize("remat", [False, True])
def test_flax_linen(remat):
    linen = pytest.importorskip("flax.linen")
    params, batch = two_layers()
    dense = linen.remat(linen.Dense) if remat else linen.Dense

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(CLASSES, use_bias=False, name="head")(jnp.tanh(dense(OUT, name="body")(x)))

    first, second = params["first"], params["second"]
    variables = {"body": {"kernel": first["w"], "bias": first["b"]}, "head": {"kernel": second["w"]}}
    forward = lambda p, batch: Network().apply({"params": p}, batch[0])  # noqa: E731
    assert_has_the_factors_of_the_network(forward, variables, batch, "['body']['kernel']", (IN, OUT))


@pytest.mark.usefixtures("standard_promotion")
def test_attention_of_flax():
    """All kernels: (features, heads, head_dim) for queries, keys and values, (heads, head_dim, features) back."""
    linen = pytest.importorskip("flax.linen")
    layer = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, use_bias=False)
    x = normal(5, 2, 4)
    params = jax.jit(layer.init)(KEY, x)["params"]
    forward = jax.jit(lambda p, x: layer.apply({"params": p}, x))
    h = gauss_newton(forward, lambda outputs, x: jnp.mean(outputs**2), params, x)
    found = layer_structure(KEY, h, k=1, num_probes=2)
    assert list(found) == [f"['{name}']['kernel']" for name in ("key", "out", "query", "value")]
    for structure in found.values():
        assert structure.reason == ""
        assert structure.kronecker.input.shape == structure.kronecker.output.shape == (4, 4)
        assert structure.kronecker.vectors[0].shape == structure.eigenpairs.vectors[0].shape
        assert structure.kronecker.output_standard_error == 0
    np.testing.assert_array_equal(
        found["['key']['kernel']"].kronecker.input, found["['value']['kernel']"].kronecker.input
    )


@pytest.mark.usefixtures("x64", "standard_promotion")
def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")
    params, batch = two_layers()

    class Network(nnx.Module):
        def __init__(self):
            options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
            self.body = nnx.Linear(IN, OUT, **options)
            self.head = nnx.Linear(OUT, CLASSES, use_bias=False, **options)
            self.body.kernel[...] = params["first"]["w"]
            self.body.bias[...] = params["first"]["b"]
            self.head.kernel[...] = params["second"]["w"]

        def __call__(self, x):
            return self.head(jnp.tanh(self.body(x)))

    graph, state = nnx.split(Network())
    forward = lambda p, batch: nnx.merge(graph, p)(batch[0])  # noqa: E731
    assert_has_the_factors_of_the_network(forward, state, batch, "['body']['kernel']", (IN, OUT))


@pytest.mark.usefixtures("x64", "standard_promotion")
def test_equinox():
    eqx = pytest.importorskip("equinox")
    params, batch = two_layers()
    linear = [eqx.nn.Linear(IN, OUT, key=KEY), eqx.nn.Linear(OUT, CLASSES, use_bias=False, key=KEY)]
    net = eqx.nn.Sequential([linear[0], eqx.nn.Lambda(jnp.tanh), linear[1]])
    where = lambda net: (net[0].weight, net[0].bias, net[2].weight)  # noqa: E731
    values = (params["first"]["w"].T, params["first"]["b"], params["second"]["w"].T)
    weights, static = eqx.partition(eqx.tree_at(where, net, values), eqx.is_inexact_array)
    forward = lambda p, batch: jax.vmap(eqx.combine(p, static))(batch[0])  # noqa: E731
    assert_has_the_factors_of_the_network(forward, weights, batch, ".layers[0].weight", (OUT, IN))


# Leaves that are no dense layer's weight


def own_rule(w, x):
    product = jax.custom_jvp(lambda w, x: x @ w)
    product.defjvp(lambda primals, tangents: (product(*primals), 2 * primals[1] @ tangents[0]))
    return product(w, x)


GOES_INTO = "the leaf goes into {}, and not into the matrix product of a dense layer."
USED_TWICE = (
    "the leaf is used more than once, in {} and dot_general: its block is the sum of a term for each use and "
    "one for each pair, which the factors of one layer do not give."
)
NO_LAYERS = {  # the model, the leaf's shape, the inputs, and the reason
    "convolution": (
        lambda w, x: jax.lax.conv(x, w, (1, 1), "SAME"), (3, 1, 3, 3), normal(8, 1, 6, 6),
        "the leaf has shape (3, 1, 3, 3), and the weight of a dense layer is a matrix.",
    ),
    "bias": (
        lambda b, x: x + b[None], (3,), normal(8, 3),
        "the leaf has shape (3,), and the weight of a dense layer is a matrix.",
    ),
    "convolution with a matrix": (
        lambda w, x: jax.lax.conv(x, w[None], (1,), "SAME"), (3, 3), normal(8, 3, 6),
        GOES_INTO.format("broadcast_in_dim"),
    ),
    "embedding": (lambda w, i: jnp.tanh(w[i]), (5, 3), jnp.array([0, 1, 4, 4]), GOES_INTO.format("gather")),
    "tied": (lambda w, x: jnp.tanh(x @ w) @ w, (3, 3), normal(8, 3), USED_TWICE.format("dot_general")),
    "transposed": (lambda w, x: jnp.tanh(x @ w) @ w.T, (3, 3), normal(8, 3), USED_TWICE.format("dot_general")),
    "squared": (lambda w, x: x @ (w @ w), (3, 3), normal(8, 3), USED_TWICE.format("dot_general")),
    "tied embedding": (
        lambda w, i: jnp.tanh(w[i]) @ w.T, (5, 3), jnp.array([[0, 1, 3], [4, 4, 2]]), USED_TWICE.format("gather"),
    ),
    "loop": (
        lambda w, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0], (3, 3), normal(8, 3),
        GOES_INTO.format("scan"),
    ),
    "no multiple": (
        lambda w, x: jnp.tanh(x[1:] @ w), (3, 2), normal(8, 5, 3),
        "the layer is applied to 7 x 5 vectors in a batch of 8 examples.",
    ),
    "vectors of no example": (
        lambda w, x: x + jnp.mean((normal(16, 3) @ w) ** 2), (3, 2), normal(8, 3),
        "the layer is applied to 16 vectors in a batch of 8, and which are of one example cannot be told: its inputs do not keep to their examples when these change places.",
    ),
    "axes in the middle": (
        lambda w, x: jnp.einsum("nti,hid->nthd", x, w), (2, 3, 4), normal(8, 5, 3),
        "the leaf is multiplied along its axes [1], neither its first nor its last ones, so it is no matrix there.",
    ),
    "changed": (lambda w, x: jnp.einsum("ni,ni->n", x, jnp.tanh(w)), (8, 3), normal(8, 3), GOES_INTO.format("tanh")),
    "copied": (
        lambda w, x: jnp.einsum("ni,nio->no", x, x[:, :, None] * w[None]), (3, 2), normal(8, 3),
        GOES_INTO.format("broadcast_in_dim"),
    ),
    "a vector for each example": (
        lambda w, x: jax.vmap(jnp.dot)(x, w), (8, 3), normal(8, 3),
        "the leaf is multiplied with an array of shape (8, 3), not with vectors of examples.",
    ),
    "own derivative rule": (own_rule, (3, 2), normal(8, 3), GOES_INTO.format("custom_jvp_call")),
    "unused": (lambda w, x: jnp.tanh(x), (3, 2), normal(8, 3), "the model does not use the leaf."),
    "returned": (lambda w, x: w.T, (3, 2), normal(8, 3), "the leaf is among the outputs of the model."),
}  # fmt: skip


@pytest.mark.parametrize("form", NO_LAYERS)
def test_what_is_no_dense_layer_has_no_factors_for_a_reason(form):
    model, shape, inputs, reason = NO_LAYERS[form]
    assert reason_for(lambda params, x: model(params["w"], x), normal(*shape), inputs) == reason


def test_penalty_is_another_use():
    params, batch = two_layers(jnp.float32)

    def loss(params, batch):
        return softmax_loss(two_layer_model(params, batch), batch) + 0.1 * jnp.sum(params["first"]["w"] ** 2)

    structure = measure(functools.partial(hessian, loss), params, batch, "['first']['w']", k=1)
    assert structure.kronecker is None
    assert re.search(r"used more than once, in dot_general and (square|integer_pow)", structure.reason)
