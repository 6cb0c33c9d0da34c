"""Whether a region's sizes fit together; every refusal names the value and the rule."""

from __future__ import annotations

from sparsemem.backends.base import Backend
from sparsemem.runs import index_of
from sparsemem.units import Size, exact_size, parse_size


def check_block_size(block_size: Size | None, backend: Backend, page_size: int) -> int:
    """Bytes of a block: a power of two of at least a page; None is the backend's choice."""
    if block_size is None:
        return max(backend.preferred_block_size, page_size)
    size = parse_size(block_size, "block_size")
    if size < page_size:
        raise ValueError(f"block_size {size} is less than the page size {page_size} of {backend}")
    if size & (size - 1):
        raise ValueError(f"block_size {size} is not a power of two")
    return size


def check_size(size: Size, block_size: int) -> int:
    """Bytes of a region: a positive multiple of the block size."""
    total = parse_size(size)
    if total == 0:
        raise ValueError("size 0 is not positive")
    if total % block_size:
        raise ValueError(f"size {total} is not a multiple of the block size {exact_size(block_size)}")
    return total


def check_name(name: str) -> str:
    """A name that the kernel takes for a mapping: at most 79 printable ASCII characters, some excluded."""
    if not isinstance(name, str):
        raise TypeError(f"name must be text, not {name!r}")
    if not 1 <= len(name) <= 79 or any(not " " <= c <= "~" or c in "[]\\$`/" for c in name):
        raise ValueError(f"name {name!r} must be 1 to 79 printable ASCII characters, without []\\$`/")
    return name


def check_warm(warm: Size | None, block_size: int) -> int:
    """Bytes of a warm pool, 0 for none.

    Raises:
        ValueError: Not whole blocks.
    """
    size = 0 if warm is None else parse_size(warm, "warm")
    if size % block_size:
        raise ValueError(f"warm {size} is not a multiple of the block size {block_size}")
    return size


def check_threads(threads: object) -> int | None:
    """How many threads, or None for as many as are sensible.

    Raises:
        TypeError: No integer.
        ValueError: Not between 1 and 1024.
    """
    if threads is None:
        return None
    number = index_of(threads, "threads")
    if not 1 <= number <= 1024:
        raise ValueError(f"threads {number} is out of range: 1 <= threads <= 1024")
    return number
