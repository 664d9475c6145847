"""What holds for every pytree, option and key: properties that Hypothesis looks for exceptions to."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import nso_jax
import nso_jax.nnx
from nso_jax import noise, parallel, sharpness

# What compiles: each takes a second or so.
compiled = settings(max_examples=max(1, settings.default.max_examples // 4))

# --- pytrees ------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_pytree_node_class
class Box:
    """A node of the user's own, whose leaf has no name: paths then count."""

    def __init__(self, content):
        self.content = content

    def tree_flatten(self):
        return (self.content,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


SHAPES = [(), (3,), (2, 3), (0,), (2, 0)]
WIDE = [np.float32, np.float64, np.complex64]
DTYPES = [np.float16, jnp.bfloat16, *WIDE]


def array(dtype, shape, seed):
    rng = np.random.default_rng(seed)
    parts = rng.uniform(-1.5, 1.5, (2, *shape))
    return np.asarray(parts[0] + 1j * parts[1] if np.issubdtype(dtype, complex) else parts[0]).astype(dtype)


def arrays(dtypes):
    return st.builds(array, st.sampled_from(dtypes), st.sampled_from(SHAPES), st.integers(0, 9))


def trees(leaves, max_leaves=4):
    def nodes(children):
        return (
            st.lists(children, max_size=3)
            | st.lists(children, max_size=2).map(tuple)
            | st.dictionaries(st.sampled_from("abcd"), children, max_size=3)
            | st.builds(Pair, children, children)
            | st.builds(Box, children)
        )

    return st.recursive(leaves | st.none(), nodes, max_leaves=max_leaves)


params_trees = trees(arrays(DTYPES) | st.floats(-1, 1))
wide_trees = trees(arrays(WIDE))
numbers = st.integers(-3, 3) | st.booleans() | st.floats(-1, 1)
aux_trees = trees(arrays([np.int32, np.bool_, np.float16, np.float32, np.complex64]) | numbers)


@st.composite
def prefixes(draw, tree, values):
    """A value for the whole, or prefixes for each of its branches."""
    children, node = jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)
    if jax.tree_util.treedef_is_leaf(node) or draw(st.booleans()):
        return draw(values)
    return node.unflatten([draw(prefixes(child, values)) for child in children])


def or_function(options):
    return options | options.map(lambda option: lambda _: option)


def sigmas(params, sizes):
    relative = st.builds(noise.relative, sizes, st.sampled_from(["weight", "channel", "tensor"]))
    full = sizes.map(lambda size: jax.tree.map(lambda w: np.full(np.shape(w), size, np.float32), params))
    return or_function(prefixes(params, sizes) | full) | relative


def masks(params):
    return st.none() | or_function(prefixes(params, st.booleans()))


SIZES = st.sampled_from([0.0, 0.1, np.float32(0.3), 0.5])
SAMPLERS = [
    noise.normal,
    noise.rademacher,
    noise.uniform,
    noise.laplace,
    noise.centered_binomial,
    noise.cauchy,
    jax.random.normal,
]
draw_options = st.fixed_dictionaries(
    {
        "num_samples": st.integers(1, 3),
        "antithetic": st.booleans(),
        "sampler": st.sampled_from(SAMPLERS),
        "chunk_size": st.sampled_from([None, 1, 2, 5]),
    }
)
clean_weights = st.sampled_from([0.0, 0.3, np.float32(0.25), 1])
keys = st.builds(
    lambda new, seed: new(seed), st.sampled_from([jax.random.key, jax.random.PRNGKey]), st.integers(0, 9)
)


def wide_enough(*trees):
    """A context in which 64 bit are on if a leaf needs them."""
    return jax.enable_x64(any(getattr(leaf, "dtype", None) == np.float64 for leaf in jax.tree.leaves(trees)))


# --- losses -------------------------------------------------------------------------------------------


def real_parts(tree):
    """Real numbers in the widest dtype that there is."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    parts = [part for x in leaves for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    return [part.astype(jnp.result_type(float)) for part in parts if part.size]


def quadratic(*trees):
    """With an H that couples all weights of all leaves."""
    total = jnp.zeros((), jnp.result_type(float))
    square = total
    for x in real_parts(trees):
        total += jnp.mean(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape))
        square += jnp.mean(x**2)
    return total**2 + total + square


def cubic(*trees):
    total = sum((jnp.mean(x) for x in real_parts(trees)), start=jnp.zeros((), jnp.result_type(float)))
    return total**3 + sum((jnp.mean(x**3) for x in real_parts(trees)), start=quadratic(*trees))


def typed_key(key):
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def assert_like(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(e), jnp.result_type(e))


def assert_close(actual, expected, *terms, ulps=50):
    """To rounding of sums whose terms are no larger than those given; float16 and bfloat16 round coarsely."""
    assert_like(actual, expected)
    sizes = [np.abs(np.asarray(x, np.complex128)) for x in jax.tree.leaves((expected, terms))]
    largest = max([1.0, *(size.max() for size in sizes if size.size)])
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(expected)]
    infos = [jnp.finfo(dtype) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    wide = max([float(info.eps) for info in infos if info.bits >= 32], default=0.0)
    for a, e, dtype in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), dtypes, strict=True):
        if jnp.issubdtype(dtype, jnp.inexact):
            eps = ulps * wide if jnp.finfo(dtype).bits >= 32 else 2 * float(jnp.finfo(dtype).eps)
            pair = (np.asarray(x, np.complex128) for x in (a, e))
            np.testing.assert_allclose(*pair, rtol=0, atol=eps * largest)
        else:
            np.testing.assert_array_equal(a, e)


def weighted_mean(evaluations, clean, weight):
    def mean(like, *xs):
        average = sum(np.asarray(x, np.complex128) for x in xs) / len(xs)
        mixed = weight * np.asarray(like, np.complex128) + (1 - weight) * average
        complex_leaf = jnp.iscomplexobj(like)
        return jnp.asarray(mixed if complex_leaf else mixed.real).astype(jnp.result_type(like))

    return jax.tree.map(mean, clean, *evaluations)


# --- value_and_grad -----------------------------------------------------------------------------------


@given(st.data())
def test_structure_shapes_and_dtypes_are_those_of_jax(data):
    args = data.draw(st.tuples(params_trees, params_trees, aux_trees))
    argnums = data.draw(st.sampled_from([0, 1, -3, (0,), (0, 1), (1, 0), [-2, 0]]))
    has_aux, aux_out = data.draw(st.booleans()), data.draw(aux_trees)
    value_dtype = data.draw(st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32]))
    params = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums)
    aux = data.draw(prefixes((aux_out, 0.0), st.sampled_from(["mean", "stack", "clean"])))
    options = data.draw(draw_options)
    key, sigma, mask = data.draw(st.tuples(keys, sigmas(params, SIZES), masks(params)))
    clean_weight = data.draw(clean_weights)

    def fun(*args, scale):
        loss = (scale * cubic(*args[:2])).astype(value_dtype)
        return (loss, (aux_out, loss)) if has_aux else loss

    with wide_enough(args):
        fn = nso_jax.value_and_grad(
            fun,
            sigma=sigma,
            mask=mask,
            clean_weight=clean_weight,
            argnums=argnums,
            has_aux=has_aux,
            aux=aux if has_aux else "mean",
            **options,
        )
        expected = jax.eval_shape(jax.value_and_grad(fun, argnums, has_aux), *args, scale=2.0)
        actual = jax.eval_shape(fn, key, *args, scale=2.0)
        if has_aux:
            (value, aux_like), grads = expected
            count = options["num_samples"] * (1 + options["antithetic"])
            stacked = jax.tree.map(
                lambda mode, x: jax.ShapeDtypeStruct((count,) * (mode == "stack") + x.shape, x.dtype),
                jax.tree.broadcast(aux, aux_like),
                aux_like,
            )
            expected = (value, stacked), grads
        assert_like(actual, expected)


@pytest.mark.slow
@given(st.data())
def test_the_result_is_the_weighted_mean_of_all_evaluations(data):
    """Whatever the chunks, for any sigma, mask and sampler, and in low precision."""
    params, key = data.draw(st.tuples(params_trees, keys))
    options = data.draw(draw_options)
    sigma, mask, weight = data.draw(st.tuples(sigmas(params, SIZES), masks(params), clean_weights))
    with wide_enough(params):
        fn = nso_jax.value_and_grad(cubic, sigma=sigma, mask=mask, clean_weight=weight, **options)
        us = [
            noise.perturbation(draw_key, params, sigma, sampler=options["sampler"], mask=mask)
            for draw_key in jax.random.split(typed_key(key), options["num_samples"])
        ]
        signs = (1, -1) if options["antithetic"] else (1,)
        evaluations = [
            jax.value_and_grad(cubic)(noise.perturb(params, u, sign)) for u in us for sign in signs
        ]
        plain = jax.value_and_grad(cubic)(params)
        assert_close(fn(key, params), weighted_mean(evaluations, plain, weight), evaluations, plain)


@pytest.mark.slow
@given(st.data())
def test_a_quadratic_gives_its_gradient_and_a_cubic_half_u_H_u_more(data):
    params, key = data.draw(st.tuples(wide_trees, keys))
    k = data.draw(st.integers(1, 3))
    sampler = data.draw(st.sampled_from([noise.normal, noise.rademacher, noise.laplace]))
    sigma, mask = data.draw(st.tuples(sigmas(params, SIZES), masks(params)))
    with wide_enough(params):
        params = jax.tree.map(jnp.asarray, params)
        estimate = functools.partial(
            nso_jax.value_and_grad, sigma=sigma, mask=mask, num_samples=k, sampler=sampler
        )
        assert_close(estimate(quadratic)(key, params)[1], jax.grad(quadratic)(params))

        def curvature(params, u):
            def slope(params):
                return jax.jvp(cubic, (params,), (u,))[1]

            return jax.jvp(slope, (params,), (u,))[1]

        def smoothed(params):
            return cubic(params) + sum(curvature(params, u) for u in us) / (2 * k)

        us = [
            jax.tree.map(
                lambda w, u: jnp.zeros_like(w) if u is None else u,
                params,
                noise.perturbation(draw_key, params, sigma, sampler=sampler, mask=mask),
            )
            for draw_key in jax.random.split(typed_key(key), k)
        ]
        assert_close(estimate(cubic)(key, params), jax.value_and_grad(smoothed)(params), us)


@pytest.mark.slow
@given(st.data())
def test_without_noise_it_is_the_plain_gradient(data):
    """Be it that sigma is 0 in some form, that no leaf is perturbed, or that only the clean gradient counts."""
    params, key, options = data.draw(st.tuples(params_trees, keys, draw_options))
    nothing = data.draw(
        st.fixed_dictionaries({"sigma": sigmas(params, st.sampled_from([0, 0.0, np.float32(0)]))})
        | st.fixed_dictionaries({"sigma": SIZES, "mask": or_function(prefixes(params, st.just(False)))})
        | st.fixed_dictionaries({"sigma": SIZES, "clean_weight": st.sampled_from([1, 1.0, np.float32(1)])})
    )
    with wide_enough(params):
        fn = nso_jax.value_and_grad(cubic, **nothing, **options)
        assert_close(fn(key, params), jax.value_and_grad(cubic)(params))


def separable(params):
    return sum((jnp.mean(x**4) for x in real_parts(params)), start=jnp.zeros((), jnp.result_type(float)))


@given(st.data())
def test_masked_leaves_do_not_move_and_get_gradients(data):
    """A leaf's gradient here depends on that leaf alone, and any move of it is seen."""
    params, key, options = data.draw(st.tuples(wide_trees, keys, draw_options))
    mask = data.draw(prefixes(params, st.booleans()))
    with wide_enough(params):
        fn = nso_jax.value_and_grad(
            separable, sigma=0.5, mask=mask, **options | {"sampler": noise.rademacher}
        )
        grads, plain = fn(key, params)[1], jax.grad(separable)(params)
        flags = jax.tree.leaves(jax.tree.broadcast(mask, params))
        for g, p, flag in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), flags, strict=True):
            if flag and g.size:
                assert not np.allclose(g, p, rtol=1e-3)
            else:
                assert_close(g, p)


@compiled
@given(st.data())
def test_jitted_and_eager_results_agree(data):
    params, key, options = data.draw(st.tuples(wide_trees, keys, draw_options))
    sigma, mask, weight = data.draw(st.tuples(sigmas(params, SIZES), masks(params), clean_weights))
    options["sampler"] = noise.uniform  # bounded, so that rounding stays small
    with wide_enough(params):
        fn = nso_jax.value_and_grad(cubic, sigma=sigma, mask=mask, clean_weight=weight, **options)
        assert_close(jax.jit(fn)(key, params), fn(key, params), ulps=200)


# --- noise --------------------------------------------------------------------------------------------


@given(st.data())
def test_a_leafs_noise_depends_on_the_key_and_its_path_alone(data):
    x, y, z = data.draw(st.tuples(params_trees, params_trees, params_trees))
    key, sampler = data.draw(st.tuples(keys, st.sampled_from(SAMPLERS)))
    with wide_enough(x, y, z):
        draw = functools.partial(noise.perturbation, key, sigma=0.1, sampler=sampler)
        whole = draw({"x": x, "y": y})
        for part in (draw({"x": x}), draw({"z": z, "y": y, "x": x}), draw({"y": y, "x": x, "xx": 1.0})):
            for name in part.keys() & whole.keys():
                jax.tree.map(np.testing.assert_array_equal, part[name], whole[name])
        other = jax.random.fold_in(typed_key(key), 1)
        for a, b, c in zip(*map(jax.tree.leaves, (draw({"x": x}), draw({"y": x}), {"x": x})), strict=True):
            assert (a.shape, a.dtype) == (np.shape(c), np.promote_types(jnp.result_type(c), np.float32))
            if a.size and sampler not in (noise.rademacher, noise.centered_binomial):
                assert not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(draw({"x": x})),
            jax.tree.leaves(noise.perturbation(other, {"x": x}, 0.1, sampler=sampler)),
            strict=True,
        ):
            if a.size and sampler not in (noise.rademacher, noise.centered_binomial):
                assert not np.array_equal(a, b)


# --- optax, rivals, microbatches, NNX -----------------------------------------------------------------


@given(st.data())
def test_the_optax_adapter_gives_what_value_and_grad_gives(data):
    params = data.draw(params_trees.filter(lambda params: params is not None))  # optax's word for missing
    key, options = data.draw(st.tuples(keys, draw_options))
    sigma, mask, weight = data.draw(st.tuples(sigmas(params, SIZES), masks(params), clean_weights))
    count = data.draw(st.integers(0, 3))
    options |= {"mask": mask, "clean_weight": weight}
    schedule = callable(sigma) and not isinstance(sigma, noise.Relative)
    with wide_enough(params):
        tx = nso_jax.noise_stability((lambda _: sigma) if schedule else sigma, key=key, **options)
        state = tx.init(params)._replace(count=jnp.int32(count))
        grad_fn = lambda params, _: jax.grad(cubic)(params)  # noqa: E731
        clean = grad_fn(params, 0)
        updates, new_state = tx.update(clean, state, params, grad_fn=grad_fn)
        fn = nso_jax.value_and_grad(cubic, sigma=sigma, **options)
        assert_close(updates, fn(jax.random.fold_in(typed_key(key), count), params)[1])
        assert_like(new_state, state)
        assert new_state.count == count + 1
        np.testing.assert_array_equal(new_state.rng_key, state.rng_key)
        chained = nso_jax.nso(optax.sgd(0.1), 0.1, key=key)
        assert_like(
            jax.eval_shape(
                functools.partial(chained.update, grad_fn=grad_fn), clean, chained.init(params), params
            )[0],
            updates,
        )


@given(st.data())
def test_rivals_and_microbatches_keep_structure_shapes_and_dtypes(data):
    params, key, mask = data.draw(params_trees.flatmap(lambda p: st.tuples(st.just(p), keys, masks(p))))
    aux_out, num_microbatches = data.draw(st.tuples(aux_trees, st.sampled_from([1, 2, 3])))
    rho = data.draw(SIZES)
    method = data.draw(
        st.sampled_from(
            [
                functools.partial(sharpness.sam, rho=rho),
                functools.partial(sharpness.usam, rho=rho),
                functools.partial(sharpness.asam, rho=rho),
                functools.partial(sharpness.rsam, rho=rho, sigma=0.1),
                functools.partial(nso_jax.value_and_grad, sigma=rho),
            ]
        )
    )

    def fun(params, batch):
        return cubic(params) + jnp.mean(batch).astype(jnp.result_type(float)), (aux_out, batch[0])

    with wide_enough(params):
        args = (params, np.ones((6, 2), np.float32))
        expected = jax.eval_shape(jax.value_and_grad(fun, has_aux=True), *args)
        fn = parallel.microbatch(method(fun, mask=mask, has_aux=True), num_microbatches)
        assert_like(jax.eval_shape(fn, key, *args), expected)


@pytest.mark.slow
@compiled
@given(st.data())
def test_microbatches_and_nnx_modules_follow_the_keys(data):
    key, sigma, options = data.draw(st.tuples(keys, SIZES, draw_options))
    m = data.draw(st.sampled_from([1, 2, 4]))
    options["sampler"] = noise.uniform
    model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.linspace(-1, 1, 12).reshape(4, 3)
    params = nnx.state(model, nnx.Param)

    def loss(params, x):
        return jnp.mean((x @ params["kernel"][...]) ** 4) + jnp.sum(params["bias"][...] ** 4)

    fn = nso_jax.value_and_grad(loss, sigma=sigma, **options)
    part_keys = jax.random.split(typed_key(key), m) if m > 1 else [key]
    parts = [fn(part_key, params, x[i::m]) for i, part_key in enumerate(part_keys)]
    expected = weighted_mean(parts, parts[0], 0.0)
    assert_close(parallel.microbatch(fn, m)(key, params, x), expected, parts)
    through_nnx = nso_jax.nnx.value_and_grad(
        lambda model, x: loss({"kernel": model.kernel, "bias": model.bias}, x), sigma=sigma, **options
    )
    value, grads = nso_jax.nnx.microbatch(through_nnx, m)(key, model, x)
    assert_close((value, grads), expected, parts)
