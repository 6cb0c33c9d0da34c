"""Sizes as people write them, and as they are shown."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import units
from sparsemem.units import exact_size, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64 MiB", 64 << 20),
        ("1.5G", 3 << 29),
        ("0x200000", 2 << 20),
        ("1T", 1 << 40),
        ("2P", 2 << 50),
        (" 2K ", 2048),
        ("0.5K", 512),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["1KB", "1TB", "10 GB", "1B", "1.5", "0.3K", "M", "-1M", "1e6", "0xG", "1 M i B", "1..5M"]
)
def test_texts_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@given(st.integers(0, 2**63 - 1))
def test_the_exact_form_reads_back(size: int) -> None:
    assert parse_size(exact_size(size)) == size
    assert parse_size(hex(size)) == size
    assert parse_size(size) == size


@given(st.integers(0, 2**62))
def test_the_shown_form_is_close(size: int) -> None:
    shown = parse_size(format_size(size).replace(".", ".")) if "." not in format_size(size) else None
    assert shown is None or abs(shown - size) <= size * 0.06


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(units).failed == 0
