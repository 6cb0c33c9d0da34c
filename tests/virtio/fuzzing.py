"""A hostile guest and a hostile frontend: bytes of all kinds against both devices, checked with a model and canaries.

One process, no threads: a case writes messages, ring memory and requests that begin as
recorded ones and are changed, lets the backends work on them, and looks at what came of it:

* the region's plugged blocks are those of a model that reads the acknowledged requests;
* content is where it was, but for pages that a request named and memory that the rings gave to the device;
* memory of the frontend's file that is not in the table is as it was;
* no descriptor is left open, and nothing but errors of the protocol came out.

    python -m tests.virtio.fuzzing --cases 1000000 --seed 7
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

from attrs import define, field

from sparsemem import Memfd, Region
from sparsemem.virtio import Element, GuestMemory, VirtioBalloon, VirtioMem
from sparsemem.virtio.device import Device
from sparsemem.virtio.vhost_user import Backend
from sparsemem.virtio.vhost_user.channel import Channel, Disconnected
from sparsemem.virtio.vhost_user.messages import ProtocolError, Request
from sparsemem.virtio.vhost_user.session import Session
from tests.virtio.frontend import NEXT, TABLE, USER_BASE, WRITE, Guest, Ring
from tests.virtio.recording import MadeRequest, SentMessage, load_all
from tests.virtio.test_hostile_driver import EDGES, mutated

PAGE = 4096
RAM, HOLE = 32 << 20, (16 << 20, 20 << 20)  # of the guest's file, this part is in no table
BLOCK, NBLOCKS, ADDRESS = 2 << 20, 128, 0x1_4000_0000  # as of the guests that were recorded
RING_SIZE = 64
CANARY = b"canary!!"
PLUG, UNPLUG, UNPLUG_ALL = range(3)
DEADLINE_S = 60


class Broken(AssertionError):
    """What must not be."""


@define(eq=False)
class Wire:
    """One device behind a session, and the frontend's end of its socket."""

    world: World
    device: Device
    backend: Backend
    rings: list[Ring]
    session: Session = field(init=False)
    theirs: socket.socket = field(init=False)
    table_changed: bool = False

    def connect(self) -> None:
        """Begins as any frontend does, so that what comes next gets past it."""
        if hasattr(self, "session"):
            self.close()
        ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.session = Session(self.backend, Channel(ours))
        self.table_changed = False
        self.send(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", 0x18229))
        self.send(Request.SET_FEATURES, struct.pack("<Q", self.backend.offered))
        self.share()
        self.restart()

    def restart(self) -> None:
        """As a driver does that begins anew: all rings are stopped, and then set up."""
        for i in range(len(self.rings)):
            self.send(Request.GET_VRING_BASE, struct.pack("<II", i, 0))
        for i in range(len(self.rings)):
            self.start(i)

    def share(self) -> None:
        world, table, fds = self.world, [], []
        for base, size, fd, offset in (
            (0, HOLE[0], world.guest.fd, 0),
            (HOLE[1], RAM - HOLE[1], world.guest.fd, HOLE[1]),
            (ADDRESS, world.region.size, world.region.fileno(), 0),
        ):
            table.append(struct.pack("<QQQQ", base, size, USER_BASE + base, offset))
            fds.append(fd)
        self.send(Request.SET_MEM_TABLE, struct.pack("<II", len(table), 0) + b"".join(table), fds)

    def start(self, i: int) -> None:
        ring = self.rings[i]
        ring.reset()
        state = struct.Struct("<II")
        self.send(Request.SET_VRING_NUM, state.pack(i, ring.size))
        self.send(Request.SET_VRING_BASE, state.pack(i, 0))
        where = (USER_BASE + ring.descriptors, USER_BASE + ring.used, USER_BASE + ring.available)
        self.send(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", i, 0, *where, 0))
        self.send(Request.SET_VRING_CALL, struct.pack("<Q", i), [ring.call])
        self.send(Request.SET_VRING_KICK, struct.pack("<Q", i), [ring.kick])
        self.send(Request.SET_VRING_ENABLE, state.pack(i, 1))

    def send(self, request: int, payload: bytes = b"", fds: list[int] | None = None) -> None:
        if not self.feed(struct.pack("<III", request, 1, len(payload)) + payload, fds or []):
            raise Broken(f"{Request(request).name} of an ordinary frontend was refused")

    def feed(self, data: bytes, fds: list[int]) -> bool:
        """Has the session read these bytes; whether the connection still stands."""
        with contextlib.suppress(BlockingIOError):
            socket.send_fds(self.theirs, [data], fds) if data else None
        try:
            while self.session.receive():
                pass
        except (ProtocolError, Disconnected):
            return False
        finally:
            with contextlib.suppress(BlockingIOError):
                while self.theirs.recv(1 << 16):
                    pass
        return self.session.channel.deadline is None  # else half a message

    def serve(self) -> None:
        self.backend.catch_up()
        for vring in self.backend.vrings:
            for _ in range(4):
                if not self.backend.serve(vring):
                    break
        self.session.notify()

    def settle(self) -> None:
        """What a frontend does after trouble: a reset, by which all works again."""
        if self.table_changed:
            self.connect()
        elif self.backend.needs_reset:
            self.restart()
        if self.backend.needs_reset:
            raise Broken(f"a reset does not help: {self.backend.needs_reset}")

    def close(self) -> None:
        self.session.close()
        self.theirs.close()


@define(eq=False)
class World:
    """Both devices over one region and one guest, with canaries, and the model of what is plugged."""

    rng: random.Random
    guest: Guest = field(init=False)
    region: Region = field(init=False)
    wires: list[Wire] = field(init=False)
    canaries: dict[int, bytes] = field(factory=dict)
    plugged: set[int] = field(factory=set)
    given: list[tuple[int, int]] = field(factory=list)  # what the guest let the device have, in this case
    seeds: list[SentMessage | MadeRequest] = field(factory=load_all)
    handled: int = 0
    refused: int = 0

    def __attrs_post_init__(self) -> None:
        self.guest = Guest(RAM)
        self.region = Region(BLOCK * NBLOCKS, block_size=BLOCK, backend=Memfd(), name="fuzzed")
        mem = VirtioMem(self.region, address=ADDRESS, requested_size=BLOCK * NBLOCKS // 2, prealloc=False)
        memory = GuestMemory(regions=[self.region])
        balloon = VirtioBalloon(memory)
        self.wires = [self._wire(mem, GuestMemory(regions=[self.region])), self._wire(balloon, memory)]
        # The rings and buffers lie below; canaries in the rest of what is in the table, and in the hole.
        for address in (*range(8 << 20, HOLE[0], 1 << 20), *range(*HOLE, 256 << 10), *range(HOLE[1], RAM, 1 << 20)):
            self.guest.write(address, CANARY)
            self.canaries[address] = CANARY
        for wire in self.wires:
            wire.connect()

    def _wire(self, device: Device, memory: GuestMemory) -> Wire:
        backend = Backend(type(device).__name__, device, memory)
        rings = [Ring(self.guest, RING_SIZE) for _ in backend.vrings]
        original = device.handle

        def noting(queue: int, element: Element) -> bytes | None:
            self.given += element.room
            answer = original(queue, element)
            self.handled += 1
            if isinstance(device, VirtioMem):
                assert answer is not None
                self._acknowledged(element, answer)
            elif queue == 0:
                frames = struct.unpack(f"<{len(element.data) // 4}I", element.data)
                self.given += [(frame * PAGE, PAGE) for frame in frames]
            return answer

        device.handle = noting  # type: ignore[method-assign]
        return Wire(self, device, backend, rings)

    # ---- the model -------------------------------------------------------------------------

    def _acknowledged(self, element: Element, answer: bytes) -> None:
        operation, address, count = struct.unpack("<H6xQH6x", element.data[:24])
        if answer[:2] != b"\0\0" or operation not in (PLUG, UNPLUG, UNPLUG_ALL):
            return
        first = (address - ADDRESS) // BLOCK
        blocks = set(range(NBLOCKS)) if operation == UNPLUG_ALL else set(range(first, first + count))
        if operation == PLUG:
            self.plugged |= blocks
            for block in blocks:
                at = self.canary_of(block)
                self.region.view(block, 1)[at % BLOCK : at % BLOCK + 8] = CANARY
        else:
            self.plugged -= blocks

    @staticmethod
    def canary_of(block: int) -> int:
        """Where in the region; another page of each block."""
        return block * BLOCK + block * 3 % 512 * PAGE

    def check(self, *, content: bool) -> None:
        """Compares with the model; without `content` only what holds whatever memory the frontend shows."""
        there = {block for first, count in self.region.plugged_runs() for block in range(first, first + count)}
        if there != self.plugged:
            raise Broken(f"plugged are {sorted(there ^ self.plugged)} otherwise than acknowledged")
        given, self.given = self.given, []
        for address, expected in self.canaries.items():
            if self.guest.read(address, 8) != expected:
                if content and not _within(address, given):
                    raise Broken(f"the guest's memory at {address:#x} was not to be touched")
                self.guest.write(address, expected)
        for block in self.plugged:
            at = self.canary_of(block)
            view = self.region.view(block, 1)
            if view[at % BLOCK : at % BLOCK + 8] != CANARY:
                if content and not _within(ADDRESS + at, given):
                    raise Broken(f"block {block} has lost what nobody gave away")
                view[at % BLOCK : at % BLOCK + 8] = CANARY

    # ---- cases -------------------------------------------------------------------------------

    def case(self) -> None:
        """One case."""
        wire = self.rng.choice(self.wires)
        hostile = self.rng.random()
        if hostile < 0.7:
            for _ in range(self.rng.choice((1, 1, 2, 5))):
                self._request(wire)
        elif hostile < 0.75:
            wire.device.config_changed()
            self._resize(wire)
        else:
            for _ in range(self.rng.choice((1, 1, 1, 3, 8))):
                self._message(wire)
            if self.rng.random() < 0.5:
                self._request(wire)
        for each in self.wires:
            each.serve()
        self.refused += any(each.backend.needs_reset for each in self.wires)
        self.check(content=not any(each.table_changed for each in self.wires))
        for each in self.wires:
            each.settle()
        self.given.clear()
        if self.guest._free > 4 << 20:
            self.guest._free = 2 << 20  # the buffers of old cases are nobody's any more

    def _resize(self, wire: Wire) -> None:
        if isinstance(wire.device, VirtioMem):
            wire.device.requested_size = self.rng.randrange(NBLOCKS + 1) * BLOCK
        elif isinstance(wire.device, VirtioBalloon):
            wire.device.target = self.rng.randrange(1 << 16) * PAGE

    def _request(self, wire: Wire) -> None:
        rng = self.rng
        made = [seed for seed in self.seeds if isinstance(seed, MadeRequest) and seed.device == wire.device.device_id]
        seed = rng.choice(made)
        data = seed.data
        if rng.random() < 0.5:
            data = self._sensible(wire, seed)
        if rng.random() < 0.5:
            data = mutated(rng, data)
        queue = seed.queue if rng.random() < 0.9 else rng.randrange(len(wire.rings))
        ring = wire.rings[queue % len(wire.rings)]
        buffers = [self.guest.put(data)] if data else []
        for length in seed.room[:8]:
            room = self.guest.room(min(length, 4096))
            if length >= PAGE:  # a page that is free: anywhere in memory
                address = rng.choice((8 << 20, HOLE[1], ADDRESS)) + rng.randrange(64) * PAGE * rng.choice((1, 16, 512))
                room = type(room)(address, min(length, 4 << 20), writable=True)
            buffers.append(room)
        if not buffers:
            return
        head = ring.chain(buffers, indirect=rng.random() < 0.3)
        if rng.random() < 0.4:
            self._spoil(ring, head)
        ring.offer(head)
        if rng.random() < 0.05:
            where = rng.choice((ring.available, ring.available + 2, ring.used, ring.used + 2))
            self.guest.write(where, rng.randbytes(2))
        ring.notify()

    def _sensible(self, wire: Wire, seed: MadeRequest) -> bytes:
        """A request of the same kind whose numbers mean something here."""
        rng = self.rng
        if isinstance(wire.device, VirtioMem):
            block, count = rng.randrange(NBLOCKS), rng.choice((1, 1, 2, 8, 32))
            return struct.pack("<H6xQH6x", rng.choice((0, 0, 0, 1, 1, 2, 3)), ADDRESS + block * BLOCK, count)
        if seed.queue < 2:
            start = rng.choice((0, 2048, HOLE[1] // PAGE, ADDRESS // PAGE, rng.randrange(1 << 21)))
            return b"".join(struct.pack("<I", start + rng.randrange(512)) for _ in range(rng.choice((1, 16, 256))))
        return seed.data

    def _spoil(self, ring: Ring, head: int) -> None:
        """Changes descriptors as no driver would."""
        rng = self.rng
        for _ in range(rng.choice((1, 1, 2, 4))):
            slot = head if rng.random() < 0.6 else rng.randrange(ring.size)
            raw = self.guest.read(ring.descriptors + 16 * slot, 16)
            address, length, flags, following = struct.unpack("<QIHH", raw)
            what = rng.randrange(5)
            if what == 0:
                address = rng.choice((*EDGES, address ^ 1 << rng.randrange(64), HOLE[0] - 8, ADDRESS, ring.descriptors))
            elif what == 1:
                length = rng.choice((0, 1, 24, 4096, 65536, 0xFFFFFFFF, length ^ 1 << rng.randrange(32)))
            elif what == 2:
                flags = rng.choice((0, NEXT, WRITE, TABLE, NEXT | WRITE, NEXT | TABLE, rng.randrange(1 << 16)))
            elif what == 3:
                following = rng.choice((head, slot, rng.randrange(ring.size), ring.size, 0xFFFF))
            else:
                self.guest.write(ring.descriptors + 16 * slot, rng.randbytes(16))
                continue
            ring.describe(slot, address, length, flags, following)

    def _message(self, wire: Wire) -> None:
        rng = self.rng
        seed = rng.choice([seed for seed in self.seeds if isinstance(seed, SentMessage)])
        data = self._rebased(seed.data)
        if rng.random() < 0.8:
            cut = rng.choice((0, 12, 12, 12))
            data = data[:cut] + mutated(rng, data[cut:])
            if rng.random() < 0.7 and len(data) >= 12:  # a size that fits gets further
                data = data[:8] + struct.pack("<I", len(data) - 12) + data[12:]
        number = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
        count = seed.descriptors if rng.random() < 0.9 else rng.randrange(12)
        wire.table_changed |= number in (
            Request.SET_MEM_TABLE,
            Request.ADD_MEM_REG,
            Request.REM_MEM_REG,
            Request.SET_VRING_ADDR,
        )
        with self._descriptors(count) as fds:
            if not wire.feed(data, fds):
                wire.connect()

    def _rebased(self, data: bytes) -> bytes:
        """A recorded message with addresses that this frontend has."""
        number = struct.unpack_from("<I", data)[0]
        if number == Request.SET_VRING_ADDR and len(data) == 52:
            wire = self.rng.choice(self.wires)
            ring = self.rng.choice(wire.rings)
            where = (USER_BASE + ring.descriptors, USER_BASE + ring.used, USER_BASE + ring.available)
            return data[:20] + struct.pack("<QQQ", *where) + data[44:]
        return data

    @contextlib.contextmanager
    def _descriptors(self, count: int) -> Iterator[list[int]]:
        """Descriptors of all kinds, closed again: what the backend has is its own."""
        makers: list[Callable[[], int]] = [
            lambda: os.eventfd(0, os.EFD_NONBLOCK),
            lambda: os.eventfd(0),
            lambda: os.dup(self.guest.fd),
            lambda: os.dup(self.region.fileno()),
            lambda: os.open("/dev/null", os.O_RDWR),
            lambda: os.memfd_create("small"),
            lambda: os.open("/dev/shm", os.O_RDONLY),
            lambda: socket.socket(socket.AF_UNIX).detach(),
        ]
        fds = [self.rng.choice(makers)() for _ in range(count)]
        try:
            yield fds
        finally:
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        for wire in self.wires:
            wire.close()
            wire.backend.close()
            for ring in wire.rings:
                ring.close()
            if isinstance(wire.device, VirtioBalloon):
                wire.device.close()
        self.region.close()
        self.guest.close()


def _within(address: int, given: list[tuple[int, int]]) -> bool:
    return any(start < address + 8 and address < start + length for start, length in given)


def fuzz(seed: int, cases: int, seconds: float = float("inf"), tell: Callable[[str], object] = lambda _: None) -> int:
    """Runs so many cases, or for so long; how many there were.

    Raises:
        Broken: A promise did not hold; says at which case.
    """
    end, done = time.monotonic() + seconds, 0
    world = World(random.Random(seed))
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        while done < cases and time.monotonic() < end:
            if done % 500 == 0:
                faulthandler.dump_traceback_later(DEADLINE_S, exit=True)  # a hang is a failure, too
                if len(os.listdir("/proc/self/fd")) > descriptors + 64:
                    raise Broken(f"{len(os.listdir('/proc/self/fd')) - descriptors} descriptors were left open")
            try:
                world.case()
            except Exception as error:
                raise Broken(f"seed {seed}, case {done}: {type(error).__name__}: {error}") from error
            done += 1
            if done % 20_000 == 0:
                tell(f"{done} cases, {world.handled} requests handled, {world.refused} resets")
        for wire in world.wires:
            wire.connect()
        if len(os.listdir("/proc/self/fd")) > descriptors:
            raise Broken(f"seed {seed}: descriptors were left open")
    finally:
        faulthandler.cancel_dump_traceback_later()
        world.close()
    tell(f"seed {seed}: {done} cases, {world.handled} requests handled, {world.refused} resets: all held")
    return done


def main() -> int:
    """As a program: the nightly form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    logging.getLogger("sparsemem").setLevel(logging.CRITICAL)
    print(f"seed {options.seed}", flush=True)
    fuzz(options.seed, options.cases, tell=lambda text: print(text, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
