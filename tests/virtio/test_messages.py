"""vhost-user messages: strict about sizes, flags, numbers and descriptors."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.virtio.vhost_user import channel as channels
from sparsemem.virtio.vhost_user import messages
from sparsemem.virtio.vhost_user.channel import Channel, Disconnected, Message
from sparsemem.virtio.vhost_user.messages import (
    Config,
    Header,
    MemoryRegion,
    ProtocolError,
    Request,
    VringAddress,
    VringDescriptor,
    VringState,
    parse_header,
    parse_payload,
)
from tests.virtio.frontend import Frontend

REGION = struct.pack("<QQQQ", 1, 2, 3, 4)

GOOD: list[tuple[Request, bytes, int, object]] = [
    (Request.GET_FEATURES, b"", 0, None),
    (Request.SET_FEATURES, struct.pack("<Q", 1 << 32), 0, 1 << 32),
    (Request.SET_OWNER, b"", 0, None),
    (Request.RESET_OWNER, b"", 0, None),
    (Request.SET_MEM_TABLE, struct.pack("<II", 0, 7), 0, ()),
    (Request.SET_MEM_TABLE, struct.pack("<II", 2, 0) + REGION * 2, 2, (MemoryRegion(1, 2, 3, 4),) * 2),
    (Request.SET_MEM_TABLE, struct.pack("<II", 8, 0) + REGION * 8, 8, (MemoryRegion(1, 2, 3, 4),) * 8),
    # As user-mode Linux sends it: with room for another.
    (Request.SET_MEM_TABLE, struct.pack("<II", 1, 0) + REGION + bytes(32), 1, (MemoryRegion(1, 2, 3, 4),)),
    (Request.SET_VRING_NUM, struct.pack("<II", 1, 128), 0, VringState(1, 128)),
    (Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 1, 2, 3, 4, 5, 6), 0, VringAddress(1, 2, 3, 4, 5)),
    (Request.SET_VRING_BASE, struct.pack("<II", 1, 5), 0, VringState(1, 5)),
    (Request.GET_VRING_BASE, struct.pack("<II", 1, 0), 0, VringState(1, 0)),
    (Request.SET_VRING_KICK, struct.pack("<Q", 3), 1, VringDescriptor(3, True)),
    (Request.SET_VRING_CALL, struct.pack("<Q", 0x103), 0, VringDescriptor(3, False)),
    (Request.SET_VRING_ERR, struct.pack("<Q", 0xFF), 1, VringDescriptor(0xFF, True)),
    (Request.GET_PROTOCOL_FEATURES, b"", 0, None),
    (Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", 0x229), 0, 0x229),
    (Request.GET_QUEUE_NUM, b"", 0, None),
    (Request.SET_VRING_ENABLE, struct.pack("<II", 1, 1), 0, VringState(1, 1)),
    (Request.SET_BACKEND_REQ_FD, b"", 1, None),
    (Request.GET_CONFIG, struct.pack("<III", 4, 2, 0) + b"\0\0", 0, Config(4, 2, False, b"\0\0")),
    (Request.SET_CONFIG, struct.pack("<III", 4, 2, 1) + b"ab", 0, Config(4, 2, True, b"ab")),
    (Request.GET_MAX_MEM_SLOTS, b"", 0, None),
    (Request.ADD_MEM_REG, bytes(8) + REGION, 1, MemoryRegion(1, 2, 3, 4)),
    (Request.REM_MEM_REG, bytes(8) + REGION, 0, MemoryRegion(1, 2, 3, 4)),
    (Request.REM_MEM_REG, bytes(8) + REGION, 1, MemoryRegion(1, 2, 3, 4)),
    (Request.SET_STATUS, struct.pack("<Q", 15), 0, 15),
    (Request.GET_STATUS, b"", 0, None),
]


def test_every_request_is_here() -> None:
    assert {request for request, *_ in GOOD} == set(Request)


@pytest.mark.parametrize(("request_", "data", "descriptors", "payload"), GOOD)
def test_a_payload_of_the_right_size_is_read(request_: Request, data: bytes, descriptors: int, payload: object) -> None:
    assert parse_payload(request_, data, descriptors) == payload
    header = parse_header(struct.pack("<III", request_, 1 | 8, len(data)))
    assert header == Header(request_, len(data), True)


@pytest.mark.parametrize(("request_", "data", "descriptors", "payload"), GOOD)
def test_a_payload_of_another_size_is_refused(
    request_: Request, data: bytes, descriptors: int, payload: object
) -> None:
    for wrong in (data + b"\0", data + bytes(8), data[:-1], data[:4] if len(data) > 4 else b"x"):
        if wrong != data:
            with pytest.raises(ProtocolError):
                parse_payload(request_, wrong, descriptors)


@pytest.mark.parametrize(("request_", "data", "descriptors", "payload"), GOOD)
def test_other_numbers_of_descriptors_are_refused(
    request_: Request, data: bytes, descriptors: int, payload: object
) -> None:
    allowed = {0, 1} if request_ is Request.REM_MEM_REG else {descriptors}
    for wrong in set(range(9)) - allowed:
        with pytest.raises(ProtocolError, match=f"{request_.name} with {wrong} descriptors"):
            parse_payload(request_, data, wrong)


@pytest.mark.parametrize(
    ("request_", "data", "why"),
    [
        (Request.SET_MEM_TABLE, struct.pack("<II", 9, 0) + REGION * 9, "9 regions, where 8"),
        (Request.SET_MEM_TABLE, struct.pack("<II", 3, 0) + REGION * 2, "3 regions in 72 bytes"),
        (Request.SET_MEM_TABLE, struct.pack("<II", 1, 0) + REGION * 9, "1 regions in 296 bytes"),
        (Request.SET_VRING_KICK, struct.pack("<Q", 0x200), "unknown flags"),
        (Request.SET_VRING_CALL, struct.pack("<Q", 1 << 63), "unknown flags"),
        (Request.GET_CONFIG, struct.pack("<III", 0, 257, 0) + bytes(257), "configuration message"),
        (Request.GET_CONFIG, struct.pack("<III", 257, 1, 0) + b"x", "configuration message"),
        (Request.SET_CONFIG, struct.pack("<III", 0, 1, 2) + b"x", "configuration message"),
        (Request.SET_CONFIG, struct.pack("<III", 0, 2, 0) + b"x", "configuration message"),
    ],
)
def test_content_that_no_frontend_sends_is_refused(request_: Request, data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        parse_payload(request_, data, 0)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ((1, 0, 0), "version 0"),
        ((1, 2, 0), "version 2"),
        ((1, 1 | 4, 0), "a reply"),
        ((1, 1, messages.MAX_PAYLOAD + 1), "a payload of 4097"),
        ((1, 1, 0xFFFFFFFF), "a payload of"),
        ((0, 1, 0), "request 0"),
        ((6, 1, 0), "request 6"),
        ((34, 1, 0), "request 34"),
        ((1000, 1, 0), "request 1000"),
    ],
)
def test_headers_that_cannot_be_are_refused(header: tuple[int, int, int], why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        parse_header(struct.pack("<III", *header))


@pytest.mark.promise("hostile-guest-is-contained")
@given(request_=st.sampled_from(list(Request)), data=st.binary(max_size=300), descriptors=st.integers(0, 8))
def test_any_bytes_are_read_or_refused(request_: Request, data: bytes, descriptors: int) -> None:
    with contextlib.suppress(ProtocolError):
        parse_payload(request_, data, descriptors)


def test_answers_have_version_one_and_the_reply_flag() -> None:
    assert messages.reply(Request.GET_FEATURES, messages.numeric(7)) == struct.pack("<IIIQ", 1, 5, 8, 7)
    assert messages.vring_state(VringState(1, 2)) == struct.pack("<II", 1, 2)
    assert messages.config(Config(4, 2, True, b"xx"), b"ab") == struct.pack("<III", 4, 2, 1) + b"ab"
    assert messages.config(Config(4, 2, False, b"xx"), b"") == struct.pack("<III", 4, 0, 0)
    assert messages.config_change() == struct.pack("<III", 2, 1, 0)


# ---- the channel ------------------------------------------------------------------------


class Pair:
    """A channel and the other end of it."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.channel = Channel(ours)

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        Frontend.send_raw(self, data, fds)  # type: ignore[arg-type]

    socket = property(lambda self: self.theirs)
    record = None


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.channel.close()
    pair.theirs.close()


def kick(index: int = 0) -> bytes:
    return struct.pack("<IIIQ", Request.SET_VRING_KICK, 1, 8, index)


def close(message: Message | None) -> None:
    assert message is not None
    for descriptor in message.descriptors:
        descriptor.close()


def test_a_message_that_comes_byte_by_byte_is_one_message(pair: Pair) -> None:
    event = os.eventfd(0)
    data = kick(5)
    for i in range(len(data)):
        assert pair.channel.receive() is None
        assert (pair.channel.deadline is None) == (i == 0)
        pair.send(data[i : i + 1], (event,) if i == 3 else ())
    os.close(event)
    message = pair.channel.receive()
    assert message is not None
    assert message.payload == VringDescriptor(5, True)
    assert pair.channel.deadline is None
    close(message)


def test_messages_that_come_together_keep_their_own_descriptors(pair: Pair) -> None:
    events = [os.eventfd(0), os.memfd_create("second")]
    for i, event in enumerate(events):
        pair.send(kick(i), (event,))
    for i, event in enumerate(events):
        message = pair.channel.receive()
        assert message is not None
        (descriptor,) = message.descriptors
        assert message.payload.index == i
        assert os.fstat(descriptor.fd).st_ino == os.fstat(event).st_ino
        assert not os.get_inheritable(descriptor.fd)
        close(message)
        os.close(event)


@pytest.mark.promise("hostile-guest-is-contained")
def test_eight_descriptors_are_taken_and_all_of_more_are_closed(pair: Pair) -> None:
    event = os.eventfd(0)
    table = struct.pack("<III", Request.SET_MEM_TABLE, 1, 8 + 8 * 32) + struct.pack("<II", 8, 0) + REGION * 8
    pair.send(table, (event,) * 8)
    message = pair.channel.receive()
    assert message is not None
    assert len(message.descriptors) == 8
    close(message)
    pair.send(table, (event,) * 9)
    os.close(event)
    with pytest.raises(ProtocolError, match="more than 8 descriptors"):
        pair.channel.receive()


def test_descriptors_in_several_pieces_count_together(pair: Pair) -> None:
    event = os.eventfd(0)
    data = kick()
    for i in range(9):
        pair.send(data[i : i + 1], (event,))
    os.close(event)
    with pytest.raises(ProtocolError, match="more than 8 descriptors"):
        pair.channel.receive()


@pytest.mark.promise("hostile-guest-is-contained")
def test_what_a_refused_message_brought_is_closed(pair: Pair) -> None:
    event = os.eventfd(0)
    pair.send(struct.pack("<IIIQ", Request.SET_FEATURES, 1, 8, 0), (event, event))
    os.close(event)
    with pytest.raises(ProtocolError, match="SET_FEATURES with 2 descriptors"):
        pair.channel.receive()


def test_a_message_that_does_not_end_ends_the_connection(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "PATIENCE_S", 0.0)
    event = os.eventfd(0)
    pair.send(kick()[:7], (event,))
    os.close(event)
    with pytest.raises(ProtocolError, match="the rest of a message"):
        while True:
            pair.channel.receive()


def test_an_end_between_messages_and_one_within_are_told_apart(pair: Pair) -> None:
    pair.send(kick()[:7])
    pair.theirs.close()
    with pytest.raises(Disconnected, match="middle of a message"):
        pair.channel.receive()
    with pytest.raises(Disconnected, match=r"^$"):
        pair.channel.receive()


def test_an_answer_that_nobody_reads_ends_the_connection(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "PATIENCE_S", 0.0)
    with pytest.raises(ProtocolError, match="was not read"):
        while True:
            pair.channel.send(bytes(1 << 16))
    pair.theirs.close()
    with pytest.raises(Disconnected):
        pair.channel.send(b"x")
