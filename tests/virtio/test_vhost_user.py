"""The vhost-user backend, as its frontends see it: every message, whatever order, and what is wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsemem.virtio.device import Element
from sparsemem.virtio.guest_memory import GuestMemory
from sparsemem.virtio.vhost_user import Backend, Server
from sparsemem.virtio.vhost_user import channel as channels
from sparsemem.virtio.vhost_user.messages import Request
from tests.virtio.devices import Echo
from tests.virtio.frontend import (
    EVENT_IDX,
    INDIRECT,
    PATIENCE_S,
    PROTOCOL_FEATURES,
    USER_BASE,
    VERSION_1,
    Frontend,
    Gone,
    Guest,
    Ring,
    connected,
)

ALL = 0x18229  # all protocol features that are offered
NO_ACKS = ALL & ~(1 << 3)


@pytest.fixture
def device() -> Echo:
    return Echo()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def rings(guest: Guest) -> Iterator[list[Ring]]:
    rings = [Ring(guest) for _ in range(3)]
    yield rings
    for ring in rings:
        ring.close()


@pytest.fixture
def server(device: Echo, tmp_path: Path) -> Iterator[Server]:
    with Server(Backend("echo", device, GuestMemory()), str(tmp_path / "echo.sock")) as server:
        yield server


@pytest.fixture
def frontend(server: Server) -> Iterator[Frontend]:
    frontend = Frontend(server.path, protocol=ALL)
    yield frontend
    frontend.close()


def wait_for(condition: Callable[[], object]) -> None:
    """Until it holds; the test fails where it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def ring_state(index: int, value: int) -> bytes:
    return struct.pack("<II", index, value)


# ---- the order in which real frontends talk ---------------------------------------------------


def test_as_qemu_does_it(server: Server, device: Echo, guest: Guest, rings: list[Ring]) -> None:
    """As QEMU 10 was recorded, with all that it takes of what is offered."""
    with contextlib.closing(Frontend(server.path, protocol=ALL)) as frontend:
        offered = frontend.number(Request.GET_FEATURES)
        assert offered == 0b11 | VERSION_1 | PROTOCOL_FEATURES | INDIRECT | EVENT_IDX
        assert frontend.number(Request.GET_PROTOCOL_FEATURES) == ALL
        frontend.send(Request.SET_PROTOCOL_FEATURES, number(ALL))
        frontend.number(Request.GET_QUEUE_NUM)
        frontend.number(Request.GET_MAX_MEM_SLOTS)
        frontend.notices, theirs = socket.socketpair()
        assert frontend.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
        theirs.close()
        frontend.send(Request.SET_OWNER)
        for i, ring in enumerate(rings):
            frontend.send(Request.SET_VRING_CALL, number(i), [ring.call])
            frontend.send(Request.SET_VRING_ERR, number(i), [ring.err])
        assert frontend.config(8) == b"01234567", "the guest probes before anything runs"
        for bases in ([0, 0, 0], [1, 1, 1]):  # at DRIVER_OK, and when a paused machine goes on
            frontend.send(Request.SET_FEATURES, number(offered & ~EVENT_IDX))
            frontend.send(Request.SET_STATUS, number(frontend.number(Request.GET_STATUS) | 8))
            assert frontend.add_region(guest.base, guest.size, guest.fd) == 0
            for i, ring in enumerate(rings):
                frontend.send(Request.SET_VRING_NUM, ring_state(i, ring.size))
                frontend.send(Request.SET_VRING_BASE, ring_state(i, bases[i]))
                frontend.send(Request.SET_VRING_ADDR, address_payload(ring, index=i, log=ring.used))
                frontend.send(Request.SET_VRING_KICK, number(i), [ring.kick])
                frontend.send(Request.SET_VRING_CALL, number(i), [ring.call])
            for i in range(len(rings)):
                assert frontend.do(Request.SET_VRING_ENABLE, ring_state(i, 1)) == 0
            frontend.send(Request.SET_STATUS, number(frontend.number(Request.GET_STATUS) | 7))
            for ring in rings:
                assert ring.request(b"hello", 8) == b"olleh"
            assert [frontend.stop_ring(i) for i in range(3)] == [base + 1 for base in bases]
            assert frontend.remove_region(guest.base, guest.size) == 0
            frontend.send(Request.SET_STATUS, number(0))
        assert device.negotiated == [0b11, 0b11], "the transport's own features are not the device's"
        assert device.resets == 0


def test_as_user_mode_linux_does_it(server: Server, device: Echo, guest: Guest, rings: list[Ring]) -> None:
    """As 6.1 was recorded: features twice, the second time without bit 30, so that no ring needs to be enabled."""
    with contextlib.closing(Frontend(server.path, protocol=0x228)) as frontend:
        frontend.send(Request.SET_OWNER)
        offered = frontend.number(Request.GET_FEATURES)
        assert frontend.number(Request.GET_PROTOCOL_FEATURES) & 0x228 == 0x228
        assert frontend.do(Request.SET_PROTOCOL_FEATURES, number(0x228)) == 0
        frontend.notices, theirs = socket.socketpair()
        assert frontend.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
        theirs.close()
        assert frontend.do(Request.SET_FEATURES, number(offered)) == 0
        assert frontend.do(Request.SET_FEATURES, number(offered & ~(PROTOCOL_FEATURES | 1))) == 0
        where = (guest.base, guest.size, USER_BASE + guest.base, 0)
        table = struct.pack("<II", 1, 0) + struct.pack("<QQQQ", *where) + bytes(32)
        assert frontend.do(Request.SET_MEM_TABLE, table, [guest.fd]) == 0
        for i, ring in enumerate(rings):
            assert frontend.do(Request.SET_VRING_CALL, number(i), [ring.call]) == 0
            assert frontend.do(Request.SET_VRING_NUM, ring_state(i, ring.size)) == 0
            assert frontend.do(Request.SET_VRING_BASE, ring_state(i, 0)) == 0
            assert frontend.do(Request.SET_VRING_ADDR, address_payload(ring, index=i, log=(1 << 64) - 1)) == 0
        for i, ring in enumerate(rings):
            assert frontend.do(Request.SET_VRING_KICK, number(i), [ring.kick]) == 0
        assert frontend.config(8) == b"01234567", "the guest probes when everything runs"
        for ring in rings:
            assert ring.request(b"hello", 8) == b"olleh"
        assert device.negotiated == [0b11, 0b10]


def test_without_protocol_features_rings_are_enabled_from_the_start(
    frontend: Frontend, guest: Guest, rings: list[Ring]
) -> None:
    frontend.protocol = 0
    frontend.number(Request.GET_FEATURES)
    assert frontend.do(Request.SET_FEATURES, number(VERSION_1)) == 0
    assert frontend.share([(guest.base, guest.size, guest.fd)]) == 0
    ring = rings[0]
    frontend.do(Request.SET_VRING_NUM, ring_state(0, ring.size))
    frontend.do(Request.SET_VRING_BASE, ring_state(0, 0))
    frontend.address(0, ring)
    frontend.do(Request.SET_VRING_CALL, number(0), [ring.call])
    frontend.do(Request.SET_VRING_KICK, number(0), [ring.kick])
    assert ring.request(b"hello", 8) == b"olleh"


@pytest.mark.parametrize("features", [0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX])
def test_many_requests_on_all_queues_at_once(server: Server, guest: Guest, rings: list[Ring], features: int) -> None:
    with connected(server.path, guest, rings, 2 | features):
        for i in range(300):
            ring = rings[i % 3]
            assert ring.request(b"%03d" % i, 8, indirect=bool(features & INDIRECT)) == (b"%03d" % i)[::-1]
    assert sum(server.backend.stats().answered) == 300


def test_a_full_queue_is_served_after_one_kick(server: Server, guest: Guest, rings: list[Ring]) -> None:
    with connected(server.path, guest, rings, EVENT_IDX):
        for _ in range(5):
            for i in range(rings[0].size):
                rings[0].offer(rings[0].chain([guest.put(b"%d" % i)]))
            rings[0].notify()
            for _ in range(rings[0].size):
                rings[0].wait()


# ---- each message --------------------------------------------------------------------------------


def test_numbers_that_are_asked_for(frontend: Frontend) -> None:
    frontend.introduce()
    assert frontend.number(Request.GET_PROTOCOL_FEATURES) == ALL
    assert frontend.number(Request.GET_QUEUE_NUM) == 3
    assert frontend.number(Request.GET_MAX_MEM_SLOTS) == 64
    assert frontend.number(Request.GET_STATUS) == 0


def test_the_status_is_what_was_set(frontend: Frontend) -> None:
    frontend.introduce()
    for status in (1, 3, 11, 15, 0):
        assert frontend.do(Request.SET_STATUS, number(status)) == 0
        assert frontend.number(Request.GET_STATUS) == status


def test_a_status_of_nought_stops_the_rings(server: Server, guest: Guest, rings: list[Ring]) -> None:
    with connected(server.path, guest, rings, protocol=ALL) as frontend:
        rings[0].request(b"x", 1)
        frontend.do(Request.SET_STATUS, number(15))
        frontend.do(Request.SET_STATUS, number(0))
        assert server.backend.stats().running == 0
        frontend.start_ring(0, rings[0], base=1)
        assert rings[0].request(b"ab", 2) == b"ba"


def test_the_configuration_is_read_in_parts_and_nothing_beyond_it(frontend: Frontend) -> None:
    frontend.introduce()
    assert frontend.config(8) == b"01234567"
    assert frontend.config(3, 2) == b"234"
    assert frontend.config(0, 8) == b""
    for offset, size in ((0, 9), (8, 1), (256, 256)):
        answer = frontend.ask(Request.GET_CONFIG, struct.pack("<III", offset, size, 0) + bytes(size))
        assert answer == struct.pack("<III", offset, 0, 0), "no data says that there is none"


def test_the_configuration_is_written_if_the_device_lets_it(frontend: Frontend, device: Echo) -> None:
    frontend.introduce()
    assert frontend.set_config(2, b"xy") == 0
    assert device.config == b"01xy4567"
    assert frontend.set_config(7, b"xy") == 1
    migrating = struct.pack("<III", 0, 1, 1) + b"z"
    assert frontend.do(Request.SET_CONFIG, migrating) == 1
    assert device.config == b"01xy4567"


def test_a_changed_configuration_is_told(server: Server, device: Echo, guest: Guest, rings: list[Ring]) -> None:
    with connected(server.path, guest, rings) as frontend:
        for i in range(3):
            device.config[0] = ord("a") + i
            device.config_changed()
            frontend.wait_for_notice()
            assert frontend.config(1) == bytes([ord("a") + i])


def test_a_change_before_a_driver_is_at_work_is_told_when_one_is(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    device.config_changed()
    with contextlib.closing(Frontend(server.path)) as frontend:
        frontend.introduce()
        device.config_changed()
        assert frontend.config(1) == b"0"
        assert frontend.notices is not None
        # QEMU crashes at a notice while it still makes the device; the driver has yet to read the configuration anyway.
        assert not select.select([frontend.notices], [], [], 0)[0]
        assert frontend.share([(guest.base, guest.size, guest.fd)]) == 0
        frontend.start(rings, 0)
        frontend.wait_for_notice()


def test_a_frontend_that_does_not_read_notices_holds_nobody_up(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    with connected(server.path, guest, rings) as frontend:
        assert frontend.notices is not None
        frontend.notices.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for i in range(2000):
            device.config_changed()
            if i % 10 == 0:
                assert rings[0].request(b"ab", 2) == b"ba"
        frontend.notices.close()
        device.config_changed()
        assert rings[0].request(b"ab", 2) == b"ba"
        frontend.notices = None


def test_queues_are_stopped_and_go_on_where_they_were(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    with connected(server.path, guest, rings) as frontend:
        for _ in range(5):
            rings[0].request(b"x", 1)
        assert frontend.stop_ring(0) == 5
        rings[0].offer(rings[0].chain([guest.put(b"later")]))
        rings[0].notify()
        assert rings[1].request(b"ab", 2) == b"ba", "the other queues run"
        assert len(device.handled) == 6
        frontend.start_ring(0, rings[0], base=5)
        rings[0].wait()
        assert device.handled[-1][1].data == b"later"
        assert device.resets == 0, "it was a pause"


def test_a_disabled_queue_waits(server: Server, device: Echo, guest: Guest, rings: list[Ring]) -> None:
    with connected(server.path, guest, rings) as frontend:
        frontend.do(Request.SET_VRING_ENABLE, ring_state(0, 0))
        rings[0].offer(rings[0].chain([guest.put(b"x")]))
        rings[0].notify()
        rings[1].request(b"x", 1)
        assert [queue for queue, _ in device.handled] == [1]
        frontend.do(Request.SET_VRING_ENABLE, ring_state(0, 1))
        rings[0].wait()
        assert frontend.do(Request.RESET_OWNER) == 0, "which disables all"
        rings[0].offer(rings[0].chain([guest.put(b"x")]))
        rings[0].notify()
        frontend.number(Request.GET_FEATURES)
        assert len(device.handled) == 2


def test_without_a_call_descriptor_the_driver_polls(server: Server, guest: Guest, rings: list[Ring]) -> None:
    with connected(server.path, guest, rings) as frontend:
        assert frontend.do(Request.SET_VRING_CALL, number(0x100)) == 0
        rings[0].offer(rings[0].chain([guest.put(b"x")]))
        rings[0].notify()
        wait_for(lambda: rings[0].used_index() == 1)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(rings[0].call)


def test_memory_comes_and_goes_region_by_region(server: Server, guest: Guest, rings: list[Ring]) -> None:
    more = Guest(1 << 20, base=1 << 32)
    with connected(server.path, guest, rings, protocol=ALL) as frontend:
        assert rings[0].request(b"ab", 2) == b"ba"
        outside = more.put(b"outside")
        room = guest.room(8)
        assert frontend.add_region(more.base, more.size, more.fd) == 0
        assert frontend.add_region(more.base, more.size, more.fd) == 1, "it is there already"
        head = rings[0].chain([outside, room])
        rings[0].offer(head)
        rings[0].notify()
        assert rings[0].wait() == (head, 7)
        assert guest.read(room.address, 7) == b"edistuo"
        assert frontend.remove_region(more.base, more.size) == 0
        assert frontend.remove_region(more.base, more.size) == 1
        assert frontend.remove_region(more.base, more.size // 2) == 1
        assert rings[0].request(b"ab", 2) == b"ba"
        rings[0].offer(rings[0].chain([outside]))
        rings[0].notify()
        wait_for(lambda: server.backend.needs_reset)
        assert "not in guest memory" in server.backend.needs_reset
    more.close()


def test_a_descriptor_that_comes_with_a_region_to_be_removed_is_closed(frontend: Frontend, guest: Guest) -> None:
    frontend.introduce()
    frontend.add_region(guest.base, guest.size, guest.fd)
    slot = struct.pack("<8xQQQQ", guest.base, guest.size, USER_BASE + guest.base, 0)
    assert frontend.do(Request.REM_MEM_REG, slot, [guest.fd]) == 0


def test_a_table_in_place_of_another_while_rings_run(server: Server, guest: Guest, rings: list[Ring]) -> None:
    more = Guest(1 << 20, base=1 << 32)
    with connected(server.path, guest, rings) as frontend:
        for table in ([guest, more], [guest], [more, guest]):
            assert frontend.share([(each.base, each.size, each.fd) for each in table]) == 0
            assert rings[0].request(b"ab", 2) == b"ba"
    more.close()


def test_there_are_so_many_regions_and_no_more(frontend: Frontend) -> None:
    frontend.introduce()
    guest = Guest(4096)
    for i in range(64):
        assert frontend.add_region(i << 20, 4096, guest.fd) == 0
    assert frontend.add_region(64 << 20, 4096, guest.fd) == 1
    guest.close()


# ---- what cannot be done ------------------------------------------------------------------------


def shared(frontend: Frontend, guest: Guest) -> None:
    frontend.introduce()
    frontend.share([(guest.base, guest.size, guest.fd)])
    frontend.do(Request.SET_FEATURES, number(VERSION_1 | PROTOCOL_FEATURES))


def address_payload(ring: Ring, **changed: int) -> bytes:
    values = {
        "index": 0,
        "flags": 0,
        "descriptors": USER_BASE + ring.descriptors,
        "used": USER_BASE + ring.used,
        "available": USER_BASE + ring.available,
        "log": 0,
    }
    return struct.pack("<IIQQQQ", *(values | changed).values())


REFUSED: dict[str, Callable[[Frontend, Ring], int]] = {
    "features that were not offered": lambda f, r: f.do(Request.SET_FEATURES, number(VERSION_1 | 1 << 26)),
    "a driver of before VIRTIO 1": lambda f, r: f.do(Request.SET_FEATURES, number(1)),
    "a size that is no power of two": lambda f, r: f.do(Request.SET_VRING_NUM, ring_state(0, 100)),
    "a size of nothing": lambda f, r: f.do(Request.SET_VRING_NUM, ring_state(0, 0)),
    "a size that no queue has": lambda f, r: f.do(Request.SET_VRING_NUM, ring_state(0, 1 << 16)),
    "a base that no index has": lambda f, r: f.do(Request.SET_VRING_BASE, ring_state(0, 1 << 16)),
    "addresses before the size": lambda f, r: f.do(Request.SET_VRING_ADDR, address_payload(r, index=1)),
    "logging": lambda f, r: f.do(Request.SET_VRING_ADDR, address_payload(r, flags=1)),
    "a ring outside of memory": lambda f, r: f.do(Request.SET_VRING_ADDR, address_payload(r, used=4096)),
    "a ring half outside": lambda f, r: f.do(
        Request.SET_VRING_ADDR, address_payload(r, descriptors=USER_BASE + (16 << 20) - 16)
    ),
    "a ring that is not aligned": lambda f, r: f.do(
        Request.SET_VRING_ADDR, address_payload(r, used=USER_BASE + r.used + 2)
    ),
    "rings that overlap": lambda f, r: f.do(Request.SET_VRING_ADDR, address_payload(r, used=USER_BASE + r.descriptors)),
    "a ring to be polled": lambda f, r: f.do(Request.SET_VRING_KICK, number(0x100)),
    "a ring enabled twice over": lambda f, r: f.do(Request.SET_VRING_ENABLE, ring_state(0, 2)),
    "memory that overlaps": lambda f, r: f.share([(0, 8192, r.guest.fd), (4096, 8192, r.guest.fd)]),
    "memory of no size": lambda f, r: f.share([(0, 0, r.guest.fd)]),
    "memory that wraps": lambda f, r: f.share([((1 << 64) - 4096, 8192, r.guest.fd)]),
    "memory that is not whole pages": lambda f, r: f.share([(100, 4096, r.guest.fd)]),
    "more memory than the file has": lambda f, r: f.share([(0, 1 << 40, r.guest.fd)]),
    "memory that is an eventfd": lambda f, r: f.share([(0, 4096, r.kick)]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_answered_with_a_failure_and_the_connection_goes_on(
    frontend: Frontend, server: Server, guest: Guest, rings: list[Ring], what: str
) -> None:
    shared(frontend, guest)
    frontend.do(Request.SET_VRING_NUM, ring_state(0, rings[0].size))
    assert REFUSED[what](frontend, rings[0]) == 1
    assert not server.backend.needs_reset
    frontend.start_ring(0, rings[0])
    assert rings[0].request(b"ab", 2) == b"ba"


@pytest.mark.parametrize("what", REFUSED)
def test_where_no_answer_is_asked_for_the_device_needs_a_reset_and_says_why(
    server: Server, guest: Guest, rings: list[Ring], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Frontend(server.path, protocol=NO_ACKS)) as frontend:
        shared(frontend, guest)
        frontend.do(Request.SET_VRING_NUM, ring_state(0, rings[0].size))
        REFUSED[what](frontend, rings[0])
        assert frontend.number(Request.GET_STATUS) == 0x40
        stats = server.backend.stats()
        assert (stats.failures, stats.needs_reset) == (1, stats.last_failure)
        assert any(stats.needs_reset in record.message for record in caplog.records)
        frontend.do(Request.SET_STATUS, number(0))
        assert frontend.number(Request.GET_STATUS) == 0
        frontend.do(Request.SET_FEATURES, number(VERSION_1 | PROTOCOL_FEATURES))
        frontend.share([(guest.base, guest.size, guest.fd)])
        frontend.start_ring(0, rings[0])
        assert rings[0].request(b"ab", 2) == b"ba"


def test_a_running_ring_is_not_moved(server: Server, guest: Guest, rings: list[Ring]) -> None:
    with connected(server.path, guest, rings, protocol=ALL) as frontend:
        assert frontend.do(Request.SET_VRING_NUM, ring_state(0, 32)) == 1
        assert frontend.do(Request.SET_VRING_BASE, ring_state(0, 7)) == 1
        assert frontend.do(Request.SET_VRING_ADDR, address_payload(rings[1])) == 1
        assert frontend.do(Request.SET_VRING_ADDR, address_payload(rings[0])) == 0, "where it is already"
        assert rings[0].request(b"ab", 2) == b"ba"


ENDED: dict[str, Callable[[Frontend, Guest], object]] = {
    "a ring that the device does not have": lambda f, g: f.send(Request.SET_VRING_NUM, ring_state(3, 64)),
    "the base of such a ring": lambda f, g: f.send(Request.GET_VRING_BASE, ring_state(255, 0)),
    "protocol features that were not offered": lambda f, g: f.send(Request.SET_PROTOCOL_FEATURES, number(2)),
    "a status that is none": lambda f, g: f.send(Request.SET_STATUS, number(256)),
    "a channel that is no socket": lambda f, g: f.send(Request.SET_BACKEND_REQ_FD, b"", [g.fd]),
    "an unknown request": lambda f, g: f.send(99),
    "a wrong version": lambda f, g: f.send_raw(struct.pack("<III", 1, 3, 0)),
    "a payload of a wrong size": lambda f, g: f.send(Request.SET_FEATURES, b"1234"),
    "too many descriptors": lambda f, g: f.send(Request.SET_VRING_KICK, number(0), [g.fd] * 9),
    "a descriptor too many": lambda f, g: f.send(Request.SET_OWNER, b"", [g.fd]),
    "a descriptor too few": lambda f, g: f.send(Request.SET_VRING_KICK, number(0)),
    "fewer descriptors than regions": lambda f, g: f.send(
        Request.SET_MEM_TABLE, struct.pack("<II", 2, 0) + bytes(64), [g.fd]
    ),
}


@pytest.mark.promise("hostile-guest-is-contained")
@pytest.mark.parametrize("what", ENDED)
def test_what_is_malformed_ends_the_connection_and_the_next_frontend_is_served(
    server: Server, guest: Guest, rings: list[Ring], what: str
) -> None:
    with contextlib.closing(Frontend(server.path)) as frontend:
        shared(frontend, guest)
        ENDED[what](frontend, guest)
        with pytest.raises(Gone):
            frontend.receive()
    with connected(server.path, guest, rings):
        assert rings[0].request(b"ab", 2) == b"ba"


def test_half_a_message_ends_the_connection_and_meanwhile_the_guest_is_served(
    server: Server, guest: Guest, rings: list[Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "PATIENCE_S", 0.3)
    with connected(server.path, guest, rings) as frontend:
        frontend.send_raw(struct.pack("<II", Request.SET_FEATURES, 1))
        for _ in range(20):
            rings[0].request(b"x", 1)
        with pytest.raises(Gone):
            frontend.receive()


def test_descriptors_that_would_keep_us_busy_are_refused(frontend: Frontend, guest: Guest, tmp_path: Path) -> None:
    shared(frontend, guest)
    zero, folder = os.open("/dev/zero", os.O_RDWR), os.open(tmp_path, os.O_RDONLY)
    for fd in (guest.fd, zero, folder):
        for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            assert frontend.do(request, number(0), [fd]) == 1
    os.close(zero)
    os.close(folder)


def test_a_kick_descriptor_that_breaks_ends_the_connection(server: Server, guest: Guest, rings: list[Ring]) -> None:
    reader, writer = os.pipe()
    with connected(server.path, guest, rings[:1]) as frontend:
        assert frontend.do(Request.SET_VRING_KICK, number(1), [reader]) == 0
        os.close(reader)
        os.close(writer)
        with pytest.raises(Gone):
            frontend.receive()


def test_a_call_descriptor_that_is_full_holds_nobody_up(server: Server, guest: Guest, rings: list[Ring]) -> None:
    with connected(server.path, guest, rings):
        os.eventfd_write(rings[0].call, 0xFFFF_FFFF_FFFF_FFFE)
        for i in range(3):
            rings[0].offer(rings[0].chain([guest.put(b"x")]))
            rings[0].notify()
            wait_for(lambda wanted=i + 1: rings[0].used_index() == wanted)
        os.eventfd_read(rings[0].call)


# ---- a guest that misbehaves ----------------------------------------------------------------------


def test_a_request_that_no_driver_sends_puts_the_device_in_need_of_a_reset(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    with connected(server.path, guest, rings, protocol=ALL) as frontend:
        rings[0].request(b"good", 4)
        rings[0].offer(rings[0].chain([guest.put(b"bad")]))
        rings[0].notify()
        frontend.wait_for_notice()
        assert frontend.number(Request.GET_STATUS) == 0x40
        assert server.backend.stats().needs_reset == "queue 0: that is bad"
        assert select.select([rings[0].err], [], [], PATIENCE_S)[0], "the frontend is told, too"
        rings[1].offer(rings[1].chain([guest.put(b"more")]))
        rings[1].notify()
        frontend.number(Request.GET_FEATURES)
        assert len(device.handled) == 2, "nothing is served meanwhile"
        # The driver resets it: the rings are stopped, and begin anew.
        assert [frontend.stop_ring(i) for i in range(3)] == [1, 0, 0]
        assert frontend.number(Request.GET_STATUS) == 0
        for ring in rings:
            ring.reset()
        frontend.start(rings, 0)
        assert rings[0].request(b"ab", 2) == b"ba"
        assert server.backend.stats().failures == 1


def test_an_answer_without_room_puts_it_there_too(server: Server, guest: Guest, rings: list[Ring]) -> None:
    with connected(server.path, guest, rings):
        rings[0].offer(rings[0].chain([guest.put(b"12345"), guest.room(2)]))
        rings[0].notify()
        wait_for(lambda: server.backend.needs_reset)
        assert server.backend.needs_reset == "queue 0: room for 2 bytes, where the answer has 5"
        assert rings[0].used_index() == 0


@pytest.mark.promise("hostile-guest-is-contained")
def test_a_guest_that_never_ends_keeps_no_frontend_out_nor_the_other_way_round(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    data, going = guest.put(b"again"), True

    def again(element: Element) -> None:
        if going and element.data == b"again":
            rings[0].offer(rings[0].chain([data]))

    device.hook = again
    with connected(server.path, guest, rings) as frontend:
        rings[0].offer(rings[0].chain([data]))
        rings[0].notify()
        for _ in range(20):
            assert frontend.config(8) == b"01234567"
        assert rings[1].request(b"ab", 2) == b"ba"
        going = False
        assert len(device.handled) > 20
        chatter = threading.Thread(target=lambda: [frontend.send(Request.SET_OWNER) for _ in range(20_000)])
        chatter.start()
        for _ in range(20):
            assert rings[1].request(b"ab", 2) == b"ba"
        chatter.join()


@pytest.mark.promise("hostile-guest-is-contained")
def test_memory_that_is_truncated_underneath_is_no_crash(
    server: Server, guest: Guest, rings: list[Ring], caplog: pytest.LogCaptureFixture
) -> None:
    with connected(server.path, guest, rings):
        os.ftruncate(guest.fd, 0)
        rings[0].notify()
        wait_for(lambda: server.backend.needs_reset)
        assert "truncated underneath" in server.backend.needs_reset
        assert not any(record.exc_info for record in caplog.records), "it is no error of ours"
    os.ftruncate(guest.fd, guest.size)
    for ring in rings:
        ring.reset()
    with connected(server.path, guest, rings):
        assert rings[0].request(b"ab", 2) == b"ba"


def test_an_error_of_ours_hurts_one_device_only(
    server: Server, device: Echo, guest: Guest, rings: list[Ring], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(element: Element) -> None:
        raise ZeroDivisionError("a bug")

    device.hook = fail
    with connected(server.path, guest, rings):
        rings[0].offer(rings[0].chain([guest.put(b"x")]))
        rings[0].notify()
        wait_for(lambda: server.backend.needs_reset)
        assert server.backend.needs_reset == "queue 0: ZeroDivisionError: a bug"
    assert any(record.exc_info for record in caplog.records), "with its traceback in the log"


# ---- resets and late answers ------------------------------------------------------------------------


def test_a_driver_that_begins_anew_resets_the_device_once_and_a_pause_does_not(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    with connected(server.path, guest, rings, features=1) as frontend:
        rings[0].request(b"x", 1)
        bases = [frontend.stop_ring(i) for i in range(3)]
        frontend.start(rings, 1, bases)
        assert device.resets == 0
        rings[0].request(b"x", 1)
        for i in range(3):
            frontend.stop_ring(i)
        for ring in rings:
            ring.reset()
        frontend.set_config(0, b"p")  # as a driver's probe does
        assert device.resets == 1
        device.negotiated.clear()
        frontend.start(rings, 1)
        assert device.resets == 1
        assert device.negotiated[-1] == 1, "what it has accepted stands"
        assert rings[0].request(b"ab", 2) == b"ba"


def test_a_queue_that_was_never_used_begins_at_nought_after_a_pause_too(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    with connected(server.path, guest, rings) as frontend:
        rings[2].request(b"x", 1)
        for _ in range(2):
            bases = [frontend.stop_ring(i) for i in range(3)]
            assert bases == [0, 0, 1]
            frontend.start(rings, 0, bases)
            assert device.resets == 0
        for i in range(3):
            frontend.stop_ring(i)
        for ring in rings:
            ring.reset()
        frontend.start(rings, 0)
        assert device.resets == 1, "the third queue tells: it had got further"


def test_the_next_frontends_guest_is_a_new_one_if_its_rings_are(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    with connected(server.path, guest, rings):
        rings[0].request(b"x", 1)
    with contextlib.closing(Frontend(server.path)) as frontend:
        frontend.introduce()
        frontend.share([(guest.base, guest.size, guest.fd)])
        frontend.start(rings, 0, [1, 0, 0])
        assert device.resets == 0, "it has only connected again"
        rings[0].request(b"x", 1)
    for ring in rings:
        ring.reset()
    with connected(server.path, guest, rings):
        assert device.resets == 1


def test_a_request_that_is_kept_back_is_answered_from_any_thread(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    with connected(server.path, guest, rings):
        device.keep = True
        room = guest.room(8)
        head = rings[0].chain([guest.put(b"stats"), room])
        rings[0].offer(head)
        rings[0].notify()
        assert device.seen.wait(PATIENCE_S)
        device.keep = False
        assert rings[1].request(b"ab", 2) == b"ba"
        assert rings[0].used_index() == 0
        thread = threading.Thread(target=device.answer_late, args=(0, b"late"))
        thread.start()
        assert rings[0].wait() == (head, 4)
        thread.join()
        assert guest.read(room.address, 4) == b"late"
        device.answer_late(0, b"nobody waits for that")
        assert rings[0].request(b"ab", 2) == b"ba"


def test_a_request_that_is_kept_back_is_found_again_after_a_stop(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    with connected(server.path, guest, rings) as frontend:
        device.keep = True
        rings[0].offer(rings[0].chain([guest.put(b"kept")]))
        rings[0].notify()
        assert device.seen.wait(PATIENCE_S)
        assert frontend.stop_ring(0) == 0
        device.answer_late(0, b"")
        device.keep = False
        frontend.start_ring(0, rings[0], base=0)
        rings[0].wait()
        assert [element.data for _, element in device.handled] == [b"kept", b"kept"]


# ---- sockets ------------------------------------------------------------------------------------------


def test_a_path_that_is_too_long_for_a_socket_is_refused_with_the_limit(device: Echo, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="where a socket's path has 107 at most"):
        Server(Backend("echo", device, GuestMemory()), str(tmp_path / ("s" * 108)))
    assert not list(tmp_path.iterdir())


@pytest.mark.promise("private-to-its-user")
def test_the_socket_is_its_users_alone_and_goes_with_the_server(device: Echo, tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = os.umask(0)
    try:
        server = Server(Backend("echo", device, GuestMemory()), str(path))
    finally:
        os.umask(before)
    about = path.stat()
    assert stat.S_ISSOCK(about.st_mode)
    assert stat.S_IMODE(about.st_mode) == 0o600
    assert server.close()
    assert not path.exists()
    assert server.close(), "twice is harmless"


def test_a_file_that_nobody_listens_at_is_replaced_and_any_other_is_not(device: Echo, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with Server(Backend("echo", device, GuestMemory()), str(path)):
        with pytest.raises(OSError, match=r"s: Address already in use"):
            Server(Backend("echo", Echo(), GuestMemory()), str(path))
        with contextlib.closing(Frontend(str(path))) as frontend:
            frontend.introduce()
    path.write_text("something else")
    with pytest.raises(OSError, match="Address already in use"):
        Server(Backend("echo", Echo(), GuestMemory()), str(path))
    assert path.read_text() == "something else"


def test_a_socket_that_was_put_in_place_of_ours_is_left_alone(device: Echo, tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = Server(Backend("echo", device, GuestMemory()), str(path))
    path.unlink()
    path.write_text("somebody else's")
    server.close()
    assert path.read_text() == "somebody else's"


def test_there_is_one_frontend_at_a_time(server: Server, guest: Guest, rings: list[Ring]) -> None:
    with connected(server.path, guest, rings):
        with contextlib.closing(Frontend(server.path)) as second, pytest.raises((Gone, ConnectionResetError)):
            second.number(Request.GET_FEATURES)
        assert rings[0].request(b"ab", 2) == b"ba"


def test_one_frontend_after_the_other_is_served(server: Server, guest: Guest, rings: list[Ring]) -> None:
    for i in range(20):
        for ring in rings:
            ring.reset()
        with connected(server.path, guest, rings):
            assert rings[0].request(b"ab", 2) == b"ba"
        assert server.backend.stats().frontends == i + 1
    wait_for(lambda: not server.backend.stats().connected)
    assert server.backend.memory.ranges == ()


def test_closing_ends_connections_and_gives_back_all_that_the_frontend_gave(
    device: Echo, tmp_path: Path, guest: Guest, rings: list[Ring]
) -> None:
    """The leak check of all tests looks at descriptors and mappings; here a frontend is still connected."""
    server = Server(Backend("echo", device, GuestMemory()), str(tmp_path / "s"))
    with connected(server.path, guest, rings) as frontend:
        assert rings[0].request(b"ab", 2) == b"ba"
        assert server.close()
        with pytest.raises(Gone):
            frontend.receive()
    device.config_changed()
    device.answer_late(0, b"")


def test_the_server_of_a_slow_request_ends_when_it_is_done(
    server: Server, device: Echo, guest: Guest, rings: list[Ring]
) -> None:
    release = threading.Event()
    device.hook = lambda element: release.wait(PATIENCE_S) and None
    with connected(server.path, guest, rings):
        rings[0].offer(rings[0].chain([guest.put(b"slow")]))
        rings[0].notify()
        assert device.seen.wait(PATIENCE_S)
        assert not server.close(timeout=0.05)
        release.set()
        assert server.close()


def test_several_guests_in_one_process_do_not_wait_for_each_other(tmp_path: Path) -> None:
    release = threading.Event()
    with contextlib.ExitStack() as stack:
        guests = []
        for i in range(3):
            device, guest = Echo(), Guest()
            server = stack.enter_context(Server(Backend(f"echo {i}", device, GuestMemory()), str(tmp_path / f"{i}")))
            stack.callback(guest.close)
            ring = Ring(guest)
            stack.callback(ring.close)
            guests.append((device, guest, ring, stack.enter_context(connected(server.path, guest, [ring]))))
        slow, guest, ring, _ = guests[0]
        slow.hook = lambda element: release.wait(PATIENCE_S) and None
        ring.offer(ring.chain([guest.put(b"slow")]))
        ring.notify()
        assert slow.seen.wait(PATIENCE_S)
        for _, _, other, frontend in guests[1:]:
            assert other.request(b"ab", 2) == b"ba"
            assert frontend.config(8) == b"01234567"
        release.set()
        ring.wait()


def test_nothing_is_logged_of_ordinary_work(
    server: Server, guest: Guest, rings: list[Ring], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), connected(server.path, guest, rings):
        rings[0].request(b"x", 1)
    assert not caplog.records
