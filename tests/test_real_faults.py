"""Faults that are real: system calls made to fail from outside, limits reached, files pulled away, processes killed.

The injector of the other tests stands inside the shim. strace stands outside of the process: what it shows agrees.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    Cause,
    File,
    Memfd,
    PopulateError,
    Region,
    ReserveError,
    Secret,
    UnsupportedError,
)
from tests.support import accounting
from tests.support.children import run_child, unprivileged
from tests.support.evidence import Cases
from tests.support.kinds import private_bytes
from tests.support.strace import tampered

MIB = 1 << 20
BLOCK = 64 << 10

pytestmark = pytest.mark.slow

# ---- from outside: strace -------------------------------------------------------------------

_PROGRAM = """
import json
from sparsemem import *
from tests.support import accounting
from tests.support.kinds import private_bytes

def used():
    return private_bytes(region) if "Anonymous" in sys.argv[1] else accounting.allocated_bytes(region.fileno())

def state():
    return [sorted(region.plugged_runs()), sorted(region.tainted_runs()), used()]

runs = [(block, 1) for block in range(2, 42, 2)]
region = Region("64M", block_size="64K", backend=eval(sys.argv[1]))
region.plug_runs([(0, 1), (50, 1)])
region.view(0)[:5] = b"hello"
if sys.argv[2] == "unplug":
    region.plug_runs(runs)
    region.plug_runs([(first + 1, 1) for first, _ in runs])  # no gap to bridge
before = [len(accounting.open_descriptors())] if sys.argv[2] == "reserve" else state()
told = {}
ready()
try:
    if sys.argv[2] != "reserve":
        (region.plug_runs if sys.argv[2] == "plug" else region.unplug_runs)(runs)
except OSError as error:
    told = {"name": type(error).__name__, "errno": error.errno, "rolled_back": getattr(error, "rolled_back", None)}
    told["split"] = [sum(n for _, n in getattr(error, what, ())) for what in ("discarded", "tainted", "remaining")]
if sys.argv[2] == "reserve":
    try:
        Region("64M", block_size="64K", backend=eval(sys.argv[3])).close()
    except OSError as error:
        told = {"name": type(error).__name__, "errno": error.errno}
    after = [len(accounting.open_descriptors())]
else:
    after = state()
print(json.dumps([told, before, after, bytes(region.view(0)[:5]).decode(), len(runs)]), flush=True)
region.scrub()
region.close()
"""


def _told(inject: str, backend: str, operation: str, other: str = "") -> tuple[dict[str, Any], list[Any], list[Any]]:
    with tampered(_PROGRAM, inject, backend, operation, other) as process:
        told, before, after, content, _ = json.loads(process.go_on())
    assert process.injected >= 1, "strace injected nothing"
    assert content == "hello"
    return told, before, after


@pytest.mark.promise("plug-all-or-nothing")
@pytest.mark.parametrize(
    ("call", "code", "backend"),
    [
        ("process_madvise", "ENOMEM", "Anonymous(strategy='populate_write')"),
        ("process_madvise", "EFAULT", "Memfd(strategy='populate_write')"),
        ("fallocate", "ENOSPC", "Memfd(strategy='populate_write')"),
        ("fallocate", "EIO", "Memfd(strategy='futex')"),
        ("futex", "EFAULT", "Memfd(strategy='futex')"),
    ],
)
def test_a_plug_that_strace_lets_fail_is_as_if_it_had_never_been(call: str, code: str, backend: str) -> None:
    when = ":when=2" if call not in ("process_madvise", "futex") else ":when=1"
    told, before, after = _told(f"{call}:error={code}{when}", backend, "plug")
    assert (told["name"], told["errno"], told["rolled_back"]) in (
        ("PopulateError", getattr(errno, code), True),
        ("BackendExhaustedError", getattr(errno, code), True),
    )
    assert after == before


@pytest.mark.promise("plug-all-or-nothing")
@pytest.mark.parametrize("backend", ["Anonymous(strategy='uffd_copy')", "Memfd(strategy='uffd_zeropage')"])
def test_what_userfaultfd_does_not_fill_is_populated_the_other_way(backend: str) -> None:
    program = _PROGRAM.replace("range(2, 42, 2)", "range(2, 6, 2)")  # so few that each is a call of its own
    with tampered(program, "ioctl:error=ENOMEM:when=1..2", backend, "plug", "") as process:
        told, before, after, _, _ = json.loads(process.go_on())
    assert process.injected >= 2
    assert not told
    assert after[1:] == [[], before[2] + 2 * BLOCK]


@pytest.mark.promise("plug-all-or-nothing")
def test_madvise_too(cases: Cases) -> None:
    """One block at a time is one madvise: the populate's fails, the discard before it and after it does not."""
    program = _PROGRAM.replace("range(2, 42, 2)", "range(2, 6, 2)")
    for nth in (2, 4):  # each block is discarded and populated
        with tampered(
            program, f"madvise:error=ENOMEM:when={nth}", "Anonymous(strategy='populate_write')", "plug"
        ) as it:
            told, before, after, _, _ = json.loads(it.go_on())
        assert it.injected == 1
        assert (told["errno"], told["rolled_back"]) == (errno.ENOMEM, True)
        assert after == before
        cases.add()


@pytest.mark.promise("unplug-says-what-happened")
@pytest.mark.parametrize(
    ("call", "code", "backend", "nth"),
    [
        ("process_madvise", "EPERM", "Anonymous()", 1),
        ("fallocate", "EIO", "Memfd()", 1),
        ("fallocate", "EPERM", "Memfd()", 7),
    ],
)
def test_an_unplug_that_strace_lets_fail_says_exactly_what_happened(
    call: str, code: str, backend: str, nth: int
) -> None:
    told, before, after = _told(f"{call}:error={code}:when={nth}", backend, "unplug")
    assert (told["name"], told["errno"]) == ("DiscardError", getattr(errno, code))
    discarded, tainted, remaining = told["split"]
    assert (discarded, discarded + tainted + remaining) == (nth - 1, 20)
    assert tainted >= 1
    assert sum(n for _, n in after[0]) == sum(n for _, n in before[0]) - discarded
    assert sum(n for _, n in after[1]) == tainted
    assert after[2] == before[2] - discarded * BLOCK, "what failed was not done at all"


@pytest.mark.promise("make-or-leave-nothing")
@pytest.mark.parametrize(
    ("call", "code", "backend"),
    [
        ("mmap", "ENOMEM", "Anonymous()"),
        ("mmap", "ENOMEM", "Memfd()"),
        ("ftruncate", "EFBIG", "Memfd()"),
        ("memfd_create", "EMFILE", "Memfd()"),
        ("madvise", "ENOMEM", "Anonymous()"),
        ("fcntl", "EPERM", "Memfd()"),
    ],
)
def test_a_reservation_that_strace_lets_fail_leaves_nothing(call: str, code: str, backend: str) -> None:
    told, before, after = _told(f"{call}:error={code}:when=1+", "Anonymous()", "reserve", backend)
    # Python itself may have been refused memory for something first; then the region was not even begun.
    assert told["name"] in ("ReserveError", "UnsupportedError")
    assert told["errno"] == getattr(errno, code)
    assert after == before


# ---- several who want the same room -----------------------------------------------------------


def _plug_until_full(path: Path, gate: int) -> tuple[int, int, bool]:
    os.read(gate, 1)
    refused = 0
    with Region("1G", block_size=BLOCK, backend=File(path), headroom="off") as region:
        for block in range(region.nblocks):
            try:
                region.plug(block)
            except BackendExhaustedError as error:
                assert error.cause is Cause.TMPFS_FULL
                assert error.rolled_back
                refused += 1
                break
        with region.view(0, max(1, region.plugged_blocks)) as view:
            view[:] = b"\x5a" * len(view)  # a SIGBUS would end this process
        sound = region.audit().ok and accounting.allocated_bytes(region.fileno()) == region.plugged_size
        return region.plugged_blocks, refused, sound


@pytest.mark.promise("plugged-memory-is-there")
@pytest.mark.promise("plug-all-or-nothing")
def test_a_tmpfs_that_fills_up_while_two_processes_plug(tmpfs_mount: Any) -> None:
    folder, (reader, writer) = tmpfs_mount(size="32M"), os.pipe()

    def both() -> list[tuple[int, int, bool]]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(run_child, _plug_until_full, folder / name, reader) for name in "ab"]
            os.write(writer, b"go")
            return [answer.result().result() for answer in answers]

    try:
        answers = both()
    finally:
        os.close(reader)
        os.close(writer)
    assert all(sound for *_, sound in answers)
    assert any(refused for _, refused, _ in answers)
    assert sum(blocks for blocks, *_ in answers) <= 32 * MIB // BLOCK


@pytest.mark.promise("plugged-memory-is-there")
def test_a_pool_of_huge_pages_that_is_taken_away(huge_pool: Any, kernel_setting: Any) -> None:
    """Plugged blocks keep theirs, as surplus pages; further plugs are refused until the pool is back."""
    huge_pool(8)
    folder = accounting.huge_pool_folder()
    kernel_setting(folder / "nr_overcommit_hugepages", 0)
    total = (folder / "nr_hugepages").read_text()
    with Region("1G", backend=Memfd(hugetlb="2M"), headroom="off") as region:
        region.plug(0, 3)
        try:
            (folder / "nr_hugepages").write_text("0")
            with pytest.raises(BackendExhaustedError) as caught:
                region.plug(3)
            assert caught.value.cause is Cause.HUGETLB_POOL
            with region.view(0, 3) as view:
                view[:] = b"\x5a" * len(view)
            assert region.audit().ok
        finally:
            (folder / "nr_hugepages").write_text(total)
        assert region.plug(3) == 1


# ---- a control group at its limit ----------------------------------------------------------------


def _no_panic() -> None:
    if Path("/proc/sys/vm/panic_on_oom").read_text().strip() == "2":
        pytest.skip("needs a machine that does not panic when a control group runs out (vm.panic_on_oom)")


@pytest.mark.promise("crash-leaves-nothing")
def test_who_the_oom_killer_takes_leaves_the_others_and_the_file_sound(memory_cgroup: Any, tmpfs_folder: Path) -> None:
    """The file is shared by the one that is killed and by us, who hold blocks in it."""
    _no_panic()
    group = memory_cgroup(48 * MIB)
    path = tmpfs_folder / "shared"
    with Region("1G", block_size=BLOCK, backend=File(path)) as region:
        region.plug(0, 8)
        with region.view(0, 8) as view:
            view[:] = b"\x5a" * len(view)

        def greedy() -> None:
            Path("/proc/self/oom_score_adj").write_text("1000")
            group.add()
            with Region("1G", block_size=BLOCK, backend=File(path, existing="adopt"), headroom="off") as theirs:
                theirs.plug(1000, 4000)

        outcome = run_child(greedy)
        assert outcome.signal is signal.SIGKILL
        with region.view(0, 8) as view:
            assert bytes(view) == b"\x5a" * len(view)
        # What it had populated is in the file still: ours to see, and to give back.
        leaks = region.audit().leaks
        assert all(first >= 1000 for first, _ in leaks)
        region.plug_runs(leaks)
        region.unplug_runs(leaks)
        assert accounting.allocated_bytes(path) == 8 * BLOCK
        assert region.audit().ok


@pytest.mark.promise("plug-all-or-nothing")
def test_at_a_control_groups_limit_without_the_oom_killer_a_plug_is_rolled_back(memory_cgroup: Any) -> None:
    group = memory_cgroup(32 * MIB)
    if group.version != 1:
        pytest.skip("needs a memory controller of version 1: the OOM killer can be switched off there")
    group.disable_oom_killer()

    def child() -> tuple[int, bool, int]:
        with Region("1G", block_size="2M", backend=Anonymous(strategy="populate_write"), headroom="off") as region:
            region.plug(0)
            group.add()
            # Its cause is inferred when the limit may be lifted already: until then we may have to wait for memory.
            with pytest.raises(PopulateError) as caught:
                region.plug(1, 30)
            return caught.value.errno or 0, caught.value.rolled_back, private_bytes(region)

    # What the interpreter itself needs then may have to wait until the limit is lifted.
    lift = threading.Timer(3, group.set_limit, [None])
    lift.start()
    try:
        code, rolled_back, left = run_child(child).result()
    finally:
        lift.join()
    assert code == errno.ENOMEM
    assert rolled_back
    assert left == 2 * MIB


# ---- files pulled away ------------------------------------------------------------------------


@pytest.mark.promise("plugged-memory-is-there")
@pytest.mark.parametrize("delete", [True, False])
def test_a_file_that_is_deleted_underneath_is_memory_still(delete: bool, tmpfs_folder: Path) -> None:
    path = tmpfs_folder / "file"
    with Region("1G", block_size=BLOCK, backend=File(path, delete=delete)) as region:
        region.plug(0, 2)
        path.unlink()
        region.plug(4, 2)
        with region.view(4, 2) as view:
            view[:] = b"\x5a" * len(view)
        region.unplug(0, 2)
        assert region.audit().ok
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


# ---- killed at any moment -----------------------------------------------------------------------

_VICTIM = """
import random, sys
from sparsemem import File, Region

region = Region("256M", block_size="64K", backend=File(sys.argv[1], existing="discard", delete=True), headroom="off")
chance = random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    first, count = chance.randrange(3000), chance.randrange(1, 800)
    if chance.random() < 0.5:
        region.plug(first, count, exist_ok=True)
    else:
        region.unplug(first, count, missing_ok=True)
"""


@pytest.mark.promise("crash-leaves-nothing")
def test_killed_at_random_moments_nothing_is_left_that_cannot_be_had_back(tmpfs_mount: Any, cases: Cases) -> None:
    """SIGKILL: no handler of ours runs. What is left is one file, whose blocks the next one may discard or adopt."""
    folder = tmpfs_mount(size="300M")
    path, chance = folder / "file", random.Random(7)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for turn in range(12):
        command = [sys.executable, "-c", _VICTIM, str(path), str(turn)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
            assert process.wait(20) == -signal.SIGKILL
        assert os.listdir(folder) == ["file"], "no other file"
        held = accounting.allocated_bytes(path)
        with Region("256M", block_size=BLOCK, backend=File(path, existing="adopt"), headroom="off") as region:
            assert region.audit().ok, "all that the file holds is adopted"
            assert region.plugged_size >= held
            region.unplug_all()
            assert accounting.allocated_bytes(path) == 0
        cases.add()
    path.unlink()
    assert os.statvfs(folder).f_bfree * 4096 == 300 * MIB, "nothing of the tmpfs is lost"


@pytest.mark.promise("crash-leaves-nothing")
def test_a_killed_processs_memfd_goes_with_it(huge_pool: Any) -> None:
    huge_pool(8)
    free = accounting.huge_pool().free

    def child() -> None:
        region = Region("1G", backend=Memfd(hugetlb="2M"), headroom="off")
        region.plug(0, 4)
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_child(child).signal is signal.SIGKILL
    assert accounting.huge_pool().free == free


# ---- signals, and the limits of a process ----------------------------------------------------------


@pytest.mark.promise("interrupt-safe")
@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False)], ids=str)
def test_a_storm_of_signals_changes_nothing(backend: Any) -> None:
    """A handler may run between any two system calls, and in the middle of long ones."""

    def child() -> tuple[int, bool]:
        seen = 0

        def handler(_number: int, _frame: object) -> None:
            nonlocal seen
            seen += 1

        signal.signal(signal.SIGALRM, handler)
        with Region("256M", block_size="64K", backend=backend) as region:
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                assert region.plug(0, 512) == 512
                assert region.unplug(100, 200) == 200
                assert region.plug_runs([(block, 1) for block in range(600, 700, 2)]) == 50
                region.unplug_all()
            signal.setitimer(signal.ITIMER_REAL, 0)
            return seen, region.audit().ok and region.plugged_size == 0

    seen, sound = run_child(child).result()
    assert sound
    assert seen > 100


@pytest.mark.promise("make-or-leave-nothing")
def test_the_limit_on_locked_memory(tmp_path: Path) -> None:
    """`ulimit -l` binds nobody who does not lock: only memfd_secret is locked memory, and says so."""

    def child() -> tuple[int, str]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
        with Region("1G", block_size=BLOCK) as region:
            changed = region.plug(0, 64)
        try:
            Region("16M", block_size=4096, backend=Secret()).close()
        except ReserveError as error:
            return changed, str(error)
        except UnsupportedError as error:
            return changed, f"ulimit -l has no meaning without it: {error}"
        return changed, ""

    changed, told = unprivileged(child).result()
    assert changed == 64
    assert "ulimit -l" in told


@pytest.mark.promise("plug-all-or-nothing")
@pytest.mark.parametrize("name", ["RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_MEMLOCK", "RLIMIT_DATA"])
def test_a_limit_that_is_used_up_while_plugging_does_not_matter(name: str) -> None:
    """What plugs and unplugs need of descriptors and address space they have from the start, or do without."""

    def child() -> bool:
        with Region("1G", block_size="64K", backend=Memfd()) as region:
            region.plug_runs([(block, 1) for block in range(0, 64, 2)])
            limit = getattr(resource, name)
            used = {"RLIMIT_NOFILE": len(accounting.open_descriptors()), "RLIMIT_MEMLOCK": 0}.get(name)
            if used is None:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + MIB
            resource.setrlimit(limit, (used, used))
            region.plug_runs([(block, 1) for block in range(101, 201, 2)])
            region.unplug_runs([(block, 1) for block in range(101, 201, 2)])
            region.plug(300, 200)
            region.unplug_all()
            resource.setrlimit(limit, (used, resource.getrlimit(limit)[1]))
            return region.plugged_size == 0

    assert run_child(child).result()
