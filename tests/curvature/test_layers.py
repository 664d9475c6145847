"""Layer by layer, eigenpairs and factors against dense blocks, computed here from explicit layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    CLASSES,
    EXAMPLES,
    IN,
    KEY,
    OUT,
    TWO_LAYERS,
    exact,
    measure,
    softmax_loss,
    stacked,
    two_layer_model,
    two_layers,
)

from nso_jax.curvature import hessian, layer_structure


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layer", ["first", "second"])
def test_everything_is_that_of_the_dense_block(layer):
    params, batch = two_layers()
    inputs, outputs, block = exact(layer)
    structure = measure(TWO_LAYERS, params, batch, f"['{layer}']['w']", k=3, tol=1e-9)
    pairs, factors = structure.eigenpairs, structure.kronecker
    assert structure.reason == ""

    values, vectors = np.linalg.eigh(block)
    np.testing.assert_allclose(pairs.values, values[::-1][:3], rtol=1e-9)
    assert [vector.shape for vector in pairs.vectors] == [params[layer]["w"].shape] * 3
    np.testing.assert_allclose(np.abs(stacked(pairs.vectors) @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-6)

    np.testing.assert_allclose(factors.input, inputs, rtol=1e-12)
    np.testing.assert_allclose(factors.output, outputs, rtol=0, atol=1e-14)
    assert factors.input.dtype == factors.output.dtype == np.float64
    product = np.kron(inputs, outputs)
    values, vectors = np.linalg.eigh(product)
    np.testing.assert_allclose(factors.eigenvalues, values[::-1][:3], rtol=1e-10)
    np.testing.assert_allclose(
        np.abs(stacked(factors.vectors) @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-8
    )
    projections = stacked(pairs.vectors) @ stacked(factors.vectors).T
    np.testing.assert_allclose(factors.overlap, np.sum(projections**2) / 3, rtol=1e-10)

    error = np.linalg.norm(block - product) / np.linalg.norm(block)
    assert abs(factors.error - error) <= 5 * factors.error_standard_error
    assert 0 < factors.error_standard_error < 0.3 * error


@pytest.mark.usefixtures("x64")
def test_plain_loss_has_the_hessian_by_the_outputs():
    params, batch = two_layers()

    def loss(params, batch):
        return softmax_loss(two_layer_model(params, batch), batch)

    def example_loss(z, y):
        return -jnp.sum(jax.nn.log_softmax(jnp.tanh(z) @ params["second"]["w"]) * y)

    structure = measure(functools.partial(hessian, loss), params, batch, "['first']['w']", k=3, tol=1e-9)
    z = batch[0] @ params["first"]["w"] + params["first"]["b"][None]
    matrices = np.asarray(jax.vmap(jax.hessian(example_loss))(z, batch[1]))
    np.testing.assert_allclose(structure.kronecker.output, matrices.mean(axis=0), rtol=0, atol=1e-14)
    block = np.einsum("ni,nj,nab->iajb", batch[0], batch[0], matrices) / EXAMPLES  # exact: z is linear in W
    values = np.linalg.eigvalsh(block.reshape(IN * OUT, IN * OUT))
    np.testing.assert_allclose(structure.eigenpairs.values, values[::-1][:3], rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_unequal_batches_count_by_their_examples():
    params, batch = two_layers()
    pieces = [jax.tree.map(lambda a, i=i, j=j: a[i:j], batch) for i, j in ((0, 7), (7, 27), (27, 40))]
    one, many = (
        measure(TWO_LAYERS, params, data, "['first']['w']", k=2, tol=1e-9) for data in (batch, pieces)
    )
    for name in ("input", "output", "error", "error_standard_error", "eigenvalues", "overlap"):
        np.testing.assert_allclose(getattr(many.kronecker, name), getattr(one.kronecker, name), rtol=1e-9)
    np.testing.assert_allclose(many.eigenpairs.values, one.eigenpairs.values, rtol=1e-9)


def test_default_takes_the_matrices_and_all_of_a_small_one():
    params, batch = two_layers(jnp.float32)
    params["empty"] = jnp.zeros((0, 3))
    counts = []
    structures = layer_structure(KEY, TWO_LAYERS(params, batch), k=15, num_probes=2, callback=counts.append)
    assert list(structures) == ["['first']['w']", "['second']['w']"]
    assert [len(found.eigenpairs.values) for found in structures.values()] == [15, 12]
    assert counts == sorted(set(counts))
    pairs = sum(found.eigenpairs.num_products for found in structures.values())
    assert counts[-1] == pairs + (OUT + 1 + 2) + (CLASSES + 1 + 2)


def test_a_layer_does_not_depend_on_which_others_are_studied():
    params, batch = two_layers(jnp.float32)
    together = layer_structure(KEY, TWO_LAYERS(params, batch), k=2)["['second']['w']"]
    alone = measure(TWO_LAYERS, params, batch, "['second']['w']", k=2)
    jax.tree.map(np.testing.assert_array_equal, together, alone)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected an int >= 1, got 0."),
        ({"num_probes": 1}, "num_probes: expected an int >= 2, got 1."),
        ({"weight_sharing": "sum"}, "weight_sharing: expected one of 'expand', 'reduce', got 'sum'."),
        ({"tol": 0.0}, "tol: expected a positive, finite number, got 0.0."),
    ],
)
def test_errors_in_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer_structure(KEY, TWO_LAYERS(*two_layers(jnp.float32)), **options)


def test_errors_where_there_is_no_layer_to_study():
    loss = lambda params, _: sum(jnp.sum(leaf**2) for leaf in params.values())  # noqa: E731
    params = {"b": jnp.zeros(3), "empty": jnp.zeros((0, 3))}
    with pytest.raises(
        ValueError, match="params: no leaf has two dimensions or more; choose leaves with mask"
    ):
        layer_structure(KEY, hessian(loss, {"b": params["b"]}, None))
    with pytest.raises(ValueError, match="mask: selects no leaf of params that has entries"):
        layer_structure(KEY, hessian(loss, params, None, mask={"b": False, "empty": True}))
