"""Bytes to typed requests and back, and nothing else: the formats of virtio-mem and virtio-balloon.

VIRTIO 1.2, sections 5.15 (memory device) and 5.5 (traditional balloon).  All of
it is little-endian.  What has the wrong length, or a type that nobody knows,
is a `GuestError`; what the numbers mean is for the devices to judge.
"""

from __future__ import annotations

import enum
import struct

from attrs import asdict, fields, frozen

from sparsemem._sys import ffi, lib
from sparsemem.runs import Runs
from sparsemem.virtio.device import GuestError

# ---- virtio-mem --------------------------------------------------------------------------

_MEM_CONFIG = struct.Struct("<QH6x5Q")
_MEM_REQUEST = struct.Struct("<H6xQH6x")
_MEM_RESPONSE = struct.Struct("<H6xH")


class MemFeature(enum.IntFlag):
    """Feature bits of virtio-mem."""

    ACPI_PXM = 1 << 0
    """`node_id` is valid."""
    UNPLUGGED_INACCESSIBLE = 1 << 1
    """The driver must not even read unplugged memory."""
    PERSISTENT_SUSPEND = 1 << 2
    """Plugged memory survives a suspend of the guest."""


class MemOperation(enum.IntEnum):
    """What a virtio-mem driver asks for."""

    PLUG = 0
    UNPLUG = 1
    UNPLUG_ALL = 2
    STATE = 3


class MemAnswer(enum.IntEnum):
    """What it is told."""

    ACK = 0
    NACK = 1
    BUSY = 2
    ERROR = 3


class MemState(enum.IntEnum):
    """The state of the blocks that a STATE request names."""

    PLUGGED = 0
    UNPLUGGED = 1
    MIXED = 2


@frozen
class MemConfig:
    """The configuration space of virtio-mem; bytes, and guest-physical addresses."""

    block_size: int
    node_id: int
    address: int
    region_size: int
    usable_region_size: int
    plugged_size: int
    requested_size: int

    SIZE = _MEM_CONFIG.size

    def pack(self) -> bytes:
        return _MEM_CONFIG.pack(*asdict(self).values())

    @classmethod
    def unpack(cls, data: bytes) -> MemConfig:
        return cls(*_unpack(_MEM_CONFIG, data, "a virtio-mem configuration"))


@frozen
class MemRequest:
    """A request; `count` blocks from a guest-physical address on."""

    operation: MemOperation
    address: int = 0
    count: int = 0

    def pack(self) -> bytes:
        return _MEM_REQUEST.pack(self.operation, self.address, self.count)

    @classmethod
    def unpack(cls, data: bytes) -> MemRequest:
        """Reads a request; padding, and what follows it, is ignored.

        Raises:
            GuestError: It is too short, or of an unknown type.
        """
        code, address, count = _unpack(_MEM_REQUEST, data, "a virtio-mem request")
        try:
            return cls(MemOperation(code), address, count)
        except ValueError:
            known = ", ".join(f"{operation} {operation.name}" for operation in MemOperation)
            raise GuestError(f"virtio-mem request of type {code} is none of {known}") from None


@frozen
class MemResponse:
    """The answer to a request; `state` counts only for an acknowledged STATE."""

    answer: MemAnswer
    state: MemState = MemState.PLUGGED

    SIZE = _MEM_RESPONSE.size

    def pack(self) -> bytes:
        return _MEM_RESPONSE.pack(self.answer, self.state)

    @classmethod
    def unpack(cls, data: bytes) -> MemResponse:
        answer, state = _unpack(_MEM_RESPONSE, data, "a virtio-mem response")
        return cls(MemAnswer(answer), MemState(state))


# ---- virtio-balloon ----------------------------------------------------------------------

FRAME_SHIFT = 12
FRAME_SIZE = 1 << FRAME_SHIFT
"""The unit of the balloon's page frame numbers, whatever the page size of guest or host."""

_BALLOON_CONFIG = struct.Struct("<4I")
_STATISTIC = struct.Struct("<HQ")
_NUMBER = struct.Struct("<I")

HINT_STOP = 0
"""Command id: the device wants no hints, or the driver has sent all of them."""
HINT_DONE = 1
"""Command id: the hints were used, and the driver may have its pages back."""
HINT_FIRST = 2
"""The first command id that is a session's."""


class BalloonFeature(enum.IntFlag):
    """Feature bits of virtio-balloon."""

    MUST_TELL_HOST = 1 << 0
    """The driver deflates only after the device has answered."""
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    REPORTING = 1 << 5


@frozen
class BalloonConfig:
    """The configuration space of virtio-balloon; pages of `FRAME_SIZE`."""

    num_pages: int = 0
    actual: int = 0
    free_page_hint_cmd_id: int = 0
    poison_val: int = 0

    SIZE = _BALLOON_CONFIG.size

    def pack(self) -> bytes:
        return _BALLOON_CONFIG.pack(*asdict(self).values())

    @classmethod
    def unpack(cls, data: bytes) -> BalloonConfig:
        return cls(*_unpack(_BALLOON_CONFIG, data, "a virtio-balloon configuration"))


def unpack_frames(data: bytes) -> Runs:
    """Page frame numbers in any order, some perhaps twice, as ascending runs of frames.

    Raises:
        GuestError: There is none, or it is not an array of 32 bits each.
    """
    if not data or len(data) % _NUMBER.size:
        raise GuestError(f"{len(data)} bytes are no array of 32-bit page frame numbers")
    n = len(data) // _NUMBER.size
    out, scratch = ffi.new("sm_run[]", n), ffi.new("uint32_t[]", 2 * n)
    return Runs(out, int(lib.sm_runs_of_frames(ffi.from_buffer(data), n, scratch, out)))


def pack_frames(frames: list[int]) -> bytes:
    """Page frame numbers as a driver sends them."""
    return struct.pack(f"<{len(frames)}I", *frames)


def unpack_command(data: bytes) -> int:
    """The command id that begins or ends a session of free page hints.

    Raises:
        GuestError: Not 4 bytes.
    """
    if len(data) != _NUMBER.size:
        raise GuestError(f"a command id of free page hinting has {_NUMBER.size} bytes, not {len(data)}")
    return int(_NUMBER.unpack(data)[0])


def pack_command(command: int) -> bytes:
    """A command id as a driver sends it."""
    return _NUMBER.pack(command)


@frozen(kw_only=True)
class GuestStats:
    """What a guest says of its memory; None where it says nothing.

    The fields are in the order of their tags: bytes, but for counts of faults,
    kills, stalls and huge pages, and pages for scans and reclaims.
    """

    swap_in: int | None = None
    swap_out: int | None = None
    major_faults: int | None = None
    minor_faults: int | None = None
    free: int | None = None
    total: int | None = None
    available: int | None = None
    caches: int | None = None
    hugetlb_allocations: int | None = None
    hugetlb_failures: int | None = None
    oom_kills: int | None = None
    allocation_stalls: int | None = None
    async_scans: int | None = None
    direct_scans: int | None = None
    async_reclaims: int | None = None
    direct_reclaims: int | None = None

    def pack(self) -> bytes:
        told = enumerate(asdict(self).values())
        return b"".join(_STATISTIC.pack(tag, value) for tag, value in told if value is not None)

    @classmethod
    def unpack(cls, data: bytes) -> GuestStats:
        """Reads records in any order; unknown tags are ignored, and of one that comes twice the last counts.

        Raises:
            GuestError: It does not consist of whole records.
        """
        if len(data) % _STATISTIC.size:
            raise GuestError(f"{len(data)} bytes are no records of {_STATISTIC.size} bytes of statistics")
        names = [field.name for field in fields(cls)]
        return cls(**{names[tag]: value for tag, value in _STATISTIC.iter_unpack(data) if tag < len(names)})


def _unpack(layout: struct.Struct, data: bytes, what: str) -> tuple[int, ...]:
    if len(data) < layout.size:
        raise GuestError(f"{what} has {layout.size} bytes; this one has {len(data)}")
    return layout.unpack_from(data)
