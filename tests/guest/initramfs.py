"""The guest's whole file system: busybox, the modules under test, and an init that obeys the console.

Init's protocol: it says `<<up>>`, then reads lines.  Each line is a number and a command;
what the command prints is followed by `<<number status>>`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from tests.guest.packages import Packages

# online_movable: memory that the kernel itself uses can never be unplugged again.
INIT = """#!/bin/sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=16g tmp /tmp
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
auto=/sys/devices/system/memory/auto_online_blocks
[ ! -e $auto ] || echo online_movable >$auto
for module in /modules/*.ko; do
    insmod $module || echo "insmod $module: $?"
done
exec </dev/CONSOLE >/dev/CONSOLE 2>&1
stty -echo
echo "<<up>>"
while read -r number command; do
    eval "$command"
    echo "<<$number $?>>"
done
poweroff -f
"""


def cpio(entries: Iterator[tuple[str, int, bytes, tuple[int, int]]]) -> bytes:
    """An archive in the format newc.

    Args:
        entries: Name, mode (its kind included), content, and device number (0, 0 where it is none).
    """
    archive = bytearray()

    def add(name: str, mode: int, content: bytes, device: tuple[int, int], links: int) -> None:
        raw = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, the file system's device, the entry's device, name, checksum
        fields = (len(archive) if mode else 0, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(raw), 0)
        archive.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + raw)
        archive.extend(bytes(-len(archive) % 4))
        archive.extend(content)
        archive.extend(bytes(-len(archive) % 4))

    for name, mode, content, device in entries:
        add(name, mode, content, device, 1)
    add("TRAILER!!!", 0, b"", (0, 0), 1)
    return bytes(archive)


def build(packages: Packages, modules: dict[str, bytes], console: str) -> bytes:
    """The archive.

    Args:
        packages: Where busybox is.
        modules: Name to content, inserted in the order of their names.
        console: The device in /dev that commands come from.
    """

    def entries() -> Iterator[tuple[str, int, bytes, tuple[int, int]]]:
        for folder in ("bin", "dev", "modules"):
            yield folder, stat.S_IFDIR | 0o755, b"", (0, 0)
        # Without it the kernel gives init no standard output.
        yield "dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)
        yield "bin/busybox", stat.S_IFREG | 0o755, packages.one("bin/busybox").read_bytes(), (0, 0)
        yield "bin/sh", stat.S_IFLNK | 0o777, b"busybox", (0, 0)
        yield "init", stat.S_IFREG | 0o755, INIT.replace("CONSOLE", console).encode(), (0, 0)
        for name, content in modules.items():
            yield f"modules/{name}.ko", stat.S_IFREG | 0o644, content, (0, 0)

    return cpio(entries())


def write(path: Path, packages: Packages, modules: dict[str, bytes], console: str) -> Path:
    """Builds the archive into a file."""
    path.write_bytes(build(packages, modules, console))
    return path
