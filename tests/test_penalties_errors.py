"""Penalties name the argument, the value and what to do."""

import math

import jax
import jax.numpy as jnp
import pytest

from nso_jax import penalties

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
