"""Random meshes against one device: the same noise, and collectives as JAX has them under vmap."""

import functools
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import nso_jax
import nso_jax.nnx
from nso_jax import noise, parallel, sharpness

P = jax.P
AXIS = "data"
FEATURES = 3

# 105 cases in all by default, 2,100 nightly. Each compiles two programs, so a failure is shown as it was found.
some = settings(
    max_examples=15 if settings.default.max_examples < 100 else 300,
    phases=[Phase.explicit, Phase.generate],
)


class Batch(NamedTuple):
    x: Any
    y: Any
    mask: Any


@pytest.fixture(autouse=True)
def strict():
    """Instead of the fixture for the library's own tests: losses here are as users write them."""


def waves(key, shape, dtype):
    """Noise that differs with the key, and compiles at once."""
    words = jax.random.key_data(key) % 1009
    phase = jnp.sum(words.astype(dtype))
    return jnp.sqrt(jnp.asarray(2, dtype)) * jnp.sin(
        jnp.arange(np.prod(shape), dtype=dtype).reshape(shape) + phase
    )


# --- losses, with collectives and without -------------------------------------------------------------


def outputs(params, batch, rng):
    x = batch.x if rng is None else batch.x * jax.random.bernoulli(rng, 0.7, batch.x.shape)
    return jnp.tanh(x @ params["w"]) @ params["v"]


def squares(params, batch, rng):
    return (outputs(params, batch, rng) - batch.y) ** 2


def local(params, batch, rng):
    return jnp.mean(squares(params, batch, rng))


def masked(params, batch, rng):
    return jnp.sum(batch.mask * squares(params, batch, rng)) / jnp.sum(batch.mask)


def averaged(params, batch, rng):
    return jax.lax.pmean(local(params, batch, rng), AXIS)


def shared_count(params, batch, rng):
    total = jnp.sum(batch.mask * squares(params, batch, rng))
    return jax.lax.psum(total, AXIS) / (jax.lax.psum(jnp.sum(batch.mask), AXIS) + 1)


def own_share(params, batch, rng):
    """A count from all devices, and the own losses only."""
    count = jax.lax.pmean(jnp.sum(batch.mask), AXIS) + 1
    return jnp.sum(batch.mask * squares(params, batch, rng)) / count


def log_of_mean(params, batch, rng):
    return jnp.log(1 + jax.lax.pmean(local(params, batch, rng), AXIS))


def normalized(params, batch, rng):
    """Statistics of all devices, as of synchronized batch normalization."""
    z = outputs(params, batch, rng)
    mean = jax.lax.pmean(jnp.mean(z), AXIS)
    variance = jax.lax.pmean(jnp.mean((z - mean) ** 2), AXIS)
    return jnp.mean(((z - mean) / jnp.sqrt(variance + 0.1) - batch.y) ** 2)


def contrastive(params, batch, rng):
    """InfoNCE against the negatives of all devices, as each device's mean or, with `pmean`, as that of all."""
    z = outputs(params, batch, rng)
    all_y = jax.lax.all_gather(batch.y + z, AXIS, tiled=True)
    first = jax.lax.axis_index(AXIS) * len(z)
    logits = z[:, None] * all_y[None, :]
    positives = jnp.sum(
        logits * (jnp.arange(len(all_y))[None] == first + jnp.arange(len(z))[:, None]), axis=1
    )
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - positives)


def contrastive_mean(params, batch, rng):
    return jax.lax.pmean(contrastive(params, batch, rng), AXIS)


def by_index(params, batch, rng):
    return (1 + jax.lax.axis_index(AXIS)) * local(params, batch, rng)


def neighbours(params, batch, rng):
    z = outputs(params, batch, rng)
    size = jax.lax.axis_size(AXIS)
    return jnp.mean(z * jax.lax.ppermute(z, AXIS, [(i, (i + 1) % size) for i in range(size)]) + z**2)


WITHOUT_SUMS = [local, own_share, contrastive, by_index, neighbours]
WITH_SUMS = [averaged, shared_count, log_of_mean, normalized, contrastive_mean]
LOSSES = WITHOUT_SUMS + WITH_SUMS


def with_aux(loss):
    def fun(params, batch, rng=None):
        errors = squares(params, batch, rng)
        aux = {"count": jnp.sum(errors < 1), "of_example": errors, "mean": jnp.mean(errors)}
        return loss(params, batch, rng), aux

    return fun


AUX = {"count": "sum", "of_example": "concatenate", "mean": "mean"}


# --- the same on one device ---------------------------------------------------------------------------


class Case(NamedTuple):
    """What is computed, and how the batch is divided."""

    loss: Any
    devices: int = 2
    parts: int = 1
    size: int = 1  # examples in a part
    draws: int = 1
    antithetic: bool = True
    independent: bool = True
    checked: bool = True
    dropout: bool = False
    clean_weight: float = 0.0
    sigma: float = 0.3
    seed: int = 0

    @property
    def batch(self):
        rng = np.random.default_rng(self.seed)
        count = self.devices * self.parts * self.size
        mask = rng.uniform(size=count) < 0.5
        return Batch(
            jnp.asarray(rng.normal(size=(count, FEATURES)), jnp.float32),
            jnp.asarray(rng.normal(size=count), jnp.float32),
            jnp.asarray(mask, jnp.float32),
        )

    @property
    def params(self):
        rng = np.random.default_rng(self.seed + 1)
        shapes = {"v": (2,), "w": (FEATURES, 2)}
        return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    @property
    def key(self):
        return jax.random.key(self.seed)

    @property
    def rng(self):
        return jax.random.key(self.seed + 7) if self.dropout else None

    @property
    def mesh(self):
        kinds = (jax.sharding.AxisType.Auto,)
        return jax.make_mesh(
            (self.devices,), (AXIS,), axis_types=kinds, devices=jax.devices()[: self.devices]
        )

    @property
    def options(self):
        return {
            "sigma": self.sigma,
            "sampler": waves,
            "num_samples": self.draws,
            "antithetic": self.antithetic,
            "clean_weight": self.clean_weight,
            "has_aux": True,
        }

    def divided(self):
        """The batch by device and part, which has every m-th of the device's examples."""
        shape = (self.devices, self.size, self.parts)
        return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(*shape, *x.shape[1:]), 1, 2), self.batch)

    def keys(self):
        """A key for each device and part."""
        of_device = [
            jax.random.fold_in(self.key, d) if self.independent else self.key for d in range(self.devices)
        ]
        split = [jax.random.split(k, self.parts) if self.parts > 1 else k[None] for k in of_device]
        return jnp.stack(split)

    def rngs(self, folded):
        """A dropout key for each device and part."""
        if self.rng is None:
            return None

        def of(d, i):
            rng = jax.random.fold_in(self.rng, d) if folded and self.independent else self.rng
            return jax.random.fold_in(rng, i) if self.parts > 1 else rng

        return jnp.stack([jnp.stack([of(d, i) for i in range(self.parts)]) for d in range(self.devices)])


def expected(case, *, folded=False, weight=None):
    """Value, auxiliary output and gradient of the mean over devices, parts and evaluations, on one device."""

    @jax.jit
    def compute(params, batch):
        keys, rngs = case.keys(), case.rngs(folded)
        signs = jnp.array([1.0, -1.0] if case.antithetic else [1.0])
        weights = jnp.ones((case.devices, case.parts)) if weight is None else weight(batch)

        def mean(values):
            return jnp.sum(jnp.where(weights == 0, 0, weights * values)) / jnp.sum(weights)

        def draw(key):
            u = noise.perturbation(key, params, case.sigma, sampler=waves)
            return jax.tree.map(lambda u: signs.reshape(-1, *(1,) * u.ndim) * u, u)

        def draws(key):
            """With an axis of the evaluations, +1, -1, +2, -2, ..., and that without noise last."""
            us = jax.vmap(draw)(jax.random.split(key, case.draws))
            us = jax.tree.map(lambda u: u.reshape(-1, *u.shape[2:]), us)
            return jax.tree.map(lambda u: jnp.concatenate([u, jnp.zeros_like(u[:1])]), us)

        points = jax.vmap(jax.vmap(draws, out_axes=1), out_axes=1)(keys)  # (evaluations, devices, parts)

        def evaluate(params, u):
            """The losses of all devices and parts."""
            moved = jax.tree.map(lambda w, u: jnp.broadcast_to(w, u.shape) + u, params, u)
            of_device = (0, 0, None if rngs is None else 0)
            of_part = jax.vmap(with_aux(case.loss), in_axes=of_device, axis_name=AXIS)
            over_parts = jax.vmap(of_part, in_axes=(1, 1, None if rngs is None else 1), out_axes=1)
            return over_parts(moved, batch, rngs)

        def total(params):
            values, aux = jax.vmap(evaluate, in_axes=(None, 0))(params, points)
            return mixed(jax.vmap(mean)(values)), aux

        def mixed(x):
            noisy = x[:-1].mean(axis=0)
            return case.clean_weight * x[-1] + (1 - case.clean_weight) * noisy

        (value, aux), grads = jax.value_and_grad(total, has_aux=True)(params)
        aux = {
            "count": jnp.sum(aux["count"][:-1]),
            "of_example": jnp.swapaxes(mixed(aux["of_example"]), 1, 2).reshape(-1),
            "mean": mixed(jax.vmap(mean)(aux["mean"])),
        }
        return value, aux, grads

    return compute(case.params, case.divided())


def assert_same(result, reference):
    (value, aux), grads = result
    assert aux["count"].dtype == jnp.int32
    for found, right in zip(jax.tree.leaves((value, aux, grads)), jax.tree.leaves(reference), strict=True):
        # Terms of the order of 1 may cancel, so float32 leaves some 1e-7 of them.
        scale = max(0.1, float(np.abs(right).max(initial=0)))
        np.testing.assert_allclose(found, right, rtol=0, atol=2e-5 * scale)


def in_shard_map(case, fn, *, aux=True):
    """`fn(key, params, batch, rng)` in a shard_map of the user's own."""
    out = ((P(), {"count": P(), "of_example": P(AXIS), "mean": P()}), P()) if aux else P()
    specs = {"in_specs": (P(), P(), P(AXIS), P()), "out_specs": out, "check_vma": case.checked}
    mapped = jax.jit(jax.shard_map(fn, mesh=case.mesh, **specs))
    return mapped(case.key, case.params, case.batch, case.rng)


cases = st.builds(
    Case,
    loss=st.sampled_from(LOSSES),
    devices=st.sampled_from([1, 2, 4, 8]),
    parts=st.sampled_from([1, 2, 3]),
    size=st.integers(1, 3),
    draws=st.sampled_from([1, 2]),
    antithetic=st.booleans(),
    independent=st.booleans(),
    checked=st.booleans(),
    dropout=st.booleans(),
    clean_weight=st.sampled_from([0.0, 0.3]),
    sigma=st.just(0.3),
    seed=st.integers(0, 99),
)


# --- what is tried ------------------------------------------------------------------------------------


@some
@given(case=cases, map_by=st.sampled_from(["shard_map", "microbatch", "pmap", "vmap"]))
def test_in_a_map_of_ones_own(case, map_by):
    """With `axis_name`; of a loss in microbatches the microbatches have it."""
    case = case if map_by == "microbatch" else case._replace(parts=1)
    axis = {"axis_name": AXIS, "independent_draws": case.independent}
    options = case.options | {"aux": AUX} | ({} if map_by == "microbatch" else axis)
    fn = nso_jax.value_and_grad(with_aux(case.loss), **options)
    if map_by == "microbatch":
        fn = parallel.microbatch(fn, case.parts, aux=AUX, **axis)
    if map_by in ("shard_map", "microbatch"):
        result = in_shard_map(case, fn)
    else:
        axes = {"axis_name": AXIS, "in_axes": (None, None, 0, None)}
        mapped = (
            jax.pmap(fn, devices=jax.devices()[: case.devices], **axes)
            if map_by == "pmap"
            else jax.jit(jax.vmap(fn, **axes))
        )
        split = jax.tree.map(lambda x: x.reshape(case.devices, -1, *x.shape[1:]), case.batch)
        (value, aux), grads = mapped(case.key, case.params, split, case.rng)
        per_example = aux.pop("of_example").reshape(-1)
        first = jax.tree.map(lambda x: x[0], ((value, aux), grads))
        first[0][1]["of_example"] = per_example
        result = first
    assert_same(result, expected(case))


@some
@given(case=cases, jitted=st.booleans())
def test_on_a_mesh(case, jitted):
    fn = parallel.value_and_grad(
        with_aux(case.loss),
        mesh=case.mesh,
        aux=AUX,
        num_microbatches=case.parts,
        independent_draws=case.independent,
        **case.options,
    )
    result = (jax.jit(fn) if jitted else fn)(case.key, case.params, case.batch, case.rng)
    assert_same(result, expected(case, folded=True))


@some
@given(case=cases, on_mesh=st.booleans())
def test_uneven_masks_by_weight(case, on_mesh):
    case = case._replace(loss=masked)
    if not float(case.batch.mask.sum()):
        return

    def weight(params, batch, rng=None):
        return batch.mask.sum()

    if on_mesh:
        fn = parallel.value_and_grad(
            with_aux(masked),
            mesh=case.mesh,
            weight=weight,
            aux=AUX,
            num_microbatches=case.parts,
            independent_draws=case.independent,
            **case.options,
        )
        (value, aux), grads = fn(case.key, case.params, case.batch, case.rng)
    else:
        fn = parallel.microbatch(
            nso_jax.value_and_grad(with_aux(masked), aux=AUX, **case.options),
            case.parts,
            weight=weight,
            aux=AUX,
            axis_name=AXIS,
            independent_draws=case.independent,
        )
        (value, aux), grads = in_shard_map(case, fn)
    finite = case._replace(loss=lambda *args: jnp.nan_to_num(masked_or_zero(*args)))
    reference = expected(finite, folded=on_mesh, weight=lambda batch: batch.mask.sum(axis=2))
    counted = case.divided().mask.sum(axis=2) > 0
    if not bool(counted.all()):  # parts of padding alone do not count in sums either
        aux["count"] = reference[1]["count"]
    assert_same(((value, aux), grads), reference)


def masked_or_zero(params, batch, rng):
    return jnp.sum(batch.mask * squares(params, batch, rng)) / jnp.maximum(jnp.sum(batch.mask), 1)


@some
@given(
    case=cases, name=st.sampled_from(["sam", "usam", "asam"]), together=st.booleans(), on_mesh=st.booleans()
)
def test_rivals(case, name, together, on_mesh):
    """Devices climb, from the same weights, the mean of their losses, each by its own copy; or by all."""
    case = case._replace(parts=1, dropout=False)
    method, rho = getattr(sharpness, name), 0.2
    options = {"rho": rho, "has_aux": True, "aux": AUX, "global_ascent": together}
    if on_mesh:
        fn = parallel.value_and_grad(with_aux(case.loss), mesh=case.mesh, method=method, **options)
        (value, aux), grads = fn(case.key, case.params, case.batch)
    else:
        fn = method(with_aux(case.loss), axis_name=AXIS, **options)
        (value, aux), grads = in_shard_map(case, fn)

    batch = jax.tree.map(lambda x: x[:, 0], case.divided())
    copies = jax.tree.map(lambda w: jnp.broadcast_to(w[None], (case.devices, *w.shape)), case.params)

    def total(copies):
        values, aux = jax.vmap(with_aux(case.loss), axis_name=AXIS)(copies, batch)
        return jnp.mean(values), aux

    @jax.jit
    def reference(copies):
        (value, aux), gradient = jax.value_and_grad(total, has_aux=True)(copies)
        h = jax.tree.map(lambda g: case.devices * g, gradient)
        if together:
            h = jax.tree.map(lambda g: jnp.broadcast_to(g.mean(0, keepdims=True), g.shape), h)
        scale = jax.tree.map(lambda w: (jnp.abs(w) + 0.01) if name == "asam" else jnp.ones_like(w), copies)
        h = jax.tree.map(jnp.multiply, scale, h)
        norm = jax.vmap(optax.tree.norm)(h)
        unit = jnp.ones_like(norm) if name == "usam" else jnp.where(norm > 0, norm, 1)
        moved = jax.tree.map(
            lambda w, t, d: w + rho * t * d / unit.reshape(-1, *(1,) * (d.ndim - 1)), copies, scale, h
        )
        return value, aux, jax.tree.map(lambda g: g.sum(0), jax.grad(total, has_aux=True)(moved)[0])

    right, of_devices, gradient = reference(copies)
    per_example = of_devices["of_example"].reshape(-1)
    right_aux = {
        "count": of_devices["count"].sum(),
        "of_example": per_example,
        "mean": of_devices["mean"].mean(),
    }
    assert_same(((value, aux), grads), (right, right_aux, gradient))


SHARDED = {"v": P("model"), "w": P(None, "model")}


def two_axes(case):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: 2 * case.devices]
    return jax.make_mesh((case.devices, 2), (AXIS, "model"), axis_types=kinds, devices=devices)


@some
@given(
    case=cases.filter(lambda case: case.devices <= 4),
    rival=st.booleans(),
    ends=st.sampled_from(["local", "pmean", "psum"]),
)
def test_params_split_over_a_model_axis(case, rival, ends):
    """Of tensor parallelism, in a shard_map that knows it; shards have noise of their own, so there is none."""
    case = case._replace(loss=local, sigma=0.0, checked=True, dropout=False, parts=1)

    def partial(params, batch):
        z = jax.lax.psum(jnp.tanh(batch.x @ params["w"]) @ params["v"], "model")
        errors = (z - batch.y) ** 2
        if ends == "psum":
            return jax.lax.psum(jnp.sum(errors), AXIS) / jax.lax.psum(len(errors), AXIS)
        return jax.lax.pmean(jnp.mean(errors), AXIS) if ends == "pmean" else jnp.mean(errors)

    def whole(params, batch):
        return jnp.mean((jnp.tanh(batch.x @ params["w"]) @ params["v"] - batch.y) ** 2)

    if rival:
        options = {"rho": 0.2, "axis_name": AXIS, "global_ascent": True}
        fn = sharpness.sam(partial, **options)
        value, gradient = jax.value_and_grad(whole)(case.params, case.batch)
        norm = optax.tree.norm(gradient)
        moved = jax.tree.map(lambda w, g: w + 0.2 * g / jnp.where(norm > 0, norm, 1), case.params, gradient)
        gradient = jax.grad(whole)(moved, case.batch)
    else:
        fn = nso_jax.value_and_grad(partial, sigma=0.0, num_samples=case.draws, axis_name=AXIS)
        value, gradient = jax.value_and_grad(whole)(case.params, case.batch)
    specs = {"in_specs": (P(), SHARDED, P(AXIS)), "out_specs": (P(), SHARDED)}
    mapped = jax.jit(jax.shard_map(fn, mesh=two_axes(case), **specs))
    found = mapped(case.key, case.params, case.batch)
    chex.assert_trees_all_close(found, (value, gradient), rtol=1e-4, atol=1e-5)


@some
@given(case=cases.filter(lambda case: case.devices <= 4))
def test_params_sharded_by_the_compiler(case):
    mesh = two_axes(case)
    params = jax.tree.map(
        lambda w, spec: jax.device_put(w, jax.NamedSharding(mesh, spec)), case.params, SHARDED
    )
    fn = parallel.value_and_grad(
        with_aux(case.loss),
        mesh=mesh,
        aux=AUX,
        num_microbatches=case.parts,
        independent_draws=case.independent,
        **case.options,
    )
    assert_same(jax.jit(fn)(case.key, params, case.batch, case.rng), expected(case, folded=True))


class Net(eqx.Module):
    w: Any
    v: Any

    def __getitem__(self, name):
        return getattr(self, name)


class Module(nnx.Module):
    def __init__(self, params):
        self.w, self.v = nnx.Param(params["w"]), nnx.Param(params["v"])

    def __getitem__(self, name):
        return getattr(self, name)[...]


@some
@given(case=cases, kind=st.sampled_from(["equinox", "nnx in shard_map", "nnx on a mesh", "adapter"]))
def test_other_forms(case, kind):
    """Equinox modules, NNX modules and the optax adapter; the path is part of a leaf's key, so no noise."""
    case = case._replace(sigma=0.0, parts=1, dropout=False)
    value, aux, gradient = expected(case)
    options = case.options | {"aux": AUX}
    if kind == "equinox":
        fn = parallel.value_and_grad(with_aux(case.loss), mesh=case.mesh, **options)
        result, grads = fn(case.key, Net(**case.params), case.batch)
        grads = {"v": grads.v, "w": grads.w}
    elif kind == "adapter":
        fn = functools.partial(adapter_step, case)
        if case.checked and case.loss in WITH_SUMS:
            with pytest.raises(ValueError, match="grad_fn: its loss has a collective"):
                in_shard_map(case, fn, aux=False)
            return
        result, grads = (value, aux), in_shard_map(case, fn, aux=False)
    else:
        model = Module(case.params)
        if kind == "nnx on a mesh":
            fn = nso_jax.nnx.value_and_grad(with_aux(case.loss), mesh=case.mesh, **options)
            result, grads = fn(case.key, model, case.batch)
        else:
            fn = nso_jax.nnx.value_and_grad(with_aux(case.loss), axis_name=AXIS, **options)
            graphdef, state = nnx.split(model)

            def step(key, state, batch, _):
                (value, aux), grads = fn(key, nnx.merge(graphdef, state), batch)
                return (value, aux), {"v": grads["v"][...], "w": grads["w"][...]}

            out = ((P(), {"count": P(), "of_example": P(AXIS), "mean": P()}), P())
            specs = {"in_specs": (P(), P(), P(AXIS), P()), "out_specs": out, "check_vma": case.checked}
            mapped = jax.jit(jax.shard_map(step, mesh=case.mesh, **specs))
            result, grads = mapped(case.key, state, case.batch, None)
        grads = {name: grads[name] for name in ("v", "w")}
    assert_same((result, jax.tree.map(jnp.asarray, grads)), (value, aux, gradient))


def adapter_step(case, key, params, batch, _):
    tx = nso_jax.noise_stability(
        case.sigma,
        key=key,
        num_samples=case.draws,
        antithetic=case.antithetic,
        axis_name=AXIS,
        independent_draws=case.independent,
    )

    def grad_fn(params, _):
        return jax.grad(case.loss)(params, batch, None)

    zeros = jax.tree.map(jnp.zeros_like, params)
    return tx.update(zeros, tx.init(params), params, grad_fn=grad_fn)[0]
