"""What a virtio-mem device must do: VIRTIO 1.2 section 5.15, requirement by requirement."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from sparsemem import Anonymous, Memfd, Region, Simulated
from sparsemem.backends import Backend, Fault
from sparsemem.recipes import Step
from sparsemem.virtio import Element, GuestError, VirtioMem
from sparsemem.virtio.wire import MemAnswer, MemConfig, MemFeature, MemOperation, MemRequest, MemResponse, MemState
from tests.support.injector import Injector
from tests.virtio.driving import ROOM, MemDriver

BLOCK = 1 << 20
NBLOCKS = 1024
ADDRESS = 0x1_4000_0000

ACK, NACK, BUSY, ERROR = MemAnswer.ACK, MemAnswer.NACK, MemAnswer.BUSY, MemAnswer.ERROR


@pytest.fixture
def region() -> Iterator[Region]:
    with Region(NBLOCKS * BLOCK, block_size=BLOCK, backend=Memfd()) as region:
        yield region


@pytest.fixture
def driver(region: Region) -> MemDriver:
    return MemDriver(VirtioMem(region, address=ADDRESS, requested_size=16 * BLOCK, node_id=3))


def test_rule_01_requested_and_usable_size_may_change(driver: MemDriver) -> None:
    driver.device.requested_size = "512M"
    assert driver.config.requested_size == 512 * BLOCK
    assert driver.config.usable_region_size == (512 + 256) * BLOCK


def test_rule_02_block_size_node_address_and_region_size_never_change(driver: MemDriver) -> None:
    def fixed(config: MemConfig) -> tuple[int, ...]:
        return config.block_size, config.node_id, config.address, config.region_size

    before = fixed(driver.config)
    assert before == (BLOCK, 3, ADDRESS, NBLOCKS * BLOCK)
    driver.plug(0, 4)
    driver.device.requested_size = "1G"
    driver.device.write_config(0, b"\xff" * 56)
    driver.unplug_all()
    driver.device.reset()
    assert fixed(driver.config) == before


def test_rule_03_plugged_size_is_what_is_plugged_before_the_answer_is_seen(driver: MemDriver, region: Region) -> None:
    for ask, plugged in (
        (lambda: driver.plug(0, 4), 4),
        (lambda: driver.plug(8), 5),
        (lambda: driver.plug(0), 5),
        (lambda: driver.unplug(1, 2), 3),
        (lambda: driver.unplug_all(), 0),
        (lambda: driver.plug(0, 7), 7),
    ):
        ask()
        assert driver.config.plugged_size == plugged * BLOCK == region.plugged_size


@pytest.mark.parametrize("usable", ["window", "all", lambda requested, region: requested], ids=str)
def test_rule_04_usable_is_never_less_than_requested(region: Region, usable: str) -> None:
    driver = MemDriver(VirtioMem(region, address=ADDRESS, usable=usable))
    for requested in (0, 1, 300, NBLOCKS, 5):
        driver.device.requested_size = requested * BLOCK
        assert driver.config.usable_region_size >= driver.config.requested_size == requested * BLOCK


def test_rule_04_a_policy_that_gives_less_is_refused_and_nothing_changes(region: Region) -> None:
    device = VirtioMem(region, address=ADDRESS, usable=lambda requested, region: 10 * BLOCK)
    device.requested_size = 10 * BLOCK
    with pytest.raises(ValueError, match="usable 10485760 is not between requested_size 11534336"):
        device.requested_size = 11 * BLOCK
    assert device.requested_size == 10 * BLOCK


def test_rule_05_the_block_size_is_a_power_of_two(driver: MemDriver) -> None:
    assert driver.config.block_size & (driver.config.block_size - 1) == 0
    with pytest.raises(ValueError, match="not a power of two"):
        Region("3M", block_size="3M", backend=Memfd())


def test_rule_06_every_size_is_a_multiple_of_the_block_size(region: Region) -> None:
    with pytest.raises(ValueError, match="not a multiple of 1M"):
        VirtioMem(region, address=ADDRESS + 4096)
    with pytest.raises(ValueError, match="requested_size 4096 is not a multiple"):
        VirtioMem(region, address=ADDRESS, requested_size=4096)
    driver = MemDriver(VirtioMem(region, address=ADDRESS, usable=lambda requested, region: min(region, requested + 1)))
    with pytest.raises(ValueError, match="is not a multiple of the block size"):
        driver.device.requested_size = BLOCK + 1
    driver.device.requested_size = 3 * BLOCK
    driver.plug(0, 2)
    config = driver.config
    assert config.usable_region_size == 4 * BLOCK
    for size in (config.address, config.region_size, config.plugged_size, config.requested_size):
        assert size % BLOCK == 0


def test_rule_07_usable_shrinks_only_when_all_is_unplugged(driver: MemDriver) -> None:
    driver.device.requested_size = 600 * BLOCK
    largest = driver.config.usable_region_size
    driver.device.requested_size = 0
    assert driver.config.usable_region_size == largest
    driver.device.reset()
    assert driver.config.usable_region_size == largest
    assert driver.unplug_all() is ACK
    assert driver.config.usable_region_size == 0


def test_rule_07_and_on_a_system_reset(driver: MemDriver) -> None:
    driver.device.requested_size = 600 * BLOCK
    driver.device.requested_size = BLOCK
    driver.device.reset(system=True)
    assert driver.config.usable_region_size == 257 * BLOCK


def test_rule_08_changes_of_requested_and_usable_are_told_but_for_those_of_unplug_all(driver: MemDriver) -> None:
    driver.device.requested_size = 600 * BLOCK
    assert driver.notified == 1
    driver.device.requested_size = 8 * BLOCK
    assert driver.notified == 2
    driver.plug(0, 4)
    driver.unplug(0)
    driver.unplug_all()  # usable shrinks
    assert driver.config.usable_region_size == (8 + 256) * BLOCK
    assert driver.notified == 2


def test_rule_09_a_driver_that_would_read_unplugged_memory_may_be_refused(region: Region) -> None:
    device = VirtioMem(region, address=ADDRESS, unplugged_inaccessible="require")
    with pytest.raises(GuestError, match="does not accept UNPLUGGED_INACCESSIBLE"):
        device.negotiate(0)
    device.negotiate(MemFeature.UNPLUGGED_INACCESSIBLE)
    assert device.negotiated is MemFeature.UNPLUGGED_INACCESSIBLE
    VirtioMem(region, address=ADDRESS).negotiate(0)
    assert not VirtioMem(region, address=ADDRESS, unplugged_inaccessible="off").features


def test_rule_10_a_device_reset_keeps_blocks_and_content_a_system_reset_unplugs_all(
    driver: MemDriver, region: Region
) -> None:
    driver.plug(0, 4)
    region.view(2)[:4] = b"mine"
    driver.device.reset()
    assert driver.config.plugged_size == 4 * BLOCK
    assert bytes(region.view(2)[:4]) == b"mine"
    driver.device.reset(system=True)
    assert driver.config.plugged_size == 0
    assert driver.config.requested_size == 16 * BLOCK


def test_rule_10_a_system_reset_that_cannot_unplug_keeps_what_is_plugged(driver: MemDriver, region: Region) -> None:
    driver.plug(0, 4)
    with region.view(1):
        driver.device.reset(system=True)
    assert driver.config.plugged_size == 4 * BLOCK == region.plugged_size
    assert driver.config.usable_region_size == (16 + 256) * BLOCK


def test_rule_11_plugged_memory_is_never_touched(driver: MemDriver, region: Region) -> None:
    driver.plug(0, 4)
    for block in range(4):
        region.view(block)[:] = bytes([block + 1]) * BLOCK
    driver.plug(4, 2)
    driver.plug(2, 4)
    driver.unplug(4, 2)
    driver.unplug(3, 2)
    driver.state(0, 16)
    driver.device.requested_size = 0
    driver.plug(9)
    driver.unplug(0)
    for block in range(1, 4):
        assert bytes(region.view(block)) == bytes([block + 1]) * BLOCK


def test_rule_12_unplugged_blocks_can_be_read_where_that_was_not_forbidden(region: Region) -> None:
    driver = MemDriver(VirtioMem(region, address=ADDRESS, requested_size="1G", unplugged_inaccessible="off"))
    driver.plug(0)
    memory = region.view()
    assert bytes(memory[driver.config.usable_region_size - 8 :]) == bytes(8)
    del memory


def test_rule_13_padding_and_whatever_follows_is_ignored(driver: MemDriver, region: Region) -> None:
    noisy = bytearray(MemRequest(MemOperation.PLUG, ADDRESS, 2).pack())
    noisy[2:8] = noisy[18:24] = b"\xff" * 6
    answer = driver.device.handle(0, Element(bytes(noisy) + b"more", ROOM))
    assert MemResponse.unpack(answer).answer is ACK
    noisy[:2] = bytes([MemOperation.UNPLUG_ALL, 0])
    noisy[8:18] = b"\xff" * 10
    assert MemResponse.unpack(driver.device.handle(0, Element(bytes(noisy), ROOM))).answer is ACK
    assert region.plugged_size == 0


@pytest.mark.promise("device-answers-are-true")
@pytest.mark.parametrize("operation", [MemOperation.PLUG, MemOperation.UNPLUG, MemOperation.STATE])
@pytest.mark.parametrize(
    ("address", "count"),
    [
        (ADDRESS + 1, 1),
        (ADDRESS + BLOCK // 2, 1),
        (ADDRESS, 0),
        (ADDRESS - BLOCK, 1),
        (ADDRESS - BLOCK, 2),
        (0, 1),
        (ADDRESS + (16 + 256) * BLOCK, 1),
        (ADDRESS + (16 + 255) * BLOCK, 2),
        (ADDRESS, 0xFFFF),
        (2**64 - BLOCK, 2),
        (2**64 - 1, 1),
    ],
)
def test_rule_14_blocks_that_cannot_be_meant_are_an_error(
    driver: MemDriver, region: Region, operation: MemOperation, address: int, count: int
) -> None:
    assert driver.ask(operation, address, count).answer is ERROR
    assert region.plugged_size == 0


def test_rule_14_comes_before_more_than_requested_which_comes_before_the_state(driver: MemDriver) -> None:
    driver.plug(0, 16)
    assert driver.plug(16 + 255, 2) is ERROR  # outside, and too much
    assert driver.plug(0, 1) is NACK  # too much, and plugged
    driver.unplug(15)
    assert driver.plug(0, 1) is ERROR  # plugged


@pytest.mark.promise("device-answers-are-true")
def test_rule_15_plugging_what_is_plugged_and_unplugging_what_is_not_is_an_error(
    driver: MemDriver, region: Region
) -> None:
    driver.plug(2, 2)
    assert driver.plug(0, 3) is ERROR
    assert driver.plug(3, 3) is ERROR
    assert driver.unplug(3, 2) is ERROR
    assert driver.unplug(8) is ERROR
    assert list(region.plugged_runs()) == [(2, 2)]


@pytest.mark.promise("device-answers-are-true")
def test_rule_16_busy_means_that_nothing_has_changed_when_the_host_has_no_memory() -> None:
    with Region("64M", block_size=BLOCK, backend=Simulated(capacity="6M")) as region:
        driver = MemDriver(VirtioMem(region, address=ADDRESS, requested_size="64M"))
        assert driver.plug(0, 4) is ACK
        assert driver.plug(4, 4) is BUSY
        assert driver.config.plugged_size == 4 * BLOCK
        assert region.audit().resident_size == 4 * BLOCK
        assert region.audit().ok
        assert driver.plug(4, 2) is ACK


@pytest.mark.promise("device-answers-are-true")
@pytest.mark.parametrize("what", ["unplug", "unplug_all"])
@pytest.mark.parametrize(
    ("backend", "step", "nth"),
    [(Memfd(), Step.PUNCH, 1), (Anonymous(), Step.DONTNEED, 1), (Anonymous(), Step.DONTNEED, 2)],
)
def test_rule_16_an_unplug_that_fails_half_way_gives_the_guest_its_blocks_back(
    inject: Injector, backend: Backend, step: Step, nth: int, what: str
) -> None:
    with Region("64M", block_size=BLOCK, backend=backend) as region:
        driver = MemDriver(VirtioMem(region, address=ADDRESS, requested_size="64M"))
        driver.plug(0, 8)
        driver.plug(16, 8)
        if what == "unplug":
            nth = 1  # it is one call
        inject.step(step, errno=errno.EIO, nth=nth, after=3 * BLOCK + 4096)
        assert (driver.unplug(0, 8) if what == "unplug" else driver.unplug_all()) is BUSY
        assert list(region.plugged_runs()) == [(0, 8), (16, 8)]
        assert not list(region.tainted_runs())
        assert driver.config.plugged_size == 16 * BLOCK
        assert region.audit().ok
        assert driver.unplug_all() is ACK


@pytest.mark.promise("device-answers-are-true")
def test_rule_16_a_view_of_the_host_or_a_veto_is_busy(driver: MemDriver, region: Region) -> None:
    driver.plug(0, 4)
    with region.view(3):
        assert driver.unplug(0, 4) is BUSY
        assert driver.unplug_all() is BUSY
    assert driver.config.plugged_size == 4 * BLOCK

    class Veto:
        def on_plug(self, first: int, count: int) -> None:
            if first == 8:
                raise RuntimeError("not these")

        def on_unplug(self, first: int, count: int) -> None:
            pass

    region.add_listener(Veto())
    assert driver.plug(8, 4) is BUSY
    assert driver.config.plugged_size == 4 * BLOCK
    assert driver.unplug_all() is ACK


@pytest.mark.promise("device-answers-are-true")
def test_rule_17_acknowledged_means_that_all_was_done(driver: MemDriver, region: Region) -> None:
    assert driver.plug(0, 4) is ACK
    assert region.audit().resident_size == 4 * BLOCK  # populated, too
    assert driver.unplug(0, 4) is ACK
    assert region.audit().resident_size == 0


def test_rule_18_after_unplug_all_nothing_is_plugged_and_usable_may_have_shrunk(
    driver: MemDriver, region: Region
) -> None:
    driver.plug(0, 4)
    driver.plug(9, 2)
    driver.device.requested_size = 0
    assert driver.unplug_all() is ACK
    assert driver.config.plugged_size == 0 == driver.config.usable_region_size
    assert driver.unplug_all() is ACK
    assert region.audit().ok


def test_rule_19_a_state_is_plugged_unplugged_or_mixed(driver: MemDriver) -> None:
    driver.plug(4, 4)
    assert driver.state(4, 4) is MemState.PLUGGED
    assert driver.state(0, 4) is MemState.UNPLUGGED
    assert driver.state(0, 8) is MemState.MIXED
    assert driver.state(7, 2) is MemState.MIXED
    assert driver.state(16 + 255) is MemState.UNPLUGGED


def test_a_fault_of_the_backend_comes_last(driver: MemDriver) -> None:
    """ERROR (range), NACK (beyond requested), ERROR (state), BUSY (backend failed): the order that QEMU has."""
    with Region("64M", block_size=BLOCK, backend=Simulated(faults=[Fault("populate", repeat=99)])) as region:
        driver = MemDriver(VirtioMem(region, address=ADDRESS, requested_size=2 * BLOCK))
        assert driver.plug(64, 3) is ERROR
        assert driver.plug(0, 3) is NACK
        assert driver.plug(0, 2) is BUSY
        region.plug(0, 1, populate=False)
        assert driver.plug(0, 1) is ERROR
