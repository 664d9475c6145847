"""The gap against losses whose gap is known: quadratic, cubic and quartic ones."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    KEY,
    Loader,
    W,
    affine_quadratic,
    convolution,
    cubic,
    per_example,
    quartic,
    small_network,
    split,
    symmetric,
)

from nso_jax import noise
from nso_jax.curvature import gauss_newton, hessian, noise_stability_gap, suggest_sigma

SIGMAS = [0.01, 0.1, 1.0]


def gap(fun, params, batches, *, mask=None, **options):
    return noise_stability_gap(KEY, hessian(fun, params, batches, mask=mask), **options)


@pytest.mark.usefixtures("x64")
def test_gap_of_a_diagonal_quadratic_is_exact_with_signs():
    matrix, w = jnp.diag(jnp.array([3.0, -1.0, 5.0])), jnp.array([1.0, -2.0, 0.5])
    table = gap(affine_quadratic, w, matrix, sigmas=SIGMAS, sampler=noise.rademacher)
    np.testing.assert_allclose(table.gap, 3.5 * np.square(SIGMAS), rtol=1e-9)
    np.testing.assert_allclose(table.quadratic, 3.5 * np.square(SIGMAS), rtol=1e-9)
    assert table.standard_error.max() <= 1e-12
    assert table.loss == pytest.approx(float(affine_quadratic(w, matrix)), rel=1e-15)
    assert table.trace.value == pytest.approx(7)
    arrays = table[:5]
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float64 and x.shape == (3,) for x in arrays)


@pytest.mark.usefixtures("x64")
def test_gap_of_a_cubic_has_no_odd_terms():
    def cubic(w, _):
        return jnp.sum(w**3) + 4 * w[0] * w[1] * w[2] + jnp.sum(w)

    w = jnp.array([1.0, 2.0, -0.5])
    table = gap(cubic, w, None, sigmas=SIGMAS, sampler=noise.rademacher, num_samples=200)
    assert (abs(table.gap - 7.5 * np.square(SIGMAS)) <= 5 * table.standard_error).all()
    even = gap(lambda w, _: jnp.sum(w**3), w, None, sigmas=SIGMAS, sampler=noise.rademacher)
    np.testing.assert_allclose(even.gap, 7.5 * np.square(SIGMAS), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_gap_of_a_quartic():
    w, c = jnp.zeros(200), jnp.asarray(0.5)
    table = gap(quartic, w, c, sigmas=SIGMAS, num_samples=30)
    s = np.asarray(SIGMAS)
    assert (abs(table.gap - 200 * (s**2 / 2 + 1.5 * s**4)) <= 5 * table.standard_error).all()
    assert (abs(table.quadratic - 100 * s**2) <= 5 * table.quadratic_standard_error).all()


@pytest.mark.usefixtures("x64")
def test_standard_errors_are_true_and_independent_of_each_other():
    matrix, w = symmetric(np.linspace(-1, 3, 30)), jnp.zeros(30)
    exact = 0.5 * 30 / 2  # at sigma^2 = 1/2
    h, options = hessian(affine_quadratic, w, matrix), {"num_samples": 32, "num_products": 24}
    runs = [noise_stability_gap(jax.random.key(i), h, sigmas=[0.5**0.5], **options) for i in range(120)]
    gaps, errors, parts, part_errors = (np.array([run[i][0] for run in runs]) for i in (1, 2, 3, 4))
    for scores in (
        (gaps - exact) / errors,
        (parts - exact) / part_errors,
        (gaps - parts) / np.hypot(errors, part_errors),
    ):
        assert 0.8 <= scores.std() <= 1.25
        assert abs(scores.mean()) <= 5 / math.sqrt(120)
    assert abs(np.corrcoef(gaps, parts)[0, 1]) <= 5 / math.sqrt(120)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", [list, Loader])
def test_unequal_batches_are_as_good_as_one(form):
    params, x = small_network(jnp.float64)
    whole = gap(per_example, params, x, sigmas=SIGMAS, num_products=10)
    parts = gap(per_example, params, form(split(x, 17, 13)), sigmas=SIGMAS, num_products=10)
    for one, other in zip(whole[:6], parts[:6], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_draws_are_the_same_for_all_sigmas_and_do_not_depend_on_their_number():
    params, x = small_network(jnp.float64)
    options = {"sigmas": SIGMAS, "num_products": 4}
    two, three = (gap(per_example, params, x, num_samples=n, **options) for n in (2, 3))
    alone = gap(per_example, params, x, num_samples=3, sigmas=SIGMAS[1:2], num_products=4)
    assert three.gap[1] == pytest.approx(alone.gap[0], rel=1e-12)
    # Of two draws, gap and standard error tell both; a third adds one more.
    first = {two.gap[1] - two.standard_error[1], two.gap[1] + two.standard_error[1]}
    third = 3 * three.gap[1] - sum(first)
    assert three.standard_error[1] == pytest.approx(np.std([*first, third], ddof=1) / 3**0.5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_precision(dtype, tolerance):
    rounded, x = small_network(dtype)
    table = gap(per_example, rounded, x, sigmas=[0.3])
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (rounded, x))
        exact = gap(per_example, params, x, sigmas=[0.3], num_samples=300)
    assert table.loss == pytest.approx(exact.loss, rel=tolerance)
    assert abs(table.gap[0] - exact.gap[0]) <= 4 * table.standard_error[0] + tolerance * exact.gap[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "mask", [{"w": True, "v": False}, lambda params: {name: name == "w" for name in params}]
)
def test_mask_keeps_noise_out(mask):
    params, x = small_network(jnp.float64)
    table = gap(per_example, params, x, sigmas=SIGMAS[1:2], mask=mask)
    fixed = gap(lambda w, x: per_example({**params, **w}, x), {"w": params["w"]}, x, sigmas=SIGMAS[1:2])
    np.testing.assert_allclose(table.gap, fixed.gap, rtol=1e-9)
    np.testing.assert_allclose(table.quadratic, fixed.quadratic, rtol=1e-6)


def test_gauss_newton_is_taken_as_its_loss():
    """At the minimum of `(w^2 - 1)^2 / 2` H = G = 4, but at w = 2 H = 22 and G = 16."""
    loss = lambda outputs, x: jnp.mean((outputs - 1) ** 2) / 2  # noqa: E731
    h = gauss_newton(lambda w, x: x * w**2, loss, jnp.array(2.0), jnp.ones(3))
    table = noise_stability_gap(KEY, h, sigmas=[0.01], sampler=noise.rademacher)
    assert table.trace.value == pytest.approx(22, rel=1e-5)
    assert table.gap[0] == pytest.approx(0.0011, rel=1e-2)


def test_convolution():
    loss, params, images = convolution()
    table = gap(loss, params, split(images, 5, 3), sigmas=[0.03], num_samples=40)
    error = math.hypot(table.standard_error[0], table.quadratic_standard_error[0])
    assert abs(table.gap[0] - table.quadratic[0]) <= 5 * error + 0.01 * table.quadratic[0]


def test_callback_counts_evaluations_and_a_loss_is_compiled_once_for_each_shape():
    counts, shapes = [], []

    def loss(params, x):
        shapes.append(x.shape)
        return per_example(params, x)

    params, x = small_network(jnp.float32)
    loader = Loader(split(x, 12, 12, 6))
    options = {"sigmas": SIGMAS, "num_samples": 4, "num_products": 4, "callback": counts.append}
    gap(loss, params, loader, **options)
    assert counts == [25 * b + 1 + 6 * j for b in range(3) for j in range(1, 5)]
    assert loader.passes == 1 + 2  # XTrace takes two
    assert sorted(shapes) == [(6, 3), (6, 3), (12, 3), (12, 3)]  # once for the products, once for the loss


def test_any_sampler():
    def two_point(key, shape, dtype):
        return jax.random.rademacher(key, shape, dtype)

    table = gap(affine_quadratic, jnp.zeros(3), jnp.eye(3), sigmas=(1,), sampler=two_point)
    assert table.gap[0] == pytest.approx(1.5)


# Errors

FUNCTIONS = {"gap": functools.partial(noise_stability_gap, sigmas=[0.1]), "suggest": suggest_sigma}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 1}, ValueError, "num_samples: expected an int >= 2, got 1"),
        ({"num_samples": 2.5}, TypeError, "num_samples: expected a static int >= 2, got 2.5"),
        ({"num_products": 1}, ValueError, "num_products: expected an int >= "),
        (
            {"sampler": lambda key, shape, dtype: jnp.ones(2, dtype)},
            ValueError,
            r"sampler: returned shape \(2,\) for leaf \['w'\]",
        ),
    ],
)
def test_errors_in_options(function, options, error, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[function](KEY, hessian(cubic, W, 1.0), **options)


@pytest.mark.parametrize(
    ("sigmas", "error", "message"),
    [
        ([], ValueError, r"sigmas: expected a sequence of positive, finite numbers, got \[\]"),
        (0.1, ValueError, r"sigmas: expected a sequence of positive, finite numbers, got 0.1"),
        ([[0.1]], ValueError, r"sigmas: expected a sequence.*got \[\[0.1\]\]"),
        ("abc", TypeError, r"sigmas: expected a sequence of positive, finite numbers, got 'abc'"),
        (["a"], TypeError, r"sigmas: expected a sequence of positive, finite numbers, got \['a'\]"),
        ([0.1, 0], ValueError, r"sigmas\[1\]: expected a positive, finite number, got 0.0"),
        ([0.1, -1], ValueError, r"sigmas\[1\]: .*got -1.0"),
        ([math.nan], ValueError, r"sigmas\[0\]: .*got nan"),
        ([1, 2, math.inf], ValueError, r"sigmas\[2\]: .*got inf"),
    ],
)
def test_errors_in_sigmas(sigmas, error, message):
    with pytest.raises(error, match=message):
        gap(cubic, W, 1.0, sigmas=sigmas)


def test_error_where_noise_makes_the_loss_infinite():
    def loss(w, batch):
        return jnp.mean(batch) * jnp.mean(jnp.exp(w))

    batches = [jnp.zeros(2), jnp.ones(2)]
    message = r"batches\[0\] is not finite with noise of sigma=1000: take smaller sigmas"
    with pytest.raises(FloatingPointError, match=message):
        gap(loss, jnp.zeros(3), batches, sigmas=[2000.0, 0.1, 1000.0])


def test_error_where_the_loss_itself_is_not_finite():
    """The Hessian of this loss is finite."""

    def loss(w, batch):
        return jnp.mean(batch) + jnp.sum(w**2)

    h = hessian(loss, jnp.ones(2), [jnp.ones(2), jnp.full(2, jnp.nan)])
    for function in FUNCTIONS.values():
        with pytest.raises(
            FloatingPointError, match=r"The loss of batches\[1\] is not finite \(nan\): check"
        ):
            function(KEY, h)
