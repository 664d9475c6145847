"""Sets of examples, batches of them, and a few of each class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kit.files import UserError
from benchmarks.tasks import data


def examples(number=11):
    """Each row is a function of its label."""
    labels = np.arange(number, dtype=np.int32)
    return data.Examples(np.stack([labels, 2 * labels], axis=1).astype(np.float32), labels)


def take(stream, number):
    return [next(stream) for _ in range(number)]


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_batches_are_permutations_cut_into_parts():
    rng = np.random.default_rng([7, 2])
    parts = [
        order[start : start + 3] for order in (rng.permutation(11) for _ in range(4)) for start in (0, 3, 6)
    ]
    everything = examples()
    expected = [data.Examples(everything.inputs[part], everything.labels[part]) for part in parts]
    assert_equal(take(data.batches(everything, 3, seed=7), 12), expected)


@pytest.mark.parametrize("first", [0, 1, 3, 4, 7])
def test_batches_go_on_where_they_stopped(first):
    whole = take(data.batches(examples(), 3, seed=0), 12)
    assert_equal(take(data.batches(examples(), 3, 0, first), 12 - first), whole[first:])


def test_batches_that_are_skipped_are_not_made(monkeypatch):
    made = []
    monkeypatch.setattr(data, "_rows_of", lambda _, indices: made.append(indices))
    next(data.batches(examples(), 3, 0, first=1000))
    assert len(made) == 1


def test_batches_of_pytrees_take_the_same_rows_of_each():
    plain = examples()
    inputs = {"tokens": jnp.asarray(plain.inputs), "mask": plain.labels[:, None] % 2 == 0}
    pairs = zip(
        take(data.batches(plain._replace(inputs=inputs), 4, seed=3), 5),
        take(data.batches(plain, 4, seed=3), 5),
        strict=True,
    )
    for batch, expected in pairs:
        mask = expected.labels[:, None] % 2 == 0
        assert_equal(batch, expected._replace(inputs={"tokens": expected.inputs, "mask": mask}))


@pytest.mark.parametrize("size", [0, -1, 12])
def test_batches_of_more_than_there_are_or_of_none_are_refused(size):
    with pytest.raises(UserError, match=f"of 1 to 11 examples, as many as there are, got {size}"):
        data.batches(examples(), size, seed=0)
    assert len(next(data.batches(examples(), 11, seed=0)).labels) == 11


def test_classes_are_numbered_in_the_order_given():
    everything = examples()._replace(labels=np.array([5, 1, 3, 1, 0, 5, 3, 3, 0, 1, 5], np.int32))
    some = data.only_classes(everything, [3, 5])
    np.testing.assert_array_equal(some.inputs, everything.inputs[[0, 2, 5, 6, 7, 10]])
    assert_equal(some.labels, np.array([1, 0, 1, 0, 0, 1], np.int32))
    with pytest.raises(UserError, match="no examples of class 4"):
        data.only_classes(everything, [3, 4, 5])


def test_few_are_as_many_of_each_class_and_the_rest_is_left():
    everything = examples(40)._replace(labels=np.arange(40, dtype=np.int32) % 3)
    few, rest = data.few_shot(everything, 4, seed=0)
    np.testing.assert_array_equal(np.bincount(few.labels), [4, 4, 4])
    for part in (few, rest):
        assert np.all(np.diff(part.inputs[:, 0]) > 0)
        np.testing.assert_array_equal(part.labels, part.inputs[:, 0] % 3)
    together = np.concatenate([few.inputs, rest.inputs])
    np.testing.assert_array_equal(together[np.argsort(together[:, 0])], everything.inputs)
    assert_equal(data.few_shot(everything, 4, seed=0), (few, rest))
    assert not np.array_equal(data.few_shot(everything, 4, seed=1)[0].inputs, few.inputs)


def test_few_of_a_class_are_drawn_evenly():
    everything = examples(6)._replace(labels=np.zeros(6, np.int32))
    drawn = np.concatenate([data.few_shot(everything, 2, seed)[0].inputs[:, 0] for seed in range(600)])
    np.testing.assert_allclose(np.bincount(drawn.astype(int)), 200, atol=5 * (600 * 2 / 9) ** 0.5)


def test_too_few_of_a_class_are_told():
    everything = examples(5)._replace(labels=np.array([0, 0, 1, 1, 1], np.int32))
    few, rest = data.few_shot(everything, 2, seed=0)
    assert (len(few.labels), rest.labels.tolist()) == (4, [1])
    with pytest.raises(UserError, match="class 0 has 2 examples, not 3"):
        data.few_shot(everything, 3, seed=0)


def test_digits_are_split_without_overlap():
    first, second = data.digits(0, 200), data.digits(1, 200)
    assert [len(part.labels) for part in first] == [200, 597, 1000, 1000]
    everything = np.concatenate([part.inputs for part in first[:3]]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == len(np.unique(_all_digits(), axis=0))
    np.testing.assert_array_equal(first.test.inputs, second.test.inputs)
    assert not np.array_equal(first.train.inputs, second.train.inputs)
    np.testing.assert_array_equal(first.train.inputs, data.digits(0, 200).train.inputs)


def test_wrong_labels_are_as_many_as_asked_for_and_only_in_training():
    clean, noisy = data.digits(3, 400), data.digits(3, 400, wrong_labels=0.2)
    np.testing.assert_array_equal(clean.train.inputs, noisy.train.inputs)
    assert np.sum(clean.train.labels != noisy.train.labels) == 80
    np.testing.assert_array_equal(clean.validation.labels, noisy.validation.labels)
    np.testing.assert_array_equal(clean.test.labels, noisy.test.labels)
    np.testing.assert_array_equal(noisy.test.inputs, noisy.mislabelled_test.inputs)
    assert np.sum(noisy.test.labels != noisy.mislabelled_test.labels) == 200
    assert set(np.unique(noisy.train.labels)) == set(range(10))


def _all_digits():
    return np.concatenate([part.inputs for part in data.digits(5, 100)[:3]]).reshape(1797, -1)


def test_an_epoch_of_batches_has_every_example_once():
    examples = data.Examples(np.arange(10.0), np.arange(10))
    stream = data.batches(examples, batch_size=5, seed=0)
    epochs = [[next(stream), next(stream)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(np.concatenate([batch.labels for batch in epoch])) == list(range(10))
        for batch in epoch:
            np.testing.assert_array_equal(batch.inputs, batch.labels)
    assert not np.array_equal(epochs[0][0].labels, epochs[1][0].labels)
