"""SAM and its family: equal to their published updates, to optax where that is defined, and finite beyond."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nso_jax.nnx
from nso_jax import noise, sharpness

RHO, SIGMA = 0.1, 0.05
METHODS = {
    "sam": sharpness.sam,
    "usam": sharpness.usam,
    "asam": sharpness.asam,
    "rsam": lambda fun, **options: sharpness.rsam(fun, sigma=SIGMA, **options),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


# --- an independent implementation in NumPy -----------------------------------------------------------


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"].reshape(1, -1))
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


def numpy_grad(params, x, y):
    hidden = np.tanh(x @ params["w1"] + params["b1"])
    d_out = 2 * (hidden @ params["w2"] - y) / y.size
    d_hidden = (d_out @ params["w2"].T) * (1 - hidden**2)
    return {"w1": x.T @ d_hidden, "b1": d_hidden.sum(0), "w2": hidden.T @ d_out}


def problem(dtype=np.float64, steps=20):
    rng = np.random.default_rng(1)
    shapes = {"w1": (4, 8), "b1": (8,), "w2": (8, 2)}
    params = {name: (rng.normal(size=shape) * 0.5).astype(dtype) for name, shape in shapes.items()}
    return (
        params,
        rng.normal(size=(steps, 16, 4)).astype(dtype),
        rng.normal(size=(steps, 16, 2)).astype(dtype),
    )


def norm_of(tree):
    return np.sqrt(sum(np.sum(x**2) for x in tree.values()))


def at(params, step):
    return {name: params[name] + step[name] for name in params}


def numpy_step(name, params, u, x, y):
    """What is added to the weights, by the papers' formulas."""
    g = numpy_grad(params, x, y)
    if name == "sam":
        return {n: RHO * g[n] / norm_of(g) for n in g}
    if name == "usam":
        return {n: RHO * g[n] for n in g}
    if name == "asam":
        t = {n: abs(params[n]) + 0.01 for n in g}
        length = norm_of({n: t[n] * g[n] for n in g})
        return {n: RHO * t[n] ** 2 * g[n] / length for n in g}
    g = numpy_grad(at(params, u), x, y)
    d = {n: u[n] + 0.3 * g[n] for n in g}
    return {n: RHO * d[n] / norm_of(d) for n in d}


@pytest.mark.parametrize("name", METHODS)
def test_20_steps_equal_numpy(name, key, x64):
    reference, xs, ys = problem()
    params = jax.tree.map(jnp.asarray, reference)
    options = {"sigma": SIGMA, "gradient_weight": 0.3} if name == "rsam" else {}
    fn = jax.jit(getattr(sharpness, name)(loss, rho=RHO, **options))
    for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
        step_key = jax.random.fold_in(key, t)
        u = jax.tree.map(np.asarray, noise.perturbation(step_key, params, SIGMA))
        value, grads = fn(step_key, params, x, y)
        assert abs(value - loss(reference, x, y)) < 1e-12
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
        ascended = at(reference, numpy_step(name, reference, u, x, y))
        reference = at(reference, {n: -0.1 * g for n, g in numpy_grad(ascended, x, y).items()})
    chex.assert_trees_all_close(params, reference, rtol=1e-12)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.05, momentum=0.9), optax.adam(0.01)])
def test_sam_equals_that_of_optax(key, optimizer, standard_promotion):
    params, xs, ys = problem(np.float32)
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    theirs = optax.contrib.sam(optimizer, ascent, opaque_mode=True)
    fn = sharpness.sam(loss, rho=RHO)

    @jax.jit
    def step(mine, state, other, other_state, x, y):
        updates, state = optimizer.update(fn(key, mine, x, y)[1], state, mine)
        grad_fn = lambda params, _: jax.grad(loss)(params, x, y)  # noqa: E731
        other_updates, other_state = theirs.update(grad_fn(other, 0), other_state, other, grad_fn=grad_fn)
        return (
            optax.apply_updates(mine, updates),
            state,
            optax.apply_updates(other, other_updates),
            other_state,
        )

    mine = other = jax.tree.map(jnp.asarray, params)
    state, other_state = optimizer.init(mine), theirs.init(other)
    for x, y in zip(xs, ys, strict=True):
        mine, state, other, other_state = step(mine, state, other, other_state, x, y)
    chex.assert_trees_all_close(mine, other, atol=1e-6)


# --- where others fail --------------------------------------------------------------------------------


def quartic(params):
    return sum(jnp.sum(w.astype(jnp.float32) ** 4) for w in jax.tree.leaves(params))


def test_zero_gradients_give_the_plain_gradient_where_optax_gives_nan(key, method):
    w = jnp.zeros(3)
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    theirs = optax.contrib.sam(optax.sgd(1.0), ascent, opaque_mode=True)
    updates, _ = theirs.update(w, theirs.init(w), w, grad_fn=lambda w, _: jax.grad(quartic)(w))
    assert np.isnan(updates).all()
    value, grads = jax.jit(method(quartic, rho=RHO))(key, w)
    chex.assert_tree_all_finite((value, grads))
    if method is not METHODS["rsam"]:  # which is moved by its noise
        np.testing.assert_array_equal(grads, 0)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(jnp.float16, scale) for scale in (1.0, 1e4)]
    + [(dtype, scale) for dtype in (jnp.bfloat16, jnp.float32) for scale in (1e-30, 1e-6, 1.0, 1e4, 1e30)],
)
def test_small_and_large_gradients_have_a_direction(key, dtype, scale):
    """Squares of 1e-30 are zero and those of 1e30 infinite in float32, as are those of 1e4 in float16."""
    slope = scale * jnp.array([0.5, -1.0, 1.0, 0.25])

    def tilted(w):
        w = w.astype(jnp.float32)
        return slope @ w + scale * jnp.sum(w**2)

    w = jnp.array([1.0, -1.0, 0.5, 0.25], dtype)
    value, grads = jax.jit(sharpness.sam(tilted, rho=0.5))(key, w)
    h = (np.asarray(slope, np.float64) + 2 * scale * np.asarray(w, np.float64)) / scale
    h = np.asarray(jnp.asarray(h * scale, dtype), np.float64) / scale  # as the loss's gradient is rounded
    up = np.asarray(jnp.asarray(np.asarray(w, np.float64) + 0.5 * h / np.linalg.norm(h), dtype), np.float64)
    assert grads.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(grads, np.float64) / scale,
        np.asarray(slope, np.float64) / scale + 2 * up,
        rtol=2 * float(jnp.finfo(dtype).eps),
    )
    assert np.isfinite(value)


def test_float16_steps_are_added_in_float32(key):
    """A step of 1.2e-3 from 2, where float16 has a spacing of 2e-3 above: rounded once, it goes up."""
    slope = lambda w: jnp.sum(w.astype(jnp.float32) ** 2)  # noqa: E731
    w = jnp.full(4, 2.0, jnp.float16)
    grads = jax.jit(sharpness.sam(slope, rho=2 * 1.2e-3))(key, w)[1]
    np.testing.assert_array_equal(grads, 2 * np.nextafter(np.float16(2), np.float16(3)))


def test_non_finite_gradients_stay_so(key, method):
    value, grads = method(lambda w: jnp.sum(jnp.log(w)), rho=RHO, mask=False)(key, jnp.array([0.0, 1.0]))
    assert not np.isfinite(value)
    assert not np.isfinite(grads).all()
    if method is not METHODS["rsam"]:  # whose noise leaves the point where it is infinite
        value, grads = method(lambda w: jnp.sum(jnp.log(w)), rho=RHO)(key, jnp.array([0.0, 1.0]))
        assert not np.isfinite(value)
        assert np.isnan(grads).any()


# --- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda _: {"w": True, "b": False}])
def test_masked_leaves_do_not_move_and_do_not_count(key, method, mask):
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    coupled = lambda p: jnp.sum(p["w"] ** 4) * jnp.sum(p["b"] ** 2)  # noqa: E731
    value, grads = method(coupled, rho=RHO, mask=mask)(key, params)
    of_w = lambda w: coupled({"w": w["w"], "b": params["b"]})  # noqa: E731
    expected = method(of_w, rho=RHO)(key, {"w": params["w"]})
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grads["w"], expected[1]["w"], rtol=1e-5)
    assert np.all(grads["b"] > jax.grad(coupled)(params)["b"])  # at the ascended w


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": RHO, "mask": False}])
def test_without_a_radius_or_a_leaf_to_move_it_is_the_plain_gradient(key, method, options):
    w = jnp.array([1.0, 2.0])
    value, grads = method(quartic, **options)(key, w)
    np.testing.assert_array_equal(grads, jax.grad(quartic)(w))
    assert value == quartic(w)


def test_aux_is_that_at_the_weights(key, method):
    def with_aux(params, x):
        hidden = x @ params["w"]
        return jnp.sum(hidden**2), {"hidden": hidden, "count": 3, "more": [None]}

    params, x = {"w": jnp.ones(3)}, jnp.ones((2, 3))
    (value, aux), _ = jax.jit(method(with_aux, rho=RHO, has_aux=True))(key, params, x)
    assert value == 18
    np.testing.assert_array_equal(aux["hidden"], [3, 3])
    assert aux["count"] == 3


@pytest.mark.parametrize(
    "params",
    [
        2.0,
        jnp.float16(2),
        jnp.ones((2, 0)),
        {},
        {"a": jnp.ones(3, jnp.bfloat16), "b": [None, jnp.ones(())]},
        {"z": jnp.ones(2, jnp.complex64), "x": jnp.ones((2, 3), jnp.float16)},
    ],
)
def test_structures_shapes_and_dtypes_are_those_of_jax(key, method, params):
    def squares(params):
        parts = [jnp.sum(jnp.abs(w).astype(jnp.float32) ** 2) for w in jax.tree.leaves(params)]
        return sum(parts, jnp.float32(0))

    result = method(squares, rho=RHO)(key, params)
    expected = jax.value_and_grad(squares)(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, jax.tree.map(jnp.asarray, expected))
    chex.assert_tree_all_finite(result)


def test_complex_weights_climb(key):
    """JAX's gradient of a real function of z is the conjugate of the direction of steepest ascent."""
    z = jnp.array([1 + 2j, -0.5j])
    grads = sharpness.sam(lambda z: jnp.sum(jnp.abs(z) ** 2), rho=0.5)(key, z)[1]
    expected = 2 * np.conj(z) * (1 + 0.5 / np.linalg.norm(z))
    np.testing.assert_allclose(grads, expected, rtol=1e-6)


def test_argnums_and_keyword_arguments(key, method):
    def fun(x, w, v, *, power):
        return jnp.sum(x * w**power) + jnp.sum(v**power)

    x, w, v = jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0]), jnp.array(0.5)
    value, grads = method(fun, rho=RHO, argnums=(1, -1))(key, x, w, v, power=4)
    both = method(lambda both: fun(x, *both, power=4), rho=RHO)(key, (w, v))
    assert value == fun(x, w, v, power=4)
    chex.assert_trees_all_close(grads, both[1])


def test_rho_may_be_a_schedule_and_nothing_is_retraced(key, method):
    traces = []

    @jax.jit
    def step(key, w, rho):
        traces.append(rho)
        return method(quartic, rho=rho)(key, w)[1]

    w = jnp.array([1.0, 2.0])
    for rho in (0.0, 0.1, 0.2):
        np.testing.assert_allclose(
            step(key, w, jnp.float32(rho)), method(quartic, rho=rho)(key, w)[1], rtol=1e-6
        )
    assert len(traces) == 1


def test_vmap_scan_and_donation(key, method):
    fn = method(quartic, rho=RHO)
    ws, keys = jnp.linspace(-1, 1, 12).reshape(4, 3), jax.random.split(key, 4)
    one_by_one = [fn(k, w)[1] for k, w in zip(keys, ws, strict=True)]
    np.testing.assert_allclose(jax.vmap(fn)(keys, ws)[1], jnp.stack(one_by_one), rtol=1e-5)
    scanned, _ = jax.lax.scan(lambda w, k: (w - 0.1 * fn(k, w)[1], None), ws[0], keys)
    looped = ws[0]
    for k in keys:
        looped -= 0.1 * fn(k, looped)[1]
    np.testing.assert_allclose(scanned, looped, rtol=1e-5)
    donated = jax.jit(lambda k, w: w - fn(k, w)[1], donate_argnums=1)(key, jnp.array(ws[0]))
    np.testing.assert_allclose(donated, ws[0] - fn(key, ws[0])[1], rtol=1e-5)


def test_asam_does_not_see_how_layers_are_scaled(key):
    """Scaling one layer up and the next one down leaves the function, its ascent and its gradient's product."""
    params, xs, ys = problem(np.float32)
    linear = lambda p, x, y: jnp.mean((x @ p["w1"] @ p["w2"] - y) ** 2)  # noqa: E731
    fn = jax.jit(sharpness.asam(linear, rho=0.5, eta=0.0))
    params = {name: jnp.asarray(params[name]) for name in ("w1", "w2")}
    rescaled = {"w1": 8 * params["w1"], "w2": params["w2"] / 8}
    one, other = (fn(key, p, xs[0], ys[0])[1] for p in (params, rescaled))
    np.testing.assert_allclose(other["w1"] * 8, one["w1"], rtol=1e-4)
    np.testing.assert_allclose(other["w2"] / 8, one["w2"], rtol=1e-4)


# --- random smoothing ---------------------------------------------------------------------------------


def test_rsam_without_noise_is_sam(key):
    params, xs, ys = problem(np.float32)
    smooth = sharpness.rsam(loss, rho=RHO, sigma=0.0)(key, params, xs[0], ys[0])
    chex.assert_trees_all_close(smooth, sharpness.sam(loss, rho=RHO)(key, params, xs[0], ys[0]), rtol=1e-5)


def test_rsam_options_reach_the_noise(key):
    w = jnp.array([1.0, 2.0, 0.0])
    fn = sharpness.rsam(
        quartic, rho=RHO, sigma=noise.relative(0.5), sampler=noise.rademacher, gradient_weight=0.0
    )
    u = noise.perturbation(key, w, noise.relative(0.5), sampler=noise.rademacher)
    expected = jax.grad(quartic)(w + RHO * u / jnp.linalg.norm(u))
    np.testing.assert_allclose(fn(key, w)[1], expected, rtol=1e-6)


def test_rsam_spends_no_forward_pass_on_a_value_that_is_not_used(key):
    params, xs, ys = problem(np.float32)
    x, y = np.concatenate(xs), np.concatenate(ys)  # so many that what is done once for each weight is little

    def flops(fn):
        return jax.jit(fn).lower(key, params, x, y).compile().cost_analysis()["flops"]

    without = {
        "sam": flops(lambda *args: sharpness.sam(loss, rho=RHO)(*args)[1]),
        "rsam": flops(
            lambda *args: sharpness.rsam(loss, rho=RHO, sigma=SIGMA, sampler=lambda _, s, d: jnp.ones(s, d))(
                *args
            )[1]
        ),
    }
    assert without["rsam"] < 1.1 * without["sam"]


# --- Flax NNX -----------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.tanh(self.norm(self.linear(x)))))


def test_in_nnx_one_argument_changes(key, method, standard_promotion):
    """Statistics and random streams move as the evaluation at W says, and masks are the same in both."""

    def squares(model, x):
        return jnp.mean(model(x) ** 2)

    x = jnp.linspace(-1, 1, 24).reshape(8, 3)
    model, plain, twin = (Net(nnx.Rngs(0)) for _ in range(3))
    value, grads = nso_jax.nnx.value_and_grad(squares, method=method, rho=RHO)(key, model, x)
    plain_value, _ = nnx.value_and_grad(squares)(plain, x)
    assert value == plain_value
    for kind in (nnx.BatchStat, nnx.RngCount):
        chex.assert_trees_all_close(*(jax.tree.leaves(nnx.state(m, kind)) for m in (model, plain)))

    graphdef, params, rest = nnx.split(twin, nnx.Param, ...)
    pure = method(lambda params, x: squares(nnx.merge(graphdef, params, rest, copy=True), x), rho=RHO)
    expected = jax.tree.leaves(pure(key, params, x)[1])
    if method is not METHODS["rsam"]:  # whose noise depends on the paths
        chex.assert_trees_all_close(jax.tree.leaves(grads), expected, rtol=1e-5, atol=1e-6)


def test_aux_modes_are_not_for_the_rivals():
    with pytest.raises(ValueError, match="aux: expected one of 'mean', 'sum', 'concatenate', or a pytree"):
        nso_jax.nnx.value_and_grad(lambda model: 0.0, method=sharpness.sam, rho=RHO, aux="stack")


# --- one calling form, and bad input ------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, "value_and_grad"])
def test_all_have_one_calling_form(name):
    function = nso_jax.value_and_grad if name == "value_and_grad" else getattr(sharpness, name)
    first, *others = inspect.signature(function).parameters.values()
    assert first.name == "fun"
    assert all(other.kind in (other.KEYWORD_ONLY, other.VAR_KEYWORD) for other in others)
    inner = function(
        quartic,
        **{"value_and_grad": {"sigma": 0.1}, "rsam": {"rho": 0.1, "sigma": 0.1}}.get(name, {"rho": 0.1}),
    )
    assert list(inspect.signature(inner).parameters) == ["key", *inspect.signature(quartic).parameters]
    assert inner.__name__ == "quartic"


@pytest.mark.parametrize("method", [sharpness.sam, sharpness.asam, sharpness.usam])
def test_leaves_of_float32_and_float64_share_a_norm(key, method, x64):
    params = {"w": jnp.array([3.0, 0.0], jnp.float32), "n": jnp.array([4.0])}
    fun = lambda p: jnp.sum(p["w"].astype(jnp.float64) ** 2) / 2 + jnp.sum(p["n"] ** 2) / 2  # noqa: E731
    _, grads = method(fun, rho=0.5)(key, params)
    assert (grads["w"].dtype, grads["n"].dtype) == (jnp.float32, jnp.float64)
    if method is sharpness.sam:  # W + .5 W / ||W||
        np.testing.assert_allclose(grads["w"], [3.3, 0], rtol=1e-6)
        np.testing.assert_allclose(grads["n"], [4.4], rtol=1e-12)


W = {"w": jnp.ones((2, 3)), "n": jnp.ones(2)}


def sam(fun=quartic, **options):
    return sharpness.sam(fun, **{"rho": RHO, **options})


def bsam(key, **options):
    return sharpness.bsam(0.1, key=key, **{"num_examples": 10, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: sam(fun=3), TypeError, r"fun: expected a function, got 3 \(int\)"),
        (lambda _: sharpness.usam(quartic, rho=-1), ValueError, "rho: expected a number >= 0, got -1"),
        (lambda _: sharpness.asam(quartic, rho=RHO, eta=jnp.ones(2)), ValueError, r"eta: expected a scalar, got shape \(2,\)"),
        (lambda k: sam(axis_name="data")(k, W), ValueError, "axis_name: there is no mapped axis 'data' here"),
        (lambda k: bsam(k, b1="high"), TypeError, "b1: expected a real number, got 'high'"),
        (lambda k: sharpness.bsam("high", num_examples=9, key=k), TypeError, "learning_rate: expected a real number"),
        (lambda _: sam(rho=jnp.nan), ValueError, "rho: expected a number >= 0, got nan"),
        (lambda _: sam(rho="large"), TypeError, "rho: expected a real number, got 'large'"),
        (lambda _: sam(rho=jnp.ones(2)), ValueError, r"rho: expected a scalar, got shape \(2,\)"),
        (lambda _: sharpness.asam(quartic, rho=1, eta=-1), ValueError, "eta: expected a number >= 0, got -1"),
        (lambda _: sam(global_ascent=1, axis_name="data"), TypeError, "global_ascent: expected True or False, got 1"),
        (lambda _: sam(global_ascent=True), ValueError, "global_ascent: True needs axis_name"),
        (lambda _: sam(param_specs="data"), TypeError, "param_specs: expected partition specs, got 'data'"),
        (lambda _: sam(param_specs=jax.P("data"), axis_name="data"), ValueError, "param_specs: .* splits params over axis_name"),
        (lambda k: sam(mask={"w": True})(k, W), ValueError, "mask: not a prefix"),
        (lambda k: sam(mask={"w": True, "n": 1})(k, W), TypeError, r"mask: expected True or False for leaf \['n'\], got 1"),
        (lambda _: sam()(W), TypeError, "key: expected a PRNG key.* got dict"),
        (lambda _: sam()(0, W), TypeError, r"key: expected a PRNG key.* got 0 \(int\)"),
        (lambda _: sam()(), TypeError, "missing 1 required positional argument: 'key'"),
        (lambda k: sam(argnums=1)(k, W), TypeError, "argnums: 1 is out of range, got 1 arguments after the key"),
        (lambda k: sam()(k, {"w": jnp.ones(2, int)}), TypeError, r"argnums=0: leaf \['w'\] is int32\[2\]"),
        (lambda k: sam(lambda w: w)(k, jnp.ones(2)), TypeError, r"fun: expected a real scalar as the loss, got float32\[2\]"),
        (lambda k: sam(lambda w: (w.sum(), 1))(k, jnp.ones(2)), TypeError, "fun: .* got tuple.* set has_aux=True"),
        (lambda k: sam(lambda w: w.sum(), has_aux=True)(k, jnp.ones(2)), TypeError, r"fun: .* a pair \(loss, aux\), got float32"),
        (lambda k: sharpness.rsam(quartic, rho=1, sigma=-1)(k, W), ValueError, r"sigma: .* >= 0 for leaf \['n'\], got -1"),
        (lambda _: sharpness.rsam(quartic, rho=1, sigma=1, gradient_weight=-1), ValueError, "gradient_weight: expected a number >= 0"),
        (lambda _: sharpness.rsam(quartic, rho=1, sigma=1, sampler=3), TypeError, "sampler: expected a function .* got 3"),
        (lambda _: bsam(0), TypeError, r"key: expected a PRNG key.* got 0 \(int\)"),
        (lambda k: bsam(k, num_examples=0), ValueError, "num_examples: expected an int >= 1, got 0"),
        (lambda k: bsam(k, rho=-1), ValueError, "rho: expected a number >= 0, got -1"),
        (lambda k: bsam(k, b2=1.0), ValueError, r"b2: expected a number in \[0, 1\), got 1.0"),
        (lambda k: bsam(k, initial_precision=0), ValueError, "initial_precision: expected a number > 0, got 0"),
        (lambda k: bsam(k).init({"w": jnp.ones(2, int)}), TypeError, r"params: leaf \['w'\] is int32\[2\]"),
        (lambda k: bsam(k).init(jnp.ones(2, jnp.complex64)), TypeError, r"params: leaf \(the whole\) is complex64\[2\].*the real and the imaginary part as two leaves"),
        (lambda k: bsam(k).update(W, bsam(k).init(W)), ValueError, "params: bsam perturbs them, but got None"),
        (lambda k: bsam(k).update(W, bsam(k).init(W), W), TypeError, "grad_fn: expected a function"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_leaf(key, call, error, message):
    with pytest.raises(error, match=message):
        call(key)
