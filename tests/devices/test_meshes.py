"""Random meshes against one device: the same noise, and collectives as JAX has them under vmap."""

import functools
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import nso_jax
import nso_jax.nnx
from nso_jax import parallel, sharpness
from tests.devices.cases import (
    AUX,
    AXIS,
    WITH_SUMS,
    assert_same,
    cases,
    expected,
    in_shard_map,
    local,
    masked,
    squares,
    with_aux,
)
from tests.devices.meshes import P

# 105 cases in all by default, 2,100 nightly. Each compiles two programs, so a failure is shown as it was found.
some = settings(
    max_examples=15 if settings.default.max_examples < 100 else 300,
    phases=[Phase.explicit, Phase.generate],
)


@pytest.fixture(autouse=True)
def strict():
    """Instead of the fixture for the library's own tests: losses here are as users write them."""


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
