"""Saving: piece by piece of the region, each claimed while it is copied.

So each block is saved in a state that it really had, plugged or not; other blocks can be
plugged and unplugged meanwhile, and their content be changed by whoever has a view.
"""

from __future__ import annotations

import contextlib
import os
from typing import NoReturn

from sparsemem._sys import calls as _calls
from sparsemem._sys import ffi, lib
from sparsemem._sys.calls import Calls
from sparsemem.backends.base import Mapping
from sparsemem.blocks import Claim, Map, Want, runs_of
from sparsemem.engine import SLICE_NS, Control
from sparsemem.errors import BlockStateError, Run, SnapshotIOError, UnsupportedError
from sparsemem.operations import Core, Operation, execute
from sparsemem.runs import Runs, clip, normalise, single, to_blocks
from sparsemem.snapshot.compression import check_way, compressor
from sparsemem.snapshot.draft import Draft
from sparsemem.snapshot.format import DATA_OFFSET, HEADER_SIZE, RECORD_SIZE, RUN_SIZE, Snapshot, digest, pieces
from sparsemem.snapshot.restoring import describe
from sparsemem.snapshot.telling import Meter
from sparsemem.snapshot.tracking import Tracker

_PIECE = 32 << 20
"""Bytes of the region that are claimed at a time: 10 to 20 ms of work, if the disk keeps up."""

# The unit of what is read, checked and compressed.  What is all zero in it takes no space, but it is
# digested as a whole; of an incremental snapshot as little as possible is to be saved.
_CHUNK = {
    # compressed, incremental
    (False, False): 256 << 10,
    (False, True): 4 << 10,
    (True, False): 1 << 20,
    (True, True): 64 << 10,
}


def save(
    core: Core,
    path: str,
    backend: str,
    *,
    compress: str | None,
    follow_symlinks: bool,
    tracker: Tracker | None,
    base: str | None,
    full: bool,
    control: Control,
) -> Snapshot:
    """Saves a region; what `Region.save` does.

    Args:
        core: The region's.
        path: Where to.
        backend: What it was made of, as text.
        compress: "zstd" or None.
        follow_symlinks: Write what a symbolic link of that name points to.
        tracker: Knows what has changed, and is to know what was saved; None for a save of its own.
        base: The path of the snapshot that must be the tracker's last; None if it need not.
        full: Save all, whatever the tracker knows.
        control: Who looks on.
    """
    compressed = check_way(compress)
    _check_mapping(core.mapping)
    core.blocks.check_open()
    with contextlib.ExitStack() as stack:
        incremental = None
        if tracker is not None:
            last = None if base is None else describe(base, follow_symlinks=follow_symlinks).id
            stack.enter_context(tracker.save(last))
            incremental = None if full else tracker.base
        draft = Draft(_calls.kernel, path, follow_symlinks=follow_symlinks)
        stack.callback(draft.discard)
        draft.open()
        if tracker is not None:
            draft.spare(tracker.files)
        saving = _Saving(core, draft, compressed, tracker, incremental, control)
        saving.copy()
        snapshot, file = saving.finish(backend), draft.identity
        draft.publish()
        if tracker is not None:
            tracker.commit(snapshot.id, file, full=incremental is None)
    return snapshot


def _check_mapping(mapping: Mapping) -> None:
    if mapping.address is None:
        raise UnsupportedError(f"{type(mapping).__name__} has no memory that could be saved")
    if mapping.confidential:
        raise UnsupportedError("secret memory is not saved: a file would show what nobody else may see")


class _Saving:
    """One save, from the first block to the last."""

    def __init__(
        self,
        core: Core,
        draft: Draft,
        compressed: bool,
        tracker: Tracker | None,
        base: str | None,
        control: Control,
    ) -> None:
        self.core = core
        self.tracker = tracker
        self.incremental = base is not None
        self._base = base
        self._draft = draft
        self._chunk = chunk = _CHUNK[compressed, self.incremental]
        self._compress = compressor() if compressed else None
        self._data = self._data_end = HEADER_SIZE if compressed else DATA_OFFSET
        self._runs, self._records = bytearray(), bytearray()
        self._meter = Meter(control, int(core.blocks.counts().plugged) << core.shift)
        self._calls: Calls = _calls.kernel
        self._buffer = ffi.new("char[]", chunk)
        self._job = job = ffi.new("sm_save *")
        job.base = ffi.cast("char *", core.mapping.address)
        job.source = core.mapping.readable
        job.target = -1 if compressed else draft.fd
        job.origin = self._data
        job.size = core.mapping.size
        job.chunk = chunk
        job.buffer = self._buffer
        job.zeroes = self.incremental

    def copy(self) -> None:
        """Copies all that is plugged, in pieces of whole chunks and whole blocks."""
        core = self.core
        if self._compress is None:
            # At once as long as it will be: EFBIG comes before the work, and a file that is cut off
            # here ends in zeroes.
            self._data_end = self._data + core.mapping.size
            self._draft.lengthen(self._data_end)
        self._meter.tell(0)
        piece = max(_PIECE >> core.shift, 1)
        cursor = 0
        while cursor < core.blocks.nblocks:
            found = next(core.blocks.runs(Map.PLUGGED, True, cursor), None)
            if found is None:
                break
            first = found[0] - found[0] % piece
            cursor = min(first + piece, core.blocks.nblocks)
            claim = Claim(core.blocks, single(first, cursor - first, core.blocks.nblocks))
            self._meter.finish(execute(_Piece(self, claim)) << core.shift)
        self._meter.end()

    def copy_runs(self, plugged: Runs) -> None:
        """Copies what plugged blocks hold, of which the caller has a claim; runs of blocks."""
        core, job, shift = self.core, self._job, self.core.shift
        within: list[Run] = [(first << shift, count << shift) for first, count in plugged]
        changed = [] if self.tracker is None else self.tracker.take(within)
        start, end = within[0][0], sum(within[-1])
        held = core.mapping.contents(start, end - start)
        contents = within if held is None else clip(held, within)
        bits = self._chunk.bit_length() - 1
        chunks = runs_of(to_blocks(changed if self.incremental else contents, bits), -(-core.mapping.size >> bits))
        readable = core.byte_runs(contents)
        records = ffi.new("sm_record[]", chunks.total)
        job.chunks, job.nchunks, job.runs, job.nruns = chunks.array, chunks.n, readable.array, readable.n
        job.records, job.nrecords, job.bytes = records, 0, 0
        job.at = job.done = job.run = 0
        self._run(plugged.total << shift)
        self._runs += ffi.buffer(plugged.array, plugged.n * RUN_SIZE)
        self._records += ffi.buffer(records, job.nrecords * RECORD_SIZE)

    def _run(self, size: int) -> None:
        job = self._job
        code = lib.SM_MORE
        while code == lib.SM_MORE:
            code = self._calls.save(job, SLICE_NS)
            if code < 0:
                self._fail(-code)
            if job.ready:
                assert self._compress is not None
                record = job.records[job.nrecords - 1]
                frame = self._compress(ffi.buffer(self._buffer, job.ready))
                record.length, record.digest = len(frame), digest(frame)
                self._data_end += self._draft.write(frame, self._data_end)
            self._meter.tell(min(int(job.bytes), size))

    def _fail(self, code: int) -> NoReturn:
        if self._job.failed_reading:
            block = int(self._job.failed_at) >> self.core.shift
            raise SnapshotIOError(code, f"cannot read block {block} to save it: {os.strerror(code)}")
        self._draft.fail(code)

    def finish(self, backend: str) -> Snapshot:
        """Writes what says what there is: the tables, and last of all the header."""
        offset, table_digest = self._data_end, 0
        # Runs that touch at the end of a piece are one.
        n = len(self._runs) // RUN_SIZE
        runs = normalise(ffi.from_buffer("sm_run[]", self._runs), n, self.core.blocks.nblocks)
        for piece in pieces(ffi.buffer(runs.array, runs.n * RUN_SIZE), self._records):
            table_digest = digest(piece, table_digest)
            offset += self._draft.write(piece, offset)
        header = Snapshot(
            size=self.core.mapping.size,
            block_size=self.core.block_size,
            page_size=self.core.mapping.page_size,
            chunk=self._chunk,
            file_size=offset,
            data_offset=self._data,
            table_offset=self._data_end,
            nruns=runs.n,
            nrecords=len(self._records) // RECORD_SIZE,
            table_digest=table_digest,
            id=os.urandom(16).hex(),
            base=self._base,
            compressed=self._compress is not None,
            backend=backend,
        )
        self._draft.write(header.encode(), 0)
        return header


class _Piece(Operation):
    """Copies what is plugged of some blocks, and says how many were; there is nothing to undo."""

    only_reads = True

    def __init__(self, saving: _Saving, claim: Claim) -> None:
        super().__init__(saving.core, claim)
        self._saving = saving

    def perform(self) -> int:
        claim = self.claim
        claim.take(Want.AS_IT_IS)
        plugged = claim.select(Map.PLUGGED, True)
        tainted = clip(claim.select(Map.TAINTED, True), plugged)
        if tainted:
            block = tainted[0][0]
            raise BlockStateError(
                f"cannot save: block {block} is tainted by an earlier failure; scrub() mends it", block=block
            )
        if plugged.n:
            self._saving.copy_runs(plugged)
        claim.finish()
        return plugged.total

    def undo(self, error: BaseException | None) -> None:
        if self.claim.open:
            self.claim.finish()
            self.core.tally.failed(rolled_back=False)
