"""Each penalty and its gradient against dense Hessians and Jacobians of small networks."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from nso_jax import _backend, noise, penalties

SIGMAS = 5  # standard errors that a mean may be off
NUM_KEYS = 4000


def assert_mean(samples, expected):
    """Along the first axis, entry by entry, within some of the sample's own standard errors."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    expected = np.asarray(expected, np.float64)
    assert np.all(abs(samples.mean(axis=0) - expected) <= SIGMAS * error + 1e-10 * (1 + abs(expected)))


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def normal_tree(seed, shapes, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


# --- problems: a network, its weights, and a batch ----------------------------------------------------


def mlp_logits(x, params):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"].reshape((1,) * (x.ndim - 1) + (-1,)))
    return params["scale"] * (hidden @ params["w2"])


def conv_logits(x, params):
    lines = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(lines).mean(axis=1).reshape(len(x), -1) @ params["head"]


def mlp(dtype=jnp.float64):
    """16 weights in four leaves, and six examples."""
    params = normal_tree(0, {"w1": (2, 3), "b1": (3,), "w2": (3, 2), "scale": ()}, dtype)
    return params, *examples((6, 2), 2, dtype)


def conv(dtype=jnp.float64):
    params = normal_tree(1, {"kernel": (3, 3, 1, 2), "head": (8, 3)}, dtype)
    return params, *examples((3, 4, 4, 1), 3, dtype)


def examples(shape, classes, dtype):
    rng = np.random.default_rng(2)
    y = np.eye(classes)[rng.integers(classes, size=len(np.zeros(shape)))]
    return jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(y, dtype)


PROBLEMS = {"mlp": (mlp_logits, mlp), "conv": (conv_logits, conv)}


def cross_entropy(logits, y):
    return -jnp.sum(jax.nn.log_softmax(logits) * y, axis=-1)


def losses_of(logits):
    return lambda x, params, y: cross_entropy(logits(x, params), y)


def mlp_losses(x, params, y):
    return cross_entropy(mlp_logits(x, params), y)


def mlp_loss(params, x, y):
    return mlp_losses(x, params, y).mean()


def input_hessians(losses, x, params, y):
    """One dense Hessian for each example, (n, d, d)."""

    def one(x_i, y_i):
        loss = lambda z: losses(z.reshape(1, *x.shape[1:]), params, y_i[None])[0]  # noqa: E731
        return jax.hessian(loss)(x_i.ravel())

    return jax.vmap(one)(x, y)


# --- the trace of the Hessian -------------------------------------------------------------------------


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


def backward_only(function, *, calls_itself=True):
    """`function` with a `jax.custom_vjp`, which has no forward mode; its forward pass may need it again."""
    custom = jax.custom_vjp(function)

    def forward(x):
        return (custom if calls_itself else function)(x), x

    custom.defvjp(forward, lambda x, g: (jax.vjp(function, x)[1](g)[0],))
    return custom


def with_tanh(tanh):
    """The losses of `mlp`, each of its own example, with some hyperbolic tangent."""

    def losses(x, params, y):
        hidden = tanh(x @ params["w1"] + params["b1"][None])
        return cross_entropy(params["scale"] * (hidden @ params["w2"]), y)

    return losses


CUSTOM = {
    "plain": backward_only(jnp.tanh, calls_itself=False),
    "calling itself": backward_only(jnp.tanh),
    "jitted": jax.jit(backward_only(jnp.tanh)),
    "checkpointed": jax.checkpoint(backward_only(jnp.tanh)),
}
OF_INPUTS = {
    "hessian": lambda key, losses, *args: penalties.input_hessian_norm(key, losses, *args, num_steps=2),
    "gradient": lambda _, losses, *args: penalties.input_gradient(losses, *args),
    "jacobian": lambda key, losses, *args: penalties.jacobian(
        key, lambda *args: losses(*args)[:, None], *args
    ),
}


@pytest.mark.parametrize("tanh", CUSTOM)
@pytest.mark.parametrize("name", OF_INPUTS)
def test_penalties_of_inputs_go_through_a_custom_vjp(key, x64, name, tanh):
    params, x, y = mlp()

    def value_and_grad(tanh):
        def penalty(params):
            values = OF_INPUTS[name](key, with_tanh(tanh), x, params, y)
            return values @ jnp.arange(1.0, 7), values

        return jax.jit(jax.value_and_grad(penalty, has_aux=True))(params)

    (_, values), grads = value_and_grad(CUSTOM[tanh])
    (_, expected), expected_grads = value_and_grad(jnp.tanh)
    assert_close(values, expected, 1e-10)
    assert_close(grads, expected_grads, 1e-10)


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


def of_one_key(monkeypatch):
    """From here on, a penalty is the estimate that its key itself gives."""
    monkeypatch.setattr(_backend, "mean_over", lambda estimate, key, *_, **__: estimate(key))


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


def assert_close(tree, other, rtol=1e-4):
    a, b = flat(tree), flat(other)
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * abs(b).max())


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


# --- the norm of the input Hessian --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "sign", "step_size"), [("mlp", -1, math.inf), ("conv", 1, math.inf), ("mlp", 1, 2.0)]
)
def test_search_converges_to_the_largest_magnitude(key, x64, elsewhere, problem, sign, step_size):
    logits, make = PROBLEMS[problem]
    losses = lambda *args: sign * losses_of(logits)(*args)  # noqa: E731
    params, x, y = make()
    eigenvalues = np.linalg.eigvalsh(jax.jit(lambda: input_hessians(losses, x, params, y))())
    largest = np.take_along_axis(eigenvalues, abs(eigenvalues).argmax(axis=1)[:, None], axis=1)[:, 0]
    assert np.any(sign * largest > 0)
    norm = jax.jit(
        lambda: penalties.input_hessian_norm(key, losses, x, params, y, num_steps=1000, step_size=step_size)
    )()
    np.testing.assert_allclose(norm, abs(largest), rtol=1e-6)


def published_search(key, hessians, shape, step_size, num_steps=1):
    """Gradient ascent on |H v|, in NumPy, and then the vectors v and u = H v / |H v|."""
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    times = lambda v: np.einsum("nij,nj->ni", hessians, v)  # noqa: E731
    start = noise.perturbation(key, jnp.zeros(shape), 1.0, sampler=noise.normal)
    v = unit(np.asarray(start).reshape(shape[0], -1))
    for _ in range(num_steps):
        g = times(times(v)) / np.linalg.norm(times(v), axis=1, keepdims=True)
        v = unit(g) if np.isinf(step_size) else unit(v + step_size * unit(g))
    return v, unit(times(v))


@pytest.mark.parametrize(
    ("problem", "num_steps", "step_size"),
    [("mlp", 1, math.inf), ("mlp", 1, 0.5), ("conv", 1, math.inf), ("mlp", 3, 2)],
)
def test_search_is_the_published_one_and_the_gradient_that_of_u_H_v(key, x64, problem, num_steps, step_size):
    logits, make = PROBLEMS[problem]
    losses = losses_of(logits)
    params, x, y = make()
    hessians = jax.jit(lambda params: input_hessians(losses, x, params, y))
    v, u = published_search(key, np.asarray(hessians(params)), x.shape, step_size, num_steps)
    weights = jnp.arange(1.0, 1 + len(x))

    def penalty(params):
        norms = penalties.input_hessian_norm(
            key, losses, x, params, y, num_steps=num_steps, step_size=jnp.asarray(step_size)
        )
        return weights @ norms, norms

    def reference(params):
        norms = jnp.einsum("ni,nij,nj->n", u, hessians(params), v)
        return weights @ norms, norms

    grads, norms = jax.jit(jax.grad(penalty, has_aux=True))(params)
    expected_grads, expected = jax.jit(jax.grad(reference, has_aux=True))(params)
    np.testing.assert_allclose(norms, expected, rtol=1e-10)
    assert_close(grads, expected_grads, rtol=1e-10)


def test_operator_norm_of_a_zero_hessian(key, x64):
    """The norm is zero for the first example only, and the gradient is finite for both."""
    x = jnp.ones((2, 3))
    losses = lambda x, w: jnp.sum(w * x**2, axis=1)  # noqa: E731

    def penalty(w):
        return penalties.input_hessian_norm(key, losses, x, w, num_steps=2)

    w = jnp.array([[0.0, 0.0, 0.0], [3.0, 3.0, -3.0]])
    np.testing.assert_allclose(penalty(w), [0, 6], atol=1e-12)
    grads = jax.grad(lambda w: penalty(w).sum())(w)
    assert np.all(np.isfinite(grads))
    assert not np.any(grads[0])
    np.testing.assert_allclose(abs(np.sum(np.sign(w[1]) * grads[1])), 2, rtol=1e-12)


# --- the gradient and the Jacobian of the inputs ------------------------------------------------------


def squared_gradients(losses, x, params, y):
    """By definition, to be differentiated backward over backward."""
    gradient = jax.grad(lambda x: losses(x, params, y).sum())(x)
    return jnp.sum(gradient**2, axis=tuple(range(1, x.ndim)))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_input_gradient_equals_reverse_over_reverse(x64, problem):
    logits, make = PROBLEMS[problem]
    losses = losses_of(logits)
    params, x, y = make()
    weights = jnp.arange(1.0, 1 + len(x))

    def of(function):
        weighted = lambda params: (weights @ function(params), function(params))  # noqa: E731
        return jax.jit(jax.grad(weighted, has_aux=True))(params)

    grads, values = of(lambda params: penalties.input_gradient(losses, x, params, y))
    expected_grads, expected = of(lambda params: squared_gradients(losses, x, params, y))
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert_close(grads, expected_grads, rtol=1e-12)


def numpy_penalized_gradient(w, x, y, c):
    """Of the mean of -log p_y + c |g|^2 for logits W^T x, where g = W (p - y)."""
    logits = x @ w
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    r = p - y
    g = r @ w.T
    back = p * (g @ w) - p * np.sum(p * (g @ w), axis=1, keepdims=True)  # (diag p - p p^T) W^T g
    return (x.T @ r + c * 2 * (g.T @ r + x.T @ back)) / len(x)


def test_20_steps_equal_numpy(x64):
    rng = np.random.default_rng(5)
    w, x, y = rng.normal(size=(5, 3)), rng.normal(size=(20, 8, 5)), np.eye(3)[rng.integers(3, size=(20, 8))]
    losses = lambda x, w, y: cross_entropy(x @ w, y)  # noqa: E731

    def penalized(w, x, y):
        return jnp.mean(losses(x, w, y) + 0.3 * penalties.input_gradient(losses, x, w, y))

    optimizer = optax.sgd(0.5)

    @jax.jit
    def step(w, state, x, y):
        updates, state = optimizer.update(jax.grad(penalized)(w, x, y), state)
        return optax.apply_updates(w, updates), state

    trained = jnp.asarray(w)
    state = optimizer.init(trained)
    for x_t, y_t in zip(x, y, strict=True):
        trained, state = step(trained, state, x_t, y_t)
        w = w - 0.5 * numpy_penalized_gradient(w, x_t, y_t, 0.3)
    np.testing.assert_allclose(trained, w, rtol=1e-10)


def squared_jacobians(logits, x, params):
    one = jax.jacrev(lambda x_i: logits(x_i[None], params)[0])
    jacobians = jax.vmap(one)(x)
    return jnp.sum(jacobians**2, axis=tuple(range(1, jacobians.ndim)))


@pytest.mark.parametrize(("problem", "num_projections"), [("mlp", 3), ("conv", 1)])
def test_jacobian_and_its_gradient_are_unbiased(key, x64, elsewhere, problem, num_projections):
    logits, make = PROBLEMS[problem]
    params, x, _ = make()

    def of(function):
        total = lambda params: (function(params).sum(), function(params))  # noqa: E731
        grads, values = jax.grad(total, has_aux=True)(params)
        return ravel_pytree(grads)[0], values

    def estimate(key):
        return of(lambda params: penalties.jacobian(key, logits, x, params, num_projections=num_projections))

    grads, values = jax.jit(jax.vmap(estimate))(jax.random.split(key, NUM_KEYS))
    expected_grads, expected = jax.jit(lambda: of(lambda params: squared_jacobians(logits, x, params)))()
    assert_mean(values, expected)
    assert_mean(grads, expected_grads)


def test_projections_are_averaged(key, platform, monkeypatch):
    params, x, _ = mlp(jnp.float32)

    def penalty(key, **options):
        return penalties.jacobian(key, mlp_logits, x, params, **options)

    mean = jax.jit(lambda key: penalty(key, num_projections=3))(key)
    of_one_key(monkeypatch)
    singles = jax.jit(jax.vmap(penalty))(jax.random.split(key, 3))
    assert not np.allclose(singles[0], singles[1])
    np.testing.assert_allclose(mean, singles.mean(axis=0), rtol=1e-5)


def test_one_output_needs_no_luck(key, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    expected = 4 * np.sum(np.asarray(x) ** 2, axis=1)
    square = lambda x: jnp.sum(x**2, axis=1)  # noqa: E731
    np.testing.assert_allclose(penalties.jacobian(key, square, x), expected)
    np.testing.assert_allclose(penalties.jacobian(key, lambda x: square(x)[:, None], x), expected)


def test_further_axes_of_the_outputs_count_as_outputs(key, x64):
    params, x, _ = mlp()
    grid = lambda x: mlp_logits(x, params)[:, None, :] * jnp.array([1.0, 2.0]).reshape(1, 2, 1)  # noqa: E731
    keys = jax.random.split(key, NUM_KEYS)
    samples = jax.jit(jax.vmap(lambda key: penalties.jacobian(key, grid, x)))(keys)
    assert_mean(samples, 5 * squared_jacobians(mlp_logits, x, params))


def test_zero_gradients():
    x, w = jnp.ones((2, 3)), jnp.array([[0.0], [2.0]])
    losses = lambda w: penalties.input_gradient(lambda x: jnp.sum(w * x, axis=1), x)  # noqa: E731
    np.testing.assert_allclose(losses(w), [0, 12], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda w: losses(w).sum())(w), [[0], [12]], rtol=1e-6)


# --- what all three have in common --------------------------------------------------------------------

BY_INPUT = {
    "input_hessian_norm": lambda key, losses, logits, x, *args: penalties.input_hessian_norm(
        key, losses, x, *args
    ),
    "input_gradient": lambda key, losses, logits, x, *args: penalties.input_gradient(losses, x, *args),
    "jacobian": lambda key, losses, logits, x, *args: penalties.jacobian(key, logits, x, *args),
}


@pytest.mark.parametrize("name", BY_INPUT)
def test_a_pytree_of_inputs_counts_as_one(name, key, x64):
    """An input cut in two leaves; where the search starts elsewhere for it, H has one eigenvalue +-s."""
    params, x, y = mlp()
    joined = lambda parts: jnp.concatenate([parts["a"].reshape(-1, 1), parts["b"][0]], axis=1)  # noqa: E731
    quadratic = lambda x, params, y: jnp.sum(x**2 * jnp.array([[1.0, -1.0]]), axis=1) * y[:, 0]  # noqa: E731
    losses = quadratic if name == "input_hessian_norm" else mlp_losses
    only = lambda x, params, y: jnp.tanh(x @ params["w1"])[:, :1]  # noqa: E731

    def split(fun):
        return lambda parts, *args: fun(joined(parts), *args)

    whole = BY_INPUT[name](key, losses, only, x, params, y)
    parts = {"a": x[:, 0], "b": [x[:, 1:]]}
    np.testing.assert_allclose(
        BY_INPUT[name](key, split(losses), split(only), parts, params, y), whole, rtol=1e-10
    )
    assert np.any(whole > 0)


@pytest.mark.parametrize("name", ["input_hessian_norm", "input_gradient"])
def test_losses_of_single_examples_under_vmap(name, key, x64):
    params, x, y = mlp()
    x = jnp.ones_like(x) * jnp.arange(1.0, 7)[:, None] / 3
    losses = lambda x, params, y: jnp.sum(x**2, axis=-1) ** 2 * y[..., 0]  # noqa: E731
    batched = jax.vmap(lambda x, y: BY_INPUT[name](key, losses, None, x, params, y))(x, y)
    assert batched.shape == (6,)
    if name == "input_gradient":
        expected = penalties.input_gradient(losses, x, params, y)
    else:
        draw = noise.perturbation(key, x[0], 1.0, sampler=noise.normal)
        expected = [
            np.linalg.norm(h @ h @ h @ draw) / max(np.linalg.norm(h @ h @ draw), 1e-300)
            for h in np.asarray(jax.vmap(jax.hessian(losses), (0, None, 0))(x, params, y))
        ]
    np.testing.assert_allclose(batched, expected, rtol=1e-10)


def test_two_batch_axes(key):
    x = jnp.arange(12.0).reshape(2, 3, 2)
    losses = lambda x: jnp.sum(x**2, axis=-1)  # noqa: E731
    np.testing.assert_allclose(penalties.input_gradient(losses, x), 4 * losses(x), rtol=1e-6)
    np.testing.assert_allclose(penalties.input_hessian_norm(key, losses, x), np.full((2, 3), 2), rtol=1e-6)


@pytest.mark.parametrize("name", BY_INPUT)
def test_jit_equals_eager_and_vmap_over_keys_a_loop(name, key):
    x = jnp.arange(1.0, 7).reshape(3, 2)

    def penalty(key):
        return BY_INPUT[name](key, lambda x: jnp.sum(x**3, axis=1), lambda x: x**2, x)

    keys = jax.random.split(key, 3)
    eager = [penalty(key) for key in keys]
    np.testing.assert_allclose(jax.jit(jax.vmap(penalty))(keys), eager, rtol=1e-5)
    np.testing.assert_allclose([jax.jit(penalty)(key) for key in keys], eager, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("input_hessian_norm", jnp.float16), ("input_gradient", jnp.bfloat16), ("jacobian", jnp.bfloat16)],
)
def test_half_precision_is_near_single(name, key, dtype):
    logits = lambda x, params, y: mlp_logits(x, params)  # noqa: E731

    @jax.jit
    def value_and_grad(params, x, y):
        def penalty(params):
            values = BY_INPUT[name](key, mlp_losses, logits, x, params, y)
            return values.mean(), values

        return jax.grad(penalty, has_aux=True)(params)

    problem = mlp(dtype)
    grads, values = value_and_grad(*problem)
    assert values.dtype == jnp.float32
    single = value_and_grad(*jax.tree.map(lambda x: x.astype(jnp.float32), problem))
    assert_close((grads, values), single, rtol=0.1)


@pytest.mark.parametrize("slope", [300.0, 1e-4])
def test_squares_neither_overflow_nor_vanish_in_half_precision(key, slope):
    """The largest float16 is 65504, the smallest 6e-8."""
    x, w = jnp.ones((2, 4), jnp.float16), jnp.full((1, 4), slope, jnp.float16)
    expected = np.full(2, 4 * float(w[0, 0]) ** 2)
    linear = lambda x, w: jnp.sum(w * x, axis=1)  # noqa: E731
    penalty = lambda w: penalties.input_gradient(linear, x, w)  # noqa: E731
    np.testing.assert_allclose(penalty(w), expected, rtol=1e-2)
    np.testing.assert_allclose(penalties.jacobian(key, linear, x, w), expected, rtol=1e-2)
    np.testing.assert_allclose(jax.grad(lambda w: penalty(w).mean())(w), 2 * w, rtol=1e-2)


# --- confidence ---------------------------------------------------------------------------------------


def test_confidence_equals_numpy(x64):
    logits = np.random.default_rng(0).normal(size=(3, 4, 5)) * 3
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    confidence = jax.jit(penalties.confidence)(jnp.asarray(logits))
    np.testing.assert_allclose(confidence, np.sum(p * np.log(p), axis=-1), rtol=1e-12)
    grads = jax.grad(lambda logits: penalties.confidence(logits).sum())(jnp.asarray(logits))
    expected = p * (np.log(p) - np.sum(p * np.log(p), axis=-1, keepdims=True))
    np.testing.assert_allclose(grads, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_confidence_of_extreme_logits(dtype):
    inf = jnp.inf
    logits = jnp.array([[0, 0, -inf], [5, -inf, -inf], [6e4, -6e4, 0], [7, 7, 7]], dtype)
    value, grads = jax.vmap(jax.value_and_grad(penalties.confidence))(logits)
    np.testing.assert_allclose(value, [-math.log(2), 0, 0, -math.log(3)], atol=1e-6)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(grads.astype(jnp.float32), 0, atol=1e-6)


def test_a_class_that_is_left_out_does_not_change_the_gradient():
    logits = jnp.array([1.0, 2.0, -1.0])
    value_and_grad = jax.value_and_grad(penalties.confidence)
    value, grads = value_and_grad(jnp.append(logits, -jnp.inf))
    assert_close((value, grads[:3], grads[3]), (*value_and_grad(logits), jnp.zeros(())), rtol=1e-6)


# --- errors -------------------------------------------------------------------------------------------

KEY = jax.random.key(0)
X = jnp.ones((3, 2))


def squares(x):
    return jnp.sum(x**2, axis=1)


def trace(key=KEY, fun=lambda w: jnp.sum(w**2), params=X, **options):
    return penalties.hessian_trace(key, fun, params, **options)


def hessian_norm(key=KEY, fun=squares, inputs=X, **options):
    return penalties.input_hessian_norm(key, fun, inputs, **options)


def squared_jacobian(key=KEY, fun=lambda x: x, inputs=X, **options):
    return penalties.jacobian(key, fun, inputs, **options)


def gradient(fun=squares, inputs=X):
    return penalties.input_gradient(fun, inputs)


@pytest.mark.parametrize("penalty", [trace, hessian_norm, squared_jacobian])
@pytest.mark.parametrize(
    ("key", "match"),
    [
        (0, r"key: expected a PRNG key such as jax.random.key\(0\), got 0 \(int\)"),
        (X, r"key: expected a PRNG key .* got float32\[3,2\]"),
        (jax.random.split(KEY), r"key: expected one PRNG key, got keys of shape \(2,\)"),
    ],
)
def test_errors_about_keys(penalty, key, match):
    with pytest.raises(TypeError, match=match):
        penalty(key)


@pytest.mark.parametrize("penalty", [trace, hessian_norm, squared_jacobian, gradient])
def test_errors_about_functions(penalty):
    with pytest.raises(TypeError, match=r"fun: expected a function, got float32\[3,2\]"):
        penalty(fun=X)


@pytest.mark.parametrize("penalty", [hessian_norm, squared_jacobian, gradient])
@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"a": X, "b": jnp.arange(3)}, r"inputs: leaf \['b'\] is int32\[3\]"),
        ({"a": X, "b": X + 1j}, r"inputs: leaf \['b'\] is complex64\[3,2\], expected real numbers"),
        (jnp.arange(3), r"inputs: leaf \(the whole\) is int32\[3\]"),
        (None, r"inputs: expected an array or a pytree of them, got NoneType without any"),
    ],
)
def test_errors_about_inputs(penalty, inputs, match):
    with pytest.raises(TypeError, match=match):
        penalty(inputs=inputs)


@pytest.mark.parametrize("penalty", [hessian_norm, gradient])
@pytest.mark.parametrize(
    ("fun", "match"),
    [
        (lambda x: (squares(x), x), r"fun: expected real losses of shape \(n,\), or \(\) .* got tuple"),
        (lambda x: squares(x) > 0, r"fun: expected real losses .* got bool\[3\]"),
        (
            lambda x: jax.lax.complex(squares(x), squares(x)),
            r"fun: expected real losses .* got complex64\[3\]",
        ),
        (
            lambda x: x @ x.T,
            r"fun: expected losses .* got float32\[3,3\] where leaf \(the whole\) is float32\[3,2\]",
        ),
        (lambda x: squares(x)[:2], r"fun: expected losses .* first in each leaf of inputs, got float32\[2\]"),
    ],
)
def test_errors_about_losses(penalty, fun, match):
    with pytest.raises(TypeError, match=match):
        penalty(fun=fun)


@pytest.mark.parametrize(
    ("fun", "match"),
    [
        (jnp.sum, r"fun: expected real outputs of shape \(n, C\), got float32\[\]"),
        (lambda x: x > 0, r"fun: expected real outputs of shape \(n, C\), got bool\[3,2\]"),
        (lambda x: x.T, r"fun: expected outputs of shape \(n, C\), .* got float32\[2,3\] where leaf"),
    ],
)
def test_errors_about_outputs(fun, match):
    with pytest.raises(TypeError, match=match):
        squared_jacobian(fun=fun)


@pytest.mark.parametrize(
    ("penalty", "error", "match"),
    [
        (lambda: trace(params={"n": 3}), TypeError, r"params: leaf \['n'\] is 3 \(int\)"),
        (
            lambda: trace(fun=lambda w: w),
            TypeError,
            r"fun: expected a real scalar as the loss, got .*\[3,2\]",
        ),
        (lambda: trace(prob=0), ValueError, r"prob: expected a number in \(0, 1\], got 0"),
        (lambda: trace(prob=1.5), ValueError, r"prob: expected a number in \(0, 1\], got 1.5"),
        (lambda: trace(prob=math.nan), ValueError, "prob: expected a number .* got nan"),
        (lambda: trace(prob="half"), TypeError, "prob: expected a static real number .* got 'half'"),
        (lambda: trace(prob=True), TypeError, "prob: expected a static real number .* got True"),
        (lambda: jax.jit(lambda p: trace(prob=p))(0.5), TypeError, "prob: expected a static real number"),
        (lambda: trace(drop="layer"), ValueError, "drop: expected one of 'weight', 'leaf', got 'layer'"),
        (lambda: trace(prob=0.5, drop="leaf"), ValueError, r"at most the 1 leaves .* got 0.5; .* is 1/1"),
        (
            lambda: trace(params=[X] * 4, prob=0.3, drop="leaf"),
            ValueError,
            "prob: .* got 0.3; the nearest is 1/3",
        ),
        (lambda: trace(num_samples=0), ValueError, "num_samples: expected an int >= 1, got 0"),
        (lambda: trace(num_samples=1.0), TypeError, r"num_samples: expected a static int >= 1, got 1.0"),
        (lambda: trace(mask={"w": True}), ValueError, "mask: not a prefix of the pytree"),
        (lambda: trace(mask=1), TypeError, "mask: expected True or False"),
        (lambda: hessian_norm(num_steps=0), ValueError, "num_steps: expected an int >= 1, got 0"),
        (lambda: hessian_norm(step_size=0), ValueError, "step_size: expected a number > 0, got 0"),
        (lambda: hessian_norm(step_size=-1.0), ValueError, "step_size: expected a number > 0, got -1.0"),
        (lambda: hessian_norm(step_size=math.nan), ValueError, "step_size: expected a number > 0, got nan"),
        (lambda: hessian_norm(step_size="big"), TypeError, "step_size: expected a real scalar, got 'big'"),
        (
            lambda: hessian_norm(step_size=X),
            TypeError,
            r"step_size: expected a real scalar, got float32\[3,2\]",
        ),
        (lambda: squared_jacobian(num_projections=0), ValueError, "num_projections: expected an int >= 1"),
        (lambda: penalties.confidence(jnp.arange(3)), TypeError, r"logits: expected .* got int32\[3\]"),
        (lambda: penalties.confidence([1.0]), TypeError, "logits: expected .* got list"),
        (
            lambda: penalties.confidence(jnp.float32(1)),
            ValueError,
            r"logits: .* \(..., classes\), got float32\[\]",
        ),
        (
            lambda: penalties.confidence(X[:, :0]),
            ValueError,
            r"logits: .* \(..., classes\), got float32\[3,0\]",
        ),
    ],
)
def test_errors_about_options(penalty, error, match):
    with pytest.raises(error, match=match):
        penalty()
