"""Our devices for a guest, served in this process, as the tests look at them from the host's side."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from sparsemem import Region
from sparsemem.virtio.balloon import BalloonListener, VirtioBalloon
from sparsemem.virtio.device import Device
from sparsemem.virtio.guest_memory import GuestMemory
from sparsemem.virtio.mem import MemListener, VirtioMem
from sparsemem.virtio.vhost_user import Backend, Server
from sparsemem.virtio.wire import MemRequest, MemResponse
from tests.guest.console import until
from tests.guest.devices import Devices, Request
from tests.guest.qemu import RANGE_ADDRESS


class Recorder(MemListener):
    """Keeps what the driver of virtio-mem asked for, and what it was answered."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def on_answer(self, request: MemRequest, response: MemResponse) -> None:
        facts = (int(request.operation), request.address, request.count, int(response.answer))
        self.requests.append(Request(*facts, time.time()))


class Hints(BalloonListener):
    """Collects free page hints: `(session, guest-physical address, bytes)`, and the sessions that have ended."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int, int]] = []
        self.done: list[int] = []

    def on_hint(self, command: int, address: int, length: int) -> None:
        self.runs.append((command, address, length))

    def on_hints_done(self, command: int) -> None:
        self.done.append(command)

    def wait_done(self, sessions: int) -> None:
        """Waits until so many sessions have ended."""
        until(lambda: len(self.done) >= sessions, "the end of the hints")


class Reached(BalloonListener):
    """Notes when the balloon last had its size."""

    def __init__(self) -> None:
        self.time = 0.0

    def on_reached(self, size: int) -> None:
        self.time = time.time()


class OurDevices(Devices):
    """A virtio-mem device over a region, and a balloon over all of the guest's memory, each at a socket.

    Attributes:
        region: What virtio-mem plugs and unplugs; it stays the caller's.
        mem: The device.
        balloon_device: The other one.
    """

    def __init__(self, region: Region, folder: Path, *, prealloc: bool = True, **balloon: Any) -> None:
        """Starts to serve, at sockets in the folder; `balloon` are options of the balloon."""
        self.region = region
        self.mem = VirtioMem(region, address=RANGE_ADDRESS, prealloc=prealloc)
        self.recorder = Recorder()
        self.mem.add_listener(self.recorder)
        self.memory = GuestMemory(regions=[region])
        self.balloon_device = VirtioBalloon(self.memory, **balloon)
        self._reached = Reached()
        self.balloon_device.add_listener(self._reached)
        self._servers = [
            Server(Backend("mem", self.mem, GuestMemory(regions=[region])), str(folder / "mem.socket")),
            Server(Backend("balloon", self.balloon_device, self.memory), str(folder / "balloon.socket")),
        ]
        self._folder = folder

    def backed(self) -> int:
        """How much memory of the host is behind virtio-mem's range, in bytes."""
        return backed(self.region)

    def ram_backed(self) -> int:
        """Likewise, behind the memory that the guest boots with, which the frontend has sent us."""
        return sum(backed(entry.region) for entry in self.memory.ranges if entry.region is not self.region)

    def arguments(self, device: str) -> list[str]:
        """QEMU's arguments; `device` is the name of its device that speaks vhost-user."""
        return [
            *hold_range(f"/proc/{os.getpid()}/fd/{self.region.fileno()}", self.region.size),
            *vhost_user(device, "mem", self._folder / "mem.socket", self.mem),
            *vhost_user(device, "balloon", self._folder / "balloon.socket", self.balloon_device),
        ]

    def close(self) -> None:
        """Stops serving."""
        for server in self._servers:
            server.close()

    def __enter__(self) -> OurDevices:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def request(self, size: int) -> None:
        self.mem.requested_size = size

    def plugged(self) -> int:
        return self.mem.plugged_size

    def inflate(self, size: int) -> None:
        self.balloon_device.target = size

    def ballooned(self) -> int:
        return self.balloon_device.actual

    def balloon_written(self) -> float:
        return self._reached.time

    def requests(self) -> list[Request]:
        return self.recorder.requests


def backed(region: Region) -> int:
    """The memory that the host keeps for a region's file, in bytes."""
    return os.fstat(region.fileno()).st_blocks * 512


def hold_range(path: str, size: int) -> list[str]:
    """Arguments that put a file of ours at virtio-mem's addresses.

    What holds the range is a device that the guest has no driver for: so nothing but virtio-mem
    makes use of it, and the file reaches the backends among the guest's memory.
    """
    return [
        *("-object", f"memory-backend-file,id=vm,size={size},share=on,reserve=off,mem-path={path}"),
        *("-device", f"virtio-pmem-pci,memdev=vm,memaddr={RANGE_ADDRESS:#x}"),
    ]


def vhost_user(device: str, name: str, socket: Path, served: Device, options: str = "") -> list[str]:
    """Arguments that give the guest the device behind a socket; `options` are more of the connection's."""
    queues = served.queues(served.features)
    numbers = f"virtio-id={served.device_id},num_vqs={queues},vq_size=128,config_size={served.config_size}"
    return [
        *("-chardev", f"socket,id={name},path={socket}{options}"),
        *("-device", f"{device},chardev={name},{numbers}"),
    ]
