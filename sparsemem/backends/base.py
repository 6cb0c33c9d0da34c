"""What a backend is: a way to obtain memory.

A `Backend` is a description (frozen, printable, reusable); `reserve` makes a
`Mapping` of it, which a region then owns.  To write your own, subclass both and
implement `populate`, `discard` and `resident`; see `simulated.py` for one that
is complete in a hundred lines.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Iterable, Iterator
from typing import Any

from attrs import frozen

from sparsemem._sys import lib
from sparsemem._sys.files import PAGE_SIZE
from sparsemem._sys.stray import Watch
from sparsemem.errors import Cause, Run, UnsupportedError


@frozen(kw_only=True)
class Request:
    """What a region asks of a backend; sizes in bytes."""

    size: int
    block_size: int
    fork: str = "refuse"
    dump: bool = False
    name: str = "sparsemem"
    protection: str = "none"
    """What keeps accesses off unplugged blocks; a backend that has no such thing says so by `Mapping.protection`."""
    catch: bool = False
    """Whether `Mapping.watch` is going to be asked for what the protection "trap" catches."""

    plugged: tuple[Run, ...] = ()
    """Byte runs that hold data already and that the caller takes over."""


@frozen
class Limit:
    """One thing that limits how much can still be populated.

    Attributes:
        cause: What it means to run into it.
        available: Bytes that it still gives.
        source: Where the figure is from.
        errno: What the kernel says, or would say, when it is reached.
    """

    cause: Cause
    available: int
    source: str
    errno: int


class Backend(abc.ABC):
    """Describes where memory comes from."""

    @property
    @abc.abstractmethod
    def page_size(self) -> int:
        """Bytes of the smallest piece that can be populated or discarded."""

    @property
    def preferred_block_size(self) -> int:
        """Bytes of a block where the region does not say."""
        return max(2 << 20, self.page_size)

    @abc.abstractmethod
    def reserve(self, request: Request) -> Mapping:
        """Reserves address space; populates nothing.

        Raises:
            ReserveError: It cannot be had.
            UnsupportedError: The kernel or the machine has no such thing.
            ValueError: The request does not fit the backend.
        """

    def __str__(self) -> str:
        """The text form, which `sparsemem.backends.from_text` reads."""
        return type(self).__name__.lower()


class Mapping(abc.ABC):
    """Reserved memory of one region; offsets and lengths in bytes, multiples of the page size.

    A region never populates or discards one byte from two threads at once, but
    different ranges may be in different threads.
    """

    size: int
    page_size: int = PAGE_SIZE
    fresh: str = "zero"
    """What a freshly plugged block reads: "zero", or "file" for a template."""

    adopted: tuple[Run, ...] = ()
    """Byte runs that held data when the backend reserved, and were taken over."""

    address: int | None = None
    """Where offset 0 is in this process, or None if there is no memory at all."""

    strategy: str = "populate"
    """How it populates, by name."""

    thp: bool | None = None
    """Whether transparent huge pages were asked for; None where they do not come into it."""

    granule: int = PAGE_SIZE
    """Bytes of the largest page that may be in use, huge ones included."""

    unpopulated: tuple[Run, ...] = ()
    """Byte runs of what starts out plugged that have to be populated for that to be true."""

    adopts_pages: bool = False
    """Whether most of `unpopulated` is there already and only has to be mapped: no matter of headroom then."""

    processors: frozenset[int] = frozenset()
    """Those that are near its memory; empty where that is no matter."""

    bridge: int = 0
    """Bytes of unplugged memory over which one discard is cheaper than two."""

    confidential: bool = False
    """Whether its content must not leave the process: no snapshot is made of it."""

    readable: int = -1
    """A descriptor that reads as the memory does, and costs nothing where there is none of it; -1 without."""

    can_discard: bool = True
    fork_inherits: bool = False
    protection: str = "none"
    """What keeps accesses off blocks that are unplugged, by name; see `sparsemem.recipes.PROTECTIONS`."""

    protects: bool = False
    """Whether that takes a step: then blocks that start out unplugged have to be protected, too."""

    direct: bool = False
    """Whether prepared jobs can be worked on in C alone, and what was begun be discarded."""

    parallel: bool = False
    """Whether several threads may work on it at once; takes an `advance` of its own, which knows of parts."""

    scales: bool = True
    """Whether they are any faster."""

    @property
    def huge(self) -> bool:
        """Whether its pages may be larger than the machine's usual ones."""
        return self.granule > PAGE_SIZE

    def populate(self, offset: int, length: int) -> None:
        """Makes the range readable and writable without faults that can fail.

        The content must be zero or the template's afterwards.  May fail with
        some of it done: the caller discards the range then.

        Raises:
            OSError: With the errno that tells why.
        """
        raise NotImplementedError

    def repopulate(self, offset: int, length: int) -> None:
        """As `populate`, but keeps content that is there.  For `Region.populate`."""
        self.populate(offset, length)

    def recycle(self, offset: int, length: int) -> None:
        """Makes populated memory fresh again: cheaper, where that can be, than to give it back and take it anew."""
        self.discard(offset, length)
        self.populate(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Gives the range's memory back to where it came from; content is lost.

        Raises:
            OSError: With the errno that tells why.
        """
        raise NotImplementedError

    def thin(self, offset: int, length: int) -> None:
        """As `discard`, but within a plugged block, which stays accessible.  For `Region.discard`."""
        self.discard(offset, length)

    def empty(self, offset: int, length: int) -> None:
        """Makes a block accessible that has nothing yet: each page comes with its first access."""
        self.discard(offset, length)

    @abc.abstractmethod
    def resident(self, offset: int, length: int) -> Iterator[Run] | None:
        """Maximal ascending `(offset, length)` runs of memory in use; None if nobody can tell."""

    def contents(self, offset: int, length: int) -> list[Run] | None:
        """Ascending `(offset, length)` runs outside of which all of it reads zero; None if nobody can tell.

        For a snapshot, which then does not touch (and so populate) what holds nothing.
        """
        return None

    def track(self) -> None:
        """Has the kernel note from now on which pages are written to.

        Raises:
            UnsupportedError: It cannot; says why.
        """
        raise UnsupportedError(f"{type(self).__name__} has no pages of the kernel's, which would be noted as written")

    def written(self, offset: int, length: int) -> list[Run]:
        """Ascending `(offset, length)` runs of pages that this process wrote to since the last call.

        Pages discarded since may or may not be among them.

        Raises:
            OSError: `track` was not called, or somebody has undone it.
        """
        raise NotImplementedError

    def resident_total(self) -> int | None:
        """Bytes in use in all, where a figure covers more than `resident` can place."""
        return None

    def refusal(self, advice: str) -> str:
        """Why `advance` cannot do `collapse`, `cold` or `pageout` here; "" if it can."""
        return f"{type(self).__name__} has no pages of the kernel's"

    def huge_pages(self, offset: int, length: int) -> Iterator[Run] | None:
        """Maximal ascending `(offset, length)` runs of pages that are mapped as huge ones; None if nobody can tell."""
        return None

    def limits(self) -> Iterable[Limit]:
        """What still limits a populate; asked often, so it should cost microseconds."""
        return ()

    def diagnose(self, errno: int, offset: int) -> Cause:
        """Why a populate at that offset failed, from what can be seen afterwards."""
        return Cause.UNKNOWN

    def fileno(self) -> int:
        """The descriptor whose offset 0 is block 0."""
        raise UnsupportedError(f"{type(self).__name__} has no file descriptor")

    def owner(self) -> Any:
        """The cffi pointer that keeps the memory mapped while anything refers to it."""
        raise UnsupportedError(f"{type(self).__name__} has no memory to view")

    def after_fork_in_child(self) -> None:  # noqa: B027 - a hook
        """Called in a forked child, which may use the memory only if `fork_inherits`."""

    def watch(self, plugged: Any, shift: int, keeps: Any) -> Watch:
        """A thread that resolves accesses to what is not there, and notes those to blocks that are not plugged.

        Raises:
            OSError: It cannot be had.
        """
        raise NotImplementedError

    def room_to_protect(self, length: int) -> None:  # noqa: B027 - a hook
        """Sees to it that there is memory for the protection of so many bytes, where that takes some.

        Raises:
            ReserveError: There is not.
        """

    def settle(self) -> None:  # noqa: B027 - a hook
        """Last of all that makes a region: what cannot be undone, such as throwing old data away."""

    def close(self) -> None:  # noqa: B027 - a hook
        """Lets go of everything; the memory itself stays mapped while views live."""

    def abandon(self) -> None:
        """Closes a mapping whose region came to nothing: as if it had never been."""
        self.close()

    def spare(self, size: int) -> Mapping:
        """Other memory of the same sort, whose pages can be moved into this one: for a warm pool."""
        raise UnsupportedError("a warm pool needs private anonymous memory: nothing else can be moved")

    def draw_from(self, warm: Any) -> None:
        """Lets plugs take pages from a pool (an `sm_warm`) of what `spare` gave."""
        raise NotImplementedError

    # ---- the engine's side ----------------------------------------------------------

    def prepare(self, job: Any, operation: str) -> None:  # noqa: B027 - a hook
        """Fills in what `advance` needs.

        `operation` is populate, repopulate, recycle, discard, thin, empty, protect or an advice.
        """

    def advance(self, job: Any, operation: str, budget_ns: int) -> int:
        """Works on a job's runs from its cursor, a chunk at a time, as sm_advance() does.

        Comes back with SM_MORE once `budget_ns` have passed, after a chunk at least, so that who waits for
        it gets to look at signals and at whoever looks on.
        """
        act, until = getattr(self, operation), time.monotonic_ns() + budget_ns
        at = job.at
        while at.run < job.nruns:
            run = job.runs[at.run]
            offset, length = (run.first << job.shift) + at.done, run.count << job.shift
            piece = min(job.chunk - offset % job.chunk, length - at.done)
            whole = at.done + piece == length
            job.begun = (at.run + whole, 0 if whole else at.done + piece)
            try:
                act(offset, piece)
            except OSError as error:
                job.failed_at, job.failed = offset, error.errno or 5
                return -int(job.failed)
            job.calls += 1
            job.bytes += piece
            job.at = job.begun
            if at.run < job.nruns and time.monotonic_ns() >= until:
                return int(lib.SM_MORE)
        return int(lib.SM_OK)
