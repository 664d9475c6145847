"""Kronecker factors against the formulas, and their distances to dense blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    FEATURES,
    KEY,
    LINEAR_LOSSES,
    TIME,
    TWO_LAYERS,
    dense,
    exact,
    measure,
    normal,
    reason_for,
    sequences,
    token_loss,
    two_layers,
)

from nso_jax.curvature import _kronecker, gauss_newton, hessian, layer_structure


@pytest.mark.usefixtures("x64")
def test_standard_error_is_that_of_the_error():
    """The errors from 60 sets of probes scatter as their standard errors say."""
    params, batch = two_layers()
    inputs, outputs, dense = exact("second")
    h = TWO_LAYERS(params, batch, mask={"first": False, "second": True})
    block = _kronecker.Block(h, 2, lambda: None)
    found = [_kronecker.product_error(key, block, inputs, outputs, 30) for key in jax.random.split(KEY, 60)]
    error = np.linalg.norm(dense - np.kron(inputs, outputs)) / np.linalg.norm(dense)
    scores = [(value - error) / standard_error for value, standard_error in found]
    assert abs(np.mean(scores)) < 5 / np.sqrt(60)
    assert 0.7 < np.std(scores) < 1.4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("square", [False, True])
def test_constant_output_matrix_loses_nothing(square):
    """A linear model with the squared loss: M = I for every example, so the block is the Kronecker product."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(30, 4)))
    params = [jnp.asarray(rng.normal(size=(4, 4 if square else 2)))]
    squares = lambda z, x: jnp.mean(jnp.sum(z**2, axis=1)) / 2  # noqa: E731
    matrix = functools.partial(gauss_newton, lambda params, x: x @ params[0], squares)
    for h in (matrix(params, x), hessian(matrix(params, x).fun, params, x)):
        (structure,) = layer_structure(KEY, h, k=4, tol=1e-12).values()
        np.testing.assert_allclose(structure.kronecker.error, 0, atol=1e-13)
        np.testing.assert_allclose(structure.kronecker.error_standard_error, 0, atol=1e-13)
        np.testing.assert_allclose(structure.kronecker.eigenvalues, structure.eigenpairs.values, rtol=1e-10)
        np.testing.assert_allclose(structure.kronecker.output, np.eye(len(params[0].T)), atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_coarse_weights(dtype):
    params, batch = two_layers(dtype)
    inputs, outputs, _ = exact("first")
    factors = measure(TWO_LAYERS, params, batch, "['first']['w']", k=2, tol=1e-2).kronecker
    allowed = 20 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(factors.input, inputs, rtol=0, atol=allowed * np.linalg.norm(inputs))
    np.testing.assert_allclose(factors.output, outputs, rtol=0, atol=allowed * np.linalg.norm(outputs))


def attention(z):
    """Each time step's mean of all, by their likeness to it."""
    return jax.nn.softmax(jnp.einsum("...sf,...tf->...st", z, z), axis=-1) @ z


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss", ["expand", "reduce"])
def test_each_form_is_exact_for_deep_linear_networks_with_its_loss(loss, weight_sharing):
    """And only with its loss. The blocks are those of the dense Hessian."""
    params, x = sequences()
    fun = jax.jit(lambda p, x: jnp.mean(LINEAR_LOSSES[loss](x @ p["first"] @ p["second"])))
    structures = layer_structure(KEY, hessian(fun, params, x), k=3, tol=1e-9, weight_sharing=weight_sharing)
    for name, leaf in params.items():
        block = dense(lambda w, x, name=name: fun({**params, name: w}, x), leaf, x)
        factors = structures[f"['{name}']"].kronecker
        product = np.kron(factors.input, factors.output)
        distance = np.linalg.norm(block - product) / np.linalg.norm(block)
        if loss == weight_sharing:
            np.testing.assert_allclose(distance, 0, atol=1e-13)
            np.testing.assert_allclose(factors.error, 0, atol=1e-13)
            np.testing.assert_allclose(factors.overlap, 1, rtol=1e-9)
        else:
            assert distance > 0.1
            assert abs(factors.error - distance) <= 5 * factors.error_standard_error
        assert factors.output_standard_error == 0


@functools.cache
def attention_factors(time=TIME):
    """Each form's factors of `first`, by the formulas, and the dense block; time steps mix after the layer."""
    with jax.enable_x64(True):
        params, x = sequences(time=time)
        z = np.asarray(x @ params["first"])

        def example_loss(z):
            return token_loss(jnp.tanh(attention(z)) @ params["second"])

        hessians = np.asarray(jax.jit(jax.vmap(jax.hessian(example_loss)))(z))  # (n, s, a, t, b)
        x = np.asarray(x)
        means = x.mean(axis=1)
        block = np.einsum("nsi,njt,nsatb->iajb", x, x.transpose(0, 2, 1), hessians) / len(x)
        expand = np.einsum("nti,ntj->ij", x, x) / len(x) / time, np.einsum("ntatb->ab", hessians) / len(x)
        reduce = means.T @ means / len(x), np.einsum("nsatb->ab", hessians) / len(x)
        return {"expand": expand, "reduce": reduce}, block.reshape(FEATURES**2, FEATURES**2)


@jax.jit
def attention_loss(params, x):
    return jnp.mean(token_loss(jnp.tanh(attention(x @ params["first"])) @ params["second"]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_factors_are_those_of_the_formulas_where_time_steps_mix(weight_sharing):
    params, x = sequences()
    factors, block = attention_factors()
    inputs, outputs = factors[weight_sharing]
    matrix = functools.partial(hessian, attention_loss)
    found = measure(matrix, params, x, "first", k=3, tol=1e-9, weight_sharing=weight_sharing)
    np.testing.assert_allclose(found.kronecker.input, inputs, rtol=1e-12)
    np.testing.assert_allclose(found.kronecker.output, outputs, rtol=0, atol=1e-13)
    assert found.kronecker.output_standard_error == 0
    np.testing.assert_allclose(found.eigenpairs.values, np.linalg.eigvalsh(block)[::-1][:3], rtol=1e-9)
    error = np.linalg.norm(block - np.kron(inputs, outputs)) / np.linalg.norm(block)
    assert abs(found.kronecker.error - error) <= 5 * found.kronecker.error_standard_error


def estimated(fun, seed):
    """The structure of `first` with more time steps than probes, and how many products its output took."""
    params, x = sequences(time=8)
    counts = []
    h = hessian(fun, params, x, mask={"first": True, "second": False})
    options = {"k": 1, "num_probes": 7, "callback": counts.append}
    found = layer_structure(jax.random.key(seed), h, **options)["['first']"]
    return found.kronecker, counts[-1] - found.eigenpairs.num_products - 7


@pytest.mark.usefixtures("x64")
def test_more_time_steps_than_probes_are_estimated():
    """The distances to the exact factor are as the standard errors say, in 4 independent runs."""
    _, outputs = attention_factors(8)[0]["expand"]
    ratios = []
    for seed in range(4):
        factors, products = estimated(attention_loss, seed)
        assert products == (FEATURES + 1) + (2 + 7 * FEATURES)
        distance = np.linalg.norm(factors.output - outputs) / np.linalg.norm(factors.output)
        ratios.append(distance / factors.output_standard_error)
        np.testing.assert_array_equal(factors.output, factors.output.T)
    # Most of the error is in one direction of the matrix, so a ratio is about |t| with 6 degrees of freedom.
    assert 0.15 < np.sqrt(np.mean(np.square(ratios))) < 3


@pytest.mark.usefixtures("x64")
def test_estimate_ends_when_it_is_good_enough():
    """Time steps that mix a little: two draws of signs will do."""

    def loss(params, x):
        z = x @ params["first"]
        return jnp.mean(token_loss((z + 0.01 * jnp.mean(z, axis=1, keepdims=True)) @ params["second"]))

    factors, products = estimated(jax.jit(loss), 0)
    assert products == (FEATURES + 1) + (2 + 2 * FEATURES)
    assert 0 < factors.output_standard_error <= 0.01


@pytest.mark.usefixtures("x64")
def test_reduce_sees_nothing_of_the_keys_of_attention():
    """One shift of all of them changes no weight of the mean: the factor is zero, and nothing mixes."""
    params, x = sequences()

    def loss(params, x):
        weights = jax.nn.softmax(x @ (x @ params["first"]).transpose(0, 2, 1), axis=-1)
        return jnp.mean(token_loss(weights @ x @ params["second"]))

    options = {"k": 1, "num_probes": 2, "weight_sharing": "reduce"}
    structure = measure(functools.partial(hessian, loss), params, x, "first", **options)
    np.testing.assert_allclose(structure.kronecker.output, 0, atol=1e-14)
    np.testing.assert_allclose(structure.kronecker.error, 1, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_batches_of_unequal_lengths_count_by_their_examples(weight_sharing):
    """And in expand, their inputs by their time steps."""
    params, x = sequences()
    batches = [x[:2, :2], x[2:]]
    loss = lambda p, x: jnp.mean(token_loss(x @ p["first"] @ p["second"]))  # noqa: E731
    options = {"k": 1, "num_probes": 2, "weight_sharing": weight_sharing}
    factors = measure(functools.partial(hessian, loss), params, batches, "first", **options).kronecker

    def output_hessian(x):
        loss = lambda z: token_loss(z @ params["second"])  # noqa: E731
        return np.asarray(jax.hessian(loss)(jnp.asarray(x @ params["first"])))

    examples = [np.asarray(example) for batch in batches for example in batch]
    rows = (
        np.concatenate(examples)
        if weight_sharing == "expand"
        else np.stack([e.mean(axis=0) for e in examples])
    )
    terms = "tatb->ab" if weight_sharing == "expand" else "satb->ab"
    outputs = np.mean([np.einsum(terms, output_hessian(example)) for example in examples], axis=0)
    np.testing.assert_allclose(factors.input, rows.T @ rows / len(rows), rtol=1e-12)
    np.testing.assert_allclose(factors.output, outputs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("num_probes", [5, 4])
def test_mixed_examples_have_no_factors_with_many_inputs_either(weight_sharing, num_probes):
    def normalised(params, x):
        z = x @ params["w"]
        return jnp.tanh(z / jnp.std(z, axis=(0, 1), keepdims=True))

    fun = functools.partial(gauss_newton, normalised, lambda outputs, x: jnp.mean(outputs**2))
    options = {"k": 1, "num_probes": num_probes, "weight_sharing": weight_sharing}
    structure = measure(fun, {"w": normal(3, 2)}, normal(8, 5, 3), "w", **options)
    assert structure.reason == "examples mix after the layer: its output for one changes the loss of others."


def test_leaf_without_effect_has_no_factors():
    reason = reason_for(lambda p, x: jax.lax.stop_gradient(x @ p["w"]), normal(3, 2), normal(8, 3))
    assert reason == "the leaf's block is zero: the loss does not depend on it to second order."


@pytest.mark.parametrize(
    "mixing",
    [
        lambda z: (z - jnp.mean(z, axis=0, keepdims=True)) / jnp.std(z, axis=0, keepdims=True),
        lambda z: z + 0.01 * z[::-1] ** 2,
        lambda z: jnp.broadcast_to(jnp.sum(z), (8, 2)),
    ],
    ids=["training-mode batch normalization", "pairs", "sum"],
)
def test_mixed_examples_have_no_factors(mixing):
    reason = reason_for(lambda p, x: jnp.tanh(mixing(x @ p["w"])), normal(3, 2), normal(8, 3))
    assert reason == "examples mix after the layer: its output for one changes the loss of others."


def test_batch_normalization_before_the_layer_is_no_matter():
    def normalised(params, x):
        return jnp.tanh((x - jnp.mean(x, axis=0, keepdims=True)) @ params["w"])

    fun = functools.partial(gauss_newton, normalised, lambda outputs, x: jnp.mean(outputs**2))
    assert measure(fun, {"w": normal(3, 2)}, normal(8, 3), "w", k=1).kronecker is not None
