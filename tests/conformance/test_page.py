"""docs/compatibility.md says what the run found."""

import pytest

from tests.conformance.page import PAGE, written


@pytest.mark.slow
def test_the_page_is_what_the_run_found() -> None:
    assert PAGE.read_text(encoding="utf-8") == written(), "`python -m tests.conformance --write` writes it anew"
