"""Layer-wise structure against per-example Jacobians and dense blocks, computed here from explicit layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from problems import KEY, dense, softmax_loss

from nso_jax.curvature import GaussNewton, _kronecker
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
    block = _kronecker.Block(FUN, params, batch, 2, lambda: None)
    found = [_kronecker.product_error(key, block, inputs, outputs, 30) for key in jax.random.split(KEY, 60)]
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


# Layers with many inputs per example

TIME, FEATURES = 3, 4  # the hidden layer is as wide as the inputs


def sequences(examples=6, time=TIME):
    """Weights stored (in, out), and inputs (examples, time, features)."""
    rng = np.random.default_rng(3)
    params = {
        "first": jnp.asarray(rng.normal(size=(FEATURES, FEATURES))),
        "second": jnp.asarray(rng.normal(size=(FEATURES, CLASSES))),
    }
    return params, jnp.asarray(rng.normal(size=(examples, time, FEATURES)) + 0.5)


def attention(z):
    """Each time step's mean of all, by their likeness to it."""
    return jax.nn.softmax(jnp.einsum("...sf,...tf->...st", z, z), axis=-1) @ z


def token_loss(hidden):
    """(examples, time, features) to the loss of each example."""
    return -jnp.sum(jax.nn.log_softmax(hidden)[..., 0], axis=-1)


LINEAR_LOSSES = {
    "expand": lambda z: jnp.sum(z**2, axis=(1, 2)),
    "reduce": lambda z: jnp.sum(jnp.mean(z, axis=1) ** 2, axis=1),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss", ["expand", "reduce"])
def test_each_form_is_exact_for_deep_linear_networks_with_its_loss(loss, weight_sharing):
    """And only with its loss. The blocks are those of the dense Hessian."""
    params, x = sequences()
    fun = jax.jit(lambda p, x: jnp.mean(LINEAR_LOSSES[loss](x @ p["first"] @ p["second"])))
    structures = layer_structure(KEY, fun, params, x, k=3, tol=1e-9, weight_sharing=weight_sharing)
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
    found = measure(attention_loss, params, x, "first", k=3, tol=1e-9, weight_sharing=weight_sharing)
    np.testing.assert_allclose(found.kronecker.input, inputs, rtol=1e-12)
    np.testing.assert_allclose(found.kronecker.output, outputs, rtol=0, atol=1e-13)
    assert found.kronecker.output_standard_error == 0
    np.testing.assert_allclose(found.eigenpairs.values, np.linalg.eigvalsh(block)[::-1][:3], rtol=1e-9)
    error = np.linalg.norm(block - np.kron(inputs, outputs)) / np.linalg.norm(block)
    assert abs(found.kronecker.error - error) <= 5 * found.kronecker.error_standard_error


def estimated(fun, seed, **options):
    """The structure of `first` with more time steps than probes, and how many products its output took."""
    params, x = sequences(time=8)
    counts = []
    found = layer_structure(
        jax.random.key(seed),
        fun,
        params,
        x,
        k=1,
        num_probes=7,
        mask={"first": True, "second": False},
        callback=counts.append,
        **options,
    )["['first']"]
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

    structure = measure(jax.jit(loss), params, x, "first", k=1, num_probes=2, weight_sharing="reduce")
    np.testing.assert_allclose(structure.kronecker.output, 0, atol=1e-14)
    np.testing.assert_allclose(structure.kronecker.error, 1, rtol=1e-12)


# A layer with many inputs, in every form and order: `w` is (in, out), `x` is (examples, time, in).


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
    fun = jax.jit(lambda p, x: jnp.mean(LINEAR_LOSSES["reduce"](dense(p["first"], x) @ p["second"])))
    factors = measure(fun, params, x, "first", k=1, num_probes=2, weight_sharing="reduce").kronecker
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
    found = layer_structure(KEY, jax.jit(loss), given, x, k=2, num_probes=2)
    expected = layer_structure(KEY, as_matrices, params, x, k=2, num_probes=2)
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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_batches_of_unequal_lengths_count_by_their_examples(weight_sharing):
    """And in expand, their inputs by their time steps."""
    params, x = sequences()
    batches = [x[:2, :2], x[2:]]
    fun = jax.jit(lambda p, x: jnp.mean(token_loss(x @ p["first"] @ p["second"])))
    factors = measure(
        fun, params, batches, "first", k=1, num_probes=2, weight_sharing=weight_sharing
    ).kronecker

    def hessian(x):
        loss = lambda z: token_loss(z @ params["second"])  # noqa: E731
        return np.asarray(jax.hessian(loss)(jnp.asarray(x @ params["first"])))

    examples = [np.asarray(example) for batch in batches for example in batch]
    rows = (
        np.concatenate(examples)
        if weight_sharing == "expand"
        else np.stack([e.mean(axis=0) for e in examples])
    )
    terms = "tatb->ab" if weight_sharing == "expand" else "satb->ab"
    outputs = np.mean([np.einsum(terms, hessian(example)) for example in examples], axis=0)
    np.testing.assert_allclose(factors.input, rows.T @ rows / len(rows), rtol=1e-12)
    np.testing.assert_allclose(factors.output, outputs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("num_probes", [5, 4])
def test_mixed_examples_have_no_factors_with_many_inputs_either(weight_sharing, num_probes):
    def normalised(params, x):
        z = x @ params["w"]
        return jnp.tanh(z / jnp.std(z, axis=(0, 1), keepdims=True))

    fun = GaussNewton(normalised, lambda outputs, x: jnp.mean(outputs**2))
    options = {"k": 1, "num_probes": num_probes, "weight_sharing": weight_sharing}
    structure = measure(fun, {"w": normal(3, 2)}, normal(8, 5, 3), "w", **options)
    assert structure.reason == "examples mix after the layer: its output for one changes the loss of others."


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


@pytest.mark.usefixtures("standard_promotion")
def test_attention_of_flax():
    """All kernels: (features, heads, head_dim) for queries, keys and values, (heads, head_dim, features) back."""
    linen = pytest.importorskip("flax.linen")
    layer = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, use_bias=False)
    x = normal(5, 2, 4)
    params = jax.jit(layer.init)(KEY, x)["params"]
    forward = jax.jit(lambda p, x: layer.apply({"params": p}, x))
    fun = GaussNewton(forward, jax.jit(lambda outputs, x: jnp.mean(outputs**2)))
    found = layer_structure(KEY, fun, params, x, k=1, num_probes=2)
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
    assert reason_for(tied, normal(3, 3), normal(8, 3)) == (
        "the leaf is used more than once, in dot_general and dot_general: its block is the sum of a term for "
        "each use and one for each pair, which the factors of one layer do not give."
    )


def test_tied_embedding_is_used_more_than_once():
    reason = reason_for(
        lambda p, i: jnp.tanh(p["w"][i]) @ p["w"].T, normal(5, 3), jnp.array([[0, 1, 3], [4, 4, 2]])
    )
    assert reason.startswith("the leaf is used more than once, in gather and dot_general: ")


def test_penalty_is_another_use():
    params, batch = network(jnp.float32)

    def loss(params, batch):
        return softmax_loss(model(params, batch), batch) + 0.1 * jnp.sum(params["first"]["w"] ** 2)

    structure = measure(loss, params, batch, "['first']['w']", k=1)
    assert structure.kronecker is None
    assert "used more than once, in dot_general and integer_pow" in structure.reason.replace(
        "square", "integer_pow"
    )


def test_loop_has_no_factors():
    def recurrent(params, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, None, length=3)[0]

    reason = reason_for(recurrent, normal(3, 3), normal(8, 3))
    assert reason == "the leaf goes into scan, and not into the matrix product of a dense layer."


def test_number_of_vectors_that_is_no_multiple_has_no_factors():
    reason = reason_for(lambda p, x: jnp.tanh(x[1:] @ p["w"]), normal(3, 2), normal(8, 5, 3))
    assert reason == "the layer is applied to 7 x 5 vectors in a batch of 8 examples."


def test_vectors_that_are_of_no_example_have_no_factors():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    reason = reason_for(lambda p, x: x + jnp.mean((table @ p["w"]) ** 2), normal(3, 2), normal(8, 3))
    assert reason == (
        "the layer is applied to 16 vectors in a batch of 8, and which are of one example cannot be told: its "
        "inputs do not keep to their examples when these change places."
    )


def test_product_over_axes_in_the_middle_has_no_factors():
    reason = reason_for(
        lambda p, x: jnp.einsum("nti,hid->nthd", x, p["w"]) ** 2, normal(2, 3, 4), normal(8, 5, 3)
    )
    assert reason == (
        "the leaf is multiplied along its axes [1], neither its first nor its last ones, so it is no matrix there."
    )


def test_weight_of_each_example_has_no_factors():
    reason = reason_for(lambda p, x: jnp.einsum("ni,ni->n", x, jnp.tanh(p["w"])), normal(8, 3), normal(8, 3))
    assert "goes into tanh" in reason
    reason = reason_for(
        lambda p, x: jnp.einsum("ni,nio->no", x, x[:, :, None] * p["w"][None]), normal(3, 2), normal(8, 3)
    )
    assert "goes into broadcast_in_dim" in reason
    reason = reason_for(lambda p, x: jax.vmap(jnp.dot)(x, p["w"])[:, None] ** 2, normal(8, 3), normal(8, 3))
    assert reason == "the leaf is multiplied with an array of shape (8, 3), not with vectors of examples."


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
        (
            {"weight_sharing": "sum"},
            ValueError,
            "weight_sharing: expected one of 'expand', 'reduce', got 'sum'.",
        ),
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
