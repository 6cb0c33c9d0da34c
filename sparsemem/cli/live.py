"""The live view of `sparsemem vhost-user --watch`: what the devices are doing, redrawn in place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from sparsemem.cli.table import columns
from sparsemem.units import format_size

_EVERY_S = 1.0
_WIDTH = 48
_CLEAR_LINE, _UP = "\x1b[K", "\x1b[{}A"


def watching(stats: Callable[[], dict[str, Any]], end: threading.Event, stream: TextIO) -> None:
    """Shows the figures once a second until the event is set; on a terminal in the same place."""
    drawn = 0
    while True:
        lines = picture(stats())
        if stream.isatty():
            if drawn:
                stream.write(_UP.format(drawn) + "\r")
            # A picture with fewer lines than the last leaves empty ones.
            lines += [""] * (drawn - len(lines))
            stream.write("".join(f"{line}{_CLEAR_LINE}\n" for line in lines))
            drawn = len(lines)
        else:
            stream.write(f"{time.strftime('%H:%M:%S')} {'; '.join(line.strip() for line in lines)}\n")
        stream.flush()
        if end.wait(_EVERY_S):
            return


def picture(stats: dict[str, Any]) -> list[str]:
    """The figures of all devices as lines."""
    lines = []
    for name, figures in stats.items():
        connection = figures["connection"]
        lines.append(f"{name}: {_state(connection)}, {sum(connection['answered'])} requests answered")
        if "plugged_size" in figures:
            lines += _mem(figures)
        if "actual_size" in figures:
            lines += _balloon(figures)
    return lines


def _state(connection: dict[str, Any]) -> str:
    if connection["needs_reset"]:
        return f"needs a reset: {connection['needs_reset']}"
    if connection["trouble"]:
        return str(connection["trouble"])
    if not connection["connected"]:
        return "waiting for a VMM"
    return "running" if connection["running"] else "connected"


def _bar(part: int, mark: int, whole: int) -> str:
    """What there is of the whole, and a mark at what is wanted."""
    filled, wanted = (_WIDTH * n // whole if whole else 0 for n in (part, mark))
    bar = "#" * filled + "." * (_WIDTH - filled)
    return f"[{bar[:wanted]}|{bar[wanted:]}]"


def _mem(figures: dict[str, Any]) -> list[str]:
    plugged, requested, size = (figures[name] for name in ("plugged_size", "requested_size", "region_size"))
    answers = ", ".join(f"{what} {count}" for what, count in sorted(figures["answers"].items()))
    told = f"plugged {format_size(plugged)} of {format_size(size)}, requested {format_size(requested)}"
    return [f"  {_bar(plugged, requested, size)} {told}", f"  {answers or 'no requests yet'}"]


def _balloon(figures: dict[str, Any]) -> list[str]:
    actual, target = figures["actual_size"], figures["target_size"]
    guest = figures.get("guest", {})
    total = guest.get("total", 0) + actual
    told = f"balloon {format_size(actual)}, wanted {format_size(target)}"
    lines = [f"  {_bar(actual, target, total)} {told}" if total >= target > 0 else f"  {told}"]
    if guest:
        rows = [[name, format_size(guest[name])] for name in _SIZES if name in guest]
        lines += columns(rows, right=(1,), indent="  ").splitlines() if rows else []
    return lines


_SIZES = ("total", "free", "available", "caches")
