"""Problems in words whose answers are worked out step by step, as GSM8K has them, as rows of tokens."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from benchmarks.kit.files import UserError
from benchmarks.tasks import parquet
from benchmarks.tasks.data import Examples
from benchmarks.tasks.smollm import Rows

BEFORE_RESULT = "\n#### "
START, END = "<|im_start|>", "<|im_end|>"


class Problem(NamedTuple):
    """A problem, in words.

    Attributes:
        question: What is asked.
        reasoning: The steps to the result, without what calculators made of them (`<<48/2=24>>`).
        result: The number at the end.
    """

    question: str
    reasoning: str
    result: str


class Encoded(NamedTuple):
    """A problem's tokens, part by part: the question as a chat has it, the reasoning, the result, the end."""

    prompt: list[int]
    reasoning: list[int]
    result: list[int]
    end: list[int]

    @property
    def tokens(self) -> list[int]:
        """All of them."""
        return [*self.prompt, *self.reasoning, *self.result, *self.end]


def load(source: Path | str) -> tuple[list[Problem], list[Problem]]:
    """The problems of the splits train and test.

    Args:
        source: A folder of Parquet files or hf://datasets/..., with the columns `question` and `answer`.

    Raises:
        UserError: Something is missing or cannot be read: a file, a column, a result after `####`.
    """
    train, test = parquet.load_columns(source, ("question", "answer"))
    return [_problem(*row) for row in train], [_problem(*row) for row in test]


def _problem(where: str, texts: tuple[str, ...]) -> Problem:
    question, answer = texts
    reasoning, mark, result = re.sub(r"<<.*?>>", "", answer).rpartition(BEFORE_RESULT)
    if not mark or not result.strip():
        raise UserError(f"{where}: expected an answer with the line '#### RESULT', got {answer[-40:]!r}")
    return Problem(question.strip(), reasoning.strip(), result.strip())


def encode(problems: Sequence[Problem], tokenizer: tokenizers.Tokenizer) -> list[Encoded]:
    """The tokens of each: those of a chat in ChatML, without a system's message.

    Args:
        problems: What to encode.
        tokenizer: That of the model, which has the chat's marks.

    Raises:
        UserError: It lacks one of them.
    """
    for mark in (START, END):
        if tokenizer.token_to_id(mark) is None:
            raise UserError(f"the model's tokenizer lacks the token {mark}")
    texts = [
        text
        for each in problems
        for text in (
            f"{START}user\n{each.question}{END}\n{START}assistant\n",
            each.reasoning + BEFORE_RESULT,
            each.result,
            END,
        )
    ]
    ids = [row.ids for row in tokenizer.encode_batch(texts)]
    return [Encoded(*ids[first : first + 4]) for first in range(0, len(ids), 4)]


def rows(problems: Sequence[Encoded], length: int, *, result_only: bool = False) -> Examples:
    """Examples for `smollm.loss`, where the tokens of the answers count, or those of the results alone.

    Args:
        problems: None longer than `length`.
        length: Tokens that are read of each row; what a problem does not fill is padding.
        result_only: Whether the tokens of the result alone count.
    """
    padded = np.zeros((len(problems), length + 1), np.int32)
    counted = np.zeros(padded.shape, bool)
    for row, counts, problem in zip(padded, counted, problems, strict=True):
        row[: len(problem.tokens)] = problem.tokens
        before = len(problem.prompt) + (len(problem.reasoning) if result_only else 0)
        counts[before : before + len(problem.result) if result_only else len(problem.tokens)] = True
    weights = counted * (len(problems) / max(1, counted.sum()))
    return Examples(Rows(padded[:, :-1], weights[:, 1:].astype(np.float32)), padded[:, 1:])


def is_same_result(answer: str, right: str) -> bool:
    """Whether an answer has a result, and it is that of the right one."""
    result = result_of(answer)
    return result is not None and result == result_of(right)


def result_of(text: str) -> str | None:
    """The result that an answer ends with, if it has one: without signs, spaces and commas in thousands."""
    _, mark, result = text.rpartition(BEFORE_RESULT.strip())
    found = re.search(r"-?\d[\d,]*(\.\d+)?", result) if mark else None
    return found.group().replace(",", "").removesuffix(".00") if found else None
