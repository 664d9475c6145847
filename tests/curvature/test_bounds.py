"""The bound against dense Hessians of every example, which are exact and small."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import KEY, Loader, W, convolution, cubic, cut, mlp_logits, mlp_params, softmax_loss, split

from nso_jax.curvature import gauss_newton, hessian, pac_bayes_bound
from nso_jax.curvature.bounds import _signs, losses_and_curvatures


def bound_of(fun, params, batches, *, mask=None, weight=None, **options):
    return pac_bayes_bound(KEY, hessian(fun, params, batches, mask=mask, weight=weight), **options)


@jax.jit  # so that it is compiled once for each shape, not once for each test
def network(params, batch):
    logits = mlp_logits(params, batch["x"])
    return batch["weight"] * softmax_loss(logits, (None, batch["y"]))


@jax.jit
def separable(params, batch):
    """The Hessian is diagonal, `diag(2 x)` and `diag(12 x v^2)`, so that signs know its trace."""
    return jnp.mean(batch @ params["w"] ** 2 + batch @ params["v"] ** 4)


def problem(dtype):
    """A network with every kind of leaf, a start for it, and data with a leaf that the examples share."""
    rng = np.random.default_rng(0)
    params = mlp_params(rng, dtype)
    initial = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape), dtype), params)
    batch = {
        "weight": jnp.asarray(2.0, dtype),
        "x": jnp.asarray(rng.normal(size=(12, 3)), dtype),
        "y": jnp.asarray(np.eye(2)[rng.integers(2, size=12)], dtype),
    }
    return params, initial, batch


def diagonal_problem(dtype):
    rng = np.random.default_rng(0)
    params, initial = (
        {name: jnp.asarray(rng.normal(size=5), dtype) for name in ("w", "v")} for _ in range(2)
    )
    return params, initial, jnp.asarray(rng.normal(size=(12, 5)), dtype)


def leaf_blocks(params):
    """Where each leaf's weights stand in the dense Hessian."""
    ends = itertools.accumulate((leaf.size for leaf in jax.tree.leaves(params)), initial=0)
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def exact(fun, params, initial, batches, sample_size):
    """The parts of the bound by NumPy, from the dense Hessians of `batches`."""
    flat, unravel = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda w, batch: fun(unravel(w), batch)))
    diagonals = np.stack([np.diag(hessian(flat, batch)) for batch in batches])
    leaf_traces = np.stack([diagonals[:, block].sum(axis=1) for block in leaf_blocks(params)], axis=1)
    change = np.asarray(flat - ravel_pytree(initial)[0])
    leaf_distances = np.array([np.sqrt(np.sum(change[block] ** 2)) for block in leaf_blocks(params)])
    c, alpha = max(float(fun(params, batch)) for batch in batches), diagonals.sum(axis=1).max()
    return {
        "value": np.sqrt(c * alpha * np.sum(change**2) / sample_size),
        "layerwise": c * np.sqrt(np.sum(leaf_traces.max(axis=0) * leaf_distances**2) / sample_size),
        "max_loss": c,
        "max_trace": alpha,
        "distance": np.sqrt(np.sum(change**2)),
        "leaf_traces": leaf_traces.max(axis=0),
        "leaf_distances": leaf_distances,
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("per", ["example", "batch"])
def test_bound_of_diagonal_hessians_is_exact(per):
    params, initial, x = diagonal_problem(jnp.float64)
    batches = split(x, 5, 5, 2)
    bound = bound_of(separable, params, batches, initial_params=initial, num_probes=2, per=per)
    units = batches if per == "batch" else split(x, *[1] * 12)
    expected = exact(separable, params, initial, units, 12)
    for name, value in expected.items():
        np.testing.assert_allclose(jax.tree.leaves(getattr(bound, name)), np.ravel(value), rtol=1e-12)
    assert bound.max_trace_standard_error <= 1e-12
    assert (bound.per, bound.sample_size) == (per, 12)
    for tree in (bound.leaf_traces, bound.leaf_distances):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert all(isinstance(bound[i], float) for i in (0, 1, 2, 3, 4, 5))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("per", ["example", "batch"])
def test_bound_of_a_network(per):
    params, initial, batch = problem(jnp.float64)
    batches = split(batch, 7, 5)
    bound = bound_of(network, params, batches, initial_params=initial, num_probes=300, per=per)
    units = batches if per == "batch" else split(batch, *[1] * 12)
    expected = exact(network, params, initial, units, 12)
    error = 5 * bound.max_trace_standard_error
    assert abs(bound.max_trace - expected["max_trace"]) <= error
    for found, true in zip(jax.tree.leaves(bound.leaf_traces), expected["leaf_traces"], strict=True):
        assert abs(found - true) <= error
    relative = error / expected["max_trace"]
    assert bound.value == pytest.approx(expected["value"], rel=relative)
    assert bound.layerwise == pytest.approx(expected["layerwise"], rel=3 * relative)
    assert bound.max_loss == pytest.approx(expected["max_loss"], rel=1e-12)
    assert bound.distance == pytest.approx(expected["distance"], rel=1e-12)
    assert bound.leaf_traces["unused"] == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("per", ["example", "batch"])
def test_formulas_are_those_of_the_parts(per):
    params, initial, batch = problem(jnp.float64)
    bound = bound_of(network, params, split(batch, 7, 5), initial_params=initial, per=per)
    c, alpha, r, n = bound.max_loss, bound.max_trace, bound.distance, bound.sample_size
    assert bound.value == pytest.approx(math.sqrt(c * alpha * r**2 / n), rel=1e-12)
    traces, distances = (
        np.array(jax.tree.leaves(tree)) for tree in (bound.leaf_traces, bound.leaf_distances)
    )
    layerwise = c * math.sqrt(sum(np.maximum(traces, 0) * distances**2) / n)
    assert bound.layerwise == pytest.approx(layerwise, rel=1e-12)
    assert r == pytest.approx(math.sqrt(sum(distances**2)), rel=1e-12)


@pytest.mark.usefixtures("x64")
def test_standard_error_is_true():
    """One example, so that there is no choice of the largest."""
    params, initial, batch = problem(jnp.float64)
    one = cut(batch, 0, 1)
    true = exact(network, params, initial, [one], 1)["max_trace"]
    h = hessian(network, params, one)
    runs = [pac_bayes_bound(jax.random.key(i), h, initial_params=initial, num_probes=20) for i in range(120)]
    scores = np.array([(run.max_trace - true) / run.max_trace_standard_error for run in runs])
    assert 0.8 <= scores.std() <= 1.25
    assert abs(scores.mean()) <= 5 / math.sqrt(120)


@pytest.mark.usefixtures("x64")
def test_examples_do_not_depend_on_their_batches():
    params, initial, batch = problem(jnp.float64)
    whole = bound_of(network, params, batch, initial_params=initial)
    parts = bound_of(network, params, split(batch, 7, 1, 4), initial_params=initial)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert one == other if isinstance(one, str) else one == pytest.approx(other, rel=1e-9, abs=1e-12)


@pytest.mark.usefixtures("x64")
def test_batches_of_one_are_examples():
    params, initial, batch = problem(jnp.float64)
    examples = bound_of(network, params, batch, initial_params=initial)
    singles = bound_of(network, params, split(batch, *[1] * 12), initial_params=initial, per="batch")
    assert singles.value == pytest.approx(examples.value, rel=1e-9)
    assert singles.layerwise == pytest.approx(examples.layerwise, rel=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "mask",
    [
        {"layers": [True, False], "scale": False, "unused": True},
        lambda params: {name: [True, False] if name == "layers" else False for name in params},
    ],
    ids=["prefix", "callable"],
)
def test_mask_leaves_the_other_leaves_out(mask):
    params, initial, batch = problem(jnp.float64)
    bound = bound_of(network, params, batch, initial_params=initial, mask=mask)
    whole = bound_of(network, params, batch, initial_params=initial)
    for part, all_of in (
        (bound.leaf_traces, whole.leaf_traces),
        (bound.leaf_distances, whole.leaf_distances),
    ):
        first, second = part["layers"]
        assert first == pytest.approx(all_of["layers"][0], rel=1e-9)
        assert second["w"] == part["scale"] == 0
    assert bound.distance == pytest.approx(math.hypot(*bound.leaf_distances["layers"][0].values()), rel=1e-12)
    assert bound.max_loss == whole.max_loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)])
def test_precision(dtype, tolerance):
    params, initial, x = diagonal_problem(dtype)
    bound = bound_of(separable, params, x, initial_params=initial)
    with jax.enable_x64(True):
        params, initial, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, initial, x))
        true = bound_of(separable, params, x, initial_params=initial)
    for name in ("value", "layerwise", "max_loss", "max_trace"):
        assert getattr(bound, name) == pytest.approx(getattr(true, name), rel=tolerance)
    assert bound.distance == pytest.approx(true.distance, rel=1e-12)


def test_convolution():
    loss, params, images = convolution()
    initial = jax.tree.map(jnp.zeros_like, params)
    bound = bound_of(loss, params, split(images, 5, 3), initial_params=initial, num_probes=60)
    expected = exact(loss, params, initial, split(images, *[1] * 8), 8)
    assert abs(bound.max_trace - expected["max_trace"]) <= 5 * bound.max_trace_standard_error
    assert bound.max_loss == pytest.approx(expected["max_loss"], rel=1e-5)
    assert bound.distance == pytest.approx(expected["distance"], rel=1e-5)


def test_negative_maxima_count_as_zero():
    def hill(params, batch):
        return 1 - jnp.mean(batch) * jnp.sum(params["w"] ** 2) + jnp.sum(params["v"] ** 2)

    params = {"w": jnp.full(3, 0.1), "v": jnp.full(2, 0.1)}
    initial = jax.tree.map(lambda leaf: leaf + 1, params)
    bound = bound_of(hill, params, jnp.ones(4), initial_params=initial)
    assert bound.leaf_traces == {"w": -6, "v": 4}
    assert (bound.max_trace, bound.value) == (-2, 0)
    assert bound.layerwise == pytest.approx(bound.max_loss * math.sqrt(4 * 2 / 4), rel=1e-6)
    deep = bound_of(lambda w, x: jnp.mean(w**2) - 9, jnp.ones(2), jnp.ones(4), initial_params=jnp.zeros(2))
    assert (deep.max_loss, deep.value, deep.layerwise) == (-8, 0, 0)


def test_gauss_newton_is_taken_as_its_loss():
    """At w = 2 the Hessian of `(w^2 - 1)^2 / 2` is 22, and the Gauss-Newton matrix 16."""
    loss = lambda outputs, x: jnp.mean((outputs - 1) ** 2) / 2  # noqa: E731
    h = gauss_newton(lambda w, x: x * w**2, loss, jnp.array(2.0), jnp.ones(3))
    assert pac_bayes_bound(KEY, h, initial_params=jnp.array(0.0)).max_trace == 22


@pytest.mark.parametrize("per", ["example", "batch"])
def test_a_loss_without_data(per):
    bound = bound_of(lambda w, _: jnp.sum(w**2), jnp.ones(3), None, initial_params=jnp.zeros(3), per=per)
    assert (bound.max_loss, bound.max_trace, bound.sample_size) == (3, 6, 1)


def test_memory_grows_with_activations_not_with_params():
    """160,000 weights, of which an example uses 400 inputs."""
    params = {"w": jnp.ones((400, 400))}

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)

    def temporary_bytes(size):
        batch, signs = jnp.ones((size, 400)), _signs(KEY, 0, params)
        programs = hessian(loss, params, batch).programs
        measure = programs.compiled(losses_and_curvatures, static_argnames=("per", "size"))
        compiled = measure.lower(params, signs, 0, batch=batch, per="example", size=size).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(4), temporary_bytes(64)
    assert few <= 4 * params["w"].nbytes
    assert many - few <= 60 * 20 * 400 * 4  # 20 arrays of activations
    assert many - few < 60 * params["w"].nbytes / 10


def test_callback_and_compilations():
    counts, shapes = [], []

    def loss(params, x):
        shapes.append(x.shape)
        return separable(params, x)

    params, initial, x = diagonal_problem(jnp.float32)
    batches = split(x, 5, 5, 2)
    bound_of(loss, params, batches, initial_params=initial, num_probes=3, callback=counts.append)
    assert counts == [2 * i for i in range(1, 10)]
    assert shapes == [(1, 5), (1, 5)]  # once for batches of 5, once for 2


def test_probes_of_a_leaf_do_not_depend_on_the_others():
    params = {"w": jnp.zeros((3, 4)), "v": jnp.zeros(2)}
    together, alone = _signs(KEY, 3, params), _signs(KEY, 3, {"w": params["w"]})
    np.testing.assert_array_equal(together["w"], alone["w"])
    assert set(np.unique(together["w"])) == {-1.0, 1.0}


# What counts as an example


def priced(params, batch):
    """A loss with a leaf that the examples share, and whose name comes first."""
    return jnp.mean(batch["x"] @ params["w"] ** 2) * jnp.sum(batch["costs"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("per", ["example", "batch"])
def test_weight_says_what_the_examples_are(per):
    rng = np.random.default_rng(0)
    params, initial = {"w": jnp.asarray(rng.normal(size=4))}, {"w": jnp.zeros(4)}
    x, costs = rng.uniform(size=(8, 4)), np.array([0.5, 1.5])
    batches = [{"costs": costs, "x": x[:5]}, {"costs": costs, "x": x[5:5]}, {"costs": costs, "x": x[5:]}]
    counts = []
    bound = bound_of(
        priced,
        params,
        batches,
        initial_params=initial,
        per=per,
        num_probes=2,
        weight=lambda batch: len(batch["x"]),
        callback=counts.append,
    )
    units = [x[i : i + 1] for i in range(8)] if per == "example" else [x[:5], x[5:]]
    expected = exact(priced, params, initial, [{"costs": costs, "x": unit} for unit in units], 8)
    assert bound.sample_size == 8
    assert counts == [1, 2, 3, 4]  # the batch without examples is skipped
    for name in ("value", "max_loss", "max_trace"):
        assert getattr(bound, name) == pytest.approx(expected[name], rel=1e-12)


@pytest.mark.parametrize("per", ["example", "batch"])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (None, ValueError, r"batches\[0\]: its leaves have.*\['costs'\]: 2, \['x'\]: 5.*weight=lambda"),
        (lambda _: 57, ValueError, r"weight\(batches\[0\]\): .*one of \[2, 5\], got 57; .*not count tokens"),
        (lambda _: 2.5, ValueError, r"weight\(batches\[0\]\): .*one of \[2, 5\], got 2.5"),
        (lambda _: -1, ValueError, r"weight\(batches\[0\]\): expected a finite number >= 0, got -1"),
        (lambda _: 0, ValueError, "none that `weight` lets count"),
    ],
)
def test_errors_in_the_number_of_examples(per, weight, error, message):
    batch = {"costs": np.ones(2), "x": np.ones((5, 3))}
    with pytest.raises(error, match=message):
        bound_of(priced, W, batch, initial_params=W, per=per, weight=weight)


def test_error_where_the_loss_has_a_custom_vjp():
    square = jax.custom_vjp(lambda x: x**2)
    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    for fun in (lambda p, _: jnp.sum(square(p["w"])), jax.jit(lambda p, _: jnp.sum(square(p["w"])))):
        with pytest.raises(TypeError, match=r"fun: has a jax.custom_vjp inside.*give the same loss without"):
            bound_of(fun, W, None, initial_params=W)


def test_errors_inside_a_transformation():
    with pytest.raises(
        TypeError, match=r"initial_params: got a tracer, .*call it outside jit, vmap and grad"
    ):
        jax.grad(lambda initial: bound_of(cubic, W, 1.0, initial_params=initial).value)(W)
    with pytest.raises(TypeError, match=r"batches\[0\]: got a tracer, .*call it outside jit, vmap and grad"):
        jax.vmap(lambda batch: bound_of(cubic, W, batch, initial_params=W).value)(jnp.ones((2, 2)))


# Errors


@pytest.mark.parametrize(
    ("fun", "batches", "error", "message"),
    [
        (cubic, Loader([]), ValueError, "is empty"),
        (cubic, [np.ones(2), np.ones((0, 3))], ValueError, r"batches\[1\] has no examples"),
        (lambda w, _: w["w"], np.ones(2), TypeError, r"fun: expected a real scalar.*got float32\[3\]"),
        (lambda w, _: None, None, TypeError, "fun: expected a real scalar.*got NoneType"),
        (
            cubic,
            [np.ones(2), np.array([1, np.nan])],
            FloatingPointError,
            r"The loss of batches\[1\], example 1, is not finite: check params and the batch",
        ),
        (
            lambda w, x: jnp.sum(jnp.sqrt(w["w"] - x)),
            1.0,
            FloatingPointError,
            r"The second derivative of the loss of batches\[0\] is not finite.*no second derivative",
        ),
    ],
)
def test_errors_in_what_to_measure(fun, batches, error, message):
    with pytest.raises(error, match=message):
        bound_of(fun, W, batches, initial_params=W)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_probes": 1}, ValueError, "num_probes: expected an int >= 2, got 1"),
        ({"num_probes": 2.5}, TypeError, "num_probes: expected a static int >= 2, got 2.5"),
        ({"per": "epoch"}, ValueError, "per: expected one of 'example', 'batch', got 'epoch'"),
        (
            {"initial_params": {"w": jnp.ones(3), "b": jnp.ones(1)}},
            ValueError,
            r"initial_params: expected a pytree like params.*only one of them has leaf \['b'\]",
        ),
        ({"initial_params": {}}, ValueError, r"initial_params: .*only one of them has leaf \['w'\]"),
        ({"initial_params": jnp.ones(3)}, ValueError, "initial_params: expected a pytree like params"),
        (
            {"initial_params": {"w": jnp.ones(2)}},
            ValueError,
            r"initial_params: expected shape \(3,\) for leaf \['w'\], got \(2,\)",
        ),
        ({"initial_params": {"w": np.arange(3)}}, TypeError, r"initial_params: leaf \['w'\] is int64\[3\]"),
        (
            {"initial_params": {"w": np.ones(3, complex)}},
            TypeError,
            r"initial_params: leaf \['w'\] is complex128\[3\], expected real numbers",
        ),
        (
            {"initial_params": {"w": np.full(3, np.nan)}},
            FloatingPointError,
            r"The distance of leaf \['w'\] from initial_params is not finite",
        ),
    ],
)
def test_errors_in_options(options, error, message):
    with pytest.raises(error, match=message):
        bound_of(cubic, W, 1.0, **{"initial_params": W, **options})
