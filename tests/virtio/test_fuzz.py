"""The fuzzer: for a while, with what it must find planted, and on recordings of real traffic."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator

import pytest

from sparsemem import Region
from sparsemem.runs import Runs
from sparsemem.virtio import VirtioMem
from sparsemem.virtio.queue import Chain, Queue
from sparsemem.virtio.vhost_user.session import Session
from tests.virtio import fuzzing, recording
from tests.virtio.fuzzing import Broken, fuzz


def _seed() -> int:
    """In CI always the same, as with hypothesis, so that a change is judged by itself; elsewhere another each time."""
    told = os.environ.get("SPARSEMEM_FUZZ_SEED", "3640332785" if "CI" in os.environ else "")
    return int(told) if told else random.SystemRandom().randrange(1 << 32)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of refusals are not worth a line each."""
    logger = logging.getLogger("sparsemem")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def test_recordings_are_there_for_both_devices() -> None:
    events = recording.load_all()
    for device, queues in ((24, {0}), (5, {0, 1, 2, 3, 4})):
        made = {event.queue for event in events if isinstance(event, recording.MadeRequest) and event.device == device}
        assert made == queues
        assert any(isinstance(event, recording.SentMessage) and event.device == device for event in events)


@pytest.mark.promise("hostile-guest-is-contained")
def test_a_hostile_guest_and_frontend_for_a_moment() -> None:
    assert fuzz(_seed(), 1500, tell=print) == 1500


@pytest.mark.promise("hostile-guest-is-contained")
@pytest.mark.slow
def test_a_hostile_guest_and_frontend_for_a_minute() -> None:
    seed = _seed()
    print(f"seed {seed}")
    assert fuzz(seed, 10**9, seconds=60, tell=print) > 1000


# ---- what it must find --------------------------------------------------------------------------


def unplug_one_block_more(patch: pytest.MonkeyPatch) -> None:
    original = Region.unplug

    def unplug(self: Region, first: int, count: int = 1, **more: object) -> int:
        return original(self, first, min(count + 1, self.nblocks - first), missing_ok=True)

    patch.setattr(Region, "unplug", unplug)


def acknowledge_without_doing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VirtioMem, "_plug", lambda self, run: None)


def discard_one_page_more(patch: pytest.MonkeyPatch) -> None:
    original = Region.discard_runs

    def discard(self: Region, runs: Runs, *, missing_ok: bool = False) -> int:
        more = [(offset // (1 << 20) * (1 << 20), 1 << 20) for offset, _ in runs]
        return original(self, sorted(set(more)), missing_ok=missing_ok)

    patch.setattr(Region, "discard_runs", discard)


def leave_descriptors_open(patch: pytest.MonkeyPatch) -> None:
    kept = []
    patch.setattr(Session, "_keeps", lambda self, descriptor: kept.append(descriptor) or True)


def write_past_the_room(patch: pytest.MonkeyPatch) -> None:
    original = Queue.push

    def push(self: Queue, chain: Chain, answer: bytes) -> bool:
        self._memory.write(12 << 20, b"astray!!")
        return original(self, chain, answer)

    patch.setattr(Queue, "push", push)


def stay_broken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fuzzing.Backend, "recover", lambda self: None)


PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (unplug_one_block_more, "otherwise than acknowledged"),
    (acknowledge_without_doing, "otherwise than acknowledged"),
    (discard_one_page_more, "was not to be touched|has lost what nobody gave away"),
    (write_past_the_room, "was not to be touched"),
    (leave_descriptors_open, "descriptors were left open"),
    (stay_broken, "a reset does not help"),
]


@pytest.mark.promise("hostile-guest-is-contained")
@pytest.mark.parametrize(("plant", "found"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
@pytest.mark.leaky
def test_a_planted_fault_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(Broken, match=found):
        fuzz(1, 6000)
