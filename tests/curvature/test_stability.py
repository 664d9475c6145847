"""The gap against losses whose gap is known: quadratic, cubic and quartic ones."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import KEY, Loader, split, symmetric
from scipy.optimize import brentq

from nso_jax import noise
from nso_jax.curvature import GaussNewton, stability
from nso_jax.curvature.stability import noise_stability_gap, suggest_sigma

SIGMAS = [0.01, 0.1, 1.0]
gap = functools.partial(noise_stability_gap, KEY)


@jax.jit  # so that it is compiled once for each shape, not once for each test
def quadratic(w, matrix):
    return 2.0 + jnp.sum(w) + w @ matrix @ w / 2


@jax.jit
def per_example(params, x):
    """Not quadratic, with two leaves and a mean over examples."""
    return jnp.mean(jax.nn.softplus(jnp.tanh(x @ params["w"]) @ params["v"]))


@jax.jit
def quartic(w, batch):
    """The Hessian is I at 0, and the gap `n (sigma^2/2 + 3 c sigma^4)` for normal noise in n weights."""
    return 1 + jnp.sum(w**2) / 2 + batch * jnp.sum(w**4)


def network(dtype):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(3, 4)), dtype),
        "v": jnp.asarray(rng.normal(size=4), dtype),
    }
    return params, jnp.asarray(rng.normal(size=(30, 3)), dtype)


# The gap


@pytest.mark.usefixtures("x64")
def test_gap_of_a_diagonal_quadratic_is_exact_with_signs():
    matrix, w = jnp.diag(jnp.array([3.0, -1.0, 5.0])), jnp.array([1.0, -2.0, 0.5])
    table = gap(quadratic, w, matrix, sigmas=SIGMAS, sampler=noise.rademacher)
    np.testing.assert_allclose(table.gap, 3.5 * np.square(SIGMAS), rtol=1e-9)
    np.testing.assert_allclose(table.quadratic, 3.5 * np.square(SIGMAS), rtol=1e-9)
    assert table.standard_error.max() <= 1e-12
    assert table.loss == pytest.approx(float(quadratic(w, matrix)), rel=1e-15)
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
    runs = [
        noise_stability_gap(
            jax.random.key(i), quadratic, w, matrix, sigmas=[0.5**0.5], num_samples=32, num_products=24
        )
        for i in range(120)
    ]
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
    params, x = network(jnp.float64)
    whole = gap(per_example, params, x, sigmas=SIGMAS, num_products=10)
    parts = gap(per_example, params, form(split(x, 17, 13)), sigmas=SIGMAS, num_products=10)
    for one, other in zip(whole[:6], parts[:6], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_draws_are_the_same_for_all_sigmas_and_do_not_depend_on_their_number():
    params, x = network(jnp.float64)
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
    rounded, x = network(dtype)
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
    params, x = network(jnp.float64)
    table = gap(per_example, params, x, sigmas=SIGMAS[1:2], mask=mask)
    fixed = gap(lambda w, x: per_example({**params, **w}, x), {"w": params["w"]}, x, sigmas=SIGMAS[1:2])
    np.testing.assert_allclose(table.gap, fixed.gap, rtol=1e-9)
    np.testing.assert_allclose(table.quadratic, fixed.quadratic, rtol=1e-6)


def test_gauss_newton_is_taken_as_its_loss():
    """At the minimum of `(w^2 - 1)^2 / 2` H = G = 4, but at w = 2 H = 22 and G = 16."""
    fun = GaussNewton(lambda w, x: x * w**2, lambda outputs, x: jnp.mean((outputs - 1) ** 2) / 2)
    table = gap(fun, jnp.array(2.0), jnp.ones(3), sigmas=[0.01], sampler=noise.rademacher)
    assert table.trace.value == pytest.approx(22, rel=1e-5)
    assert table.gap[0] == pytest.approx(0.0011, rel=1e-2)


def test_convolution():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 1, 3, 3)), jnp.float32), "head": jnp.ones(3)}
    images = jnp.asarray(rng.normal(size=(8, 1, 6, 6)), jnp.float32)

    def loss(params, batch):
        maps = jax.lax.conv(batch, params["kernel"], (1, 1), "SAME")
        return jnp.mean((jnp.mean(jax.nn.softplus(maps), axis=(2, 3)) @ params["head"]) ** 2)

    table = gap(loss, params, split(images, 5, 3), sigmas=[0.03], num_samples=40)
    error = math.hypot(table.standard_error[0], table.quadratic_standard_error[0])
    assert abs(table.gap[0] - table.quadratic[0]) <= 5 * error + 0.01 * table.quadratic[0]


def test_callback_counts_evaluations_and_a_loss_is_compiled_once_for_each_shape():
    counts, shapes = [], []

    def loss(params, x):
        shapes.append(x.shape)
        return per_example(params, x)

    params, x = network(jnp.float32)
    loader = Loader(split(x, 12, 12, 6))
    options = {"sigmas": SIGMAS, "num_samples": 4, "num_products": 4, "callback": counts.append}
    gap(loss, params, loader, **options)
    assert counts == [25 * b + 1 + 6 * j for b in range(3) for j in range(1, 5)]
    assert loader.passes == 1 + 2  # XTrace takes two
    assert sorted(shapes) == [(6, 3), (6, 3), (12, 3), (12, 3)]  # once for the products, once for the loss


def test_a_plain_function_may_change():
    def loss(w, _):
        return slope * jnp.sum(w**2)

    for slope in (1.0, 2.0):
        table = gap(loss, jnp.ones(2), None, sigmas=[1.0], sampler=noise.rademacher)
        np.testing.assert_allclose(table.gap, 2 * slope, rtol=1e-6)


def test_legacy_key_and_any_sampler():
    def two_point(key, shape, dtype):
        return jax.random.rademacher(key, shape, dtype)

    w, matrix = jnp.zeros(3), jnp.eye(3)
    table = noise_stability_gap(jax.random.PRNGKey(0), quadratic, w, matrix, sigmas=(1,), sampler=two_point)
    assert table.gap[0] == pytest.approx(1.5)


# The suggestion


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("share", "scale"), [(0.2, 1.0), (0.01, 1e4), (3.0, 1e-4)])
def test_suggestion_for_a_quadratic_loss(share, scale, sign):
    matrix, w = sign * scale * symmetric(np.linspace(1, 3, 30)), jnp.zeros(30)
    found = suggest_sigma(KEY, quadratic, w, matrix, share=share, num_samples=64)
    assert found.limit == "share"
    # The gap is a chi-square's, with a relative deviation of about sqrt(2 / (30 * 64)).
    assert found.sigma == pytest.approx(math.sqrt(2 * share * 2 / (60 * scale)), rel=0.08)
    assert sign * found.gap == pytest.approx(share * 2, rel=0.06)
    assert found.loss == 2
    index = list(found.table.sigma).index(found.sigma)
    assert found.gap == found.table.gap[index]
    assert found.standard_error == found.table.standard_error[index]
    assert (np.diff(found.table.sigma) > 0).all()
    assert found.trace is found.table.trace


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("share", [0.05, 30.0])
@pytest.mark.parametrize("sampler", [noise.normal, noise.rademacher])
def test_suggestion_for_a_quartic_loss_is_the_first_limit(share, sampler):
    """Of 400 weights: the gap is `400 (sigma^2/2 + kurtosis c sigma^4)`, and 1.5 quadratic at .25 / (k c)."""
    kurtosis = {noise.normal: 3, noise.rademacher: 1}[sampler]
    c = 2.0
    found = suggest_sigma(KEY, quartic, jnp.zeros(400), jnp.asarray(c), share=share, sampler=sampler)
    a = kurtosis * c * 400
    at_share = math.sqrt((-200 + math.sqrt(200**2 + 4 * a * share)) / (2 * a))
    broken = math.sqrt(0.25 / (kurtosis * c))
    expected = min((at_share, "share"), (broken, "quadratic"))
    assert found.limit == expected[1]
    assert found.sigma == pytest.approx(expected[0], rel=0.12 if sampler is noise.normal else 0.05)


@pytest.mark.usefixtures("x64")
def test_suggestion_is_found_far_below_and_above_the_first_guess():
    def steep(w, _):  # the trace is 2, but the gap soon grows with exp(200 sigma)
        return 1 + jnp.sum(w**2 + 1e-8 * jnp.cosh(200 * w))

    def flat(w, _):  # the trace is 400, but the gap soon grows with log(sigma)
        return 1 + 0.02 * jnp.sum(jnp.log1p(1e4 * w**2))

    options = {"sampler": noise.rademacher, "tolerance": 1e9}
    low = suggest_sigma(KEY, steep, jnp.zeros(1), None, **options)
    assert steep(jnp.array([low.sigma]), None) - steep(jnp.zeros(1), None) == pytest.approx(0.2, rel=0.06)
    high = suggest_sigma(KEY, flat, jnp.zeros(1), None, **options)
    assert 0.02 * math.log1p(1e4 * high.sigma**2) == pytest.approx(0.2, rel=0.06)
    assert high.limit == low.limit == "share"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("center", [0.0, 1e-3, 10.0])
def test_suggestion_where_the_trace_is_zero(center):
    """`w^4` about 0, in 100 weights, has the gap `300 sigma^4`; there is no quadratic picture to break."""
    w = jnp.full(100, center)
    found = suggest_sigma(KEY, lambda w, _: 1 + jnp.sum((w - center) ** 4), w, None)
    assert found.limit == "share"
    assert found.sigma == pytest.approx((0.2 / 300) ** 0.25, rel=0.06)
    assert found.gap == pytest.approx(0.2, rel=0.06)


def test_suggestion_for_a_network_in_float32():
    params, x = network(jnp.float32)
    found = suggest_sigma(KEY, per_example, params, split(x, 20, 10), share=0.01)
    again = gap(per_example, params, x, sigmas=[found.sigma], num_samples=200)
    error = math.hypot(found.standard_error, again.standard_error[0])
    assert abs(found.gap - again.gap[0]) <= 4 * error
    if found.limit == "share":
        assert abs(found.gap) == pytest.approx(0.01 * found.loss, rel=0.06)


@jax.jit
def levelling(w, scales):
    """Rises by less than 1 for each weight: the gap in some directions is `sum(1 - (1 + 2 c sigma^2)^-1/2)`."""
    return 10 + jnp.sum(1 - jnp.exp(-scales * w**2))


@pytest.mark.parametrize(
    "scales",
    [[1, 1], [1, 1] + 48 * [0], [1, 0.8] + 3 * [1e-3], [1], [1, 1, 1]],
    ids=["two", "two of fifty", "two and small ones", "one", "three"],
)
def test_suggestion_where_few_eigenvalues_dominate(scales):
    """The gap is half the quadratic part near .85; 3 standard errors of 16 draws beyond that, near 1.3, .3 of it.

    The share, 2, is never reached, or far beyond.
    """
    c = np.asarray(scales, np.float32)
    for seed in range(30):
        found = suggest_sigma(jax.random.key(seed), levelling, jnp.zeros(len(c)), c)
        assert found.limit == "quadratic"
        assert found.sigma >= 0.85
        assert found.sigma in found.table.sigma
        true = np.sum(1 - 1 / np.sqrt(1 + 2 * c * found.sigma**2))
        assert 0.3 <= true / (found.sigma**2 * c.sum()) <= 0.52


@pytest.mark.parametrize("tolerance", [0.2, 0.9])
@pytest.mark.parametrize("method", ["xtrace", "hutchinson"])
def test_suggestion_where_few_eigenvalues_dominate_at_other_tolerances(tolerance, method):
    """For two equal weights: `1 - (1 + 2 s)^-1/2 = (1 - tolerance) s`, s being sigma^2."""
    expected = brentq(lambda s: 1 - (1 + 2 * s) ** -0.5 - (1 - tolerance) * s, 0.01, 100) ** 0.5
    for seed in range(15):
        options = {"tolerance": tolerance, "method": method, "num_products": 20}
        found = suggest_sigma(jax.random.key(seed), levelling, jnp.zeros(2), jnp.ones(2), **options)
        assert found.limit == "quadratic"
        assert expected <= found.sigma <= 2 * expected


def test_suggestion_beside_a_trace_of_too_few_products():
    """Six products do not tell the trace, 8, of a Hessian with large off-diagonal entries from zero."""
    basis = symmetric([1.0] * 2 + [0.0] * 28).astype(jnp.float32)

    def projected(w, _):
        return 10 + 2 * (1 - jnp.exp(-(w @ basis @ w)))

    unknown = 0
    for seed in range(20):
        options = {"method": "hutchinson", "num_products": 6}
        found = suggest_sigma(jax.random.key(seed), jax.jit(projected), jnp.zeros(30), None, **options)
        unknown += abs(found.trace.value) <= 3 * found.trace.standard_error
        assert found.limit == "quadratic"
        assert found.sigma <= 1.3  # the gap, 2 - 2 / (1 + 2 sigma^2), is half the quadratic part at .71
    assert unknown >= 5


def test_suggestion_takes_more_draws_where_it_is_in_doubt_and_no_more_elsewhere(monkeypatch):
    """The gap of one quartic weight has a long tail: 16 draws cannot say that it is not quadratic."""
    evaluations = []

    def counted(fun):
        return lambda params, batch: (evaluations.append(1), fun(params, batch))[1]

    monkeypatch.setattr(stability, "_compiled", counted)
    suggest_sigma(KEY, quartic, jnp.zeros(400), jnp.asarray(2.0), share=0.05)
    plain = len(evaluations)
    assert plain <= 2 + 1 + 2 * 16 * 7  # once, with the ladder, and twice again
    sigmas, counts = [], []
    for seed in range(15):
        evaluations.clear()
        found = suggest_sigma(jax.random.key(seed), quartic, jnp.zeros(1), jnp.asarray(2.0), share=30)
        sigmas.append(found.sigma)
        counts.append(len(evaluations))
        assert found.limit == "quadratic"
    # The quadratic limit is .2, and the share, which 16 draws alone would give, 1.5.
    assert min(sigmas) >= 0.2
    assert np.median(sigmas) <= 0.45
    assert max(sigmas) <= 1.0
    assert max(counts) <= 8 * 16 * 2 * 40


def test_suggestion_beside_an_uncertain_trace_of_both_signs():
    """Twelve positive and eight negative eigenvalues: the draws know the gap badly, the trace does not."""

    def saddle(w, _):
        return 10 + jnp.sum(jnp.where(jnp.arange(20) < 12, 1.0, -1.0) * (1 - jnp.exp(-(w**2))))

    for seed in range(10):
        found = suggest_sigma(jax.random.key(seed), jax.jit(saddle), jnp.zeros(20), None)
        assert found.sigma <= 1.3  # where the gap of each weight has less than half its quadratic part


# Errors


W = {"w": jnp.ones(3)}


def cubic(params, batch):
    return jnp.mean(batch) * jnp.sum(params["w"] ** 3)


FUNCTIONS = {"gap": functools.partial(noise_stability_gap, sigmas=[0.1]), "suggest": suggest_sigma}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((KEY, cubic, W, (b for b in [1.0])), TypeError, "batches is a generator: it ends after one pass"),
        ((KEY, cubic, W, []), ValueError, "batches is empty"),
        ((KEY, cubic, W, Loader([])), ValueError, "batches is empty"),
        ((KEY, cubic, W, [np.ones(2), np.ones((0, 3))]), ValueError, r"batches\[1\] has no examples"),
        ((KEY, lambda w, _: w["w"], W, None), TypeError, r"fun: expected a real scalar.*got float32\[3\]"),
        ((KEY, "loss", W, None), TypeError, "fun: expected a function"),
        ((KEY, cubic, {"w": jnp.arange(3)}, 1.0), TypeError, r"params: leaf \['w'\] is int32"),
        ((KEY, cubic, {"w": jnp.ones(2, complex)}, 1.0), TypeError, r"leaf \['w'\] is complex64\[2\]"),
        ((0, cubic, W, 1.0), TypeError, "key: expected a PRNG key.*got 0"),
    ],
)
def test_errors_in_what_to_measure(function, arguments, error, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[function](*arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors_inside_a_transformation(function):
    def measured(params):
        return FUNCTIONS[function](KEY, cubic, params, 1.0)

    for transformed in (jax.jit(measured), jax.grad(measured)):
        with pytest.raises(TypeError, match=r"params: got a tracer, .*call it outside jit, vmap and grad"):
            transformed(W)
    with pytest.raises(TypeError, match=r"key: expected a PRNG key.*'batches' is missing"):
        FUNCTIONS[function](cubic, W, 1.0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 1}, ValueError, "num_samples: expected an int >= 2, got 1"),
        ({"num_samples": 2.5}, TypeError, "num_samples: expected a static int >= 2, got 2.5"),
        ({"num_products": 1}, ValueError, "num_products: expected an int >= "),
        ({"mask": False}, ValueError, "mask: selects no leaf"),
        ({"mask": {"w": 1}}, TypeError, r"mask: expected True or False for leaf \['w'\], got 1"),
        (
            {"sampler": lambda key, shape, dtype: jnp.ones(2, dtype)},
            ValueError,
            r"sampler: returned shape \(2,\) for leaf \['w'\]",
        ),
    ],
)
def test_errors_in_options(function, options, error, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[function](KEY, cubic, W, 1.0, **options)


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


@pytest.mark.parametrize("name", ["share", "tolerance"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_errors_in_limits(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a positive, finite number, got {value}"):
        suggest_sigma(KEY, cubic, W, 1.0, **{name: value})


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

    batches = [jnp.ones(2), jnp.full(2, jnp.nan)]
    for function in FUNCTIONS.values():
        with pytest.raises(
            FloatingPointError, match=r"The loss of batches\[1\] is not finite \(nan\): check"
        ):
            function(KEY, loss, jnp.ones(2), batches)


@pytest.mark.parametrize("center", [0.0, 1.0])
def test_error_where_the_loss_is_linear(center):
    with pytest.raises(
        ValueError, match=r"No limit reached: up to sigma=.* noise changes the loss, 7, by less"
    ):
        suggest_sigma(KEY, lambda w, _: 7 + jnp.sum(w - center), jnp.full(5, center), None)


def test_error_where_the_loss_is_zero():
    with pytest.raises(ValueError, match="the loss is 0, so no sigma changes it by a share"):
        suggest_sigma(KEY, lambda w, _: jnp.sum(w**2), jnp.zeros(3), None)


def test_error_where_the_loss_has_a_kink():
    """The gap `|sigma u|` is above any multiple of the quadratic part, at any small sigma."""
    kinked = functools.partial(lambda w, _: 1 + jnp.sum(jnp.abs(w) + w**2))
    with pytest.raises(
        ValueError, match=r"The limit 'quadratic' is exceeded down to sigma=.*raise tolerance"
    ):
        suggest_sigma(KEY, kinked, jnp.zeros(5), None)
