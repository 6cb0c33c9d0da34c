"""What tests of snapshots share: regions with content, and what they hold."""

from __future__ import annotations

import os
from pathlib import Path

from sparsemem import Region

PAGE = 4096


def contents(region: Region) -> dict[int, bytes]:
    """Block to what it holds, of all that are plugged."""
    held = {}
    for first, count in list(region.plugged_runs()):
        for block in range(first, first + count):
            with region.view(block) as view:
                held[block] = bytes(view)
    return held


def write(region: Region, offset: int, data: bytes) -> None:
    """Stores at a byte offset, within one block."""
    block, start = divmod(offset, region.block_size)
    with region.view(block) as view:
        view[start : start + len(data)] = data


def fill(region: Region, first: int, count: int = 1) -> None:
    """Random content in all of these blocks."""
    for block in range(first, first + count):
        with region.view(block) as view:
            view[:] = os.urandom(region.block_size)


def allocated(path: Path) -> int:
    """Bytes that a file takes."""
    return path.stat().st_blocks * 512


def data_runs(path: Path) -> list[tuple[int, int]]:
    """Where a file has data, as `(start, end)`, by SEEK_DATA and SEEK_HOLE."""
    runs: list[tuple[int, int]] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            at = os.lseek(fd, start, os.SEEK_HOLE)
            runs.append((start, at))
    finally:
        os.close(fd)
    return runs
