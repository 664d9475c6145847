import functools
import importlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nso_jax.nnx
from nso_jax import noise, parallel

SIGMA = 0.1


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))
        return self.linear(self.dropout(x))


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def data(key):
    return jax.random.normal(key, (8, 5, 5, 1)), jnp.arange(8) % 3


@pytest.fixture
def model(standard_promotion):
    return ConvNet(nnx.Rngs(0))


def arrays(state):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def statistics(model):
    return jax.tree.map(np.array, arrays(nnx.state(model, nnx.BatchStat)))


def counts(model):
    return [int(count) for count in jax.tree.leaves(nnx.state(model, nnx.RngCount))]


def evaluations(key, model, x, y, num_samples=1, sigma=SIGMA, signs=(1, -1), wrt=nnx.Param):
    """Each evaluation on its own copy of the model: (value, grads, statistics afterwards)."""
    results = []
    for draw_key in jax.random.split(key, num_samples):
        params = nnx.state(model, wrt)
        u = noise.perturbation(draw_key, params, sigma)
        for sign in signs:
            copy = nnx.clone(model)
            nnx.update(copy, noise.perturb(params, u, sign))
            value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(copy, x, y)
            results.append((value, arrays(grads), statistics(copy)))
    return results


def mean(trees):
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


@pytest.mark.parametrize("options", [{}, {"num_samples": 3}, {"antithetic": False, "num_samples": 2}])
def test_it_averages_evaluations_that_start_from_the_same_state(key, model, options):
    x, y = data(key)
    signs = (1, -1) if options.get("antithetic", True) else (1,)
    expected = mean(evaluations(key, model, x, y, options.get("num_samples", 1), signs=signs))
    value, grads = nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, **options)(key, model, x, y)
    chex.assert_trees_all_close((value, arrays(grads), statistics(model)), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    "sigma",
    [
        noise.relative(0.3, "channel"),
        nnx.State({"conv": 0.1, "norm": 0.0, "linear": {"kernel": 0.2, "bias": 0.0}}),
    ],
    ids=["relative", "prefix"],
)
def test_sigma_may_be_relative_or_a_prefix_of_the_state(key, model, sigma):
    x, y = data(key)
    expected = mean([(v, g) for v, g, _ in evaluations(key, nnx.clone(model), x, y, sigma=sigma)])
    value, grads = nso_jax.nnx.value_and_grad(loss, sigma=sigma)(key, model, x, y)
    chex.assert_trees_all_close((value, arrays(grads)), expected, rtol=2e-5, atol=1e-7)


def test_statistics_move_once_per_step(key, model):
    """From 0 and 1 by a tenth of the way to the batch's: with sigma = 0 exactly as in a plain step."""
    x, y = data(key)
    plain = nnx.clone(model)
    expected_grads = nnx.grad(loss)(plain, x, y)
    before = statistics(model)
    value, grads = nso_jax.nnx.value_and_grad(loss, sigma=0.0, num_samples=3)(key, model, x, y)
    chex.assert_trees_all_close(statistics(model), statistics(plain), rtol=1e-6)
    chex.assert_trees_all_close(arrays(grads), arrays(expected_grads), rtol=1e-5, atol=1e-7)
    moved = statistics(model)["['norm']['var'].value"] - before["['norm']['var'].value"]
    assert np.all(moved)
    assert jnp.isfinite(value)


def test_statistics_are_right_to_second_order_or_clean(key, model):
    x, y = data(key)
    plain = nnx.clone(model)
    loss(plain, x, y)
    clean = nnx.clone(model)
    nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, aux="clean")(key, clean, x, y)
    chex.assert_trees_all_close(statistics(clean), statistics(plain), rtol=1e-6)
    errors = []
    for sigma in (0.1, 0.05):
        noisy = nnx.clone(model)
        nso_jax.nnx.value_and_grad(loss, sigma=sigma)(key, noisy, x, y)
        errors.append(
            abs(statistics(noisy)["['norm']['var'].value"] - statistics(plain)["['norm']['var'].value"]).max()
        )
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_dropout_is_shared_within_a_step_and_new_in_the_next(key, model):
    """Without noise all evaluations are the same, so the stacked outputs show the masks."""
    x, y = data(key)
    before = counts(model)

    def loss_and_hidden(model, x, y):
        hidden = model.dropout(jnp.ones((4, 50)))
        return loss(model, x, y), hidden

    fn = nso_jax.nnx.value_and_grad(loss_and_hidden, sigma=0.0, num_samples=2, has_aux=True, aux="stack")
    (_, masks), _ = fn(key, model, x, y)
    assert masks.shape == (4, 4, 50)
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])
    (_, next_masks), _ = fn(key, model, x, y)
    assert not np.array_equal(next_masks[0], masks[0])
    assert counts(model) == [n + 4 for n in before]  # two calls of dropout in each of two steps


def test_random_streams_and_modules_among_the_arguments(key, model):
    x, y = data(key)
    rngs, other = nnx.Rngs(params=1, dropout=2), nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def fun(model, x, y, *, rngs, other):
        return loss(model, x, y), (jax.random.normal(rngs.dropout()), other(model(x)).mean())

    fn = nso_jax.nnx.value_and_grad(fun, sigma=0.0, has_aux=True, aux="stack")
    before = statistics(other)
    (_, (draws, _)), _ = fn(key, model, x, y, rngs=rngs, other=other)
    assert draws[0] == draws[1]
    assert [int(n[...]) for n in (rngs["dropout"].count, rngs["params"].count)] == [1, 0]
    assert not np.array_equal(statistics(other)["['mean'].value"], before["['mean'].value"])
    (_, (next_draws, _)), _ = fn(key, model, x, y, rngs=rngs, other=other)
    assert next_draws[0] != draws[0]


def test_only_wrt_is_perturbed_and_differentiated(key, model):
    x, y = data(key)
    for wrt in (nnx.PathContains("linear"), nnx.All(nnx.Param, nnx.PathContains("conv"))):
        before = arrays(nnx.state(nnx.clone(model), nnx.Param))
        expected = mean([(v, g) for v, g, _ in evaluations(key, nnx.clone(model), x, y, wrt=wrt)])
        fn = nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, num_samples=1, wrt=wrt)
        value, grads = fn(key, nnx.clone(model), x, y)
        chex.assert_trees_all_close((value, arrays(grads)), expected, rtol=2e-5, atol=1e-7)
        chex.assert_trees_all_equal(arrays(nnx.state(model, nnx.Param)), before)


def test_what_an_evaluation_leaves_alone_is_not_even_rounded(key, model):
    """The mean of three equal floats is not always that float."""
    model.scale = nnx.BatchStat(jnp.array([0.1, 0.3, 0.7]))
    fn = nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, num_samples=3, wrt=nnx.PathContains("linear"))
    before = arrays(nnx.state(nnx.clone(model), nnx.Any(nnx.PathContains("conv"), nnx.PathContains("scale"))))
    fn(key, model, *data(key))
    after = arrays(nnx.state(model, nnx.Any(nnx.PathContains("conv"), nnx.PathContains("scale"))))
    chex.assert_trees_all_equal(after, before)


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_a_jitted_training_step(key, model, platform, chunk_size):
    optimizer = nnx.Optimizer(model, optax.sgd(0.3, momentum=0.9), wrt=nnx.Param)
    fn = nso_jax.nnx.value_and_grad(loss, sigma=0.01, num_samples=3, chunk_size=chunk_size)

    @nnx.jit
    def step(model, optimizer, key, x, y):
        value, grads = fn(key, model, x, y)
        optimizer.update(model, grads)
        return value

    x, y = data(key)
    model.dropout.deterministic = True
    values = [step(model, optimizer, k, x, y) for k in jax.random.split(key, 30)]
    assert values[-1] < 0.8 * values[0]
    assert int(optimizer.step[...]) == 30


def test_in_a_pure_jitted_step(key, model):
    """`nnx.split` outside and `jax.jit` inside, as the Flax guide has it for speed."""
    graphdef, state = nnx.split(model)
    fn = nso_jax.nnx.value_and_grad(loss, sigma=SIGMA)

    @jax.jit
    def step(state, key, x, y):
        model = nnx.merge(graphdef, state)
        value, grads = fn(key, model, x, y)
        return value, grads, nnx.state(model, nnx.BatchStat)

    x, y = data(key)
    value, grads, new_statistics = step(state, key, x, y)
    expected_value, expected_grads = fn(key, model, x, y)
    chex.assert_trees_all_close(
        (value, arrays(grads)), (expected_value, arrays(expected_grads)), rtol=1e-5, atol=1e-7
    )
    chex.assert_trees_all_close(arrays(new_statistics), statistics(model), rtol=1e-5)


def in_parts(fn, key, model, x, y):
    """What `nso_jax.nnx.microbatch(fn, 4, ...)` should do, one part after another."""
    keys = jax.random.split(key, 4)
    return mean([fn(k, model, x[i::4], y[i::4]) for i, k in enumerate(keys)])


def test_microbatches_follow_one_another(key, model, platform):
    x, y = data(key)
    reference = nnx.clone(model)
    fn = nso_jax.nnx.value_and_grad(loss, sigma=SIGMA)
    value, grads = in_parts(fn, key, reference, x, y)
    before = arrays(nnx.state(nnx.clone(model), nnx.Param))
    microbatched = nnx.jit(nso_jax.nnx.microbatch(fn, 4, batch_argnums=(1, 2)))
    result = microbatched(key, model, x, y)
    chex.assert_trees_all_close((result[0], arrays(result[1])), (value, arrays(grads)), rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(statistics(model), statistics(reference), rtol=1e-5, atol=1e-6)
    assert counts(model) == counts(reference)
    assert counts(model)[0] == 4  # new dropout masks in each part
    chex.assert_trees_all_equal(arrays(nnx.state(model, nnx.Param)), before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k, m: nso_jax.nnx.microbatch(loss, 0), ValueError, "num_microbatches: .* got 0"),
        (lambda k, m: nso_jax.nnx.microbatch(loss, 3)(k, m, *data(k)), ValueError, r"args\[1\] has 8 examples, which 3 microbatches do not"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, argnums=0), TypeError, "argnums: the model is"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, method=parallel.value_and_grad, sigma=SIGMA), TypeError, "method: .* give mesh to nso_jax.nnx.value_and_grad"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, method=functools.partial(parallel.value_and_grad, mesh=1), sigma=SIGMA), TypeError, "method: .* give mesh"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, num_microbatches=2), TypeError, "num_microbatches and weight: they need mesh; .* nso_jax.nnx.microbatch"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, mesh=3), TypeError, "mesh: expected a mesh"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, num_samples=0), ValueError, "num_samples: .* got 0"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, aux="last"), ValueError, "aux: .* got 'last'"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, sigma=SIGMA, wrt=nnx.Cache)(k, m, *data(k)), ValueError, "wrt: .*Cache.* selects no variable of the ConvNet"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, sigma=-1.0)(k, m, *data(k)), ValueError, r"sigma: .* for leaf \['conv'\]\['bias'\]"),
        (lambda k, m: nso_jax.nnx.value_and_grad(loss, sigma=SIGMA)(m, *data(k)), TypeError, "key: expected a PRNG key .* got ConvNet"),
    ],
)  # fmt: skip
def test_errors(key, model, call, error, message):
    with pytest.raises(error, match=message):
        call(key, model)


def test_added_variables_are_refused_by_name(key, model):
    def sows(model, x, y):
        model.hidden = nnx.Intermediate(model.conv(x))
        return loss(model, x, y)

    with pytest.raises(
        ValueError, match="fun: it may change the model's variables but not add or remove any: hidden"
    ):
        nso_jax.nnx.value_and_grad(sows, sigma=SIGMA)(key, model, *data(key))


def test_without_flax_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "nso_jax.nnx")
    with pytest.raises(ImportError, match=r"nso_jax.nnx needs flax: pip install 'nso-jax\[flax\]'"):
        importlib.import_module("nso_jax.nnx")
