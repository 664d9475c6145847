"""Captions as tokens, by a tokenizer trained on some of them, and batches of captioned images."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from benchmarks.tasks import data
from benchmarks.tasks.bert import Tokens
from benchmarks.tasks.clip import Pairs
from benchmarks.tasks.data import Examples
from benchmarks.tasks.parquet import Captioned

PADDING = "[PAD]"
LEAST_VOCABULARY = 257  # each byte, and padding
SHIFT = 4  # pixels, the most that an image to train on is moved by


class Tokenized(NamedTuple):
    """Images and the tokens of their captions.

    Attributes:
        images: Of shape (n, height, width, channels), in 0 to 255.
        captions: Of shape (n, captions of an image, length).
    """

    images: np.ndarray
    captions: Tokens

    def pairs(self, chosen: np.ndarray | int = 0) -> Examples:
        """Each image with one of its captions: the first, or that of a number for each.

        The labels are the numbers of the images, and no classes.
        """
        rows = np.arange(len(self.images))
        return Examples(Pairs(self.images, Tokens(*(array[rows, chosen] for array in self.captions))), rows)

    def at(self, rows: np.ndarray | slice) -> Self:
        """The images of these numbers."""
        return type(self)(self.images[rows], Tokens(*(array[rows] for array in self.captions)))


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Byte-pair encoding of lower-case text, which knows every byte and so every text.

    Args:
        captions: What to merge pairs by.
        vocabulary: How many tokens at most.
    """
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(captions, trainer)
    return made


def tokenize(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int) -> Tokens:
    """Texts as numbers, each cut or padded to a length."""
    rows = [encoding.ids[:length] for encoding in tokenizer.encode_batch(list(texts))]
    tokens = np.full((len(rows), length), tokenizer.token_to_id(PADDING), np.int32)
    mask = np.zeros_like(tokens)
    for number, ids in enumerate(rows):
        tokens[number, : len(ids)], mask[number, : len(ids)] = ids, 1
    return Tokens(tokens, mask)


def tokenize_all(tokenizer: tokenizers.Tokenizer, captioned: Captioned, length: int) -> Tokenized:
    """Images with all of their captions as tokens."""
    texts = [text for captions in captioned.captions for text in captions]
    tokens = tokenize(tokenizer, texts, length)
    number = len(captioned.images)
    return Tokenized(captioned.images, Tokens(*(array.reshape(number, -1, length) for array in tokens)))


def batches(examples: Tokenized, batch_size: int, seed: int, first: int = 0) -> Iterator[Examples]:
    """Endless batches of images, mirrored or not and moved by some pixels, with one of their captions.

    Args:
        examples: What they are taken from.
        batch_size: How many images a batch has.
        seed: It draws orders, captions and changes.
        first: The number of the batch to start with: what goes on from there is what it would have been.

    Raises:
        UserError: There are too few images for a batch.
    """
    each = examples.captions.tokens.shape[1]
    numbers = np.arange(len(examples.images))
    drawn = data.batches(Examples(numbers, numbers), batch_size, seed, first)
    for number, batch in enumerate(drawn, first):
        rng = np.random.default_rng([seed, 4, number])
        images, captions = examples.at(batch.inputs).pairs(rng.integers(0, each, batch_size)).inputs
        yield batch._replace(inputs=Pairs(_moved(rng, images), captions))


def _moved(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Each image mirrored or not, and moved, its edge repeated where nothing is known."""
    number, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    rows, columns = (
        rng.integers(0, 2 * SHIFT + 1, (number, 1)) + np.arange(size) for size in (height, width)
    )
    columns = np.where(rng.integers(0, 2, (number, 1)) == 1, columns[:, ::-1], columns)
    return padded[np.arange(number)[:, None, None], rows[:, :, None], columns[:, None, :]]
