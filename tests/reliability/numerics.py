"""Trials of the numerics: faults that make a loss non-finite, and results that must come out the same."""

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nso_jax
import nso_jax.nnx
from benchmarks.kit.files import ROOT
from nso_jax import curvature, noise, parallel, sharpness
from tests.reliability.outcome import Advance, Trials

Params = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array]
# fn(key, params, batch, hit) -> (value, or a pair of it and auxiliary output; gradients)
Method = Callable[[jax.Array, Params, Batch, jax.Array], tuple[Any, Params]]

NUM_EXAMPLES = 32
STEPS = 30
BAD_STEP = 5
PATIENCE = 3  # consecutive bad steps that are skipped
RATE = 0.02
STRENGTH = 0.02  # sigma or rho of the steps that are good
BISECTIONS = 16

ROUNDING = 1e-5  # of a result's largest entry: some eighty times float32's eps
SEEDS_OF_HASHES = ("0", "1", "random")


class _Inputs(NamedTuple):
    """What a step gets: a fault changes some of it."""

    key: jax.Array
    params: Params
    batch: Batch
    hit: jax.Array
    strength: jax.Array


class _Entry(NamedTuple):
    """A way to call the library.

    Attributes:
        method: From the strength to a function of key, params, batch and hit.
        of_one_point: Whether all it returns comes from the same evaluations: the rivals' value is that at W.
    """

    method: Callable[[jax.Array], Method]
    of_one_point: bool = True


class _Bilinear(nnx.Module):
    def __init__(self, params: Params) -> None:
        self.w1, self.w2 = nnx.Param(params["w1"]), nnx.Param(params["w2"])


# --- faults -------------------------------------------------------------------------------------------


def nonfinite(times: int, advance: Advance = lambda _: None) -> Trials:
    """Faults that make an evaluation NaN or infinite in the midst of a training, by every entry point.

    Args:
        times: How often each fault is tried in each entry point, with other weights and data.
        advance: Called with 1 after each trial.
    """
    entries = _entries()
    steps = {name: _step(entry) for name, entry in entries.items()} | _transformations()
    survived: list[bool] = []
    for seed, (name, step) in itertools.product(range(times), steps.items()):
        for fault in _FAULTS if name != "bsam" else _DATA_FAULTS:  # its rho is a number once and for all
            rng = np.random.default_rng([seed, len(survived)])
            whole = fault in _DATA_FAULTS or name not in entries or entries[name].of_one_point
            survived.append(_trains_on(step, fault, rng, whole=whole))
            advance(1)
    return Trials(
        fault="a NaN or infinity in one evaluation",
        tried=len(survived),
        survived=sum(survived),
        note=f"{', '.join(_FAULTS)}; in {len(steps)} entry points: value and gradients say so, and with "
        "optax.apply_if_finite weights and state stay, the next noise is new and the loss falls on",
    )


def _trains_on(step: Any, fault: str, rng: np.random.Generator, *, whole: bool) -> bool:
    """Whether a bad step is seen, in the value too if `whole`, and skipped, and the training goes on."""
    dtype = jnp.float16 if fault == _BEYOND_FLOAT16 else jnp.float32
    init, update = step
    params, batch = _problem(rng, dtype)
    start = float(_loss(params, batch))
    state, key = init(params), jax.random.key(int(rng.integers(2**31)))
    good = True
    for n in range(STEPS):
        inputs = _Inputs(
            jax.random.fold_in(key, n), params, batch, jnp.float32(jnp.inf), jnp.float32(STRENGTH)
        )
        if n == BAD_STEP:
            inputs = _FAULTS[fault](rng, inputs, lambda inputs, state=state: update(inputs, state)[2])
        before = params, _guarded(state)
        params, state, seen = update(inputs, state)
        if n == BAD_STEP:
            good &= _is_seen(seen, whole=whole)
            good &= _same_bits(before, (params, _guarded(state)))
        else:
            good &= _is_finite(seen)
        good &= all(int(s.count) == n + 1 for s in _states(state, nso_jax.NoiseStabilityState))
    (guard,) = _states(state, optax.ApplyIfFiniteState)
    return good and int(guard.total_notfinite) == 1 and float(_loss(params, batch)) < start


def _is_seen(seen: tuple[Any, Params], *, whole: bool) -> bool:
    """Whether every leaf of the gradients, and of the value if that is `whole`, has an entry that says so."""
    leaves = jax.tree.leaves(seen if whole else seen[1])
    return not any(map(_is_finite, leaves))


def _is_finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def _problem(rng: np.random.Generator, dtype: Any = jnp.float32) -> tuple[Params, Batch]:
    """Weights to start from, and what other weights make of normal inputs."""

    def draw() -> Params:
        return {
            "w1": jnp.asarray(rng.normal(size=(4, 8)) / 2, dtype),
            "w2": jnp.asarray(rng.normal(size=8) / 2, dtype),
        }

    x = jnp.asarray(rng.normal(size=(NUM_EXAMPLES, 4)), jnp.float32)
    return draw(), (x, _outputs(draw(), x))


def _outputs(params: Params, x: jax.Array) -> jax.Array:
    w1, w2 = (params[name].astype(jnp.float32) for name in ("w1", "w2"))
    return jax.nn.silu(x @ w1) @ w2


def _loss(params: Params, batch: Batch, hit: Any = jnp.inf) -> jax.Array:
    """The mean squared error; infinite where a certain weight is above `hit`."""
    x, y = batch
    factor = jnp.where(params["w2"][0].astype(jnp.float32) > hit, jnp.inf, 1.0)
    return jnp.mean((_outputs(params, x) - y) ** 2) * factor


def _loss_and_aux(params: Params, batch: Batch, hit: Any = jnp.inf) -> tuple[jax.Array, Any]:
    loss = _loss(params, batch, hit)
    return loss, {"loss": loss}


def _loss_of_module(model: _Bilinear, batch: Batch, hit: Any) -> jax.Array:
    return _loss({"w1": model.w1[...], "w2": model.w2[...]}, batch, hit)


def _nan_in_an_input(rng: np.random.Generator, inputs: _Inputs, _: Any) -> _Inputs:
    x, y = inputs.batch
    return inputs._replace(batch=(x.at[rng.integers(len(x)), rng.integers(4)].set(jnp.nan), y))


def _infinite_target(rng: np.random.Generator, inputs: _Inputs, _: Any) -> _Inputs:
    x, y = inputs.batch
    return inputs._replace(batch=(x, y.at[rng.integers(len(y))].set(jnp.inf)))


def _one_infinite_evaluation(
    _rng: np.random.Generator, inputs: _Inputs, evaluate: Callable[[_Inputs], Any]
) -> _Inputs:
    """Searches for the highest `hit` that still makes gradients non-finite: one evaluation is above it."""
    middle = float(inputs.params["w2"][0])
    low, high = middle - 1, middle + 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        _, grads = evaluate(inputs._replace(hit=jnp.float32(middle)))
        low, high = (low, middle) if _is_finite(grads) else (middle, high)
    return inputs._replace(hit=jnp.float32(low))


def _stronger(strength: float, _: np.random.Generator, inputs: _Inputs, __: Any) -> _Inputs:
    return inputs._replace(strength=jnp.float32(strength))


_BEYOND_FLOAT16 = "noise beyond float16"
_DATA_FAULTS = {
    "a NaN in one input": _nan_in_an_input,
    "an infinite target": _infinite_target,
}
_FAULTS: dict[str, Callable[..., _Inputs]] = _DATA_FAULTS | {
    "an infinite loss in one draw": _one_infinite_evaluation,
    "noise of 1e30": functools.partial(_stronger, 1e30),
    _BEYOND_FLOAT16: functools.partial(_stronger, 1e7),
}


# --- entry points -------------------------------------------------------------------------------------


def _entries() -> dict[str, _Entry]:
    """The functions that return a value and gradients."""
    mesh = _mesh(jax.device_count())
    split = jax.P("data")

    def on_module(s: jax.Array) -> Method:
        fn = nso_jax.nnx.value_and_grad(_loss_of_module, sigma=s)

        def method(key: jax.Array, params: Params, batch: Batch, hit: jax.Array) -> tuple[Any, Params]:
            value, grads = fn(key, _Bilinear(params), batch, hit)
            return value, nnx.to_pure_dict(grads)

        return method

    def mapped(s: jax.Array) -> Method:
        fn = nso_jax.value_and_grad(_loss, sigma=s, axis_name="data")
        return jax.shard_map(fn, mesh=mesh, in_specs=(jax.P(), jax.P(), split, jax.P()), out_specs=jax.P())

    def many(s: jax.Array) -> Method:
        return nso_jax.value_and_grad(
            _loss_and_aux, sigma=s, num_samples=8, chunk_size=3, clean_weight=0.5, has_aux=True
        )

    return {
        "value_and_grad": _Entry(lambda s: nso_jax.value_and_grad(_loss, sigma=s)),
        "value_and_grad of 8 draws in chunks, with mean aux and clean_weight": _Entry(many),
        "nnx.value_and_grad": _Entry(on_module),
        "parallel.value_and_grad": _Entry(lambda s: parallel.value_and_grad(_loss, sigma=s, mesh=mesh)),
        "shard_map": _Entry(mapped),
        "parallel.microbatch": _Entry(
            lambda s: parallel.microbatch(nso_jax.value_and_grad(_loss, sigma=s), 4)
        ),
        "sam": _Entry(lambda s: sharpness.sam(_loss, rho=s), of_one_point=False),
        "usam": _Entry(lambda s: sharpness.usam(_loss, rho=s), of_one_point=False),
        "asam": _Entry(lambda s: sharpness.asam(_loss, rho=s), of_one_point=False),
        "rsam": _Entry(lambda s: sharpness.rsam(_loss, rho=s, sigma=STRENGTH), of_one_point=False),
    }


def _mesh(size: int) -> jax.sharding.Mesh:
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((size,), ("data",), axis_types, devices=jax.devices()[:size])


def _step(entry: _Entry) -> Any:
    """A training step with the recipe: `init(params)`, `update(inputs, state) -> params, state, seen`."""
    optimizer = optax.apply_if_finite(optax.sgd(RATE, momentum=0.9), PATIENCE)

    @jax.jit
    def update(inputs: _Inputs, state: Any) -> tuple[Params, Any, Any]:
        key, params, batch, hit, strength = inputs
        out, grads = entry.method(strength)(key, params, batch, hit)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (out, grads)

    return optimizer.init, update


def _transformations() -> dict[str, Any]:
    """The same of the optax adapter, which goes before `apply_if_finite`, and of BSAM, which goes inside."""
    key = jax.random.key(0)

    def averaged(strength: Any) -> tuple[Any, Any]:
        first = nso_jax.noise_stability(strength, key=key, num_samples=2)
        rest = optax.apply_if_finite(optax.sgd(RATE, momentum=0.9), PATIENCE)
        return first, optax.chain(first, rest)

    def bayesian(_: Any) -> tuple[Any, Any]:
        first = sharpness.bsam(5 * RATE, num_examples=1000, key=key)
        return first, optax.apply_if_finite(first, PATIENCE)

    def step(make: Callable[[Any], tuple[Any, Any]]) -> Any:
        @jax.jit
        def update(inputs: _Inputs, state: Any) -> tuple[Params, Any, Any]:
            _, params, batch, hit, strength = inputs
            first, tx = make(strength)

            def grad_fn(params: Params, _: Any) -> Params:
                return jax.grad(_loss)(params, batch, hit)

            plain = grad_fn(params, 0)
            own = _states(state, nso_jax.NoiseStabilityState | sharpness.BSAMState)[0]
            seen, _ = first.update(plain, own, params, grad_fn=grad_fn)
            updates, state = tx.update(plain, state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), state, ((), seen)

        return make(STRENGTH)[1].init, update

    return {"noise_stability": step(averaged), "bsam": step(bayesian)}


def _states(state: Any, kind: Any) -> list[Any]:
    """The states of some kind within an optimizer's."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [node for node in nodes if isinstance(node, kind)]


def _guarded(state: Any) -> Any:
    """What `apply_if_finite` keeps as it is."""
    return _states(state, optax.ApplyIfFiniteState)[0].inner_state


def _same_bits(a: Any, b: Any) -> bool:
    return _digest(a) == _digest(b)


def _digest(tree: Any) -> str:
    """A hash of all bits of a pytree's leaves, their paths included."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# --- determinism --------------------------------------------------------------------------------------


def determinism(
    advance: Advance = lambda _: None,
    *,
    times: int = 2,
    seeds_of_hashes: Sequence[str] = SEEDS_OF_HASHES,
) -> Trials:
    """Pairs of results that must be the same: bit by bit, or to rounding where another program computes them.

    Args:
        advance: Called with 1 after each pair.
        times: How many keys and problems.
        seeds_of_hashes: PYTHONHASHSEED of the processes that do it again.
    """
    same_bits, differences = [], []
    for seed in range(times):
        for one, other in _same_programs(seed):
            same_bits.append(one == other)
            advance(1)
        for one, other in _other_programs(seed):
            differences.append(_difference(one, other))
            advance(1)
    expected = digests()
    for hash_seed in seeds_of_hashes:
        found = _digests_of_a_process(hash_seed)
        for name, digest in expected.items():
            same_bits.append(found[name] == digest)
            advance(1)
    largest = max(differences)
    return Trials(
        fault="the same key again",
        tried=len(same_bits) + len(differences),
        survived=sum(same_bits) + sum(difference <= ROUNDING for difference in differences),
        note=f"{len(same_bits)} pairs bit by bit: again, in {len(seeds_of_hashes)} other processes with "
        f"PYTHONHASHSEED {', '.join(seeds_of_hashes)}, typed and legacy keys, params in another order; "
        f"{len(differences)} to rounding, at most {largest:.0e} of the largest entry: jit and eager, chunk "
        f"sizes, 1 to {jax.device_count()} devices",
    )


def digests() -> dict[str, str]:
    """Hashes of what the library computes from fixed keys, ten training steps of an NNX model among it."""
    params, batch = _problem(np.random.default_rng(0))
    key = jax.random.key(3)
    inputs = _Inputs(key, params, batch, jnp.float32(jnp.inf), jnp.float32(STRENGTH))
    found: dict[str, Any] = {"noise": noise.perturbation(key, params, 0.1)}
    for name in ("value_and_grad", "parallel.value_and_grad", "rsam"):
        init, update = _step(_entries()[name])
        found[name] = update(inputs, init(params))
    for name, (init, update) in _transformations().items():
        state = init(params)
        for _ in range(3):
            params_after, state, _ = update(inputs, state)
            inputs = inputs._replace(params=params_after)
        inputs, found[name] = inputs._replace(params=params), (params_after, state)
    found["nnx training"] = _train_with_dropout(key, batch)
    found["trace"] = curvature.trace(key, _loss, params, batch, num_products=20)
    found["eigenvalues"] = curvature.eigenvalues(key, _loss, params, batch, k=2)
    found["spectral density"] = curvature.spectral_density(key, _loss, params, batch)
    return {name: _digest(result) for name, result in found.items()}


class _Dropping(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def _train_with_dropout(key: jax.Array, batch: Batch) -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as flax needs them
        model = _Dropping(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        def loss(model: _Dropping, batch: Batch) -> jax.Array:
            return jnp.mean((model(batch[0])[:, 0] - batch[1]) ** 2)

        fn = nso_jax.nnx.value_and_grad(loss, sigma=0.05)

        @nnx.jit
        def step(model: _Dropping, optimizer: nnx.Optimizer, key: jax.Array) -> None:
            _, grads = fn(key, model, batch)
            optimizer.update(model, grads)

        for n in range(10):
            step(model, optimizer, jax.random.fold_in(key, n))
        return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))]


def _digests_of_a_process(hash_seed: str) -> dict[str, str]:
    program = "import json; from benchmarks import numerics; print(json.dumps(numerics.digests()))"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _same_programs(seed: int) -> Iterator[tuple[Any, Any]]:
    """Pairs of hashes of what the same programs give, or those that only look different."""
    key, params, batch = _case(seed)
    fn = jax.jit(nso_jax.value_and_grad(_loss, sigma=0.1, num_samples=3))
    once = _digest(fn(key, params, batch))
    yield once, _digest(fn(key, params, batch))
    yield once, _digest(fn(jax.random.key_data(key), params, batch))
    yield once, _digest(fn(key, dict(reversed(params.items())), batch))
    for sampler in (noise.normal, noise.rademacher, noise.uniform, noise.laplace, noise.centered_binomial):
        typed, legacy = (
            noise.perturbation(k, params, 0.1, sampler=sampler) for k in (key, jax.random.key_data(key))
        )
        yield _digest(typed), _digest(legacy)
    measures = (
        functools.partial(curvature.trace, num_products=20),
        functools.partial(curvature.eigenvalues, k=2),
        curvature.spectral_density,
    )
    for measure in measures:
        yield _digest(measure(key, _loss, params, batch)), _digest(measure(key, _loss, params, batch))


def _other_programs(seed: int) -> Iterator[tuple[Any, Any]]:
    """Pairs of results that XLA computes in another order."""
    key, params, batch = _case(seed)

    def average(**options: Any) -> Any:
        return nso_jax.value_and_grad(_loss, sigma=0.1, num_samples=4, **options)

    expected = jax.jit(average())(key, params, batch)
    for size in (2, 3, 4):
        yield expected, jax.jit(average(chunk_size=size))(key, params, batch)
    for size in _sizes():
        mesh = _mesh(size)
        sharded = jax.NamedSharding(mesh, jax.P("data"))
        yield expected, jax.jit(average())(key, params, jax.device_put(batch, sharded))
        by_columns = {"w1": jax.NamedSharding(mesh, jax.P(None, "data")), "w2": sharded}
        yield expected, jax.jit(average())(key, jax.device_put(params, by_columns), batch)
        together = parallel.value_and_grad(
            _loss, sigma=0.1, num_samples=4, mesh=mesh, independent_draws=False
        )
        yield expected, jax.jit(together)(key, params, batch)
    for name in ("value_and_grad", "nnx.value_and_grad", "rsam"):
        method, hit = _entries()[name].method(jnp.float32(STRENGTH)), jnp.float32(jnp.inf)
        yield jax.jit(method)(key, params, batch, hit), method(key, params, batch, hit)


def _sizes() -> list[int]:
    """1, 2, 4, ... devices, up to 8 or as many as there are."""
    return [2**n for n in range(4) if 2**n <= jax.device_count()]


def _case(seed: int) -> tuple[jax.Array, Params, Batch]:
    return jax.random.key(seed), *_problem(np.random.default_rng([seed, 1]))


def _difference(one: Any, other: Any) -> float:
    """The largest difference between two pytrees, over the largest entry of its leaf."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(
        float(np.max(np.abs(a - b)) / np.max(np.abs(a))) for a, b in (map(np.asarray, p) for p in pairs)
    )
