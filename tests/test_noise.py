import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import nso_jax
from nso_jax import noise

SAMPLERS = [noise.normal, noise.rademacher, noise.uniform, noise.laplace, noise.centered_binomial]
COUNT = 200_000
SIGMAS = 5  # standard errors that a statistic may be off


def draw(key, params, sigma=1.0, **options):
    return noise.perturbation(key, params, sigma, **options)


def assert_mean(samples, expected):
    samples = np.asarray(samples, np.float64).ravel()
    error = samples.std(ddof=1) / np.sqrt(samples.size)
    assert abs(samples.mean() - expected) <= SIGMAS * error + 1e-12


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mean_0_variance_1_and_symmetric(key, sampler):
    u = np.asarray(sampler(key, (COUNT,), jnp.float32), np.float64)
    assert_mean(u, 0)
    assert_mean(u**2, 1)
    assert_mean(np.sign(u) * u**2, 0)
    assert_mean(u**3, 0)
    assert_mean(u > 0.5, (u < -0.5).mean())


def test_cauchy_is_symmetric_with_quartiles_at_1(key):
    u = noise.cauchy(key, (COUNT,))
    assert_mean(u > 0, 0.5)
    assert_mean(abs(u) < 1, 0.5)


@pytest.mark.parametrize("sampler", [*SAMPLERS, noise.cauchy])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (2, 3, 5)])
def test_samplers_give_the_shape_and_dtype_asked_for(key, sampler, shape, x64):
    for dtype in (jnp.float32, jnp.float64):
        u = sampler(key, shape, dtype)
        assert u.shape == shape
        assert u.dtype == dtype


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_leaves_and_draws_are_independent(sampler):
    params = {"a": jnp.zeros(COUNT), "b": jnp.zeros(COUNT)}
    first, second = (draw(k, params, sampler=sampler) for k in jax.random.split(jax.random.key(3)))
    assert_mean(first["a"] * first["b"], 0)
    assert_mean(first["a"] * second["a"], 0)
    assert_mean(first["a"] ** 2 * first["b"] ** 2, 1)


def test_a_leafs_noise_depends_on_its_path_alone(key):
    params = {"a": jnp.zeros(4), "b": {"c": jnp.zeros((2, 3))}, "z": jnp.zeros(4)}
    whole = draw(key, params)
    for other in (
        {"a": params["a"]},
        {"b": params["b"], "a": params["a"], "aa": jnp.zeros(9)},
        {"a": params["a"], "b": {"c": params["b"]["c"], "a": jnp.zeros(1)}},
    ):
        partly = draw(key, other)
        np.testing.assert_array_equal(partly["a"], whole["a"])
        if "b" in other:
            np.testing.assert_array_equal(partly["b"]["c"], whole["b"]["c"])
    assert not np.array_equal(whole["a"], whole["z"])


def test_typed_and_legacy_keys_draw_the_same():
    params = {"w": jnp.zeros(5)}
    np.testing.assert_array_equal(
        draw(jax.random.PRNGKey(4), params)["w"], draw(jax.random.key(4), params)["w"]
    )


@pytest.mark.parametrize("shape", [(7,), (2, 5), (48,), (6, 4), (3, 64), (64, 3)])
@pytest.mark.parametrize("sampler", [noise.rademacher, noise.centered_binomial])
def test_packed_bits_are_fair_and_independent_in_every_shape(sampler, shape):
    u = np.asarray(jax.vmap(lambda key: sampler(key, shape))(jax.random.split(jax.random.key(5), 3000)))
    u = u.reshape(len(u), -1)
    assert np.all(abs(u.mean(0)) < SIGMAS / np.sqrt(len(u)))
    correlations = u.T @ u / len(u) - np.eye(u.shape[1])
    assert np.all(abs(correlations) < (SIGMAS + 1) / np.sqrt(len(u)))  # 18,000 pairs: 6 errors


def test_noise_is_wide_and_scaled_by_a_prefix(key):
    params = {
        "a": {"b": jnp.zeros(3, jnp.bfloat16), "c": jnp.zeros((), jnp.float16)},
        "d": jnp.zeros(2),
        "e": None,
    }
    u = draw(key, params, {"a": 2.0, "d": jnp.array([0.0, 1.0]), "e": None})
    plain = draw(key, params)
    assert u["a"]["b"].dtype == u["a"]["c"].dtype == jnp.float32
    np.testing.assert_array_equal(u["a"]["b"], 2 * plain["a"]["b"])
    np.testing.assert_array_equal(u["a"]["c"], 2 * plain["a"]["c"])
    np.testing.assert_array_equal(u["d"], plain["d"] * jnp.array([0.0, 1.0]))
    assert u["e"] is None


def test_mask_leaves_none(key):
    params = {"a": jnp.zeros(3), "b": [jnp.zeros(2), jnp.zeros(1)]}
    for mask in ({"a": True, "b": False}, lambda _: {"a": True, "b": [False, False]}):
        u = draw(key, params, mask=mask)
        assert u["b"] == [None, None]
        np.testing.assert_array_equal(u["a"], draw(key, params)["a"])
        assert noise.perturb(params, u)["b"][0] is params["b"][0]


def test_complex_noise_has_unit_variance_in_both_parts_together(key):
    u = draw(key, jnp.zeros(COUNT, jnp.complex64), sampler=noise.laplace)
    assert u.dtype == jnp.complex64
    assert_mean(abs(u) ** 2, 1)
    assert_mean(u.real**2, 0.5)
    assert_mean(u.real * u.imag, 0)


def test_perturb_rounds_once():
    w = jnp.array([1.0, 2.0], jnp.bfloat16)
    u = jnp.array([0.3, -0.01], jnp.float32)
    expected = (np.asarray(w, np.float32) - np.asarray(u)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(noise.perturb(w, u, -1), expected)


@pytest.mark.parametrize(
    ("per", "size"),
    [
        ("weight", abs),
        ("channel", lambda w: np.broadcast_to(np.sqrt((w**2).mean((0, 1), keepdims=True)), w.shape)),
        ("tensor", lambda w: np.full(w.shape, np.sqrt((w**2).mean()))),
    ],
)
def test_relative_noise_has_the_stated_deviation(key, per, size):
    w = jax.random.normal(key, (3, 4, 2)) * jnp.array([0.1, 10.0]).reshape(1, 1, 2)
    sigma = noise.relative(0.3, per)
    keys = jax.random.split(key, 4000)
    u = jax.vmap(functools.partial(draw, params=w, sigma=sigma))(keys)
    deviation = np.asarray(u, np.float64).std(0, ddof=1)
    expected = 0.3 * size(np.asarray(w, np.float64))
    # the standard error of a normal sample's standard deviation is 1/sqrt(2n) of it
    assert np.all(abs(deviation - expected) <= SIGMAS * expected / np.sqrt(2 * len(keys)))


def test_relative_noise_of_vectors_scalars_and_other_channel_axes(key):
    bias = jnp.array([3.0, -4.0])
    np.testing.assert_allclose(noise.relative(1.0, "channel")(bias), [3, 4])
    np.testing.assert_allclose(noise.relative(1.0, "tensor")(bias), [12.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(noise.relative(2.0, "channel")(jnp.float32(-5)), 10)
    kernel = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    np.testing.assert_allclose(
        noise.relative(1.0, "channel", channel_axis=0)(kernel), [[12.5**0.5], [0.5**0.5]], rtol=1e-6
    )
    for per in ("weight", "channel", "tensor"):
        with jax.debug_nans(True):
            assert draw(key, jnp.zeros((0, 3)), noise.relative(1.0, per)).shape == (0, 3)


def test_relative_noise_may_be_scheduled(key):
    noisy = jax.jit(lambda scale: draw(key, jnp.ones(3), noise.relative(scale)))
    np.testing.assert_allclose(noisy(2.0), 2 * noisy(1.0))


def root_mean_square(w, kept):
    """Over all axes but those that are kept, index by index."""
    w = np.asarray(w, np.float64)
    size = np.empty(w.shape)
    for index in np.ndindex(w.shape):
        size[index] = np.sqrt(
            np.mean(w[tuple(i if axis in kept else slice(None) for axis, i in enumerate(index))] ** 2)
        )
    return size


@pytest.mark.parametrize(
    ("per", "channel_axis", "stack_axes", "kept"),
    [
        ("channel", (-2, -1), 0, {2, 3}),
        ("channel", [0, -1], 0, {0, 3}),
        ("channel", -1, 1, {0, 3}),
        ("channel", 0, 1, {0, 1}),
        ("channel", (0, -1), 2, {0, 1, 2, 3}),
        ("channel", 5, 3, {0, 1, 2, 3}),  # a vector, of which each entry is its own channel
        ("tensor", -1, 1, {0}),
        ("tensor", -1, 2, {0, 1}),
        ("tensor", -1, 4, {0, 1, 2, 3}),
    ],
)
def test_relative_noise_keeps_channels_and_stacked_layers_apart(key, per, channel_axis, stack_axes, kept):
    w = jax.random.normal(key, (2, 3, 4, 5)) * jnp.array([0.01, 10.0]).reshape(2, 1, 1, 1)
    sigma = noise.relative(0.3, per, channel_axis=channel_axis, stack_axes=stack_axes)
    broadcast = np.broadcast_to(sigma(w), w.shape)
    np.testing.assert_allclose(broadcast, 0.3 * root_mean_square(w, kept), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"per": "weight"},
        {"per": "tensor"},
        {"per": "channel"},
        {"per": "channel", "channel_axis": 0},
        {"per": "channel", "channel_axis": (0, -1)},
    ],
)
@pytest.mark.parametrize("as_function", [False, True])
def test_each_layer_of_a_stack_gets_what_it_would_get_alone(key, options, as_function):
    def layer(key):
        kernel, scale = jax.random.normal(key, (3, 2, 4)), jnp.exp(3 * jax.random.normal(key))
        return {"kernel": scale * kernel, "bias": jnp.arange(4.0) * scale, "gain": scale}

    layers = [layer(k) for k in jax.random.split(key, 3)]
    embed = jax.random.normal(key, (5, 2))
    stacks = {"layers": 1, "embed": 0}
    sigma = noise.relative(0.3, **options, stack_axes=(lambda params: stacks) if as_function else stacks)
    stacked = sigma({"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers), "embed": embed})
    alone = noise.relative(0.3, **options)
    np.testing.assert_array_equal(stacked["embed"], alone(embed))
    for i, one in enumerate(layers):
        for name, expected in alone(one).items():
            np.testing.assert_allclose(stacked["layers"][name][i], expected, rtol=1e-6)


def test_layers_that_a_loss_scans_over_get_the_noise_of_layers_in_a_list(key):
    """With signs for noise, so that what a layer's step is says all of its scale."""
    layers = jax.random.normal(key, (3, 4, 4)) * jnp.array([0.01, 1.0, 100.0]).reshape(3, 1, 1)

    def loss(params, x):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.sum(y**2) + 0.0 * jnp.sum(params["layers"])

    kept = {}

    def keeps(params, x):
        jax.debug.callback(lambda w: kept.setdefault("w", []).append(np.asarray(w)), params["layers"])
        return loss(params, x)

    sigma = noise.relative(0.5, "tensor", stack_axes={"layers": 1})
    fn = jax.jit(nso_jax.value_and_grad(keeps, sigma=sigma, sampler=noise.rademacher))
    jax.block_until_ready(fn(key, {"layers": layers}, jnp.ones((2, 4))))
    jax.effects_barrier()
    expected = [0.5 * float(jnp.sqrt(jnp.mean(w**2))) for w in layers]
    for moved in kept["w"]:
        for i, size in enumerate(expected):
            np.testing.assert_allclose(abs(moved[i] - layers[i]), size, rtol=1e-4)
    assert len(kept["w"]) == 2


W = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda k: draw(k, W, -0.1),
            ValueError,
            r"sigma: expected a standard deviation >= 0 for leaf \['b'\], got -0.1",
        ),
        (lambda k: draw(k, W, {"w": 0.1, "b": jnp.nan}), ValueError, r"sigma: .* leaf \['b'\], got nan"),
        (
            lambda k: draw(k, W, {"w": jnp.full((2, 3), -1.0), "b": 0.1}),
            ValueError,
            r"sigma: .* leaf \['w'\], got -1",
        ),
        (lambda k: draw(k, W, 1j), TypeError, "sigma: expected a real number"),
        (
            lambda k: draw(k, W, {"w": 0.1}),
            ValueError,
            r"sigma: not a prefix of the pytree .* at key path sigma .* 1 child keys .*w.* 2 child keys .*b.*w",
        ),
        (
            lambda k: draw(k, W, jnp.ones(2)),
            ValueError,
            r"sigma: shape \(2,\) does not broadcast to leaf \['b'\] of shape \(3,\)",
        ),
        (lambda k: draw(k, W, 0.1, mask={"w": True}), ValueError, "mask: not a prefix"),
        (
            lambda k: draw(k, W, 0.1, mask={"w": True, "b": 1}),
            TypeError,
            r"mask: expected True or False for leaf \['b'\], got 1 \(int\)",
        ),
        (
            lambda k: draw(k, W, 0.1, sampler=lambda *_: jnp.ones(5)),
            ValueError,
            r"sampler: returned shape \(5,\) for leaf \['b'\]",
        ),
        (
            lambda k: draw(k, {"n": jnp.ones(2, int)}),
            TypeError,
            r"params: leaf \['n'\] is int32\[2\], expected float or complex",
        ),
        (
            lambda _: draw(0, W),
            TypeError,
            r"key: expected a PRNG key such as jax.random.key\(0\), got 0 \(int\)",
        ),
        (lambda _: draw(None, W), TypeError, "key: expected a PRNG key.*, got None"),
        (
            lambda k: draw(jax.random.split(k), W),
            TypeError,
            r"key: expected one PRNG key, got keys of shape \(2,\); use jax.vmap",
        ),
        (
            lambda k: draw(k, W, sampler=lambda *_: "noise"),
            TypeError,
            r"sampler: expected a real number for each weight of leaf \['b'\], got 'noise'",
        ),
        (
            lambda k: draw(k, W, param_specs="data"),
            TypeError,
            "param_specs: expected partition specs, got 'data'",
        ),
        (
            lambda k: draw(k, W, noise.relative(1.0, "channel", channel_axis=2)),
            ValueError,
            r"channel_axis: 2 is out of range for leaf \['w'\] of shape \(2, 3\)",
        ),
        (
            lambda k: draw(
                k, {"w": jnp.ones((4, 2, 3))}, noise.relative(1.0, "channel", channel_axis=-3, stack_axes=1)
            ),
            ValueError,
            r"channel_axis: -3 is out of range for leaf \['w'\] of shape \(2, 3\), one layer's",
        ),
        (
            lambda k: draw(k, W, noise.relative(1.0, "channel", channel_axis=(-1, 1))),
            ValueError,
            r"channel_axis: \(-1, 1\) names an axis twice for leaf \['w'\] of shape \(2, 3\)",
        ),
        (
            lambda k: draw(k, W, noise.relative(1.0, "tensor", stack_axes=2)),
            ValueError,
            r"stack_axes: 2 are more than leaf \['b'\] of shape \(3,\) has",
        ),
        (
            lambda k: draw(k, W, noise.relative(1.0, stack_axes={"w": 1, "b": True})),
            TypeError,
            r"stack_axes for leaf \['b'\]: expected a static int >= 0, got True",
        ),
        (
            lambda k: draw(k, W, noise.relative(1.0, stack_axes={"w": 1})),
            ValueError,
            "stack_axes: not a prefix",
        ),
        (
            lambda _: noise.relative(1.0, stack_axes=-1),
            ValueError,
            "stack_axes: expected an int >= 0, got -1",
        ),
        (
            lambda _: noise.relative(1.0, channel_axis=(0, "x")),
            TypeError,
            "channel_axis: expected an int or a sequence of ints, got 'x'",
        ),
        (
            lambda _: noise.relative(1.0, channel_axis=0.5),
            TypeError,
            "channel_axis: expected an int or a sequence of ints, got 0.5",
        ),
        (lambda _: noise.relative(jnp.ones(2)), ValueError, r"scale: expected a scalar, got shape \(2,\)"),
        (lambda _: noise.relative(1.0)({"n": 1}), TypeError, r"params: leaf \['n'\] is 1 \(int\)"),
        (lambda _: noise.relative(-1), ValueError, "scale: expected a standard deviation >= 0, got -1"),
        (
            lambda _: noise.relative(1, "layer"),
            ValueError,
            "per: expected one of 'weight', 'channel', 'tensor', 'filter', got 'layer'",
        ),
    ],
)
def test_errors_name_argument_value_and_leaf(key, call, error, message):
    with pytest.raises(error, match=message):
        call(key)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (3, 5), (4,), (), (3, 3, 4, 2)])
def test_normal_numbers_are_box_and_mullers_of_random_words(key, shape):
    """Against NumPy: words in float64, and the angle's cosine by its own function."""
    even = [axis for axis in range(len(shape)) if shape[axis] % 2 == 0]
    halved = even and max([axis for axis in even if axis < len(shape) - 1] or even)
    lanes = [2 if axis == halved else 1 for axis in range(len(shape))]
    words = np.asarray(jax.random.bits(key, [n // m for n, m in zip(shape, lanes, strict=True)]))
    for index in np.ndindex(shape):
        word = int(words[tuple(i // m for i, m in zip(index, lanes, strict=True))])
        number = sum(i % m for i, m in zip(index, lanes, strict=True))
        radius = math.sqrt(-2 * math.log(((word >> 12) + 0.5) / 2**20))
        expected = radius * math.cos(math.tau * (((word & 0xFFF) + 0.5) / 2**12 + number / 4 - 0.5))
        np.testing.assert_allclose(noise.normal(key, shape)[index], expected, rtol=3e-6, atol=1e-6)


def test_normal_numbers_have_a_normal_law(key):
    """By the statistic of Kolmogorov and Smirnov, whose 1 % point is 1.63 over the root of the count."""
    draws = np.asarray(noise.normal(key, (1000, 1000)))
    assert scipy.stats.kstest(draws[:500].ravel(), "norm").statistic < 1.63 / math.sqrt(draws.size / 2)
    first, second = draws.reshape(500, 2, 1000).swapaxes(0, 1).reshape(2, -1)
    for f in (np.abs, np.square, np.sign, np.positive):
        assert abs(np.corrcoef(f(first), f(second))[0, 1]) < 4 / math.sqrt(first.size)
    assert np.abs(draws).max() < 5.4
