"""Products with Hessians and Gauss-Newton matrices, what they share, and errors in what to measure."""

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
    W,
    convolution,
    cubic,
    dense,
    exact_mlp_hessian,
    flat,
    mlp,
    mlp_logits,
    mlp_loss,
    random_tangent,
    softmax_loss,
    split,
)

from nso_jax import curvature, noise
from nso_jax.curvature import operators


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(30,), (17, 13), (10, 10, 10)])
def test_product_is_that_of_the_dense_hessian_of_all_data(sizes):
    params, batch = mlp(jnp.float64)
    tangent = random_tangent(params)
    result = curvature.hessian(mlp_loss, params, split(batch, *sizes))(tangent)
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
    result = curvature.hessian(mlp_loss, params, form(jax.tree.map(array, batch)))(tangent)
    np.testing.assert_allclose(flat(result), exact_mlp_hessian(jnp.float32) @ flat(tangent), atol=1e-5)


def test_product_without_data_and_with_a_dict():
    def loss(w, batch):
        return jnp.sum(w**4) * (1 if batch is None else jnp.mean(batch["x"]))

    w, v = jnp.arange(3.0), jnp.ones(3)
    for batch in (None, {"x": jnp.ones(5)}):
        np.testing.assert_allclose(curvature.hessian(loss, w, batch)(v), 12 * w**2, rtol=1e-6)


def test_product_sums_many_float32_batches_without_loss():
    """A plain float32 sum of these is off by 17 units in the last place."""
    scales = np.random.default_rng(0).normal(100, size=(3000, 1, 1)).astype(np.float32)
    one = jnp.ones(())
    result = curvature.hessian(lambda w, batch: batch[0, 0] * w**2 / 2, one, list(scales))(one)
    assert abs(float(result) - scales.mean(dtype=np.float64)) <= np.spacing(np.float32(100))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_keeps_structure_and_dtypes(dtype):
    params, batch = mlp(dtype)
    tangent = random_tangent(params)
    result = curvature.hessian(mlp_loss, params, split(batch, 17, 13))(tangent)
    assert jax.tree.map(jnp.result_type, result) == jax.tree.map(jnp.result_type, params)
    expected = exact_mlp_hessian(dtype) @ flat(tangent)
    assert np.linalg.norm(flat(result) - expected) <= 10 * jnp.finfo(dtype).eps * np.linalg.norm(expected)


def test_product_compiles_once_for_each_shape():
    shapes = []

    def loss(params, batch):
        shapes.append(batch[0].shape)
        return mlp_loss(params, batch)

    params, batch = mlp(jnp.float32)
    h = curvature.hessian(loss, params, split(batch, 10, 10, 5))
    for seed in range(3):
        h(random_tangent(params, seed))
    assert shapes == [(10, 3), (5, 3)]


def test_convolution():
    assert_measures_the_hessian(*convolution())


def test_flax_state():
    nnx = pytest.importorskip("flax.nnx")
    graph, params = nnx.split(nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
    assert_measures_the_hessian(lambda p, batch: jnp.mean(nnx.merge(graph, p)(batch) ** 2), params, x)


def assert_measures_the_hessian(loss, params, data):
    matrix, tangent = dense(loss, params, data), random_tangent(params)
    result = curvature.hessian(loss, params, split(data, 5, len(data) - 5))(tangent)
    assert jax.tree.structure(result) == jax.tree.structure(params)
    np.testing.assert_allclose(flat(result), matrix @ flat(tangent), rtol=1e-4, atol=1e-5)
    h = curvature.hessian(loss, params, data)
    estimate = curvature.trace(KEY, h, num_products=20)
    assert abs(estimate.value - np.trace(matrix)) <= 5 * estimate.standard_error
    assert jax.tree.structure(estimate.per_leaf) == jax.tree.structure(params)
    pairs = curvature.eigenvalues(KEY, h, k=1)
    assert pairs.values[0] == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=1e-5)


# The Gauss-Newton matrix


def mlp_gauss_newton(params, batches, **options):
    model = lambda params, batch: mlp_logits(params, batch[0])  # noqa: E731
    return curvature.gauss_newton(model, softmax_loss, params, batches, **options)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(30,), (17, 13)])
def test_gauss_newton_product_is_that_of_the_dense_matrix(sizes):
    params, batch = mlp(jnp.float64)
    weights, unravel = ravel_pytree(params)
    jacobian = jax.jit(jax.jacobian(lambda w: mlp_logits(unravel(w), batch[0])))(weights)
    p = np.asarray(jax.nn.softmax(mlp_logits(params, batch[0])))
    inner = np.einsum("nk,kl->nkl", p, np.eye(2)) - np.einsum("nk,nl->nkl", p, p)
    matrix = np.einsum("nkw,nkl,nlv->wv", jacobian, inner, jacobian) / 30
    h, tangent = mlp_gauss_newton(params, split(batch, *sizes)), random_tangent(params)
    np.testing.assert_allclose(h.fun(params, batch), mlp_loss(params, batch), rtol=1e-12)
    np.testing.assert_allclose(flat(h(tangent)), matrix @ flat(tangent), rtol=0, atol=1e-12)
    pairs = curvature.eigenvalues(KEY, h, k=3)
    np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(matrix)[:-4:-1], atol=1e-10)
    estimate = curvature.trace(KEY, h)
    assert estimate.value == pytest.approx(np.trace(matrix), rel=1e-10)


def test_gauss_newton_matrix_of_a_linear_model_is_the_hessian():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3)), jnp.float32)
    w = v = jnp.asarray([1.0, -2.0, 0.5])
    h = curvature.gauss_newton(lambda w, x: x @ w, lambda outputs, x: jnp.mean(outputs**4), w, x)
    expected = curvature.hessian(lambda w, x: jnp.mean((x @ w) ** 4), w, x)(v)
    np.testing.assert_allclose(h(v), expected, rtol=1e-5)


# What calls with a matrix share


def test_estimators_share_programs_and_so_do_later_params():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return mlp_loss(params, batch)

    params, batch = mlp(jnp.float32)
    h = curvature.hessian(loss, params, batch)
    for here in (h, h.at(jax.tree.map(jnp.sin, params))):
        here(params)
        curvature.trace(KEY, here, num_products=8)
        curvature.diagonal(KEY, here, num_products=8)
        curvature.eigenvalues(KEY, here, k=1)
        curvature.spectral_density(KEY, here, num_probes=2, num_steps=4)
        curvature.noise_stability_gap(KEY, here, sigmas=[0.1], num_samples=2, num_products=4)
        curvature.suggest_sigma(KEY, here, num_samples=2, num_products=4)
        curvature.pac_bayes_bound(KEY, here, initial_params=params, num_probes=2)
    assert len(traces) == 3  # for its gradient, for itself, and for its second derivatives


def test_layers_at_later_params_are_traced_no_more():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return mlp_loss(params, batch)

    params, batch = mlp(jnp.float32)
    mask = {"layers": [{"w": True, "b": False}, {"w": False, "b": None}], "scale": False, "unused": False}
    h, counts = curvature.hessian(loss, params, batch, mask=mask), []
    for here in (h, h.at(jax.tree.map(jnp.sin, params))):
        traces.clear()
        curvature.layer_structure(KEY, here, k=1, num_probes=2)
        counts.append(len(traces))
    assert counts == [2, 0]  # for its gradient, and to find the layer


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "made", [lambda *args, **options: curvature.hessian(mlp_loss, *args, **options), mlp_gauss_newton]
)
def test_at_other_params_and_on_other_data_it_is_what_is_made_there(made):
    params, batch = mlp(jnp.float64)
    later, tangent = jax.tree.map(lambda x: x / 2, params), random_tangent(params)
    options = {"mask": {"layers": True, "scale": False, "unused": False}, "chunk_size": 3}
    options["weight"] = lambda batch: len(batch[0]) ** 2
    h = made(params, split(batch, 17, 13), **options)
    before = h(tangent)
    moved, there = h.at(later).on([batch]), made(later, [batch], **options)
    np.testing.assert_array_equal(flat(moved(tangent)), flat(there(tangent)))
    assert all(getattr(moved, name) == getattr(h, name) for name in ("mask", "weight", "chunk_size", "flags"))
    np.testing.assert_array_equal(flat(h(tangent)), flat(before))


def test_a_new_matrix_sees_what_the_loss_closes_over_and_an_old_one_does_not():
    def loss(params, batch):
        return slope * jnp.mean((batch @ params) ** 2)

    def figures(h):
        (layer,) = curvature.layer_structure(KEY, h, k=1, num_probes=2).values()
        gap = curvature.noise_stability_gap(KEY, h, sigmas=[1.0], sampler=noise.rademacher).gap[0]
        bound = curvature.pac_bayes_bound(KEY, h, initial_params=w).max_trace
        return [h(w)[0, 0], gap, bound, curvature.trace(KEY, h).value, layer.kronecker.output[0, 0]]

    matrix, w, matrices = jnp.eye(2), jnp.ones((2, 1)), []
    for slope in (1.0, 2.0):
        matrices.append(curvature.hessian(loss, w, matrix))
        np.testing.assert_allclose(figures(matrices[-1]), np.array([1, 1, 2, 2, 2]) * slope, rtol=1e-6)
    np.testing.assert_allclose(figures(matrices[0]), [1, 1, 2, 2, 2], rtol=1e-6)


# How products are made


@pytest.mark.usefixtures("x64")
def test_masked_product_is_that_of_a_block():
    params, batch = mlp(jnp.float64)
    mask, tangent = {"layers": [True, False], "scale": False, "unused": True}, random_tangent(params)
    h = curvature.hessian(mlp_loss, params, batch, mask=mask)
    expected, block = np.zeros(25), exact_mlp_hessian(jnp.float64)[FIRST_LAYER, FIRST_LAYER]
    expected[FIRST_LAYER] = block @ flat(tangent)[FIRST_LAYER]
    np.testing.assert_allclose(flat(h(tangent)), expected, rtol=0, atol=1e-12)
    (row,) = h.products(np.asarray(h.ravel(tangent))[None])
    assert row.shape == (h.size,) == (16,)
    np.testing.assert_allclose(flat(h.unravel(row)), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("block_bytes", [1, 2**29])
def test_products_do_not_depend_on_chunks_and_blocks(chunk_size, block_bytes, monkeypatch):
    monkeypatch.setattr(operators, "_BLOCK_BYTES", block_bytes)
    params, batch = mlp(jnp.float64)
    loader, counts = Loader(split(batch, 17, 13)), []
    h = curvature.hessian(mlp_loss, params, loader, chunk_size=chunk_size)
    vectors = np.random.default_rng(0).normal(size=(5, h.size))
    expected = vectors @ exact_mlp_hessian(jnp.float64)
    np.testing.assert_allclose(h.products(vectors, counts.append), expected, rtol=0, atol=1e-12)
    assert sum(counts) == 5
    assert loader.passes == (1 if block_bytes > 1 else -(-5 // (chunk_size or 1)))


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
        curvature.hessian(loss, w, loader).products(np.ones((2, 20)))
        h = curvature.hessian(loss, w, list(Watched(count)))
        h.products(np.ones((2, 20)))
        peaks.append((loader.peak - before, live_bytes() - before))
    assert peaks[1][0] - peaks[0][0] <= 27 * 4  # flags; a batch has 4,000 bytes
    assert max(peak[1] for peak in peaks) <= kept + 10**3


def count_linearizations(h):
    linearize, calls = h.programs.linearize, []

    def counted(*args, **options):
        calls.append(1)
        return linearize(*args, **options)

    h.programs.linearize = counted
    return calls


def test_a_list_is_linearized_once_and_a_loader_in_every_pass():
    params, batch = mlp(jnp.float32)
    for batches, expected in ((split(batch, 17, 13), 2), ([batch], 1), (batch, 1), (Loader([batch] * 2), 6)):
        h = curvature.hessian(mlp_loss, params, batches)
        calls = count_linearizations(h)
        for _ in range(3):
            h.products(np.ones((1, h.size)))
        assert len(calls) == expected
    calls.clear()
    h.at(params).products(np.ones((1, h.size)))
    assert len(calls) == 2  # its own


# Errors


def product(fun, params, batches, **options):
    return curvature.hessian(fun, params, batches, **options)(params)


def returns(value):
    return lambda params, _: value(params["w"])


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
def test_errors_in_what_to_measure(arguments, error, message):
    with pytest.raises(error, match=message):
        product(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": {"w": 1}}, TypeError, r"mask: expected True or False for leaf \['w'\], got 1"),
        ({"mask": {"v": True}}, ValueError, "mask: not a prefix of the pytree"),
        ({"mask": False}, ValueError, "mask: selects no leaf"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected an int >= 1, got 0"),
        ({"weight": 3}, TypeError, "weight: expected a function of a batch, or None, got 3"),
    ],
)
def test_errors_in_options(options, error, message):
    with pytest.raises(error, match=message):
        curvature.hessian(cubic, W, 1.0, **options)
    with pytest.raises(error, match=message):
        curvature.gauss_newton(cubic, lambda outputs, _: outputs, W, 1.0, **options)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (jnp.ones(3), "expected a pytree like params"),
        ({"w": jnp.ones(3), "v": 1.0}, r"expected a pytree like params.*only one of them has leaf \['v'\]"),
        ({"w": jnp.ones(2)}, r"expected shape \(3,\) for leaf \['w'\], got \(2,\)"),
    ],
)
def test_errors_in_a_tangent_and_in_later_params(tree, message):
    h = curvature.hessian(cubic, W, 1.0)
    for name, function in (("tangent", h), ("params", h.at)):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            function(tree)
    with pytest.raises(TypeError, match=r"params: leaf \['w'\] is int32"):
        h.at({"w": jnp.arange(3)})


def test_errors_in_gauss_newton_parts():
    with pytest.raises(TypeError, match="model: expected a function of params and a batch, got 'model'"):
        curvature.gauss_newton("model", lambda outputs, _: outputs, jnp.ones(2), None)
    with pytest.raises(TypeError, match=r"loss: expected a function of the model's outputs.*got NoneType"):
        curvature.gauss_newton(lambda w, _: w, None, jnp.ones(2), None)
    with pytest.raises(TypeError, match=r"fun: expected a real scalar.*got float32\[2\]"):
        curvature.gauss_newton(lambda w, _: w, lambda outputs, _: outputs, jnp.ones(2), None)(jnp.ones(2))


# Calls that curvature cannot take, and what to do

OUTSIDE = "call it outside jit, vmap and grad"
TRANSFORMED = {
    "jit": jax.jit,
    "vmap": lambda f: lambda *args: jax.vmap(f)(*jax.tree.map(lambda x: jnp.stack([x, x]), args)),
    "grad": lambda f: lambda params, *args: jax.grad(lambda params: f(params, *args))(params),
}


@pytest.mark.parametrize("transformation", TRANSFORMED)
def test_errors_inside_a_transformation(transformation):
    message = rf"got a tracer, float32\[3\] for leaf \['w'\]; .*{OUTSIDE}"
    with pytest.raises(TypeError, match=f"params: {message}"):
        TRANSFORMED[transformation](lambda params: product(cubic, params, 1.0))(W)
    h = curvature.hessian(cubic, W, 1.0)
    for name, function in (("tangent", h), ("params", h.at)):
        with pytest.raises(TypeError, match=f"{name}: {message}"):
            TRANSFORMED[transformation](function)(W)


def test_errors_inside_jit_with_all_from_outside():
    h = curvature.hessian(cubic, W, 1.0)
    for name, call in (
        ("params", lambda: h.at(W)),
        ("tangent", lambda: h(W)),
        ("h", lambda: h.products(np.ones((1, 3)))),
    ):
        with pytest.raises(TypeError, match=rf"{name}: expected to be used outside of jit.*{OUTSIDE}"):
            jax.jit(call)()


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [np.ones(2), x], lambda x: Loader([x])])
def test_error_where_the_data_are_tracers(form):
    with pytest.raises(TypeError, match=rf"batches\[[01]\]: got a tracer, float32\[2\]; .*{OUTSIDE}"):
        jax.vmap(lambda x: product(cubic, W, form(x))["w"])(jnp.ones((4, 2)))


def of_three(params, x, y):
    return jnp.mean((x @ params["w"] - y) ** 2)


MADE_OF_THREE = {
    "plain": lambda batch: curvature.hessian(of_three, W, batch),
    "jitted": lambda batch: curvature.hessian(jax.jit(of_three), W, batch),
    "gauss_newton": lambda batch: curvature.gauss_newton(of_three, cubic, W, batch),
}


@pytest.mark.parametrize("form", MADE_OF_THREE)
@pytest.mark.parametrize(
    "call", [lambda h: h(W), lambda h: curvature.pac_bayes_bound(KEY, h, initial_params=W)]
)
def test_error_in_a_loss_of_three_arguments(form, call):
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'y'") as caught:
        call(MADE_OF_THREE[form]((np.ones((2, 3)), np.ones(2))))
    (note,) = (note for note in caught.value.__notes__ if "fun" in note)
    assert "fun is called as fun(params, batch)" in note
    assert "pass lambda params, batch: loss(params, *batch)" in note


@pytest.mark.parametrize("batch", [np.ones((2, 3), np.float32), {"x": np.ones((2, 3), np.float32)}])
def test_error_in_a_tuple_of_batches(batch):
    def loss(params, batch):
        return jnp.mean((batch["x"] if isinstance(batch, dict) else batch @ params["w"]) ** 2)

    with pytest.raises(TypeError, match="unsupported operand") as caught:
        product(loss, W, (batch, batch, batch))
    assert any("batches is a tuple of 3: that is one batch" in note for note in caught.value.__notes__)
    assert any("Give many batches as a list" in note for note in caught.value.__notes__)


def test_other_errors_of_a_loss_come_as_they_are():
    def broken(params, batch):
        raise RuntimeError("of the loss")

    for batch in (1.0, (np.ones((2, 3)), np.ones(2, int))):
        with pytest.raises(RuntimeError, match="of the loss") as caught:
            product(broken, W, batch)
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
    hessian = lambda model, loss, *on, **options: curvature.hessian(  # noqa: E731
        lambda p, b: loss(model(p, b), b), *on, **options
    )
    for made, *custom in (
        (hessian, model, loss),
        (curvature.gauss_newton, model, loss),
        (curvature.gauss_newton, plain_model, loss),
    ):
        batches = split(batch, 17, 13)
        h, expected = made(*custom, params, batches), made(plain_model, plain_loss, params, batches)
        np.testing.assert_allclose(flat(h(tangent)), flat(expected(tangent)), rtol=1e-9, atol=1e-12)
        several, same = (
            curvature.trace(KEY, made(*functions, params, batch, chunk_size=3), num_products=12)
            for functions in (custom, (plain_model, plain_loss))
        )
        assert several.value == pytest.approx(same.value, rel=1e-9)


def test_a_loss_with_a_custom_vjp_is_traced_once():
    traces = []
    tanh = backward_only(jnp.tanh, calls_itself=True)

    def loss(w, x):
        traces.append(1)
        return jnp.mean(tanh(x @ w) ** 2)

    h = curvature.hessian(loss, jnp.ones(3), jnp.ones((2, 3)))
    for _ in range(2):
        h(jnp.ones(3))
    assert len(traces) == 1
