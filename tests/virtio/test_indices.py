"""The index of a ring, in memory that somebody else may truncate: one access, and an error instead of SIGBUS."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from sparsemem import Memfd, Region
from sparsemem.virtio import FileRange, GuestError, GuestMemory, RegionRange
from sparsemem.virtio.guest_memory import GuestMemoryError
from tests.support.children import run_child
from tests.virtio.frontend import Guest

PAGE = 4096


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(1 << 20)
    yield guest
    guest.close()


def test_an_index_is_little_endian_and_needs_an_even_address(guest: Guest) -> None:
    with GuestMemory([FileRange(0, guest.size, guest.fd)]) as memory:
        memory.store16(0x1002, 0xABCD)
        assert guest.read(0x1000, 6) == b"\0\0\xcd\xab\0\0"
        guest.write(0x1002, b"\x01\x02")
        assert memory.load16(0x1002) == 0x0201
        for access in (lambda: memory.load16(0x1001), lambda: memory.store16(0x1001, 1)):
            with pytest.raises(GuestError, match="0x1001, which is odd"):
                access()
        for address in (guest.size, guest.size - 1, -2, 1 << 63):
            with pytest.raises(GuestError):
                memory.load16(address)
        memory.check(0, guest.size)
        with pytest.raises(GuestError):
            memory.check(1, guest.size)


@pytest.mark.promise("guest-memory-is-the-limit")
def test_an_index_in_an_unplugged_block_is_refused_and_allocates_nothing() -> None:
    with Region("4M", block_size="2M", backend=Memfd()) as region:
        region.plug(0)
        with GuestMemory([RegionRange(0, region.size, region)]) as memory:
            memory.store16(0, 7)
            assert memory.load16(0) == 7
            for access in (lambda: memory.load16(2 << 20), lambda: memory.store16(2 << 20, 1)):
                with pytest.raises(GuestError, match="unplugged blocks"):
                    access()
        assert os.fstat(region.fileno()).st_blocks * 512 == 2 << 20


def test_a_truncated_file_is_an_error_as_often_as_it_is_tried_and_in_every_thread(guest: Guest) -> None:
    with GuestMemory([FileRange(0, guest.size, guest.fd)]) as memory:
        os.ftruncate(guest.fd, PAGE)
        failures = []

        def work() -> None:
            for _ in range(200):
                for access in (lambda: memory.load16(PAGE), lambda: memory.store16(PAGE, 1)):
                    with pytest.raises(GuestMemoryError, match="truncated underneath"):
                        access()
                    failures.append(1)
                memory.store16(0, 5)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(failures) == 4 * 200 * 2
        os.ftruncate(guest.fd, guest.size)
        assert memory.load16(PAGE) == 0


@pytest.mark.parametrize("traced", [False, True])
def test_any_other_sigbus_goes_where_it_went_before(traced: bool) -> None:
    """Ours is in force within our own accesses only; what somebody else had put there is called elsewhere."""

    def child() -> None:
        if traced:
            faulthandler.enable(os.open(os.devnull, os.O_WRONLY))
        fd = os.memfd_create("short")
        os.ftruncate(fd, 2 * PAGE)
        with mmap.mmap(fd, 2 * PAGE) as memory, GuestMemory([FileRange(0, 2 * PAGE, fd)]) as guest:
            os.ftruncate(fd, PAGE)
            with pytest.raises(GuestMemoryError):
                guest.load16(PAGE)
            memory[PAGE]

    assert run_child(child).signal is signal.SIGBUS


def test_a_sigbus_that_was_sent_is_no_fault() -> None:
    def child() -> None:
        guest = Guest(PAGE * 2)
        with GuestMemory([FileRange(0, 2 * PAGE, guest.fd)]) as memory:
            memory.load16(0)
            os.kill(os.getpid(), signal.SIGBUS)

    assert run_child(child).signal is signal.SIGBUS
