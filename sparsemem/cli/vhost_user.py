"""`sparsemem vhost-user`: virtio-mem and balloon devices, served to a VMM."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from sparsemem.backends import Backend, File, Memfd, from_text
from sparsemem.cli.live import watching
from sparsemem.cli.vmm import qemu_lines
from sparsemem.units import parse_size

if TYPE_CHECKING:
    from sparsemem.region import Region
    from sparsemem.virtio.vhost_user.service import Export

_HELP = "serve virtio-mem and balloon devices to a virtual machine"
_DESCRIPTION = """\
Serves a virtio-mem device, a balloon or both over vhost-user sockets, which a
VMM such as QEMU connects to, and prints the VMM's arguments that go with it.
Ends on SIGTERM or SIGINT; `sparsemem ctl` talks to it meanwhile.
"""
_EPILOG = """\
examples:
  sparsemem vhost-user mem --socket /run/vm/mem.sock --size 4G --requested 1G
  sparsemem vhost-user mem --socket mem.sock --size 4G --with-balloon balloon.sock --control ctl.sock
  sparsemem vhost-user mem --socket mem.sock --size 4G --region file:/dev/shm/vm --state vm.state
  sparsemem vhost-user balloon --socket balloon.sock --control ctl.sock --watch
"""
_ADDRESS = 0x1_4000_0000


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _backend(text: str) -> Backend:
    try:
        backend = from_text(text)
    except (ValueError, OSError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(backend, (Memfd, File)) or not backend.shared:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be shared with a VMM: a shared memfd or file can")
    return backend


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "vhost-user",
        help=_HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    devices = parser.add_subparsers(dest="device", metavar="DEVICE", required=True, parser_class=type(parser))
    mem = devices.add_parser("mem", help="a virtio-mem device, with or without a balloon")
    mem.add_argument("--size", type=_bytes, required=True, help="how large the device's memory can become")
    mem.add_argument("--requested", type=_bytes, default=0, help="how much the guest is to plug at first (default: 0)")
    mem.add_argument("--block-size", type=_bytes, help="bytes of a block (default: 2M, or the backend's page)")
    mem.add_argument("--region", type=_backend, default="memfd", help="where the memory comes from (default: memfd)")
    mem.add_argument(
        "--address", type=_bytes, default=_ADDRESS, help=f"where it is in the guest (default: {_ADDRESS:#x})"
    )
    mem.add_argument("--node", type=int, help="the guest's NUMA node that it belongs to")
    mem.add_argument("--usable", choices=("window", "all"), default="window", help="what may be plugged beyond that")
    mem.add_argument("--no-prealloc", action="store_true", help="let the guest's accesses populate the memory")
    mem.add_argument("--with-balloon", metavar="SOCKET", help="serve a balloon, too")
    balloon = devices.add_parser("balloon", help="a balloon alone")
    for each in (mem, balloon):
        each.add_argument("--socket", required=True, help="where the VMM connects")
        each.add_argument("--control", metavar="SOCKET", help="where `sparsemem ctl` connects")
        each.add_argument("--state", metavar="FILE", help="keep the state there, for the next process")
        each.add_argument("--watch", action="store_true", help="show what happens, as it happens")
        each.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serves until it is told to end."""
    # Here and not above: the other commands need none of it.
    from sparsemem.virtio.vhost_user.service import Service

    with _ending() as end, contextlib.ExitStack() as stack:
        exports, region = _exports(options, stack)
        with Service(exports, options.control) as service:
            print("\n".join(qemu_lines(exports, region, os.getpid())), flush=True)
            if options.watch:
                watching(service.stats, end, sys.stdout)
            else:
                end.wait()
    return 0


@contextlib.contextmanager
def _ending() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set."""
    end = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        end.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exports(options: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[tuple[Export, ...], Region | None]:
    """The devices that the options describe, and the region of the virtio-mem device."""
    from sparsemem.virtio.balloon import VirtioBalloon
    from sparsemem.virtio.guest_memory import GuestMemory
    from sparsemem.virtio.mem import VirtioMem
    from sparsemem.virtio.vhost_user.service import Export, region_for

    exports: list[Export] = []
    region: Region | None = None
    balloon, balloon_state = options.socket, options.state
    if options.device == "mem":
        region = region_for(options.size, options.region, block_size=options.block_size, state=options.state)
        stack.enter_context(region)
        mem = VirtioMem(
            region,
            address=options.address,
            requested_size=options.requested,
            node_id=options.node,
            prealloc=not options.no_prealloc,
            usable=options.usable,
        )
        exports.append(Export(mem, options.socket, GuestMemory(regions=[region]), options.state))
        balloon = options.with_balloon
        balloon_state = None if options.state is None else f"{options.state}.balloon"
    if balloon is not None:
        memory = GuestMemory(regions=[] if region is None else [region])
        device = VirtioBalloon(memory)
        stack.callback(device.close)
        exports.append(Export(device, balloon, memory, balloon_state))
    return tuple(exports), region
