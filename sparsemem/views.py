"""Memory as memoryviews that can never reach unmapped memory.

A view is a memoryview of a cffi buffer of a pointer of its own.  Everything made
from it (slices, numpy arrays, even `np.ndarray(buffer=view)`, which holds no
export but a reference) keeps that pointer alive; the pointer keeps the mapping
mapped and the blocks pinned, and lets go of both when it is really freed.  That
is later than a weak reference would say in garbage collection, where an object's
`__del__` may still use the view.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsemem._sys import ffi
from sparsemem.backends.base import Mapping
from sparsemem.blocks import BlockMap


def _release(pin: Any, owner: Any, _: Any) -> None:
    """Holds the pin and the mapping for as long as the pointer lives; both go with it."""


def make_view(mapping: Mapping, blocks: BlockMap, first: int, count: int, offset: int, length: int) -> memoryview:
    """A writable view of `length` bytes at `offset`, pinning blocks [first, first + count).

    Raises:
        BlockStateError: A block is not plugged, or tainted.
        UnsupportedError: The mapping has no memory.
    """
    owner = mapping.owner()
    pin = blocks.pin(first, count)
    pointer = ffi.gc(owner + offset, partial(_release, pin, owner))
    return memoryview(ffi.buffer(pointer, length))
