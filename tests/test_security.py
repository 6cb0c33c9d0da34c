"""What somebody hostile can and cannot do: SECURITY.md names these tests."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparsemem import Cause, DiscardError, File, Memfd, PopulateError, Region, ReserveError, UnsupportedError
from sparsemem._sys import lib
from sparsemem.recipes import STRATEGIES
from tests.support import accounting
from tests.support.children import run_child, unprivileged
from tests.support.evidence import Cases
from tests.support.kinds import KINDS, Made, every_viewable, make

BLOCK = 64 << 10
SECRET_TEXT = b"another life's content"

# ---- one life after the other -------------------------------------------------------------------


@pytest.mark.promise("plugged-reads-zero")
@pytest.mark.parametrize("name", [kind.id for kind in KINDS if kind.has_memory and kind.discards])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_block_never_shows_another_lifes_content(
    name: str, strategy: str, request: pytest.FixtureRequest, cases: Cases
) -> None:
    """Every byte of every block, whoever had the memory before: the block itself, a neighbour, or a stray writer."""
    made = make(next(kind for kind in KINDS if kind.id == name), request, strategy)
    try:
        region = made.region(8 * made.kind.block_size)
    except UnsupportedError as error:
        assert "does not work on" in str(error)
        return
    chance = random.Random(3)
    with region:
        size = region.block_size
        pattern = (SECRET_TEXT * (size // len(SECRET_TEXT) + 1))[:size]
        for _ in range(6):
            region.plug_runs([(block, 1) for block in chance.sample(range(8), 5)], exist_ok=True)
            for first, count in list(region.plugged_runs()):
                for block in range(first, first + count):
                    with region.view(block) as view:
                        view[:] = pattern
            region.unplug_all()
            stray = chance.randrange(8)
            with region.view() as whole:
                whole[stray * size : stray * size + len(SECRET_TEXT)] = SECRET_TEXT
            for block in {stray, chance.randrange(8)}:
                region.plug(block)
                with region.view(block) as view:
                    assert bytes(view) == made.kind.fresh(size)
                cases.add()
            region.unplug_all()


@pytest.mark.promise("plugged-reads-zero")
@pytest.mark.filterwarnings("ignore::sparsemem.HugePageSplitWarning")
@every_viewable
def test_pages_given_back_inside_a_block_do_not_show_it_either(made: Made) -> None:
    with made.region(4 * made.kind.block_size) as region:
        region.plug(0, 2)
        with region.view(0, 2) as view:
            view[:] = b"\x5a" * len(view)
        page = region.page_size
        region.discard(0, page)
        region.populate(0, page)
        with region.view(0) as view:
            assert bytes(view[:page]) == made.kind.fresh(page)


# ---- a hostile guest: it writes wherever it likes in the whole reservation ---------------------------


@pytest.mark.promise("hostile-peer-is-contained")
@every_viewable
def test_a_guest_that_writes_everywhere_changes_no_state(made: Made) -> None:
    """The state of blocks is not in the memory that a guest has; what it touches shows, and is thrown away."""
    with made.region(4 * made.kind.block_size) as region:
        region.plug_runs([(0, 1), (3, 1)])
        with region.view() as whole:
            for block in range(4):
                whole[block * region.block_size] = 0xFF
        assert list(region.plugged_runs()) == [(0, 1), (3, 1)]
        assert region.audit().leaks == ((1, 2),)
        region.plug(1, 2)
        with region.view(1, 2) as view:
            assert bytes(view[:8]) == made.kind.fresh(8)
        region.unplug_all()
        assert region.audit().ok


# ---- a hostile peer: it has the same memfd or file -------------------------------------------------------


@contextmanager
def shared(strategy: str = "auto") -> Iterator[tuple[int, Region]]:
    """A memfd that a peer has made, without seals, and our region over it."""
    fd = os.memfd_create("peer", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 64 * BLOCK)
        with Region(64 * BLOCK, block_size=BLOCK, backend=Memfd(fd=fd, strategy=strategy)) as region:
            region.plug(0, 4)
            with region.view(0, 4) as view:
                view[:] = b"\x5a" * len(view)
            yield fd, region
    finally:
        os.close(fd)


def _in_peer(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python in another process, by another name for the same file: /proc/PID/fd/N."""
    command = [sys.executable, "-c", "import fcntl, os, sys\n" + text, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.promise("private-to-its-user")
def test_a_peer_cannot_truncate_what_we_have_made() -> None:
    with Region("16M", block_size=BLOCK, backend=Memfd()) as region:
        region.plug(0)
        done = _in_peer(
            "fd = os.open(sys.argv[1], os.O_RDWR)\n"
            "for size in (0, 1 << 30):\n"
            "    try: os.ftruncate(fd, size)\n"
            "    except PermissionError: print('refused')\n"
            "try: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)\n"
            "except PermissionError: print('refused')\n",
            f"/proc/{os.getpid()}/fd/{region.fileno()}",
        )
        assert done.stdout.split() == ["refused"] * 3, done.stderr
        assert region.audit().ok


@pytest.mark.promise("hostile-peer-is-contained")
def test_a_peer_that_truncates_is_an_error_for_a_plug_and_sigbus_for_an_access() -> None:
    """Only what was made without seals, by somebody else, can be truncated at all."""
    with shared() as (fd, region):
        os.ftruncate(fd, 2 * BLOCK)
        with pytest.raises(PopulateError) as caught:
            region.plug(8)
        assert caught.value.cause is Cause.FILE_TRUNCATED
        assert list(region.plugged_runs()) == [(0, 4)]
        assert region.audit().gaps == ((2, 2),)

        def access() -> int:
            return whole[3 * BLOCK]

        with region.view() as whole:
            outcome = run_child(access)
        assert outcome.signal is signal.SIGBUS
        with region.view(0, 2) as view:
            assert bytes(view) == b"\x5a" * len(view), "what is left is whole"
        os.ftruncate(fd, 64 * BLOCK)
        region.populate(2 * BLOCK, 2 * BLOCK)
        assert region.plug(8) == 1
        assert region.audit().ok


@pytest.mark.promise("hostile-peer-is-contained")
def test_what_a_peer_writes_into_unplugged_blocks_is_found_and_not_seen() -> None:
    with shared() as (fd, region):
        os.pwrite(fd, SECRET_TEXT, 10 * BLOCK)
        assert region.audit().leaks == ((10, 1),)
        region.plug(10)
        with region.view(10) as view:
            assert bytes(view) == bytes(BLOCK)
        assert region.audit().ok


@pytest.mark.promise("hostile-peer-is-contained")
def test_what_a_peer_punches_is_found_and_reads_zero() -> None:
    with shared() as (fd, region):
        with Region(64 * BLOCK, block_size=BLOCK, backend=Memfd(fd=fd, existing="adopt")) as peer:
            peer.unplug(1)
        assert region.audit().gaps == ((1, 1),)
        assert region.audit().gap_size == BLOCK
        region.populate(BLOCK, BLOCK)
        assert region.audit().ok
        with region.view(0, 3) as view:
            assert bytes(view) == b"\x5a" * BLOCK + bytes(BLOCK) + b"\x5a" * BLOCK


@pytest.mark.promise("hostile-peer-is-contained")
def test_what_a_peer_plugs_is_a_leak_that_goes_with_our_plug() -> None:
    with shared() as (fd, region):
        with Region(64 * BLOCK, block_size=BLOCK, backend=Memfd(fd=fd, existing="adopt")) as peer:
            peer.plug(20, 2)
            with peer.view(20) as view:
                view[:] = b"\xff" * BLOCK
            assert region.audit().leaks == ((20, 2),)
            region.plug(20)
            with region.view(20) as view:
                assert bytes(view) == bytes(BLOCK)
        assert accounting.allocated_bytes(fd) == 6 * BLOCK
        os.posix_fallocate(fd, 40 * BLOCK, BLOCK)
        assert not region.audit().ok, "memory that nobody has touched counts, too"


@pytest.mark.promise("hostile-peer-is-contained")
@pytest.mark.parametrize("strategy", ["auto", "populate_write"])
def test_a_peer_that_seals_the_file_ends_plugs_and_unplugs_with_errors(strategy: str) -> None:
    """F_SEAL_FUTURE_WRITE forbids punching (EPERM): what cannot be discarded is tainted, and not said to be free.

    What userfaultfd fills needs no discard first if there is nothing: such a plug succeeds, and is as good as any.
    """
    with shared(strategy) as (fd, region):
        os.pwrite(fd, b"something of the peer's", 9 * BLOCK)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, lib.F_SEAL_FUTURE_WRITE)
        with pytest.raises(DiscardError) as failed:
            region.unplug(0)
        assert failed.value.errno == errno.EPERM
        assert list(region.tainted_runs()) == [(0, 1)]
        with pytest.raises(PopulateError):
            region.plug(9)
        assert not region.is_plugged(9)
        needs_none = region.stats().strategy.startswith("uffd")
        if needs_none:
            region.plug(8)
            with region.view(8) as view:
                assert bytes(view) == bytes(BLOCK)
        else:
            with pytest.raises(PopulateError):
                region.plug(8)
        assert list(region.plugged_runs()) == ([(0, 4), (8, 1)] if needs_none else [(0, 4)])
        with region.view(1, 3) as view:
            assert bytes(view) == b"\x5a" * len(view)
        assert region.tainted_runs()


@pytest.mark.promise("private-to-its-user")
def test_a_peers_end_does_not_take_the_memory_along() -> None:
    """The descriptor is duplicated: whoever made it may close it, or be killed."""

    def peer(sender: int) -> None:
        import socket

        fd = os.memfd_create("peer")
        with socket.socket(fileno=os.dup(sender)) as channel:
            socket.send_fds(channel, [b"x"], [fd])
        os.kill(os.getpid(), signal.SIGKILL)

    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert run_child(peer, theirs.fileno()).signal is signal.SIGKILL
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    with Region("16M", block_size=BLOCK, backend=Memfd(fd=fd)) as region:
        os.close(fd)
        region.plug(0)
        assert fcntl.fcntl(region.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert region.audit().ok


# ---- files and names ------------------------------------------------------------------------------


@pytest.mark.promise("private-to-its-user")
def test_a_new_file_is_its_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    def child() -> int:
        os.umask(0)
        with Region("1M", block_size=BLOCK, backend=File(tmp_path / "file")):
            return stat.S_IMODE((tmp_path / "file").stat().st_mode)

    assert run_child(child).result() == 0o600


@pytest.mark.promise("private-to-its-user")
@pytest.mark.parametrize("target", ["a file", "nothing", "a folder", "/dev/zero"])
def test_a_link_that_somebody_has_planted_is_not_followed(target: str, tmp_path: Path) -> None:
    """Neither to what is there nor to make what is not."""
    goal = {"a folder": tmp_path, "/dev/zero": Path("/dev/zero")}.get(target, tmp_path / "goal")
    if target == "a file":
        goal.write_bytes(SECRET_TEXT)
    before = sorted(os.listdir(tmp_path))
    (tmp_path / "link").symlink_to(goal)
    for options in ({}, {"existing": "discard"}, {"shared": False}, {"delete": True}):
        with pytest.raises((ReserveError, UnsupportedError)):
            Region("1M", block_size=BLOCK, backend=File(tmp_path / "link", **options)).close()  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "link"])
    if target == "a file":
        assert goal.read_bytes() == SECRET_TEXT


@pytest.mark.promise("private-to-its-user")
def test_no_program_that_is_started_has_our_descriptors(tmp_path: Path) -> None:
    with (
        Region("16M", block_size=BLOCK, backend=Memfd()) as memfd,
        Region("16M", block_size=BLOCK, backend=File(tmp_path / "file")) as file,
        Region("16M", block_size=BLOCK) as anonymous,
    ):
        for region in (memfd, file, anonymous):
            region.plug(0)
        program = (
            "import os\nfor name in os.listdir('/proc/self/fd'):\n    print(os.path.realpath('/proc/self/fd/' + name))"
        )
        seen = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, close_fds=False
        )
        assert "memfd:" not in seen.stdout
        assert str(tmp_path) not in seen.stdout
        assert "userfaultfd" not in seen.stdout


@pytest.mark.promise("private-to-its-user")
def test_another_user_cannot_open_it(tmpfs_folder: Path) -> None:
    os.chmod(tmpfs_folder, 0o777)
    with Region("1M", block_size=BLOCK, backend=File(tmpfs_folder / "file")) as region:
        region.plug(0)
        if os.geteuid():
            pytest.skip("needs root: to be two users")
        path = str(tmpfs_folder / "file")
        ours = f"/proc/{os.getpid()}/fd/{region.fileno()}"

        def other() -> list[int]:
            codes = []
            for name in (path, ours):
                try:
                    os.close(os.open(name, os.O_RDONLY))
                except OSError as error:
                    codes.append(error.errno)
            return codes

        assert unprivileged(other).result() == [errno.EACCES, errno.EACCES]
