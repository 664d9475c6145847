"""How much each batch counts, against the dense Hessian of all data and the true mean over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import KEY, Loader, dense, flat

from nso_jax import curvature, noise

W = {"v": np.array([0.7]), "w": np.array([0.3, -0.8])}
TOKENS = {"weight": lambda batch: batch["mask"].sum()}


def model(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) * params["v"][None]


def token_loss(outputs, batch):
    """The mean over tokens; NaN for a batch of padding."""
    losses = jnp.where(batch["mask"], jax.nn.softplus(outputs) + outputs**2, 0)
    return jnp.sum(losses) / jnp.sum(batch["mask"], dtype=losses.dtype)


@jax.jit
def loss(params, batch):
    return token_loss(model(params, batch), batch)


def gauss_newton(_, *args, **options):
    return curvature.gauss_newton(model, token_loss, *args, **options)


def data():
    """Sequences of very different lengths, in batches of different sizes; one has nothing but padding."""
    rng = np.random.default_rng(0)
    lengths = [[5, 4, 5], [1], [0, 0], [1, 1, 2]]
    return [
        {"mask": np.arange(5) < np.array(rows)[:, None], "x": rng.normal(size=(len(rows), 5, 2))}
        for rows in lengths
    ]


def joined():
    return jax.tree.map(lambda *parts: np.concatenate(parts), *data())


def hessian():
    return dense(loss, jax.tree.map(jnp.asarray, W), joined())


def gauss_newton_matrix():
    batch = joined()
    outputs = model(W, batch)
    jacobian = dense_jacobian(batch)
    curve = jax.hessian(token_loss)(outputs, batch).reshape(outputs.size, outputs.size)
    return jacobian.T @ curve @ jacobian


def dense_jacobian(batch):
    parts = jax.tree.leaves(jax.jacobian(model)(W, batch))
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts], axis=1)


MATRICES = [(curvature.hessian, hessian), (gauss_newton, gauss_newton_matrix)]
pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("form", [list, Loader])
@pytest.mark.parametrize(("made", "matrix"), MATRICES)
def test_products_are_those_of_the_mean_over_tokens(form, made, matrix):
    product = made(loss, W, form(data()), **TOKENS)
    columns = [flat(product({"v": v[:1], "w": v[1:]})) for v in jnp.eye(3)]
    np.testing.assert_allclose(columns, matrix(), rtol=1e-10, atol=1e-12)


def test_weights_that_are_the_sizes_change_nothing():
    batches = [batch for batch in data() if batch["mask"].any()]
    plain = curvature.hessian(loss, W, batches)(W)
    sized = curvature.hessian(loss, W, batches, weight=lambda batch: 10 * len(batch["x"]))(W)
    np.testing.assert_allclose(flat(sized), flat(plain), rtol=1e-12)
    assert abs(flat(plain) - hessian() @ flat(W)).max() > 1e-2  # and are not those of the tokens


@pytest.mark.parametrize(("made", "matrix"), MATRICES)
def test_estimators_measure_the_mean_over_tokens(made, matrix):
    h, exact, values = made(loss, W, data(), **TOKENS), matrix(), np.linalg.eigvalsh(matrix())
    assert curvature.trace(KEY, h).value == pytest.approx(np.trace(exact), rel=1e-9)
    np.testing.assert_allclose(flat(curvature.diagonal(KEY, h).value), np.diag(exact), rtol=1e-9)
    np.testing.assert_allclose(curvature.eigenvalues(KEY, h, k=3).values, values[::-1], rtol=1e-9)
    nodes = curvature.spectral_density(KEY, h, num_probes=2, num_steps=3).nodes[0]
    np.testing.assert_allclose(np.sort(nodes), values, rtol=1e-9)


def test_gaps_are_those_of_the_mean_over_tokens():
    options = {"num_samples": 4, "sampler": noise.rademacher}
    counts = []
    h, of_joined = curvature.hessian(loss, W, data(), **TOKENS), curvature.hessian(loss, W, joined())
    table = curvature.noise_stability_gap(KEY, h, sigmas=[0.1], **options, callback=counts.append)
    whole = curvature.noise_stability_gap(KEY, of_joined, sigmas=[0.1], **options)
    assert table.loss == pytest.approx(float(loss(W, joined())), rel=1e-12)
    np.testing.assert_allclose(table.gap, whole.gap, rtol=1e-9)
    np.testing.assert_allclose(table.quadratic, 0.1**2 / 2 * np.trace(hessian()), rtol=1e-9)
    assert counts == [9 * b + 1 + 2 * j for b in range(3) for j in range(1, 5)]  # without the padding
    found = curvature.suggest_sigma(KEY, h, **options)
    same = curvature.suggest_sigma(KEY, of_joined, **options)
    assert found.sigma == pytest.approx(same.sigma, rel=1e-6)
    assert found.loss == pytest.approx(table.loss)


# A batch whose leaves do not agree


def class_loss(params, batch):
    return jnp.mean((batch["x"] @ params) ** 2 * jnp.sum(batch["a_priori"]))


def with_priors():
    rng = np.random.default_rng(1)
    return [{"a_priori": np.array([0.4, 0.8]), "x": rng.normal(size=(n, 3))} for n in (3, 11)]


def product(batches, **options):
    return curvature.hessian(class_loss, jnp.ones(3), batches, **options)(jnp.ones(3))


@pytest.mark.parametrize("form", [list, Loader])
def test_error_where_leaves_disagree_on_the_number_of_examples(form):
    message = r"batches\[0\]: its leaves.*\['a_priori'\]: 2, \['x'\]: 3.*weight=lambda batch"
    with pytest.raises(ValueError, match=message):
        product(form(with_priors()))


def test_leaves_that_disagree_are_no_matter_with_a_weight_or_for_one_batch():
    batches = with_priors()
    x = np.concatenate([batch["x"] for batch in batches])
    exact = 2 * 1.2 * x.T @ x / 14
    result = product(batches, weight=lambda batch: batch["x"].shape[0])
    np.testing.assert_allclose(result, exact @ np.ones(3), rtol=1e-10)
    for one in (batches[0], batches[:1], Loader(batches[:1])):
        x = batches[0]["x"]
        np.testing.assert_allclose(product(one), 2 * 1.2 * x.T @ x @ np.ones(3) / 3, rtol=1e-10)


@pytest.mark.parametrize(
    "more", [{}, {"rate": 0.1}, {"key": jax.random.key(0)}, {"none": None}, {"labels": np.arange(3)}]
)
def test_ordinary_batches_are_not_refused(more):
    batch = {"x": np.ones((3, 2)), **more}
    h = curvature.hessian(lambda w, b: jnp.mean((b["x"] @ w) ** 2), jnp.ones(2), [batch, batch])
    np.testing.assert_allclose(h(jnp.ones(2)), [4, 4])


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (3, TypeError, "weight: expected a function of a batch, or None, got 3"),
        (lambda _: "many", TypeError, r"weight\(batches\[0\]\): expected a real number, got 'many'"),
        (lambda _: True, TypeError, r"weight\(batches\[0\]\): expected a real number"),
        (lambda _: 1j, TypeError, r"weight\(batches\[0\]\): expected a real number"),
        (lambda batch: batch["a_priori"], ValueError, r"weight\(batches\[0\]\): expected a scalar.*\(2,\)"),
        (lambda _: -1, ValueError, r"weight\(batches\[0\]\): expected a finite number >= 0, got -1"),
        (lambda _: np.nan, ValueError, r"weight\(batches\[0\]\): .*got nan"),
        (lambda b: jnp.inf * (len(b["x"]) > 5), ValueError, r"weight\(batches\[0\]\): .*got nan"),
        (lambda b: np.where(len(b["x"]) > 5, np.inf, 1), ValueError, r"weight\(batches\[1\]\): .*got inf"),
        (lambda _: 0, ValueError, "weight: is 0 for all batches"),
    ],
)
def test_errors_in_the_weight(weight, error, message):
    with pytest.raises(error, match=message):
        product(with_priors(), weight=weight)


def test_a_product_that_is_not_finite_is_named_by_its_batch():
    batches = data()
    batches[3]["x"][0, 0] = np.inf
    with pytest.raises(FloatingPointError, match=r"batches\[3\] is not finite"):
        curvature.hessian(loss, W, batches, **TOKENS)(W)
