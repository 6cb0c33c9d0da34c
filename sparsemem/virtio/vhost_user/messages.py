"""vhost-user messages: bytes and descriptors to typed messages, and back.

The header is `<III`: request, flags, payload size.  The formats are those of QEMU's
docs/interop/vhost-user.rst; numbers are in the machine's byte order, which is little
endian wherever guest memory is, too (checked when the package is imported).

Everything is strict: a payload has exactly the size that its request has, and a
message exactly the descriptors that it may have.  What is wrong is refused by a
`ProtocolError`, and the caller closes what came with it.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from typing import Any

from attrs import frozen

from sparsemem.errors import SparseMemError


class ProtocolError(SparseMemError, ValueError):
    """The frontend sent what no frontend may; the connection ends."""


class Request(enum.IntEnum):
    """What the frontend asks for."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class Protocol(enum.IntFlag):
    """Protocol features, as masks."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


CONFIG_CHANGE = 2
"""The one request that the backend sends: the configuration has changed, read it again."""

MAX_DESCRIPTORS = 8
"""As many come with one message: a memory table of eight regions."""

MAX_PAYLOAD = 4096
"""No message is longer: a table is 264 bytes, a configuration 12 and what the device has."""

MAX_CONFIG = 256
"""Bytes of configuration space that one message carries."""

_VERSION, _VERSION_MASK = 1, 3
_REPLY, _NEED_REPLY = 4, 8

_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDRESS = struct.Struct("=IIQQQQ")
_TABLE = struct.Struct("=I4x")
_MEMORY = struct.Struct("=QQQQ")
_SLOT = struct.Struct("=8xQQQQ")
_CONFIG = struct.Struct("=III")

HEADER_SIZE = _HEADER.size


@frozen
class Header:
    """What a message begins with."""

    request: Request
    size: int
    need_reply: bool


@frozen
class VringState:
    """A number for one ring: its size, where it stands, or whether it is enabled."""

    index: int
    number: int


@frozen
class VringAddress:
    """Where a ring's three parts are, in the frontend's own addresses."""

    index: int
    flags: int
    descriptors: int
    used: int
    available: int


@frozen
class VringDescriptor:
    """Which ring a descriptor is for, and whether there is one."""

    index: int
    given: bool


@frozen
class MemoryRegion:
    """A piece of guest memory: guest-physical address, bytes, the frontend's address, offset in the file."""

    guest: int
    size: int
    user: int
    offset: int


@frozen
class Config:
    """A part of the configuration space; without data in a question."""

    offset: int
    size: int
    migration: bool
    data: bytes


def parse_header(data: bytes) -> Header:
    """The header of the frontend's next message.

    Raises:
        ProtocolError: No such version or request, a reply where none can be, or too long.
    """
    number, flags, size = _HEADER.unpack(data)
    if flags & _VERSION_MASK != _VERSION:
        raise ProtocolError(f"version {flags & _VERSION_MASK} of vhost-user, not 1")
    if flags & _REPLY:
        raise ProtocolError(f"a reply to a request that was never made ({number})")
    if size > MAX_PAYLOAD:
        raise ProtocolError(f"a payload of {size} bytes, where {MAX_PAYLOAD} is the most")
    try:
        request = Request(number)
    except ValueError:
        raise ProtocolError(f"request {number}, which this backend never offered") from None
    return Header(request, size, bool(flags & _NEED_REPLY))


def _exactly(layout: struct.Struct, data: bytes) -> tuple[Any, ...]:
    if len(data) != layout.size:
        raise ProtocolError(f"a payload of {len(data)} bytes, where {layout.size} are right")
    return layout.unpack(data)


def _nothing(data: bytes) -> None:
    if data:
        raise ProtocolError(f"a payload of {len(data)} bytes, where none is right")


def _number(data: bytes) -> int:
    return int(_exactly(_U64, data)[0])


def _state(data: bytes) -> VringState:
    return VringState(*_exactly(_STATE, data))


def _address(data: bytes) -> VringAddress:
    index, flags, descriptors, used, available, _log = _exactly(_ADDRESS, data)
    return VringAddress(index, flags, descriptors, used, available)


def _descriptor(data: bytes) -> VringDescriptor:
    number = _number(data)
    if number >> 9:
        raise ProtocolError(f"unknown flags in {number:#x}")
    return VringDescriptor(number & 0xFF, not number & 0x100)


def _table(data: bytes) -> tuple[MemoryRegion, ...]:
    if len(data) < _TABLE.size:
        raise ProtocolError(f"a memory table of {len(data)} bytes")
    (count,) = _TABLE.unpack_from(data)
    if count > MAX_DESCRIPTORS:
        raise ProtocolError(f"a memory table of {count} regions, where {MAX_DESCRIPTORS} is the most")
    end = _TABLE.size + count * _MEMORY.size
    # User-mode Linux always sends room for two regions, whatever the count.
    if len(data) < end or (len(data) - end) % _MEMORY.size or len(data) > _TABLE.size + MAX_DESCRIPTORS * _MEMORY.size:
        raise ProtocolError(f"a memory table of {count} regions in {len(data)} bytes")
    return tuple(MemoryRegion(*each) for each in _MEMORY.iter_unpack(data[_TABLE.size : end]))


def _slot(data: bytes) -> MemoryRegion:
    return MemoryRegion(*_exactly(_SLOT, data))


def _config(data: bytes) -> Config:
    if len(data) < _CONFIG.size:
        raise ProtocolError(f"a configuration message of {len(data)} bytes")
    offset, size, flags = _CONFIG.unpack_from(data)
    content = data[_CONFIG.size :]
    if size > MAX_CONFIG or offset > MAX_CONFIG or flags > 1 or len(content) != size:
        raise ProtocolError(f"a configuration message of {len(content)} bytes says {offset=}, {size=}, {flags=}")
    return Config(offset, size, bool(flags), content)


_ANY_NUMBER = range(MAX_DESCRIPTORS + 1)
_NONE, _ONE, _AT_MOST_ONE = range(1), range(1, 2), range(2)

_FORMATS: dict[Request, tuple[Callable[[bytes], Any], range]] = {
    Request.GET_FEATURES: (_nothing, _NONE),
    Request.SET_FEATURES: (_number, _NONE),
    Request.SET_OWNER: (_nothing, _NONE),
    Request.RESET_OWNER: (_nothing, _NONE),
    Request.SET_MEM_TABLE: (_table, _ANY_NUMBER),
    Request.SET_VRING_NUM: (_state, _NONE),
    Request.SET_VRING_ADDR: (_address, _NONE),
    Request.SET_VRING_BASE: (_state, _NONE),
    Request.GET_VRING_BASE: (_state, _NONE),
    Request.SET_VRING_KICK: (_descriptor, _AT_MOST_ONE),
    Request.SET_VRING_CALL: (_descriptor, _AT_MOST_ONE),
    Request.SET_VRING_ERR: (_descriptor, _AT_MOST_ONE),
    Request.GET_PROTOCOL_FEATURES: (_nothing, _NONE),
    Request.SET_PROTOCOL_FEATURES: (_number, _NONE),
    Request.GET_QUEUE_NUM: (_nothing, _NONE),
    Request.SET_VRING_ENABLE: (_state, _NONE),
    Request.SET_BACKEND_REQ_FD: (_nothing, _ONE),
    Request.GET_CONFIG: (_config, _NONE),
    Request.SET_CONFIG: (_config, _NONE),
    Request.GET_MAX_MEM_SLOTS: (_nothing, _NONE),
    Request.ADD_MEM_REG: (_slot, _ONE),
    # Frontends that send a descriptor along are told of in the specification: it is closed unused.
    Request.REM_MEM_REG: (_slot, _AT_MOST_ONE),
    Request.SET_STATUS: (_number, _NONE),
    Request.GET_STATUS: (_nothing, _NONE),
}


def parse_payload(request: Request, data: bytes, descriptors: int) -> Any:
    """The payload of a request with so many descriptors, as its type; None if it says nothing.

    Raises:
        ProtocolError: Wrong size, wrong content or wrong number of descriptors.
    """
    parse, allowed = _FORMATS[request]
    payload = parse(data)
    if request is Request.SET_MEM_TABLE:
        allowed = range(len(payload), len(payload) + 1)
    elif isinstance(payload, VringDescriptor):
        allowed = _ONE if payload.given else _NONE
    if descriptors not in allowed:
        raise ProtocolError(f"{request.name} with {descriptors} descriptors")
    return payload


def numeric(value: int) -> bytes:
    """The payload of an answer that is a number."""
    return _U64.pack(value)


def vring_state(state: VringState) -> bytes:
    """The payload of an answer about a ring."""
    return _STATE.pack(state.index, state.number)


def config(asked: Config, data: bytes) -> bytes:
    """The payload of an answer to GET_CONFIG; with no data it is an error."""
    return _CONFIG.pack(asked.offset, len(data), asked.migration) + data


def reply(request: Request, payload: bytes) -> bytes:
    """An answer, whole."""
    return _HEADER.pack(request, _VERSION | _REPLY, len(payload)) + payload


def config_change() -> bytes:
    """The backend's own request, whole; no reply is wanted, for nobody must wait for the frontend."""
    return _HEADER.pack(CONFIG_CHANGE, _VERSION, 0)
