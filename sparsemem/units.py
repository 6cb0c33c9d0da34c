"""Sizes as people write them.

No library is right here: `1TB` is read as 2^40 by one and as 10^12 by another,
so the decimal-looking forms are refused, and `0x200000`, which device models
are full of, is taken by none.
"""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import SupportsIndex, TypeAlias

Size: TypeAlias = int | str | SupportsIndex

_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", "K", "M", "G", "T", "P"))}
_DECIMAL = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(iB)?", re.IGNORECASE)
_HEX = re.compile(r"0x[0-9a-f]+", re.IGNORECASE)

SIZE_LIMIT = 1 << 63
"""Sizes and offsets stay below this: the kernel's off_t is signed."""


def parse_size(size: Size, what: str = "size") -> int:
    """Turns `64M`, `1.5G`, `2 KiB`, `0x200000` or an int into bytes.

    K, M, G, T and P are binary, with or without `iB`.  `KB` and the like are
    refused as ambiguous, and so is a fraction that is no whole number of bytes.

    Args:
        size: The size as an integer or text.
        what: How the message of an error names it.

    Returns:
        Bytes, 0 <= n < 2^63.

    Raises:
        TypeError: It is neither an integer nor text.
        ValueError: The text is no size, or the value is out of range.
    """
    if isinstance(size, str):
        value = _parse_text(size.strip(), what)
    elif isinstance(size, bool):
        raise TypeError(f"{what} must be an integer or text like '64M', not {size!r}")
    else:
        try:
            value = operator.index(size)
        except TypeError:
            raise TypeError(f"{what} must be an integer or text like '64M', not {size!r}") from None
    if not 0 <= value < SIZE_LIMIT:
        raise ValueError(f"{what} {size!r} is out of range: 0 <= {what} < 2**63")
    return value


def _parse_text(text: str, what: str) -> int:
    if _HEX.fullmatch(text):
        return int(text, 16)
    match = _DECIMAL.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        if re.fullmatch(r"[\d.]+\s*[KMGTP]?B", text, re.IGNORECASE):
            raise ValueError(f"{what} {text!r} is ambiguous: write M or MiB for 2**20 bytes, and no unit for bytes")
        raise ValueError(f"{what} {text!r} is not a size: write an integer, '64M', '1.5G' or '0x200000'")
    value = Fraction(match[1]) * _UNITS[match[2].upper()]
    if value.denominator != 1:
        raise ValueError(f"{what} {text!r} is not a whole number of bytes")
    return int(value)


def format_size(size: int) -> str:
    """Shows bytes as `lsmem` does: exact where it can be, else with one digit.

    >>> format_size(1 << 40), format_size(1536 << 20), format_size(4097), format_size(-4096)
    ('1T', '1.5G', '4K', '-4K')
    """
    if size < 0:
        return "-" + format_size(-size)
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor and factor > 1:
            text = f"{size / factor:.1f}"
            return text.removesuffix(".0") + unit
    return str(size)


def exact_size(size: int) -> str:
    """The shortest text that `parse_size` reads back as exactly this size."""
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)
