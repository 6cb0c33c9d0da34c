"""All cases, in the order in which they are run."""

from __future__ import annotations

from sparsemem.bench.cases import bitmaps, growth, hyperalloc, memory, scattered, single, stalls
from sparsemem.bench.model import Case

CASES: tuple[Case, ...] = (
    *memory.CASES,
    *scattered.CASES,
    *single.CASES,
    *stalls.CASES,
    *bitmaps.CASES,
    *growth.CASES,
    *hyperalloc.CASES,
)


def select(names: list[str]) -> tuple[Case, ...]:
    """The cases of these names, or all; a name that ends with `*` stands for all that begin so.

    Raises:
        ValueError: There is no such case.
    """
    if not names:
        return CASES
    for name in names:
        if not any(_matches(case, name) for case in CASES):
            raise ValueError(f"there is no case {name!r}; sparsemem bench --list shows them")
    return tuple(case for case in CASES if any(_matches(case, name) for name in names))


def _matches(case: Case, name: str) -> bool:
    return case.name == name or (name.endswith("*") and case.name.startswith(name[:-1]))
