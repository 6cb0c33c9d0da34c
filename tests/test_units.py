"""Sizes as people write them, and as they are shown."""

from __future__ import annotations

import doctest
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import units
from sparsemem.units import SIZE_LIMIT, exact_size, format_size, parse_size

BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


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


@given(st.integers(0, 8000), st.sampled_from(list(BYTES)), st.sampled_from(["", " "]), st.booleans(), st.booleans())
def test_every_unit_is_binary_with_or_without_ib(number: int, unit: str, blank: str, long: bool, lower: bool) -> None:
    text = f"{number}{blank}{unit}{'iB' if long and unit else ''}"
    assert parse_size(text.lower() if lower else text) == number * BYTES[unit]


@given(st.decimals(0, 1000, places=3, allow_nan=False, allow_infinity=False), st.sampled_from("KMGT"))
def test_a_fraction_is_exact_or_refused(number: Any, unit: str) -> None:
    value = Fraction(number) * BYTES[unit]
    if value.denominator == 1:
        assert parse_size(f"{number}{unit}") == value
    else:
        with pytest.raises(ValueError, match="not a whole number of bytes"):
            parse_size(f"{number}{unit}")


@pytest.mark.parametrize("text", ["1KB", "1TB", "10 GB", "1B", "2mb", "1.5PB"])
def test_decimal_looking_units_are_refused_as_ambiguous(text: str) -> None:
    with pytest.raises(ValueError, match=r"ambiguous: write M or MiB for 2\*\*20 bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["", " ", "M", "iB", "1iB", "-1M", "+1M", "1e6", "1_000", "0xG", "0x", "0x10M", "1 M i B", "1..5M", ".5M"]
)
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("value", [1.5, float("nan"), None, True, b"1M", ["1M"]])
def test_what_is_neither_integer_nor_text_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="block_size must be an integer or text like '64M'"):
        parse_size(value, "block_size")


@pytest.mark.parametrize("value", [-1, SIZE_LIMIT, "8192P", hex(SIZE_LIMIT)])
def test_sizes_stay_below_the_kernels_off_t(value: Any) -> None:
    with pytest.raises(ValueError, match="out of range"):
        parse_size(value)


@given(st.integers(0, SIZE_LIMIT - 1))
def test_the_exact_form_reads_back(size: int) -> None:
    assert parse_size(exact_size(size)) == size
    assert parse_size(hex(size)) == size
    assert parse_size(size) == size


@given(st.integers(0, SIZE_LIMIT - 1))
def test_the_shown_form_is_off_by_at_most_half_a_digit(size: int) -> None:
    shown = format_size(size)
    unit = shown.lstrip("0123456789.")
    assert abs(Fraction(shown.removesuffix(unit)) * BYTES[unit] - size) <= Fraction(BYTES[unit], 20) + size / 2**52
    assert format_size(-size) == (f"-{shown}" if size else shown)


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(units).failed == 0
