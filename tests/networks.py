"""Small networks, their weights and a batch, and what dense derivatives are compared by."""

import jax
import jax.numpy as jnp
import numpy as np

from nso_jax import _backend

SIGMAS = 5  # standard errors that a mean may be off
NUM_KEYS = 4000


def assert_mean(samples, expected):
    """Along the first axis, entry by entry, within some of the sample's own standard errors."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    expected = np.asarray(expected, np.float64)
    assert np.all(abs(samples.mean(axis=0) - expected) <= SIGMAS * error + 1e-10 * (1 + abs(expected)))


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def normal_tree(seed, shapes, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


# --- problems: a network, its weights, and a batch ----------------------------------------------------


def mlp_logits(x, params):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"].reshape((1,) * (x.ndim - 1) + (-1,)))
    return params["scale"] * (hidden @ params["w2"])


def conv_logits(x, params):
    lines = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(lines).mean(axis=1).reshape(len(x), -1) @ params["head"]


def mlp(dtype=jnp.float64):
    """16 weights in four leaves, and six examples."""
    params = normal_tree(0, {"w1": (2, 3), "b1": (3,), "w2": (3, 2), "scale": ()}, dtype)
    return params, *examples((6, 2), 2, dtype)


def conv(dtype=jnp.float64):
    params = normal_tree(1, {"kernel": (3, 3, 1, 2), "head": (8, 3)}, dtype)
    return params, *examples((3, 4, 4, 1), 3, dtype)


def examples(shape, classes, dtype):
    rng = np.random.default_rng(2)
    y = np.eye(classes)[rng.integers(classes, size=len(np.zeros(shape)))]
    return jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(y, dtype)


PROBLEMS = {"mlp": (mlp_logits, mlp), "conv": (conv_logits, conv)}


def cross_entropy(logits, y):
    return -jnp.sum(jax.nn.log_softmax(logits) * y, axis=-1)


def losses_of(logits):
    return lambda x, params, y: cross_entropy(logits(x, params), y)


def mlp_losses(x, params, y):
    return cross_entropy(mlp_logits(x, params), y)


def mlp_loss(params, x, y):
    return mlp_losses(x, params, y).mean()


def input_hessians(losses, x, params, y):
    """One dense Hessian for each example, (n, d, d)."""

    def one(x_i, y_i):
        loss = lambda z: losses(z.reshape(1, *x.shape[1:]), params, y_i[None])[0]  # noqa: E731
        return jax.hessian(loss)(x_i.ravel())

    return jax.vmap(one)(x, y)


def backward_only(function, *, calls_itself=True):
    """`function` with a `jax.custom_vjp`, which has no forward mode; its forward pass may need it again."""
    custom = jax.custom_vjp(function)

    def forward(x):
        return (custom if calls_itself else function)(x), x

    custom.defvjp(forward, lambda x, g: (jax.vjp(function, x)[1](g)[0],))
    return custom


def with_tanh(tanh):
    """The losses of `mlp`, each of its own example, with some hyperbolic tangent."""

    def losses(x, params, y):
        hidden = tanh(x @ params["w1"] + params["b1"][None])
        return cross_entropy(params["scale"] * (hidden @ params["w2"]), y)

    return losses


CUSTOM = {
    "plain": backward_only(jnp.tanh, calls_itself=False),
    "calling itself": backward_only(jnp.tanh),
    "jitted": jax.jit(backward_only(jnp.tanh)),
    "checkpointed": jax.checkpoint(backward_only(jnp.tanh)),
}


def of_one_key(monkeypatch):
    """From here on, a penalty is the estimate that its key itself gives."""
    monkeypatch.setattr(_backend, "mean_over", lambda estimate, key, *_, **__: estimate(key))


def assert_close(tree, other, rtol=1e-4):
    a, b = flat(tree), flat(other)
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * abs(b).max())
