"""The public interface as a type checker sees it from a user's code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
from typing import assert_type

import jax
import jax.numpy as jnp
import optax

import nso_jax
import nso_jax.nnx
from nso_jax import curvature, noise, parallel, penalties, sharpness


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.mean((x @ params["w"]) ** 2)


key, params, x = jax.random.key(0), {"w": jnp.ones(3)}, jnp.ones((8, 3))
mesh = jax.make_mesh((8,), ("data",))
value, grads = nso_jax.value_and_grad(loss, sigma=0.1, sampler=noise.rademacher)(key, params, x)
value, grads = parallel.microbatch(sharpness.sam(loss, rho=0.1), 2, weight=lambda w, x: x.sum())(key, params, x)
value, grads = parallel.value_and_grad(loss, sigma=noise.relative(0.1), mesh=mesh)(key, params, x)
transformation: optax.GradientTransformationExtraArgs = nso_jax.nso(optax.adam(1e-3), 0.1, key=key)
penalty: jax.Array = penalties.hessian_trace(key, loss, params, x)
h = curvature.hessian(loss, params, x)
estimate = curvature.trace(key, h)
assert_type(estimate, curvature.Estimate)
assert_type(estimate.num_products, int)
assert_type(curvature.suggest_sigma(key, h.at(params)).sigma, float)
"""

WRONG = """
import nso_jax
from nso_jax import curvature, parallel

nso_jax.value_and_grad(abs)  # sigma
nso_jax.value_and_grad(abs, sigma=0.1, num_samples="4")  # arg-type
nso_jax.nso(0.1, 0.1, key=None, smaples=3)  # smaples
parallel.microbatch(abs, 2, weight=3)  # weight
curvature.trace(None, abs)  # CurvatureMatrix
"""


def check(tmp_path, code):
    file = tmp_path / "user.py"
    file.write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", str(file)]
    environment = os.environ | {"MYPYPATH": str(Path(__file__).parents[1])}
    return subprocess.run(  # noqa: S603  # a command of ours
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_right_calls_are_typed(tmp_path):
    done = check(tmp_path, RIGHT)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_wrong_calls_are_errors_where_they_stand(tmp_path):
    found = check(tmp_path, WRONG).stdout
    for number, line in enumerate(WRONG.splitlines(), 1):
        if "#" in line:
            word = line.split("# ")[1]
            assert re.search(rf"user.py:{number}: error: .*{word}", found), (line, found)
