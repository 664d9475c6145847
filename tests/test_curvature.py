"""Curvature against dense Hessians, which are exact and small."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from nso_jax import curvature

KEY = jax.random.key(0)
WHICH = {"largest": lambda values: -values, "smallest": lambda values: values, "magnitude": lambda v: -abs(v)}


@jax.jit  # so that its product is compiled once for each shape, not once for each test
def mlp_loss(params, batch):
    x, y = batch
    first, second = params["layers"]
    hidden = jnp.tanh(x @ first["w"] + first["b"][None])
    logits = params["scale"] * (hidden @ second["w"])
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * y, axis=1))


def mlp(dtype):
    """A network with every kind of leaf: 25 weights, nested, with a None, a scalar and an empty array."""
    rng = np.random.default_rng(0)
    params = {
        "layers": [
            {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype), "b": jnp.asarray(rng.normal(size=4), dtype)},
            {"w": jnp.asarray(rng.normal(size=(4, 2)), dtype), "b": None},
        ],
        "scale": jnp.asarray(1.5, dtype),
        "unused": jnp.zeros((0, 3), dtype),
    }
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


def split(batch, *sizes):
    ends = itertools.accumulate(sizes, initial=0)
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], batch) for a, b in itertools.pairwise(ends)]


class Loader:
    """An iterable that is no pytree, like a data loader; it counts its passes."""

    def __init__(self, batches):
        self.batches = batches
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array


# Hessian-vector products


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


# The trace


@pytest.mark.usefixtures("x64")
def test_trace_is_unbiased_and_its_standard_error_true():
    matrix, w = symmetric(np.linspace(-1, 5, 12)), jnp.ones(12)
    runs = [curvature.trace(jax.random.key(i), quadratic, w, matrix, num_products=25) for i in range(200)]
    scores = np.array([(run.value - 24) / run.standard_error for run in runs])
    assert 0.8 <= scores.std() <= 1.25
    assert abs(scores.mean()) <= 5 / np.sqrt(200)
    assert np.abs(scores).max() <= 5


@pytest.mark.usefixtures("x64")
def test_trace_of_two_probes_and_more():
    """`v^T H v` is 2 or 10, so the estimate of two probes tells both, and a third adds one of these."""
    matrix, w = jnp.asarray([[1.0, 2.0], [2.0, 5.0]]), jnp.ones(2)
    for seed in range(8):
        two, three = (
            curvature.trace(jax.random.key(seed), quadratic, w, matrix, num_products=n) for n in (2, 3)
        )
        assert {two.value - two.standard_error, two.value + two.standard_error} <= {2, 10}
        assert round(3 * three.value - 2 * two.value, 9) in {2, 10}


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_trace_adds_up_over_leaves(dtype, tolerance):
    params, batch = mlp(dtype)
    estimate = curvature.trace(KEY, mlp_loss, params, split(batch, 17, 13))
    assert jax.tree.structure(estimate.per_leaf) == jax.tree.structure(params)
    assert sum(jax.tree.leaves(estimate.per_leaf)) == pytest.approx(estimate.value, rel=1e-12)
    assert estimate.per_leaf["unused"] == 0
    assert estimate.num_products == 100
    exact = np.trace(exact_mlp_hessian(dtype))
    assert abs(estimate.value - exact) <= 5 * estimate.standard_error + tolerance * exact


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "mask",
    [
        {"layers": [True, False], "scale": False, "unused": False},
        lambda params: {name: [True, False] if name == "layers" else False for name in params},
    ],
    ids=["prefix", "callable"],
)
def test_mask_restricts_to_a_block(mask):
    params, batch = mlp(jnp.float64)
    block = exact_mlp_hessian(jnp.float64)[FIRST_LAYER, FIRST_LAYER]
    estimate = curvature.trace(KEY, mlp_loss, params, batch, mask=mask)
    assert abs(estimate.value - np.trace(block)) <= 5 * estimate.standard_error
    assert estimate.per_leaf["scale"] == 0
    pairs = curvature.eigenvalues(KEY, mlp_loss, params, batch, k=3, mask=mask)
    np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(block)[:-4:-1], atol=1e-10)
    assert pairs.residuals.max() <= 1e-6 * np.linalg.norm(block, 2)
    assert all(vector["scale"] == 0 for vector in pairs.vectors)


def test_trace_stops_at_rtol():
    matrix, w = jnp.asarray(symmetric(np.linspace(1, 5, 50)), jnp.float32), jnp.ones(50)
    loose = curvature.trace(KEY, quadratic, w, matrix, rtol=0.02, num_products=1000)
    assert 10 <= loose.num_products < 1000
    assert loose.standard_error <= 0.02 * loose.value
    assert curvature.trace(KEY, quadratic, w, matrix, rtol=1e-6, num_products=30).num_products == 30


def test_trace_of_a_linear_loss_is_zero():
    estimate = curvature.trace(KEY, lambda w, _: jnp.sum(w), jnp.ones(3), None, rtol=0.1)
    assert estimate == (0.0, 0.0, 10, 0.0)


# Eigenvalues


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("sizes", [(30,), (17, 13)])
def test_eigenpairs_are_those_of_the_dense_hessian(which, sizes):
    params, batch = mlp(jnp.float64)
    matrix = exact_mlp_hessian(jnp.float64)
    exact, exact_vectors = np.linalg.eigh(matrix)
    order = np.argsort(WHICH[which](exact))[:5]
    pairs = curvature.eigenvalues(KEY, mlp_loss, params, split(batch, *sizes), which=which)
    np.testing.assert_allclose(pairs.values, exact[order], rtol=0, atol=1e-8)
    assert pairs.residuals.max() <= 1e-6 * np.abs(exact).max()
    assert pairs.values.dtype == pairs.residuals.dtype == np.float64
    for vector, value, residual, i in zip(pairs.vectors, pairs.values, pairs.residuals, order, strict=True):
        assert jax.tree.structure(vector) == jax.tree.structure(params)
        v = flat(vector)
        assert np.linalg.norm(v) == pytest.approx(1, abs=1e-12)
        assert abs(v @ exact_vectors[:, i]) == pytest.approx(1, abs=1e-8)
        assert np.linalg.norm(matrix @ v - value * v) == pytest.approx(residual, rel=1e-3, abs=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    "spectrum",
    [
        [0, 0, 0, 0, 0, 0],
        [2],
        [-3],
        [7, 7, 7, 7, 7],
        [5, 5, 2, 2, 1, 1, 0, 0],
        [5, 5, 3, 1],
        [5, 3, 3, 3, 0, 0, 0, 0],
        [-1, -1, -2, -4, -8],
        [1, 0, 0, 0, 0, 0, 0],
        [1, -1, 1, -1],
        [4, 3, 2, 1, 0.5, -0.5],
    ],
    ids=str,
)
def test_eigenvalues_are_found_as_often_as_they_are_there(spectrum, which):
    size = len(spectrum)
    for k in sorted({1, min(2, size), size}):
        pairs = curvature.eigenvalues(KEY, quadratic, jnp.zeros(size), symmetric(spectrum), k=k, which=which)
        exact = np.sort(WHICH[which](np.array(spectrum, float)))[:k]
        np.testing.assert_allclose(WHICH[which](pairs.values), exact, atol=1e-10)
        assert pairs.residuals.max() <= 1e-5
        assert pairs.num_products <= size + k
        vectors = np.stack([flat(vector) for vector in pairs.vectors])
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rest", "top", "most"),
    [(np.linspace(-0.1, 0.1, 295), [5, 4, 3, 2, 1], 25), (np.zeros(197), [2, 2, 1, 0], 13)],
    ids=["outliers", "low rank"],
)
def test_eigenvalues_take_few_products(rest, top, most):
    spectrum = np.concatenate([rest, top])
    w = jnp.zeros(len(spectrum))
    pairs = curvature.eigenvalues(KEY, quadratic, w, symmetric(spectrum), k=len(top))
    np.testing.assert_allclose(pairs.values, top, atol=1e-10)
    assert pairs.num_products <= most


@pytest.mark.usefixtures("x64")
def test_eigenvectors_stay_orthogonal_over_many_products():
    """Large eigenvalues that have long converged come back as ghosts where orthogonality is lost."""
    spectrum = np.concatenate([np.linspace(0, 1, 195), [1e3, 1e4, 1e5, 1e6, 1e7]])
    pairs = curvature.eigenvalues(KEY, quadratic, jnp.zeros(200), symmetric(spectrum), k=20, tol=1e-13)
    np.testing.assert_allclose(pairs.values, spectrum[:-21:-1], atol=1e-6)
    vectors = np.stack(pairs.vectors)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(20), atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.03)])
def test_eigenvalues_in_low_precision(dtype, tolerance):
    params, batch = mlp(dtype)
    pairs = curvature.eigenvalues(KEY, mlp_loss, params, split(batch, 17, 13))
    exact = np.linalg.eigvalsh(exact_mlp_hessian(dtype))[:-6:-1]
    np.testing.assert_allclose(pairs.values, exact, atol=tolerance * exact[0])
    assert pairs.residuals.max() <= tolerance * exact[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs.vectors)} == {jnp.dtype(dtype)}


@pytest.mark.usefixtures("x64")
def test_eigenvalues_warn_where_the_products_run_out():
    matrix = symmetric(np.linspace(0, 1, 100))
    with pytest.warns(UserWarning, match=r"after 10 products, before tol=1e-06.*Raise max_products"):
        pairs = curvature.eigenvalues(KEY, quadratic, jnp.zeros(100), matrix, k=3, max_products=10)
    assert pairs.num_products == 10
    assert pairs.residuals.max() > 1e-3
    for vector, value, residual in zip(pairs.vectors, pairs.values, pairs.residuals, strict=True):
        assert np.linalg.norm(matrix @ vector - value * vector) == pytest.approx(residual, rel=1e-6)


def test_products_are_counted():
    params, batch = mlp(jnp.float32)
    loader = Loader([batch])
    assert curvature.trace(KEY, mlp_loss, params, loader, num_products=7).num_products == loader.passes == 7
    pairs = curvature.eigenvalues(KEY, mlp_loss, params, loader, k=2)
    assert pairs.num_products == loader.passes - 7


# Errors

W = {"w": jnp.ones(3)}


def cubic(params, batch):
    return jnp.mean(batch) * jnp.sum(params["w"] ** 3)


def returns(value):
    return lambda params, _: value(params["w"])


ESTIMATORS = {
    "hvp": lambda fun, params, batches: curvature.hvp(fun, params, batches)(params),
    "trace": lambda fun, params, batches: curvature.trace(KEY, fun, params, batches, num_products=2),
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


@pytest.mark.parametrize("estimator", [curvature.trace, curvature.eigenvalues])
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


@pytest.mark.parametrize("estimator", [curvature.trace, curvature.eigenvalues])
def test_error_where_the_key_is_missing(estimator):
    with pytest.raises(TypeError, match="'batches'"):
        estimator(cubic, W, 1.0)


def test_legacy_key():
    assert curvature.trace(jax.random.PRNGKey(0), cubic, W, 1.0, num_products=2).value == 18


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        (curvature.trace, {"method": "exact"}, "method: expected one of 'hutchinson', got 'exact'"),
        (curvature.trace, {"num_products": 1}, "num_products: expected an int >= 2, got 1"),
        (curvature.trace, {"num_products": 2.5}, "num_products: expected a static int >= 2, got 2.5"),
        (curvature.trace, {"rtol": 0}, "rtol: expected a positive, finite number, got 0"),
        (curvature.trace, {"rtol": float("nan")}, "rtol: .*got nan"),
        (curvature.eigenvalues, {"k": 0}, "k: expected an int >= 1, got 0"),
        (curvature.eigenvalues, {"k": True}, "k: expected a static int >= 1, got True"),
        (curvature.eigenvalues, {"k": 4}, "k: expected at most the number of parameters, 3, got 4"),
        (curvature.eigenvalues, {"which": "LA"}, "which: expected one of 'largest', 'smallest', .*got 'LA'"),
        (curvature.eigenvalues, {"k": 1, "tol": -1.0}, "tol: expected a positive, finite number, got -1.0"),
        (curvature.eigenvalues, {"k": 2, "max_products": 3}, "max_products: expected an int >= 4, got 3"),
    ],
)
def test_errors_in_options(estimator, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        estimator(KEY, cubic, W, 1.0, **options)


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
