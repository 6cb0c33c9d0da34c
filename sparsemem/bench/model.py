"""What a benchmark is made of: cases, what they measure, the ways that are compared, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from statistics import median
from typing import TYPE_CHECKING

from attrs import field, frozen

if TYPE_CHECKING:
    from sparsemem.bench.lab import Lab

Figures = Mapping[str, float]
"""What one round gives: the name of a measure to seconds, or whatever its unit is."""

SECONDS = "s"
BYTES = "bytes"
TIMES = "x"
RATE = "GiB/s"


@frozen
class Scale:
    """How much is measured.

    Attributes:
        name: What it is called.
        rounds: Interleaved rounds, after one that does not count.
        size: Bytes that are populated and discarded.
        small: Scattered 4 KiB blocks.
        large: Scattered 2 MiB blocks.
        samples: How often one block is plugged and unplugged in a round.
        watched: Bytes that are plugged while other threads are watched.
        bits: Blocks in the larger bitmap.
        thorough: Whether every strategy and every peer is measured, or only the best of ours and
            system calls.
        seconds: What is not measured after so long is left out; None is never.
    """

    name: str
    rounds: int
    size: int
    small: int
    large: int
    samples: int
    watched: int
    bits: int
    thorough: bool = True
    seconds: float | None = None


FULL = Scale("full", 5, 1 << 30, 65536, 4096, 5000, 4 << 30, 1 << 28)
QUICK = Scale("quick", 5, 128 << 20, 8192, 128, 1000, 256 << 20, 1 << 22, thorough=False, seconds=50)
TINY = Scale("tiny", 1, 4 << 20, 64, 2, 10, 8 << 20, 1 << 13)
"""Shows that everything works, not how fast."""


@frozen
class Measure:
    """One thing that a case measures.

    Attributes:
        name: Within its case.
        peer: The way that the others are compared with.
        unit: `SECONDS`, `BYTES`, `TIMES` or `RATE`.
    """

    name: str
    peer: str
    unit: str = SECONDS


@frozen
class Way:
    """One way of doing what a case is about.

    Attributes:
        name: Ours begin with `sparsemem`.
        run: Does it once; figures by measure.
        reason: Why it cannot be run; "" if it can.
        memory: Bytes of host memory that are to be warm when it is run.
    """

    name: str
    run: Callable[[], Figures] = dict
    reason: str = ""
    memory: int = 0


Ways = AbstractContextManager[list[Way]]


@frozen
class Published:
    """A figure that others have published, of another machine."""

    measure: str
    name: str
    value: float


@frozen
class Case:
    """Ways of doing the same, which are run in turn.

    Attributes:
        name: For the command line.
        title: What is done, in a few words.
        measures: What is measured of it.
        ways: Makes the ways, and clears up after them.
        published: What others say of theirs.
    """

    name: str
    title: str
    measures: tuple[Measure, ...]
    ways: Callable[[Lab], Ways]
    published: tuple[Published, ...] = ()


@frozen
class Spread:
    """The middle of several figures, and the ends."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        """Of at least one figure."""
        return cls(median(figures), min(figures), max(figures))


@frozen
class Row:
    """What one way gave for one measure, a figure for each round."""

    measure: str
    way: str
    figures: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Over the rounds."""
        return Spread.of(list(self.figures))

    def over(self, peer: Row) -> Spread | None:
        """The ratio to a peer, each figure divided by that of the same round; None if that is 0."""
        if not all(peer.figures):
            return None
        return Spread.of([own / other for own, other in self._beside(peer)])

    def above(self, peer: Row) -> Spread:
        """The difference from a peer, likewise."""
        return Spread.of([own - other for own, other in self._beside(peer)])

    def _beside(self, peer: Row) -> Iterator[tuple[float, float]]:
        return zip(self.figures, peer.figures, strict=True)


@frozen
class Result:
    """What came of a case.

    Attributes:
        case: The case.
        rows: One for each measure and way that ran.
        skipped: The other ways, with the reason; `""` stands for all of them.
    """

    case: Case
    rows: tuple[Row, ...] = ()
    skipped: Mapping[str, str] = field(factory=dict)

    def row(self, measure: str, way: str) -> Row | None:
        """The figures of one way, if it ran."""
        return next((row for row in self.rows if (row.measure, row.way) == (measure, way)), None)
