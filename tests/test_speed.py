"""Ratios of times, measured side by side: they run alone, on one device as users have it."""

import statistics
import time

import jax
import jax.numpy as jnp
import pytest

import nso_jax
from nso_jax import sharpness

pytestmark = pytest.mark.timing


def median_ratio(numerator, denominator, repetitions=25):
    """The median of the ratio of their times, called in turns, so that other loads strike both."""

    def seconds(call):
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    for call in (numerator, denominator):
        seconds(call)  # compiles
    return statistics.median(seconds(numerator) / seconds(denominator) for _ in range(repetitions))


def convnet_loss(params, x, y):
    for kernel, bias in params["convolutions"]:
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + bias.reshape(1, 1, 1, -1))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    logits = x.reshape(len(x), -1) @ params["head"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))


def convnet(key):
    keys = jax.random.split(key, 4)
    shapes = [(3, 3, 1, 16), (3, 3, 16, 32)]
    convolutions = [
        (0.1 * jax.random.normal(k, s), jnp.zeros(s[-1])) for k, s in zip(keys, shapes, strict=False)
    ]
    params = {"convolutions": convolutions, "head": 0.1 * jax.random.normal(keys[2], (7 * 7 * 32, 10))}
    return params, jax.random.normal(keys[3], (128, 28, 28, 1)), jnp.arange(128) % 10


def test_a_convnet_with_4_draws_costs_8_plain_gradients(key):
    params, x, y = convnet(key)
    averaged = jax.jit(nso_jax.value_and_grad(convnet_loss, sigma=0.01, num_samples=4))
    plain = jax.jit(jax.value_and_grad(convnet_loss))
    ratio = median_ratio(
        lambda: averaged(key, params, x, y),
        lambda: [jax.block_until_ready(plain(params, x, y)) for _ in range(8)],
    )
    assert ratio <= 1.1


def test_sam_costs_two_plain_gradients(key):
    params, x, y = convnet(key)
    sam = jax.jit(sharpness.sam(convnet_loss, rho=0.05))
    plain = jax.jit(jax.value_and_grad(convnet_loss))
    ratio = median_ratio(
        lambda: sam(key, params, x, y), lambda: [jax.block_until_ready(plain(params, x, y)) for _ in range(2)]
    )
    assert ratio <= 1.1
