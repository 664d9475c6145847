"""Products with Hessians and Gauss-Newton matrices, and the errors that all estimators share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    FIRST_LAYER,
    KEY,
    Batch,
    Loader,
    dense,
    exact_mlp_hessian,
    flat,
    mlp,
    mlp_logits,
    mlp_loss,
    quadratic,
    random_tangent,
    softmax_loss,
    split,
)

from nso_jax import curvature
from nso_jax.curvature import operators


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(30,), (17, 13), (10, 10, 10)])
def test_product_is_that_of_the_dense_hessian_of_all_data(sizes):
    params, batch = mlp(jnp.float64)
    tangent = random_tangent(params)
    result = curvature.hvp(mlp_loss, params, split(batch, *sizes))(tangent)
    expected = exact_mlp_hessian(jnp.float64) @ flat(tangent)
    np.testing.assert_allclose(flat(result), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "form",
    [tuple, lambda batch: Batch(*batch), lambda batch: [batch], lambda batch: Loader([batch])],
    ids=["tuple", "namedtuple", "list", "loader"],
)
@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_product_takes_a_batch_in_every_form(form, array):
    params, batch = mlp(jnp.float32)
    tangent = random_tangent(params)
    result = curvature.hvp(mlp_loss, params, form(jax.tree.map(array, batch)))(tangent)
    np.testing.assert_allclose(flat(result), exact_mlp_hessian(jnp.float32) @ flat(tangent), atol=1e-5)


def test_product_without_data_and_with_a_dict():
    def loss(w, batch):
        return jnp.sum(w**4) * (1 if batch is None else jnp.mean(batch["x"]))

    w, v = jnp.arange(3.0), jnp.ones(3)
    for batch in (None, {"x": jnp.ones(5)}):
        np.testing.assert_allclose(curvature.hvp(loss, w, batch)(v), 12 * w**2, rtol=1e-6)


def test_product_sums_many_float32_batches_without_loss():
    """A plain float32 sum of these is off by 17 units in the last place."""
    scales = np.random.default_rng(0).normal(100, size=(3000, 1, 1)).astype(np.float32)
    one = jnp.ones(())
    result = curvature.hvp(lambda w, batch: batch[0, 0] * w**2 / 2, one, list(scales))(one)
    assert abs(float(result) - scales.mean(dtype=np.float64)) <= np.spacing(np.float32(100))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_keeps_structure_and_dtypes(dtype):
    params, batch = mlp(dtype)
    tangent = random_tangent(params)
    result = curvature.hvp(mlp_loss, params, split(batch, 17, 13))(tangent)
    assert jax.tree.map(jnp.result_type, result) == jax.tree.map(jnp.result_type, params)
    expected = exact_mlp_hessian(dtype) @ flat(tangent)
    assert np.linalg.norm(flat(result) - expected) <= 10 * jnp.finfo(dtype).eps * np.linalg.norm(expected)


def test_product_compiles_once_for_each_shape():
    shapes = []

    def loss(params, batch):
        shapes.append(batch[0].shape)
        return mlp_loss(params, batch)

    params, batch = mlp(jnp.float32)
    product = curvature.hvp(loss, params, split(batch, 10, 10, 5))
    for seed in range(3):
        product(random_tangent(params, seed))
    assert shapes == [(10, 3), (5, 3)]


def test_jitted_loss_stays_compiled_between_calls_and_a_plain_one_may_change():
    traces, slope = [], 1.0

    def loss(params, batch):
        traces.append(1)
        return slope * quadratic(params, batch)

    matrix, w, jitted = jnp.eye(2), jnp.ones(2), jax.jit(loss)
    for _ in range(3):
        curvature.hvp(jitted, w, matrix)(w)
    assert len(traces) == 1
    for slope in (1.0, 2.0):
        np.testing.assert_allclose(curvature.hvp(loss, w, matrix)(w), slope * w)


def test_convolution():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 1, 3, 3)), jnp.float32), "head": jnp.ones(3)}
    images = jnp.asarray(rng.normal(size=(8, 1, 6, 6)), jnp.float32)

    def loss(params, batch):
        maps = jax.lax.conv(batch, params["kernel"], (1, 1), "SAME")
        return jnp.mean((jnp.mean(jax.nn.softplus(maps), axis=(2, 3)) @ params["head"]) ** 2)

    assert_measures_the_hessian(loss, params, images)


def test_flax_state():
    nnx = pytest.importorskip("flax.nnx")
    graph, params = nnx.split(nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
    assert_measures_the_hessian(lambda p, batch: jnp.mean(nnx.merge(graph, p)(batch) ** 2), params, x)


def assert_measures_the_hessian(loss, params, data):
    matrix, tangent = dense(loss, params, data), random_tangent(params)
    result = curvature.hvp(loss, params, split(data, 5, len(data) - 5))(tangent)
    assert jax.tree.structure(result) == jax.tree.structure(params)
    np.testing.assert_allclose(flat(result), matrix @ flat(tangent), rtol=1e-4, atol=1e-5)
    estimate = curvature.trace(KEY, loss, params, data, num_products=20)
    assert abs(estimate.value - np.trace(matrix)) <= 5 * estimate.standard_error
    assert jax.tree.structure(estimate.per_leaf) == jax.tree.structure(params)
    pairs = curvature.eigenvalues(KEY, loss, params, data, k=1)
    assert pairs.values[0] == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=1e-5)


# The Gauss-Newton matrix


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(30,), (17, 13)])
def test_gauss_newton_product_is_that_of_the_dense_matrix(sizes):
    params, batch = mlp(jnp.float64)
    weights, unravel = ravel_pytree(params)
    jacobian = jax.jit(jax.jacobian(lambda w: mlp_logits(unravel(w), batch[0])))(weights)
    p = np.asarray(jax.nn.softmax(mlp_logits(params, batch[0])))
    inner = np.einsum("nk,kl->nkl", p, np.eye(2)) - np.einsum("nk,nl->nkl", p, p)
    matrix = np.einsum("nkw,nkl,nlv->wv", jacobian, inner, jacobian) / 30
    fun = curvature.GaussNewton(lambda params, batch: mlp_logits(params, batch[0]), softmax_loss)
    np.testing.assert_allclose(fun(params, batch), mlp_loss(params, batch), rtol=1e-12)
    tangent, batches = random_tangent(params), split(batch, *sizes)
    result = curvature.ggn_vp(fun.model, fun.loss, params, batches)(tangent)
    np.testing.assert_allclose(flat(result), matrix @ flat(tangent), rtol=0, atol=1e-12)
    pairs = curvature.eigenvalues(KEY, fun, params, batches, k=3)
    np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(matrix)[:-4:-1], atol=1e-10)
    estimate = curvature.trace(KEY, fun, params, batches)
    assert estimate.value == pytest.approx(np.trace(matrix), rel=1e-10)


def test_gauss_newton_matrix_of_a_linear_model_is_the_hessian():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3)), jnp.float32)
    fun = curvature.GaussNewton(lambda w, x: x @ w, lambda outputs, x: jnp.mean(outputs**4))
    w = v = jnp.asarray([1.0, -2.0, 0.5])
    expected = curvature.hvp(lambda w, x: jnp.mean((x @ w) ** 4), w, x)(v)
    np.testing.assert_allclose(curvature.hvp(fun, w, x)(v), expected, rtol=1e-5)


def test_jitted_gauss_newton_parts_stay_compiled():
    traces = []

    def model(w, x):
        traces.append(1)
        return x * w

    parts = jax.jit(model), jax.jit(lambda outputs, _: jnp.mean(outputs**2))
    for _ in range(3):
        curvature.ggn_vp(*parts, jnp.ones(()), jnp.ones(2))(jnp.ones(()))
    assert len(traces) == 1


# How products are made


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask", [{"layers": [True, False], "scale": False, "unused": False}])
def test_masked_product_is_that_of_a_block(mask):
    params, batch = mlp(jnp.float64)
    tangent = random_tangent(params)
    result = curvature.hvp(mlp_loss, params, batch, mask=mask)(tangent)
    expected = np.zeros(25)
    block = exact_mlp_hessian(jnp.float64)[FIRST_LAYER, FIRST_LAYER]
    expected[FIRST_LAYER] = block @ flat(tangent)[FIRST_LAYER]
    np.testing.assert_allclose(flat(result), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("block_bytes", [1, 2**29])
def test_products_do_not_depend_on_chunks_and_blocks(chunk_size, block_bytes, monkeypatch):
    monkeypatch.setattr(operators, "_BLOCK_BYTES", block_bytes)
    params, batch = mlp(jnp.float64)
    loader, counts = Loader(split(batch, 17, 13)), []
    operator = operators.Operator(mlp_loss, params, loader, chunk_size=chunk_size, callback=counts.append)
    vectors = np.random.default_rng(0).normal(size=(5, operator.size))
    expected = vectors @ exact_mlp_hessian(jnp.float64)
    np.testing.assert_allclose(operator.products(vectors), expected, rtol=0, atol=1e-12)
    assert counts[-1] == operator.num_products == 5
    assert loader.passes == (1 if block_bytes > 1 else -(-5 // (chunk_size or 1)))


def test_probes_do_not_depend_on_their_number():
    operator = operators.Operator(quadratic, jnp.ones(45), jnp.eye(45))
    signs = operator.signs(KEY, 0, 400)
    np.testing.assert_array_equal(signs[3:5], operator.signs(KEY, 3, 2))
    np.testing.assert_array_equal(abs(signs), 1)
    assert abs(signs.mean()) <= 5 / np.sqrt(signs.size)
    correlations = signs.T @ signs / 400 - np.eye(45)
    assert abs(correlations).max() <= 5 / np.sqrt(400)


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


class Watched:
    """A loader of many batches, made when they are asked for, that watches the memory of arrays."""

    def __init__(self, count):
        self.count, self.peak = count, 0

    def __iter__(self):
        for seed in range(self.count):
            yield np.random.default_rng(seed).normal(size=(50, 20)).astype(np.float32)
            self.peak = max(self.peak, live_bytes())


@pytest.mark.parametrize("kept", [0, 10**4])
def test_memory_does_not_grow_with_the_number_of_batches(kept, monkeypatch):
    monkeypatch.setattr(operators, "_KEPT_BYTES", kept)
    loss = jax.jit(lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2))
    w, peaks = jnp.ones(20), []
    for count in (3, 30):
        before, loader = live_bytes(), Watched(count)
        operators.Operator(loss, w, loader).products(np.ones((2, 20)))
        operator = operators.Operator(loss, w, list(Watched(count)))
        operator.products(np.ones((2, 20)))
        peaks.append((loader.peak - before, live_bytes() - before))
    assert peaks[1][0] - peaks[0][0] <= 27 * 4  # flags; a batch has 4,000 bytes
    assert max(peak[1] for peak in peaks) <= kept + 10**3


def test_a_list_is_linearized_once_and_a_loader_in_every_pass():
    params, batch = mlp(jnp.float32)
    for batches, passes in ((split(batch, 17, 13), 1), (batch, 1), (Loader(split(batch, 17, 13)), 3)):
        operator = operators.Operator(mlp_loss, params, batches)
        calls = []
        linearize = operator._steps.linearize
        operator._steps = operator._steps._replace(
            linearize=lambda params, batch, linearize=linearize, calls=calls: (
                calls.append(1),
                linearize(params, batch),
            )[1]
        )
        for _ in range(3):
            operator.products(np.ones((1, operator.size)))
        assert len(calls) == passes * len(list(operators.each(batches)))


# Errors

W = {"w": jnp.ones(3)}


def cubic(params, batch):
    return jnp.mean(batch) * jnp.sum(params["w"] ** 3)


def returns(value):
    return lambda params, _: value(params["w"])


ESTIMATORS = {
    "diagonal": lambda fun, params, batches: curvature.diagonal(KEY, fun, params, batches),
    "spectral_density": lambda fun, params, batches: curvature.spectral_density(KEY, fun, params, batches),
    "hvp": lambda fun, params, batches: curvature.hvp(fun, params, batches)(params),
    "trace": lambda fun, params, batches: curvature.trace(KEY, fun, params, batches, num_products=4),
    "eigenvalues": lambda fun, params, batches: curvature.eigenvalues(KEY, fun, params, batches, k=1),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (cubic, W, (b for b in [1.0])),
            TypeError,
            "batches is a generator: it ends after one pass; give a list",
        ),
        ((cubic, W, iter([1.0])), TypeError, r"batches is an iterator \(list_iterator\): it ends"),
        ((cubic, W, []), ValueError, "batches is empty"),
        ((cubic, W, Loader([])), ValueError, "batches is empty"),
        ((cubic, W, [np.ones(2), np.ones((0, 3))]), ValueError, r"batches\[1\] has no examples.*\(0, 3\)"),
        ((cubic, W, [np.ones(2), np.full(2, np.inf)]), FloatingPointError, r"batches\[1\] is not finite"),
        ((cubic, {"w": jnp.full(3, jnp.nan)}, 1.0), FloatingPointError, r"batches\[0\] is not finite"),
        ((returns(lambda w: w), W, None), TypeError, r"fun: expected a real scalar.*got float32\[3\]"),
        ((returns(lambda w: jnp.fft.fft(w)[0]), W, None), TypeError, r"fun: .*got complex64\[\]"),
        ((returns(lambda w: (w[0], w)), W, None), TypeError, "fun: expected a real scalar.*got tuple"),
        ((returns(lambda _: None), W, None), TypeError, "fun: expected a real scalar.*got NoneType"),
        (("loss", W, None), TypeError, "fun: expected a function.*got 'loss'"),
        ((cubic, {"w": jnp.arange(3)}, 1.0), TypeError, r"params: leaf \['w'\] is int32"),
        (
            (cubic, {"w": jnp.ones(2, complex)}, 1.0),
            TypeError,
            r"leaf \['w'\] is complex64\[2\], but curvature",
        ),
        ((cubic, {"w": "name"}, 1.0), TypeError, r"params: leaf \['w'\] is 'name'"),
    ],
)
def test_errors_in_what_to_measure(estimator, arguments, error, message):
    with pytest.raises(error, match=message):
        ESTIMATORS[estimator](*arguments)


@pytest.mark.parametrize(
    "estimator", [curvature.trace, curvature.diagonal, curvature.eigenvalues, curvature.spectral_density]
)
@pytest.mark.parametrize(
    ("key", "mask", "error", "message"),
    [
        (0, None, TypeError, "key: expected a PRNG key.*got 0"),
        (None, None, TypeError, "key: expected a PRNG key.*got None"),
        (jax.random.split(KEY), None, TypeError, "key: expected one PRNG key"),
        (KEY, {"w": 1}, TypeError, r"mask: expected True or False for leaf \['w'\], got 1"),
        (KEY, {"v": True}, ValueError, "mask: not a prefix of the pytree"),
        (KEY, False, ValueError, "mask: selects no leaf"),
    ],
)
def test_errors_in_key_and_mask(estimator, key, mask, error, message):
    with pytest.raises(error, match=message):
        estimator(key, cubic, W, 1.0, mask=mask)


@pytest.mark.parametrize(
    "estimator", [curvature.trace, curvature.diagonal, curvature.eigenvalues, curvature.spectral_density]
)
def test_error_where_the_key_is_missing(estimator):
    order = r"The arguments are \(key, fun, params, batches\), in this order"
    with pytest.raises(TypeError, match=f"key: expected a PRNG key.* 'batches' is missing. {order}"):
        estimator(cubic, W, 1.0)
    with pytest.raises(TypeError, match=f"key: expected a PRNG key.*got dict. {order}"):
        estimator(W, cubic, W, 1.0)
    with pytest.raises(TypeError, match=f"Missing argument: 'batches'. {order}"):
        estimator(KEY, cubic, W)


@pytest.mark.parametrize(
    ("tangent", "message"),
    [
        (jnp.ones(3), "tangent: expected a pytree like params"),
        ({"w": jnp.ones(2)}, r"tangent: expected shape \(3,\) for leaf \['w'\], got \(2,\)"),
    ],
)
def test_errors_in_the_tangent(tangent, message):
    with pytest.raises(ValueError, match=message):
        curvature.hvp(cubic, W, 1.0)(tangent)


def test_errors_in_gauss_newton_parts():
    with pytest.raises(TypeError, match="fun: expected a function as the loss of a GaussNewton, got None"):
        curvature.ggn_vp(lambda w, _: w, None, jnp.ones(2), None)
    with pytest.raises(TypeError, match=r"fun: expected a real scalar.*got float32\[2\]"):
        curvature.ggn_vp(lambda w, _: w, lambda outputs, _: outputs, jnp.ones(2), None)(jnp.ones(2))


@pytest.mark.parametrize("estimator", [curvature.trace, curvature.diagonal, curvature.spectral_density])
def test_errors_in_chunk_size(estimator):
    with pytest.raises(ValueError, match="chunk_size: expected an int >= 1, got 0"):
        estimator(KEY, cubic, W, 1.0, chunk_size=0)


# Calls that curvature cannot take, and what to do


TRANSFORMED = {
    "jit": jax.jit,
    "vmap": lambda f: lambda *args: jax.vmap(f)(*jax.tree.map(lambda x: jnp.stack([x, x]), args)),
    "grad": lambda f: lambda params, *args: jax.grad(lambda params: f(params, *args))(params),
}
OUTSIDE = "call it outside jit, vmap and grad"


@pytest.mark.parametrize("transformation", TRANSFORMED)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_error_inside_a_transformation(estimator, transformation):
    def measured(params):
        return ESTIMATORS[estimator](cubic, params, 1.0)

    with pytest.raises(TypeError, match=rf"params: got a tracer, float32\[3\] for leaf \['w'\]; .*{OUTSIDE}"):
        TRANSFORMED[transformation](measured)(W)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_error_inside_jit_with_params_and_data_from_outside(estimator):
    with pytest.raises(TypeError, match=rf"params: expected to be used outside of jit.*{OUTSIDE}"):
        jax.jit(lambda: ESTIMATORS[estimator](cubic, W, 1.0))()


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [np.ones(2), x], lambda x: Loader([x])])
def test_error_where_the_data_are_tracers(form):
    with pytest.raises(TypeError, match=rf"batches\[[01]\]: got a tracer, float32\[2\]; .*{OUTSIDE}"):
        jax.vmap(lambda x: curvature.hvp(cubic, W, form(x))(W)["w"])(jnp.ones((4, 2)))


def test_error_where_the_key_is_a_tracer():
    with pytest.raises(TypeError, match=rf"key: got a tracer.*{OUTSIDE}"):
        jax.vmap(lambda key: curvature.trace(key, cubic, W, 1.0).value)(jax.random.split(KEY))


@pytest.mark.parametrize("transformation", ["jit", "vmap", "grad"])
def test_error_where_a_tangent_is_a_tracer(transformation):
    product = curvature.hvp(cubic, W, 1.0)
    with pytest.raises(TypeError, match=rf"tangent: got a tracer.*leaf \['w'\]; .*{OUTSIDE}"):
        TRANSFORMED[transformation](product)(W)


def of_three(params, x, y):
    return jnp.mean((x @ params["w"] - y) ** 2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("fun", [of_three, jax.jit(of_three), curvature.GaussNewton(of_three, cubic)])
def test_error_in_a_loss_of_three_arguments(estimator, fun):
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'y'") as caught:
        ESTIMATORS[estimator](fun, W, (np.ones((2, 3)), np.ones(2)))
    (note,) = (note for note in caught.value.__notes__ if "fun" in note)
    assert "fun is called as fun(params, batch)" in note
    assert "pass lambda params, batch: loss(params, *batch)" in note


@pytest.mark.parametrize("batch", [np.ones((2, 3), np.float32), {"x": np.ones((2, 3), np.float32)}])
def test_error_in_a_tuple_of_batches(batch):
    def loss(params, batch):
        return jnp.mean((batch["x"] if isinstance(batch, dict) else batch @ params["w"]) ** 2)

    with pytest.raises(TypeError, match="unsupported operand") as caught:
        curvature.trace(KEY, loss, W, (batch, batch, batch))
    assert any("batches is a tuple of 3: that is one batch" in note for note in caught.value.__notes__)
    assert any("Give many batches as a list" in note for note in caught.value.__notes__)


def test_other_errors_of_a_loss_come_as_they_are():
    def broken(params, batch):
        raise RuntimeError("of the loss")

    for batch in (1.0, (np.ones((2, 3)), np.ones(2, int))):
        with pytest.raises(RuntimeError, match="of the loss") as caught:
            curvature.trace(KEY, broken, W, batch)
        assert not any("fun" in note or "batches" in note for note in getattr(caught.value, "__notes__", []))


# jax.custom_vjp, which has no forward mode


def backward_only(function, *, calls_itself):
    """`function`, differentiated by a rule of its own, whose forward pass may need the rule again."""
    custom = jax.custom_vjp(function)

    def forward(x):
        return (custom if calls_itself else function)(x), x

    custom.defvjp(forward, lambda x, g: (jax.vjp(function, x)[1](g)[0],))
    return custom


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("calls_itself", [False, True])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, jax.checkpoint])
def test_products_go_through_a_custom_vjp(calls_itself, jit):
    params, batch = mlp(jnp.float64)
    tanh = jit(backward_only(jnp.tanh, calls_itself=calls_itself))
    square = jit(backward_only(lambda z: z**2 + z**3, calls_itself=calls_itself))

    def model(params, batch, tanh=tanh):
        first, second = params["layers"]
        return params["scale"] * (tanh(batch[0] @ first["w"] + first["b"][None]) @ second["w"])

    def loss(outputs, batch, square=square):
        return jnp.mean(square(outputs - batch[1]))

    plain_model, plain_loss = (
        lambda params, batch: model(params, batch, jnp.tanh),
        lambda outputs, batch: loss(outputs, batch, lambda z: z**2 + z**3),
    )
    tangent = random_tangent(params)
    for custom, plain in (
        (lambda p, b: loss(model(p, b), b), lambda p, b: plain_loss(plain_model(p, b), b)),
        (curvature.GaussNewton(model, loss), curvature.GaussNewton(plain_model, plain_loss)),
        (curvature.GaussNewton(plain_model, loss), curvature.GaussNewton(plain_model, plain_loss)),
    ):
        expected = curvature.hvp(plain, params, split(batch, 17, 13))(tangent)
        product = curvature.hvp(custom, params, split(batch, 17, 13))
        np.testing.assert_allclose(flat(product(tangent)), flat(expected), rtol=1e-9, atol=1e-12)
        several = curvature.trace(KEY, custom, params, batch, num_products=12, chunk_size=3)
        same = curvature.trace(KEY, plain, params, batch, num_products=12, chunk_size=3)
        assert several.value == pytest.approx(same.value, rel=1e-9)


def test_a_loss_with_a_custom_vjp_is_traced_once():
    traces = []
    tanh = backward_only(jnp.tanh, calls_itself=True)

    def loss(w, x):
        traces.append(1)
        return jnp.mean(tanh(x @ w) ** 2)

    product = curvature.hvp(loss, jnp.ones(3), jnp.ones((2, 3)))
    for _ in range(2):
        product(jnp.ones(3))
    assert len(traces) == 1
