"""Split virtqueues: what a driver may do works, and what it may not is refused before anything happens."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.virtio.device import Element, GuestError
from sparsemem.virtio.guest_memory import FileRange, GuestMemory, GuestMemoryError
from sparsemem.virtio.queue import EVENT_IDX, INDIRECT, MAX_DATA, Queue, Rings, check_room
from tests.virtio.frontend import NEXT, TABLE, WRITE, Buffer, Guest, Ring

BOTH = INDIRECT | EVENT_IDX


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(4 << 20, base=1 << 20)
    yield guest
    guest.close()


@pytest.fixture
def memory(guest: Guest) -> Iterator[GuestMemory]:
    with GuestMemory([FileRange(guest.base, guest.size, guest.fd)]) as memory:
        yield memory


@pytest.fixture
def ring(guest: Guest) -> Iterator[Ring]:
    ring = Ring(guest, 16)
    yield ring
    ring.close()


def queue_of(memory: GuestMemory, ring: Ring, features: int = BOTH, base: int | None = None) -> Queue:
    rings = Rings(ring.size, ring.descriptors, ring.available, ring.used)
    return Queue(memory, rings, features=features, base=ring.used_index() if base is None else base)


def untouched(guest: Guest, ring: Ring) -> bytes:
    """What only the device writes."""
    return guest.read(ring.used + 2, 2 + 8 * ring.size)


# ---- what a driver may do ---------------------------------------------------------------


@pytest.mark.parametrize("features", [0, INDIRECT, EVENT_IDX, BOTH])
@pytest.mark.parametrize("indirect", [False, True])
def test_a_request_is_a_copy_of_what_may_be_read_and_the_room_that_may_be_written(
    memory: GuestMemory, guest: Guest, ring: Ring, features: int, indirect: bool
) -> None:
    if indirect and not features & INDIRECT:
        return
    queue = queue_of(memory, ring, features)
    parts = [guest.put(b"one "), guest.put(b"two"), guest.room(4), guest.room(100)]
    head = ring.chain(parts, indirect=indirect)
    ring.offer(head)
    chain = queue.pop()
    assert chain is not None
    guest.write(parts[0].address, b"gone")
    assert chain.element == Element(b"one two", ((parts[2].address, 4), (parts[3].address, 100)))
    assert queue.pop() is None
    assert queue.push(chain, b"answer")
    assert guest.read(parts[2].address, 4) + guest.read(parts[3].address, 2) == b"answer"
    assert ring.used_index() == 1
    assert ring.used_entry(0) == (head, 6)


def test_direct_buffers_may_come_before_an_indirect_table_whose_write_flag_says_nothing(
    memory: GuestMemory, guest: Guest, ring: Ring
) -> None:
    data, room = guest.put(b"abc"), guest.room(8)
    table = guest.put(struct.pack("<QIHH", room.address, room.length, WRITE, 0))
    ring.describe(0, data.address, data.length, NEXT, 1)
    ring.describe(1, table.address, table.length, TABLE | WRITE)
    ring.offer(0)
    chain = queue_of(memory, ring).pop()
    assert chain is not None
    assert chain.element == Element(b"abc", ((room.address, 8),))


def test_a_queue_goes_on_at_the_used_index_whatever_was_taken_before(
    memory: GuestMemory, guest: Guest, ring: Ring
) -> None:
    first = queue_of(memory, ring)
    for text in (b"a", b"b", b"c"):
        ring.offer(ring.chain([guest.put(text)]))
    chains = [first.pop() for _ in range(3)]
    assert chains[0] is not None
    first.push(chains[0], b"")
    # The other side knows of three that were taken; two have no answer.
    again = queue_of(memory, ring, base=3)
    found = [again.pop(), again.pop()]
    assert [chain.element.data for chain in found if chain] == [b"b", b"c"]
    assert again.pop() is None
    again.rewind()
    chain = again.pop()
    assert chain is not None
    assert chain.element.data == b"b"


def test_indices_wrap(memory: GuestMemory, guest: Guest, ring: Ring) -> None:
    start = 0xFFFE
    for where in (ring.available + 2, ring.used + 2):
        guest.write(where, struct.pack("<H", start))
    ring.added = ring.seen = start
    queue = queue_of(memory, ring)
    for i in range(5):
        ring.offer(ring.chain([guest.put(b"%d" % i)]))
        chain = queue.pop()
        assert chain is not None
        assert (chain.index, chain.element.data) == ((start + i) % (1 << 16), b"%d" % i)
        queue.push(chain, b"")
    assert ring.used_index() == 3


def test_without_event_index_the_drivers_flag_says_whether_it_wants_interrupts(
    memory: GuestMemory, guest: Guest, ring: Ring
) -> None:
    queue = queue_of(memory, ring, 0)
    for flag, wanted in ((0, True), (1, False), (0, True)):
        guest.write(ring.available, struct.pack("<H", flag))
        ring.offer(ring.chain([guest.put(b"x")]))
        chain = queue.pop()
        assert chain is not None
        assert queue.push(chain, b"") is wanted


@given(events=st.lists(st.integers(0, 9), min_size=1, max_size=30), start=st.sampled_from([0, 5, 0xFFF8]))
def test_with_event_index_there_is_an_interrupt_when_the_index_passes_the_drivers(
    events: list[int], start: int
) -> None:
    guest = Guest(1 << 20)
    ring = Ring(guest, 16)
    for where in (ring.available + 2, ring.used + 2):
        guest.write(where, struct.pack("<H", start))
    ring.added = start
    try:
        with GuestMemory([FileRange(guest.base, guest.size, guest.fd)]) as memory:
            queue = queue_of(memory, ring)
            for ahead in events:
                used = ring.used_index()
                event = (used + ahead - 4) % (1 << 16)
                guest.write(ring.available + 4 + 2 * ring.size, struct.pack("<H", event))
                ring.offer(ring.chain([guest.put(b"x")]))
                chain = queue.pop()
                assert chain is not None
                # One entry is added: the index passes `event` if that is where it stood.
                assert queue.push(chain, b"") is (event == used)
    finally:
        ring.close()
        guest.close()


def test_with_event_index_the_driver_is_told_up_to_where_requests_were_taken(
    memory: GuestMemory, guest: Guest, ring: Ring
) -> None:
    queue = queue_of(memory, ring)
    ring.offer(ring.chain([guest.put(b"x")]))
    assert queue.pop() is not None
    assert queue.pop() is None
    assert struct.unpack("<H", guest.read(ring.used + 4 + 8 * ring.size, 2))[0] == 1
    assert struct.unpack("<H", guest.read(ring.used, 2))[0] == 0, "notifications are not suppressed by the flag"


def test_what_fits_in_the_largest_request_is_taken(memory: GuestMemory, guest: Guest, ring: Ring) -> None:
    ring.offer(ring.chain([guest.put(b"x" * MAX_DATA)]))
    chain = queue_of(memory, ring).pop()
    assert chain is not None
    assert len(chain.element.data) == MAX_DATA


def test_an_answer_needs_its_room() -> None:
    check_room(Element(b"", ((0, 4), (100, 6))), b"0123456789")
    with pytest.raises(GuestError, match="room for 10 bytes, where the answer has 11"):
        check_room(Element(b"", ((0, 4), (100, 6))), b"0123456789x")


# ---- what it may not ------------------------------------------------------------------------


def one_descriptor(address: int, length: int, flags: int = 0, following: int = 0) -> Callable[[Guest, Ring], None]:
    def make(guest: Guest, ring: Ring) -> None:
        ring.describe(0, address or guest.base, length, flags, following)

    return make


def loop_of(length: int) -> Callable[[Guest, Ring], None]:
    def make(guest: Guest, ring: Ring) -> None:
        for i in range(length):
            ring.describe(i, guest.base, 1, NEXT, (i + 1) % length)

    return make


def write_then_read(guest: Guest, ring: Ring) -> None:
    ring.describe(0, guest.base, 8, WRITE | NEXT, 1)
    ring.describe(1, guest.base, 8)


def table_of(*descriptors: tuple[int, int, int, int], cut: int = 0) -> Callable[[Guest, Ring], None]:
    def make(guest: Guest, ring: Ring) -> None:
        raw = b"".join(struct.pack("<QIHH", address or guest.base, *rest) for address, *rest in descriptors)
        at = guest.put(raw)
        ring.describe(0, at.address, at.length - cut, TABLE)

    return make


def huge_data(guest: Guest, ring: Ring) -> None:
    ring.describe(0, guest.base, MAX_DATA, NEXT, 1)
    ring.describe(1, guest.base, 1)


def huge_room(guest: Guest, ring: Ring) -> None:
    for i in range(3):
        ring.describe(i, guest.base, 0x7FFF_FFFF, WRITE | NEXT, i + 1)
    ring.describe(3, guest.base, 1, WRITE)


def beyond(guest: Guest, ring: Ring) -> None:
    ring.describe(0, guest.base + guest.size - 8, 16)


REFUSED: dict[str, tuple[Callable[[Guest, Ring], None], str]] = {
    "an empty buffer": (one_descriptor(0, 0), "empty buffer"),
    "below the table": (one_descriptor(0x1000, 8), "guest memory"),
    "past the end of memory": (beyond, "guest memory"),
    "an address that wraps": (one_descriptor((1 << 64) - 8, 16), "guest memory"),
    "a next that is none of the queue": (one_descriptor(0, 8, NEXT, 16), "descriptor 16 of a table with 16"),
    "a descriptor that is its own next": (one_descriptor(0, 8, NEXT, 0), "or a loop"),
    "a loop of two": (loop_of(2), "or a loop"),
    "a loop of all": (loop_of(16), "or a loop"),
    "something to read after something to write": (write_then_read, "to read after something to write"),
    "more than a request may have": (huge_data, "65537 bytes"),
    "more than 4 GiB in all": (huge_room, "more than 4 GiB"),
    "a room that is not all memory": (one_descriptor(0, 0x7FFF_FFFF, WRITE), "guest memory"),
    "an indirect table of half an entry": (table_of((0, 8, 0, 0), cut=8), "indirect table of 8 bytes"),
    "an empty indirect table": (one_descriptor(0, 0, TABLE), "indirect table of 0 bytes"),
    "an indirect table longer than the queue": (table_of(*[(0, 8, 0, 0)] * 17), "indirect table of 272 bytes"),
    "an indirect table in an indirect table": (table_of((0, 16, TABLE, 0)), "indirect descriptor"),
    "an indirect table that has a next": (one_descriptor(0, 16, TABLE | NEXT, 1), "indirect descriptor"),
    "a loop in an indirect table": (table_of((0, 8, NEXT, 1), (0, 8, NEXT, 0)), "or a loop"),
    "a next beyond an indirect table": (table_of((0, 8, NEXT, 1)), "descriptor 1 of a table with 1"),
    "an indirect table outside of memory": (one_descriptor(0x1000, 16, TABLE), "guest memory"),
}


@pytest.mark.promise("hostile-guest-is-contained")
@pytest.mark.parametrize("name", REFUSED)
def test_a_chain_that_no_driver_may_make_is_refused_and_nothing_changes(
    memory: GuestMemory, guest: Guest, ring: Ring, name: str
) -> None:
    make, why = REFUSED[name]
    make(guest, ring)
    ring.offer(0)
    queue = queue_of(memory, ring)
    before = untouched(guest, ring)
    for _ in range(2):  # it stays the next, whatever it is
        with pytest.raises(GuestError, match=why):
            queue.pop()
    assert untouched(guest, ring) == before
    assert queue.used == 0
    assert not queue.unanswered


def test_an_indirect_table_that_was_not_negotiated_is_refused(memory: GuestMemory, guest: Guest, ring: Ring) -> None:
    ring.offer(ring.chain([guest.put(b"x")], indirect=True))
    with pytest.raises(GuestError, match="indirect descriptor"):
        queue_of(memory, ring, EVENT_IDX).pop()


@pytest.mark.parametrize("ahead", [17, 1000, 0x8000, 0xFFFF])
def test_an_available_index_further_than_the_queue_is_long_is_refused(
    memory: GuestMemory, guest: Guest, ring: Ring, ahead: int
) -> None:
    queue = queue_of(memory, ring)
    guest.write(ring.available + 2, struct.pack("<H", ahead))
    with pytest.raises(GuestError, match=f"an available index of {ahead}"):
        queue.pop()


def test_a_head_that_is_none_of_the_queue_is_refused(memory: GuestMemory, ring: Ring) -> None:
    ring.offer(16)
    with pytest.raises(GuestError, match="descriptor 16 of a queue with 16"):
        queue_of(memory, ring).pop()


RINGS: dict[str, tuple[dict[str, int], str]] = {
    "no entries": ({"size": 0}, "0 entries"),
    "no power of two": ({"size": 12}, "12 entries"),
    "too many": ({"size": 1 << 16}, "65536 entries"),
    "descriptors not aligned": ({"descriptors": 0x101008}, "descriptor table at 0x101008 is not aligned to 16"),
    "available not aligned": ({"available": 0x110001}, "available ring at 0x110001 is not aligned to 2"),
    "used not aligned": ({"used": 0x120002}, "used ring at 0x120002 is not aligned to 4"),
    "descriptors outside": ({"descriptors": 0}, "guest memory"),
    "used at the very end": ({"used": (5 << 20) - 4}, "guest memory"),
    "used over the descriptors": ({"used": 0x100010}, "descriptor table and the used ring overlap"),
    "available over the used": ({"available": 0x120002}, "used ring and the available ring overlap"),
    "an end that wraps": ({"descriptors": (1 << 64) - 16}, "guest memory"),
}


@pytest.mark.promise("hostile-guest-is-contained")
@pytest.mark.parametrize("name", RINGS)
def test_rings_that_no_driver_may_make_are_refused(memory: GuestMemory, name: str) -> None:
    changed, why = RINGS[name]
    good = {"size": 16, "descriptors": 0x100000, "available": 0x110000, "used": 0x120000}
    Rings(**good).check(memory)
    with pytest.raises(GuestError, match=why):
        Rings(**good | changed).check(memory)


def test_a_base_before_the_used_index_or_far_beyond_it_is_refused(
    memory: GuestMemory, guest: Guest, ring: Ring
) -> None:
    guest.write(ring.used + 2, struct.pack("<H", 5))
    for base in (4, 5 + 17):
        with pytest.raises(GuestError, match=f"a base of {base} where the used index is 5"):
            queue_of(memory, ring, base=base)
    queue_of(memory, ring, base=5 + 16)


def test_memory_that_is_truncated_underneath_is_an_error_and_no_sigbus(
    memory: GuestMemory, guest: Guest, ring: Ring
) -> None:
    queue = queue_of(memory, ring)
    ring.offer(ring.chain([guest.put(b"x")]))
    chain = queue.pop()
    assert chain is not None
    os.ftruncate(guest.fd, 0)
    for access in (queue.pop, lambda: queue.push(chain, b"")):
        with pytest.raises(GuestMemoryError, match="truncated underneath"):
            access()
    os.ftruncate(guest.fd, guest.size)


# ---- anything at all ---------------------------------------------------------------------------


@pytest.mark.promise("hostile-guest-is-contained")
@settings(max_examples=300)
@given(data=st.data())
def test_whatever_the_driver_writes_a_request_is_whole_or_refused(data: st.DataObject) -> None:
    guest = Guest(1 << 20, base=1 << 20)
    ring = Ring(guest, 8)
    addresses = st.sampled_from([0, guest.base, guest.base + 0x8000, guest.base + guest.size - 8, (1 << 64) - 8])
    lengths = st.sampled_from([0, 1, 8, 16, 32, 128, MAX_DATA, MAX_DATA + 1, 0xFFFFFFFF])
    try:
        with GuestMemory([FileRange(guest.base, guest.size, guest.fd)]) as memory:
            for where in [ring.descriptors, guest.base + 32768]:
                for i in range(8):
                    flags, following = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 9))
                    raw = struct.pack("<QIHH", data.draw(addresses), data.draw(lengths), flags, following)
                    guest.write(where + 16 * i, raw)
            ring.offer(data.draw(st.integers(0, 9)))
            queue = queue_of(memory, ring)
            before = guest.read(guest.base, guest.size)
            try:
                chain = queue.pop()
            except GuestError:
                chain = None
            assert guest.read(guest.base, guest.size) == before, "taking a request changes nothing"
            if chain is not None:
                assert len(chain.element.data) <= MAX_DATA
                for address, length in chain.element.room:
                    assert length > 0
                    assert guest.base <= address
                    assert address + length <= guest.base + guest.size
                queue.push(chain, b"")
                assert ring.used_index() == 1
    finally:
        ring.close()
        guest.close()


class _Counting:
    """Memory that counts how often each byte is read."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory, self.reads = memory, dict[int, int]()

    def read(self, address: int, length: int) -> bytes:
        for at in range(address, address + length):
            self.reads[at] = self.reads.get(at, 0) + 1
        return self.memory.read(address, length)

    def __getattr__(self, name: str) -> object:
        return getattr(self.memory, name)


@pytest.mark.promise("hostile-guest-is-contained")
@pytest.mark.parametrize("indirect", [False, True])
def test_every_field_is_read_once_so_that_the_guest_cannot_change_it_after_the_check(
    memory: GuestMemory, guest: Guest, ring: Ring, indirect: bool
) -> None:
    counting = _Counting(memory)
    buffers = [guest.put(b"some"), guest.put(b"data"), Buffer(guest.allocate(8), 8, writable=True)]
    ring.offer(ring.chain(buffers, indirect=indirect))
    rings = Rings(ring.size, ring.descriptors, ring.available, ring.used)
    queue = Queue(counting, rings, features=BOTH, base=0)  # type: ignore[arg-type]
    assert queue.pop() is not None
    assert counting.reads
    assert set(counting.reads.values()) == {1}
