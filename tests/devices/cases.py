"""Losses with collectives and without, random cases of how a batch is divided, and the same on one device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from nso_jax import noise
from tests.devices.meshes import P

AXIS = "data"
FEATURES = 3


class Batch(NamedTuple):
    x: Any
    y: Any
    mask: Any


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
