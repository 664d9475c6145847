"""The trace of the Hessian and its gradient against dense Hessians."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from nso_jax import noise, penalties
from tests.networks import (
    CUSTOM,
    NUM_KEYS,
    assert_close,
    assert_mean,
    backward_only,
    flat,
    mlp,
    mlp_loss,
    normal_tree,
    of_one_key,
    with_tanh,
)


@functools.cache
def dense_diagonal():
    """Of the Hessian for `mlp`, with its derivatives in rows."""
    params, x, y = mlp()
    w, unravel = ravel_pytree(params)
    diagonal = lambda w: jnp.diagonal(jax.hessian(lambda w: mlp_loss(unravel(w), x, y))(w))  # noqa: E731
    return np.asarray(jax.jit(diagonal)(w)), np.asarray(jax.jit(jax.jacfwd(diagonal))(w))


MASK = {"b1": False, "scale": True, "w1": True, "w2": False}
MASKED = slice(3, 10)  # where the two leaves stand among the 16 weights


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, slice(None)),
        ({"prob": 0.3}, slice(None)),
        ({"prob": 1 / 3, "drop": "leaf"}, slice(None)),
        ({"mask": MASK, "prob": 0.5}, MASKED),
        ({"mask": lambda _: MASK, "prob": 0.5, "drop": "leaf", "num_samples": 2}, MASKED),
    ],
)
def test_trace_and_its_gradient_are_unbiased(key, x64, options, chosen):
    params, x, y = mlp()

    @jax.jit
    @jax.vmap
    def estimate(key):
        value, grads = jax.value_and_grad(
            lambda params: penalties.hessian_trace(key, mlp_loss, params, x, y, **options)
        )(params)
        return value, ravel_pytree(grads)[0]

    values, grads = estimate(jax.random.split(key, NUM_KEYS))
    diagonal, derivatives = dense_diagonal()
    assert_mean(values, diagonal[chosen].sum())
    assert_mean(grads, derivatives[chosen].sum(axis=0))
    assert values.dtype == jnp.float64


@pytest.mark.parametrize("tanh", CUSTOM)
@pytest.mark.parametrize("options", [{}, {"prob": 0.5, "drop": "leaf"}, {"num_samples": 2}])
def test_trace_goes_through_a_custom_vjp(key, x64, tanh, options):
    params, x, y = mlp()

    def value_and_grad(tanh):
        def penalty(params):
            loss = lambda params: with_tanh(tanh)(x, params, y).mean()  # noqa: E731
            return penalties.hessian_trace(key, loss, params, **options)

        return jax.jit(jax.value_and_grad(penalty))(params)

    value, grads = value_and_grad(CUSTOM[tanh])
    expected, expected_grads = value_and_grad(jnp.tanh)
    assert_close(value, expected, 1e-10)
    assert_close(grads, expected_grads, 1e-10)


def test_trace_through_a_custom_vjp_of_complex_weights_of_two_precisions(key, x64):
    square = backward_only(lambda x: x**2)
    params = {"c": jnp.array([1.0 + 2j, 0.5 - 1j], jnp.complex64), "s": jnp.array([0.5, 2.0])}

    def loss(square):
        def of_params(params):
            parts = [jnp.real(params["c"]), jnp.imag(params["c"]), params["s"]]
            return sum(square(square(part)).sum().astype(jnp.float64) for part in parts)

        return of_params

    def value_and_grad(square):
        return jax.value_and_grad(lambda p: penalties.hessian_trace(key, loss(square), p))(params)

    value, grads = value_and_grad(square)
    expected = 12 * (1 + 4 + 0.25 + 1 + 0.25 + 4)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), grads, value_and_grad(jnp.square)[1]
    )


def test_trace_through_a_custom_vjp_eagerly_and_under_vmap(key):
    cube = backward_only(lambda x: x**3)
    estimate = lambda w: penalties.hessian_trace(key, lambda w: jnp.sum(cube(w)), w)  # noqa: E731
    np.testing.assert_allclose(estimate(jnp.arange(3.0)), 18, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(estimate)(jnp.eye(3)), [6, 6, 6], rtol=1e-6)


def test_error_where_a_backward_rule_has_no_derivative(key):
    def kernel(x, g):
        return jax.pure_callback(
            lambda x, g: np.asarray(2 * x * g), jax.ShapeDtypeStruct(x.shape, x.dtype), x, g
        )

    square = jax.custom_vjp(lambda x: x**2)
    square.defvjp(lambda x: (square(x), x), lambda x, g: (kernel(x, g),))
    with pytest.raises(Exception, match=r"(?s)JVP.*give the same loss without it") as caught:
        penalties.hessian_trace(key, lambda w: jnp.sum(square(w)), jnp.ones(3))
    assert any("jax.custom_vjp whose backward rule" in note for note in caught.value.__notes__)


def test_a_loss_without_a_custom_vjp_is_traced_once(key):
    calls = []

    def loss(w):
        calls.append(1)
        return jnp.sum(jnp.tanh(w) ** 2)

    jax.jit(jax.grad(lambda w: penalties.hessian_trace(key, loss, w)))(jnp.ones(3))
    assert len(calls) == 1


def test_type_errors_of_a_loss_are_not_taken_for_those_of_forward_mode(key):
    def broken(w):
        raise TypeError("can't apply forward-mode autodiff (jvp) to a custom_vjp function.")

    with pytest.raises(TypeError, match="can't apply"):
        penalties.hessian_trace(key, broken, jnp.ones(3))


def test_trace_of_a_diagonal_hessian_is_exact(key):
    params = {"w": jnp.arange(1.0, 4), "b": jnp.float32(2)}

    def quartic(params, shift):
        return jnp.sum(params["w"] ** 4) + shift * params["b"] ** 2

    def penalty(params):
        return penalties.hessian_trace(key, quartic, params, 5.0)

    value, grads = jax.value_and_grad(penalty)(params)
    np.testing.assert_allclose(value, 12 * (1 + 4 + 9) + 10, rtol=1e-6)
    np.testing.assert_allclose(grads["w"], 24 * params["w"], rtol=1e-6)
    assert grads["b"] == 0


def kept_weights(key, **options):
    """For each of many keys, which of 16 weights in three leaves are not dropped."""
    sizes = {"a": 10, "b": 4, "c": 2}
    params = {name: jnp.zeros(size) for name, size in sizes.items()}
    powers = 2.0 ** jnp.arange(16.0)

    def quadratic(params):
        return jnp.sum(powers * ravel_pytree(params)[0] ** 2) / 2

    keys = jax.random.split(key, NUM_KEYS)
    traces = jax.jit(jax.vmap(lambda key: penalties.hessian_trace(key, quadratic, params, **options)))(keys)
    codes = np.rint(np.asarray(traces, np.float64) * options["prob"]).astype(int)
    return codes[:, None] >> np.arange(16) & 1


def test_weights_are_dropped_independently(key):
    kept = kept_weights(key, prob=0.25)
    assert_mean(kept, np.full(16, 0.25))
    pairs = np.array(list(itertools.combinations(range(16), 2)))
    assert_mean(kept[:, pairs].prod(axis=2), np.full(len(pairs), 0.25**2))


@pytest.mark.parametrize(("groups", "cuts"), [(2, (10,)), (3, (10, 14))])
def test_leaves_are_dropped_in_balanced_groups(key, groups, cuts):
    kept = kept_weights(key, prob=1 / groups, drop="leaf")
    expected = [np.isin(np.arange(16), part) for part in np.split(np.arange(16), cuts)]
    of_group = np.array([np.all(kept == group, axis=1) for group in expected])
    assert np.all(of_group.sum(axis=0) == 1)
    assert_mean(of_group.T, np.full(groups, 1 / groups))


def test_the_probe_depends_on_the_leafs_path_and_the_key(key):
    """v^T H v for a Hessian that is not diagonal, against the documented draw."""
    params = normal_tree(3, {"w": (5,), "b": (2,)}, jnp.float32)
    product = lambda params: jnp.sum(params["w"]) * jnp.sum(params["b"])  # noqa: E731
    v = noise.perturbation(jax.random.split(key, 1)[0], params, 1.0, sampler=noise.rademacher)
    expected = 2 * v["w"].sum() * v["b"].sum()
    np.testing.assert_allclose(penalties.hessian_trace(key, product, params), expected, rtol=1e-6)


def deep_loss(layers, x):
    for layer in layers:
        x = jnp.tanh(x @ layer)
    return jnp.mean(x**2)


def inner_jaxprs(equation):
    for param in equation.params.values():
        for x in param if isinstance(param, tuple | list) else [param]:
            inner = getattr(x, "jaxpr", x)
            if hasattr(inner, "eqns"):
                yield inner


def count_products(jaxpr):
    here = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return here + sum(count_products(inner) for equation in jaxpr.eqns for inner in inner_jaxprs(equation))


def products_by_branch(jaxpr, groups):
    """Matrix products in each branch, over the switches of the forward and of the backward pass."""
    counts = np.zeros(groups, int)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            counts += [count_products(branch.jaxpr) for branch in equation.params["branches"]]
        else:
            for inner in inner_jaxprs(equation):
                counts += products_by_branch(inner, groups)
    return counts


def test_dropping_leaves_saves_matrix_products(key):
    layers, x = [jnp.eye(4)] * 6, jnp.ones((3, 4))

    def gradient(**options):
        penalty = lambda layers: penalties.hessian_trace(key, deep_loss, layers, x, **options)  # noqa: E731
        return jax.make_jaxpr(jax.grad(penalty))(layers).jaxpr

    whole = count_products(gradient())
    by_branch = products_by_branch(gradient(prob=1 / 3, drop="leaf"), 3)
    assert np.all(by_branch < 0.9 * whole)
    assert by_branch.mean() < 0.75 * whole


def cubic(params, x):
    return jnp.sum(params["a"]) ** 3 * jnp.sum(params["b"]) ** 2 * x


@pytest.mark.parametrize("options", [{}, {"prob": 0.5}, {"prob": 0.5, "drop": "leaf"}])
def test_samples_are_averaged(key, options, platform, monkeypatch):
    params = {"a": jnp.arange(1.0, 4), "b": jnp.arange(1.0, 6)}

    def penalty(key, **more):
        return penalties.hessian_trace(key, cubic, params, 2.0, **options, **more)

    mean = jax.jit(lambda key: penalty(key, num_samples=3))(key)
    of_one_key(monkeypatch)
    singles = jax.jit(jax.vmap(penalty))(jax.random.split(key, 3))
    assert len(set(singles.tolist())) > 1
    np.testing.assert_allclose(mean, singles.mean(), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"prob": 0.5}, {"prob": 0.5, "drop": "leaf"}, {"num_samples": 2}])
def test_vmap_over_keys_and_jit_equal_eager(key, options):
    params = {"a": jnp.arange(1.0, 3), "b": jnp.arange(1.0, 3)}

    def penalty(key):
        return penalties.hessian_trace(key, cubic, params, 2.0, **options)

    keys = jax.random.split(key, 3)
    eager = [penalty(key) for key in keys]
    np.testing.assert_allclose(jax.jit(jax.vmap(penalty))(keys), eager, rtol=1e-6)
    np.testing.assert_allclose([jax.jit(penalty)(key) for key in keys], eager, rtol=1e-6)


def test_trace_of_complex_weights_is_that_of_their_parts(key, x64):
    rng = np.random.default_rng(0)
    parts = {
        "re": jnp.asarray(rng.normal(size=3)),
        "im": jnp.asarray(rng.normal(size=3)),
        "s": jnp.asarray(0.5),
    }

    def loss(params):
        c, s = params["c"], params["s"]
        return (
            jnp.sum(jnp.abs(c) ** 4)
            + s**2 * jnp.real(c[0] * c[1] * c[1])
            + jnp.imag(c[2] ** 2 * jnp.exp(c[0]))
        )

    def as_complex(parts):
        return {"c": jax.lax.complex(parts["re"], parts["im"]), "s": parts["s"]}

    w, unravel = ravel_pytree(parts)
    trace = jnp.trace(jax.jit(jax.hessian(lambda w: loss(as_complex(unravel(w)))))(w))
    for prob in (1.0, 0.5):
        estimate = lambda key, prob=prob: penalties.hessian_trace(key, loss, as_complex(parts), prob=prob)  # noqa: E731
        assert_mean(jax.jit(jax.vmap(estimate))(jax.random.split(key, NUM_KEYS)), trace)


@pytest.mark.parametrize(
    ("dtype", "options"), [(jnp.bfloat16, {}), (jnp.float16, {"prob": 0.5, "drop": "leaf"})]
)
def test_trace_in_half_precision_is_near_that_in_single(key, dtype, options):
    @jax.jit
    def value_and_grad(params, x, y):
        return jax.value_and_grad(
            lambda params: penalties.hessian_trace(key, mlp_loss, params, x, y, **options)
        )(params)

    problem = mlp(dtype)
    value, grads = value_and_grad(*problem)
    assert value.dtype == jnp.float32
    assert all(g.dtype == dtype for g in jax.tree.leaves(grads))
    single = value_and_grad(*jax.tree.map(lambda x: x.astype(jnp.float32), problem))
    assert_close((value, grads), single, rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"prob": 0.5}, {"prob": 0.5, "drop": "leaf"}])
def test_zero_hessian(key, options):
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    linear = lambda params: params["a"].sum() - params["b"].sum()  # noqa: E731
    value, grads = jax.value_and_grad(lambda params: penalties.hessian_trace(key, linear, params, **options))(
        params
    )
    assert value == 0
    assert not np.any(flat(grads))


def test_nothing_chosen_has_no_trace(key):
    assert penalties.hessian_trace(key, lambda w: w**2, jnp.float32(1), mask=False) == 0
    assert penalties.hessian_trace(key, lambda w: w**2, 1.0) == 2
