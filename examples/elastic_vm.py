"""A virtual machine whose memory follows its work: the guest's statistics in, a requested size out, by a small policy.

    python examples/elastic_vm.py [elastic_vm.png]

A stock Debian kernel runs in QEMU, and a script in it needs more memory and less, for a minute or so. Its balloon tells
how much is in use, the policy how much there should be, and virtio-mem brings it. The picture shows what came of that.
The guest is the tests' (tests/guest): Debian packages, fetched with apt into a cache and not installed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

sys.path.insert(0, str(Path(__file__).parent.parent))

from sparsemem import Memfd, Region, format_size
from tests.guest.ours import OurDevices
from tests.guest.packages import PackagesMissingError, packages
from tests.guest.qemu import RAM, Qemu, QemuGuest

MIB = 1 << 20
LIMIT, STEP, SPARE = 2048 * MIB, 128 * MIB, 160 * MIB
PEAKS = (300, 900, 500, 1300, 200)  # MiB that the work needs, one after the other


def policy(lately: Sequence[int], total: int, plugged: int) -> int:
    """How much the guest should have plugged: for the most that it used in the last seconds, and some more."""
    used, at_boot = max(lately), total - plugged
    wanted = used + used // 8 + SPARE - at_boot
    wanted = min(max(-(-wanted // STEP) * STEP, 0), LIMIT)
    if plugged - STEP <= wanted < plugged:
        return plugged  # not worth the guest's moving things about
    return wanted


# The work: files in memory, 32 MiB at a time, up to each peak and down to a third of it.
WORK = f"""
    n=0
    for peak in {" ".join(str(peak // 32) for peak in PEAKS)}; do
        while [ $n -lt $peak ]; do dd if=/dev/zero of=/tmp/$n bs=1M count=32; n=$((n + 1)); sleep 0.1; done
        sleep 2
        while [ $n -gt $((peak / 3)) ]; do n=$((n - 1)); rm /tmp/$n; sleep 0.1; done
        sleep 2
    done
    touch /tmp/done
"""


@frozen
class Sample:
    """One moment: seconds since the start, and bytes."""

    time: float
    total: int
    used: int
    requested: int
    plugged: int
    host: int


def run(guest: QemuGuest, devices: OurDevices) -> list[Sample]:
    """Lets the work run, and the policy with it."""
    samples: list[Sample] = []
    lately: deque[int] = deque(maxlen=8)
    guest.run(f"({'; '.join(filter(None, map(str.strip, WORK.splitlines())))}) 2>/dev/null &".replace("do;", "do"))
    began = time.monotonic()
    while guest.run("[ -e /tmp/done ] && echo done", check=False) != "done\n":
        stats = devices.balloon_device.request_stats(60)
        assert stats.total is not None
        assert stats.available is not None
        assert not stats.oom_kills, "the policy was too slow, or too mean"
        lately.append(stats.total - stats.available)
        wanted = policy(lately, stats.total, devices.plugged())
        if wanted != devices.mem.requested_size:
            devices.request(wanted)
        samples.append(
            Sample(
                time=time.monotonic() - began,
                total=stats.total,
                used=lately[-1],
                requested=wanted,
                plugged=devices.plugged(),
                host=devices.backed() + devices.ram_backed(),
            )
        )
        time.sleep(0.2)
    return samples


def draw(samples: list[Sample], target: Path) -> None:
    """Memory over time, as a PNG."""
    from matplotlib import pyplot

    def curve(name: str) -> list[float]:
        return [getattr(sample, name) / (1 << 30) for sample in samples]

    times, at_boot = [sample.time for sample in samples], (samples[0].total - samples[0].plugged) / (1 << 30)
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    axes.fill_between(times, curve("used"), color="#4c78a8", alpha=0.35, linewidth=0, label="used by the guest")
    axes.plot(times, curve("used"), color="#4c78a8", linewidth=1)
    wanted = [at_boot + size for size in curve("requested")]
    axes.step(times, wanted, where="post", color="#f58518", linewidth=1.2, linestyle="--", label="wanted by the policy")
    axes.plot(times, curve("total"), color="#222222", linewidth=1.8, label="what the guest has")
    axes.plot(times, curve("host"), color="#54a24b", linewidth=1.5, label="memory of the host behind it")
    axes.axhline(at_boot, color="#777777", linewidth=1, linestyle=":", label="what it booted with")
    axes.set(title="A virtual machine whose memory follows its work", xlabel="seconds", ylabel="GiB")
    axes.set_xlim(0, times[-1])
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(target, dpi=130)


def main() -> None:
    import matplotlib  # here, so that what is missing is missed before the work

    matplotlib.use("Agg")
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "elastic_vm.png").absolute()
    with (
        tempfile.TemporaryDirectory() as folder,
        Region(LIMIT, block_size="2M", backend=Memfd()) as region,
        OurDevices(region, Path(folder)) as devices,
    ):
        qemu = Qemu(packages(), Path(folder))
        name, creatable = qemu.vhost_user()
        with qemu.start(*creatable, *devices.arguments(name)) as guest:
            samples = run(guest, devices)
    draw(samples, target)
    most, last = max(sample.plugged for sample in samples), samples[-1].plugged
    print(f"booted with {format_size(RAM)}; plugged at most {format_size(most)}, at the end {format_size(last)}")
    print(f"no process was killed for want of memory; {target}")
    assert max(PEAKS) * MIB - RAM < most
    assert last < most / 2


if __name__ == "__main__":
    try:
        main()
    except (PackagesMissingError, ImportError) as error:
        print(f"this example needs something more: {error}")
