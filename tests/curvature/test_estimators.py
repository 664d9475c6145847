"""What all estimators have in common: how they are called, and how they count their products."""

import functools

import jax
import jax.numpy as jnp
import pytest
from problems import KEY, W, cubic, mlp, mlp_loss, split

from nso_jax import curvature

ESTIMATORS = {
    "trace": curvature.trace,
    "diagonal": curvature.diagonal,
    "eigenvalues": functools.partial(curvature.eigenvalues, k=1),
    "spectral_density": curvature.spectral_density,
    "layer_structure": functools.partial(curvature.layer_structure, k=1, num_probes=2),
    "noise_stability_gap": functools.partial(curvature.noise_stability_gap, sigmas=[0.1]),
    "suggest_sigma": curvature.suggest_sigma,
    "pac_bayes_bound": functools.partial(curvature.pac_bayes_bound, initial_params=W),
}
every = pytest.mark.parametrize("name", ESTIMATORS)


def measured(name, *args, **options):
    return ESTIMATORS[name](*args, **options)


@every
@pytest.mark.parametrize(
    ("args", "options", "problem", "matrix_options"),
    [
        ((KEY, cubic, W, 1.0), {}, "h: expected a CurvatureMatrix, got function", ""),
        ((KEY, cubic), {}, "h: expected a CurvatureMatrix, got function", ""),
        ((cubic, W, 1.0), {}, "h: expected a CurvatureMatrix, got dict", ""),
        ((KEY, cubic, W, 1.0), {"mask": True}, "h: expected a CurvatureMatrix", ", mask=..."),
        ((KEY,), {}, "h: is missing", ""),
        ((), {"key": KEY}, "h: is missing", ""),
        ((KEY,), {"fun": cubic, "params": W, "batches": 1.0}, "h: is missing", ""),
    ],
)
def test_a_call_with_the_loss_says_what_to_write(name, args, options, problem, matrix_options):
    with pytest.raises(TypeError) as caught:
        measured(name, *args, **options)
    message = str(caught.value)
    assert message.startswith(problem)
    assert message.endswith(
        f"; write h = curvature.hessian(fun, params, batches{matrix_options}), then curvature.{name}(key, h, ...)."
    )


@every
def test_a_call_without_a_key_or_with_more_than_a_matrix_says_what_to_write(name):
    h = curvature.hessian(cubic, W, 1.0)
    write = rf"write h = .*, then curvature.{name}\(key, h, ...\)\.$"
    with pytest.raises(TypeError, match=rf"^key: is missing; {write}"):
        measured(name, h)
    with pytest.raises(TypeError, match=rf"^fun, params, batches: the matrix has what is measured; {write}"):
        measured(name, KEY, h, W, 1.0)
    with pytest.raises(
        TypeError, match=r"^weight, chunk_size: .*batches, weight=..., chunk_size=...\), then"
    ):
        measured(name, KEY, h, weight=len, chunk_size=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_probe'"):
        measured(name, KEY, h, num_probe=3)


@every
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (0, "key: expected a PRNG key.*got 0"),
        (None, "key: expected a PRNG key.*got None"),
        (jax.random.split(KEY), "key: expected one PRNG key"),
    ],
)
def test_errors_in_the_key(name, key, message):
    with pytest.raises(TypeError, match=rf"{message}.* Write curvature.{name}\(key, h, ...\)\."):
        measured(name, key, curvature.hessian(cubic, W, 1.0))


OUTSIDE = "call it outside jit, vmap and grad"


@every
def test_errors_inside_a_transformation(name):
    h = curvature.hessian(cubic, W, 1.0)
    with pytest.raises(TypeError, match=rf"key: got a tracer.*{OUTSIDE}"):
        jax.vmap(lambda key: measured(name, key, h))(jax.random.split(KEY))
    with pytest.raises(TypeError, match=rf"h: expected to be used outside of jit; .*{OUTSIDE}"):
        jax.jit(lambda: measured(name, KEY, h))()
    with pytest.raises(TypeError, match=rf"params: got a tracer, float32\[3\] for leaf \['w'\]; .*{OUTSIDE}"):
        jax.grad(lambda params: measured(name, KEY, h.at(params)))(W)


@every
def test_arguments_may_be_named_and_the_key_of_the_old_form(name):
    params, batch = mlp(jnp.float32)
    h = curvature.hessian(mlp_loss, params, batch)
    options = {"initial_params": params} if name == "pac_bayes_bound" else {}
    one, other = measured(name, KEY, h, **options), measured(name, h=h, key=jax.random.PRNGKey(0), **options)
    assert str(one) == str(other)


@pytest.mark.parametrize("name", ["trace", "diagonal", "eigenvalues", "spectral_density", "layer_structure"])
def test_each_call_counts_its_own_products(name):
    params, batch = mlp(jnp.float32)
    h, calls = curvature.hessian(mlp_loss, params, split(batch, 17, 13)), []
    for _ in range(2):
        counts = []
        result = measured(name, KEY, h, callback=counts.append)
        assert counts == sorted(set(counts))
        if name != "layer_structure":
            assert counts[-1] == result.num_products
        calls.append(counts)
    assert calls[0] == calls[1]
