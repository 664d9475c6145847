"""Training steps, compiled for eight TPU chips and for a host of eight GPUs, neither of which is here.

What is counted is exact and stands in the compiled programs. No time is measured.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import nso_jax
import nso_jax.nnx
from benchmarks.cost import compilers
from nso_jax import noise, parallel, sharpness

DEVICES = 8
VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH, BATCH = 512, 256, 2, 8, 64, 64
SIGMA = 0.01
PLATFORMS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("tpu", "gpu")]
IMPLEMENTATIONS = ("threefry2x32", "rbg")
MATMULS = ("dot", "convolution", "custom-call")  # as XLA:TPU and XLA:GPU call them

pytestmark = pytest.mark.parametrize("platform", PLATFORMS)


# The programs: a decoder whose layers are scanned, a convolutional network with batch statistics.


SHAPES = {
    "embed": (VOCABULARY, WIDTH),
    "norm": (WIDTH,),
    "norms": (LAYERS, 2, WIDTH),
    "qkv": (LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS),
    "out": (LAYERS, HEADS, WIDTH // HEADS, WIDTH),
    "up": (LAYERS, WIDTH, 4 * WIDTH),
    "down": (LAYERS, 4 * WIDTH, WIDTH),
}


def normalized(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None, None]


def layer(x, params, by_example=lambda x: x):
    x = by_example(x)
    y = normalized(x, params["norms"][0])
    queries, keys, values = jnp.moveaxis(jnp.einsum("btd,dche->btche", y, params["qkv"]), 2, 0)
    scores = jnp.einsum("bthe,bshe->bhts", queries, keys) / math.sqrt(WIDTH // HEADS)
    seen = jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH), bool))
    attention = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    x += jnp.einsum("bhts,bshe,hed->btd", attention, values, params["out"])
    y = normalized(x, params["norms"][1])
    return x + jnp.dot(jax.nn.gelu(jnp.dot(y, params["up"])), params["down"]), None


def loss(params, tokens, by_example=lambda x: x):
    """Cross-entropy; `by_example` keeps activations split by example."""
    layers = {name: w for name, w in params.items() if name not in ("embed", "norm")}
    x = by_example(params["embed"][tokens[:, :-1]])
    x, _ = jax.lax.scan(functools.partial(layer, by_example=by_example), x, layers)
    logits = by_example(jnp.dot(normalized(x, params["norm"]), params["embed"].T))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def plain(key, params, tokens):
    return jax.value_and_grad(loss)(params, tokens)


def plain_mean(key, params, tokens):
    return jax.lax.pmean(plain(key, params, tokens), "data")


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.conv = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.stem(images)))
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


def network_loss(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@functools.cache
def devices_of(platform):
    return compilers.tpu() if platform == "tpu" else compilers.gpu()


def mesh(platform, layout=None):
    axes = {"data": 4, "model": 2} if layout == "data and model" else {"data": DEVICES}
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), kinds, devices=devices_of(platform))


def array(mesh, shape, dtype=jnp.float32, spec=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec or jax.P()))


def key_for(mesh, implementation="threefry2x32"):
    return array(mesh, (), jax.eval_shape(lambda: jax.random.key(0, impl=implementation)).dtype)


def spec_of(name, layout):
    """How a weight is split: by its first axis, its last one, or both."""
    rows, columns = {None: (None, None), "rows": ("data", None), "columns": (None, "data")}.get(
        layout, ("data", "model")
    )
    rank = len(SHAPES[name])
    if name.startswith("norm"):
        return jax.P()
    return jax.P(rows, columns) if rank == 2 else jax.P(None, rows, *[None] * (rank - 3), columns)


def compiled(platform, gradient, *, implementation="threefry2x32", layout=None):
    """A step of gradient descent with the decoder."""
    devices = mesh(platform, layout)

    def step(key, params, tokens):
        value, grads = gradient(key, params, tokens)
        return value, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

    params = {name: array(devices, shape, spec=spec_of(name, layout)) for name, shape in SHAPES.items()}
    tokens = array(devices, (BATCH, LENGTH + 1), jnp.int32, jax.P("data"))
    shardings = (None, jax.tree.map(lambda w: w.sharding, params))
    step = jax.jit(step, out_shardings=shardings, donate_argnums=1)
    return step.lower(key_for(devices, implementation), params, tokens).compile()


def mapped(platform, gradient):
    return jax.shard_map(
        gradient,
        mesh=mesh(platform),
        in_specs=(jax.P(), jax.P(), jax.P("data")),
        out_specs=jax.P(),
        check_vma=False,
    )


def nso(**options):
    return nso_jax.value_and_grad(loss, sigma=SIGMA, **options)


def everywhere(platform, **options):
    return parallel.value_and_grad(loss, mesh=mesh(platform), sigma=SIGMA, **options)


def chained(key, params, tokens):
    """The optax adapter: its update is the gradient here."""
    tx = nso_jax.nso(optax.identity(), SIGMA, key=jax.random.key(0), num_samples=2, axis_name="data")
    value, grads = plain(key, params, tokens)
    updates, _ = tx.update(
        grads, tx.init(params), params, grad_fn=lambda params, i: plain(key, params, tokens)[1]
    )
    return jax.lax.pmean(value, "data"), updates


GRADIENTS = {
    "plain": lambda p: mapped(p, plain_mean),
    "one draw": everywhere,
    "two draws": lambda p: everywhere(p, num_samples=2),
    "eight draws": lambda p: everywhere(p, num_samples=8),
    "signs": lambda p: everywhere(p, sampler=noise.rademacher),
    "one-sided": lambda p: everywhere(p, num_samples=2, antithetic=False),
    "shard_map": lambda p: mapped(p, nso(num_samples=2, axis_name="data")),
    "microbatch": lambda p: mapped(p, parallel.microbatch(nso(), 2, axis_name="data")),
    "weight": lambda p: everywhere(p, weight=lambda params, tokens: (tokens > 0).sum()),
    "optax": lambda p: mapped(p, chained),
    "sam": lambda p: parallel.value_and_grad(loss, mesh=mesh(p), method=sharpness.sam, rho=0.05),
}


@functools.cache
def program(platform, name, implementation="threefry2x32"):
    return compiled(platform, GRADIENTS[name](platform), implementation=implementation)


@functools.cache
def sharded(platform, layout, **options):
    sharding = jax.NamedSharding(mesh(platform, layout), jax.P("data"))
    placed = functools.partial(loss, by_example=lambda x: jax.lax.with_sharding_constraint(x, sharding))
    if options:
        return compiled(platform, nso_jax.value_and_grad(placed, sigma=SIGMA, **options), layout=layout)
    return compiled(platform, lambda key, *args: jax.value_and_grad(placed)(*args), layout=layout)


def sent(program):
    """Operations and bytes by kind: how many arrays an operation takes is the compiler's choice."""
    return {
        kind: (of_kind.operations, of_kind.bytes) for kind, of_kind in compilers.collectives(program).items()
    }


def times(number, sent):
    return {kind: (number * operations, number * size) for kind, (operations, size) in sent.items()}


@pytest.mark.parametrize("name", [name for name in GRADIENTS if name not in ("plain", "weight", "optax")])
def test_a_step_on_many_devices_sends_what_a_plain_one_does(platform, name):
    weights = sum(map(math.prod, SHAPES.values()))
    assert sent(program(platform, "plain")) == {"all-reduce": (1, 4 * (weights + 1))}
    assert sent(program(platform, name)) == sent(program(platform, "plain"))


def test_an_optimizer_that_averages_gradients_sends_what_a_plain_step_does(platform):
    operations, size = sent(program(platform, "optax"))["all-reduce"]
    assert operations <= 2  # the step averages the loss itself, which the compiler may join to the gradient
    assert size == sent(program(platform, "plain"))["all-reduce"][1]


def test_the_weight_of_a_device_is_one_number_more(platform):
    operations, size = sent(program(platform, "plain"))["all-reduce"]
    assert sent(program(platform, "weight")) == {"all-reduce": (operations, size + 4)}


def test_draws_follow_one_another_in_a_loop(platform):
    programs = {2: program(platform, "two draws"), 8: program(platform, "eight draws")}
    for k, each in programs.items():
        assert [loop.trips for loop in compilers.loops(each) if loop.runs == 1] == [k]
    assert len({compilers.count(each, *MATMULS) for each in programs.values()}) == 1
    two, eight = (compilers.memory(each).temp for each in programs.values())
    assert abs(eight - two) <= 4096  # PRNG keys, in tiles


@pytest.mark.parametrize(
    ("layout", "gradients", "options"),
    [
        ("rows", 2, {"antithetic": True}),
        ("rows", 2, {"sampler": noise.rademacher}),
        ("rows", 1, {"antithetic": False}),
        ("columns", 2, {"sampler": noise.rademacher}),
        ("data and model", 1, {"sampler": noise.rademacher, "antithetic": False}),
    ],
)
def test_noise_for_sharded_params_sends_nothing(platform, layout, gradients, options):
    plainly = times(gradients, sent(sharded(platform, layout)))
    operations, size = plainly["all-gather"]
    # The tokens, which all gradients share, XLA:TPU may gather once more for the gradient of their embedding.
    tokens_again = plainly | {"all-gather": (operations + 1, size + 4 * BATCH * LENGTH)}
    assert sent(sharded(platform, layout, **options)) in (plainly, tokens_again)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_signs_take_fewer_operations_than_normal_noise(platform, implementation):
    normal, signs = (program(platform, name, implementation) for name in ("one draw", "signs"))
    assert compilers.cost(signs).flops < compilers.cost(normal).flops


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_signs_take_no_more_memory_than_normal_noise(platform, implementation):
    normal, signs = (program(platform, name, implementation) for name in ("one draw", "signs"))
    # To 8 kB of 600 MB: how XLA:TPU lays out small arrays.
    assert compilers.cost(signs).bytes_accessed <= 1.0001 * compilers.cost(normal).bytes_accessed
    assert compilers.memory(signs).temp <= compilers.memory(normal).temp


def test_modules_average_gradients_and_statistics_at_once(platform):
    model = nnx.eval_shape(lambda: ConvNet(nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    devices = mesh(platform)
    state = jax.tree.map(lambda x: array(devices, x.shape, x.dtype), state)
    fn = nso_jax.nnx.value_and_grad(
        network_loss, sigma=SIGMA, num_samples=2, mesh=devices, batch_argnums=(1, 2)
    )

    def step(key, state, images, labels):
        model = nnx.merge(graphdef, state)
        value, grads = fn(key, model, images, labels)
        return value, grads, nnx.state(model)

    images = array(devices, (BATCH, 16, 16, 3), spec=jax.P("data"))
    labels = array(devices, (BATCH,), jnp.int32, jax.P("data"))
    program = jax.jit(step).lower(key_for(devices), state, images, labels).compile()
    numbers = sum(x.size for x in jax.tree.leaves(state))
    assert sent(program) == {"all-reduce": (1, 4 * (numbers + 1))}
