"""All cases, in the order in which they are run: if time runs out, those that targets are about come first."""

from __future__ import annotations

from sparsemem.bench.cases import bitmaps, devices, growth, hyperalloc, memory, scattered, single, stalls
from sparsemem.bench.model import Case
from sparsemem.bench.targets import TARGETS

_ALL = (
    *memory.CASES,
    *scattered.CASES,
    *single.CASES,
    *stalls.CASES,
    *bitmaps.CASES,
    *growth.CASES,
    *devices.CASES,
    *hyperalloc.CASES,
)
_WANTED = {target.case for target in TARGETS}


def _turn(case: Case) -> int:
    """Those that targets are about, the quick ones, the rest."""
    return 0 if case.name in _WANTED else 2 if case in memory.CASES else 1


CASES: tuple[Case, ...] = tuple(sorted(_ALL, key=_turn))


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
