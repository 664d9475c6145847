"""Layer-wise structure against per-example Jacobians and dense blocks, computed here from explicit layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from problems import KEY, softmax_loss

from nso_jax.curvature import GaussNewton, layers
from nso_jax.curvature.layers import layer_structure, subspace_overlap

IN, OUT, CLASSES, EXAMPLES = 5, 4, 3, 40


def network(dtype=jnp.float64):
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


# One dense layer, in every form that leaves it one: `x` is a batch, `w` is (in, out) or (out, in).


def plain(w, x):
    return x @ w


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


def model(params, batch, dense=plain):
    hidden = jnp.tanh(dense(params["first"]["w"], batch[0]) + params["first"]["b"][None])
    return hidden @ params["second"]["w"]


FUN = GaussNewton(jax.jit(model), jax.jit(softmax_loss))  # compiled once for all tests


def measure(fun, params, batches, leaf, **options):
    """The structure of the leaf whose path contains `leaf`."""
    mask = jax.tree.map_with_path(lambda path, _: leaf in jax.tree_util.keystr(path), params)
    (structure,) = layer_structure(KEY, fun, params, batches, mask=mask, **options).values()
    return structure


def per_example(layer):
    """The inputs x, and M = J^T H J by the layer's output z, of each example of `network()`."""
    params, (x, _) = network()
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
        inputs, matrices = per_example(layer)
        params, batch = network()
        w = params[layer]["w"]
        replaced = lambda w: {**params, layer: {**params[layer], "w": w}}  # noqa: E731
        logits, jacobian = model(params, batch), jax.jacobian(lambda w: model(replaced(w), batch))(w)
        hessian = jax.vmap(jax.hessian(lambda z, y: -jnp.sum(jax.nn.log_softmax(z) * y)))(logits, batch[1])
        rows = np.asarray(jacobian).reshape(EXAMPLES, CLASSES, -1)
        block = np.einsum("nca,ncd,ndb->ab", rows, np.asarray(hessian), rows) / EXAMPLES
        return inputs.T @ inputs / EXAMPLES, matrices.mean(axis=0), block


def stacked(vectors):
    return np.stack([np.ravel(vector) for vector in vectors])


# Layers


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layer", ["first", "second"])
def test_everything_is_that_of_the_dense_block(layer):
    params, batch = network()
    inputs, outputs, block = exact(layer)
    structure = measure(FUN, params, batch, f"['{layer}']['w']", k=3, tol=1e-9)
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
def test_standard_error_is_that_of_the_error():
    """The errors from 60 sets of probes scatter as their standard errors say."""
    params, batch = network()
    inputs, outputs, dense = exact("second")
    block = layers._Block(FUN, params, batch, 2, lambda: None)
    found = [layers._error(key, block, inputs, outputs, 30) for key in jax.random.split(KEY, 60)]
    error = np.linalg.norm(dense - np.kron(inputs, outputs)) / np.linalg.norm(dense)
    scores = [(value - error) / standard_error for value, standard_error in found]
    assert abs(np.mean(scores)) < 5 / np.sqrt(60)
    assert 0.7 < np.std(scores) < 1.4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dense", STORED_IN_OUT + STORED_OUT_IN)
def test_layer_is_found_in_every_form_and_layout(dense):
    params, batch = network()
    inputs, outputs, block = exact("first")
    if dense in STORED_OUT_IN:
        params["first"]["w"] = params["first"]["w"].T
        block = block.reshape(IN, OUT, IN, OUT).transpose(1, 0, 3, 2).reshape(IN * OUT, IN * OUT)
    product = np.kron(outputs, inputs) if dense in STORED_OUT_IN else np.kron(inputs, outputs)
    fun = GaussNewton(jax.jit(functools.partial(model, dense=dense)), FUN.loss)
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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("square", [False, True])
def test_constant_output_matrix_loses_nothing(square):
    """A linear model with the squared loss: M = I for every example, so the block is the Kronecker product."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(30, 4)))
    params = [jnp.asarray(rng.normal(size=(4, 4 if square else 2)))]
    fun = GaussNewton(lambda params, x: x @ params[0], lambda z, x: jnp.mean(jnp.sum(z**2, axis=1)) / 2)
    for matrix in (fun, functools.partial(GaussNewton.__call__, fun)):
        (structure,) = layer_structure(KEY, matrix, params, x, k=4, tol=1e-12).values()
        np.testing.assert_allclose(structure.kronecker.error, 0, atol=1e-13)
        np.testing.assert_allclose(structure.kronecker.error_standard_error, 0, atol=1e-13)
        np.testing.assert_allclose(structure.kronecker.eigenvalues, structure.eigenpairs.values, rtol=1e-10)
        np.testing.assert_allclose(structure.kronecker.output, np.eye(len(params[0].T)), atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_plain_loss_has_the_hessian_by_the_outputs():
    params, batch = network()

    def loss(params, batch):
        return softmax_loss(model(params, batch), batch)

    def example_loss(z, y):
        return -jnp.sum(jax.nn.log_softmax(jnp.tanh(z) @ params["second"]["w"]) * y)

    structure = measure(loss, params, batch, "['first']['w']", k=3, tol=1e-9)
    z = batch[0] @ params["first"]["w"] + params["first"]["b"][None]
    matrices = np.asarray(jax.vmap(jax.hessian(example_loss))(z, batch[1]))
    np.testing.assert_allclose(structure.kronecker.output, matrices.mean(axis=0), rtol=0, atol=1e-14)
    block = np.einsum("ni,nj,nab->iajb", batch[0], batch[0], matrices) / EXAMPLES  # exact: z is linear in W
    values = np.linalg.eigvalsh(block.reshape(IN * OUT, IN * OUT))
    np.testing.assert_allclose(structure.eigenpairs.values, values[::-1][:3], rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_unequal_batches_count_by_their_examples():
    params, batch = network()
    pieces = [jax.tree.map(lambda a, i=i, j=j: a[i:j], batch) for i, j in ((0, 7), (7, 27), (27, 40))]
    one, many = (measure(FUN, params, data, "['first']['w']", k=2, tol=1e-9) for data in (batch, pieces))
    for name in ("input", "output", "error", "error_standard_error", "eigenvalues", "overlap"):
        np.testing.assert_allclose(getattr(many.kronecker, name), getattr(one.kronecker, name), rtol=1e-9)
    np.testing.assert_allclose(many.eigenpairs.values, one.eigenpairs.values, rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_coarse_weights(dtype):
    params, batch = network(dtype)
    inputs, outputs, _ = exact("first")
    factors = measure(FUN, params, batch, "['first']['w']", k=2, tol=1e-2).kronecker
    allowed = 20 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(factors.input, inputs, rtol=0, atol=allowed * np.linalg.norm(inputs))
    np.testing.assert_allclose(factors.output, outputs, rtol=0, atol=allowed * np.linalg.norm(outputs))


def test_mixed_precision_follows_the_cast():
    params, batch = network(jnp.float32)

    def half(w, x):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)

    fun = GaussNewton(functools.partial(model, dense=half), softmax_loss)
    factors = measure(fun, params, batch, "['first']['w']", k=2, tol=1e-2).kronecker
    inputs, outputs, _ = exact("first")
    np.testing.assert_allclose(factors.input, inputs, rtol=0, atol=0.02 * np.linalg.norm(inputs))
    np.testing.assert_allclose(factors.output, outputs, rtol=0, atol=0.02 * np.linalg.norm(outputs))


def test_default_takes_the_matrices_and_all_of_a_small_one():
    params, batch = network(jnp.float32)
    params["empty"] = jnp.zeros((0, 3))
    counts = []
    structures = layer_structure(KEY, FUN, params, batch, k=15, num_probes=2, callback=counts.append)
    assert list(structures) == ["['first']['w']", "['second']['w']"]
    assert [len(found.eigenpairs.values) for found in structures.values()] == [15, 12]
    assert counts == sorted(set(counts))
    pairs = sum(found.eigenpairs.num_products for found in structures.values())
    assert counts[-1] == pairs + (OUT + 1 + 2) + (CLASSES + 1 + 2)


def test_a_layer_does_not_depend_on_which_others_are_studied():
    params, batch = network(jnp.float32)
    together = layer_structure(KEY, FUN, params, batch, k=2)["['second']['w']"]
    alone = measure(FUN, params, batch, "['second']['w']", k=2)
    jax.tree.map(np.testing.assert_array_equal, together, alone)


# Layers of the libraries


def assert_has_the_factors_of_the_network(model, params, batch, leaf, layout):
    inputs, outputs, _ = exact("first")
    fun = GaussNewton(jax.jit(model), FUN.loss)
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
    params, batch = network()
    dense = linen.remat(linen.Dense) if remat else linen.Dense

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(CLASSES, use_bias=False, name="head")(jnp.tanh(dense(OUT, name="body")(x)))

    first, second = params["first"], params["second"]
    variables = {"body": {"kernel": first["w"], "bias": first["b"]}, "head": {"kernel": second["w"]}}
    forward = lambda p, batch: Network().apply({"params": p}, batch[0])  # noqa: E731
    assert_has_the_factors_of_the_network(forward, variables, batch, "['body']['kernel']", (IN, OUT))


@pytest.mark.usefixtures("x64", "standard_promotion")
def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")
    params, batch = network()

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
    params, batch = network()
    linear = [eqx.nn.Linear(IN, OUT, key=KEY), eqx.nn.Linear(OUT, CLASSES, use_bias=False, key=KEY)]
    net = eqx.nn.Sequential([linear[0], eqx.nn.Lambda(jnp.tanh), linear[1]])
    where = lambda net: (net[0].weight, net[0].bias, net[2].weight)  # noqa: E731
    values = (params["first"]["w"].T, params["first"]["b"], params["second"]["w"].T)
    weights, static = eqx.partition(eqx.tree_at(where, net, values), eqx.is_inexact_array)
    forward = lambda p, batch: jax.vmap(eqx.combine(p, static))(batch[0])  # noqa: E731
    assert_has_the_factors_of_the_network(forward, weights, batch, ".layers[0].weight", (OUT, IN))


# Leaves that are no dense layer's weight


def reason_for(model, leaf, batch, loss=lambda outputs, batch: jnp.mean(outputs**2)):
    """Why the leaf `w` of a model is none, its eigenpairs being there all the same."""
    structure = measure(GaussNewton(model, loss), {"w": leaf}, batch, "w", k=1)
    assert structure.kronecker is None
    assert structure.eigenpairs.vectors[0].shape == leaf.shape
    return structure.reason


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def test_convolution_has_no_factors():
    def convolution(params, x):
        return jnp.tanh(jax.lax.conv(x, params["w"], (1, 1), "SAME"))

    reason = reason_for(convolution, normal(3, 1, 3, 3), normal(8, 1, 6, 6))
    assert reason == "the leaf has shape (3, 1, 3, 3), and the weight of a dense layer is a matrix."


def test_matrix_convolution_has_no_factors():
    reason = reason_for(
        lambda p, x: jax.lax.conv(x, p["w"][None], (1,), "SAME"), normal(3, 3), normal(8, 3, 6)
    )
    assert reason == "the leaf goes into broadcast_in_dim, and not into the matrix product of a dense layer."


def test_embedding_has_no_factors():
    reason = reason_for(lambda p, i: jnp.tanh(p["w"][i]), normal(5, 3), jnp.array([0, 1, 4, 4]))
    assert reason == "the leaf goes into gather, and not into the matrix product of a dense layer."


@pytest.mark.parametrize(
    "tied",
    [
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"],
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
        lambda p, x: x @ (p["w"] @ p["w"]),
    ],
)
def test_tied_weights_have_no_factors(tied):
    assert reason_for(tied, normal(3, 3), normal(8, 3)) == "the leaf is used more than once."


def test_penalty_is_another_use():
    params, batch = network(jnp.float32)

    def loss(params, batch):
        return softmax_loss(model(params, batch), batch) + 0.1 * jnp.sum(params["first"]["w"] ** 2)

    structure = measure(loss, params, batch, "['first']['w']", k=1)
    assert structure.kronecker is None
    assert "the leaf goes into integer_pow" in structure.reason or "into square" in structure.reason


def test_loop_has_no_factors():
    def recurrent(params, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, None, length=3)[0]

    reason = reason_for(recurrent, normal(3, 3), normal(8, 3))
    assert reason == "the leaf goes into scan, and not into the matrix product of a dense layer."


def test_sequences_have_no_factors():
    reason = reason_for(lambda p, x: jnp.tanh(x @ p["w"]), normal(3, 2), normal(8, 5, 3))
    assert (
        reason == "the leaf is multiplied with an array of shape (8, 5, 3), not with one vector per example."
    )
    reason = reason_for(lambda p, x: jnp.tanh(x.reshape(-1, 3) @ p["w"]), normal(3, 2), normal(8, 5, 3))
    assert reason == "the layer is applied to 40 vectors in a batch of 8."


def test_weight_of_each_example_has_no_factors():
    reason = reason_for(lambda p, x: jnp.einsum("ni,ni->n", x, jnp.tanh(p["w"])), normal(8, 3), normal(8, 3))
    assert "goes into tanh" in reason
    reason = reason_for(
        lambda p, x: jnp.einsum("ni,nio->no", x, x[:, :, None] * p["w"][None]), normal(3, 2), normal(8, 3)
    )
    assert "goes into broadcast_in_dim" in reason
    reason = reason_for(lambda p, x: jax.vmap(jnp.dot)(x, p["w"])[:, None] ** 2, normal(8, 3), normal(8, 3))
    assert reason == "the leaf is multiplied with an array of shape (8, 3), not with one vector per example."


def test_own_derivative_rule_is_not_followed():
    @jax.custom_jvp
    def product(w, x):
        return x @ w

    product.defjvp(lambda primals, tangents: (product(*primals), 2 * primals[1] @ tangents[0]))
    reason = reason_for(lambda p, x: product(p["w"], x), normal(3, 2), normal(8, 3))
    assert reason == "the leaf goes into custom_jvp_call, and not into the matrix product of a dense layer."


def test_unused_and_returned_leaves_have_no_factors():
    assert (
        reason_for(lambda p, x: jnp.tanh(x), normal(3, 2), normal(8, 3)) == "the model does not use the leaf."
    )
    reason = reason_for(lambda p, x: p["w"].T, normal(3, 2), normal(8, 3))
    assert reason == "the leaf is among the outputs of the model."


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

    fun = GaussNewton(normalised, lambda outputs, x: jnp.mean(outputs**2))
    assert measure(fun, {"w": normal(3, 2)}, normal(8, 3), "w", k=1).kronecker is not None


def test_bias_has_no_factors():
    params, batch = network(jnp.float32)
    structure = measure(FUN, params, batch, "['first']['b']", k=1)
    assert structure.kronecker is None
    assert structure.reason == "the leaf has shape (4,), and the weight of a dense layer is a matrix."


# Errors


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"k": 0}, ValueError, "k: expected an int >= 1, got 0."),
        ({"num_probes": 1}, ValueError, "num_probes: expected an int >= 2, got 1."),
        ({"tol": 0.0}, ValueError, "tol: expected a positive, finite number, got 0.0."),
        ({"mask": False}, ValueError, "mask: selects no leaf of params that has entries."),
        ({"mask": {"first": True}}, ValueError, "mask: not a prefix"),
        ({"key": 0}, TypeError, "key: expected a PRNG key"),
        ({"fun": None}, TypeError, "fun: expected a function"),
        ({"fun": GaussNewton(model, None)}, TypeError, "fun: expected a function as the loss"),
        (
            {"params": {"b": np.zeros(3, np.float32)}},
            ValueError,
            "params: no leaf has two dimensions or more",
        ),
        ({"params": {"i": np.zeros((3, 3), np.int32)}}, TypeError, r"params: leaf \['i'\] is int32\[3,3\]"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": iter([1])}, TypeError, "batches is an iterator"),
    ],
)
def test_errors_say_argument_and_value(options, kind, message):
    params, batch = network(jnp.float32)
    arguments = {"key": KEY, "fun": FUN, "params": params, "batches": batch, **options}
    with pytest.raises(kind, match=message):
        layer_structure(**arguments)


# Overlap of subspaces


def orthonormal(k, n, seed=0):
    return list(np.linalg.qr(np.random.default_rng(seed).normal(size=(n, k)))[0].T)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_overlap_with_itself_is_one_in_any_basis(k):
    vectors = np.stack(orthonormal(k, 7))
    mixed = np.random.default_rng(1).normal(size=(k, k)) @ vectors
    np.testing.assert_allclose(subspace_overlap(list(vectors), list(mixed)), 1, rtol=1e-12)


def test_overlap_with_the_complement_is_zero():
    vectors = orthonormal(6, 6)
    np.testing.assert_allclose(subspace_overlap(vectors[:3], vectors[3:]), 0, atol=1e-15)


def test_overlap_of_rotated_planes():
    x, y, z, w = np.eye(4)
    for first, second in ((0.3, 0.0), (0.4, 1.1)):
        turned = [np.cos(first) * x + np.sin(first) * z, np.cos(second) * y + np.sin(second) * w]
        expected = (np.cos(first) ** 2 + np.cos(second) ** 2) / 2
        np.testing.assert_allclose(subspace_overlap([x, y], turned), expected, rtol=1e-12)
        np.testing.assert_allclose(subspace_overlap(turned, [x, y]), expected, rtol=1e-12)


def test_overlap_of_random_subspaces_is_their_share_of_the_space():
    found = [
        subspace_overlap(orthonormal(3, 20, seed), orthonormal(3, 20, 1000 + seed)) for seed in range(200)
    ]
    assert abs(np.mean(found) - 3 / 20) < 4 * np.std(found, ddof=1) / np.sqrt(len(found))


def test_overlap_of_pytrees_is_that_of_their_entries():
    first, second = (np.random.default_rng(seed).normal(size=(2, 7)).astype(np.float32) for seed in range(2))
    trees = [
        [{"a": jnp.asarray(v[:6].reshape(2, 3)), "b": v[6], "c": None} for v in rows]
        for rows in (first, second)
    ]
    np.testing.assert_allclose(subspace_overlap(*trees), subspace_overlap(first, second), rtol=1e-12)
    assert isinstance(subspace_overlap(*trees), float)


X, Y, Z = np.eye(3)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([], [X], "first: expected at least one vector, got none."),
        ([X], [], "second: expected at least one vector, got none."),
        ([X, Y], [X], "second: expected as many vectors as in first, 2, got 1."),
        ([X, Y[:2]], [X, Y], r"first\[1\]: expected shape \(3,\) as in first\[0\], got \(2,\)."),
        ([X], [X[None]], r"second\[0\]: expected shape \(3,\) as in first\[0\], got \(1, 3\)."),
        (
            [{"a": X}],
            [{"a": 1.0}],
            r"second\[0\]: expected shape \(3,\) for leaf \['a'\] as in first\[0\], got \(\).",
        ),
        ([{"a": X}], [{"b": X}], r"second\[0\]: expected a pytree like first\[0\]"),
        ([X, 2 * X], [X, Y], "first: the 2 vectors are linearly dependent; give a basis."),
        ([X, Y], [0 * X, Y], "second: the 2 vectors are linearly dependent"),
        ([X[:1]] * 2, [X[:1]] * 2, "first: the 2 vectors are linearly dependent"),
        ([X], [np.nan * Y], "second: expected finite vectors, got NaN or infinity in one."),
    ],
)
def test_overlap_errors_say_argument_and_value(first, second, message):
    with pytest.raises(ValueError, match=message):
        subspace_overlap(first, second)
