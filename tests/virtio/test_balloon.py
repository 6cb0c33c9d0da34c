"""virtio-balloon, driven without a queue over real memory."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from sparsemem import DeadlineError, Memfd, Region, Simulated, UnsupportedError
from sparsemem.recipes import Step
from sparsemem.virtio import BalloonListener, FileRange, GuestError, GuestMemory, GuestStats, RegionRange, VirtioBalloon
from sparsemem.virtio.balloon import queue_names
from sparsemem.virtio.wire import HINT_DONE, HINT_STOP, BalloonConfig, BalloonFeature
from tests.support.injector import Injector
from tests.virtio.driving import BalloonDriver

PAGE = 4096
MIB = 1 << 20
ALL = sum(BalloonFeature)


@pytest.fixture
def region() -> Iterator[Region]:
    """A guest's memory of 16 MiB, all of it in use."""
    with Region("16M", block_size=MIB, backend=Memfd(strategy="populate_write")) as region:
        region.plug(0, 16)
        yield region


@pytest.fixture
def driver(region: Region) -> BalloonDriver:
    return BalloonDriver(VirtioBalloon(region))


class Heard(BalloonListener):
    def __init__(self) -> None:
        self.events: list[object] = []

    def on_reached(self, size: int) -> None:
        self.events.append(("reached", size))

    def on_stats(self, stats: GuestStats) -> None:
        self.events.append(("stats", stats))

    def on_hint(self, command: int, address: int, length: int) -> None:
        self.events.append(("hint", command, address, length))

    def on_hints_done(self, command: int) -> None:
        self.events.append(("done", command))

    def on_failed(self, error: Exception) -> None:
        self.events.append(("failed", type(error).__name__))


def listening(driver: BalloonDriver) -> Heard:
    heard = Heard()
    driver.device.add_listener(heard)
    return heard


# ---- inflate and deflate --------------------------------------------------------------------------------------------


def test_pages_in_the_balloon_are_given_back_in_whatever_order_they_come(driver: BalloonDriver, region: Region) -> None:
    region.view(0, 16)[:] = b"x" * 16 * MIB
    driver.inflate(9, 3, 8, 3, 10, 4095)
    assert driver.device.discarded_size == 5 * PAGE
    assert region.audit().resident_size == 16 * MIB - 5 * PAGE
    assert region.audit().ok
    memory = bytes(region.view(0, 16))
    for frame in range(4096):
        wanted = b"\0" if frame in (3, 8, 9, 10, 4095) else b"x"
        assert memory[frame * PAGE : (frame + 1) * PAGE] == wanted * PAGE


def test_a_deflated_page_is_only_used_again(driver: BalloonDriver, region: Region) -> None:
    driver.inflate(5)
    driver.deflate(5)
    region.view(0)[5 * PAGE : 5 * PAGE + 4] = b"mine"
    driver.inflate(6)
    assert bytes(region.view(0)[5 * PAGE : 5 * PAGE + 4]) == b"mine"


@pytest.mark.promise("guest-memory-is-the-limit")
def test_a_page_outside_of_the_guests_memory_is_refused_and_no_page_discarded(
    driver: BalloonDriver, region: Region
) -> None:
    for frames in ([0, 4096], [2**32 - 1], [1, 2, 5000]):
        with pytest.raises(GuestError, match="not in guest memory"):
            driver.inflate(*frames)
        with pytest.raises(GuestError, match="not in guest memory"):
            driver.deflate(*frames)
    assert region.audit().resident_size == 16 * MIB


def test_pages_of_several_ranges_in_one_request() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 2 * MIB)
    os.pwrite(fd, b"x" * 2 * MIB, 0)
    with GuestMemory([FileRange(0, MIB, fd, MIB), FileRange(1 << 32, MIB, fd)]) as memory:
        driver = BalloonDriver(VirtioBalloon(memory))
        driver.inflate((1 << 20) + 3, 255, 0, 1 << 20)
        assert os.fstat(fd).st_blocks * 512 == 2 * MIB - 4 * PAGE
        assert os.pread(fd, PAGE, 3 * PAGE) == bytes(PAGE)
        assert os.pread(fd, PAGE, MIB) == bytes(PAGE)
    os.close(fd)


def test_a_discard_that_fails_is_counted_and_told_and_the_guest_goes_on(inject: Injector) -> None:
    with Region("2M", block_size=MIB, backend=Memfd()) as region:
        region.plug(0, 2)
        driver = BalloonDriver(VirtioBalloon(region))
        heard = listening(driver)
        inject.step(Step.PUNCH, errno=errno.EIO)
        driver.inflate(0, 2)
        assert heard.events == [("failed", "DiscardError")]
        assert driver.device.failures == 1
        assert not list(region.tainted_runs())
        driver.inflate(0, 2)
        assert driver.device.discarded_size == 2 * PAGE


# ---- host pages larger than the guest's -----------------------------------------------------------------------------


@pytest.fixture
def large() -> Iterator[Region]:
    """Host pages of 64 KiB: 16 frames each."""
    with Region("4M", block_size=MIB, backend=Simulated(page_size="64K")) as region:
        region.plug(0, 4)
        yield region


def resident(region: Region) -> int:
    return region.audit().resident_size


def test_a_host_page_is_given_back_when_all_of_it_is_in_the_balloon(large: Region) -> None:
    driver = BalloonDriver(VirtioBalloon(large))
    driver.inflate(*range(15))
    assert resident(large) == 4 * MIB
    assert driver.device.partial_size == 15 * PAGE
    driver.inflate(15)
    assert resident(large) == 4 * MIB - 65536


def test_all_partly_ballooned_pages_are_remembered_and_not_only_one(large: Region) -> None:
    """Peers track one host page, and give up when the guest jumps."""
    driver = BalloonDriver(VirtioBalloon(large))
    for i in range(16):
        driver.inflate(*(page * 16 + i for page in (40, 3, 17, 63)))
    assert resident(large) == 4 * MIB - 4 * 65536


def test_a_page_that_is_taken_out_before_the_whole_is_in_is_forgotten(large: Region) -> None:
    driver = BalloonDriver(VirtioBalloon(large))
    driver.inflate(*range(15))
    driver.deflate(7)
    driver.inflate(15)
    assert resident(large) == 4 * MIB
    driver.inflate(7)
    assert resident(large) == 4 * MIB - 65536


def test_a_block_that_is_unplugged_drops_what_is_in_the_balloon(large: Region) -> None:
    driver = BalloonDriver(VirtioBalloon(large))
    driver.inflate(*range(15), 256)
    large.unplug(0)
    assert driver.device.partial_size == PAGE
    large.plug(0)
    driver.inflate(15)
    assert resident(large) == 4 * MIB
    driver.device.close()
    large.unplug(0)


def test_pages_in_unplugged_blocks_are_left_out(large: Region) -> None:
    driver = BalloonDriver(VirtioBalloon(large))
    large.unplug(1)
    driver.inflate(*range(256, 512), *range(16))
    assert resident(large) == 3 * MIB - 65536
    assert driver.device.discarded_size == 65536


def test_a_driver_that_does_not_wait_may_use_a_page_again_so_nothing_is_remembered(large: Region) -> None:
    """Without MUST_TELL_HOST the first half may be in use again before the second comes."""
    driver = BalloonDriver(VirtioBalloon(large), ALL & ~BalloonFeature.MUST_TELL_HOST)
    driver.inflate(*range(15))
    driver.inflate(15)
    assert resident(large) == 4 * MIB
    driver.inflate(*range(16))
    assert resident(large) == 4 * MIB - 65536


def test_a_driver_that_begins_anew_has_an_empty_balloon(large: Region) -> None:
    device = VirtioBalloon(large)
    BalloonDriver(device).inflate(*range(15))
    device.reset()
    BalloonDriver(device).inflate(15)
    assert resident(large) == 4 * MIB


def test_small_host_pages_can_be_collected_too() -> None:
    with Region("4M", block_size=MIB, backend=Simulated()) as region:
        region.plug(0, 4)
        driver = BalloonDriver(VirtioBalloon(region, granularity="64K"))
        driver.inflate(*range(15))
        assert resident(region) == 4 * MIB
        driver.inflate(15, 99)
        assert resident(region) == 4 * MIB - 65536
        for granularity in (1, 4097, "6K", 0):
            with pytest.raises(ValueError, match="granularity"):
                VirtioBalloon(region, granularity=granularity)


def test_huge_pages_of_the_host(huge_pool: Callable[[int], object]) -> None:
    huge_pool(2)
    with Region("4M", block_size="2M", backend=Memfd(hugetlb="2M")) as region:
        region.plug(0, 2)
        driver = BalloonDriver(VirtioBalloon(region))
        for first in range(0, 1024, 2):
            driver.inflate(first)
        assert os.fstat(region.fileno()).st_blocks * 512 == 4 * MIB
        driver.inflate(*range(1, 512, 2))
        assert os.fstat(region.fileno()).st_blocks * 512 == 2 * MIB


def test_a_table_that_changes_keeps_what_stays(large: Region) -> None:
    memory = GuestMemory([RegionRange(0, 4 * MIB, large)])
    driver = BalloonDriver(VirtioBalloon(memory))
    driver.inflate(*range(15))
    with Region("1M", block_size=MIB, backend=Simulated(page_size="64K")) as other:
        other.plug(0)
        memory.add(RegionRange(1 << 30, MIB, other))
        driver.inflate(*((1 << 18) + i for i in range(15)))
        driver.inflate(15)
        assert resident(large) == 4 * MIB - 65536
        memory.remove(1 << 30, MIB)
        driver.inflate(16)
        memory.add(RegionRange(1 << 30, MIB, other))
        driver.inflate((1 << 18) + 15)
        assert resident(other) == MIB
        driver.device.close()


# ---- size -----------------------------------------------------------------------------------------------------------


def test_the_target_is_what_the_driver_reads_and_is_told_of(driver: BalloonDriver) -> None:
    driver.device.target = "8M"
    assert driver.config == BalloonConfig(num_pages=2048)
    assert driver.notified == 1
    assert (driver.device.target, driver.device.num_pages) == (8 * MIB, 2048)
    for target, why in ((4097, "not a multiple of 4096"), (1 << 44, "below 16T"), ("1X", "not a size")):
        with pytest.raises(ValueError, match=why):
            driver.device.target = target
    assert driver.device.target == 8 * MIB


def test_a_target_that_is_reached_is_told_and_can_be_waited_for(driver: BalloonDriver) -> None:
    heard = listening(driver)
    driver.device.target = "8M"
    assert not driver.device.wait_reached(timeout=0)
    waiting = threading.Thread(target=driver.device.wait_reached)
    waiting.start()
    driver.device.write_config(4, struct.pack("<I", 2047))
    driver.device.write_config(4, struct.pack("<I", 2048))
    waiting.join(60)
    assert not waiting.is_alive()
    assert heard.events == [("reached", 8 * MIB)]
    assert driver.device.actual == 8 * MIB


def test_of_what_is_written_only_actual_and_the_poison_count(driver: BalloonDriver) -> None:
    """VMMs write the whole configuration back, with a target that may be old by then."""
    driver.device.target = "1M"
    driver.device.write_config(0, BalloonConfig(7, 5, 9, 0xAA).pack())
    assert driver.config == BalloonConfig(256, 5, 0, 0xAA)
    driver.device.write_config(5, b"\x01")
    assert driver.config.actual == 0x105
    for offset, data in ((-1, b"1"), (16, b"1"), (13, b"1234")):
        with pytest.raises(GuestError, match="not in a configuration of 16"):
            driver.device.write_config(offset, data)


# ---- queues and features --------------------------------------------------------------------------------------------


def test_queues_are_numbered_over_the_features_that_were_negotiated() -> None:
    assert queue_names(ALL) == ("inflate", "deflate", "stats", "free_page", "reporting")
    assert queue_names(BalloonFeature.DEFLATE_ON_OOM | BalloonFeature.REPORTING) == ("inflate", "deflate", "reporting")
    assert queue_names(0) == ("inflate", "deflate")
    assert queue_names(BalloonFeature.FREE_PAGE_HINT | BalloonFeature.REPORTING)[2:] == ("free_page", "reporting")


def test_a_report_comes_on_queue_2_without_statistics_and_hints(region: Region) -> None:
    device = VirtioBalloon(region)
    driver = BalloonDriver(device, BalloonFeature.DEFLATE_ON_OOM | BalloonFeature.REPORTING)
    assert device.queues(driver.features) == 3
    assert device.queues(device.features) == 5
    driver.report((0, 4 * MIB))
    assert region.audit().resident_size == 12 * MIB
    with pytest.raises(GuestError, match="no queue 3"):
        driver.device.handle(3, None)  # type: ignore[arg-type]


def test_features_are_offered_as_asked_and_nothing_else_is_accepted(region: Region) -> None:
    device = VirtioBalloon(region, stats=False, hinting=False, reporting=False, page_poison=False, deflate_on_oom=False)
    assert device.features == BalloonFeature.MUST_TELL_HOST
    with pytest.raises(GuestError, match="0x2 of virtio-balloon were not offered"):
        device.negotiate(BalloonFeature.STATS_VQ)
    assert VirtioBalloon(region).features == ALL


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_statistics_come_when_the_held_buffer_is_given_back(driver: BalloonDriver) -> None:
    heard = listening(driver)
    first, second = GuestStats(free=1, total=2), GuestStats(free=3, total=2)
    assert driver.send("stats", first.pack()) is None
    assert driver.device.stats == first
    asked = threading.Event()
    driver.device.answer_late = lambda queue, answer: (driver.late.append((queue, answer)), asked.set())  # type: ignore[func-returns-value]
    got: list[GuestStats] = []
    asking = threading.Thread(target=lambda: got.append(driver.device.request_stats(60)))
    asking.start()
    assert asked.wait(60)
    assert driver.late == [(2, b"")]
    driver.send("stats", second.pack())
    asking.join(60)
    assert got == [second]
    assert heard.events == [("stats", first), ("stats", second)]


def test_a_guest_that_does_not_answer_is_not_asked_twice(driver: BalloonDriver) -> None:
    driver.send("stats", b"")
    for _ in range(2):
        with pytest.raises(DeadlineError, match="no statistics"):
            driver.device.request_stats(timeout=0)
    assert driver.late == [(2, b"")]


def test_statistics_of_a_driver_that_has_none(region: Region) -> None:
    driver = BalloonDriver(VirtioBalloon(region), 0)
    with pytest.raises(UnsupportedError, match="STATS_VQ"):
        driver.device.request_stats()
    assert driver.device.stats is None


def test_a_buffer_that_was_held_is_gone_with_a_reset(driver: BalloonDriver) -> None:
    driver.send("stats", b"")
    driver.device.reset()
    driver.device.negotiate(driver.features)
    with pytest.raises(DeadlineError):
        driver.device.request_stats(timeout=0)
    assert driver.late == []


# ---- hints ----------------------------------------------------------------------------------------------------------


def test_hints_count_in_their_session_only_and_are_never_discards(driver: BalloonDriver, region: Region) -> None:
    heard = listening(driver)
    driver.hint((0, MIB))  # nobody has asked
    command = driver.device.start_hinting()
    assert command >= 2
    assert driver.config.free_page_hint_cmd_id == command
    driver.hint((0, MIB))  # not begun
    driver.command(command)
    driver.hint((0, MIB), (4 * MIB, MIB))
    driver.command(HINT_STOP)
    driver.hint((2 * MIB, MIB))  # over
    driver.device.finish_hinting()
    assert driver.config.free_page_hint_cmd_id == HINT_DONE
    assert heard.events == [("hint", command, 0, MIB), ("hint", command, 4 * MIB, MIB), ("done", command)]
    assert region.audit().resident_size == 16 * MIB


def test_hints_of_an_old_session_are_ignored(driver: BalloonDriver) -> None:
    heard = listening(driver)
    old = driver.device.start_hinting()
    driver.command(old)
    new = driver.device.start_hinting()
    assert new != old
    driver.hint((0, MIB))
    driver.command(new)
    driver.hint((MIB, MIB))
    driver.device.stop_hinting()
    driver.hint((2 * MIB, MIB))
    assert heard.events == [("hint", new, MIB, MIB)]


def test_an_id_is_not_used_again_before_its_stop_has_come(driver: BalloonDriver) -> None:
    first = driver.device.start_hinting()
    driver.device._last_command = 2**32 - 1  # after so many sessions, none of which the guest has ended
    with pytest.raises(UnsupportedError, match="has ended none"):
        driver.device.start_hinting()
    driver.device._last_command = first
    driver.command(first)
    driver.command(HINT_STOP)
    driver.device._last_command = 2**32 - 1
    assert driver.device.start_hinting() == first == 2


@pytest.mark.promise("guest-memory-is-the-limit")
def test_a_hint_outside_of_the_guests_memory_is_refused(driver: BalloonDriver) -> None:
    driver.command(driver.device.start_hinting())
    with pytest.raises(GuestError, match="not in guest memory"):
        driver.hint((16 * MIB, PAGE))
    with pytest.raises(GuestError, match="4 bytes"):
        driver.send("free_page", b"123")


def test_hints_of_a_driver_that_gives_none(region: Region) -> None:
    with pytest.raises(UnsupportedError, match="FREE_PAGE_HINT"):
        BalloonDriver(VirtioBalloon(region), 0).device.start_hinting()


# ---- reporting ------------------------------------------------------------------------------------------------------


def test_reported_pages_are_given_back(driver: BalloonDriver, region: Region) -> None:
    region.view(0, 16)[:] = b"x" * 16 * MIB
    driver.report((0, 4 * MIB), (8 * MIB + 1, 2 * PAGE))
    assert region.audit().resident_size == 12 * MIB - PAGE
    assert bytes(region.view(8)[: PAGE * 3]) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE


@pytest.mark.promise("guest-memory-is-the-limit")
def test_a_report_that_is_partly_outside_discards_nothing(driver: BalloonDriver, region: Region) -> None:
    for bad in ((16 * MIB, PAGE), (0, 17 * MIB), (2**64 - PAGE, PAGE), (0, 0)):
        with pytest.raises(GuestError):
            driver.report((0, 4 * MIB), bad)
    assert region.audit().resident_size == 16 * MIB


def test_free_pages_with_a_pattern_in_them_are_kept(driver: BalloonDriver, region: Region) -> None:
    driver.device.write_config(12, struct.pack("<I", 0xAAAAAAAA))
    driver.report((0, 4 * MIB))
    assert region.audit().resident_size == 16 * MIB
    driver.inflate(1)  # allocated pages: no matter
    assert region.audit().resident_size == 16 * MIB - PAGE
    driver.device.write_config(12, bytes(4))
    driver.report((0, 4 * MIB))
    assert region.audit().resident_size == 12 * MIB


def test_the_pattern_counts_only_if_the_driver_has_the_feature(region: Region) -> None:
    driver = BalloonDriver(VirtioBalloon(region), BalloonFeature.REPORTING)
    driver.device.write_config(12, struct.pack("<I", 0xAAAAAAAA))
    driver.report((0, 4 * MIB))
    assert region.audit().resident_size == 12 * MIB


def test_the_pattern_outlives_a_reset(driver: BalloonDriver, region: Region) -> None:
    """A VMM may reset the device after the driver has written it: losing it would lose data, keeping it only memory."""
    driver.device.write_config(12, struct.pack("<I", 1))
    driver.device.reset()
    BalloonDriver(driver.device).report((0, 4 * MIB))
    assert region.audit().resident_size == 16 * MIB


def test_a_report_of_unplugged_blocks_is_left_out(driver: BalloonDriver, region: Region) -> None:
    region.unplug(1, 2)
    driver.report((0, 4 * MIB))
    assert driver.device.discarded_size == 2 * MIB
    assert region.audit().ok


# ---- with virtio-mem, and saved -------------------------------------------------------------------------------------


def test_balloon_and_unplug_at_the_same_time_never_collide() -> None:
    """Both take the claims of the same blocks."""
    with Region("16M", block_size=MIB, backend=Memfd()) as region:
        driver = BalloonDriver(VirtioBalloon(region))
        stop = threading.Event()
        failed: list[BaseException] = []

        def churn() -> None:
            try:
                while not stop.is_set():
                    region.plug(0, 16)
                    region.unplug(4, 8)
                    region.unplug_all()
            except BaseException as error:
                failed.append(error)

        churning = threading.Thread(target=churn)
        churning.start()
        for i in range(300):
            driver.inflate(*range(i % 7, 4096, 97))
        stop.set()
        churning.join(60)
        assert not failed
        assert region.audit().ok
        assert not list(region.tainted_runs())


@pytest.mark.promise("restarted-backend-answers-the-same")
def test_a_saved_state_is_taken_over(driver: BalloonDriver, region: Region) -> None:
    driver.device.target = "8M"
    driver.device.write_config(0, BalloonConfig(0, 100, 0, 7).pack())
    command = driver.device.start_hinting()
    again = BalloonDriver(VirtioBalloon(region))
    again.device.load(json.loads(json.dumps(driver.device.save())))
    assert again.config == BalloonConfig(2048, 100, HINT_STOP, 7)
    assert again.device.start_hinting() == command + 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "virtio-mem"),
        ("target", 1),
        ("target", -4096),
        ("actual", "8M"),
        ("actual", None),
        ("poison", 2**32),
        ("poison", True),
        ("last_command", 2**32),
    ],
)
def test_a_state_that_does_not_fit_is_refused(driver: BalloonDriver, name: str, value: object) -> None:
    before = driver.config
    with pytest.raises(ValueError, match=name):
        driver.device.load({**driver.device.save(), name: value})
    assert driver.config == before
