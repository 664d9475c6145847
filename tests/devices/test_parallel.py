"""What a function gives over a mesh is the mean of what each device would give for its part of the batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nso_jax
import nso_jax.nnx
from nso_jax import noise, parallel, sharpness
from tests.devices.meshes import MAPS, P, mesh_of, of_device, on_devices
from tests.test_parallel import SIGMA, W, X, averaged, linear, loss, make_batch, make_params, mean_of


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("independent", [True, False])
def test_microbatches_on_devices_are_averaged_once(key, how, independent, platform):
    params, batch, inner = make_params(), make_batch(), averaged()
    one = jax.jit(parallel.microbatch(inner, 2))
    keys = [jax.random.fold_in(key, i) if independent else key for i in range(8)]
    on_device = [one(k, params, of_device(batch, i)) for i, k in enumerate(keys)]
    value, grads = mean_of(on_device)
    expected = (value[0], value[1]["error"]), grads

    def fn(key, params, batch):
        local = parallel.microbatch(inner, 2, axis_name="data", independent_draws=independent)
        (value, aux), grads = local(key, params, batch)
        return (value, aux["error"]), grads

    result = on_devices(fn, how)(key, params, batch)
    chex.assert_trees_all_close(result, expected, rtol=2e-5, atol=1e-6)


# --- plain jit on a mesh ------------------------------------------------------------------------------


def on_mesh(mesh, **options):
    return parallel.value_and_grad(loss, **{"sigma": SIGMA, "mesh": mesh, "has_aux": True, **options})


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize(("count", "num_samples"), [(1, 2), (2, 1)])
def test_a_mesh_gives_the_mean_of_what_each_device_would(key, independent, count, num_samples):
    params, batch = make_params(), make_batch()
    local = jax.jit(parallel.microbatch(averaged(num_samples=num_samples), count))
    keys = [jax.random.fold_in(key, i) if independent else key for i in range(4)]
    expected = mean_of([local(k, params, of_device(batch, i, 4), scale=2.0) for i, k in enumerate(keys)])
    fn = on_mesh(
        mesh_of(4, 2), independent_draws=independent, num_microbatches=count, num_samples=num_samples
    )
    for call in (fn, jax.jit(fn)):
        result = call(key, params, batch, scale=2.0)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
        chex.assert_trees_all_close(result, expected, rtol=2e-5, atol=1e-6)


def test_params_sharded_over_a_model_axis_get_the_same_noise(key):
    mesh, params, batch = mesh_of(4, 2), make_params(), make_batch()
    specs = {"w1": P(None, "model"), "w2": P("model"), "b": P()}
    sharded = jax.tree.map(lambda w, spec: jax.device_put(w, jax.NamedSharding(mesh, spec)), params, specs)
    fn = jax.jit(on_mesh(mesh))
    value, grads = fn(key, sharded, batch)
    chex.assert_trees_all_close((value, grads), fn(key, params, batch), rtol=2e-5, atol=1e-6)
    assert grads["w1"].sharding.spec == specs["w1"]


def test_over_two_axes_of_the_mesh(key):
    params, batch = make_params(), make_batch()
    one = on_mesh(mesh_of(8))(key, params, batch)
    two = on_mesh(mesh_of(4, 2), axis_name=("data", "model"))(key, params, batch)
    chex.assert_trees_all_close(two, one, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(8,), (4, 2)])
def test_explicit_meshes(key, sizes):
    """The axes that jax.make_mesh makes by default."""
    mesh = mesh_of(*sizes, kind=jax.sharding.AxisType.Explicit)
    params, batch = make_params(), make_batch()
    expected = on_mesh(mesh_of(*sizes))(key, params, batch)
    sharded = jax.device_put(batch, jax.NamedSharding(mesh, P("data")))
    for x in (batch, sharded):
        for fn in (on_mesh(mesh), jax.jit(on_mesh(mesh))):
            chex.assert_trees_all_close(fn(key, params, x), expected, rtol=2e-5, atol=1e-6)


def test_a_mesh_without_devices_gives_shapes(key):
    """As for a program that is compiled for other machines."""
    mesh, args = mesh_of(8), (key, make_params(), make_batch())
    shapes = jax.eval_shape(on_mesh(mesh.abstract_mesh), *args)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, jax.eval_shape(on_mesh(mesh), *args))


def test_keys_that_a_loss_returns_are_those_of_the_first_device(key):
    def returning(params, batch, rng):
        return loss(params, batch)[0], rng

    fn = parallel.value_and_grad(returning, sigma=SIGMA, mesh=mesh_of(8), has_aux=True)
    rng = jax.random.key(5)
    (_, returned), _ = fn(key, make_params(), make_batch(), rng)
    assert returned == jax.random.fold_in(rng, 0)


def test_a_method_may_have_no_signature(key):
    class Method:
        __signature__ = "unknown"

        def __call__(self, fun, **options):
            return nso_jax.value_and_grad(fun, **options)

    args = key, make_params(), make_batch()
    chex.assert_trees_all_equal(on_mesh(mesh_of(8), method=Method())(*args), on_mesh(mesh_of(8))(*args))


def test_static_arguments_stay_python_values(key):
    def flagged(params, batch, train, names):
        assert train is True
        assert names == ("x",)
        return loss(params, batch)[0]

    fn = parallel.value_and_grad(flagged, sigma=SIGMA, mesh=mesh_of(8))
    chex.assert_tree_all_finite(fn(key, make_params(), make_batch(), True, ("x",)))


def test_outside_jit_it_compiles_once(key):
    traced = []

    def counted(params, batch, train=True):
        traced.append(train)
        return loss(params, batch)[0] * (2 if train is True else 1)

    fn = parallel.value_and_grad(counted, sigma=SIGMA, mesh=mesh_of(8), num_microbatches=2)
    params, batch = make_params(), make_batch()
    first, _ = fn(key, params, batch)
    count = len(traced)
    assert fn(key, params, batch)[0] == first
    assert fn(jax.random.key(3), jax.tree.map(lambda w: 2 * w, params), batch)[0] != first
    assert len(traced) == count
    for flag, factor in ((False, 1), (1, 1), (True, 2), (False, 1)):  # 1 == True, but it is not True
        np.testing.assert_allclose(fn(key, params, batch, flag)[0], first * factor / 2, rtol=1e-6)
    assert len(traced) == 4 * count
    fn(key, params, make_batch(128))
    assert len(traced) == 5 * count
    fn(key, params, batch)
    assert len(traced) == 5 * count


def test_values_that_cannot_be_hashed_are_compiled_anew(key):
    class Scale:
        __hash__ = None
        factor = 1.0

    def scaled(params, batch, scale):
        return scale.factor * loss(params, batch)[0]

    fn = parallel.value_and_grad(scaled, sigma=SIGMA, mesh=mesh_of(8))
    scale = Scale()
    before, _ = fn(key, make_params(), make_batch(), scale)
    scale.factor = 3.0
    np.testing.assert_allclose(fn(key, make_params(), make_batch(), scale)[0], 3 * before, rtol=1e-6)


def test_one_function_in_two_traces(key):
    """What it closes over is a tracer of each in turn."""
    held = {}
    fn = parallel.value_and_grad(
        lambda params, batch: held["scale"] * loss(params, batch)[0], sigma=SIGMA, mesh=mesh_of(8)
    )

    params, batch = make_params(), make_batch()

    def step(scale):
        held["scale"] = scale
        return fn(key, params, batch)[0]

    one = jax.jit(step)(1.0)
    np.testing.assert_allclose(jax.jit(functools.partial(step))(2.0), 2 * one, rtol=1e-6)


# --- weights and auxiliary output ---------------------------------------------------------------------


def tokens(count=64, time=5):
    """Sequences of uneven lengths: those of the first eighth have no token at all."""
    rng = np.random.default_rng(3)
    lengths = np.where(np.arange(count) < count // 8, 0, rng.integers(0, time + 1, count))
    mask = np.arange(time) < lengths[:, None]
    return jnp.asarray(rng.normal(size=(count, time, 6)), jnp.float32), jnp.asarray(mask)


def token_loss(params, x, mask):
    losses = jnp.square(jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b"])
    return jnp.sum(jnp.where(mask, losses, 0)) / jnp.sum(mask.astype(jnp.float32))


def token_count(params, x, mask):
    return mask.sum()


@pytest.mark.parametrize("count", [1, 4])
def test_a_mean_over_tokens_is_that_of_one_device(key, platform, count):
    """The first device has only padding, where the loss is 0 / 0."""
    params, (x, mask) = make_params(), tokens()
    plain = jax.value_and_grad(token_loss)(params, x, mask)
    options = {"batch_argnums": (1, 2), "weight": token_count}
    on_one = parallel.microbatch(nso_jax.value_and_grad(token_loss, sigma=0.0), count, **options)
    on_mesh_ = parallel.value_and_grad(
        token_loss, sigma=0.0, mesh=mesh_of(8), num_microbatches=count, **options
    )
    for fn in (on_one, on_mesh_):
        chex.assert_trees_all_close(jax.jit(fn)(key, params, x, mask), plain, rtol=2e-5, atol=1e-6)
    rival = parallel.value_and_grad(
        token_loss, mesh=mesh_of(8), method=sharpness.sam, rho=0.0, num_microbatches=count, **options
    )
    chex.assert_trees_all_close(jax.jit(rival)(key, params, x, mask), plain, rtol=2e-5, atol=1e-6)


def test_padding_alone_has_no_mean(key):
    params, (x, mask) = make_params(), tokens()
    fn = parallel.value_and_grad(
        token_loss, sigma=SIGMA, mesh=mesh_of(8), batch_argnums=(1, 2), weight=token_count
    )
    value, grads = fn(key, params, x, jnp.zeros_like(mask))
    assert jnp.isnan(value)
    assert all(jnp.isnan(g).all() for g in jax.tree.leaves(grads))


def test_what_is_not_finite_where_it_counts_stays(key):
    params, (x, mask) = make_params(), tokens()
    fn = parallel.value_and_grad(
        token_loss, sigma=SIGMA, mesh=mesh_of(8), batch_argnums=(1, 2), weight=token_count
    )
    real = np.argwhere(np.asarray(mask))[-1]
    assert jnp.isnan(fn(key, params, x.at[tuple(real)].set(jnp.nan), mask)[0])
    assert jnp.isfinite(fn(key, params, x.at[0].set(jnp.nan), mask)[0])  # padding, which the loss leaves out


def metrics(params, batch):
    outputs = jnp.tanh(batch.x @ params["w1"]) @ params["w2"] + params["b"]
    right = jnp.sign(outputs) == jnp.sign(batch.y)
    aux = {"right": right.sum(), "each": right, "flag": right, "loss": (outputs - batch.y) ** 2, "y": batch.y}
    return jnp.mean((outputs - batch.y) ** 2), aux


MODES = {"right": "sum", "each": "concatenate", "flag": "sum", "loss": "concatenate", "y": "concatenate"}


@pytest.mark.parametrize("method", [nso_jax.value_and_grad, sharpness.sam])
@pytest.mark.parametrize("count", [1, 2])
def test_metrics_are_those_of_the_whole_batch(key, platform, method, count):
    params, batch = make_params(), make_batch()
    _, plain = metrics(params, batch)
    strength = {"rho": 0.0} if method is sharpness.sam else {"sigma": 0.0}
    evaluations = 1 if method is sharpness.sam else 2
    options = {"has_aux": True, "aux": MODES, **strength}
    on_one = parallel.microbatch(method(metrics, **options), count, aux=MODES)
    for fn in (
        on_one,
        parallel.value_and_grad(metrics, mesh=mesh_of(8), method=method, num_microbatches=count, **options),
    ):
        (_, aux), _ = jax.jit(fn)(key, params, batch)
        assert aux["right"] == evaluations * plain["right"]
        assert aux["right"].dtype == jnp.int32
        assert aux["flag"].dtype == jnp.int32
        size = len(batch.y) // (count if fn is on_one else 8 * count)
        assert aux["flag"].shape == (size,)
        assert aux["flag"].sum() == evaluations * plain["right"]
        np.testing.assert_array_equal(aux["each"], plain["each"])
        np.testing.assert_array_equal(aux["y"], batch.y)
        np.testing.assert_allclose(aux["loss"], plain["loss"], rtol=1e-5, atol=1e-6)


def test_what_is_concatenated_stays_sharded():
    mesh = mesh_of(8)
    fn = on_mesh(mesh, aux={"error": "mean", "count": "sum", "first": "mean"})
    (_, aux), _ = fn(jax.random.key(0), make_params(), make_batch())
    assert aux["count"] == 2 * 64
    each = parallel.value_and_grad(
        metrics, sigma=SIGMA, mesh=mesh, has_aux=True, aux="concatenate", num_microbatches=1
    )
    with pytest.raises(ValueError, match=r"aux: leaf .*\['right'\] of what fn returns is int32\[\], but to"):
        each(jax.random.key(0), make_params(), make_batch())
    (_, aux), _ = parallel.value_and_grad(metrics, sigma=SIGMA, mesh=mesh, has_aux=True, aux=MODES)(
        jax.random.key(0), make_params(), make_batch()
    )
    assert aux["loss"].sharding.spec == P(("data",))


def test_typed_keys_are_folded(key):
    """Dropout masks differ between devices and between parts, and are those that the docs name."""

    def seen(params, batch, rng):
        bits = jax.random.bits(rng, batch.y.shape)
        return loss(params, batch)[0], bits

    params, batch, rng = make_params(), make_batch(16), jax.random.key(5)
    fn = parallel.value_and_grad(
        seen, sigma=SIGMA, mesh=mesh_of(4, 2), num_microbatches=2, has_aux=True, aux="concatenate"
    )
    (_, bits), _ = fn(key, params, batch, rng)
    by_part = bits.reshape(4, 2, 2).swapaxes(1, 2)  # device, part, example
    for d in range(4):
        for i in range(2):
            own = jax.random.fold_in(jax.random.fold_in(rng, d), i)
            np.testing.assert_array_equal(by_part[d, i], jax.random.bits(own, (2,)))
    legacy = parallel.value_and_grad(seen, sigma=SIGMA, mesh=mesh_of(8), has_aux=True, aux="concatenate")
    (_, bits), _ = legacy(key, params, batch, jax.random.PRNGKey(5))
    np.testing.assert_array_equal(bits[:2], bits[2:4])


def test_losses_that_scan_from_zeros(key):
    def recurrent(w, x):
        carry, _ = jax.lax.scan(
            lambda h, x: (jnp.tanh(h @ w + x), None), jnp.zeros((x.shape[0], 3)), x.swapaxes(0, 1)
        )
        return jnp.mean(carry**2)

    w, x = jnp.eye(3), jnp.linspace(-1, 1, 8 * 4 * 3).reshape(8, 4, 3)
    fn = jax.jit(parallel.value_and_grad(recurrent, sigma=0.0, mesh=mesh_of(8)))
    chex.assert_trees_all_close(fn(key, w, x), jax.value_and_grad(recurrent)(w, x), rtol=1e-5)


# --- a model axis inside shard_map --------------------------------------------------------------------


@pytest.mark.parametrize("checked", [True, False])
def test_each_shard_of_a_param_draws_for_itself(key, checked):
    """Column-parallel w1 and row-parallel w2, as in tensor parallelism; b is whole on every device."""
    specs = {"w1": P(None, "model"), "w2": P("model"), "b": P()}

    def local_loss(params, batch):
        hidden = jnp.tanh(batch.x @ params["w1"])
        prediction = jax.lax.psum(hidden @ params["w2"], "model") + params["b"]
        return jnp.mean((prediction - batch.y) ** 2)

    def per_shard(key, params):
        return noise.perturbation(key, params, SIGMA, param_specs=specs)

    options = {"axis_name": "data"} | ({} if checked else {"param_specs": specs})
    fn = nso_jax.value_and_grad(local_loss, sigma=SIGMA, **options)
    mesh, params, batch = mesh_of(4, 2), make_params(), make_batch()
    mapped = jax.shard_map(
        fn, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs), check_vma=checked
    )
    value, grads = jax.jit(mapped)(key, params, batch)

    # The whole noise, put together from the shards, and then everything on one device.
    draw = jax.shard_map(per_shard, mesh=mesh, in_specs=(P(), specs), out_specs=specs)
    values = []
    for i in range(4):
        device_key = jax.random.split(jax.random.fold_in(key, i), 1)[0]
        u = jax.jit(draw)(device_key, params)
        assert not np.allclose(u["w2"][:8], u["w2"][8:])
        part = of_device(batch, i, 4)
        whole = jax.value_and_grad(lambda p, part=part: loss(p, part)[0])
        values += [whole(noise.perturb(params, u, sign)) for sign in (1, -1)]
    expected = mean_of(values)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    if checked:  # else JAX itself gives a psum the wrong transpose: factors of the axis size
        chex.assert_trees_all_close(grads, expected[1], rtol=1e-4, atol=1e-6)


# --- variance -----------------------------------------------------------------------------------------


def noise_variance(fn, params, batch, draws=300):
    grads = jax.jit(jax.vmap(lambda key: fn(key, params, batch)))(jax.random.split(jax.random.key(4), draws))
    flat = np.concatenate([np.asarray(g).reshape(draws, -1) for g in jax.tree.leaves(grads)], axis=1)
    squares = (flat - flat.mean(0)) ** 2
    total = squares.sum(1)
    return total.sum() / (draws - 1), total.std(ddof=1) / np.sqrt(draws)


def quartic(w, x):
    """Of every example the same: parts differ in their noise alone."""
    return jnp.mean(x) * jnp.sum(w**4)


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("of", ["microbatches", "devices"])
def test_the_variance_falls_as_one_over_the_parts(parts, of):
    w, x = jnp.linspace(0.5, 1.5, 400), jnp.ones(8)
    one = lambda *args: nso_jax.value_and_grad(quartic, sigma=0.3)(*args)[1]  # noqa: E731
    if of == "microbatches":
        several = parallel.microbatch(one, parts)
    else:
        fn = parallel.value_and_grad(quartic, sigma=0.3, mesh=mesh_of(parts))
        several = lambda *args: fn(*args)[1]  # noqa: E731
    (small, small_error), (large, large_error) = noise_variance(several, w, x), noise_variance(one, w, x)
    ratio, error = parts * small / large, np.hypot(small_error / small, large_error / large)
    assert abs(ratio - 1) < min(0.1, 5 * error)


# --- bad input ----------------------------------------------------------------------------------------


def meshed(**options):
    return parallel.value_and_grad(linear, **{"sigma": SIGMA, "mesh": mesh_of(4, 2), **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: meshed(mesh=4), TypeError, r"mesh: expected a mesh such as jax.make_mesh gives, got 4 \(int\)"),
        (lambda _: meshed(axis_name="batch"), ValueError, r"axis_name: 'batch' is none of the mesh's axes \('data', 'model'\)"),
        (lambda _: meshed(num_samples=0), ValueError, "num_samples: expected an int >= 1, got 0"),
        (lambda k: meshed()(k, W, X), ValueError, "10 examples, which 4 devices do not divide; drop the last 2 or add 2"),
        (lambda k: meshed(num_microbatches=2)(k, W, X), ValueError, "10 examples, which 2 microbatches times 4 devices do not divide"),
        (lambda k: meshed(batch_argnums=(0, 1))(k, {"w": jnp.ones(8)}, jnp.ones((8, 8))), ValueError, "batch_argnums: argument 0 is differentiated"),
        (lambda k: meshed(argnums=(0, 1))(k, W, X[:8]), ValueError, "batch_argnums: argument 1 is differentiated"),
        (lambda _: meshed(method=nso_jax.nnx.value_and_grad), TypeError, r"method: NNX modules .* nso_jax.nnx.value_and_grad\(fun, ..., mesh=mesh\)"),
        (lambda _: meshed(method=functools.partial(nso_jax.nnx.value_and_grad, wrt=1)), TypeError, "method: NNX modules"),
        (lambda _: meshed(sigma=None, method=sharpness.sam, rho=1, global_ascent=True, weight=len), ValueError, "weight: with global_ascent"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_leaf(key, call, error, message):
    with pytest.raises(error, match=message):
        call(key)
