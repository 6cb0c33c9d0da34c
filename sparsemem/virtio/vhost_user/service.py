"""Devices of one guest, served together, with a control socket: what `sparsemem vhost-user` runs."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from attrs import asdict, define, evolve, field, frozen

from sparsemem.backends import Backend as Backing
from sparsemem.backends import File
from sparsemem.errors import DeadlineError, Run, UnsupportedError
from sparsemem.region import Region
from sparsemem.units import Size, parse_size
from sparsemem.virtio.balloon import VirtioBalloon
from sparsemem.virtio.device import Device
from sparsemem.virtio.guest_memory import GuestMemory, RegionRange
from sparsemem.virtio.mem import VirtioMem
from sparsemem.virtio.vhost_user.backend import Backend
from sparsemem.virtio.vhost_user.control import ControlError, ControlServer
from sparsemem.virtio.vhost_user.server import Server
from sparsemem.virtio.vhost_user.state import Journal, StateError

_STATS_PATIENCE_S = 0.2


@frozen
class Export:
    """A device and where it is served.

    Attributes:
        device: What is served.
        socket: Where its frontend connects.
        memory: The guest's memory, for this device; the frontend fills it in.
        state: Its state file, or None.
    """

    device: Device
    socket: str
    memory: GuestMemory
    state: str | None = None


@define(eq=False)
class Service:
    """Serves the devices of a guest until it is closed.  Thread-safe.

    At most one virtio-mem device and one balloon: guests have one of each.

    Args:
        exports: The devices.
        control: Where to listen for commands, or None.

    Raises:
        OSError: It cannot listen at one of the sockets; nothing is served then.
        StateError: A state file is not what it should be.
        ValueError: A state does not fit its device.
    """

    exports: tuple[Export, ...]
    control: str | None = None
    _stack: contextlib.ExitStack = field(init=False, factory=contextlib.ExitStack)
    _servers: dict[str, Server] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        with contextlib.ExitStack() as stack:
            for export in self.exports:
                name = _name(export.device)
                if name in self._servers:
                    raise ValueError(f"two {name} devices for one guest")
                journal = None if export.state is None else Journal(export.state, export.device.device_id)
                backend = Backend(name, export.device, export.memory, journal, _own_memory(export.device))
                server = Server(backend, export.socket)
                stack.callback(server.close)
                self._servers[name] = server
            if self.control is not None:
                stack.callback(ControlServer(self.control, self.commands).close)
            self._stack = stack.pop_all()

    @property
    def commands(self) -> dict[str, Any]:
        """What the control socket understands."""
        return {"resize": self.resize, "inflate": self.inflate, "stats": self.stats, "map": self.map}

    def _device(self, kind: type[Any], name: str) -> Any:
        for export in self.exports:
            if isinstance(export.device, kind):
                return export.device
        raise ControlError(f"there is no {name} here")

    def resize(self, size: Size) -> dict[str, int]:
        """Asks the guest to plug so much; what it has plugged now."""
        device: VirtioMem = self._device(VirtioMem, "virtio-mem device")
        device.requested_size = size
        return {"requested_size": device.requested_size, "plugged_size": device.plugged_size}

    def inflate(self, size: Size) -> dict[str, int]:
        """Asks the guest for a balloon of so many bytes; what it has now."""
        device: VirtioBalloon = self._device(VirtioBalloon, "balloon")
        device.target = size
        return {"target_size": device.target, "actual_size": device.actual}

    def stats(self) -> dict[str, Any]:
        """The figures of all devices and of their connections, in bytes."""
        return {name: self._figures(server) for name, server in self._servers.items()}

    def map(self) -> dict[str, Any]:
        """Which blocks of the virtio-mem device are plugged: maximal `[first, count]` runs."""
        device: VirtioMem = self._device(VirtioMem, "virtio-mem device")
        return {
            "block_size": device.block_size,
            "blocks": device.region.nblocks,
            "address": device.address,
            "plugged": [list(run) for run in device.region.plugged_runs()],
        }

    @staticmethod
    def _figures(server: Server) -> dict[str, Any]:
        device = server.backend.device
        figures: dict[str, Any] = {"socket": server.path, "connection": asdict(server.backend.stats())}
        if isinstance(device, VirtioMem):
            figures |= {
                "address": device.address,
                "block_size": device.block_size,
                "region_size": device.region.size,
                "usable_size": device.usable_size,
                "requested_size": device.requested_size,
                "plugged_size": device.plugged_size,
                "answers": {f"{what.name} {how.name}": count for (what, how), count in device.answers.items()},
            }
        if isinstance(device, VirtioBalloon):
            figures |= {
                "target_size": device.target,
                "actual_size": device.actual,
                "discarded_size": device.discarded_size,
                "failures": device.failures,
                "guest": _guest_stats(device),
            }
        return figures

    def close(self) -> None:
        """Ends all connections; the sockets' files are gone.  May be called twice."""
        self._stack.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def region_for(size: Size, backend: Backing, *, block_size: Size | None = None, state: str | None = None) -> Region:
    """The region of a virtio-mem device, with the blocks plugged that a state file says are.

    What a file holds in other blocks belongs to a request that was never answered, and is
    discarded.

    Args:
        size: Bytes.
        backend: A `Memfd` or `File`.  Only a file by path has anything to go on with.
        block_size: Bytes of a block; by default as for any region.
        state: The state file, if there is to be one.

    Raises:
        StateError: It is not what it should be, or says that blocks are plugged where there is nothing any more.
        ReserveError: The kernel refused.
    """
    found = None if state is None else Journal(state, VirtioMem.device_id).load()
    plugged: list[Run] = []
    if found is not None:
        block_size, plugged = _geometry(f"{state}", found[0], size, block_size)
    if plugged:
        if not isinstance(backend, File) or backend.path is None or not os.path.exists(backend.path):
            raise StateError(
                f"{state}: blocks are plugged, but {backend} begins with nothing in them; a file by path keeps "
                "them (if their guest is gone, remove the state file)"
            )
        backend = evolve(backend, existing="discard")
    return Region(size, block_size=block_size, backend=backend, plugged=plugged, name="virtio-mem")


def _geometry(path: str, state: dict[str, Any], size: Size, block_size: Size | None) -> tuple[int, list[Run]]:
    """The block size and the plugged blocks of a state, which must be that of such a region.

    Before there is a region, because what is not plugged is discarded as it is made.
    """
    given = {"region_size": parse_size(size)}
    if block_size is not None:
        given["block_size"] = parse_size(block_size)
    for name, value in given.items():
        if state.get(name) != value:
            raise StateError(f"{path}: {name} is {state.get(name)!r} there, and not {value}")
    try:
        return state["block_size"], [(first, count) for first, count in state["plugged"]]
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path}: no state of a virtio-mem device: {error!r}") from None


def _own_memory(device: Device) -> RegionRange | None:
    if not isinstance(device, VirtioMem):
        return None
    return RegionRange(device.address, device.region.size, device.region)


def _guest_stats(balloon: VirtioBalloon) -> dict[str, int]:
    """What the guest says of itself, as new as it gives it within a moment; {} if it never did."""
    with contextlib.suppress(UnsupportedError, DeadlineError):
        balloon.request_stats(_STATS_PATIENCE_S)
    stats = balloon.stats
    return {} if stats is None else {name: value for name, value in asdict(stats).items() if value is not None}


def _name(device: Device) -> str:
    return {VirtioMem.device_id: "mem", VirtioBalloon.device_id: "balloon"}.get(device.device_id, "device")
