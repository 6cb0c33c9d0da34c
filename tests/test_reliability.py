"""docs/reliability.md and SECURITY.md name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.promises import PROMISES
from tests.support.reliability import document, marked

ROOT = Path(__file__).parent.parent


def test_every_promise_has_a_test_and_every_marker_a_promise() -> None:
    shown = marked()
    assert shown.keys() == PROMISES.keys()
    assert [name for name, entry in shown.items() if not entry.tests] == []


def test_the_document_is_that_of_the_markers() -> None:
    """But for the numbers, which are of the run that it was made from."""
    text = (ROOT / "docs" / "reliability.md").read_text()

    def without_numbers(document: str) -> str:
        return re.sub(r"(?<=\|) (?:[\d,]+|-) (?=\|)|, [\d,]+ cases", "", document)

    assert without_numbers(text) == without_numbers(document({})), "make reliability"


def _named(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))


@pytest.mark.parametrize("name", ["docs/reliability.md", "SECURITY.md"])
def test_every_test_that_is_named_exists(name: str) -> None:
    named = _named((ROOT / name).read_text())
    assert len(named) > 10
    for path, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{test}"
