"""The pages that make a mesh of all devices, on eight."""

import pytest

from tests.test_docs import PAGES, blocks, run


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "device_count()" in "".join(blocks(page))], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(page):
    run(page)
