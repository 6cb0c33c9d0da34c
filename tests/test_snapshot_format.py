"""What a snapshot file may be: the one that was written, and nothing else is restored, nor believed, nor dear."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import BackendExhaustedError, Budget, File, Region, Snapshot, SnapshotError, snapshot
from sparsemem._sys import lib
from sparsemem.snapshot.format import (
    DATA_OFFSET,
    HEADER_SIZE,
    MAGIC,
    PIECE,
    RECORD_SIZE,
    RUN_SIZE,
    VERSION,
    digest,
)
from tests.support.children import run_child
from tests.support.injector import Injector
from tests.support.snapshots import PAGE, contents, fill, write

BLOCK = 64 << 10
SEALED = [None, "zstd"]
both = pytest.mark.parametrize("compress", SEALED)


# ---- the digest -------------------------------------------------------------------------------


def xxh64(data: bytes, seed: int = 0) -> int:
    """The published algorithm, written down once more, to compare with."""
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5, mask = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, (1 << 64) - 1

    def rotl(x: int, by: int) -> int:
        return ((x << by) | (x & mask) >> (64 - by)) & mask

    def turn(lane: int, word: int) -> int:
        return rotl((lane + word * p2) & mask, 31) * p1 & mask

    at, total = 0, (seed + p5) & mask
    if len(data) >= 32:
        lanes = [(seed + p1 + p2) & mask, (seed + p2) & mask, seed, (seed - p1) & mask]
        while len(data) - at >= 32:
            lanes = [turn(lane, word) for lane, word in zip(lanes, struct.unpack_from("<4Q", data, at), strict=True)]
            at += 32
        total = sum(rotl(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & mask
        for lane in lanes:
            total = ((total ^ turn(0, lane)) * p1 + p4) & mask
    total = (total + len(data)) & mask
    while len(data) - at >= 8:
        total = (rotl(total ^ turn(0, struct.unpack_from("<Q", data, at)[0]), 27) * p1 + p4) & mask
        at += 8
    if len(data) - at >= 4:
        total = (rotl(total ^ struct.unpack_from("<I", data, at)[0] * p1 & mask, 23) * p2 + p3) & mask
        at += 4
    for byte in data[at:]:
        total = rotl(total ^ byte * p5 & mask, 11) * p1 & mask
    total = (total ^ total >> 33) * p2 & mask
    total = (total ^ total >> 29) * p3 & mask
    return total ^ total >> 32


def test_known_digests() -> None:
    assert digest(b"") == 0xEF46DB3751D8E999
    assert digest(b"a") == 0xD24EC4F1A98C6E5B
    assert digest(b"abc") == 0x44BC2CF5AD770999


@given(data=st.binary(max_size=200), seed=st.integers(0, (1 << 64) - 1))
def test_the_digest_is_the_published_one(data: bytes, seed: int) -> None:
    assert digest(data, seed) == xxh64(data, seed)


# ---- a file, byte by byte ---------------------------------------------------------------------


def region_with_content() -> Region:
    region = Region("2M", block_size=BLOCK)
    region.plug_runs([(1, 2), (9, 1), (20, 12)])
    fill(region, 1)
    write(region, 9 * BLOCK + 5000, b"hello")
    write(region, 2 * BLOCK - 1, b"x")
    fill(region, 31)
    return region


@pytest.fixture
def path(tmpfs_folder: Path) -> Path:
    return tmpfs_folder / "snapshot"


def save(path: Path, compress: str | None = None) -> tuple[bytes, dict[int, bytes]]:
    """A snapshot's bytes and the content of the region that it is of."""
    with region_with_content() as region:
        region.save(path, compress=compress)
        return path.read_bytes(), contents(region)


def by_hand(data: bytes) -> dict[int, bytes]:
    """Block to content, read by nothing but what docs/snapshots.md says."""
    magic, version, flags = struct.unpack_from("<8sII", data)
    size, region, block, page, chunk, start, tables, nruns, nrecords, table_digest = struct.unpack_from(
        "<10Q", data, 16
    )
    assert (magic, version) == (b"\x93SPMSNP\n", 1)
    assert struct.unpack_from("<Q", data, 4088)[0] == xxh64(data[:4088])
    assert (len(data), page) == (size, 4096)
    assert size == tables + 16 * nruns + 24 * nrecords
    seed = 0
    for table in (data[tables : tables + 16 * nruns], data[tables + 16 * nruns :]):
        for at in range(0, len(table), 786432):
            seed = xxh64(table[at : at + 786432], seed)
    assert seed == table_digest
    image, packed = bytearray(region), start
    for i in range(nrecords):
        index, length, total = struct.unpack_from("<3Q", data, tables + 16 * nruns + 24 * i)
        at = packed if flags & 1 else start + index * chunk
        stored = data[at : at + length]
        packed += length
        assert xxh64(stored) == total
        if flags & 1:
            import zstandard

            stored = zstandard.ZstdDecompressor().decompress(stored)
        image[index * chunk : index * chunk + len(stored)] = stored
    held = {}
    for i in range(nruns):
        first, count = struct.unpack_from("<2Q", data, tables + 16 * i)
        for number in range(first, first + count):
            held[number] = bytes(image[number * block : (number + 1) * block])
    return held


@both
def test_the_documented_format_is_the_real_one(compress: str | None, path: Path) -> None:
    data, held = save(path, compress)
    assert by_hand(data) == held
    assert (RUN_SIZE, RECORD_SIZE, PIECE) == (16, 24, 786432)


# ---- not what was written ---------------------------------------------------------------------


def refused(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(SnapshotError, match=match) as caught:
        Region.restore(path, **options)
    assert str(path) in str(caught.value)


def interesting(data: bytes) -> list[int]:
    """Lengths at which a file may have been cut off."""
    header = HEADER_SIZE
    (start, tables, nruns) = struct.unpack_from("<3Q", data, 16 + 5 * 8)
    edges = [
        8,
        16,
        4088,
        header,
        start,
        start + BLOCK,
        start + PAGE,
        tables,
        tables + 16,
        tables + 16 * nruns,
        len(data),
    ]
    return sorted({0, 1, *(edge + by for edge in edges for by in (-1, 0, 1) if 0 <= edge + by < len(data))})


@pytest.mark.promise("snapshot-is-checked-first")
@both
def test_a_file_that_was_cut_off_anywhere(compress: str | None, path: Path) -> None:
    data, _ = save(path, compress)
    for length in interesting(data):
        path.write_bytes(data[:length])
        refused(path, "was cut off" if length >= len(MAGIC) else "is no snapshot")
        if compress is None:
            refused(path, "was cut off" if length >= len(MAGIC) else "is no snapshot", lazy=True, verify=False)


@pytest.mark.promise("snapshot-is-checked-first")
@both
def test_a_file_with_something_at_its_end(compress: str | None, path: Path) -> None:
    data, _ = save(path, compress)
    path.write_bytes(data + b"\0")
    refused(path, "has something at its end")


@pytest.mark.promise("snapshot-is-checked-first")
@both
def test_a_single_bit_anywhere(compress: str | None, path: Path) -> None:
    """Or it is refused, or (nothing is said of it) it does not matter: here none does not matter."""
    data, _ = save(path, compress)

    @given(st.data())
    def check(drawn: st.DataObject) -> None:
        where = drawn.draw(
            st.one_of(st.integers(0, len(data) - 1), st.integers(0, 300), st.integers(len(data) - 400, len(data) - 1))
        )
        bit = drawn.draw(st.integers(0, 7))
        with path.open("r+b") as file:
            file.seek(where)
            file.write(bytes([data[where] ^ 1 << bit]))
        try:
            for lazy in (False, True):
                if not (lazy and compress):
                    refused(path, r"corrupted|is no snapshot|format version|features", lazy=lazy)
        finally:
            with path.open("r+b") as file:
                file.seek(where)
                file.write(data[where : where + 1])

    check()
    Region.restore(path).close()


def test_corrupted_content_without_a_check_beforehand(path: Path) -> None:
    """It is found while blocks are filled, and nothing stays."""
    data, _ = save(path)
    with path.open("r+b") as file:
        file.seek(DATA_OFFSET + BLOCK + 100)
        file.write(b"spoilt")
    refused(path, "is corrupted: what it has at offset 2097152", verify=False)
    assert data != path.read_bytes()


@pytest.mark.promise("snapshot-is-checked-first")
def test_a_file_that_changes_while_it_is_restored(path: Path) -> None:
    save(path)
    spoilt = False

    def look(done: int, total: int) -> None:
        nonlocal spoilt
        if not spoilt and done >= total // 2:
            spoilt = True
            with path.open("r+b") as file:
                file.seek(DATA_OFFSET + 31 * BLOCK)
                file.write(b"spoilt")

    refused(path, "is corrupted", progress=look)
    assert spoilt


def test_a_copy_without_holes_is_as_good(path: Path) -> None:
    data, held = save(path)
    path.write_bytes(data)
    assert path.stat().st_blocks * 512 >= len(data)
    for lazy in (False, True):
        with Region.restore(path, lazy=lazy) as region:
            assert contents(region) == held


@pytest.mark.promise("snapshot-is-checked-first")
@both
def test_what_is_refused_has_not_made_a_region(compress: str | None, path: Path, inject: Injector) -> None:
    """No mapping, no file: a fault in the last bit of the content is found before any of that."""
    data, _ = save(path, compress)
    tables = struct.unpack_from("<Q", data, 64)[0]
    path.write_bytes(data[: tables - 1] + bytes([data[tables - 1] ^ 1]) + data[tables:])
    inject.made.clear()
    refused(path, "corrupted", backend=File(path.with_name("memory")))
    assert not {"reserve", "advance"} & set(inject.made)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.promise("snapshot-is-checked-first")
def test_foreign_files(path: Path) -> None:
    for foreign in (b"", b"\x7fELF" + bytes(10000), b"hello", os.urandom(5000), MAGIC[:-1] + bytes(5000)):
        path.write_bytes(foreign)
        refused(path, "is no snapshot")
    path.write_bytes(bytes(8192))
    refused(path, "is no snapshot, or one whose saving was cut off")
    path.write_bytes(pickle.dumps(os.system))
    refused(path, "is no snapshot")


def sealed(header: bytes) -> bytes:
    return header[:4088] + struct.pack("<Q", digest(header[:4088]))


@pytest.mark.promise("snapshot-is-checked-first")
def test_newer_files(path: Path) -> None:
    data, _ = save(path)
    newer = bytearray(data)
    struct.pack_into("<I", newer, 8, VERSION + 1)
    path.write_bytes(newer)
    refused(path, "has format version 2; this release reads version 1")
    newer = bytearray(data)
    struct.pack_into("<I", newer, 12, 1 << 7)
    path.write_bytes(sealed(bytes(newer[:4096])) + newer[4096:])
    refused(path, r"features that this release does not know \(flags 0x80\)")


# ---- hostile headers, rightly sealed ------------------------------------------------------------


def small(path: Path) -> Snapshot:
    """A snapshot of one block with a page in it."""
    with Region("1M", block_size=BLOCK) as region:
        region.plug(3)
        write(region, 3 * BLOCK, b"content")
        return region.save(path)


def put(path: Path, header: Snapshot, tables: bytes | None = None) -> None:
    """Replaces the header, and with it the tables, of which it then has the right digest."""
    with path.open("r+b") as file:
        if tables is not None:
            seed = 0
            nruns = header.nruns * RUN_SIZE
            for table in (tables[:nruns], tables[nruns:]):
                for at in range(0, len(table), PIECE):
                    seed = digest(table[at : at + PIECE], seed)
            header = attrs.evolve(header, table_digest=seed)
            file.seek(header.table_offset)
            file.write(tables)
        file.truncate(header.file_size)
        file.seek(0)
        file.write(header.encode())


FIGURES: dict[str, Callable[[Snapshot], dict[str, int]]] = {
    "size 0": lambda h: {"size": 0},
    "size of no blocks": lambda h: {
        "size": h.size + 1,
        "table_offset": h.table_offset + 1,
        "file_size": h.file_size + 1,
    },
    "size beyond all": lambda h: {"size": 1 << 63},
    "size and nothing else": lambda h: {"size": h.size * 2},
    "block 0": lambda h: {"block_size": 0},
    "block 3": lambda h: {"block_size": 3 << 14},
    "block huge": lambda h: {"block_size": 1 << 62},
    "page 0": lambda h: {"page_size": 0},
    "page above block": lambda h: {"page_size": 1 << 30},
    "chunk 0": lambda h: {"chunk": 0},
    "chunk 1": lambda h: {"chunk": 1},
    "chunk no power": lambda h: {"chunk": 12288},
    "chunk huge": lambda h: {"chunk": 1 << 40},
    "data before the header ends": lambda h: {"data_offset": 0},
    "data nowhere": lambda h: {"data_offset": 1 << 62},
    "data at the tables": lambda h: {"data_offset": h.table_offset},
    "data at no page": lambda h: {"data_offset": h.data_offset + 1, "table_offset": h.table_offset + 1},
    "tables in the header": lambda h: {"table_offset": 0},
    "tables nowhere": lambda h: {"table_offset": (1 << 64) - 1},
    "no runs": lambda h: {"nruns": 0},
    "many runs": lambda h: {"nruns": 1 << 60},
    "more runs than blocks": lambda h: {"nruns": 1 << 20, "file_size": h.file_size + 16 * ((1 << 20) - 1)},
    "many records": lambda h: {"nrecords": (1 << 64) - 1},
    "more records than chunks": lambda h: {"nrecords": 1 << 20, "file_size": h.file_size + 24 * ((1 << 20) - 1)},
}


@pytest.mark.promise("snapshot-is-checked-first")
@pytest.mark.parametrize("name", FIGURES)
def test_figures_that_do_not_go_together(name: str, path: Path) -> None:
    header = small(path)
    put(path, attrs.evolve(header, **FIGURES[name](header)))
    refused(path, "figures do not go together")


def tables(runs: list[tuple[int, int]], records: list[tuple[int, int, int]]) -> bytes:
    return b"".join(struct.pack("<2Q", *run) for run in runs) + b"".join(struct.pack("<3Q", *each) for each in records)


HUGE = (1 << 64) - 1
WRONG_RUNS = [
    [(3, 0)],
    [(16, 1)],
    [(0, 17)],
    [(3, HUGE)],
    [(HUGE, 2)],
    [(3, 1), (3, 1)],
    [(5, 1), (3, 1)],
    [(3, 1), (4, 1)],
]
WRONG_RECORDS = [
    [(0, 0, 1)],  # zeroes are for incremental ones
    [(0, 1, 0)],
    [(0, HUGE, 0)],
    [(4, 256 << 10, 0)],
    [(HUGE, 256 << 10, 0)],
    [(0, 256 << 10, 0), (0, 256 << 10, 0)],
    [(1, 256 << 10, 0), (0, 256 << 10, 0)],
]


@pytest.mark.promise("snapshot-is-checked-first")
@pytest.mark.parametrize("runs", WRONG_RUNS, ids=str)
def test_runs_that_cannot_be(runs: list[tuple[int, int]], path: Path) -> None:
    header = small(path)
    size = header.table_offset + 16 * len(runs)
    put(path, attrs.evolve(header, nruns=len(runs), nrecords=0, file_size=size), tables(runs, []))
    refused(path, "corrupted table")


@pytest.mark.promise("snapshot-is-checked-first")
@pytest.mark.parametrize("records", WRONG_RECORDS, ids=str)
def test_records_that_cannot_be(records: list[tuple[int, int, int]], path: Path) -> None:
    header = small(path)
    size = header.table_offset + 16 + 24 * len(records)
    put(path, attrs.evolve(header, nruns=1, nrecords=len(records), file_size=size), tables([(3, 1)], records))
    refused(path, "corrupted table")


def test_zeroes_that_an_incremental_one_says_it_has(path: Path) -> None:
    for records in ([(0, 0, 0)], [(0, 0, 5)], [(2, 0, 3)], [(0, 0, HUGE)], [(0, 0, 2), (1, 0, 1)]):
        header = small(path)
        size = header.table_offset + 16 + 24 * len(records)
        wrong = attrs.evolve(header, nruns=1, nrecords=len(records), file_size=size, base="00" * 16)
        put(path, wrong, tables([(3, 1)], records))
        refused(path, "corrupted table")


def limited(work: Callable[[], Any]) -> None:
    """In a child that can have 256 MiB more than it has, and no more."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * PAGE + (256 << 20)
    run_child(work, limits={resource.RLIMIT_AS: size}).result()


@pytest.mark.promise("snapshot-is-checked-first")
def test_a_hostile_header_costs_no_memory(path: Path) -> None:
    """A sparse file that says it has a thousand million runs: nothing is taken for what is not there."""
    header = small(path)
    nruns = 1 << 30
    start = header.data_offset + (1 << 44)
    figures = {"size": 1 << 44, "block_size": 4096, "page_size": 4096, "table_offset": start}
    put(path, attrs.evolve(header, **figures, nruns=nruns, nrecords=0, file_size=start + 16 * nruns))
    limited(lambda: refused(path, "corrupted table"))
    # Some that are good at first.
    with path.open("r+b") as file:
        file.seek(start)
        file.write(tables([(2 * number, 1) for number in range(100_000)], []))
    limited(lambda: refused(path, "corrupted table"))


@pytest.mark.promise("snapshot-is-checked-first")
def test_a_region_larger_than_an_address_space_costs_nothing_either(path: Path) -> None:
    """A packed file need not have the size that it tells of: who reserves refuses, before any map is made."""
    with Region("1M", block_size=BLOCK) as region:
        header = region.save(path, compress="zstd")
    for size in (1 << 48, 1 << 56, (1 << 63) - (1 << 12)):
        put(path, attrs.evolve(header, size=size, block_size=4096, chunk=4096))

        def restore() -> None:
            with pytest.raises((OSError, MemoryError, ValueError)):
                Region.restore(path)

        limited(restore)


@pytest.mark.promise("snapshot-is-checked-first")
def test_a_small_file_may_tell_of_much_that_is_plugged(path: Path) -> None:
    """All of 1 TiB is: then limits and budgets say no, as for any plug."""
    with Region("1T") as region:
        header = region.save(path, compress="zstd")
    everything = attrs.evolve(header, nruns=1, file_size=header.file_size + 16)
    put(path, everything, tables([(0, header.nblocks)], []))
    budget = Budget("1G")
    with pytest.raises(BackendExhaustedError):
        Region.restore(path, budget=budget)
    assert budget.used == 0
    with pytest.raises(BackendExhaustedError):
        Region.restore(path)


@pytest.mark.promise("snapshot-is-checked-first")
def test_frames_that_are_not_what_they_should_be(path: Path) -> None:
    """Rightly digested, but no frames; or ones that say they hold a terabyte, or that hold more, or less."""
    import zstandard

    bomb = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 20)))
    frames = [
        b"no frame at all",
        zstandard.ZstdCompressor().compress(bytes(1 << 19)),
        zstandard.ZstdCompressor().compress(bytes(2 << 20)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20)),
        bytes(bomb) + b"more",
        bytes(bomb[:-3]),
        b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + bytes(bomb[9:]),
    ]
    with Region("1M", block_size=BLOCK) as region:
        region.plug(3)
        write(region, 3 * BLOCK, b"content")
        header = region.save(path, compress="zstd")
    for frame in frames:
        end = header.data_offset + len(frame)
        with path.open("r+b") as file:
            file.seek(header.data_offset)
            file.write(frame)
        wrong = attrs.evolve(header, table_offset=end, file_size=end + 40)
        put(path, wrong, tables([(3, 1)], [(0, len(frame), digest(frame))]))
        limited(lambda: refused(path, "no zstd frame of the right length"))
    wrong = attrs.evolve(header, table_offset=header.data_offset + 10, file_size=header.data_offset + 50)
    put(path, wrong, tables([(3, 1)], [(0, 11, 0)]))
    refused(path, "corrupted table")


# ---- what a hostile file can do, and what it cannot ------------------------------------------------


EXECUTES = ("exec", "compile", "import", "pickle.", "marshal.", "os.system", "os.exec", "os.posix_spawn", "subprocess.")


@both
@pytest.mark.promise("snapshot-is-checked-first")
def test_nothing_in_a_file_is_executed(compress: str | None, path: Path) -> None:
    """Python tells of all that it runs, imports or unpickles: a hostile description and content cause none of it."""
    code = "__import__('os').system('touch executed')"
    with region_with_content() as region:
        write(region, BLOCK, pickle.dumps(os.system) + code.encode())
        told = region.save(path, compress=compress)
    put(path, attrs.evolve(told, backend=code))
    Region.restore(path).close()  # what is imported at first use is there

    def restore() -> list[str]:
        seen: list[str] = []
        sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(EXECUTES) else None)
        Region.restore(path).close()
        told = list(seen)
        eval("1")  # the hook works
        assert seen[len(told) :] == ["compile", "exec"]
        return told

    assert run_child(restore).result() == []
    assert snapshot.describe(path).backend == code


def test_a_digest_is_no_signature(path: Path) -> None:
    """Who can write the file decides what is restored, as the documentation says."""
    header = small(path)
    at = 3 * BLOCK // header.chunk * header.chunk
    forged = (bytes(3 * BLOCK - at) + b"forged" + bytes(header.chunk))[: header.chunk]
    with path.open("r+b") as file:
        file.seek(header.data_offset + at)
        file.write(forged)
    put(path, header, tables([(3, 1)], [(at // header.chunk, header.chunk, digest(forged))]))
    with Region.restore(path) as region:
        assert contents(region)[3][:7] == b"forged\0"


# ---- describe ---------------------------------------------------------------------------------


def test_describe_reads_no_content(path: Path, inject: Injector) -> None:
    save(path)
    inject.made.clear()
    found = snapshot.describe(path)
    assert "load" not in inject.made
    assert (found.size, found.block_size, found.nruns, found.base, found.backend) == (
        2 << 20,
        BLOCK,
        3,
        None,
        "anonymous",
    )
    assert len(found.id) == 32


def test_a_backend_of_a_long_name(tmpfs_folder: Path) -> None:
    """Its text is cut off where the header ends; it is for people."""
    folder = tmpfs_folder
    while len(os.fsencode(folder)) < 3700:
        folder = folder / ("ä" * 100)
        folder.mkdir()
    from sparsemem import File

    with Region("1M", block_size=BLOCK, backend=File(folder / ("ü" * 60))) as region:
        region.save(tmpfs_folder / "saved")
        text = str(region.backend)
    found = snapshot.describe(tmpfs_folder / "saved")
    assert len(found.backend) > 1500
    assert text.startswith(found.backend[:-1])


def test_reading_that_fails(path: Path, inject: Injector) -> None:
    save(path)
    for nth in (1, 2, 3):
        inject.call("pread", errno=5, nth=nth)
        with pytest.raises(OSError, match=f"cannot read snapshot {path}: Input/output error") as caught:
            Region.restore(path)
        assert caught.value.errno == 5
        assert isinstance(caught.value, SnapshotError)
        inject.clear()
    for nth in range(1, 9):
        inject.copy("READ", errno=5, nth=nth)
        with pytest.raises(OSError, match=f"cannot read snapshot {path}: Input/output error"):
            Region.restore(path)
        inject.clear()
    Region.restore(path).close()
    assert lib.SM_SNAPSHOT_READ == 1
