"""A tokenizer trained on captions, and the batches."""

import numpy as np
import pytest

from benchmarks.kit.files import UserError
from benchmarks.tasks import captions
from benchmarks.tasks.bert import Tokens
from benchmarks.tasks.captions import Tokenized

TEXTS = ["A black dog runs .", "Two dogs run in the snow .", "A man rides a bike .", "naïve café ☃"]


@pytest.fixture(scope="module")
def tokenizer():
    return captions.train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize("text", [*TEXTS, "A  zebra, unseen before: 1 + 1 = 2!", "日本"])
def test_decoding_gives_the_text_back_in_lower_case(tokenizer, text):
    tokens, mask = captions.tokenize(tokenizer, [text], 64)
    decoded = tokenizer.decode(tokens[0, : mask.sum()].tolist())
    assert decoded == f" {text.lower()}"


def test_a_tokenizer_has_the_tokens_that_it_was_told_and_is_the_same_each_time(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert captions.train_tokenizer(TEXTS, 300).to_str() == tokenizer.to_str()
    assert captions.train_tokenizer(TEXTS, captions.LEAST_VOCABULARY).get_vocab_size() == 257


def test_texts_are_cut_and_padded(tokenizer):
    whole = tokenizer.encode(TEXTS[0]).ids
    tokens, mask = captions.tokenize(tokenizer, [TEXTS[0], "a"], 3)
    np.testing.assert_array_equal(tokens[0], whole[:3])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [1, 0, 0]])
    assert tokens[1, 1:].tolist() == [tokenizer.token_to_id(captions.PADDING)] * 2


@pytest.fixture
def tokenized():
    """Ten images, each of pixels that tell its number and column, with three captions that tell both numbers."""
    images = 20 * np.arange(10)[:, None, None, None] + np.arange(12)[None, None, :, None]
    images = np.broadcast_to(images, (10, 12, 12, 3)).astype(np.uint8)
    tokens = (10 * np.arange(10)[:, None] + np.arange(3))[:, :, None]
    return Tokenized(images, Tokens(tokens, np.ones_like(tokens)))


def test_batches_go_on_as_they_would_have(tokenized):
    all_of, later = captions.batches(tokenized, 4, 7), captions.batches(tokenized, 4, 7, 3)
    expected = [next(all_of) for _ in range(5)][3:]
    for one, other in zip(expected, later, strict=False):
        np.testing.assert_array_equal(one.inputs.images, other.inputs.images)
        np.testing.assert_array_equal(one.inputs.captions.tokens, other.inputs.captions.tokens)


def test_images_keep_their_captions_and_are_mirrored_and_moved(tokenized):
    """Columns go up or down by one at each step, but where the edge is repeated."""
    drawn = captions.batches(tokenized, 5, 0)
    chosen, directions, firsts = set(), set(), set()
    for _ in range(40):
        batch = next(drawn)
        numbers = batch.inputs.captions.tokens[:, 0] // 10
        chosen |= set((batch.inputs.captions.tokens[:, 0] % 10).tolist())
        columns = batch.inputs.images[:, 0, :, 0].astype(int) - 20 * numbers[:, None]
        assert ((columns >= 0) & (columns < 12)).all()
        steps = np.diff(columns, axis=1)
        for row, line in zip(steps, columns, strict=True):
            assert set(row.tolist()) in ({1}, {-1}, {0, 1}, {0, -1})
            directions.add(int(np.sign(row.sum())))
            firsts.add(int(line.min()) - int(11 - line.max()))
    assert chosen == {0, 1, 2}
    assert directions == {-1, 1}
    assert firsts == set(range(-captions.SHIFT, captions.SHIFT + 1))


def test_pairs_have_the_first_caption(tokenized):
    np.testing.assert_array_equal(tokenized.at(slice(8, None)).pairs().inputs.captions.tokens[:, 0], [80, 90])


def test_a_batch_of_more_than_all_is_refused(tokenized):
    with pytest.raises(UserError, match="expected a batch of 1 to 10 examples"):
        next(captions.batches(tokenized, 11, 0))
