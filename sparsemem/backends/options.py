"""Checks of the options that backends share."""

from __future__ import annotations

from typing import Any


def switch(_: object, attribute: Any, value: object) -> None:
    """An attrs validator for what is on or off.

    Raises:
        TypeError: Not a bool ("no" would count as true).
    """
    if not isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be True or False, not {value!r}")


def optional_switch(_: object, attribute: Any, value: object) -> None:
    """As `switch`, or None for the default.

    Raises:
        TypeError: Not a bool and not None.
    """
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be True, False or None, not {value!r}")
