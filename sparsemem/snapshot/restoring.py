"""Restoring: everything is read and checked first; then blocks are plugged, and then filled."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from sparsemem._sys import calls as _calls
from sparsemem._sys import ffi, lib
from sparsemem._sys.calls import Calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem.backends import Backend, File
from sparsemem.blocks import Claim
from sparsemem.engine import SLICE_NS, Control
from sparsemem.errors import SnapshotError, UnsupportedError
from sparsemem.operations import Core, Plug, execute
from sparsemem.runs import EMPTY, Runs
from sparsemem.snapshot.compression import decompressor
from sparsemem.snapshot.format import HEADER_SIZE, Snapshot, decode, digest, geometry, read_tables
from sparsemem.snapshot.telling import Meter, about
from sparsemem.units import Size, parse_size


class Source:
    """A snapshot file that is open, and whose header and tables are right.

    Args:
        path: Where it is.
        follow_symlinks: Whether that may be a symbolic link.

    Raises:
        SnapshotError: It is no snapshot, cut off, corrupted or newer.
        SnapshotIOError: It cannot be read.
    """

    def __init__(self, path: str, *, follow_symlinks: bool) -> None:
        self._calls: Calls = _calls.kernel
        self.path = path
        # O_NONBLOCK, for opening a FIFO would wait for somebody to write.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_symlinks else os.O_NOFOLLOW)
        with about(path, "read"):
            try:
                self._fd = Descriptor(self._calls.open(path, flags, 0), self._calls)
            except OSError as error:
                if error.errno == errno.ELOOP and not follow_symlinks:
                    hint = "it is a symbolic link, which is only followed with follow_symlinks=True"
                    raise OSError(errno.ELOOP, hint) from error
                raise
            with self._fd.closed_on_error():
                found = self._calls.fstat(self._fd.fd)
                if not stat.S_ISREG(found.st_mode):
                    raise SnapshotError("is no snapshot, for it is no file")
                self.header = decode(self._calls.pread(self._fd.fd, HEADER_SIZE, 0), found.st_size)
                self.tables = read_tables(self._read, self.header)
                self._unpack = decompressor(self.header.chunk) if self.header.compressed else None
        self._buffer = ffi.new("char[]", self.header.chunk)

    @property
    def fd(self) -> int:
        """Its descriptor."""
        return self._fd.fd

    def close(self) -> None:
        """Lets go of the file."""
        self._fd.close()

    def _read(self, length: int, offset: int) -> bytes:
        parts = []
        while length:
            part = self._calls.pread(self._fd.fd, length, offset)
            if not part:
                raise SnapshotError(f"was cut off: it ends at {offset}")
            parts.append(part)
            length -= len(part)
            offset += len(part)
        return b"".join(parts)

    def check(self, meter: Meter) -> None:
        """Reads all content, and holds it against its digests.

        Raises:
            SnapshotError: Something is not as it was saved.
        """
        self._pass(meter, None, EMPTY)

    def fill(self, meter: Meter, base: Any, plugged: Runs) -> None:
        """Puts the content into plugged memory; checked again, since a file may change at any time.

        Args:
            meter: Is told.
            base: Where offset 0 is.
            plugged: Runs of bytes; nothing else is written to.
        """
        self._pass(meter, base, plugged)

    def _pass(self, meter: Meter, base: Any, runs: Runs) -> None:
        header, tables = self.header, self.tables
        job = ffi.new("sm_load *")
        job.source, job.size, job.chunk, job.buffer = self._fd.fd, header.size, header.chunk, self._buffer
        job.base = ffi.NULL if base is None else base
        job.runs, job.nruns = runs.array, runs.n
        job.origin, job.records, job.nrecords = header.data_offset, tables.records, tables.nrecords
        job.checked, job.end = HEADER_SIZE, header.table_offset
        if header.compressed:
            self._unpack_all(job, meter)
        else:
            self._read_all(job, meter)
        meter.finish(tables.stored)

    def _read_all(self, job: Any, meter: Meter) -> None:
        code = lib.SM_MORE
        while code == lib.SM_MORE:
            code = self._calls.load(job, SLICE_NS)
            if code < 0:
                self._fail(-code, int(job.failed_at))
            meter.tell(int(job.bytes))

    def _unpack_all(self, job: Any, meter: Meter) -> None:
        """As `_read_all`, of what is packed one after the other and must be unpacked."""
        header = self.header
        offset = header.data_offset
        for i in range(self.tables.nrecords):
            record = job.records[i]
            start = int(record.index) * header.chunk
            if record.length:
                length = min(header.chunk, header.size - start)
                # Unpacked when it is checked, too: nothing may turn up after blocks were plugged.
                data = self._unpacked(record, offset, length)
                if job.base:
                    lib.sm_load_put(job, start, ffi.from_buffer(data), length)
                offset += int(record.length)
            elif job.base:
                length = min(int(record.digest) * header.chunk, header.size - start)
                lib.sm_load_put(job, start, ffi.NULL, length)
            meter.tell(offset - header.data_offset)

    def _unpacked(self, record: Any, offset: int, length: int) -> bytes:
        with about(self.path, "read"):
            frame = self._read(int(record.length), offset)
        if digest(frame) != record.digest:
            self._fail(errno.EBADMSG, offset)
        assert self._unpack is not None
        with about(self.path, "read"):
            return self._unpack(frame, length)

    def _fail(self, code: int, offset: int) -> NoReturn:
        with about(self.path, "read"):
            if code == errno.EBADMSG:
                raise SnapshotError(f"is corrupted: what it has at offset {offset} is not what was saved")
            if code == errno.ENODATA:
                raise SnapshotError(f"was cut off: it ends before what belongs at offset {offset}")
            raise OSError(code, os.strerror(code))


def describe(path: str | os.PathLike[str], *, follow_symlinks: bool = False) -> Snapshot:
    """What a snapshot says about itself; its header and tables are checked, its content is not read.

    Args:
        path: Where it is.
        follow_symlinks: Whether that may be a symbolic link.

    Raises:
        SnapshotError: It is no snapshot, cut off, corrupted or newer.
        SnapshotIOError: It cannot be read.
    """
    source = Source(os.fsdecode(path), follow_symlinks=follow_symlinks)
    source.close()
    return source.header


class Chain:
    """A snapshot with all that it is relative to; the oldest first.

    Args:
        sources: Open files, in that order; the last one says what is plugged.
    """

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources
        self._newest = sources[-1]
        self.header = self._newest.header

    def check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options for a region of the same geometry.

        Raises:
            SnapshotError: A size or block size that is another one.
            TypeError: An option that the snapshot itself decides.
        """
        if "plugged" in options:
            raise TypeError("restore() takes no plugged=: which blocks are plugged is in the snapshot")
        own: dict[str, Size] = {"size": self.header.size, "block_size": self.header.block_size}
        for name, value in own.items():
            asked = options.get(name)
            if asked is not None and parse_size(asked, name) != value:
                raise SnapshotError(
                    f"snapshot {self._newest.path} is of {geometry(self.header)}: it cannot be restored with "
                    f"{name}={asked!r}"
                )
        return {**options, **own}

    def check(self, control: Control, *, content: bool, again: bool) -> Meter:
        """Reads all content, if that is asked; what comes of it, and is still to come, as a meter.

        Args:
            control: Who looks on.
            content: Whether to.
            again: Whether it will be read once more, to fill blocks with it.
        """
        stored = sum(source.tables.stored for source in self._sources)
        meter = Meter(control, stored * (content + again) + self.plugged_size * again)
        meter.tell(0)
        if content:
            for source in self._sources:
                source.check(meter)
        return meter

    @property
    def plugged_size(self) -> int:
        """Bytes of all plugged blocks."""
        return self._newest.tables.runs.total * self.header.block_size

    def template(self, protection: str) -> tuple[Backend, Backend]:
        """A backend that shows the content: by the very file that is open, and by its path to tell people.

        Args:
            protection: The region's, which would take each page that is not there yet for an unplugged one.

        Raises:
            UnsupportedError: There is none.
        """
        if protection != "none":
            raise UnsupportedError(f"lazy=True has blocks without memory: it does not go with {protection=}")
        if self.header.compressed:
            raise UnsupportedError("lazy=True maps the file as it is: a compressed snapshot cannot be mapped")
        if len(self._sources) > 1:
            raise UnsupportedError("lazy=True maps one file: an incremental snapshot needs another one, too")
        path, offset = os.path.abspath(self._newest.path), self.header.data_offset
        return (
            File(fd=self._newest.fd, shared=False, offset=offset),
            File(path, shared=False, offset=offset),
        )

    def fill(self, core: Core, meter: Meter) -> None:
        """Plugs what was plugged, in a region of which nothing is yet, and fills it.

        Raises:
            UnsupportedError: The region's memory is none that could be filled.
            SnapshotError: Something is plugged already.
            As `Region.plug`.
        """
        mapping, shift = core.mapping, core.shift
        if mapping.address is None:
            raise UnsupportedError(f"{type(mapping).__name__} has no memory that a snapshot could be restored into")
        if mapping.fresh != "zero":
            raise UnsupportedError(
                "a template shows its file, where the snapshot has zeroes: it cannot be restored into"
            )
        if core.blocks.counts().plugged:
            raise SnapshotError(
                f"snapshot {self._newest.path} cannot be restored into what holds data already: "
                "existing='discard' throws that away"
            )
        runs = self._newest.tables.runs
        if runs.n:
            execute(Plug(core, Claim(core.blocks, runs), control=meter.part()))
        meter.finish(self.plugged_size)
        plugged = core.byte_runs([(first << shift, count << shift) for first, count in runs])
        for source in self._sources:
            source.fill(meter, ffi.cast("char *", mapping.address), plugged)

    def adopt(self, core: Core) -> None:
        """Has blocks count as plugged whose content the mapping shows, but which have no memory of their own yet.

        As if all their pages had been discarded: they come with the first access, and
        `Region.populate` gets them beforehand.
        """
        runs, shift = self._newest.tables.runs, core.shift
        core.blocks.adopt(runs)
        core.blocks.mark_pages(core.byte_runs([(first << shift, count << shift) for first, count in runs]), True)


@contextlib.contextmanager
def opened(path: str, base: Iterable[str], *, follow_symlinks: bool) -> Iterator[Chain]:
    """A snapshot and those that it needs, which are among `base` in any order.

    Raises:
        SnapshotError: One is missing, or is one too many.
    """
    with contextlib.ExitStack() as stack:

        def source(path: str) -> Source:
            found = Source(path, follow_symlinks=follow_symlinks)
            stack.callback(found.close)
            return found

        sources = [source(path)]
        others = {other.header.id: other for other in map(source, base)}
        while (wanted := sources[0].header.base) is not None:
            if wanted not in others:
                raise SnapshotError(
                    f"snapshot {sources[0].path} has only what has changed since the one with the id {wanted}: "
                    f"give that as base= ({_listed(others)})"
                )
            sources.insert(0, others.pop(wanted))
            if geometry(sources[0].header) != geometry(sources[-1].header):
                raise SnapshotError(f"snapshot {sources[0].path} is of {geometry(sources[0].header)}, {path} is not")
        if others:
            raise SnapshotError(f"snapshot {path} does not need what was given as base=: {_listed(others)}")
        yield Chain(sources)


def _listed(sources: dict[str, Source]) -> str:
    return ", ".join(f"{source.path} has the id {identity}" for identity, source in sources.items()) or "none is left"
