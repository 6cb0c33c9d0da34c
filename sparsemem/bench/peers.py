"""The peers in C: compiled when the benchmark runs, loaded with cffi's ABI mode."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from cffi import FFI

from sparsemem.errors import UnsupportedError

_DECLARATIONS = """
    void *peer_map(size_t size, int flags, int fd);
    int peer_unmap(void *base, size_t size);
    int peer_advise(void *base, size_t size, size_t step, size_t stride, int advice);
    int peer_punch(int fd, size_t size, size_t step, size_t stride);
    int peer_punch_each(int fd, const uint64_t *offsets, size_t n, size_t size);
    void peer_fill(void *base, int value, size_t size);
    int peer_share(void *base, size_t size, size_t page, int nthreads, int touch);
    int peer_latency(void *base, size_t block, size_t rounds, uint64_t *ns);
    int peer_watch(void);
    uint64_t peer_watched(void);
    int peer_spin(int nthreads);
    void peer_rest(void);
    uint64_t peer_find(const uint8_t *bits, uint64_t nbits, uint64_t count);
    uint64_t peer_runs(const uint8_t *bits, uint64_t nbits, uint64_t *runs, uint64_t room);
"""


class Peers:
    """The compiled peers.  Every call lets go of the GIL, as cffi's do."""

    def __init__(self, library: Path) -> None:
        self.ffi: Any = FFI()
        self.ffi.cdef(_DECLARATIONS)
        self._lib: Any = self.ffi.dlopen(str(library))

    @contextmanager
    def mapping(self, size: int, flags: int, fd: int = -1, *, advice: int | None = None) -> Iterator[Any]:
        """A mapping aligned to 2 MiB, as a pointer."""
        base = self._lib.peer_map(size, flags, fd)
        if base == self.ffi.NULL:
            raise OSError(self.ffi.errno, f"mmap: {os.strerror(self.ffi.errno)}")
        try:
            if advice is not None:
                self.advise(base, size, advice)
            yield base
        finally:
            self._lib.peer_unmap(base, size)

    def advise(self, base: Any, size: int, advice: int, *, step: int = 0, stride: int = 0) -> None:
        """madvise() over all of it, or `step` bytes at every `stride`."""
        step = step or size
        self._check(self._lib.peer_advise(base, size, step, stride or step, advice))

    def punch(self, fd: int, size: int, *, step: int = 0, stride: int = 0) -> None:
        """fallocate(PUNCH_HOLE), likewise."""
        step = step or size
        self._check(self._lib.peer_punch(fd, size, step, stride or step))

    def punch_each(self, fd: int, offsets: Any, size: int) -> None:
        """fallocate(PUNCH_HOLE) of so many bytes at each of the offsets, an array of uint64."""
        at = self.ffi.from_buffer("uint64_t[]", offsets)
        self._check(self._lib.peer_punch_each(fd, at, len(at), size))

    def preallocate(self, base: Any, size: int, page: int, threads: int, *, touch: bool) -> None:
        """As QEMU does: each of some threads populates its share of the pages, or touches them."""
        self._check(self._lib.peer_share(base, size, page, threads, touch))

    def fill(self, base: Any, value: int, size: int) -> None:
        """memset()."""
        self._lib.peer_fill(base, value, size)

    def latency(self, base: Any, block: int, rounds: int) -> list[int]:
        """Nanoseconds that each MADV_POPULATE_WRITE and MADV_DONTNEED of a block took."""
        took = self.ffi.new("uint64_t[]", rounds)
        self._check(self._lib.peer_latency(base, block, rounds, took))
        return list(took)

    @contextmanager
    def watching(self) -> Iterator[list[float]]:
        """A thread that maps a page now and then; at the end the list has the longest wait, in seconds."""
        waited: list[float] = []
        self._check(self._lib.peer_watch())
        try:
            yield waited
        finally:
            waited.append(self._lib.peer_watched() / 1e9)

    @contextmanager
    def spinning(self, threads: int) -> Iterator[None]:
        """So many processors are busy with something else."""
        try:
            self._check(self._lib.peer_spin(threads))
            yield
        finally:
            self._lib.peer_rest()

    def find(self, bits: Any, nbits: int, count: int) -> int:
        """The first of `count` clear bits in a row, looked for word by word."""
        return int(self._lib.peer_find(self.ffi.from_buffer("uint8_t[]", bits), nbits, count))

    def runs(self, bits: Any, nbits: int, out: Any) -> int:
        """All runs of set bits, into an array of pairs."""
        room = self.ffi.from_buffer("uint64_t[]", out)
        return int(self._lib.peer_runs(self.ffi.from_buffer("uint8_t[]", bits), nbits, room, len(room) // 2))

    def _check(self, error: int) -> None:
        if error:
            raise OSError(error, os.strerror(error))


@contextmanager
def compiled() -> Iterator[Peers]:
    """The peers, compiled into a folder that is removed afterwards.

    Raises:
        UnsupportedError: There is no C compiler (`$CC`, else `cc`), or it fails.
    """
    import subprocess  # here and not above: whoever does not run a benchmark need not load it

    source = resources.files("sparsemem.bench").joinpath("peers.c")
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    with tempfile.TemporaryDirectory(prefix="sparsemem-bench-") as folder, resources.as_file(source) as path:
        library = Path(folder, "peers.so")
        command = [*compiler, "-std=gnu11", "-O2", "-shared", "-fPIC", "-pthread", "-o", str(library), str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UnsupportedError(f"no C compiler: {compiler[0]}: {error.strerror}") from None
        if done.returncode:
            said = " ".join(done.stderr.split())
            raise UnsupportedError(f"the C compiler fails: {said[:200] or f'status {done.returncode}'}")
        yield Peers(library)
