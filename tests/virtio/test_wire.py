"""The formats: byte for byte as in the specification, and nothing else accepted."""

from __future__ import annotations

import contextlib
import struct
from itertools import pairwise

import pytest
from attrs import astuple
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.virtio import GuestError
from sparsemem.virtio.wire import (
    BalloonConfig,
    GuestStats,
    MemAnswer,
    MemConfig,
    MemOperation,
    MemRequest,
    MemResponse,
    MemState,
    pack_command,
    pack_frames,
    unpack_command,
    unpack_frames,
)


def test_a_mem_configuration_has_56_bytes() -> None:
    config = MemConfig(0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7)
    packed = config.pack()
    assert packed == b"".join(
        [
            b"\x01" + bytes(7),
            b"\x02\x00" + bytes(6),
            b"\x03" + bytes(7),
            b"\x04" + bytes(7),
            b"\x05" + bytes(7),
            b"\x06" + bytes(7),
            b"\x07" + bytes(7),
        ]
    )
    assert len(packed) == MemConfig.SIZE == 56
    assert MemConfig.unpack(packed) == config


def test_a_mem_request_has_24_bytes_and_its_padding_is_ignored() -> None:
    request = MemRequest(MemOperation.STATE, 0x0807060504030201, 0x0A09)
    packed = request.pack()
    assert packed == b"\x03\x00" + bytes(6) + bytes(range(1, 9)) + b"\x09\x0a" + bytes(6)
    noisy = packed[:2] + b"\xff" * 6 + packed[8:18] + b"\xff" * 6 + b"and more"
    assert MemRequest.unpack(noisy) == request


def test_a_mem_response_has_10_bytes() -> None:
    response = MemResponse(MemAnswer.ACK, MemState.MIXED)
    assert response.pack() == bytes(8) + b"\x02\x00"
    assert MemResponse(MemAnswer.ERROR).pack() == b"\x03" + bytes(9)
    assert MemResponse.unpack(response.pack()) == response


def test_a_balloon_configuration_has_16_bytes() -> None:
    config = BalloonConfig(1, 2, 3, 0xAABBCCDD)
    assert config.pack() == b"\x01\0\0\0\x02\0\0\0\x03\0\0\0\xdd\xcc\xbb\xaa"
    assert BalloonConfig.unpack(config.pack()) == config


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 300), min_size=1, max_size=600))
def test_frames_in_any_order_become_ascending_maximal_runs(frames: list[int]) -> None:
    runs = list(unpack_frames(pack_frames(frames)))
    assert [frame for first, count in runs for frame in range(first, first + count)] == sorted(set(frames))
    assert all(low[0] + low[1] < high[0] for low, high in pairwise(runs))


@pytest.mark.parametrize("frames", [list(range(256)), list(range(256, 0, -1)), [5] * 256, [7]])
def test_frames_that_are_sorted_already_or_downward_are_the_same(frames: list[int]) -> None:
    (run,) = unpack_frames(pack_frames(frames))
    assert run == (min(frames), len(set(frames)))


@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 7])
def test_what_is_no_array_of_frames_is_refused(data: bytes) -> None:
    with pytest.raises(GuestError, match="no array of 32-bit page frame numbers"):
        unpack_frames(data)


def test_statistics_in_any_order_with_unknown_tags() -> None:
    records = struct.pack("<HQHQHQHQ", 5, 1000, 99, 7, 4, 250, 5, 2000)
    assert GuestStats.unpack(records) == GuestStats(total=2000, free=250)
    assert GuestStats.unpack(b"") == GuestStats()
    with pytest.raises(GuestError, match="11 bytes"):
        GuestStats.unpack(bytes(11))


@given(st.dictionaries(st.integers(0, 15), st.integers(0, 2**64 - 1)))
def test_statistics_go_there_and_back(told: dict[int, int]) -> None:
    data = b"".join(struct.pack("<HQ", tag, value) for tag, value in told.items())
    stats = GuestStats.unpack(data)
    assert GuestStats.unpack(stats.pack()) == stats
    assert list(astuple(stats)) == [told.get(tag) for tag in range(16)]


def test_every_tag_of_the_specification_has_its_name() -> None:
    stats = GuestStats.unpack(b"".join(struct.pack("<HQ", tag, tag + 100) for tag in range(16)))
    assert (stats.swap_in, stats.swap_out, stats.major_faults, stats.minor_faults) == (100, 101, 102, 103)
    assert (stats.free, stats.total, stats.available, stats.caches) == (104, 105, 106, 107)
    assert (stats.hugetlb_allocations, stats.hugetlb_failures, stats.oom_kills) == (108, 109, 110)
    assert (stats.allocation_stalls, stats.async_scans, stats.direct_scans) == (111, 112, 113)
    assert (stats.async_reclaims, stats.direct_reclaims) == (114, 115)


def test_a_command_has_4_bytes() -> None:
    assert unpack_command(pack_command(0x80000001)) == 0x80000001
    for data in (b"", bytes(3), bytes(5)):
        with pytest.raises(GuestError, match="4 bytes"):
            unpack_command(data)


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_a_request_or_a_guest_error(data: bytes) -> None:
    for unpack in (MemRequest.unpack, MemConfig.unpack, BalloonConfig.unpack, unpack_frames, GuestStats.unpack):
        with contextlib.suppress(GuestError):
            unpack(data)
