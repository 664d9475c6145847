"""Every Python block of the README runs, in order, as a reader would paste them."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 13
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102
    assert namespace["trace"].standard_error > 0


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_shows_both_commands(command):
    assert command in README.read_text()
