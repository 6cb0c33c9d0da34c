"""How long a real guest takes to reach what it is asked for, with our devices and with QEMU's own, written in C.

    python benchmarks/guest_side_by_side.py [--rounds 5] > benchmarks/GUEST.md

The same kernel in the same QEMU (emulated, without KVM), with one pair of devices after the other, in rounds: what
slows the machine for a while slows all.  A time is from the request on the host's side to the answer or write with
which the driver has reached it, by one clock.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from attrs import frozen

from sparsemem import Memfd, Region
from tests.guest.console import until
from tests.guest.devices import TRACES, Devices, OwnDevices, own_arguments
from tests.guest.ours import OurDevices
from tests.guest.packages import packages
from tests.guest.qemu import MIB, RAM, Qemu, QemuGuest

AMOUNT = 256 * MIB
SIZE, BLOCK = 1024 * MIB, 2 * MIB
STEPS = {"plug": "<= 1.0", "plug with populate": "<= 1.5", "unplug": "", "inflate": "<= 1.0", "deflate": ""}
TEXT = """\
# A real guest, with our devices and with QEMU's own

How long a stock Debian kernel takes from a request on the host's side to the moment at which its driver has reached it.
To repeat it, with nothing else running ([what a real guest needs](../docs/virtio.md#a-real-guest)):

```console
$ python benchmarks/guest_side_by_side.py > benchmarks/GUEST.md
```

QEMU emulates the guest's processor (no KVM), and the guest's own work is most of every figure. Each round boots a guest
for each way: ours and QEMU's `virtio-mem-pci` and `virtio-balloon-pci`, with and without populating what is plugged
(`prealloc`). The range is a shared memfd in both, in blocks of 2 MiB. All plugs and unplugs are of 256 MiB, from and to
nothing, and so is the balloon. A figure is the median of {rounds} rounds (unplug, inflate, deflate: {twice}), with the
least and the most. The host's memory is used once before each measurement.

{table}

On {machine}.
"""


@frozen
class Way:
    """Devices to measure.

    Attributes:
        ours: Whether they are ours.
        populate: Whether a plug populates.
    """

    ours: bool
    populate: bool


WAYS = [Way(ours, populate) for populate in (False, True) for ours in (True, False)]


@contextlib.contextmanager
def running(qemu: Qemu, way: Way) -> Iterator[tuple[QemuGuest, Devices]]:
    """A guest with these devices."""
    if not way.ours:
        arguments = own_arguments(SIZE, block_size=BLOCK, prealloc=way.populate)
        with qemu.start(*arguments, traces=TRACES) as guest:
            yield guest, OwnDevices(guest, RAM)
        return
    name, creatable = qemu.vhost_user()
    with (
        Region(SIZE, block_size=BLOCK, backend=Memfd()) as region,
        # QEMU's own balloon has only these two features here.
        OurDevices(region, qemu.folder, prealloc=way.populate, stats=True, hinting=False, reporting=False) as devices,
        qemu.start(*creatable, *devices.arguments(name)) as guest,
    ):
        yield guest, devices


def warm() -> None:
    """Uses as much memory as is needed, once: in a virtual machine the first use costs several times as much."""
    with Region(RAM + AMOUNT, backend=Memfd()) as region:
        region.plug(0, region.nblocks)


def seconds(ask: Callable[[int], None], reached: Callable[[], bool], when: Callable[[], float], size: int) -> float:
    """From the request to the moment at which it was reached, as noted by the device itself."""
    began = time.time()
    ask(size)
    until(reached, f"{size:#x}")
    return when() - began


def measure(qemu: Qemu, way: Way) -> dict[str, float]:
    """One round with these devices: seconds by step."""
    with running(qemu, way) as (guest, devices):
        warm()
        without = guest.meminfo()["MemTotal"]

        def resize(size: int) -> float:
            took = seconds(
                devices.request, lambda: devices.plugged() == size, lambda: devices.requests()[-1].time, size
            )
            until(lambda: guest.meminfo()["MemTotal"] == without + size, "the guest is done, too")
            return took

        def balloon(size: int) -> float:
            took = seconds(devices.inflate, lambda: devices.ballooned() == size, devices.balloon_written, size)
            guest.run("true")
            return took

        found = {"plug with populate" if way.populate else "plug": resize(AMOUNT), "unplug": resize(0)}
        # The host has memory behind what is given to the balloon.
        guest.run("dd if=/dev/zero of=/tmp/file bs=1M count=320 2>/dev/null; rm /tmp/file")
        return {**found, "inflate": balloon(AMOUNT), "deflate": balloon(0)}


def table(found: dict[Way, dict[str, list[float]]]) -> list[str]:
    """The rows: medians in milliseconds with the least and the most, and the ratio of the medians."""
    rows = ["| 256 MiB | ours, ms | QEMU's, ms | ratio | target |", "|---|---|---|---|---|"]
    for step, target in STEPS.items():
        ours, theirs = (
            [took for way in WAYS if way.ours is mine for took in found[way].get(step, [])] for mine in (True, False)
        )
        ratio = statistics.median(ours) / statistics.median(theirs)
        rows.append(f"| {step} | {milliseconds(ours)} | {milliseconds(theirs)} | {ratio:.2f} | {target} |")
    return rows


def milliseconds(times: list[float]) -> str:
    """The median, and in what range they lie."""
    return f"{statistics.median(times) * 1e3:.0f} ({min(times) * 1e3:.0f} - {max(times) * 1e3:.0f})"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    unpacked = packages()
    found: dict[Way, dict[str, list[float]]] = {way: {} for way in WAYS}
    for number in range(options.rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                for step, took in measure(Qemu(unpacked, Path(folder)), way).items():
                    found[way].setdefault(step, []).append(took)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = "\n".join(table(found))
    print(TEXT.format(rounds=options.rounds, twice=2 * options.rounds, table=rows, machine=machine()), end="")


def machine() -> str:
    """What it ran on, in a few words."""
    models = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"Linux {platform.release()}, {len(models)} processors ({models[0]}), Python {platform.python_version()}"


if __name__ == "__main__":
    main()
