"""The host's side of a guest's memory devices, ours and QEMU's own, behind one face, so that they can be compared."""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from tests.guest.console import until
from tests.guest.qemu import RANGE_ADDRESS, QemuGuest

PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)
ACK, NACK, BUSY, ERROR = range(4)


@frozen
class Request:
    """What the driver of virtio-mem asked for, and what it was answered.

    Attributes:
        kind: PLUG, UNPLUG, UNPLUG_ALL or STATE.
        address: Guest-physical; 0 for UNPLUG_ALL.
        blocks: How many; 0 for UNPLUG_ALL.
        answer: ACK, NACK, BUSY or ERROR.
        time: When it was answered, seconds as of `time.time()`; no part of a comparison.
    """

    kind: int
    address: int
    blocks: int
    answer: int
    time: float

    @property
    def facts(self) -> tuple[int, int, int, int]:
        """All but the time."""
        return self.kind, self.address, self.blocks, self.answer


class Devices(abc.ABC):
    """A virtio-mem device and a balloon of one guest, from the host's side.  Sizes are bytes."""

    @abc.abstractmethod
    def request(self, size: int) -> None:
        """Asks the guest to bring virtio-mem's plugged memory to this size."""

    @abc.abstractmethod
    def plugged(self) -> int:
        """How much is plugged."""

    @abc.abstractmethod
    def inflate(self, size: int) -> None:
        """Asks the guest to bring its balloon to this size."""

    @abc.abstractmethod
    def ballooned(self) -> int:
        """How large the driver says that the balloon is."""

    @abc.abstractmethod
    def balloon_written(self) -> float:
        """When the driver last said how large the balloon is and that was as asked for, seconds as of `time.time()`."""

    @abc.abstractmethod
    def requests(self) -> list[Request]:
        """All that virtio-mem's driver has asked for and was answered, in order."""

    def resize(self, size: int) -> None:
        """`request`, and waits until it is reached."""
        self.request(size)
        until(lambda: self.plugged() == size, f"plugged {size:#x}")

    def balloon(self, size: int) -> None:
        """`inflate`, and waits until it is reached."""
        self.inflate(size)
        until(lambda: self.ballooned() == size, f"a balloon of {size:#x}")


# ---- QEMU's own ---------------------------------------------------------------------------

TRACES = ("virtio_mem_*", "virtio_balloon_set_config")
_MEM, _BALLOON = "/machine/peripheral/vmem", "/machine/peripheral/balloon"
# With `-msg timestamp=on` a line of the log is `process@seconds.microseconds:event arguments`.
_TRACE = re.compile(
    r"@(?P<time>\d+\.\d+):virtio_mem_"
    r"(?:(?P<kind>plug|unplug|state)_request addr=(?P<address>0x[0-9a-f]+) nb_blocks=(?P<blocks>\d+)"
    r"|(?P<all>unplug_all_request)"
    r"|send_response type=(?P<answer>\d+))"
)
_BALLOON_TRACE = re.compile(r"@(\d+\.\d+):virtio_balloon_set_config")
_KINDS = {"plug": PLUG, "unplug": UNPLUG, "state": STATE}


def own_arguments(size: int, *, block_size: int, prealloc: bool = False) -> list[str]:
    """Arguments that give a guest QEMU's own devices; virtio-mem has a range of `size` bytes."""
    mem = f"virtio-mem-pci,id=vmem,memdev=vm,memaddr={RANGE_ADDRESS:#x},requested-size=0,block-size={block_size}"
    return [
        *("-msg", "timestamp=on"),
        *("-object", f"memory-backend-memfd,id=vm,size={size},share=on,reserve=off"),
        *("-device", f"{mem},prealloc={'on' if prealloc else 'off'}"),
        *("-device", "virtio-balloon-pci,id=balloon,deflate-on-oom=on"),
    ]


def parse_traces(text: str) -> Iterator[Request]:
    """The requests in QEMU's log.

    An UNPLUG_ALL has no trace of its own before its answer: it is the answer without a request.
    """
    pending: tuple[int, int, int] | None = None
    for match in _TRACE.finditer(text):
        if match["kind"]:
            pending = (_KINDS[match["kind"]], int(match["address"], 16), int(match["blocks"]))
        elif match["answer"]:
            yield Request(*(pending or (UNPLUG_ALL, 0, 0)), int(match["answer"]), float(match["time"]))
            pending = None


class OwnDevices(Devices):
    """QEMU's own, by QMP and by its traces.

    Attributes:
        guest: A guest started with `own_arguments` and `TRACES`.
    """

    def __init__(self, guest: QemuGuest, ram: int) -> None:
        """`ram` is what the guest has without virtio-mem, in bytes: QEMU tells what the balloon leaves of it."""
        self.guest = guest
        self._ram = ram

    def request(self, size: int) -> None:
        self.guest.qmp.command("qom-set", path=_MEM, property="requested-size", value=size)

    def plugged(self) -> int:
        size: int = self.guest.qmp.command("qom-get", path=_MEM, property="size")
        return size

    def inflate(self, size: int) -> None:
        # QEMU counts what is plugged, too, as memory that the guest has.
        self.guest.qmp.command("balloon", value=self._ram + self.plugged() - size)

    def ballooned(self) -> int:
        left: int = self.guest.qmp.command("query-balloon")["actual"]
        return self._ram + self.plugged() - left

    def balloon_written(self) -> float:
        return float(_BALLOON_TRACE.findall(self.guest.log.read_text())[-1])

    def requests(self) -> list[Request]:
        return list(parse_traces(Path(self.guest.log).read_text()))
