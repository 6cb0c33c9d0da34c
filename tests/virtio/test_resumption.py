"""A backend that is killed between any two steps: the next one answers the same, and loses nothing.

The region is a file and the guest's memory a memfd, both of which outlive the process; each
child is one life of the backend, and kill -9 its end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from attrs import define, field

import sparsemem.virtio.mem
import sparsemem.virtio.queue
from sparsemem import Region
from sparsemem._sys import calls, replace
from sparsemem._sys.descriptor import Descriptor
from sparsemem.backends import File, Memfd
from sparsemem.virtio.guest_memory import FileRange, GuestMemory
from sparsemem.virtio.mem import VirtioMem
from sparsemem.virtio.queue import EVENT_IDX, INDIRECT, Rings
from sparsemem.virtio.vhost_user import Backend, Journal, StateError, backend, state
from sparsemem.virtio.vhost_user.backend import VERSION_1
from sparsemem.virtio.vhost_user.service import region_for
from tests.support.children import run_child
from tests.virtio.devices import Echo
from tests.virtio.frontend import Buffer, Guest, Ring

BLOCK = 64 << 10
SIZE = 64 * BLOCK
ADDRESS = 1 << 32
PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)
ACK, NACK, BUSY, ERROR = range(4)
OURS = {module.__file__ for module in (backend, state, replace, sparsemem.virtio.queue, sparsemem.virtio.mem)}
DEEPER = OURS | {
    module.__file__
    for name, module in sys.modules.items()
    if name in ("sparsemem.region", "sparsemem.engine", "sparsemem.blocks") or name.startswith("sparsemem.operations.")
}


@define
class Scene:
    """What outlives a backend: the region's file, its state file, and the guest with its ring."""

    folder: Path
    guest: Guest
    ring: Ring
    head: int = 0
    room: Buffer = field(factory=lambda: Buffer(0, 0))

    @property
    def file(self) -> str:
        return str(self.folder / "region")

    @property
    def state(self) -> str:
        return str(self.folder / "state")

    def begin(self) -> tuple[Region, Backend]:
        """A life of the backend begins: from what the last one has left."""
        region = region_for(SIZE, File(self.file), block_size=BLOCK, state=self.state)
        device = VirtioMem(region, address=ADDRESS, requested_size=SIZE // 2)
        serving = Backend("mem", device, GuestMemory(), Journal(self.state, device.device_id))
        attach(serving, self.guest, self.ring)
        return region, serving

    def offer(self, operation: int, block: int = 0, count: int = 0) -> None:
        request = struct.pack("<H6xQH6x", operation, ADDRESS + block * BLOCK, count)
        self.room = self.guest.room(10)
        self.head = self.ring.chain([self.guest.put(request), self.room])
        self.ring.offer(self.head)

    @property
    def answer(self) -> tuple[int, int]:
        """The response's type and state."""
        found = struct.unpack("<H6xH", self.guest.read(self.room.address, 10))
        return found[0], found[1]

    def fresh(self) -> None:
        """As before anything was."""
        for path in self.folder.iterdir():
            path.unlink()
        self.ring.reset()


def attach(serving: Backend, guest: Guest, ring: Ring) -> None:
    """What a session does when a frontend starts a ring at the used index."""
    serving.memory.replace([FileRange(guest.base, guest.size, guest.fd)])
    serving.negotiate(VERSION_1 | INDIRECT | EVENT_IDX | serving.device.features)
    vring = serving.vrings[0]
    vring.size = ring.size
    vring.rings = Rings(ring.size, ring.descriptors, ring.available, ring.used)
    vring.base = ring.used_index()
    vring.kick = Descriptor(os.dup(ring.kick), calls.kernel)
    vring.enabled = True


@pytest.fixture
def scene() -> Iterator[Scene]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    guest = Guest(1 << 20)
    ring = Ring(guest, 16)
    yield Scene(folder, guest, ring)
    ring.close()
    guest.close()
    shutil.rmtree(folder)


def killed_at(n: int, files: set[str | None], work: Callable[[], Any]) -> int:
    """Kills this process at the nth line of these files; the lines that there were, if that is never."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    work()
    sys.settrace(None)
    return count


PLAN: dict[str, tuple[tuple[int, int, int], list[tuple[int, int]]]] = {
    # the request that is cut off, with blocks 0 to 9 plugged before, and what is plugged after it
    "plug": ((PLUG, 20, 4), [(0, 10), (20, 4)]),
    "unplug": ((UNPLUG, 2, 3), [(0, 2), (5, 5)]),
    "unplug all": ((UNPLUG_ALL, 0, 0), []),
    "state": ((STATE, 0, 10), [(0, 10)]),
    "a plug that is an error": ((PLUG, 8, 4), [(0, 10)]),
    "a plug of too much": ((PLUG, 10, 30), [(0, 10)]),
}
CHANGING = ["plug", "unplug", "unplug all"]
ANSWERS = {"a plug that is an error": (ERROR, 0), "a plug of too much": (NACK, 0)}


def first_life(scene: Scene, name: str, n: int, files: set[str | None]) -> int:
    region, serving = scene.begin()
    scene.offer(PLUG, 0, 10)
    serving.serve(serving.vrings[0])
    assert scene.answer == (ACK, 0)
    for block in range(10):
        region.view(block, 1)[:8] = b"canary%02d" % block
    scene.offer(*PLAN[name][0])
    return killed_at(n, files, lambda: serving.serve(serving.vrings[0]))


def second_life(scene: Scene, name: str) -> None:
    region, serving = scene.begin()
    while serving.serve(serving.vrings[0]):
        pass
    assert not serving.needs_reset
    plugged = PLAN[name][1]
    assert list(region.plugged_runs()) == plugged
    for first, count in plugged:
        for block in range(first, first + count):
            expected = b"canary%02d" % block if block < 10 else bytes(8)
            assert region.view(block, 1)[:8] == expected
    # Nothing is left of what was half done: the file holds what is plugged, and no more.
    assert os.stat(scene.file).st_blocks * 512 == region.plugged_size
    again = Journal(scene.state, VirtioMem.device_id).load()
    assert again is not None
    assert [tuple(run) for run in again[0]["plugged"]] == plugged


def survive(scene: Scene, name: str, files: set[str | None], step: int) -> None:
    n, lines = 1, 1 << 30
    while n <= lines:
        scene.fresh()
        # The child's writes to the guest are seen here, but not what it knows of them: so it is told first.
        scene.guest._free = 0x4000
        scene.ring.added, scene.ring._head = 0, 0
        ended = run_child(first_life, scene, name, n, files)
        if ended.signal is None:
            lines = ended.result()
            assert n > lines
        scene.ring.added, scene.ring._head = 2, 4
        replay(scene, name)
        assert scene.ring.used_index() in (1, 2)
        run_child(second_life, scene, name).result()
        assert scene.ring.used_index() == 2
        assert scene.ring.used_entry(1) == (scene.head, 10)
        assert scene.answer == ANSWERS.get(name, (ACK, 0)), f"killed at line {n}"
        n += step


def replay(scene: Scene, name: str) -> None:
    """Finds out where the child has put its second request."""
    scene.guest._free = 0x4000
    scene.ring.added, scene.ring._head = 0, 0
    kept = scene.guest.read(0, scene.guest.size)
    scene.offer(PLUG, 0, 10)
    scene.offer(*PLAN[name][0])
    scene.guest.write(0, kept)


@pytest.mark.promise("restarted-backend-answers-the-same")
@pytest.mark.slow
@pytest.mark.parametrize("name", PLAN)
def test_killed_at_any_line_the_request_is_answered_the_same_way(scene: Scene, name: str) -> None:
    survive(scene, name, OURS, 1 if name in CHANGING else 7)


@pytest.mark.promise("restarted-backend-answers-the-same")
@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGING)
def test_killed_in_the_midst_of_the_regions_own_work_too(scene: Scene, name: str) -> None:
    survive(scene, name, DEEPER, 3)


@pytest.mark.promise("restarted-backend-answers-the-same")
@pytest.mark.parametrize("name", PLAN)
def test_killed_here_and_there(scene: Scene, name: str) -> None:
    survive(scene, name, OURS, 29)


# ---- without being killed -------------------------------------------------------------------


@pytest.mark.promise("restarted-backend-answers-the-same")
def test_an_answer_that_was_recorded_and_not_given_is_given_without_doing_it_again(scene: Scene) -> None:
    region, serving = scene.begin()
    scene.offer(PLUG, 0, 4)
    chain = serving.vrings[0].ready(serving.memory, serving.features)
    assert chain is not None

    class Cut(Exception):
        pass

    def cut(*_: object) -> bool:
        raise Cut

    queue = serving.vrings[0].queue
    assert queue is not None
    original = type(queue).push
    try:
        type(queue).push = cut  # type: ignore[method-assign]
        serving.serve(serving.vrings[0])
    finally:
        type(queue).push = original  # type: ignore[method-assign]
    assert serving.needs_reset
    assert region.plugged_size == 4 * BLOCK
    # The same process, and another ring start: a plug done twice would be an ERROR.
    serving.vrings[0].stop()
    serving.recover()
    attach(serving, scene.guest, scene.ring)
    serving.serve(serving.vrings[0])
    assert scene.answer == (ACK, 0)
    assert dict(serving.device.answers) == {(PLUG, ACK): 1}  # type: ignore[attr-defined]
    serving.close()
    region.close()


@pytest.mark.promise("restarted-backend-answers-the-same")
def test_another_request_at_the_same_place_is_not_given_the_recorded_answer(scene: Scene) -> None:
    region, serving = scene.begin()
    scene.offer(PLUG, 0, 4)
    serving.serve(serving.vrings[0])
    serving.close()
    region.close()
    # A guest that has begun anew: its first request has the index of the recorded one.
    scene.ring.reset()
    region, serving = scene.begin()
    scene.offer(UNPLUG_ALL)
    serving.serve(serving.vrings[0])
    assert scene.answer == (ACK, 0)
    assert region.plugged_size == 0
    serving.close()
    region.close()


@pytest.mark.promise("restarted-backend-answers-the-same")
def test_what_cannot_be_recorded_is_not_answered_until_it_can(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    region, serving = scene.begin()
    scene.offer(PLUG, 0, 4)
    scene.ring.notify()

    def full(path: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(replace, "replace", full)
        for _ in range(3):
            assert not serving.serve(serving.vrings[0])
        assert scene.ring.used_index() == 0
        assert (
            serving.stats().trouble == f"{scene.state}: No space left on device: requests wait until it can be written"
        )
        assert len(caplog.records) == 1, "said once"
    serving.serve(serving.vrings[0])
    assert scene.answer == (ACK, 0)
    assert serving.stats().trouble == ""
    assert dict(serving.device.answers) == {(PLUG, ACK): 1}, "it was done once"  # type: ignore[attr-defined]
    serving.close()
    region.close()


def test_requests_are_recorded_only_when_they_change_the_state(scene: Scene) -> None:
    class Quiet(Echo):
        def save(self) -> dict[str, object]:
            return {"counter": self.counter // 10}

    serving = Backend("echo", Quiet(), GuestMemory(), Journal(scene.state, 42))
    attach(serving, scene.guest, scene.ring)
    for _ in range(25):
        scene.ring.offer(scene.ring.chain([scene.guest.put(b"x")]))
        serving.serve(serving.vrings[0])
    assert scene.ring.used_index() == 25
    assert serving.stats().records == 1 + 2
    serving.close()


def test_what_the_host_changes_is_recorded_too(scene: Scene) -> None:
    region, serving = scene.begin()
    serving.device.requested_size = 3 * BLOCK  # type: ignore[attr-defined]
    serving.catch_up()
    serving.close()
    region.close()
    region, serving = scene.begin()
    assert serving.device.requested_size == 3 * BLOCK, "and not what the command line says"  # type: ignore[attr-defined]
    serving.close()
    region.close()


# ---- the file ---------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.mark.promise("private-to-its-user")
def test_the_state_file_is_its_users_alone_and_replaced_as_a_whole(path: Path) -> None:
    journal = Journal(str(path), 42)
    assert journal.load() is None
    before = os.umask(0)
    try:
        journal.record({"counter": 1}, None)
        inode = path.stat().st_ino
        (path.parent / "state.new").write_text("left by a crash")
        journal.record({"counter": 2}, state.Answer(0, 5, "ab", "cd"))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_ino != inode
    assert os.listdir(path.parent) == ["state"]
    assert journal.load() == ({"counter": 2}, state.Answer(0, 5, "ab", "cd"))
    assert journal.written == 2


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    content = how(path.read_bytes())
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o600)


def checksummed(body: bytes) -> bytes:
    import hashlib

    return f"sparsemem-vhost-user-state 1 {hashlib.sha256(body).hexdigest()}\n".encode() + body


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (lambda content: content[:-1], "checksum"),
        (lambda content: content.replace(b"1}", b"2}"), "checksum"),
        (lambda content: content + b" ", "checksum"),
        (lambda content: b"", "no state file of this version"),
        (lambda content: bytes(100), "no state file of this version"),
        (lambda content: content.replace(b"state 1", b"state 2"), "no state file of this version"),
        (lambda content: content.split(b"\n")[1], "no state file of this version"),
        (lambda content: checksummed(b"{}"), "not what was ever written"),
        (lambda content: checksummed(b"[1]"), "not what was ever written"),
        (lambda content: checksummed(b"\xff"), "not what was ever written"),
        (lambda content: checksummed(json.dumps({"device": 42, "state": {}, "answer": {"x": 1}}).encode()), "not what"),
        (lambda content: checksummed(json.dumps({"device": 5, "state": {}, "answer": None}).encode()), "a device 5"),
    ],
)
def test_a_damaged_or_foreign_state_file_is_refused_and_left_alone(
    path: Path, how: Callable[[bytes], bytes], why: str
) -> None:
    Journal(str(path), 42).record({"counter": 1}, None)
    damage(path, how)
    before = path.read_bytes()
    with pytest.raises(StateError, match=why):
        Backend("echo", Echo(), GuestMemory(), Journal(str(path), 42))
    assert path.read_bytes() == before


def test_a_state_file_that_others_may_write_to_or_a_link_is_refused(path: Path) -> None:
    Journal(str(path), 42).record({"counter": 1}, None)
    path.chmod(0o622)
    with pytest.raises(StateError, match="others may write"):
        Journal(str(path), 42).load()
    path.chmod(0o600)
    link = path.parent / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        Journal(str(link), 42).load()


def test_a_place_where_nothing_can_be_written_is_known_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Backend("echo", Echo(), GuestMemory(), Journal(str(tmp_path / "nowhere" / "state"), 42))


def test_a_state_that_does_not_fit_is_refused_before_anything_is_discarded(scene: Scene) -> None:
    region, serving = scene.begin()
    scene.offer(PLUG, 0, 4)
    serving.serve(serving.vrings[0])
    region.view(0, 1)[:6] = b"canary"
    serving.close()
    region.close()
    content = Path(scene.file).read_bytes()
    for changed, why in (
        ({"block_size": 2 * BLOCK}, "block_size is 65536 there, and not 131072"),
        ({"size": 2 * SIZE}, "region_size is 4194304 there, and not 8388608"),
        ({"backend": Memfd()}, "begins with nothing"),
        ({"backend": File(scene.file + "-another")}, "begins with nothing"),
    ):
        options: dict[str, Any] = {"size": SIZE, "backend": File(scene.file), "block_size": BLOCK} | changed
        with pytest.raises(StateError, match=why):
            region_for(options["size"], options["backend"], block_size=options["block_size"], state=scene.state)
        assert Path(scene.file).read_bytes() == content
