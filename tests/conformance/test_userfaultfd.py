"""Two errors of MADV_POPULATE_WRITE that only userfaultfd can make, and two ways of its own to populate."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Iterator

import pytest

from sparsemem import Anonymous, Cause, PopulateError, Region
from tests.conformance.raw import DONTNEED, PAGE, POPULATE_WRITE, madvise, mapping, memfd, punch
from tests.support.children import run_child

_NUMBER = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1
_SIGBUS, _POISON = 1 << 7, 1 << 14
EHWPOISON = 133


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | 0xAA << 8 | number


class Userfaultfd:
    """One userfaultfd object."""

    def __init__(self, features: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        number = _NUMBER.get(platform.machine())
        if number is None:
            pytest.skip("needs the number of this architecture's userfaultfd call")
        self.fd = libc.syscall(number, os.O_CLOEXEC | _USER_MODE_ONLY)
        if self.fd < 0:
            pytest.skip(f"needs userfaultfd ({os.strerror(ctypes.get_errno())})")
        try:
            fcntl.ioctl(self.fd, _iowr(0x3F, 24), struct.pack("QQQ", 0xAA, features, 0))
        except OSError:
            os.close(self.fd)
            pytest.skip("needs a kernel with these userfaultfd features (SIGBUS, UFFDIO_POISON)")

    def register(self, start: int, length: int) -> None:
        fcntl.ioctl(self.fd, _iowr(0x00, 32), struct.pack("QQQQ", start, length, 1, 0))

    def unregister(self, start: int, length: int) -> None:
        fcntl.ioctl(self.fd, _iowr(0x01, 16) & ~(1 << 30), struct.pack("QQ", start, length))

    def copy(self, start: int, source: int, length: int) -> None:
        fcntl.ioctl(self.fd, _iowr(0x03, 40), struct.pack("QQQQq", start, source, length, 0, 0))

    def zero(self, start: int, length: int) -> None:
        fcntl.ioctl(self.fd, _iowr(0x04, 32), struct.pack("QQQq", start, length, 0, 0))

    def poison(self, start: int, length: int) -> None:
        fcntl.ioctl(self.fd, _iowr(0x08, 32), struct.pack("QQQq", start, length, 0, 0))


@pytest.fixture
def sigbus() -> Iterator[Userfaultfd]:
    made = Userfaultfd(_SIGBUS)
    yield made
    os.close(made.fd)


@pytest.fixture
def plain() -> Iterator[Userfaultfd]:
    made = Userfaultfd(0)
    yield made
    os.close(made.fd)


@pytest.fixture
def poison() -> Iterator[Userfaultfd]:
    made = Userfaultfd(_POISON)
    yield made
    os.close(made.fd)


def test_sigbus_mode_is_efault(sigbus: Userfaultfd) -> None:
    with mapping() as raw:
        sigbus.register(raw.address, raw.size)
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT
        assert raw.private() == 0


def test_a_poisoned_page_is_ehwpoison_and_a_discard_heals_it(poison: Userfaultfd) -> None:
    with mapping() as raw:
        poison.register(raw.address + 4 * PAGE, PAGE)
        poison.poison(raw.address + 4 * PAGE, PAGE)
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == EHWPOISON
        assert madvise(raw.address + 4 * PAGE, PAGE, DONTNEED) == 0
        poison.unregister(raw.address + 4 * PAGE, PAGE)
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == 0


def test_copying_into_a_private_memfd_populates_it_once(plain: Userfaultfd) -> None:
    """MADV_POPULATE_WRITE leaves the file's pages behind the copies."""
    with memfd() as fd, mapping(fd=fd) as raw, mapping() as source:
        plain.register(raw.address, raw.size)
        assert source.populated()
        plain.copy(raw.address, source.address, raw.size)
        assert (raw.private(), raw.in_file()) == (raw.size, 0)
    with memfd() as fd, mapping(fd=fd) as raw:
        assert raw.populated()
        assert (raw.private(), raw.in_file()) == (raw.size, raw.size)


def test_zero_pages_and_then_a_populate_do_so_too(plain: Userfaultfd) -> None:
    with memfd() as fd, mapping(fd=fd) as raw:
        plain.register(raw.address, raw.size)
        plain.zero(raw.address, raw.size)
        assert (raw.private(), raw.in_file()) == (0, 0), "the zero page is nobody's"
        assert raw.populated()
        assert (raw.private(), raw.in_file()) == (raw.size, 0)


def test_a_page_poisoned_in_use_is_told_by_its_cause(poison: Userfaultfd) -> None:
    """A plug discards first and so heals; populating again inside a plugged block meets the poison."""
    with Region("1M", block_size="64K", backend=Anonymous(strategy="populate_write")) as region:
        region.plug(0)
        region.discard(0, PAGE)
        poison.register(region.address, PAGE)
        poison.poison(region.address, PAGE)
        with pytest.raises(PopulateError) as caught:
            region.populate(0, 2 * PAGE)
        assert caught.value.errno == EHWPOISON
        assert caught.value.cause is Cause.POISONED


# ---- what traps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [_SIGBUS, _POISON], ids=["SIGBUS mode", "messages"])
def test_what_the_kernel_does_for_us_is_efault_and_waits_for_nobody(features: int) -> None:
    """Only faults of user code are asked for (UFFD_USER_MODE_ONLY): as root, too, and with nobody reading messages."""
    made = Userfaultfd(features)
    with memfd() as fd, mapping(fd=fd, shared=True) as raw, open("/dev/zero", "rb", buffering=0) as zeroes:
        made.register(raw.address, raw.size)
        memory = memoryview((ctypes.c_char * PAGE).from_address(raw.address)).cast("B")
        with pytest.raises(OSError, match="Bad address"):
            zeroes.readinto(memory)
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT
        assert raw.in_file() == 0
        made.zero(raw.address, PAGE)
        assert zeroes.readinto(memory) == PAGE
        # Discarding arms it again.
        assert punch(fd, 0, raw.size) == 0
        assert madvise(raw.address, PAGE, POPULATE_WRITE) == errno.EFAULT
        # What is in the file is not missing, whoever has put it there.
        os.pwrite(fd, b"x", 0)
        assert madvise(raw.address, PAGE, POPULATE_WRITE) == 0
    os.close(made.fd)


def test_a_child_is_not_trapped(sigbus: Userfaultfd) -> None:
    with mapping() as raw:
        sigbus.register(raw.address, raw.size)
        assert run_child(madvise, raw.address, raw.size, POPULATE_WRITE).result() == 0
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT


def test_a_range_can_be_registered_with_one_only(sigbus: Userfaultfd, plain: Userfaultfd) -> None:
    with mapping() as raw:
        sigbus.register(raw.address, raw.size)
        with pytest.raises(OSError, match="busy"):
            plain.register(raw.address, raw.size)


def test_a_punch_leaves_poison_and_filling_in_replaces_it(poison: Userfaultfd) -> None:
    with memfd() as fd, mapping(fd=fd, shared=True) as raw:
        poison.register(raw.address, raw.size)
        poison.poison(raw.address, PAGE)
        assert punch(fd, 0, raw.size) == 0
        assert madvise(raw.address, PAGE, POPULATE_WRITE) == EHWPOISON
        poison.zero(raw.address, PAGE)
        assert madvise(raw.address, PAGE, POPULATE_WRITE) == 0


def test_what_is_there_already_is_eexist(plain: Userfaultfd) -> None:
    with mapping() as raw:
        plain.register(raw.address, raw.size)
        plain.zero(raw.address, PAGE)
        with pytest.raises(FileExistsError):
            plain.zero(raw.address, 2 * PAGE)
