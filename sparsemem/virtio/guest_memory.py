"""Guest-physical memory: which addresses there are, and what backs each of them.

Every range is backed by a region: one of ours, whose blocks come and go
(virtio-mem), or one made here over a descriptor that the frontend has sent, all
of it plugged.  So a discard takes the same claims whatever wants it, and nothing
outside of `_sys` makes a system call.

Addresses come from the guest and descriptors from the frontend; neither is
trusted.  Memory is copied by the kernel, so that a file which somebody has
truncated is an error here and not a SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from attrs import field, frozen

from sparsemem._sys import calls as _calls
from sparsemem._sys.files import PAGE_SIZE
from sparsemem.backends import File
from sparsemem.errors import BlockStateError, Run, SparseMemError, ViewsAliveError
from sparsemem.region import Region
from sparsemem.runs import Runs, single
from sparsemem.virtio.device import GuestError
from sparsemem.virtio.wire import FRAME_SHIFT, FRAME_SIZE

_ADDRESS_LIMIT = 1 << 63

# Blocks of memory that is all plugged are only what claims are made of.
_LARGEST_BLOCK = 2 << 20
_MOST_BLOCKS = 1 << 28
"""Of a file's range: 1 TiB where it is only aligned to 4 KiB.  A frontend may name any size, and a map takes memory."""


class GuestMemoryError(SparseMemError, OSError):
    """Memory of the table could not be read or written: truncated underneath, or no room for its pages."""


@frozen
class RegionRange:
    """Guest-physical addresses that a region of ours backs.

    Attributes:
        address: The first, guest-physical.
        size: Bytes.
        region: What backs them; it stays its owner's, who closes it.
        offset: Where in the region they begin, in bytes.
    """

    address: int
    size: int
    region: Region = field(eq=id)
    offset: int = 0


@frozen
class FileRange:
    """Guest-physical addresses that a file of the frontend's backs.

    Attributes:
        address: The first, guest-physical.
        size: Bytes.
        fd: The file; it is duplicated, and stays the caller's.
        offset: Where in the file they begin, in bytes.
    """

    address: int
    size: int
    fd: int
    offset: int = 0


@frozen(eq=False)
class MemoryRange:
    """An entry of the table, as it is used.

    Attributes:
        address: The first address, guest-physical.
        size: Bytes.
        region: What backs it.
        offset: Where in the region it begins, in bytes.
        owned: Whether the region was made for this entry.
        file: `(device, inode)` of what backs it; None if it has no descriptor.
    """

    address: int
    size: int
    region: Region = field(repr=False)
    offset: int
    owned: bool
    file: tuple[int, int] | None

    @property
    def end(self) -> int:
        """The first address beyond it."""
        return self.address + self.size


Piece = tuple[MemoryRange, int, int]
"""An entry, an offset in its region, and bytes."""


class Table:
    """The entries of one moment, ascending; see `GuestMemory.table`.

    Attributes:
        ranges: The entries; one that stays when the table changes stays the same object.
    """

    def __init__(self, ranges: Iterable[MemoryRange] = ()) -> None:
        self.ranges = tuple(sorted(ranges, key=lambda entry: entry.address))
        self._starts = [entry.address for entry in self.ranges]
        self._ends = [entry.end for entry in self.ranges]
        # What is added to a guest's address to have ours, where nothing is ever unplugged.
        self._shifts = [
            entry.region.address + entry.offset - entry.address if entry.owned else None for entry in self.ranges
        ]
        self.users = 0
        for low, high in zip(self.ranges, self.ranges[1:], strict=False):
            if low.end > high.address:
                raise ValueError(f"ranges at {low.address:#x} and {high.address:#x} overlap")

    def place(self, address: int, length: int) -> int | None:
        """Where this is in our address space, if it is all in one range that was made for the table; else None.

        The short way of most accesses: none of it can be unplugged, so nothing is pinned.
        """
        i = bisect_right(self._starts, address) - 1
        if i < 0 or not 0 < length <= self._ends[i] - address:
            return None
        shift = self._shifts[i]
        return None if shift is None else address + shift

    def pieces(self, address: int, length: int) -> list[Piece]:
        """What backs these addresses: entry, offset in its region, bytes.

        Raises:
            GuestError: Not all of them are in the table.
        """
        if address < 0 or length <= 0 or address + length > _ADDRESS_LIMIT:
            raise GuestError(f"{length} bytes at {address:#x} are no guest memory")
        pieces, at, end = [], address, address + length
        i = bisect_right(self._starts, at) - 1
        while at < end:
            if not 0 <= i < len(self.ranges) or not self.ranges[i].address <= at < self.ranges[i].end:
                raise GuestError(f"{length} bytes at {address:#x}: {at:#x} is not in guest memory")
            entry = self.ranges[i]
            n = min(end, entry.end) - at
            pieces.append((entry, entry.offset + at - entry.address, n))
            at, i = at + n, i + 1
        return pieces

    def frames(self, frames: Runs) -> list[tuple[MemoryRange, Runs]]:
        """What backs runs of page frames: entries, and runs of frames from the start of their regions.

        Raises:
            GuestError: A frame is not in the table.
        """
        if not frames.n:
            return []
        low, high = frames.bounds
        found, covered = [], 0
        for entry in self.ranges:
            first, count = entry.address >> FRAME_SHIFT, entry.size >> FRAME_SHIFT
            if first < high and low < first + count:
                runs = frames.within(first, count, base=entry.offset >> FRAME_SHIFT)
                if runs.n:
                    covered += runs.total
                    found.append((entry, runs))
        if covered != frames.total:
            raise GuestError(f"{frames.total - covered} page frames are not in guest memory")
        return found


class GuestMemory:
    """The table of guest-physical ranges.  Thread-safe.

    A table is replaced as a whole: whoever is in the middle of something goes on
    with the one before, whose memory stays mapped until then.

    Args:
        ranges: The first table.
        regions: Regions of ours that the frontend may send back by their descriptors:
            a `FileRange` of such a file becomes a range of the region itself.

    Raises:
        ValueError: A range that does not fit, or two that overlap.
        ReserveError: A file that cannot be mapped, or is too short.
    """

    def __init__(self, ranges: Iterable[RegionRange | FileRange] = (), *, regions: Iterable[Region] = ()) -> None:
        self._known = {_identity(region.fileno()): region for region in regions}
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._table = Table()
        self._retired: list[Table] = []
        self.replace(ranges)

    @classmethod
    def of(cls, region: Region, address: int = 0) -> GuestMemory:
        """All of one region at one address."""
        return cls([RegionRange(address, region.size, region)])

    # ---- the table ---------------------------------------------------------------------

    @property
    def ranges(self) -> tuple[MemoryRange, ...]:
        """The entries, ascending; an entry that stays in the table stays the same object."""
        return self._table.ranges

    @property
    def size(self) -> int:
        """Bytes of all ranges."""
        return sum(entry.size for entry in self.ranges)

    def replace(self, ranges: Iterable[RegionRange | FileRange]) -> None:
        """Puts a new table in place of the one that is there; on an error that one stays.

        Raises:
            As the constructor.
        """
        with self._changing:
            self._put(list(ranges), ())

    def add(self, entry: RegionRange | FileRange) -> None:
        """Adds a range.

        Raises:
            As the constructor.
        """
        with self._changing:
            self._put([entry], self.ranges)

    def remove(self, address: int, size: int) -> None:
        """Takes the range out that is exactly so.

        Raises:
            ValueError: There is no such range.
        """
        with self._changing:
            kept = [entry for entry in self.ranges if (entry.address, entry.size) != (address, size)]
            if len(kept) == len(self.ranges):
                raise ValueError(f"there is no range of {size} bytes at {address:#x}")
            self._put([], kept)

    def close(self) -> None:
        """Empties the table and lets go of everything that was made for it.

        Raises:
            ViewsAliveError: A view is alive; its memory stays mapped until a later call.
        """
        self.replace(())
        with self._lock:
            waiting = bool(self._retired)
        if waiting:
            raise ViewsAliveError("a view of guest memory, or an operation on it, is still alive")

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, wanted: Iterable[RegionRange | FileRange], kept: Iterable[MemoryRange]) -> None:
        made: list[MemoryRange] = []
        old = self._table
        try:
            for entry in wanted:
                made.append(self._entry(entry, old))
            new = Table([*kept, *made])
        except BaseException:
            for fresh in made:
                if fresh.owned and fresh not in old.ranges:
                    fresh.region.close()
            raise
        with self._lock:
            self._table = new
            self._retired.append(old)
        self._sweep()

    def _entry(self, wanted: RegionRange | FileRange, old: Table) -> MemoryRange:
        address, size, offset = wanted.address, wanted.size, wanted.offset
        if address < 0 or size <= 0 or offset < 0 or address + size > _ADDRESS_LIMIT or offset + size > _ADDRESS_LIMIT:
            raise ValueError(f"a range of {size} bytes at {address:#x}, from offset {offset:#x} on, is out of range")
        if (address | size | offset) % FRAME_SIZE:
            raise ValueError(f"{size} bytes at {address:#x}, offset {offset:#x}: not multiples of {FRAME_SIZE}")
        if isinstance(wanted, RegionRange):
            region, file = wanted.region, None
        else:
            file = _identity(wanted.fd)
            known = self._known.get(file)
            if known is None:
                return _same(old, address, size, offset, file) or _foreign(wanted, file)
            region = known
        if offset + size > region.size:
            raise ValueError(f"{size} bytes at offset {offset:#x} are more than the region has ({region.size})")
        if (offset | size) % region.page_size:
            raise ValueError(f"{size} bytes at offset {offset:#x} are not whole pages of {region.page_size}")
        for entry in old.ranges:
            if (entry.address, entry.size, entry.offset) == (address, size, offset) and entry.region is region:
                return entry
        return MemoryRange(address, size, region, offset, False, file)

    def _sweep(self) -> None:
        """Closes what no table and nobody uses any more."""
        with self._lock:
            idle = [table for table in self._retired if not table.users]
            busy = [table for table in self._retired if table.users]
            in_use = {entry for table in (self._table, *busy) for entry in table.ranges}
            self._retired = busy
        for table in idle:
            left = [entry for entry in table.ranges if entry.owned and entry not in in_use and not _closed(entry)]
            in_use.update(left)
            if left:
                with self._lock:
                    self._retired.append(Table(left))

    @contextlib.contextmanager
    def table(self) -> Iterator[Table]:
        """The table as it is now: its memory stays mapped within the `with`, whatever takes its place."""
        table = self._enter()
        try:
            yield table
        finally:
            self._leave(table)

    def _enter(self) -> Table:
        with self._lock:
            table = self._table
            table.users += 1
        return table

    def _leave(self, table: Table) -> None:
        with self._lock:
            table.users -= 1
            last = not table.users and table is not self._table
        if last:
            self._sweep()

    # ---- access ------------------------------------------------------------------------

    def read(self, address: int, length: int) -> bytes:
        """A copy of guest memory.

        Raises:
            GuestError: Not all of it is in the table, or it is in unplugged blocks.
            GuestMemoryError: It could not be read.
        """
        table = self._enter()
        try:
            at = table.place(address, length)
            if at is None:
                return b"".join([_access(piece) for piece in table.pieces(address, length)])
            try:
                return _calls.kernel.read_memory(at, length)
            except OSError as error:
                raise _failed(error, "read", address, length) from error
        finally:
            self._leave(table)

    def write(self, address: int, data: bytes) -> None:
        """Copies into guest memory.

        Raises:
            GuestError: Not all of it is in the table, or it is in unplugged blocks; nothing was written.
            GuestMemoryError: It could not be written; some of it may be.
        """
        table = self._enter()
        try:
            at = table.place(address, len(data))
            if at is None:
                return _write(table.pieces(address, len(data)), data)
            try:
                _calls.kernel.write_memory(at, data)
            except OSError as error:
                raise _failed(error, "write", address, len(data)) from error
        finally:
            self._leave(table)

    def check(self, address: int, length: int) -> None:
        """Refuses addresses that are not all in the table.

        Raises:
            GuestError: They are not.
        """
        table = self._enter()
        try:
            if table.place(address, length) is None:
                table.pieces(address, length)
        finally:
            self._leave(table)

    def load16(self, address: int) -> int:
        """A 16-bit number in one access, with acquire: what was written before it is there for later reads.

        Raises:
            As `read`; and GuestError if it is not aligned.
        """
        table = self._enter()
        try:
            at = table.place(address, 2)
            if at is None or at % 2:
                return _access16(table.pieces(address, 2), None)
            try:
                return _calls.kernel.load16(at)
            except OSError as error:
                raise _failed(error, "read", address, 2) from error
        finally:
            self._leave(table)

    def store16(self, address: int, value: int) -> None:
        """Stores a 16-bit number in one access, with release, and a full fence after it.

        Raises:
            As `write`; and GuestError if it is not aligned.
        """
        table = self._enter()
        try:
            at = table.place(address, 2)
            if at is None or at % 2:
                _access16(table.pieces(address, 2), value)
                return
            try:
                _calls.kernel.store16(at, value)
            except OSError as error:
                raise _failed(error, "write", address, 2) from error
        finally:
            self._leave(table)

    def view(self, address: int, length: int) -> memoryview:
        """The memory itself, for what must be read and written as one, such as a ring's index.

        It pins its blocks, and stays mapped when the table changes.  A file that is
        truncated underneath raises SIGBUS at an access.

        Raises:
            GuestError: It is not all in one range, or in unplugged blocks.
        """
        with self.table() as table:
            pieces = table.pieces(address, length)
            if len(pieces) != 1:
                raise GuestError(f"{length} bytes at {address:#x} are not in one range of guest memory")
            return _view(*pieces[0])

    # ---- discard -----------------------------------------------------------------------

    def discard(self, address: int, length: int) -> int:
        """Gives memory back, as far as it is whole pages of plugged blocks.

        Returns:
            The bytes that were discarded.

        Raises:
            GuestError: Not all of it is in the table; nothing was discarded.
            DiscardError: The kernel failed.
        """
        done = 0
        with self.table() as table:
            for entry, offset, size in table.pieces(address, length):
                page = entry.region.page_size
                first, end = -(-offset // page) * page, (offset + size) // page * page
                if first < end:
                    done += entry.region.discard_runs(single(first, end - first, entry.region.size), missing_ok=True)
        return done


def _identity(fd: int) -> tuple[int, int]:
    about = _calls.kernel.fstat(fd)
    return about.st_dev, about.st_ino


def _same(old: Table, address: int, size: int, offset: int, file: tuple[int, int]) -> MemoryRange | None:
    for entry in old.ranges:
        if (entry.address, entry.size, entry.offset, entry.file) == (address, size, offset, file):
            return entry
    return None


def _foreign(wanted: FileRange, file: tuple[int, int]) -> MemoryRange:
    """A region over the file, from its beginning on, of which only the range is plugged.

    It must neither populate nor look at what is the guest's, nor have huge pages where
    the guest has none; and an access of ours goes through the page tables, not userfaultfd.
    """
    offset, size = wanted.offset, wanted.size
    page = File(fd=wanted.fd).page_size
    if (offset | size) % page:
        raise ValueError(f"{size} bytes at offset {offset:#x} of the file are not whole pages of {page}")
    # The largest power of two that divides both.
    block = max(page, min((offset | size) & -(offset | size), _LARGEST_BLOCK))
    if (offset + size) // block > _MOST_BLOCKS:
        raise ValueError(
            f"{size} bytes at offset {offset:#x} of the file, aligned to {block}, "
            f"are more than {_MOST_BLOCKS} such blocks"
        )
    backend = File(fd=wanted.fd, existing="trust", thp=False if page == PAGE_SIZE else None, strategy="populate_write")
    region = Region(
        offset + size,
        block_size=block,
        backend=backend,
        headroom="off",
        plugged=[(offset // block, size // block)],
        name=f"guest-{wanted.address:x}",
    )
    return MemoryRange(wanted.address, size, region, offset, True, file)


def _closed(entry: MemoryRange) -> bool:
    try:
        entry.region.close()
    except ViewsAliveError:
        return False
    return True


def _blocks(entry: MemoryRange, offset: int, length: int) -> Run:
    return entry.region.blocks(offset, length, "outward")


def _check_plugged(entry: MemoryRange, offset: int, length: int) -> None:
    if not entry.region.is_plugged(*_blocks(entry, offset, length)):
        raise _unplugged(entry, offset, length)


def _unplugged(entry: MemoryRange, offset: int, length: int) -> GuestError:
    return GuestError(f"{length} bytes at {entry.address + offset - entry.offset:#x} are in unplugged blocks")


def _view(entry: MemoryRange, offset: int, length: int) -> memoryview:
    first, count = _blocks(entry, offset, length)
    start = offset - first * entry.region.block_size
    try:
        return entry.region.view(first, count)[start : start + length]
    except BlockStateError as error:
        if entry.region.is_plugged(first, count):  # tainted: no fault of the guest's
            raise GuestMemoryError(errno.EIO, str(error)) from error
        raise _unplugged(entry, offset, length) from error


def _access16(pieces: list[Piece], value: int | None) -> int:
    """The index of a ring: as `_access`, but one access, which a copy need not be."""
    # Ranges are whole frames, so an even address and the next are in one.
    entry, offset, length = pieces[0]
    if offset % 2:
        raise GuestError(f"a 16-bit number at {entry.address + offset - entry.offset:#x}, which is odd")
    pin = None if entry.owned else _view(entry, offset, length)
    try:
        address = entry.region.address + offset
        if value is None:
            return _calls.kernel.load16(address)
        _calls.kernel.store16(address, value)
        return value
    except OSError as error:
        raise _failed(error, "read" if value is None else "write", _guest_address(pieces[0]), 2) from error
    finally:
        if pin is not None:
            pin.release()


def _access(piece: Piece, data: bytes | None = None) -> bytes:
    """Reads, or writes `data`; the blocks are pinned, so that they cannot be unplugged meanwhile."""
    entry, offset, length = piece
    # What was made for the entry is all plugged for as long as its table is used.
    pin = None if entry.owned else _view(entry, offset, length)
    try:
        address = entry.region.address + offset
        if data is None:
            return _calls.kernel.read_memory(address, length)
        _calls.kernel.write_memory(address, data)
        return b""
    except OSError as error:
        raise _failed(error, "read" if data is None else "write", _guest_address(piece), length) from error
    finally:
        if pin is not None:
            pin.release()


def _write(pieces: list[Piece], data: bytes) -> None:
    """Writes data to where it belongs; that it all can be is looked at first."""
    if len(pieces) > 1:
        for piece in pieces:
            _check_plugged(*piece)
    done = 0
    for piece in pieces:
        _access(piece, data[done : done + piece[2]])
        done += piece[2]


def _guest_address(piece: Piece) -> int:
    entry, offset, _ = piece
    return entry.address + offset - entry.offset


def _failed(error: OSError, what: str, address: int, length: int) -> GuestMemoryError:
    return GuestMemoryError(
        error.errno,
        f"cannot {what} {length} bytes at {address:#x}: {error.strerror} "
        "(truncated underneath, or no room for its pages?)",
    )
