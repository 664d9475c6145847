"""Bad input is refused in the library's own words, whatever it is."""

import functools
import re
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nso_jax
import nso_jax.nnx
from nso_jax import noise, parallel, penalties, sharpness

KEY = jax.random.key(0)
W = {"w": jnp.ones((2, 3)), "n": jnp.ones(2)}
X = jnp.ones((4, 2, 3))
PACKAGE = Path(nso_jax.__file__).parent


def sum_of_squares(params, x=None):
    return sum(jnp.sum(w**2) for w in jax.tree.leaves(params)) + (0 if x is None else jnp.mean(x))


def call_value_and_grad(**arguments):
    arguments = {"key": KEY, "params": W, "fun": sum_of_squares, "sigma": 0.1} | arguments
    key, params = arguments.pop("key"), arguments.pop("params")
    return nso_jax.value_and_grad(**arguments)(key, params)


def call_noise_stability(**arguments):
    return call_update(nso_jax.noise_stability, **{"sigma": 0.1, "key": KEY} | arguments)


def call_nso(**arguments):
    return call_update(nso_jax.nso, **{"optimizer": optax.sgd(0.1), "sigma": 0.1, "key": KEY} | arguments)


def call_update(transformation, **arguments):
    given = {"updates": W, "params": W, "grad_fn": lambda params, _: params}
    given |= {name: arguments.pop(name) for name in given.keys() & arguments.keys()}
    tx = transformation(**arguments)
    return tx.update(given["updates"], tx.init(W), given["params"], grad_fn=given["grad_fn"])


def call_relative(**arguments):
    return noise.relative(**{"scale": 0.1, "per": "channel"} | arguments)(W)


def call_perturbation(**arguments):
    return noise.perturbation(**{"key": KEY, "params": W, "sigma": 0.1} | arguments)


def call_microbatch(**arguments):
    fn = nso_jax.value_and_grad(sum_of_squares, sigma=0.1)
    arguments = {"key": KEY, "batch": X, "fn": fn, "num_microbatches": 2} | arguments
    key, batch = arguments.pop("key"), arguments.pop("batch")
    return parallel.microbatch(**arguments)(key, W, batch)


def call_parallel(**arguments):
    mesh = jax.make_mesh((1,), ("data",))
    return parallel.value_and_grad(**{"fun": sum_of_squares, "sigma": 0.1, "mesh": mesh} | arguments)


def call_rival(method, **arguments):
    arguments = {"key": KEY, "params": W, "fun": sum_of_squares, "rho": 0.1} | arguments
    key, params = arguments.pop("key"), arguments.pop("params")
    return method(**arguments)(key, params)


def call_bsam(**arguments):
    return call_update(sharpness.bsam, **{"learning_rate": 0.1, "num_examples": 10, "key": KEY} | arguments)


def call_ivon(**arguments):
    return call_update(sharpness.ivon, **{"learning_rate": 0.1, "num_examples": 10, "key": KEY} | arguments)


def call_adaptive(**arguments):
    return noise.adaptive(**{"sigma": 0.1, "squares": W} | arguments)(W)


def call_hessian_trace(**arguments):
    return penalties.hessian_trace(**{"key": KEY, "fun": sum_of_squares, "params": W} | arguments)


def example_losses(x):
    return jnp.sum(x**2, axis=1)


def call_penalty(penalty, **arguments):
    return penalty(**{"fun": example_losses, "inputs": jnp.ones((2, 3))} | arguments)


not_numbers = st.sampled_from(["junk", b"junk", None, 1j, object(), {}, [], (), KEY, jnp.array(1j), True])
not_functions = not_numbers | st.integers() | st.floats() | st.just(W)
below_zero = st.floats(max_value=0, exclude_max=True) | st.just(float("nan"))
several = st.sampled_from([np.ones(2), jnp.ones((2, 2)), jnp.ones(0)])
not_a_size = not_numbers | below_zero | several
not_a_count = not_numbers | st.floats() | st.integers(max_value=0) | several
not_a_flag = not_numbers.filter(lambda x: x is not True) | st.integers() | st.floats() | several
not_a_key = st.sampled_from(
    [*(None, 0, 1.5, "key", W, (), jnp.ones(2), jnp.ones(2, jnp.int32)), jax.random.split(KEY), *(
        jnp.ones(n, jnp.uint32) for n in (0, 1, 3)
    ), jnp.ones((2, 2), jnp.uint32)]
)  # fmt: skip
not_a_prefix = st.sampled_from([{}, [], (), (1, 2), {"w": 0.1}, {"w": 0.1, "n": 0.1, "more": 0.1}])
bad_leaf = st.sampled_from([{"w": bad, "n": 0.1} for bad in ("junk", -1.0, 1j, object(), np.ones(5), np.nan)])
not_a_mask = not_a_prefix | st.sampled_from(["junk", 0, 1.0, KEY, jnp.array(True), {"w": True, "n": 1}])
not_argnums = st.sampled_from(
    [None, "0", b"0", 1.0, 1j, (0, 0), (0, -1), 1, -2, (0, 5), (0.0,), {}, KEY, jnp.ones(1)]
)
not_batch_argnums = st.sampled_from([None, "1", b"1", 1.0, 1j, 2, -3, (1, 5), (1.0,), {}, KEY])
not_an_axis = st.sampled_from(["rows", ("rows", "columns"), ["rows"], {}, 0, -1, 1.5, jnp.ones(2), object()])
not_an_axis_number = not_numbers | st.floats() | several | st.sampled_from([2, -3])
not_a_batch = st.sampled_from(
    [jnp.ones((5, 3)), 1.0, "junk", [X, jnp.ones(3)], KEY, {"x": X, "y": None, "z": 1}]
)
not_specs = st.sampled_from(
    ["data", 0, object(), jax.P("rows"), [jax.P()], {"w": jax.P()}, {"w": jax.P(), "n": "data"}]
)
not_a_choice = not_numbers | st.integers() | st.sampled_from([np.array(["weight"]), "layer", ["leaf"]])
not_params = st.sampled_from(
    [{"w": bad} for bad in ("junk", 1, True, b"junk", object(), KEY, jnp.ones(2, int), np.array(["junk"]))]
)
not_a_loss = st.sampled_from(
    [lambda *_, out=out: out for out in (None, "junk", 1, 1j, jnp.ones(2), jnp.int32(1), (), (1.0, 2.0), KEY)]
)
not_losses = st.sampled_from(
    [lambda *_, out=out: out for out in (None, "junk", 1j, jnp.int32(1), (1.0, 2.0), jnp.ones(3), KEY)]
)
not_an_aux_mode = st.sampled_from(
    ["first", 1, b"mean", np.array(["mean"]), object(), {"w": "mean"}, ("mean",)]
)
not_gradients = st.sampled_from(
    [lambda *_, out=out: out for out in (None, "junk", 1.0, {}, {"w": W["w"]}, W | {"n": jnp.ones(3)})]
    + [lambda *_, out=out: W | {"n": out} for out in ("junk", 1, KEY, jnp.ones(2, int), object(), None)]
)
not_a_sampler = not_functions | st.sampled_from(
    [lambda *_, out=out: out for out in (None, "junk", 1j, object(), jnp.ones(7), KEY, True)]
)
not_a_half_open_share = not_numbers | below_zero | several | st.floats(min_value=1)
not_above_zero = not_numbers | below_zero | several | st.just(0.0)
not_a_probability = not_above_zero | st.floats(min_value=1, exclude_min=True)
not_a_share = not_numbers | below_zero | several | st.floats(min_value=1, exclude_min=True)
not_inputs = not_params | st.sampled_from([{}, None, jnp.ones((2, 3), jnp.complex64), jnp.ones((2, 3), int)])

noisy = {
    "sigma": not_a_size.filter(lambda x: not callable(x)) | not_a_prefix | bad_leaf,
    "num_samples": not_a_count,
    "antithetic": not_a_flag,
    "sampler": not_a_sampler,
    "mask": not_a_mask,
    "clean_weight": not_a_share,
    "chunk_size": not_a_count.filter(lambda x: x is not None),
    "axis_name": not_an_axis,
    "independent_draws": not_a_flag,
    "param_specs": not_specs,
    "key": not_a_key,
}
differentiating = {
    "fun": not_functions | not_a_loss,
    "params": not_params,
    "argnums": not_argnums,
    "has_aux": not_a_flag | st.just(True),
}
rival = differentiating | {
    "rho": not_a_size,
    "mask": not_a_mask,
    "axis_name": not_an_axis,
    "global_ascent": not_a_flag | st.just(True),
    "param_specs": not_specs,
    "key": not_a_key,
}
update = {"params": not_params | st.none(), "grad_fn": not_functions | not_gradients}
of_inputs = {"fun": not_functions | not_losses, "inputs": not_inputs}
INVALID = {
    call_value_and_grad: noisy | differentiating | {"aux": not_an_aux_mode},
    call_noise_stability: noisy | update | {"updates": st.sampled_from([None, {}, W["w"], W | {"n": 1}])},
    call_nso: noisy | {"optimizer": not_functions},
    call_relative: {"scale": not_a_size, "per": not_a_choice, "channel_axis": not_an_axis_number},
    call_perturbation: {name: noisy[name] for name in ("key", "sigma", "sampler", "mask", "param_specs")}
    | {"params": not_params},
    call_microbatch: {
        "fn": not_functions,
        "num_microbatches": not_a_count,
        "batch_argnums": not_batch_argnums,
        "batch": not_a_batch,
        "axis_name": not_an_axis,
        "independent_draws": not_a_flag,
        "key": not_a_key,
    },
    call_parallel: {
        "fun": not_functions,
        "mesh": not_functions,
        "method": not_functions,
        "axis_name": not_an_axis,
        "batch_argnums": not_batch_argnums.filter(lambda x: not isinstance(x, int | tuple)),
        "num_microbatches": not_a_count,
        "independent_draws": not_a_flag,
    },
    functools.partial(call_rival, sharpness.sam): rival,
    functools.partial(call_rival, sharpness.usam): rival,
    functools.partial(call_rival, sharpness.asam): rival | {"eta": not_a_size},
    functools.partial(call_rival, functools.partial(sharpness.rsam, sigma=0.1)): rival
    | {"sigma": noisy["sigma"], "gradient_weight": not_a_size, "sampler": not_a_sampler},
    call_bsam: update
    | {
        "learning_rate": not_a_size,
        "num_examples": not_a_count,
        "key": not_a_key,
        "rho": not_a_size,
        "weight_decay": not_a_size,
        "damping": not_a_size,
        "b1": not_a_half_open_share,
        "b2": not_a_half_open_share,
        "initial_precision": not_above_zero,
        "mask": not_a_mask,
        "axis_name": not_an_axis,
    },
    call_ivon: update
    | {
        "learning_rate": not_a_size,
        "num_examples": not_a_count,
        "key": not_a_key,
        "weight_decay": not_above_zero,
        "b1": not_a_half_open_share,
        "b2": not_a_half_open_share,
        "initial_hessian": not_above_zero,
        "num_samples": not_a_count,
        "antithetic": not_a_flag,
        "sampler": not_a_sampler,
        "axis_name": not_an_axis,
    },
    call_adaptive: {"eta": not_a_size},
    call_hessian_trace: {
        "key": not_a_key,
        "fun": not_functions | not_a_loss,
        "params": not_params,
        "prob": not_a_probability,
        "drop": not_a_choice,
        "num_samples": not_a_count,
        "mask": not_a_mask,
    },
    functools.partial(call_penalty, penalties.input_hessian_norm, key=KEY): of_inputs
    | {"key": not_a_key, "num_steps": not_a_count, "step_size": not_above_zero},
    functools.partial(call_penalty, penalties.input_gradient): of_inputs,
    functools.partial(call_penalty, penalties.jacobian, key=KEY): of_inputs
    | {"key": not_a_key, "num_projections": not_a_count},
    penalties.confidence: {
        "logits": st.sampled_from([None, "junk", object(), 1, KEY, 1.0, jnp.ones((2, 0))])
    },
}
ARGUMENTS = [(call, name) for call, arguments in INVALID.items() for name in arguments]
# Where the name that the message begins with is not that of the argument.
OTHER_NAMES = {"has_aux": "fun", "params": "argnums", "batch": "batch_argnums"}


def raised_by(call, **arguments):
    with pytest.raises(Exception) as info:  # noqa: PT011
        call(**arguments)
    return info.value


@settings(max_examples=3 * settings.default.max_examples)
@given(st.data())
def test_bad_input_is_refused_in_the_librarys_own_words(data):
    """By a TypeError or ValueError raised in nso_jax, which begins with the argument's name."""
    call, name = data.draw(st.sampled_from(ARGUMENTS))
    bad = data.draw(INVALID[call][name])
    error = raised_by(call, **{name: bad})
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    words = f"{type(error).__name__} in {place}: {error}"
    assert type(error) in {TypeError, ValueError}, words
    assert place.is_relative_to(PACKAGE), words
    assert re.match(r"\w+", str(error))[0] in (name, OTHER_NAMES.get(name)), words
