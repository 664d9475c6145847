"""Faults that make an evaluation NaN or infinite in the midst of a training."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nso_jax
import nso_jax.nnx
from tests.reliability import determinism
from tests.reliability.entry_points import (
    STRENGTH,
    Inputs,
    Params,
    gradient_functions,
    make_problem,
    mean_squared_error,
    states_in,
    training_step,
    transformations,
)
from tests.reliability.outcome import Advance, Outcome

STEPS = 30
BAD_STEP = 5
BISECTIONS = 16


def nonfinite(times: int, advance: Advance = lambda _: None) -> Outcome:
    """Faults that make an evaluation NaN or infinite in the midst of a training, by every entry point.

    Args:
        times: How often each fault is tried in each entry point, with other weights and data.
        advance: Called with 1 after each trial.
    """
    entries = gradient_functions()
    steps = {name: training_step(entry) for name, entry in entries.items()} | transformations()
    survived: list[bool] = []
    for seed, (name, step) in itertools.product(range(times), steps.items()):
        for fault in _FAULTS if name != "bsam" else _DATA_FAULTS:  # its rho is a number once and for all
            rng = np.random.default_rng([seed, len(survived)])
            whole = fault in _DATA_FAULTS or name not in entries or entries[name].of_one_point
            survived.append(_trains_on(step, fault, rng, whole=whole))
            advance(1)
    return Outcome(
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
    params, batch = make_problem(rng, dtype)
    start = float(mean_squared_error(params, batch))
    state, key = init(params), jax.random.key(int(rng.integers(2**31)))
    good = True
    for n in range(STEPS):
        inputs = Inputs(
            jax.random.fold_in(key, n), params, batch, jnp.float32(jnp.inf), jnp.float32(STRENGTH)
        )
        if n == BAD_STEP:
            inputs = _FAULTS[fault](rng, inputs, lambda inputs, state=state: update(inputs, state)[2])
        before = params, _guarded(state)
        params, state, seen = update(inputs, state)
        if n == BAD_STEP:
            good &= _is_seen(seen, whole=whole)
            good &= determinism.same_bits(before, (params, _guarded(state)))
        else:
            good &= _is_finite(seen)
        good &= all(int(s.count) == n + 1 for s in states_in(state, nso_jax.NoiseStabilityState))
    (guard,) = states_in(state, optax.ApplyIfFiniteState)
    return good and int(guard.total_notfinite) == 1 and float(mean_squared_error(params, batch)) < start


def _is_seen(seen: tuple[Any, Params], *, whole: bool) -> bool:
    """Whether every leaf of the gradients, and of the value if that is `whole`, has an entry that says so."""
    leaves = jax.tree.leaves(seen if whole else seen[1])
    return not any(map(_is_finite, leaves))


def _is_finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def _nan_in_an_input(rng: np.random.Generator, inputs: Inputs, _: Any) -> Inputs:
    x, y = inputs.batch
    return inputs._replace(batch=(x.at[rng.integers(len(x)), rng.integers(4)].set(jnp.nan), y))


def _infinite_target(rng: np.random.Generator, inputs: Inputs, _: Any) -> Inputs:
    x, y = inputs.batch
    return inputs._replace(batch=(x, y.at[rng.integers(len(y))].set(jnp.inf)))


def _one_infinite_evaluation(
    _rng: np.random.Generator, inputs: Inputs, evaluate: Callable[[Inputs], Any]
) -> Inputs:
    """Searches for the highest `hit` that still makes gradients non-finite: one evaluation is above it."""
    middle = float(inputs.params["w2"][0])
    low, high = middle - 1, middle + 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        _, grads = evaluate(inputs._replace(hit=jnp.float32(middle)))
        low, high = (low, middle) if _is_finite(grads) else (middle, high)
    return inputs._replace(hit=jnp.float32(low))


def _stronger(strength: float, _: np.random.Generator, inputs: Inputs, __: Any) -> Inputs:
    return inputs._replace(strength=jnp.float32(strength))


_BEYOND_FLOAT16 = "noise beyond float16"
_DATA_FAULTS = {
    "a NaN in one input": _nan_in_an_input,
    "an infinite target": _infinite_target,
}


_FAULTS: dict[str, Callable[..., Inputs]] = _DATA_FAULTS | {
    "an infinite loss in one draw": _one_infinite_evaluation,
    "noise of 1e30": functools.partial(_stronger, 1e30),
    _BEYOND_FLOAT16: functools.partial(_stronger, 1e7),
}


def _guarded(state: Any) -> Any:
    """What `apply_if_finite` keeps as it is."""
    return states_in(state, optax.ApplyIfFiniteState)[0].inner_state
