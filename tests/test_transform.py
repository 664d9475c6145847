"""The checks that optax's contrib optimizers must pass, and what else the adapter promises."""

import ast
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nso_jax
from nso_jax import noise

STATIC = (
    "num_samples",
    "antithetic",
    "sampler",
    "mask",
    "chunk_size",
    "axis_name",
    "independent_draws",
)


def parabola(dtype):
    target = jnp.array([1.0, -1.0, 1.0], dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), target, lambda p: jnp.sum((p - target) ** 2)


def rosenbrock(dtype):
    def loss(p):
        return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    return jnp.zeros(2, dtype), jnp.ones(2, dtype), loss


def matrix_parabola(dtype):
    target = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return jnp.zeros((2, 2), dtype), target, lambda p: jnp.sum((p - target) ** 2)


def mixed_tensors(dtype):
    target = (jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype))

    def loss(params):
        return sum(jnp.sum((p - t) ** 2) for p, t in zip(params, target, strict=True))

    return jax.tree.map(jnp.zeros_like, target), target, loss


def nso(sigma=1e-3, learning_rate=1e-3, **options):
    key = options.pop("key", jax.random.key(7))
    return nso_jax.nso(optax.sgd(learning_rate), sigma, key=key, **options)


def gradient_function(loss):
    return lambda params, _: jax.grad(loss)(params)


def update(tx, loss, params, state, **extra):
    grad_fn = gradient_function(loss)
    updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn, **extra)
    return optax.apply_updates(params, updates), state


def test_extra_args_are_tolerated_and_a_second_call_does_not_recompile():
    params, _, loss = rosenbrock(jnp.float32)
    tx = nso()
    step = jax.jit(functools.partial(update, tx, loss, unexpected_extra_arg=1))
    params, state = step(params, tx.init(params))
    step(params, state)
    assert step._cache_size() == 1


@pytest.mark.parametrize("target", [parabola, rosenbrock, matrix_parabola, mixed_tensors])
@pytest.mark.parametrize("options", [{}, {"antithetic": False}, {"num_samples": 2, "clean_weight": 0.5}])
def test_it_converges(target, options):
    params, final, loss = target(jnp.float32)
    tx = nso(**options)
    state = optax.tree.map_params(tx, lambda v: v, tx.init(params))
    steps = jax.jit(
        lambda carry: jax.lax.scan(lambda c, _: (update(tx, loss, *c), None), carry, length=30_000)[0]
    )
    params, state = steps((params, state))
    chex.assert_trees_all_close(params, final, rtol=3e-2, atol=3e-2)
    assert state[0].count == 30_000


@pytest.mark.parametrize("options", [{}, {"num_samples": 2, "antithetic": False, "clean_weight": 0.3}])
def test_hyperparameters_can_be_injected(options):
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grad_fn = gradient_function(lambda p: sum(jnp.sum(x**4) for x in p))
    arguments = {"sigma": 0.1, "key": jax.random.key(0), **options}
    plain = nso_jax.noise_stability(**arguments)
    injected = optax.inject_hyperparams(nso_jax.noise_stability, static_args=STATIC)(**arguments)
    results = []
    for tx in (plain, injected):
        state = jax.jit(tx.init)(params)
        step = jax.jit(functools.partial(tx.update, grad_fn=grad_fn))
        results.append(step(params, state, params))
    (updates, state), (injected_updates, injected_state) = results
    chex.assert_trees_all_close(injected_updates, updates, rtol=1e-5)
    chex.assert_trees_all_close(injected_state.inner_state, state)
    louder = injected_state._replace(hyperparams={**injected_state.hyperparams, "sigma": jnp.float32(1)})
    assert not np.allclose(injected.update(params, louder, params, grad_fn=grad_fn)[0][0], updates[0])


def recommended(call):
    """The `static_args` that the error of a call names."""
    with pytest.raises(TypeError, match=r"static_args=\(") as raised:
        call()
    return ast.literal_eval(re.search(r"static_args=(\(.*?\))", str(raised.value)).group(1))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("form", ["noise_stability", "nso", "function"])
def test_an_injected_sigma_may_change_between_steps(form, jitted):
    params, key = jnp.array([1.0, 2.0]), jax.random.key(0)
    grad_fn = gradient_function(lambda p: jnp.sum(p**4))
    options = {"num_samples": 2, "sampler": noise.rademacher, "mask": lambda p: True, "chunk_size": 1}

    optimizer = optax.identity() if form == "noise_stability" else optax.sgd(0.1, momentum=0.9)

    def plain(sigma):
        return optax.chain(nso_jax.noise_stability(sigma, key=key, **options), optimizer)

    if form == "function":
        injected = optax.inject_hyperparams(plain)(sigma=0.1)
    else:
        factory = getattr(nso_jax, form)
        make = functools.partial(factory, optimizer) if form == "nso" else factory
        arguments = {"sigma": 0.1, "key": key, **options}
        static = recommended(lambda: optax.inject_hyperparams(make)(**arguments).init(params))
        injected = optax.inject_hyperparams(make, static_args=static)(**arguments)

    maybe_jit = jax.jit if jitted else lambda f: f
    state, inner = maybe_jit(injected.init)(params), plain(0.1).init(params)
    step = maybe_jit(lambda s: injected.update(params, s, params, grad_fn=grad_fn))
    seen = []
    for sigma in (0.1, 0.5, 0.0):
        state.hyperparams["sigma"] = jnp.asarray(sigma, jnp.float32)
        updates, state = step(state)
        expected, inner = plain(sigma).update(params, inner, params, grad_fn=grad_fn)
        inner_state = (
            (state.inner_state, optax.EmptyState()) if form == "noise_stability" else state.inner_state
        )
        chex.assert_trees_all_close((updates, inner_state), (expected, inner), rtol=1e-5)
        seen.append(np.asarray(updates))
    assert not np.allclose(seen[0], seen[1])
    assert not jitted or step._cache_size() == 1


@pytest.mark.parametrize("when", ["init", "update"])
@pytest.mark.parametrize(
    ("arguments", "static", "named"),
    [
        ({}, (), "num_samples, sampler"),
        ({}, ("num_samples",), "sampler"),
        ({"num_samples": 4}, ("sampler",), "num_samples"),
        ({"num_samples": lambda count: 4}, ("sampler",), "num_samples"),
        ({"chunk_size": 2}, ("sampler", "num_samples"), "chunk_size"),
        ({"mask": lambda p: jax.tree.map(lambda w: True, p)}, ("sampler", "num_samples"), "mask"),
        ({"sigma": noise.relative(0.1)}, ("sampler", "num_samples"), "sigma"),
        ({"sigma": lambda count: noise.relative(0.1)}, ("sampler", "num_samples"), "sigma"),
    ],
)
@pytest.mark.parametrize("partially", [False, True])
def test_what_cannot_be_injected_is_named_with_all_that_is_to_be_static(
    arguments, static, named, when, partially
):
    key, params = jax.random.key(0), jnp.ones(2)
    factory = nso_jax.noise_stability
    arguments = {"sigma": 0.1, "key": key, **arguments}
    if partially:
        factory = functools.partial(factory, antithetic=False)
    tx = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    right = optax.inject_hyperparams(factory, static_args=STATIC)(sigma=0.1, key=key)
    # What `init` would have put into the state.
    injected = {"num_samples": 1, "sampler": noise.normal} | arguments
    injected = {name: value for name, value in injected.items() if name not in static}
    states = {name: optax.schedules.WrappedSchedule(f).init() for name, f in injected.items() if callable(f)}
    hyperparams = {
        name: jnp.asarray(x) for name, x in injected.items() if isinstance(x, int | float | jax.Array)
    }
    calls = {
        "init": lambda: tx.init(params),
        "update": lambda: jax.jit(functools.partial(tx.update, grad_fn=lambda p, _: p))(
            params, right.init(params)._replace(hyperparams=hyperparams, hyperparams_states=states), params
        ),
    }
    with pytest.raises(TypeError, match=rf"^{named}: optax.inject_hyperparams makes .*static_args=\("):
        calls[when]()


def test_a_number_of_samples_injected_into_another_function_is_named():
    def factory(sigma, draws):
        return nso_jax.nso(optax.sgd(0.1), sigma, key=jax.random.key(0), num_samples=draws)

    with pytest.raises(
        TypeError, match=r"num_samples: .* got int32\[\]. .* name num_samples in its static_args"
    ):
        optax.inject_hyperparams(factory)(sigma=0.1, draws=2).init(jnp.ones(2))
    optax.inject_hyperparams(factory, static_args="draws")(sigma=0.1, draws=2).init(jnp.ones(2))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtype_is_preserved(dtype, x64):
    params = jnp.array([1.0, 2.0], dtype)
    tx = nso_jax.noise_stability(0.1, key=jax.random.key(0), num_samples=3, clean_weight=0.5)
    grad_fn = gradient_function(lambda p: jnp.sum(p**2))
    updates, _ = jax.jit(functools.partial(tx.update, grad_fn=grad_fn))(params, tx.init(params), params)
    assert updates.dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_state_is_stable_under_cond(dtype, x64):
    params, _, loss = parabola(dtype)
    tx = nso()

    @jax.jit
    def step(params, state):
        happens = jax.random.bernoulli(jax.random.key(0))
        return jax.lax.cond(happens, lambda: update(tx, loss, params, state), lambda: (params, state))

    state = tx.init(params)
    for _ in range(2):
        params, new_state = step(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
        assert params.dtype == dtype
        state = new_state


def test_the_state_may_be_donated():
    key, params = jax.random.key(0), jnp.ones(2)
    tx = nso(key=key)
    step = jax.jit(lambda s, p: update(tx, lambda p: jnp.sum(p**2), p, s), donate_argnums=0)
    first, _ = step(tx.init(params), params)
    second, _ = step(tx.init(params), params)
    np.testing.assert_array_equal(first, second)
    assert jax.random.normal(key).shape == ()


def test_abstract_init():
    tx = nso()
    params = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    abstract = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(jnp.zeros((2, 3))))


# --- sigma: number, schedule, relative ----------------------------------------------------------------


def one_update(sigma, params, count=0, **options):
    tx = nso_jax.noise_stability(sigma, key=jax.random.key(3), **options)
    state = tx.init(params)._replace(count=jnp.int32(count))
    grad_fn = gradient_function(lambda p: jnp.sum(p**4))
    return tx.update(params, state, params, grad_fn=grad_fn)


def test_sigma_may_be_a_schedule_of_the_states_count():
    params = jnp.array([1.0, 2.0])
    schedule = optax.linear_schedule(0.2, 0.0, 4)
    for count in (0, 2, 4):
        chex.assert_trees_all_close(
            one_update(schedule, params, count), one_update(schedule(count), params, count), rtol=1e-6
        )
    np.testing.assert_allclose(one_update(schedule, params, 4)[0], 4 * params**3, rtol=1e-6)


def test_sigma_may_be_relative_and_scheduled():
    params = jnp.array([1.0, 2.0])
    expected = one_update(0.3 * params, params)
    chex.assert_trees_all_close(one_update(noise.relative(0.3), params), expected, rtol=1e-6)
    scheduled = one_update(lambda count: noise.relative(0.3 * jnp.exp(-count.astype(jnp.float32))), params)
    chex.assert_trees_all_close(scheduled, expected, rtol=1e-6)


def test_draws_are_those_of_value_and_grad():
    params, key = jnp.array([1.0, 2.0]), jax.random.key(3)
    options = {"num_samples": 3, "sampler": noise.uniform, "clean_weight": 0.25}
    updates, state = one_update(0.1, params, 5, **options)
    fn = nso_jax.value_and_grad(lambda p: jnp.sum(p**4), sigma=0.1, **options)
    clean_instead_of_params = 0.25 * (params - 4 * params**3)
    expected = fn(jax.random.fold_in(key, 5), params)[1] + clean_instead_of_params
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert state.count == 6
    np.testing.assert_array_equal(state.rng_key, jax.random.key_data(key))


def test_grad_fn_gets_the_evaluations_index():
    batches = jnp.arange(12.0).reshape(6, 2)
    params = jnp.ones(2)
    for chunk_size in (1, 2, 3):
        tx = nso_jax.noise_stability(0.1, key=jax.random.key(0), num_samples=3, chunk_size=chunk_size)
        updates, _ = tx.update(params, tx.init(params), params, grad_fn=lambda _, i: batches[i])
        np.testing.assert_allclose(updates, batches.mean(0))


def test_incoming_updates_are_ignored_unless_weighted():
    """And so XLA drops the clean gradient: 2 evaluations are compiled, not 3."""
    params, batch = jnp.ones((64, 64)), jnp.ones((32, 64))
    grad_fn = lambda p, _: jax.grad(lambda p: jnp.sum(jnp.tanh(batch @ p) ** 2))(p)  # noqa: E731

    def flops(clean_weight):
        tx = nso_jax.noise_stability(0.1, key=jax.random.key(0), clean_weight=clean_weight)
        step = jax.jit(lambda p, s: tx.update(grad_fn(p, 0), s, p, grad_fn=grad_fn)[0])
        hlo = step.lower(params, tx.init(params)).compile().as_text()
        return hlo.count(" dot(") + hlo.count("__onednn$matmul") + hlo.count('custom_call_target="__')

    assert flops(0.0) * 3 == flops(0.5) * 2


# --- other transformations ----------------------------------------------------------------------------


def test_multi_steps_goes_inside(standard_promotion):
    params, loss = jnp.array([1.0, 2.0]), lambda p, x: jnp.sum(x * p**4)
    accumulate = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = optax.chain(nso_jax.noise_stability(0.1, key=jax.random.key(0)), accumulate)
    state, expected = tx.init(params), []
    for n, x in enumerate((1.0, 3.0)):
        grad_fn = lambda p, _: jax.grad(loss)(p, x)  # noqa: B023, E731
        updates, state = jax.jit(functools.partial(tx.update, grad_fn=grad_fn))(params, state, params)
        fn = nso_jax.value_and_grad(loss, sigma=0.1)
        expected.append(fn(jax.random.fold_in(jax.random.key(0), n), params, x)[1])
        if n == 0:
            np.testing.assert_array_equal(updates, 0)
    np.testing.assert_allclose(updates, -0.1 * sum(expected) / 2, rtol=1e-5)


@pytest.mark.parametrize("jitted", [False, True])
def test_four_microbatches_of_multi_steps_give_their_mean(jitted, standard_promotion):
    """The gradients 1, 2, 3 and 10; around the adapter it would be the last alone."""
    maybe_jit = jax.jit if jitted else lambda f: f
    accumulate = optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation()
    tx = optax.chain(nso_jax.noise_stability(0.1, key=jax.random.key(0)), accumulate)

    def step(x, state, w):
        return tx.update(jnp.zeros(()), state, w, grad_fn=lambda w, _: jax.grad(lambda w: w * x)(w))

    w = jnp.zeros(())
    state, total = maybe_jit(tx.init)(w), 0.0
    for x in (1.0, 2.0, 3.0, 10.0):
        updates, state = maybe_jit(step)(x, state, w)
        total += float(updates)
    assert total == -4.0


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("between", [lambda tx: tx, lambda tx: optax.masked(optax.chain(tx), {"w": True})])
@pytest.mark.parametrize("skips", [None, optax.skip_not_finite])
def test_multi_steps_outside_is_refused(jitted, between, skips):
    maybe_jit = jax.jit if jitted else lambda f: f
    params = {"w": jnp.ones(2)}
    inner = between(nso())
    tx = optax.MultiSteps(inner, 2, should_skip_update_fn=skips)
    message = r"^noise_stability: optax.MultiSteps around it .* put it inside, optax.chain\(noise_stability"
    with pytest.raises(ValueError, match=message):
        maybe_jit(tx.init)(params)
    state = optax.MultiSteps(optax.identity(), 2, should_skip_update_fn=skips).init(params)
    state = state._replace(inner_opt_state=inner.init(params))
    with pytest.raises(ValueError, match=message):
        maybe_jit(functools.partial(tx.update, grad_fn=lambda p, _: p))(params, state, params)


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda tx: optax.contrib.mechanize(tx, s_init=0.1),
        lambda tx: optax.contrib.schedule_free(tx, learning_rate=0.1),
        optax.flatten,
        optax.contrib.split_real_and_imaginary,
        lambda tx: optax.conditionally_transform(tx, lambda step: step % 2 == 1),
        lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 1),
        lambda tx: optax.chain(tx, optax.apply_every(2)),
    ],
    ids=["mechanize", "schedule_free", "flatten", "split", "transform", "mask", "apply_every"],
)
def test_wrappers_inside_see_the_averaged_gradient(wrapper, standard_promotion):
    """Whatever the incoming updates are."""
    start, loss = {"w": jnp.array([1.0, 2.0])}, lambda p: jnp.sum(p["w"] ** 4)
    grad_fn = gradient_function(loss)
    inner = wrapper(optax.sgd(0.01))
    tx = optax.chain(nso_jax.noise_stability(0.1, key=jax.random.key(0)), inner)
    fn = nso_jax.value_and_grad(loss, sigma=0.1)
    params = expected = start
    state, inner_state = tx.init(params), inner.init(params)
    for n in range(4):
        ignored = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(ignored, state, params, grad_fn=grad_fn)
        averaged = fn(jax.random.fold_in(jax.random.key(0), n), expected)[1]
        inner_updates, inner_state = inner.update(averaged, inner_state, expected)
        params, expected = (
            optax.apply_updates(params, updates),
            optax.apply_updates(expected, inner_updates),
        )
        chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_apply_if_finite_goes_inside():
    params = jnp.array([1.0, 2.0])
    tx = optax.chain(
        nso_jax.noise_stability(0.1, key=jax.random.key(0)), optax.apply_if_finite(optax.sgd(0.1), 3)
    )
    bad = lambda p, i: jnp.where(i == 1, jnp.nan, p)  # noqa: E731
    updates, state = tx.update(params, tx.init(params), params, grad_fn=bad)
    np.testing.assert_array_equal(updates, 0)
    updates, _ = tx.update(params, state, params, grad_fn=lambda p, _: p)
    assert np.all(np.isfinite(updates))
    assert np.all(updates)


def test_masked_goes_inside_and_says_so_outside():
    params = {"w": jnp.ones(2), "frozen": jnp.ones(2)}
    mask = {"w": True, "frozen": False}
    grad_fn = gradient_function(lambda p: jnp.sum(p["w"] ** 4) + jnp.sum(p["frozen"] ** 2))
    inside = optax.chain(
        nso_jax.noise_stability(0.1, key=jax.random.key(0), mask=mask),
        optax.masked(optax.sgd(0.1), mask),
        optax.masked(optax.set_to_zero(), {"w": False, "frozen": True}),
    )
    updates, _ = inside.update(params, inside.init(params), params, grad_fn=grad_fn)
    np.testing.assert_array_equal(updates["frozen"], 0)
    assert np.all(updates["w"])
    outside = optax.masked(nso(), mask)
    with pytest.raises(ValueError, match=r"params: some are optax.MaskedNode.*Put optax.masked .* inside"):
        outside.update(params, outside.init(params), params, grad_fn=grad_fn)


def test_the_state_is_made_of_plain_arrays():
    """So that checkpoints hold it: typed and legacy keys give the same one."""
    states = [nso(key=key).init(jnp.ones(2))[0] for key in (jax.random.key(7), jax.random.PRNGKey(7))]
    chex.assert_trees_all_equal(*states)
    assert [leaf.dtype for leaf in jax.tree.leaves(states[0])] == [jnp.int32, jnp.uint32]
    rbg = nso(key=jax.random.key(7, impl="rbg"))
    params, state = update(rbg, lambda p: jnp.sum(p**2), jnp.ones(2), rbg.init(jnp.ones(2)))
    assert np.all(np.isfinite(params))
    assert state[0].rng_key.shape == (4,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nso(num_samples=0), ValueError, "num_samples: expected an int >= 1, got 0"),
        (lambda: nso(clean_weight=2), ValueError, r"clean_weight: expected a number in \[0, 1\], got 2"),
        (lambda: nso(key=7), TypeError, r"key: expected a PRNG key such as jax.random.key\(0\), got 7"),
        (lambda: nso(chunk_size=0), ValueError, "chunk_size: expected an int >= 1, got 0"),
        (
            lambda: one_update(-1.0, jnp.ones(2)),
            ValueError,
            "sigma: expected a standard deviation >= 0.*got -1",
        ),
        (lambda: nso().update(jnp.ones(2), nso().init(None), grad_fn=abs), ValueError, "params: .* got None"),
        (
            lambda: nso().update(jnp.ones(2), nso().init(None), jnp.ones(2)),
            TypeError,
            "grad_fn: .* got NoneType",
        ),
        (
            lambda: nso().update(jnp.ones(2), nso().init(None), jnp.ones(2, int), grad_fn=abs),
            TypeError,
            r"params: leaf \(the whole\) is int32\[2\]",
        ),
        (
            lambda: nso().update({}, nso().init(None), {"w": jnp.ones(2)}, grad_fn=abs),
            ValueError,
            r"updates: expected a pytree like params, .*'w'.*, got PyTreeDef\(\{\}\)",
        ),
        (
            lambda: nso().update(
                [jnp.ones(2)], nso().init(None), [jnp.ones(2)], grad_fn=lambda *_: [jnp.ones(3)]
            ),
            ValueError,
            r"grad_fn: leaf \[0\] is float32\[3\], expected the shape of float32\[2\]",
        ),
        (
            lambda: nso_jax.nso("adam", 0.1, key=jax.random.key(0)),
            TypeError,
            "optimizer: expected an optax transformation, got 'adam'",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
