"""Both devices of a guest served together, and the control socket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsemem import Memfd, Region
from sparsemem.virtio import GuestMemory, VirtioBalloon, VirtioMem
from sparsemem.virtio.vhost_user import ControlError, ControlServer, Service, StateError, ask
from sparsemem.virtio.vhost_user.service import Export
from tests.virtio.frontend import PATIENCE_S, Frontend, Guest, Ring
from tests.virtio.test_vhost_user import wait_for

ADDRESS = 0x1_4000_0000
BLOCK = 2 << 20
PLUG, UNPLUG = 0, 1


@pytest.fixture
def region() -> Iterator[Region]:
    with Region("256M", block_size=BLOCK, backend=Memfd()) as region:
        yield region


@pytest.fixture
def balloon(region: Region) -> Iterator[VirtioBalloon]:
    balloon = VirtioBalloon(GuestMemory(regions=[region]))
    yield balloon
    balloon.close()


@pytest.fixture
def service(region: Region, balloon: VirtioBalloon, tmp_path: Path) -> Iterator[Service]:
    mem = VirtioMem(region, address=ADDRESS, requested_size="64M")
    exports = (
        Export(mem, str(tmp_path / "mem"), GuestMemory(regions=[region])),
        Export(balloon, str(tmp_path / "balloon"), balloon.memory),
    )
    with Service(exports, str(tmp_path / "control")) as service:
        yield service


class Machine:
    """A guest with both devices, whose memory is a memfd and the region."""

    def __init__(self, service: Service, region: Region, stack: contextlib.ExitStack) -> None:
        self.guest = Guest(64 << 20)
        stack.callback(self.guest.close)
        table = [(0, self.guest.size, self.guest.fd), (ADDRESS, region.size, region.fileno())]
        self.rings: list[list[Ring]] = []
        self.frontends = []
        for export in service.exports:
            count = export.device.queues(export.device.features)
            rings = [Ring(self.guest, 128) for _ in range(count)]
            frontend = Frontend(export.socket)
            stack.callback(frontend.close)
            for ring in rings:
                stack.callback(ring.close)
            frontend.introduce()
            assert frontend.share(table) == 0
            frontend.start(rings, export.device.features)
            self.rings.append(rings)
            self.frontends.append(frontend)

    def ask(self, operation: int, block: int, count: int = 1) -> int:
        request = struct.pack("<H6xQH6x", operation, ADDRESS + block * BLOCK, count)
        return int(struct.unpack("<H6xH", self.rings[0][0].request(request, 10))[0])

    def balloon(self, queue: int, frames: list[int]) -> None:
        self.rings[1][queue].request(struct.pack(f"<{len(frames)}I", *frames))


@pytest.fixture
def machine(service: Service, region: Region) -> Iterator[Machine]:
    with contextlib.ExitStack() as stack:
        yield Machine(service, region, stack)


# ---- the devices ------------------------------------------------------------------------------


def test_the_memory_that_the_frontend_sends_back_is_the_region_itself(
    service: Service, machine: Machine, region: Region
) -> None:
    for export in service.exports:
        (entry,) = [entry for entry in export.memory.ranges if entry.address == ADDRESS]
        assert entry.region is region
    assert service.stats()["mem"]["connection"]["trouble"] == ""


def test_the_balloon_discards_within_the_region_and_an_unplugged_block_is_left_alone(
    machine: Machine, region: Region
) -> None:
    assert machine.ask(PLUG, 0, 2) == 0
    view = region.view(0, 1)
    view[:] = b"x" * BLOCK
    machine.balloon(0, [ADDRESS // 4096 + frame for frame in range(16)] + [ADDRESS // 4096 + 5 * 512])
    assert view[: 16 * 4096] == bytes(16 * 4096)
    assert view[16 * 4096 :] == b"x" * (BLOCK - 16 * 4096)
    view.release()
    assert machine.ask(UNPLUG, 0, 2) == 0
    assert region.plugged_size == 0
    assert os.fstat(region.fileno()).st_blocks == 0


def test_memory_elsewhere_than_the_device_says_is_told_of(
    service: Service, region: Region, caplog: pytest.LogCaptureFixture
) -> None:
    guest = Guest()
    ring = Ring(guest)
    with contextlib.closing(Frontend(service.exports[0].socket)) as frontend:
        frontend.introduce()
        for at, told in (
            (ADDRESS + BLOCK, "the guest does not have the device's memory at 0x140000000"),
            (None, "the guest does not have the device's memory at 0x140000000"),
            (ADDRESS, ""),
        ):
            table = [(0, guest.size, guest.fd)]
            table += [] if at is None else [(at, region.size, region.fileno())]
            assert frontend.share(table) == 0
            ring.reset()
            frontend.start([ring], 0)
            assert service.stats()["mem"]["connection"]["trouble"] == told
            frontend.stop_ring(0)
    ring.close()
    guest.close()
    assert [record.message for record in caplog.records] == [
        "mem: the guest does not have the device's memory at 0x140000000"
    ]


def test_the_guests_statistics_are_asked_for_and_shown(service: Service, machine: Machine) -> None:
    ring, guest = machine.rings[1][2], machine.guest
    assert service.stats()["balloon"]["guest"] == {}
    first = guest.put(struct.pack("<HQHQ", 4, 100 << 20, 5, 512 << 20))
    head = ring.chain([first])
    ring.offer(head)
    ring.notify()
    wait_for(lambda: service.exports[1].device.stats is not None)  # type: ignore[attr-defined]

    def driver() -> None:
        ring.wait()  # the buffer comes back, which asks for the next statistics
        guest.write(first.address, struct.pack("<HQHQ", 4, 50 << 20, 5, 512 << 20))
        ring.offer(head)
        ring.notify()

    thread = threading.Thread(target=driver)
    thread.start()
    found: list[dict[str, int]] = []
    wait_for(lambda: found.append(service.stats()["balloon"]["guest"]) or found[-1].get("free") == 50 << 20)
    thread.join()
    assert found[-1] == {"free": 50 << 20, "total": 512 << 20}


def test_if_one_device_cannot_be_served_none_is(region: Region, balloon: VirtioBalloon, tmp_path: Path) -> None:
    mem = VirtioMem(region, address=ADDRESS)
    taken = tmp_path / "taken"
    taken.write_text("no socket")
    exports = (
        Export(mem, str(tmp_path / "mem"), GuestMemory(regions=[region])),
        Export(balloon, str(taken), balloon.memory),
    )
    with pytest.raises(OSError, match="Address already in use"):
        Service(exports)
    assert sorted(os.listdir(tmp_path)) == ["taken"]
    (tmp_path / "state").write_text("nonsense")
    with pytest.raises(StateError):
        Service((Export(mem, str(tmp_path / "mem"), GuestMemory(), str(tmp_path / "state")),))
    with pytest.raises(ValueError, match="two mem devices"):
        Service((exports[0], Export(mem, str(tmp_path / "again"), GuestMemory())))
    assert sorted(os.listdir(tmp_path)) == ["state", "taken"]


# ---- the control socket --------------------------------------------------------------------------


def test_commands_do_what_they_say(service: Service, machine: Machine) -> None:
    path = service.control
    assert path is not None
    assert ask(path, "resize", size="128M") == {"requested_size": 128 << 20, "plugged_size": 0}
    machine.frontends[0].wait_for_notice()
    assert struct.unpack("<QH6x5Q", machine.frontends[0].config(56))[-1] == 128 << 20
    assert machine.ask(PLUG, 3, 2) == 0
    assert ask(path, "map") == {"block_size": BLOCK, "blocks": 128, "address": ADDRESS, "plugged": [[3, 2]]}
    assert ask(path, "inflate", size=16 << 20) == {"target_size": 16 << 20, "actual_size": 0}
    machine.frontends[1].wait_for_notice()
    assert struct.unpack("<4I", machine.frontends[1].config(16))[0] == 4096
    stats = ask(path, "stats")
    assert stats["mem"]["plugged_size"] == 2 * BLOCK
    assert stats["mem"]["answers"] == {"PLUG ACK": 1}
    assert stats["mem"]["connection"]["answered"] == [1]
    assert stats["balloon"]["target_size"] == 16 << 20


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        ("resize", {"size": "1T"}, "more than the region's size"),
        ("resize", {"size": 4096}, "not a multiple of the block size"),
        ("resize", {"size": None}, "must be an integer or text"),
        ("resize", {}, "missing 1 required positional argument: 'size'"),
        ("resize", {"size": 1, "what": 2}, "unexpected keyword argument 'what'"),
        ("inflate", {"size": "1.5K"}, "not a multiple of 4096"),
        ("dance", {}, "no command 'dance'; there are inflate, map, resize, stats"),
        ("_device", {}, "no command '_device'"),
    ],
)
def test_what_cannot_be_done_says_why_and_changes_nothing(
    service: Service, command: str, arguments: dict[str, Any], why: str
) -> None:
    assert service.control is not None
    before = service.stats()
    with pytest.raises(ControlError, match=why):
        ask(service.control, command, **arguments)
    assert service.stats() == before


def test_a_command_for_a_device_that_is_not_there_says_so(balloon: VirtioBalloon, tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with Service((Export(balloon, str(tmp_path / "b"), balloon.memory),), path):
        for command, arguments in (("resize", {"size": 0}), ("map", {})):
            with pytest.raises(ControlError, match="there is no virtio-mem device here"):
                ask(path, command, **arguments)
        assert set(ask(path, "stats")) == {"balloon"}


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[ControlServer]:
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    server = ControlServer(str(tmp_path / "c"), {"echo": lambda **said: said, "fail": fail})
    yield server
    server.close()


def lines(connected: socket.socket, count: int) -> list[dict[str, Any]]:
    data = b""
    while data.count(b"\n") < count:
        more = connected.recv(1 << 16)
        assert more
        data += more
    return [json.loads(line) for line in data.splitlines()]


@contextlib.contextmanager
def client(server: ControlServer) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(PATIENCE_S)
        connected.connect(server.path)
        yield connected


@pytest.mark.promise("private-to-its-user")
def test_the_control_socket_is_its_users_alone(echo: ControlServer) -> None:
    assert stat.S_IMODE(os.stat(echo.path).st_mode) == 0o600


def test_lines_come_in_any_pieces_and_several_at_once(echo: ControlServer) -> None:
    with client(echo) as connected:
        for byte in b'{"command":"echo","a":1}\n':
            connected.send(bytes([byte]))
        assert lines(connected, 1) == [{"ok": True, "result": {"a": 1}}]
        connected.send(b'{"command":"echo","b":2}\n' * 3 + b'{"comm')
        assert lines(connected, 3) == [{"ok": True, "result": {"b": 2}}] * 3
        connected.send(b'and":"echo"}\n')
        assert lines(connected, 1) == [{"ok": True, "result": {}}]


@pytest.mark.parametrize(
    "line", [b"", b"nonsense", b"[]", b"7", b'{"command":7}', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"command":"fail"}']
)
def test_a_line_that_is_no_command_is_answered_and_the_next_is_served(echo: ControlServer, line: bytes) -> None:
    with client(echo) as connected:
        if len(line) > 65536:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connected.sendall(line)
                assert connected.recv(1) in (b"", b"{")
            return
        connected.sendall(line + b"\n")
        (answer,) = lines(connected, 1)
        assert not answer["ok"]
        assert answer["error"]
        connected.sendall(b'{"command":"echo"}\n')
        assert lines(connected, 1) == [{"ok": True, "result": {}}]


def test_clients_that_say_nothing_or_too_much_or_do_not_listen_keep_nobody_out(
    echo: ControlServer,
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(client(echo)).send(b'{"comm')
        deaf = stack.enter_context(client(echo))
        deaf.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while True:
                deaf.send(b'{"command":"echo","a":"%s"}\n' % (b"x" * 1000))
        endless = stack.enter_context(client(echo))
        endless.settimeout(None)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                endless.sendall(b"x" * 10_000)
        assert ask(echo.path, "echo", said=1) == {"said": 1}


def test_more_clients_than_there_is_a_place_for_are_turned_away(echo: ControlServer) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            connected = stack.enter_context(client(echo))
            connected.sendall(b'{"command":"echo"}\n')
            lines(connected, 1)
        with pytest.raises((ControlError, OSError)):
            ask(echo.path, "echo")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(ControlError, OSError):
            assert ask(echo.path, "echo") == {}
            break
        assert time.monotonic() < deadline


def test_asking_where_nobody_answers_names_the_socket(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: No such file"):
        ask(str(tmp_path / "nowhere"), "stats")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        with pytest.raises(OSError, match="silent: timed out"):
            ask(str(tmp_path / "silent"), "stats", timeout=0.1)
