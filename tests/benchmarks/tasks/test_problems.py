"""Worked problems as rows of tokens: what counts, and data that are not as they should be."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.kit.files import UserError

pytest.importorskip("gguf")

from benchmarks.tasks import gguf_files, problems
from benchmarks.tasks.problems import Problem
from tests.benchmarks import language_model

ROWS = [
    ("How many are 2 and 3?", "Together 2+3 = <<2+3=5>>5.\n#### 5"),
    ("What do a thousand twos make? ", "It is 2*1,000 = <<2*1000=2000>>2,000.\nThat is all.\n#### 2,000"),
]
PROBLEMS = [
    Problem("How many are 2 and 3?", "Together 2+3 = 5.", "5"),
    Problem("What do a thousand twos make?", "It is 2*1,000 = 2,000.\nThat is all.", "2,000"),
]


def write(folder, rows, columns=("question", "answer")):
    for split in ("train", "test"):
        table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)})
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    language_model.write(path)
    return gguf_files.load(path).tokenizer


def test_answers_are_split_and_lose_what_calculators_made(tmp_path):
    assert problems.load(write(tmp_path, ROWS)) == (PROBLEMS, PROBLEMS)


def test_tokens_are_a_chat(tokenizer):
    for each, encoded in zip(PROBLEMS, problems.encode(PROBLEMS, tokenizer), strict=True):
        text = (
            f"<|im_start|>user\n{each.question}<|im_end|>\n<|im_start|>assistant\n"
            f"{each.reasoning}\n#### {each.result}<|im_end|>"
        )
        assert tokenizer.decode(encoded.tokens, skip_special_tokens=False) == text
        assert encoded.tokens == tokenizer.encode(text).ids


@pytest.mark.parametrize("result_only", [False, True])
def test_what_follows_in_answers_counts(result_only, tokenizer):
    encoded = problems.encode(PROBLEMS, tokenizer)
    length = max(len(each.tokens) for each in encoded) + 5
    inputs, labels = problems.rows(encoded, length, result_only=result_only)
    counted = [labels[i][inputs.weights[i] > 0].tolist() for i in range(2)]
    for each, tokens in zip(encoded, counted, strict=True):
        assert tokens == (each.result if result_only else [*each.reasoning, *each.result, *each.end])
    number = sum(map(len, counted))
    np.testing.assert_allclose(inputs.weights[inputs.weights > 0], 2 / number, rtol=1e-6)
    assert inputs.tokens.shape == labels.shape == (2, length)
    np.testing.assert_array_equal(inputs.tokens[:, 1:], labels[:, :-1])


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("so\n#### 2,000", "2000"),
        ("#### $12.00.", "12"),
        ("#### -3 apples", "-3"),
        ("#### 1.5\n", "1.5"),
        ("it is 5", None),
        ("#### none", None),
    ],
)
def test_results_are_found(text, result):
    assert problems.result_of(text) == result


def test_no_result_is_not_the_right_one():
    assert problems.is_same_result("#### 2,000", "1999+1=2000\n#### 2000")
    assert not problems.is_same_result("#### 5", "#### 6")
    assert not problems.is_same_result("it is 5", "#### no number")


def test_a_column_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"train.parquet: no column answer, only question, solution$"):
        problems.load(write(tmp_path, ROWS, ("question", "solution")))


def test_an_answer_without_a_result_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"train.parquet, row 1: expected an answer with the line '#### RESULT'"
    ):
        problems.load(write(tmp_path, [ROWS[0], ("Why?", "Nobody knows.")]))


def test_what_is_no_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"train.parquet, row 0: expected a string as answer, got NoneType"):
        problems.load(write(tmp_path, [("Why?", None)]))


def test_a_tokenizer_without_the_marks_of_a_chat_is_refused(tmp_path):
    words = ["<|none|>" if word == "<|im_end|>" else word for word in language_model.WORDS]
    path = tmp_path / "tiny.gguf"
    language_model.write(path, language_model.METADATA | {"tokenizer.ggml.tokens": words})
    with pytest.raises(UserError, match=r"lacks the token <\|im_end\|>"):
        problems.encode(PROBLEMS, gguf_files.load(path).tokenizer)
