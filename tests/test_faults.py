"""Every system call may fail at any time: afterwards all is as before, or tainted and reported.

The errnos are those of the man pages of madvise, fallocate, futex, mmap, memfd_create, ftruncate, fcntl and open.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import attrs
import pytest

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    BlockStateError,
    Budget,
    DiscardError,
    File,
    Memfd,
    PopulateError,
    Region,
    ReserveError,
    Secret,
    SparseMemError,
    UnsupportedError,
)
from sparsemem._sys import lib
from sparsemem.backends import Backend
from sparsemem.recipes import RECIPES, Step
from tests.support import accounting
from tests.support.children import run_child
from tests.support.injector import Injector
from tests.support.kinds import KINDS, Kind, Made, make, need_disk

MADVISE = "EACCES EAGAIN EBADF EFAULT EHWPOISON EINVAL EIO ENOMEM EPERM EBUSY".split()
FALLOCATE = "EBADF EFBIG EINVAL EIO ENODEV ENOSPC EOPNOTSUPP EPERM ESPIPE ETXTBSY EDQUOT ENOSYS".split()
FUTEX = "EFAULT EACCES EINVAL ENOSYS EAGAIN".split()
# What the step gives where neither userfaultfd nor the populate that takes over can do it.
UFFD = sorted({*MADVISE, *"EAGAIN EEXIST EFAULT EINVAL ENOENT ENOSPC ESRCH".split()})
MPROTECT = "EACCES EINVAL ENOMEM".split()
READV = "EAGAIN EBADF EFAULT EINVAL EIO EISDIR EMFILE ENFILE ENOENT ENOMEM".split()
OF_STEP = {
    Step.DONTNEED: MADVISE,
    Step.REMOVE: MADVISE,
    Step.POPULATE_WRITE: MADVISE,
    Step.PUNCH: FALLOCATE,
    Step.FALLOCATE: FALLOCATE,
    Step.FUTEX: FUTEX,
    Step.LAST_PAGES: MADVISE,
    Step.FIRST_PAGES: MADVISE,
    Step.UFFD_COPY: UFFD,
    Step.UFFD_ZEROPAGE: UFFD,
    Step.TOUCH: READV,
    Step.GUARD: MADVISE,
    Step.UNGUARD: MADVISE,
    Step.FORBID: MPROTECT,
    Step.ALLOW: MPROTECT,
    Step.COLLAPSE: [],  # what it cannot collapse is populated with small pages
}
OF_CALL = {
    "reserve": "EACCES EAGAIN EBADF EINVAL ENFILE ENODEV ENOMEM EOVERFLOW EPERM ETXTBSY".split(),
    "memfd_create": "EFAULT EINVAL EMFILE ENFILE ENOMEM ENOSYS EPERM".split(),
    "ftruncate": "EFBIG EINTR EINVAL EIO EPERM EROFS ETXTBSY EBADF".split(),
    "add_seals": "EBUSY EPERM EINVAL EBADF".split(),
    # Without EEXIST, which means that somebody has made the file meanwhile: then it is an existing one.
    "open": (
        "EACCES EAGAIN EBADF EBUSY EDQUOT EFAULT EFBIG EINTR EINVAL EISDIR ELOOP EMFILE ENAMETOOLONG ENFILE ENODEV "
        "ENOENT ENOMEM ENOSPC ENOTDIR ENXIO EOPNOTSUPP EOVERFLOW EPERM EROFS ETXTBSY"
    ).split(),
    "duplicate": "EMFILE EBADF".split(),
}
BLOCK = 64 << 10


def number(name: str) -> int:
    return getattr(errno, name, 133)


class Told:
    """A listener that keeps what it was told."""

    def __init__(self) -> None:
        self.blocks: set[int] = set()

    def on_plug(self, first: int, count: int) -> None:
        self.blocks |= set(range(first, first + count))

    def on_unplug(self, first: int, count: int) -> None:
        self.blocks -= set(range(first, first + count))


def plugged(region: Region) -> set[int]:
    return {block for first, count in region.plugged_runs() for block in range(first, first + count)}


def tainted(region: Region) -> set[int]:
    return {block for first, count in region.tainted_runs() for block in range(first, first + count)}


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.id == name)


FAULTY = [
    ("anonymous private", "populate_write"),
    ("anonymous private", "futex"),
    ("anonymous shared", "populate_write"),
    ("memfd shared", "populate_write"),
    ("memfd shared", "futex"),
    ("memfd private", "populate_write"),
    ("memfd private", "futex"),
    ("tmpfs file shared", "populate_write"),
    ("disk file owned", "populate_write"),
    ("disk file template", "populate_write"),
    ("memfd hugetlb shared", "populate_write"),
    ("anonymous hugetlb", "populate_write"),
]


def populate_cases() -> list[object]:
    """Each step of each recipe, each errno, at the first, second and a later call, with and without partial work."""
    cases = []
    for name, strategy in FAULTY:
        with_mapping = {
            "anonymous private": "ANONYMOUS_PRIVATE",
            "anonymous shared": "ANONYMOUS_SHARED",
            "anonymous hugetlb": "ANONYMOUS_HUGETLB",
            "memfd hugetlb shared": "HUGETLB_SHARED",
            "memfd private": "SHMEM_PRIVATE",
            "disk file owned": "DISK_SHARED",
            "disk file template": "TEMPLATE",
        }
        recipe = next(r for k, r in RECIPES.items() if k.name == with_mapping.get(name, "SHMEM_SHARED"))
        for step in dict.fromkeys(recipe.faults[strategy]):
            for code in OF_STEP[step]:
                for nth, after in ((1, 0), (2, 4096), (4, BLOCK)):
                    if "hugetlb" in name and (nth > 2 or code not in ("ENOMEM", "EFAULT", "ENOSPC")):
                        continue
                    cases.append(
                        pytest.param(
                            name,
                            strategy,
                            step,
                            code,
                            nth,
                            after,
                            id=f"{name}-{strategy}-{step.name}-{code}-{nth}-{after}",
                        )
                    )
    return cases


def ready(
    name: str, strategy: str, request: pytest.FixtureRequest, inject: Injector, protection: str = "none"
) -> tuple[Made, Region, Told]:
    made = make(_kind(name), request, strategy, protection)
    region = made.region(budget=Budget("1G"))
    told = Told()
    region.add_listener(told)
    region.plug_runs([(0, 1), (9, 1)])
    for block in (0, 9):
        with region.view(block) as view:
            view[:] = bytes([block + 1]) * len(view)
    return made, region, told


def check_others(region: Region) -> None:
    for block in (0, 9):
        with region.view(block) as view:
            assert view == bytes([block + 1]) * len(view), f"block {block} lost its content"


@pytest.mark.promise("plug-all-or-nothing")
@pytest.mark.parametrize(("name", "strategy", "step", "code", "nth", "after"), populate_cases())
def test_a_failed_plug_leaves_all_as_before(
    name: str,
    strategy: str,
    step: Step,
    code: str,
    nth: int,
    after: int,
    request: pytest.FixtureRequest,
    inject: Injector,
) -> None:
    made, region, told = ready(name, strategy, request, inject)
    with region:
        before = made.used(region)
        after = after if not made.kind.huge else after and 2 << 20
        # Scattered blocks: one call each, so that the nth call is the nth block's.
        runs = [(2, 1), (4, 1), (6, 1), (8, 1)]
        inject.step(step, errno=number(code), nth=nth, after=after)
        with pytest.raises(PopulateError) as caught:
            region.plug_runs(runs)
        assert caught.value.errno == number(code)
        assert caught.value.rolled_back
        # Private files are punched twice a block: before they are populated and after.
        failed = (nth - 1) // region._mapping.recipe.populate(strategy).count(step)  # type: ignore[attr-defined]
        assert caught.value.populated == failed * region.block_size
        assert caught.value.offset == runs[failed][0] * region.block_size
        assert plugged(region) == told.blocks == {0, 9}
        assert not tainted(region)
        assert made.used(region) == before
        check_others(region)
        assert region._core.blocks.budget.used == 2 * region.block_size  # type: ignore[union-attr]
        assert region.stats().failures == 1
        assert region.plug_runs(runs) == 4  # and works once the fault is gone
        assert region.audit().ok


@pytest.mark.promise("tainted-is-mended")
@pytest.mark.parametrize("name", ["anonymous private", "memfd shared", "memfd private", "disk file owned"])
@pytest.mark.parametrize("code", ["EIO", "ENOMEM", "EINVAL"])
def test_a_failed_rollback_taints_and_says_so(
    name: str, code: str, request: pytest.FixtureRequest, inject: Injector
) -> None:
    made, region, told = ready(name, "populate_write", request, inject)
    with region:
        before = made.used(region)
        step = RECIPES_DISCARD[name]
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, nth=3, after=4096)
        inject.step(step, errno=number(code), nth=1)  # the rollback's first discard
        with pytest.raises(PopulateError) as caught:
            region.plug_runs([(2, 1), (4, 1), (6, 1)])
        assert not caught.value.rolled_back
        assert plugged(region) == told.blocks == {0, 9}
        assert tainted(region) == {2}
        with pytest.raises(BlockStateError, match="block 2 is tainted"):
            region.plug(2)
        assert region.plug(4) == 1, "other blocks are not concerned"
        region.unplug(4)
        inject.clear()
        assert region.scrub() == 1
        assert not tainted(region)
        assert made.used(region) == before
        assert region.plug(2) == 1
        with region.view(2) as view:
            assert view == bytes(len(view))


RECIPES_DISCARD = {
    "anonymous private": Step.DONTNEED,
    "anonymous shared": Step.REMOVE,
    "memfd shared": Step.PUNCH,
    "memfd private": Step.PUNCH,
    "disk file owned": Step.PUNCH,
    "disk file template": Step.DONTNEED,
}


@pytest.mark.promise("tainted-is-mended")
@pytest.mark.promise("unplug-says-what-happened")
@pytest.mark.parametrize("name", RECIPES_DISCARD)
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("after", [0, 4096])
@pytest.mark.parametrize("code", ["EIO", "ENOMEM", "EINVAL", "EPERM", "EBUSY"])
def test_a_failed_unplug_stops_and_says_exactly_what_happened(
    name: str, nth: int, after: int, code: str, request: pytest.FixtureRequest, inject: Injector
) -> None:
    _, region, told = ready(name, "auto", request, inject)
    with region:
        region.plug(2, 5)  # the blocks in between stay: unplugged ones would be discarded along with the others
        inject.step(RECIPES_DISCARD[name], errno=number(code), nth=nth, after=after)
        with pytest.raises(DiscardError) as caught:
            region.unplug_runs([(2, 1), (4, 1), (6, 1)])
        blocks = [2, 4, 6]
        assert caught.value.errno == number(code)
        assert caught.value.discarded == tuple((block, 1) for block in blocks[: nth - 1])
        assert caught.value.tainted == ((blocks[nth - 1], 1),)
        assert caught.value.remaining == tuple((block, 1) for block in blocks[nth:])
        assert plugged(region) == told.blocks == {0, 9, 3, 5, *blocks[nth - 1 :]}
        assert tainted(region) == {blocks[nth - 1]}
        check_others(region)
        with pytest.raises(BlockStateError, match="tainted"):
            region.view(blocks[nth - 1])
        assert region.scrub() == 1
        assert plugged(region) == told.blocks == {0, 9, 3, 5, *blocks[nth:]}
        assert region.unplug_runs([(block, 1) for block in blocks[nth:]]) == 3 - nth
        assert region.audit().ok


def test_a_failed_discard_inside_a_block_keeps_the_block(inject: Injector) -> None:
    with Region("16M", block_size="64K", backend=Memfd(strategy="populate_write")) as region:
        region.plug(0, 2)
        inject.step(Step.PUNCH, errno=errno.EIO)
        with pytest.raises(DiscardError):
            region.discard(0, 8192)
        assert plugged(region) == {0, 1}
        assert region.audit().ok
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM)
        with pytest.raises(PopulateError) as caught:
            region.populate(0, 8192)
        assert not caught.value.rolled_back
        region.populate(0, 8192)


def test_a_populate_that_fails_in_a_later_chunk_is_rolled_back_whole(inject: Injector) -> None:
    with Region("1G", block_size="16M", backend=Memfd(thp=False, strategy="populate_write")) as region:
        inject.step(Step.POPULATE_WRITE, errno=errno.EFAULT, nth=12, after=1 << 20)
        with pytest.raises(PopulateError) as caught:
            region.plug(0, 2)
        assert caught.value.populated == 11 * (2 << 20)
        assert accounting.allocated_bytes(region.fileno()) == 0


def test_an_unplug_that_fails_inside_a_block_taints_that_block(inject: Injector) -> None:
    with Region("1G", block_size="64M", backend=Memfd()) as region:
        region.plug(0, 2)
        inject.step(Step.PUNCH, errno=errno.EIO, nth=6)  # the second chunk of the second block
        with pytest.raises(DiscardError) as caught:
            region.unplug(0, 2)
        assert caught.value.discarded == ((0, 1),)
        assert caught.value.tainted == ((1, 1),)
        assert region.scrub() == 1
        assert accounting.allocated_bytes(region.fileno()) == 0


@pytest.mark.parametrize("step", [Step.PUNCH, Step.POPULATE_WRITE])
def test_eintr_only_makes_it_look_at_signals(step: Step, inject: Injector) -> None:
    """hugetlb fallocate gives EINTR for any signal, with part of it done."""
    with Region("64M", block_size="2M", backend=Memfd()) as region:
        inject.step(step, errno=errno.EINTR, nth=2, after=4096, repeat=3)
        assert region.plug(0, 4) == 4
        inject.step(Step.PUNCH, errno=errno.EINTR, nth=1, after=4096, repeat=2)
        assert region.unplug(0, 4) == 4
        assert region.audit().ok


@pytest.mark.promise("secret-only-grows")
def test_a_secret_plug_that_fails_leaves_its_blocks_tainted_and_zeroed(
    inject: Injector, request: pytest.FixtureRequest
) -> None:
    made = make(_kind("memfd_secret"), request)
    with made.region(1 << 22) as region:
        region.plug(0)
        inject.step(Step.FUTEX, errno=errno.EFAULT, nth=2, after=4096)
        with pytest.raises(PopulateError) as caught:
            region.plug_runs([(1, 1), (3, 1)])
        assert not caught.value.rolled_back
        assert plugged(region) == {0}
        assert tainted(region) == {1, 3}
        with region.view() as whole:
            assert bytes(whole[BLOCK : 2 * BLOCK]) == bytes(BLOCK)
        for operation in (lambda: region.unplug(0), region.unplug_all, region.scrub, lambda: region.resize(0)):
            with pytest.raises(UnsupportedError):
                operation()
        with pytest.raises(UnsupportedError):
            region.discard(0, 4096)


RESERVING = {
    "anonymous": lambda folder: Anonymous(),
    "memfd": lambda folder: Memfd(),
    "file": lambda folder: File(folder / "made", delete=True),
    "adopted": lambda folder: File(fd=os.open(folder / "old", os.O_RDWR | os.O_CREAT, 0o600)),
}


def reserve_cases() -> list[object]:
    uses = {
        "anonymous": ["reserve"],
        "memfd": ["reserve", "memfd_create", "ftruncate", "add_seals"],
        "file": ["reserve", "open", "ftruncate"],
        "adopted": ["reserve", "duplicate", "ftruncate"],
    }
    return [
        pytest.param(name, call, code, id=f"{name}-{call}-{code}")
        for name, calls in uses.items()
        for call in calls
        for code in OF_CALL[call]
    ]


@pytest.mark.promise("make-or-leave-nothing")
@pytest.mark.parametrize(("name", "call", "code"), reserve_cases())
def test_a_reservation_that_fails_leaves_nothing_behind(
    name: str, call: str, code: str, tmp_path: Path, inject: Injector
) -> None:
    backend = RESERVING[name](tmp_path)
    before = accounting.open_descriptors(), sorted(os.listdir(tmp_path)), accounting.vma_count()
    # File first asks what page size its folder has; that is not what shall fail.
    writing = (lambda *args: bool(args[1] & os.O_CREAT)) if call == "open" else (lambda *_: True)
    inject.call(call, errno=number(code), when=writing)
    with pytest.raises((ReserveError, UnsupportedError)) as caught:
        Region("64M", backend=backend)
    assert getattr(caught.value, "errno", number(code)) == number(code)
    caught = None  # type: ignore[assignment]  # its traceback holds the half-made region
    assert (accounting.open_descriptors(), sorted(os.listdir(tmp_path))) == before[:2]
    assert abs(accounting.vma_count() - before[2]) <= 2
    inject.clear()
    Region("64M", backend=backend).close()
    if name == "adopted":
        os.close(backend.fd)


@pytest.mark.promise("make-or-leave-nothing")
@pytest.mark.parametrize(
    ("advice", "backend"),
    [
        (lib.MADV_WIPEONFORK, Anonymous()),
        (lib.MADV_DONTFORK, Memfd(shared=False)),
        (lib.MADV_DONTDUMP, Anonymous()),
        (lib.MADV_HUGEPAGE, Anonymous()),
        (lib.MADV_NOHUGEPAGE, Anonymous(thp=False)),
    ],
    ids=["WIPEONFORK", "DONTFORK", "DONTDUMP", "HUGEPAGE", "NOHUGEPAGE"],
)
@pytest.mark.parametrize("code", MADVISE)
def test_advice_that_matters_is_not_done_without(code: str, advice: int, backend: Backend, inject: Injector) -> None:
    """Without WIPEONFORK a child could read private memory, and pay for it: rather no region.

    What a kernel may not know at all (EINVAL) and nothing depends on is done without.
    """
    before = accounting.open_descriptors(), accounting.vma_count()
    inject.call("madvise", errno=number(code), when=lambda _a, _l, given: given == advice)
    if code == "EINVAL" and advice not in (lib.MADV_WIPEONFORK, lib.MADV_DONTFORK):
        with Region("64M", backend=backend) as region:
            assert region.plug(0) == 1
        return
    with pytest.raises(ReserveError) as caught:
        Region("64M", backend=backend)
    assert caught.value.errno == number(code)
    caught = None  # type: ignore[assignment]  # its traceback holds the half-made region
    assert accounting.open_descriptors() == before[0]
    assert abs(accounting.vma_count() - before[1]) <= 2


@pytest.mark.parametrize("code", ["EEXIST", "ENOMEM", "EPERM"])
def test_a_child_without_a_placeholder_goes_on(code: str, inject: Injector) -> None:
    """It has no view to use it with: the parent's region is all that is missing."""
    with Region("64M", backend=Memfd(shared=False)) as region:
        region.plug(0)
        inject.call("reserve_placeholder", errno=number(code))
        assert run_child(lambda: "on").result() == "on"


def test_a_secret_that_the_kernel_does_not_have_is_unsupported(inject: Injector) -> None:
    inject.call("memfd_secret", errno=errno.ENOSYS)
    with pytest.raises(UnsupportedError, match="memfd_secret"):
        Region("1M", block_size=4096, backend=Secret())


def test_an_error_of_a_plug_names_the_block_the_cause_and_the_errno(inject: Injector) -> None:
    with Region("64M", block_size="64K", backend=Anonymous(strategy="populate_write")) as region:
        inject.step(Step.POPULATE_WRITE, errno=number("EHWPOISON"), nth=1)
        with pytest.raises(PopulateError, match=r"block 5.*poisoned") as caught:
            region.plug(5)
        assert isinstance(caught.value, (SparseMemError, OSError))
        assert not isinstance(caught.value, BackendExhaustedError)


def test_every_strategy_can_be_chosen_by_name() -> None:
    for strategy in ("populate_write", "futex"):
        with Region("64M", backend=attrs.evolve(Memfd(), strategy=strategy)) as region:
            assert region.stats().strategy == strategy


@pytest.mark.promise("existing-data-is-safe")
@pytest.mark.parametrize("call", ["fstat", "filesystem", "open_flags", "lseek"])
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("code", ["EIO", "EBADF", "EOVERFLOW"])
def test_an_adoption_that_cannot_look_at_the_file_leaves_it_alone(
    call: str, nth: int, code: str, inject: Injector
) -> None:
    fd = os.memfd_create("adopted")
    try:
        before = accounting.open_descriptors()
        inject.call(call, errno=number(code), nth=nth)
        try:
            Region("16M", block_size="64K", backend=File(fd=fd)).close()
        except ReserveError as error:
            assert error.errno == number(code)
            assert os.fstat(fd).st_size == 0
            del error
        else:
            assert inject.made.count(call) < nth, "the fault was swallowed"
        assert accounting.open_descriptors() == before
    finally:
        os.close(fd)


@pytest.mark.parametrize("code", ["EIO", "EBADF", "ENOSYS"])
def test_headroom_does_without_a_statvfs_that_fails(code: str, tmp_path: Path, inject: Injector) -> None:
    need_disk(tmp_path)
    with Region("16M", block_size="64K", backend=File(tmp_path / "f")) as region:
        inject.call("statvfs", errno=number(code), repeat=5)
        assert region.headroom().available is None
        assert region.plug(0, 4) == 4


@pytest.mark.promise("audit-tells-the-truth")
@pytest.mark.parametrize("code", ["EIO", "EBADF", "ESPIPE"])
def test_an_audit_that_cannot_look_says_so_and_changes_nothing(code: str, inject: Injector) -> None:
    with Region("16M", block_size="64K", backend=Memfd()) as region:
        region.plug(0, 4)
        inject.call("lseek", errno=number(code))
        with pytest.raises(OSError, match=os.strerror(number(code))):
            region.audit()
        assert region.audit().ok
        assert plugged(region) == {0, 1, 2, 3}


@pytest.mark.parametrize("code", ["EIO", "EPERM", "EROFS", "EBUSY"])
def test_a_file_that_cannot_be_removed_is_said_and_the_rest_is_closed(
    code: str, tmp_path: Path, inject: Injector
) -> None:
    before = accounting.open_descriptors()
    region = Region("16M", block_size="64K", backend=File(tmp_path / "f", delete=True))
    inject.call("unlink", errno=number(code))
    with pytest.raises(OSError, match=os.strerror(number(code))):
        region.close()
    assert region.closed
    region.close()
    assert accounting.open_descriptors() == before
    assert (tmp_path / "f").exists()


@pytest.mark.parametrize("code", ["EIO", "EINTR", "ENOSPC"])
def test_an_error_of_close_is_said_and_the_region_is_closed_all_the_same(code: str, inject: Injector) -> None:
    region = Region("16M", block_size="64K", backend=Memfd())
    fd = region.fileno()
    inject.call("close", errno=number(code), when=lambda closing: closing == fd)
    with pytest.raises(OSError, match=os.strerror(number(code))):
        region.close()
    assert region.closed
    region.close()
    os.close(fd)  # the injected close did not
