"""The bytes of a snapshot file: a header of 4096 bytes, the content, two tables.

Nothing is believed that a file says about itself: every figure is held against the others and
against the size of the file, and memory is only taken for what was really read from it.
`docs/snapshots.md` has the format byte by byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from attrs import frozen

from sparsemem._sys import ffi, lib
from sparsemem.errors import SnapshotError
from sparsemem.runs import Runs
from sparsemem.units import exact_size

MAGIC = b"\x93SPMSNP\n"
VERSION = 1
COMPRESSED, INCREMENTAL = 1, 2
HEADER_SIZE = 4096
DATA_OFFSET = 2 << 20
"""Of uncompressed content: at a multiple of all usual pages, so that it can be mapped, by huge ones too."""

RUN_SIZE, RECORD_SIZE = ffi.sizeof("sm_run"), ffi.sizeof("sm_record")
PIECE = 3 << 18
"""Bytes of a table that are read, checked and digested at a time; whole runs and whole records."""

_MAX_CHUNK = 16 << 20  # a buffer of one is taken for any file that looks whole
_FIXED = struct.Struct("<8sII10Q16s16sI4x")
_DIGEST = struct.Struct("<Q")
_TEXT_ROOM = HEADER_SIZE - _FIXED.size - _DIGEST.size
_NO_ID = bytes(16)


@frozen(kw_only=True)
class Snapshot:
    """What a snapshot says about itself; sizes and offsets in bytes.

    Attributes:
        size: Of the region; so are `block_size` and `page_size`.
        block_size: Of a block.
        page_size: Of the backend's pages.
        chunk: In what pieces the content is.
        file_size: Of the file.
        data_offset: Where the content begins.
        table_offset: Where it ends, and the tables begin.
        nruns: How many runs of plugged blocks there are.
        nrecords: How many records of chunks there are.
        table_digest: Of the tables.
        id: 32 hexadecimal digits, another one for each save.
        base: The id of the snapshot that an incremental one needs, or None.
        compressed: Whether the content is.
        backend: What the region was made of, as text; tells people something and is used for nothing.
    """

    size: int
    block_size: int
    page_size: int
    chunk: int
    file_size: int
    data_offset: int
    table_offset: int
    nruns: int
    nrecords: int
    table_digest: int
    id: str
    base: str | None = None
    compressed: bool = False
    backend: str = ""

    @property
    def nblocks(self) -> int:
        """Blocks in all."""
        return self.size // self.block_size

    def encode(self) -> bytes:
        """The header's bytes."""
        flags = COMPRESSED * self.compressed | INCREMENTAL * (self.base is not None)
        text = self.backend.encode("utf-8", "surrogateescape")[:_TEXT_ROOM]
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            flags,
            self.file_size,
            self.size,
            self.block_size,
            self.page_size,
            self.chunk,
            self.data_offset,
            self.table_offset,
            self.nruns,
            self.nrecords,
            self.table_digest,
            bytes.fromhex(self.id),
            _NO_ID if self.base is None else bytes.fromhex(self.base),
            len(text),
        )
        body = (fixed + text).ljust(HEADER_SIZE - _DIGEST.size, b"\0")
        return body + _DIGEST.pack(digest(body))


def decode(data: bytes, actual_size: int) -> Snapshot:
    """A header from the first bytes of a file of `actual_size` bytes.

    Raises:
        SnapshotError: It is none, of a newer version, corrupted, or does not fit the file.
    """
    if data[: len(MAGIC)] != MAGIC:
        unfinished = actual_size >= HEADER_SIZE and not any(data)
        raise SnapshotError("is no snapshot" + (", or one whose saving was cut off" if unfinished else ""))
    if len(data) < HEADER_SIZE:
        raise SnapshotError(f"was cut off: it has {actual_size} bytes, fewer than a header's {HEADER_SIZE}")
    _, version, flags, *figures, identity, base, length = _FIXED.unpack_from(data)
    if version != VERSION:
        raise SnapshotError(f"has format version {version}; this release reads version {VERSION}")
    if digest(data[: -_DIGEST.size]) != _DIGEST.unpack(data[-_DIGEST.size :])[0]:
        raise SnapshotError("has a corrupted header")
    if flags & ~(COMPRESSED | INCREMENTAL):
        raise SnapshotError(f"has features that this release does not know (flags {flags:#x})")
    file_size, size, block_size, page_size, chunk, data_offset, table_offset, nruns, nrecords, table_digest = figures
    text = data[_FIXED.size :][: min(length, _TEXT_ROOM)]
    header = Snapshot(
        size=size,
        block_size=block_size,
        page_size=page_size,
        chunk=chunk,
        file_size=file_size,
        data_offset=data_offset,
        table_offset=table_offset,
        nruns=nruns,
        nrecords=nrecords,
        table_digest=table_digest,
        id=identity.hex(),
        base=base.hex() if flags & INCREMENTAL else None,
        compressed=bool(flags & COMPRESSED),
        backend=text.decode("utf-8", "replace"),
    )
    _check(header, actual_size)
    return header


def _check(header: Snapshot, actual_size: int) -> None:
    """Holds a header's figures against each other and the file."""
    if header.file_size != actual_size:
        what = "was cut off" if actual_size < header.file_size else "has something at its end"
        raise SnapshotError(f"{what}: it has {actual_size} bytes and should have {header.file_size}")
    block, chunk, start, end = header.block_size, header.chunk, header.data_offset, header.table_offset
    content = end - start if header.compressed else header.size
    tables = header.nruns * RUN_SIZE + header.nrecords * RECORD_SIZE
    if not (
        _is_power(block)
        and _is_power(header.page_size)
        and _is_power(chunk)
        and header.page_size <= block
        and HEADER_SIZE <= chunk <= _MAX_CHUNK
        and 0 < header.size < 1 << 63
        and header.size % block == 0
        and HEADER_SIZE <= start <= end == start + content
        and start % HEADER_SIZE == 0
        and header.nruns <= header.nblocks
        and header.nrecords <= -(-header.size // chunk)
        and end + tables == header.file_size
    ):
        raise SnapshotError("has a header whose figures do not go together")


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def digest(data: Any, seed: int = 0) -> int:
    """XXH64 of a bytes-like object."""
    return int(lib.sm_digest(seed, ffi.from_buffer(data), len(data)))


# ---- the tables -------------------------------------------------------------------------------


@frozen
class Tables:
    """Which blocks are plugged, and which chunks there are, of how many bytes in the file."""

    runs: Runs
    records: Any
    nrecords: int
    stored: int


def pieces(*tables: Any) -> Iterator[memoryview]:
    """Tables in the pieces that they are digested in, each with the digest so far as its seed."""
    for table in tables:
        view = memoryview(table)
        for at in range(0, len(view), PIECE):
            yield view[at : at + PIECE]


def read_tables(read: Callable[[int, int], bytes], header: Snapshot) -> Tables:
    """The tables of a file, checked.

    Piece by piece, each checked before the next is read: what a table says is there costs
    memory only as far as the file really has it, and zeroes of a hole are no valid entry.

    Args:
        read: Gives so many bytes at an offset of the file.
        header: What the file says it has.

    Raises:
        SnapshotError: They are corrupted.
    """
    following = ffi.new("uint64_t *")
    ledger = ffi.new("sm_ledger *", {"size": header.size, "chunk": header.chunk, "zeroes": header.base is not None})
    ledger.packed = packed_limit(header.chunk) if header.compressed else 0

    def check_runs(array: Any, n: int) -> int:
        return int(lib.sm_runs_check(array, n, header.nblocks, following))

    def check_records(array: Any, n: int) -> int:
        return int(lib.sm_records_check(array, n, ledger))

    seed, offset, tables = 0, header.table_offset, []
    for item, count, check in (("sm_run", header.nruns, check_runs), ("sm_record", header.nrecords, check_records)):
        table, left = bytearray(), count * ffi.sizeof(item)
        while left:
            piece = read(min(PIECE, left), offset)
            if check(ffi.from_buffer(f"{item}[]", piece), len(piece) // ffi.sizeof(item)) != lib.SM_OK:
                raise SnapshotError("has a corrupted table")
            seed = digest(piece, seed)
            table += piece
            left -= len(piece)
            offset += len(piece)
        tables.append(ffi.from_buffer(f"{item}[]", table))
    stored = header.table_offset - header.data_offset
    if seed != header.table_digest or (header.compressed and ledger.stored != stored):
        raise SnapshotError("has a corrupted table")
    return Tables(Runs(tables[0], header.nruns), tables[1], header.nrecords, int(ledger.stored))


def packed_limit(chunk: int) -> int:
    """The most that a compressed chunk may take: what cannot be compressed grows a little."""
    return chunk + chunk // 64 + 1024


def geometry(header: Snapshot) -> str:
    """Size and block size, for messages."""
    return f"{exact_size(header.size)} in blocks of {exact_size(header.block_size)}"
