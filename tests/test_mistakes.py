"""Mistakes that are easy to make, and what the error has to say: what is wrong and what to write."""

import importlib
import re
import sys

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nso_jax
from nso_jax import _checks, curvature, noise, parallel, penalties, sharpness

KEY = jax.random.key(0)
W = {"w": jnp.ones(3), "b": jnp.ones(2)}
X = jnp.ones((4, 3))
VARIABLES = {"params": {"w": jnp.ones(3)}, "batch_stats": {"mean": jnp.zeros(3)}}


def loss(params, *batch):
    return sum(jnp.sum(w**4) for w in jax.tree.leaves(params))


def averaged(fun=loss, sigma=0.1, **options):
    return nso_jax.value_and_grad(fun, sigma=sigma, **options)


class Normalized(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.linear(x))


class Dropped(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dropout(self.linear(x))


def of_module(model, x):
    return jnp.mean(model(x) ** 2)


def beside_module(params, model, x):
    return jnp.sum(params["w"]) * jnp.mean(model(x) ** 2)


def closing_over(model):
    return lambda params: beside_module(params, model, X)


def transformation(**options):
    return nso_jax.nso(optax.sgd(0.1), 0.1, key=KEY, **options)


def update(params, grad_fn=jax.grad(loss)):  # noqa: B008
    tx = transformation()
    return tx.update(params, tx.init(params), params, grad_fn=lambda w, _: grad_fn(w))


def mesh():
    types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=types)


INJECT = "optax.inject_hyperparams(nso_jax.nso, static_args=("
PARTITION = "eqx.partition(model, eqx.is_inexact_array)"
NNX = "nso_jax.nnx.value_and_grad"
SPLIT = "nnx.split(model, nnx.Param, ...)"
LINEN = "Differentiate variables['params'] alone and pass the rest as another argument"
STEP = "sigma=schedule(step)"

# Of each: the call, the type of its error and words that the message has, in this order.
MISTAKES = {
    # keys
    "key missing": (lambda: averaged()(W), TypeError, ["key: expected a PRNG key such as jax.random.key(0), got dict"]),
    "key is a seed": (lambda: averaged()(0, W), TypeError, ["key: ", "got 0 (int)"]),
    "key is a NumPy seed": (lambda: averaged()(np.int32(0), W), TypeError, ["key: ", "got int32[]"]),
    "key is several": (lambda: averaged()(jax.random.split(KEY), W), TypeError, ["key: ", "(2,)", "jax.vmap"]),
    "key is Rngs": (lambda: averaged()(nnx.Rngs(0), W), TypeError, ["key: ", "nnx.Rngs", "rngs() or rngs.noise()"]),
    "key is a stream": (lambda: averaged()(nnx.Rngs(0).params, W), TypeError, ["key: ", "nnx.RngStream", "stream()"]),
    "key is a variable": (lambda: averaged()(nnx.Rngs(0).params.key, W), TypeError, ["nnx.RngKey", "key[...]"]),
    "key of the adapter is Rngs": (lambda: nso_jax.noise_stability(0.1, key=nnx.Rngs(0)), TypeError, ["key: ", "rngs()"]),
    # losses
    "has_aux is missing": (lambda: averaged(lambda p: (loss(p), p))(KEY, W), TypeError, ["fun: ", "has_aux=True"]),
    "has_aux without a pair": (lambda: averaged(has_aux=True)(KEY, W), TypeError, ["has_aux is True", "(loss, aux)"]),
    "loss for each example": (lambda: averaged(lambda p: p["w"])(KEY, W), TypeError, ["real scalar", "float32[3]"]),
    # sigma
    "sigma is negative": (lambda: averaged(sigma=-0.1)(KEY, W), ValueError, ["sigma: ", ">= 0 for leaf ['b']", "-0.1"]),
    "sigma is NaN": (lambda: averaged(sigma=jnp.nan)(KEY, W), ValueError, ["sigma: ", "got nan"]),
    "sigma is an optax schedule": (lambda: averaged(sigma=optax.linear_schedule(1.0, 0.0, 9))(KEY, W), TypeError, ["sigma: an optax schedule", STEP]),
    "sigma is a schedule, of one array": (lambda: averaged(sigma=optax.cosine_decay_schedule(1.0, 9))(KEY, X), TypeError, ["sigma: an optax schedule", STEP]),
    "sigma is a function of the step": (lambda: averaged(sigma=lambda step: 0.1 * 0.9**step)(KEY, W), TypeError, ["unsupported operand", "sigma: ", STEP]),
    "sigma is a function to something else": (lambda: averaged(sigma=lambda step: {"x": 0.1})(KEY, W), ValueError, ["sigma: not a prefix", STEP]),
    # samplers
    "sampler has another signature": (lambda: averaged(sampler=jax.random.bernoulli)(KEY, W), TypeError, ["not iterable", "sampler(key, shape, dtype)", "variance 1", "nso_jax.noise.rademacher"]),
    "sampler has another variance": (lambda: averaged(sampler=jax.random.laplace), ValueError, ["sampler: jax.random.laplace", "nso_jax.noise.laplace"]),
    "sampler has a mean": (lambda: averaged(sampler=jax.random.exponential), ValueError, ["sampler: jax.random.exponential", "shift and scale"]),
    # leaves
    "a leaf of integers": (lambda: averaged()(KEY, {"w": jnp.ones(3), "q": jnp.ones(2, jnp.int8)}), TypeError, ["leaf ['q'] is int8[2]", PARTITION]),
    "a masked leaf of integers": (lambda: averaged(mask={"w": True, "q": False})(KEY, {"w": jnp.ones(3), "q": jnp.ones(2, jnp.int8)}), TypeError, ["leaf ['q'] is int8[2]", "another argument"]),
    "a leaf that is a key": (lambda: averaged()(KEY, {"w": jnp.ones(3), "k": KEY}), TypeError, ["leaf ['k'] is key<fry>[]", "another argument"]),
    "an Equinox module's functions": (lambda: averaged()(KEY, eqx.nn.MLP(2, 1, 3, 1, key=KEY)), TypeError, ["leaf .activation", PARTITION, "eqx.combine(params, rest)"]),
    "the same, measured": (lambda: curvature.hessian(loss, eqx.nn.MLP(2, 1, 3, 1, key=KEY), X), TypeError, ["leaf .activation", PARTITION]),
    "the same, in the adapter": (lambda: update(eqx.nn.MLP(2, 1, 3, 1, key=KEY)), TypeError, ["leaf .activation", PARTITION]),
    # networks with a state
    "NNX statistics": (lambda: averaged(of_module)(KEY, Normalized(), X), TypeError, ["argnums=0: leaf .norm.mean", "nnx.BatchStat", NNX]),
    "NNX statistics, second": (lambda: averaged(beside_module, argnums=(0, 1))(KEY, W, Normalized(), X), TypeError, ["leaf [1].norm.mean", NNX]),
    "NNX dropout": (lambda: averaged(of_module)(KEY, Dropped(), X), TypeError, ["leaf .dropout.rngs.count", "nnx.RngCount", NNX]),
    "NNX statistics in a state": (lambda: averaged(loss)(KEY, nnx.state(Normalized())), TypeError, ["leaf ['norm']['mean']", NNX]),
    "NNX statistics, a rival": (lambda: sharpness.sam(of_module, rho=0.1)(KEY, Normalized(), X), TypeError, ["nnx.BatchStat", NNX, "method="]),
    "NNX statistics, measured": (lambda: curvature.hessian(of_module, Normalized(), X), TypeError, ["params: leaf .norm.mean", SPLIT]),
    "NNX statistics, in a penalty": (lambda: penalties.hessian_trace(KEY, of_module, Normalized(), X), TypeError, ["params: leaf .norm.mean", SPLIT]),
    "NNX statistics, in the adapter": (lambda: update(Normalized()), TypeError, ["params: leaf .norm.mean", SPLIT]),
    "NNX statistics, as noise": (lambda: noise.perturbation(KEY, Normalized(), 0.1), TypeError, ["params: leaf .norm.mean", SPLIT]),
    "NNX statistics, on a mesh": (lambda: parallel.value_and_grad(of_module, sigma=0.1, mesh=mesh())(KEY, Normalized(), X), TypeError, ["nnx.BatchStat", NNX]),
    "NNX module beside the params": (lambda: averaged(beside_module)(KEY, W, Normalized(), X), TypeError, ["fun: it changes the state", NNX, "nso_jax.nnx.microbatch", "model.eval()"]),
    "NNX module beside them, a rival": (lambda: sharpness.sam(beside_module, rho=0.1)(KEY, W, Dropped(), X), TypeError, ["fun: it changes the state", NNX]),
    "NNX module beside them, jitted": (lambda: jax.jit(averaged(beside_module))(KEY, W, Normalized(), X), TypeError, ["fun: it changes the state", NNX]),
    "NNX module closed over": (lambda: averaged(closing_over(Normalized()))(KEY, W), TypeError, ["or closes over", NNX]),
    "Rngs beside the params": (lambda: averaged(lambda p, rngs: loss(p) * jax.random.normal(rngs()))(KEY, W, nnx.Rngs(0)), TypeError, ["nnx.Rngs that it gets", NNX]),
    "Linen variables": (lambda: averaged()(KEY, VARIABLES), TypeError, ["argnums=0: ", "batch_stats", LINEN]),
    "frozen Linen variables": (lambda: averaged()(KEY, flax.core.freeze(VARIABLES)), TypeError, ["batch_stats", LINEN]),
    "Linen variables, second": (lambda: averaged(argnums=(0, 1))(KEY, W, VARIABLES), TypeError, ["batch_stats", LINEN]),
    "Linen variables, measured": (lambda: curvature.hessian(loss, VARIABLES, X), TypeError, ["params: ", LINEN]),
    "Linen variables, a rival": (lambda: sharpness.asam(loss, rho=0.1)(KEY, VARIABLES), TypeError, [LINEN]),
    "Linen variables, in the adapter": (lambda: update(VARIABLES), TypeError, [LINEN]),
    # batches
    "a batch that microbatches do not divide": (lambda: parallel.microbatch(averaged(), 3)(KEY, W, X), ValueError, ["args[1] has 4 examples", "3 microbatches"]),
    # optax
    "grad_fn is missing": (lambda: transformation().update(W, transformation().init(W), W), TypeError, ["grad_fn: ", "update(updates, state, params, grad_fn=grad_fn)"]),
    "params are missing": (lambda: transformation().update(W, transformation().init(W), grad_fn=jax.grad(loss)), ValueError, ["params: ", "grad_fn=grad_fn"]),
    "masked outside": (lambda: optax.masked(transformation(), {"w": True, "b": False}).update(W, optax.masked(transformation(), {"w": True, "b": False}).init(W), W, grad_fn=jax.grad(loss)), ValueError, ["Put optax.masked and optax.partition inside"]),
    "MultiSteps outside": (lambda: optax.MultiSteps(transformation(), 2).init(W), ValueError, ["optax.MultiSteps", "optax.chain(noise_stability(...), optax.MultiSteps(optimizer, n).gradient_transformation())", "nso_jax.parallel.microbatch"]),
    "MultiSteps around bsam": (lambda: optax.MultiSteps(sharpness.bsam(0.1, num_examples=9, key=KEY), 2).init(W), ValueError, ["bsam: optax.MultiSteps", "nso_jax.parallel.microbatch"]),
    "injected, all": (lambda: optax.inject_hyperparams(nso_jax.nso)(optax.sgd(0.1), 0.1, key=KEY).init(W), TypeError, ["num_samples, sampler: ", INJECT, "lambda sigma: nso_jax.nso(...)"]),
    "injected, the mask": (lambda: optax.inject_hyperparams(nso_jax.nso, static_args=("num_samples", "sampler"))(optax.sgd(0.1), 0.1, key=KEY, mask=lambda p: True).init(W), TypeError, ["mask: ", INJECT]),
    "injected into bsam": (lambda: optax.inject_hyperparams(sharpness.bsam)(0.1, num_examples=9, key=KEY).init(W), TypeError, ["num_examples: ", "optax.inject_hyperparams(nso_jax.sharpness.bsam, static_args=('num_examples', "]),
    "an option that there is not": (lambda: transformation(sigmas=0.1), TypeError, ["nso() got an unexpected keyword argument 'sigmas'"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_says_what_is_wrong_and_what_to_write(mistake, standard_promotion):
    call, error, words = MISTAKES[mistake]
    pattern = ".*".join(map(re.escape, words))
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        call()


def test_networks_without_state_pass_as_they_are():
    linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    value, grads = averaged(of_module, sigma=0.0)(KEY, linear, X)
    expected, expected_grads = nnx.value_and_grad(of_module)(linear, X)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads.kernel[...], expected_grads["kernel"][...], rtol=1e-6)
    params = nnx.state(Normalized(), nnx.Param)
    assert noise.perturbation(KEY, params, 0.1)["norm"]["scale"][...].shape == (3,)
    statistics = nnx.state(Normalized(), nnx.BatchStat)  # as asked for
    assert noise.perturbation(KEY, statistics, 0.1)["norm"]["mean"][...].shape == (3,)
    noise.perturbation(KEY, VARIABLES["params"], 0.1)


def test_a_module_whose_state_rests_may_stand_beside_the_params():
    teacher = Normalized()
    teacher.eval()
    value, _ = averaged(beside_module, sigma=0.0)(KEY, W, teacher, X)
    np.testing.assert_allclose(value, beside_module(W, teacher, X), rtol=1e-6)


@pytest.mark.parametrize("model", [Normalized, Dropped])
def test_a_state_that_would_get_lost_is_refused_in_other_arguments(model):
    with pytest.raises(
        TypeError, match=r"args: leaf \[0\]\..* would get lost here; use nso_jax.nnx.microbatch"
    ):
        _checks.check_no_nnx("args", (model(), X), "nso_jax.nnx.microbatch")
    _checks.check_no_nnx("args", (nnx.Linear(3, 1, rngs=nnx.Rngs(0)), W, X), "nso_jax.nnx.microbatch")


def test_without_flax_nothing_of_it_is_looked_for(monkeypatch):
    monkeypatch.delitem(sys.modules, "flax.nnx")
    noise.perturbation(KEY, W, 0.1)


def test_nnx_is_imported_when_it_is_first_used(monkeypatch):
    monkeypatch.delitem(sys.modules, "nso_jax.nnx", raising=False)
    monkeypatch.delattr(nso_jax, "nnx", raising=False)
    assert nso_jax.nnx is importlib.import_module("nso_jax.nnx")


def test_without_flax_its_use_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "nso_jax.nnx", raising=False)
    monkeypatch.delattr(nso_jax, "nnx", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'nso-jax\[flax\]'"):
        _ = nso_jax.nnx


def test_the_package_shows_its_public_names_alone():
    assert dir(nso_jax) == sorted(["__version__", *nso_jax.__all__])
    assert {"curvature", "nnx", "noise", "value_and_grad"} <= set(dir(nso_jax))
    with pytest.raises(AttributeError, match="module 'nso_jax' has no attribute 'layers'"):
        _ = nso_jax.layers


MODULES = ["gradients", "transform", "noise", "parallel", "nnx", "sharpness", "penalties"]
MODULES += [
    f"curvature.{name}"
    for name in [
        "bounds",
        "eigenvalues",
        "layers",
        "operators",
        "sigma",
        "spectrum",
        "stability",
        "subspaces",
        "trace",
    ]
]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_is_public(name):
    module = importlib.import_module(f"nso_jax.{name}")
    assert sorted(module.__all__) == list(module.__all__)
    for public in module.__all__:
        assert f"{getattr(module, public).__module__}.".startswith(f"{module.__name__}.")
