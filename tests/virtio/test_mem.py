"""virtio-mem beyond the numbered rules: resizing, events, what peers get wrong, migration."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator

import pytest

from sparsemem import BackendExhaustedError, File, Memfd, Region, Secret, Simulated, UnsupportedError
from sparsemem._sys import probe
from sparsemem._sys.calls import kernel
from sparsemem.backends import Fault
from sparsemem.recipes import Step
from sparsemem.virtio import Element, GuestError, MemListener, VirtioMem
from sparsemem.virtio.wire import MemAnswer, MemFeature, MemOperation, MemRequest, MemResponse
from tests.support.injector import Injector
from tests.virtio.driving import ROOM, MemDriver

BLOCK = 1 << 20
ADDRESS = 0x1_0000_0000
ACK, NACK, BUSY, ERROR = MemAnswer.ACK, MemAnswer.NACK, MemAnswer.BUSY, MemAnswer.ERROR


@pytest.fixture
def region() -> Iterator[Region]:
    with Region("64M", block_size=BLOCK, backend=Memfd()) as region:
        yield region


def driver_of(region: Region, requested: int = 64, **options: object) -> MemDriver:
    return MemDriver(VirtioMem(region, address=ADDRESS, requested_size=requested * BLOCK, **options))  # type: ignore[arg-type]


class Heard(MemListener):
    def __init__(self) -> None:
        self.events: list[object] = []

    def on_reached(self, size: int) -> None:
        self.events.append(("reached", size // BLOCK))

    def on_refused(self, size: int, error: Exception) -> None:
        self.events.append(("refused", size // BLOCK, type(error)))

    def on_answer(self, request: MemRequest, response: MemResponse) -> None:
        self.events.append((request.operation.name, response.answer.name))


# ---- the host's side ------------------------------------------------------------------------------------------------


def test_a_size_that_is_reached_is_told_and_can_be_waited_for(region: Region) -> None:
    driver, heard = driver_of(region, 0), Heard()
    driver.device.add_listener(heard)
    driver.device.requested_size = "4M"
    assert not driver.device.wait_reached(timeout=0)
    waiting = threading.Thread(target=driver.device.wait_reached)
    waiting.start()
    driver.plug(0, 3)
    driver.plug(3)
    waiting.join(60)
    assert not waiting.is_alive()
    assert heard.events == [("PLUG", "ACK"), ("PLUG", "ACK"), ("reached", 4)]
    driver.device.requested_size = "2M"
    driver.unplug(2, 2)
    assert heard.events[-1] == ("reached", 2)
    driver.device.remove_listener(heard)
    driver.device.requested_size = "2M"
    assert heard.events[-1] == ("reached", 2)


def test_a_refusal_is_told_with_its_reason() -> None:
    with Region("64M", block_size=BLOCK, backend=Simulated(capacity="2M")) as region:
        driver, heard = driver_of(region), Heard()
        driver.device.add_listener(heard)
        assert driver.plug(0, 3) is BUSY
        assert heard.events == [("refused", 64, BackendExhaustedError), ("PLUG", "BUSY")]
        assert driver.device.answers == {(MemOperation.PLUG, BUSY): 1}


def test_what_a_listener_raises_changes_nothing(region: Region, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(MemListener):
        def on_answer(self, request: MemRequest, response: MemResponse) -> None:
            raise RuntimeError("listener")

    driver = driver_of(region)
    driver.device.add_listener(Bad())
    assert driver.plug(0) is ACK
    assert "failed in on_answer" in caplog.text


def test_a_size_that_does_not_fit_is_refused_and_nothing_changes(region: Region) -> None:
    driver = driver_of(region, 4)
    for size, why in ((BLOCK + 1, "not a multiple"), ("65M", "more than the region's size"), ("1X", "is not a size")):
        with pytest.raises(ValueError, match=why):
            driver.device.requested_size = size
    assert driver.config.requested_size == 4 * BLOCK
    assert driver.notified == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"address": -BLOCK}, "address"),
        ({"address": 2**64 - BLOCK}, "below 2\\*\\*64"),
        ({"address": 0, "node_id": 1 << 16}, "node_id 65536"),
        ({"address": 0, "usable": "some"}, "usable 'some' is none of 'window', 'all'"),
        ({"address": 0, "unplugged_inaccessible": "yes"}, "unplugged_inaccessible 'yes'"),
    ],
)
def test_options_that_do_not_fit_are_refused(region: Region, options: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        VirtioMem(region, **options)  # type: ignore[arg-type]


def test_memory_that_cannot_be_given_back_makes_no_device() -> None:
    if not probe.makes_secrets(kernel):
        pytest.skip("needs memfd_secret")
    with Region("2M", block_size=BLOCK, backend=Secret()) as region, pytest.raises(UnsupportedError, match="secret"):
        VirtioMem(region, address=0)


def test_the_node_is_offered_only_where_there_is_one(region: Region) -> None:
    assert driver_of(region, node_id=2).device.features & MemFeature.ACPI_PXM
    assert driver_of(region, node_id=2).config.node_id == 2
    assert not driver_of(region).device.features & MemFeature.ACPI_PXM


def test_without_prealloc_a_plug_needs_no_memory_and_the_audit_knows() -> None:
    with Region("64M", block_size=BLOCK, backend=Memfd()) as region:
        driver = driver_of(region, prealloc=False)
        assert driver.plug(0, 64) is ACK
        audit = region.audit()
        assert (audit.resident_size, audit.plugged_size, audit.ok) == (0, 64 * BLOCK, True)
        region.view(3)[:5] = b"hello"
        assert region.audit().resident_size == BLOCK or region.audit().resident_size == 4096
        assert driver.unplug(0, 64) is ACK
        assert region.audit().resident_size == 0


def test_without_prealloc_stray_writes_do_not_survive_a_plug(region: Region) -> None:
    driver = driver_of(region, prealloc=False)
    region.view()[:5] = b"stray"
    assert driver.plug(0) is ACK
    assert bytes(region.view(0)[:5]) == bytes(5)


# ---- what peers get wrong -------------------------------------------------------------------------------------------


@pytest.mark.promise("device-answers-are-true")
def test_a_plug_that_fails_leaves_bitmap_and_plugged_size_agreeing(inject: Injector) -> None:
    """One VMM sets its bitmap before the step that can fail."""
    with Region("64M", block_size=BLOCK, backend=Memfd(strategy="populate_write")) as region:
        driver = driver_of(region)
        driver.plug(0, 2)
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, nth=2, after=8192)
        assert driver.plug(2, 4) is BUSY
        assert list(region.plugged_runs()) == [(0, 2)]
        assert driver.config.plugged_size == 2 * BLOCK
        assert region.audit().ok


@pytest.mark.promise("device-answers-are-true")
def test_a_discard_that_fails_is_not_acknowledged(inject: Injector) -> None:
    """One VMM logs it and answers ACK."""
    with Region("64M", block_size=BLOCK, backend=Memfd()) as region:
        driver = driver_of(region)
        driver.plug(0, 2)
        inject.step(Step.PUNCH, errno=errno.EIO, repeat=99)
        assert driver.unplug(0) is BUSY
        assert driver.config.plugged_size == 2 * BLOCK
        inject.clear()
        assert driver.unplug(0) is ACK  # what was tainted is mended by that
        assert not list(region.tainted_runs())


def test_an_unplug_really_gives_the_memory_of_a_shared_memfd_back(region: Region) -> None:
    """One VMM's discard of a shared memfd was a no-op."""
    driver = driver_of(region)
    driver.plug(0, 8)
    assert kernel.fstat(region.fileno()).st_blocks * 512 >= 8 * BLOCK
    driver.unplug(0, 8)
    assert kernel.fstat(region.fileno()).st_blocks == 0


def test_a_plug_populates(region: Region) -> None:
    """Most do not: the guest finds out by SIGBUS."""
    driver_of(region).plug(0, 8)
    assert kernel.fstat(region.fileno()).st_blocks * 512 == 8 * BLOCK


def test_a_range_whose_rollback_failed_is_marked_and_mended_by_the_next_plug(inject: Injector) -> None:
    """Nobody marks it."""
    with Region("64M", block_size=BLOCK, backend=Memfd(strategy="populate_write")) as region:
        driver = driver_of(region)
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, nth=1, after=8192)
        inject.step(Step.PUNCH, errno=errno.EIO, nth=1, repeat=1)
        assert driver.plug(0, 4) is BUSY
        assert list(region.tainted_runs())
        assert driver.config.plugged_size == 0
        inject.clear()
        assert driver.plug(0, 4) is ACK
        assert not list(region.tainted_runs())
        assert bytes(region.view(0, 4)) == bytes(4 * BLOCK)


def test_what_cannot_be_unplugged_is_never_discarded_later_behind_the_guests_back(inject: Injector) -> None:
    """The guest was told BUSY, and uses the block again: mending it must not empty it."""
    with Region("64M", block_size=BLOCK, backend=Memfd()) as region:
        driver = driver_of(region)
        driver.plug(0, 4)
        inject.step(Step.PUNCH, errno=errno.EIO, repeat=2)  # the unplug, and the second try
        assert driver.unplug(1) is BUSY
        assert list(region.tainted_runs()) == [(1, 1)]
        region.view()[BLOCK : BLOCK + 4] = b"mine"
        driver.plug(8, 2)
        driver.unplug(2)
        assert bytes(region.view()[BLOCK : BLOCK + 4]) == b"mine"
        assert region.state(1).value == "plugged"
        assert driver.unplug(1) is ACK


def test_blocks_that_cannot_be_given_back_to_the_guest_are_no_busy() -> None:
    """BUSY would say that nothing has changed; that would be a lie."""
    faults = [Fault("discard", nth=2, repeat=999), Fault("populate", nth=3, repeat=999)]
    with Region("64M", block_size="2M", backend=Simulated(faults=faults)) as region:
        driver = MemDriver(VirtioMem(region, address=ADDRESS, requested_size="64M"))
        heard = Heard()
        driver.device.add_listener(heard)
        driver.plug(0, 1)
        driver.plug(8, 1)
        assert driver.unplug_all() is ERROR
        assert heard.events[-2][0] == "refused"  # type: ignore[index]
        assert driver.config.plugged_size == region.plugged_size


# ---- what no driver may send ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queue", "element", "why"),
    [
        (0, Element(b"", ROOM), "has 24 bytes; this one has 0"),
        (0, Element(bytes(23), ROOM), "has 24 bytes; this one has 23"),
        (0, Element(b"\x04" + bytes(23), ROOM), "type 4 is none of 0 PLUG"),
        (0, Element(b"\x00\x01" + bytes(22), ROOM), "type 256"),
        (0, Element(MemRequest(MemOperation.PLUG, ADDRESS, 1).pack()), "room for 0"),
        (0, Element(MemRequest(MemOperation.PLUG, ADDRESS, 1).pack(), ((0, 4), (8, 5))), "room for 9"),
        (1, Element(MemRequest(MemOperation.PLUG, ADDRESS, 1).pack(), ROOM), "no queue 1"),
        (-1, Element(MemRequest(MemOperation.PLUG, ADDRESS, 1).pack(), ROOM), "no queue -1"),
    ],
)
def test_a_malformed_request_is_refused_before_anything_is_done(
    region: Region, queue: int, element: Element, why: str
) -> None:
    driver = driver_of(region)
    with pytest.raises(GuestError, match=why):
        driver.device.handle(queue, element)
    assert region.plugged_size == 0


def test_the_room_may_be_in_pieces(region: Region) -> None:
    request = MemRequest(MemOperation.PLUG, ADDRESS, 1).pack()
    assert driver_of(region).device.handle(0, Element(request, ((0, 4), (64, 6)))) == MemResponse(ACK).pack()


def test_features_that_were_not_offered_are_refused(region: Region) -> None:
    with pytest.raises(GuestError, match="0x4 of virtio-mem were not offered"):
        driver_of(region).device.negotiate(MemFeature.PERSISTENT_SUSPEND)


def test_the_driver_cannot_write_the_configuration(region: Region) -> None:
    driver = driver_of(region)
    before = driver.device.read_config()
    driver.device.write_config(0, b"\xff" * 56)
    assert driver.device.read_config() == before
    for offset, data in ((-1, b"1"), (56, b"1"), (0, bytes(57))):
        with pytest.raises(GuestError, match="not in a configuration of 56"):
            driver.device.write_config(offset, data)


# ---- migration ------------------------------------------------------------------------------------------------------


@pytest.mark.promise("restarted-backend-answers-the-same")
def test_a_saved_state_makes_another_device_the_same(region: Region) -> None:
    driver = driver_of(region, 32)
    driver.plug(0, 4)
    driver.plug(9, 2)
    driver.device.requested_size = "8M"
    state = json.loads(json.dumps(driver.device.save()))
    with Region("64M", block_size=BLOCK, backend=Memfd()) as target:
        again = driver_of(target, 0)
        target.plug(40)  # nothing that the state knows of
        again.device.load(state)
        assert again.device.read_config() == driver.device.read_config()
        assert list(target.plugged_runs()) == [(0, 4), (9, 2)]
        assert target.audit().ok


def test_blocks_that_are_plugged_already_keep_their_content(region: Region) -> None:
    driver = driver_of(region)
    driver.plug(0, 4)
    region.view(1)[:4] = b"mine"
    state = driver.device.save()
    with Region("64M", block_size=BLOCK, backend=File(fd=region.fileno(), existing="adopt")) as taken:
        again = driver_of(taken, 0)
        again.device.load(state)
        assert bytes(taken.view(1)[:4]) == b"mine"
        assert again.device.read_config() == driver.device.read_config()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("device", "virtio-balloon", "device is 'virtio-balloon'"),
        ("address", ADDRESS + BLOCK, "address"),
        ("block_size", BLOCK * 2, "block_size"),
        ("region_size", 1, "region_size"),
        ("requested_size", BLOCK + 1, "not a multiple"),
        ("requested_size", None, "no whole number"),
        ("requested_size", True, "no whole number"),
        ("usable_region_size", 2 * BLOCK, "usable_region_size"),
        ("usable_region_size", 65 * BLOCK, "usable_region_size"),
        ("usable_region_size", "x", "no whole number"),
        ("plugged", [[60, 5]], "plugged runs"),
        ("plugged", [[0, 2], [1, 2]], "plugged runs"),
        ("plugged", [[0, 0]], "plugged runs"),
        ("plugged", [[-1, 2]], "plugged runs"),
        ("plugged", [[0]], "plugged runs"),
        ("plugged", [[0, "1"]], "plugged runs"),
        ("plugged", None, "plugged runs"),
        ("plugged", 5, "plugged runs"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(
    region: Region, name: str, value: object, why: str
) -> None:
    driver = driver_of(region, 4)
    driver.plug(0, 2)
    before, state = driver.device.read_config(), driver.device.save()
    with pytest.raises(ValueError, match=why):
        driver.device.load({**state, name: value})
    assert driver.device.read_config() == before
    assert list(region.plugged_runs()) == [(0, 2)]


def test_a_state_for_which_there_is_no_memory_changes_nothing(region: Region) -> None:
    driver = driver_of(region)
    driver.plug(0, 8)
    with Region("64M", block_size=BLOCK, backend=Simulated(capacity="4M")) as target:
        again = driver_of(target, 0)
        target.plug(40)
        with pytest.raises(BackendExhaustedError):
            again.device.load(driver.device.save())
        assert list(target.plugged_runs()) == [(40, 1)]
        assert again.device.requested_size == 0


def test_a_device_on_a_region_that_holds_something_counts_it(region: Region) -> None:
    region.plug(8, 2)
    driver = driver_of(region, 0)
    assert driver.config.plugged_size == 2 * BLOCK
    assert driver.config.usable_region_size == 10 * BLOCK
    assert driver.unplug(8, 2) is ACK
