"""Curvature against dense Hessians, which are exact and small."""

import itertools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from nso_jax import curvature

KEY = jax.random.key(0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def mlp_loss(params, batch):
    x, y = batch
    first, second = params["layers"]
    hidden = jnp.tanh(x @ first["w"] + first["b"][None])
    logits = params["scale"] * (hidden @ second["w"])
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * y, axis=1))


def mlp(dtype=jnp.float32, examples=30):
    """A network with a leaf of every awkward kind: 25 weights in a list, a None, a scalar, an empty array."""
    rng = np.random.default_rng(0)
    params = {
        "layers": [
            {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype), "b": jnp.asarray(rng.normal(size=4), dtype)},
            {"w": jnp.asarray(rng.normal(size=(4, 2)), dtype), "b": None},
        ],
        "scale": jnp.asarray(1.5, dtype),
        "unused": jnp.zeros((0, 3), dtype),
    }
    x = jnp.asarray(rng.normal(size=(examples, 3)), dtype)
    y = jnp.asarray(np.eye(2)[rng.integers(2, size=examples)], dtype)
    return params, (x, y)


def quadratic(params, matrix):
    return params @ matrix @ params / 2


def dense(fun, params, batch):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.hessian(lambda w: fun(unravel(w), batch))(flat))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def random_tangent(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


def symmetric(eigenvalues, seed=0):
    """A dense matrix with these eigenvalues."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)


def split(batch, *sizes):
    ends = np.cumsum([0, *sizes])
    return [jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], batch) for a, b in itertools.pairwise(ends)]


class Loader:
    """An iterable that is no pytree, like a data loader."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array


@pytest.mark.parametrize("sizes", [(30,), (10, 10, 10), (1, 17, 12)])
@pytest.mark.usefixtures("x64")
def test_equals_the_dense_hessian(sizes):
    params, batch = mlp(jnp.float64)
    tangent = random_tangent(params)
    product = curvature.hvp(mlp_loss, params, split(batch, *sizes))
    expected = dense(mlp_loss, params, batch) @ flat(tangent)
    np.testing.assert_allclose(flat(product(tangent)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda b: b,
        lambda b: Batch(*b),
        lambda b: [b],
        lambda b: Loader([b]),
        lambda b: jax.tree.map(np.asarray, b),
    ],
    ids=["tuple", "namedtuple", "list", "loader", "numpy"],
)
def test_all_forms_of_one_batch_give_the_same(wrap):
    params, batch = mlp()
    tangent = random_tangent(params)
    expected = jax.jvp(jax.grad(lambda p: mlp_loss(p, batch)), (params,), (tangent,))[1]
    result = curvature.hvp(mlp_loss, params, wrap(batch))(tangent)
    np.testing.assert_allclose(flat(result), flat(expected), rtol=1e-6, atol=1e-7)


def test_dict_is_one_batch_and_a_loss_may_have_no_data():
    def loss(w, batch):
        return jnp.sum(w**4) if batch is None else jnp.mean(batch["x"]) * jnp.sum(w**4)

    w, v = jnp.arange(3.0), jnp.ones(3)
    for batch in (None, {"x": jnp.ones(5)}):
        np.testing.assert_allclose(curvature.hvp(loss, w, batch)(v), 12 * w**2, rtol=1e-6)


def test_many_float32_batches_lose_nothing():
    """Products of +-1 that nearly cancel: summed plainly in float32, the error is 20 times larger."""
    scales = np.random.default_rng(0).normal(size=(3000, 1)).astype(np.float32) + np.float32(100)
    batches = list(jnp.asarray(scales)[:, None])
    result = curvature.hvp(lambda w, batch: batch[0, 0] * w**2 / 2, jnp.float32(1), batches)(jnp.float32(1))
    assert abs(float(result) - scales.astype(np.float64).mean()) <= 2 * np.spacing(np.float32(100))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_keeps_structure_and_dtypes(dtype):
    params, batch = mlp(dtype)
    tangent = random_tangent(params)
    result = curvature.hvp(mlp_loss, params, split(batch, 20, 10))(tangent)
    assert jax.tree.map(jnp.result_type, result) == jax.tree.map(jnp.result_type, params)
    with jax.enable_x64(True):
        expected = dense(mlp_loss, *jax.tree.map(lambda x: x.astype(jnp.float64), (params, batch)))
        expected = expected @ flat(tangent)
    tolerance = 10 * float(jnp.finfo(dtype).eps) * np.linalg.norm(expected)
    assert np.linalg.norm(flat(result) - expected) <= tolerance


def test_compiles_once_for_each_shape():
    traces = []

    def loss(params, batch):
        traces.append(batch[0].shape)
        return mlp_loss(params, batch)

    params, batch = mlp()
    product = curvature.hvp(loss, params, split(batch, 10, 10, 5))
    for seed in range(3):
        product(random_tangent(params, seed))
    assert sorted(set(traces)) == [(5, 3), (10, 3)]
    assert len(traces) == 2


def test_jitted_loss_stays_compiled_between_calls_and_a_plain_one_may_change():
    traces, slope = [], 1.0

    def loss(params, batch):
        traces.append(1)
        return slope * quadratic(params, batch)

    matrix, w = jnp.eye(2), jnp.ones(2)
    kept = jax.jit(loss)
    for _ in range(3):
        curvature.hvp(kept, w, matrix)(w)
    assert len(traces) == 1
    np.testing.assert_allclose(curvature.hvp(loss, w, matrix)(w), w)
    slope = 2.0
    np.testing.assert_allclose(curvature.hvp(loss, w, matrix)(w), 2 * w)


def test_convolution():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 1, 3, 3)), jnp.float32), "head": jnp.ones(3)}
    images = jnp.asarray(rng.normal(size=(8, 1, 6, 6)), jnp.float32)

    def loss(params, batch):
        maps = jax.lax.conv(batch, params["kernel"], (1, 1), "SAME")
        return jnp.mean((jnp.mean(jax.nn.softplus(maps), axis=(2, 3)) @ params["head"]) ** 2)

    tangent = random_tangent(params)
    expected = dense(loss, params, images) @ flat(tangent)
    result = curvature.hvp(loss, params, split(images, 5, 3))(tangent)
    np.testing.assert_allclose(flat(result), expected, rtol=1e-4, atol=1e-5)
    estimate = curvature.trace(KEY, loss, params, images, num_products=20)
    exact = np.trace(dense(loss, params, images))
    assert abs(estimate.value - exact) <= 5 * estimate.standard_error


def test_flax_state():
    nnx = pytest.importorskip("flax.nnx")
    graph, params = nnx.split(nnx.Linear(3, 1, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)

    def loss(params, batch):
        return jnp.mean(nnx.merge(graph, params)(batch) ** 2)

    result = curvature.hvp(loss, params, x)(jax.tree.map(jnp.ones_like, params))
    assert jax.tree.structure(result) == jax.tree.structure(params)
    estimate = curvature.trace(KEY, loss, params, x, num_products=20)
    exact = np.trace(dense(loss, params, x))
    assert abs(estimate.value - exact) <= 5 * estimate.standard_error
    pairs = curvature.eigenvalues(KEY, loss, params, x, k=1)
    top = np.linalg.eigvalsh(dense(loss, params, x))[-1]
    assert pairs.values[0] == pytest.approx(top, rel=1e-5)


@pytest.mark.usefixtures("x64")
def test_its_standard_error_is_true():
    matrix, w = symmetric(np.linspace(-1, 5, 12)), jnp.ones(12)
    loss = jax.jit(quadratic)
    runs = [curvature.trace(jax.random.key(i), loss, w, matrix, num_products=25) for i in range(200)]
    scores = np.array([(run.value - 24) / run.standard_error for run in runs])
    assert 0.8 <= scores.std() <= 1.25
    assert abs(scores.mean()) <= 0.3
    assert np.abs(scores).max() <= 5


@pytest.mark.usefixtures("x64")
def test_estimate_is_the_mean_of_the_probes():
    """Without randomness: 2 products, whose values follow from the mean and the standard error."""
    matrix = jnp.asarray([[1.0, 2.0], [2.0, 5.0]])  # v^T H v is 6 + 4 or 6 - 4
    for seed in range(8):
        estimate = curvature.trace(jax.random.key(seed), quadratic, jnp.ones(2), matrix, num_products=2)
        assert {estimate.value - estimate.standard_error, estimate.value + estimate.standard_error} <= {
            2,
            10,
        }


@pytest.mark.usefixtures("x64")
def test_more_products_extend_fewer():
    matrix, w = symmetric(np.linspace(-1, 5, 12)), jnp.ones(12)
    few, many = (curvature.trace(KEY, quadratic, w, matrix, num_products=n) for n in (2, 4))
    later = 2 * many.value - few.value
    spread = np.array([few.standard_error, many.standard_error])
    assert np.isfinite([later, *spread]).all()
    samples = [few.value - few.standard_error, few.value + few.standard_error]
    deviations = np.sum((np.array(samples) - many.value) ** 2)
    assert deviations <= many.standard_error**2 * 4 * 3 + 1e-9


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_leaves_add_up(dtype):
    params, batch = mlp(dtype)
    estimate = curvature.trace(KEY, mlp_loss, params, split(batch, 20, 10))
    assert jax.tree.structure(estimate.per_leaf) == jax.tree.structure(params)
    assert sum(jax.tree.leaves(estimate.per_leaf)) == pytest.approx(estimate.value, rel=1e-12)
    assert estimate.per_leaf["unused"] == 0
    assert estimate.num_products == 100
    exact = np.trace(dense(mlp_loss, *jax.tree.map(lambda x: x.astype(jnp.float32), (params, batch))))
    assert abs(estimate.value - exact) <= 5 * estimate.standard_error + 0.02 * abs(exact)


@pytest.mark.parametrize(
    "mask",
    [
        {"layers": [True, False], "scale": False, "unused": False},
        lambda params: (
            jax.tree.map(lambda leaf: leaf is not params["scale"], params) | {"layers": [True, False]}
        ),
    ],
    ids=["prefix", "callable"],
)
@pytest.mark.usefixtures("x64")
def test_mask_restricts_to_a_block(mask):
    params, batch = mlp(jnp.float64)
    first = {"layers": params["layers"][0]}

    def block_loss(block, batch):
        return mlp_loss(params | {"layers": [block["layers"], params["layers"][1]]}, batch)

    exact = dense(block_loss, first, batch)
    estimate = curvature.trace(KEY, mlp_loss, params, batch, mask=mask)
    assert abs(estimate.value - np.trace(exact)) <= 5 * estimate.standard_error
    assert estimate.per_leaf["scale"] == 0
    pairs = curvature.eigenvalues(KEY, mlp_loss, params, batch, k=3, mask=mask)
    np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(exact)[:-4:-1], atol=1e-10)
    assert pairs.residuals.max() <= 1e-6
    assert all(vector["scale"] == 0 for vector in pairs.vectors)


def test_rtol_stops_early():
    matrix, w = jnp.asarray(symmetric(np.linspace(1, 5, 50)), jnp.float32), jnp.ones(50)
    loose = curvature.trace(KEY, quadratic, w, matrix, rtol=0.02, num_products=1000)
    assert 10 <= loose.num_products < 1000
    assert loose.standard_error <= 0.02 * abs(loose.value)
    assert curvature.trace(KEY, quadratic, w, matrix, rtol=1e-6, num_products=30).num_products == 30


def test_zero_hessian():
    estimate = curvature.trace(KEY, lambda w, _: jnp.sum(w), jnp.ones(3), None, rtol=0.1)
    assert estimate == (0.0, 0.0, 10, 0.0)


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("sizes", [(30,), (17, 13)])
@pytest.mark.usefixtures("x64")
def test_equals_the_dense_hessian(which, sizes):
    params, batch = mlp(jnp.float64)
    matrix = dense(mlp_loss, params, batch)
    exact, exact_vectors = np.linalg.eigh(matrix)
    rank = {"largest": -exact, "smallest": exact, "magnitude": -np.abs(exact)}[which]
    order = np.argsort(rank)[:5]
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


@pytest.mark.parametrize(
    "spectrum",
    [
        [0.0] * 6,
        [2.0],
        [-3.0],
        [7.0] * 5,
        [5.0, 5.0, 3.0, 1.0],
        [5.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0],
        [-1.0, -1.0, -2.0, -4.0, -8.0],
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, -1.0, 1.0, -1.0],
        [4.0, 3.0, 2.0, 1.0, 0.5, -0.5],
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.usefixtures("x64")
def test_every_multiplicity(spectrum, which):
    rank = {
        "largest": -np.array(spectrum),
        "smallest": np.array(spectrum),
        "magnitude": -np.abs(spectrum),
    }
    w, loss = jnp.zeros(len(spectrum)), jax.jit(quadratic)
    for k in {1, 2, len(spectrum)}:
        if k > len(spectrum):
            continue
        pairs = curvature.eigenvalues(KEY, loss, w, symmetric(spectrum), k=k, which=which)
        exact = np.sort(rank[which])[:k]
        found = {"largest": -pairs.values, "smallest": pairs.values, "magnitude": -np.abs(pairs.values)}
        np.testing.assert_allclose(found[which], exact, atol=1e-10)
        assert pairs.residuals.max() <= 1e-5
        assert pairs.num_products <= len(spectrum) + k
        vectors = np.stack([flat(vector) for vector in pairs.vectors])
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_takes_few_products():
    spectrum = np.concatenate([np.linspace(-0.1, 0.1, 295), [1.0, 2.0, 3.0, 4.0, 5.0]])
    pairs = curvature.eigenvalues(KEY, quadratic, jnp.zeros(300), symmetric(spectrum))
    np.testing.assert_allclose(pairs.values, [5, 4, 3, 2, 1], atol=1e-10)
    assert pairs.num_products <= 30


@pytest.mark.usefixtures("x64")
def test_low_rank_hessian_of_many_parameters():
    spectrum = np.concatenate([np.zeros(197), [1.0, 2.0, 2.0]])
    pairs = curvature.eigenvalues(KEY, quadratic, jnp.zeros(200), symmetric(spectrum), k=4)
    np.testing.assert_allclose(pairs.values, [2, 2, 1, 0], atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_low_precision(dtype, tolerance):
    params, batch = mlp(dtype)
    pairs = curvature.eigenvalues(KEY, mlp_loss, params, split(batch, 20, 10))
    with jax.enable_x64(True):
        matrix = dense(mlp_loss, *jax.tree.map(lambda x: x.astype(jnp.float64), (params, batch)))
    exact = np.linalg.eigvalsh(matrix)[:-6:-1]
    np.testing.assert_allclose(pairs.values, exact, atol=tolerance * exact[0])
    assert pairs.residuals.max() <= tolerance * exact[0]
    assert jax.tree.leaves(pairs.vectors)[0].dtype == dtype


@pytest.mark.usefixtures("x64")
def test_warns_where_the_products_run_out():
    matrix = symmetric(np.linspace(0, 1, 100))
    with pytest.warns(UserWarning, match=r"after 10 products, before tol=1e-06.*max_products"):
        pairs = curvature.eigenvalues(KEY, quadratic, jnp.zeros(100), matrix, k=3, max_products=10)
    assert pairs.num_products == 10
    for vector, value, residual in zip(pairs.vectors, pairs.values, pairs.residuals, strict=True):
        assert np.linalg.norm(matrix @ vector - value * vector) == pytest.approx(residual, rel=1e-6)
    assert pairs.residuals.max() > 1e-3


@pytest.mark.usefixtures("x64")
def test_counts_products_truly():
    passes = []

    class CountingLoader(Loader):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    params, batch = mlp(jnp.float64)
    pairs = curvature.eigenvalues(KEY, mlp_loss, params, CountingLoader([batch]), k=2)
    assert pairs.num_products == len(passes)
    passes.clear()
    assert curvature.trace(KEY, mlp_loss, params, CountingLoader([batch]), num_products=7).num_products == 7
    assert len(passes) == 7


W = {"w": jnp.ones(3)}


def cubic(params, batch):
    return jnp.mean(batch) * jnp.sum(params["w"] ** 3)


ESTIMATORS = [
    lambda fun, params, batches: curvature.hvp(fun, params, batches)(params),
    lambda fun, params, batches: curvature.trace(KEY, fun, params, batches, num_products=2),
    lambda fun, params, batches: curvature.eigenvalues(KEY, fun, params, batches, k=1),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["hvp", "trace", "eigenvalues"])
@pytest.mark.parametrize(
    ("fun", "params", "batches", "error", "message"),
    [
        (cubic, W, (b for b in [1.0]), TypeError, "batches is a generator: it ends after one pass; give a list"),
        (cubic, W, iter([1.0]), TypeError, r"batches is an iterator \(list_iterator\): it ends after one"),
        (cubic, W, [], ValueError, "batches is empty"),
        (cubic, W, Loader([]), ValueError, "batches is empty"),
        (cubic, W, [np.ones(2), np.ones(0)], ValueError, r"batches\[1\] has no examples"),
        (cubic, W, [np.ones(2), np.ones(2), np.full(2, np.inf)], FloatingPointError, r"batches\[2\] is not finite"),
        (cubic, {"w": jnp.full(3, jnp.nan)}, np.ones(2), FloatingPointError, r"batches\[0\] is not finite"),
        (lambda p, b: p["w"], W, None, TypeError, r"fun must return a real scalar.*float32\[3\]"),
        (lambda p, b: 1j * p["w"][0], W, None, TypeError, r"fun must return a real scalar.*complex64\[\]"),
        (lambda p, b: (p["w"][0], b), W, None, TypeError, "fun must return a real scalar.*a tuple"),
        (lambda p, b: None, W, None, TypeError, "fun must return a real scalar.*a NoneType"),
        ("loss", W, None, TypeError, "fun must be a function.*'loss'"),
        (cubic, {"w": jnp.arange(3)}, None, TypeError, r"params\['w'\] is int32"),
        (cubic, {"w": jnp.ones(2, complex)}, None, TypeError, r"params\['w'\] is complex64: curvature is of real"),
        (cubic, {"w": "name"}, None, TypeError, r"params\['w'\] is <U4"),
    ],
)  # fmt: skip
def test_inputs_of_all(estimator, fun, params, batches, error, message):
    with pytest.raises(error, match=message):
        estimator(fun, params, batches)


@pytest.mark.parametrize("estimator", [curvature.trace, curvature.eigenvalues])
@pytest.mark.parametrize(
    ("key", "options", "error", "message"),
    [
        (0, {}, TypeError, "key must be a PRNG key.*got 0"),
        (None, {}, TypeError, "key must be a PRNG key.*got None"),
        (jax.random.split(KEY), {}, TypeError, "key must be a PRNG key"),
        (KEY, {"mask": {"w": 1}}, TypeError, r"mask\['w'\] must be a bool; got 1"),
        (KEY, {"mask": {"v": True}}, ValueError, "mask must be a prefix of params"),
        (KEY, {"mask": False}, ValueError, "mask selects no leaf"),
    ],
)
def test_key_and_mask(estimator, key, options, error, message):
    with pytest.raises(error, match=message):
        estimator(key, cubic, W, 1.0, **options)


@pytest.mark.parametrize("estimator", [curvature.trace, curvature.eigenvalues])
def test_missing_key(estimator):
    with pytest.raises(TypeError):
        estimator(cubic, W, 1.0)


def test_legacy_key():
    assert np.isfinite(curvature.trace(jax.random.PRNGKey(0), cubic, W, 1.0, num_products=2).value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exact"}, "method must be one of 'hutchinson'; got 'exact'"),
        ({"num_products": 1}, "num_products must be an integer of at least 2; got 1"),
        ({"num_products": 2.5}, "num_products must be an integer.*got 2.5"),
        ({"rtol": 0}, "rtol must be positive and finite; got 0"),
        ({"rtol": float("nan")}, "rtol must be positive and finite; got nan"),
    ],
)
def test_trace_options(options, message):
    with pytest.raises(ValueError, match=message):
        curvature.trace(KEY, cubic, W, 1.0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1; got 0"),
        ({"k": True}, "k must be an integer.*got True"),
        ({"k": 4}, "k must be at most the number of parameters, 3; got 4"),
        ({"which": "LA"}, "which must be one of 'largest', 'smallest', 'magnitude'; got 'LA'"),
        ({"k": 1, "tol": -1.0}, "tol must be positive and finite; got -1.0"),
        ({"k": 2, "max_products": 3}, "max_products must be an integer of at least 4; got 3"),
    ],
)
def test_eigenvalues_options(options, message):
    with pytest.raises(ValueError, match=message):
        curvature.eigenvalues(KEY, cubic, W, 1.0, **options)


def test_tangent_unlike_params():
    product = curvature.hvp(cubic, W, 1.0)
    with pytest.raises(ValueError, match="tangent must be a pytree like params"):
        product(jnp.ones(3))
    with pytest.raises(ValueError, match=r"tangent\['w'\] has shape \(2,\), but params\['w'\] \(3,\)"):
        product({"w": jnp.ones(2)})


def test_no_warnings_by_default():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature.eigenvalues(KEY, cubic, W, 1.0, k=3)
