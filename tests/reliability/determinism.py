"""Results that must come out the same."""

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nso_jax
import nso_jax.nnx
from nso_jax import curvature, noise, parallel
from tests.reliability.entry_points import (
    STRENGTH,
    Batch,
    Inputs,
    Params,
    device_mesh,
    gradient_functions,
    make_problem,
    mean_squared_error,
    training_step,
    transformations,
)
from tests.reliability.outcome import Advance, Outcome

ROUNDING = 1e-5  # of a result's largest entry: some eighty times float32's eps
SEEDS_OF_HASHES = ("0", "1", "random")


def same_bits(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same leaves at the same paths, to the bit."""
    return digest(a) == digest(b)


def digest(tree: Any) -> str:
    """A hash of all bits of a pytree's leaves, their paths included."""
    hashed = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        hashed.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


def determinism(
    advance: Advance = lambda _: None,
    *,
    times: int = 2,
    seeds_of_hashes: Sequence[str] = SEEDS_OF_HASHES,
) -> Outcome:
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
        for name, of_ours in expected.items():
            same_bits.append(found[name] == of_ours)
            advance(1)
    largest = max(differences)
    return Outcome(
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
    params, batch = make_problem(np.random.default_rng(0))
    key = jax.random.key(3)
    inputs = Inputs(key, params, batch, jnp.float32(jnp.inf), jnp.float32(STRENGTH))
    found: dict[str, Any] = {"noise": noise.perturbation(key, params, 0.1)}
    for name in ("value_and_grad", "parallel.value_and_grad", "rsam"):
        init, update = training_step(gradient_functions()[name])
        found[name] = update(inputs, init(params))
    for name, (init, update) in transformations().items():
        state = init(params)
        for _ in range(3):
            params_after, state, _ = update(inputs, state)
            inputs = inputs._replace(params=params_after)
        inputs, found[name] = inputs._replace(params=params), (params_after, state)
    found["nnx training"] = _train_with_dropout(key, batch)
    h = curvature.hessian(mean_squared_error, params, batch)
    found["trace"] = curvature.trace(key, h, num_products=20)
    found["eigenvalues"] = curvature.eigenvalues(key, h, k=2)
    found["spectral density"] = curvature.spectral_density(key, h)
    return {name: digest(result) for name, result in found.items()}


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
    program = (
        "import json; from tests.reliability import determinism; print(json.dumps(determinism.digests()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _same_programs(seed: int) -> Iterator[tuple[Any, Any]]:
    """Pairs of hashes of what the same programs give, or those that only look different."""
    key, params, batch = _case(seed)
    fn = jax.jit(nso_jax.value_and_grad(mean_squared_error, sigma=0.1, num_samples=3))
    once = digest(fn(key, params, batch))
    yield once, digest(fn(key, params, batch))
    yield once, digest(fn(jax.random.key_data(key), params, batch))
    yield once, digest(fn(key, dict(reversed(params.items())), batch))
    for sampler in (noise.normal, noise.rademacher, noise.uniform, noise.laplace, noise.centered_binomial):
        typed, legacy = (
            noise.perturbation(k, params, 0.1, sampler=sampler) for k in (key, jax.random.key_data(key))
        )
        yield digest(typed), digest(legacy)
    measures = (
        functools.partial(curvature.trace, num_products=20),
        functools.partial(curvature.eigenvalues, k=2),
        curvature.spectral_density,
    )
    for measure in measures:
        first, second = (curvature.hessian(mean_squared_error, params, batch) for _ in range(2))
        yield digest(measure(key, first)), digest(measure(key, second))


def _other_programs(seed: int) -> Iterator[tuple[Any, Any]]:
    """Pairs of results that XLA computes in another order."""
    key, params, batch = _case(seed)

    def average(**options: Any) -> Any:
        return nso_jax.value_and_grad(mean_squared_error, sigma=0.1, num_samples=4, **options)

    expected = jax.jit(average())(key, params, batch)
    for size in (2, 3, 4):
        yield expected, jax.jit(average(chunk_size=size))(key, params, batch)
    for size in _sizes():
        mesh = device_mesh(size)
        sharded = jax.NamedSharding(mesh, jax.P("data"))
        yield expected, jax.jit(average())(key, params, jax.device_put(batch, sharded))
        by_columns = {"w1": jax.NamedSharding(mesh, jax.P(None, "data")), "w2": sharded}
        yield expected, jax.jit(average())(key, jax.device_put(params, by_columns), batch)
        together = parallel.value_and_grad(
            mean_squared_error, sigma=0.1, num_samples=4, mesh=mesh, independent_draws=False
        )
        yield expected, jax.jit(together)(key, params, batch)
    for name in ("value_and_grad", "nnx.value_and_grad", "rsam"):
        method, hit = gradient_functions()[name].method(jnp.float32(STRENGTH)), jnp.float32(jnp.inf)
        yield jax.jit(method)(key, params, batch, hit), method(key, params, batch, hit)


def _sizes() -> list[int]:
    """1, 2, 4, ... devices, up to 8 or as many as there are."""
    return [2**n for n in range(4) if 2**n <= jax.device_count()]


def _case(seed: int) -> tuple[jax.Array, Params, Batch]:
    return jax.random.key(seed), *make_problem(np.random.default_rng([seed, 1]))


def _difference(one: Any, other: Any) -> float:
    """The largest difference between two pytrees, over the largest entry of its leaf."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(
        float(np.max(np.abs(a - b)) / np.max(np.abs(a))) for a, b in (map(np.asarray, p) for p in pairs)
    )
