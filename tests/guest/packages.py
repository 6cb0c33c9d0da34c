"""Debian packages for the guests: fetched into a cache of our own, unpacked, never installed.

Nothing of the system's own package state is changed.  apt runs with lists, archives and
sources of its own: the machine's Debian sources, with the backports suite added, which has
a QEMU and a kernel that are new enough.  Packages are named by suite, never by version.

The cache is `$SPARSEMEM_GUEST_CACHE`, else `sparsemem-guest` in the user's cache folder; what
is kept of the packages takes about 70 MB there.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

DEBIAN_ARCHITECTURE = {"x86_64": "amd64"}
# What of the packages is kept: paths in the unpacked tree, the rest is deleted.
KEPT = (
    "bin/busybox",
    "usr/bin/qemu-system-x86_64",
    "usr/bin/linux.uml",
    "usr/share/qemu/*.bin",
    "usr/share/qemu/*.rom",
    "usr/share/seabios/*.bin",
    "usr/lib/*-linux-gnu/*.so*",
    "lib/*-linux-gnu/*.so*",
    "boot/vmlinuz-*",
    "lib/modules/*/kernel/drivers/virtio/virtio_*",
    "usr/lib/uml/modules/*/kernel/drivers/virtio/virtio_*",
)


class PackagesMissingError(Exception):
    """The guest cannot be had on this machine; the text says why."""


@frozen
class Packages:
    """The unpacked tree.

    Attributes:
        root: Its folder.
    """

    root: Path

    def one(self, pattern: str) -> Path:
        """The one file that fits the pattern.

        Raises:
            PackagesMissingError: There is none, or there are several.
        """
        found = sorted(self.root.glob(pattern))
        if len(found) != 1:
            raise PackagesMissingError(f"the unpacked packages hold {len(found)} files {pattern}, not one")
        return found[0]

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which the unpacked programs find their libraries."""
        folders = [
            str(folder) for pattern in ("usr/lib/*-linux-gnu", "lib/*-linux-gnu") for folder in self.root.glob(pattern)
        ]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders)}

    def module(self, name: str, folder: str = "lib/modules") -> bytes:
        """A kernel module's content, unpacked if it was packed."""
        path = self.one(f"{folder}/*/kernel/drivers/virtio/{name}.ko*")
        content = path.read_bytes()
        return lzma.decompress(content) if path.suffix == ".xz" else content


def cache_folder() -> Path:
    """Where the packages are kept."""
    if folder := os.environ.get("SPARSEMEM_GUEST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsemem-guest"


def packages() -> Packages:
    """The packages of this machine's Debian release, fetched if the cache lacks them.

    Raises:
        PackagesMissingError: No Debian, no apt, no network, or no such packages.
    """
    architecture = DEBIAN_ARCHITECTURE.get(platform.machine())
    if architecture is None:
        raise PackagesMissingError(f"the guest is built for x86_64, this machine is {platform.machine()}")
    release = debian_release()
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise PackagesMissingError(f"no {program} on this machine")
    folder = cache_folder() / f"{release}-{architecture}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not (folder / "complete").exists():
                fetch(folder, release)
    except OSError as error:
        raise PackagesMissingError(f"the cache {folder} cannot be used: {error}") from error
    return Packages(folder / "root")


def debian_release(os_release: Path = Path("/etc/os-release")) -> str:
    """The release's code name.

    Raises:
        PackagesMissingError: This is no Debian.
    """
    text = os_release.read_text() if os_release.exists() else ""
    facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if facts.get("ID") != "debian" or "VERSION_CODENAME" not in facts:
        raise PackagesMissingError("this machine is no Debian release")
    return facts["VERSION_CODENAME"].strip('"')


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time fills the cache; the others wait for it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def backports_sources(text: str, release: str) -> str:
    """The sources of this release in one sources file, with its backports beside it; both formats of apt.

    Args:
        text: A file of the machine's.
        release: The code name, which is also the suite's name.

    Returns:
        The stanzas or lines that have the suite; empty if none has.
    """
    kept = []
    if re.search(r"^Types:", text, re.MULTILINE):
        for stanza in re.split(r"\n\s*\n", text):
            lines = [line for line in stanza.splitlines() if not line.startswith("#")]
            for number, line in enumerate(lines):
                if line.startswith("Suites:") and release in line.split()[1:]:
                    lines[number] = f"Suites: {release} {release}-backports"
                    kept.append("\n".join(lines) + "\n")
        return "\n".join(kept)
    for line in text.splitlines():
        if re.match(r"deb\s", line) and release in line.split():
            kept += [line, re.sub(rf"(?<=\s){release}(?=\s)", f"{release}-backports", line)]
    return "".join(line + "\n" for line in kept)


def machine_sources(release: str, folder: Path = Path("/etc/apt")) -> Iterator[tuple[str, str]]:
    """Name and text of each sources file that our apt gets.

    Raises:
        PackagesMissingError: The machine has no source of this release.
    """
    found = False
    for path in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        if path.suffix not in (".list", ".sources") or not path.exists():
            continue
        if text := backports_sources(path.read_text(), release):
            found = True
            yield path.name, text
    if not found:
        raise PackagesMissingError(f"no source of apt has the suite {release}")


@frozen
class Apt:
    """apt with state of its own, in a folder."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, release: str) -> Apt:
        """Writes the settings."""
        for name in ("lists/partial", "archives/partial", "state", "sources.list.d", "preferences.d", "debs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, text in machine_sources(release):
            (folder / "sources.list.d" / name).write_text(text)
        pinned = f"Package: qemu-* seabios linux-image-*\nPin: release n={release}-backports\nPin-Priority: 990\n"
        (folder / "preferences").write_text(pinned)
        settings = {
            "Dir::State": folder / "state",
            "Dir::State::lists": folder / "lists",
            "Dir::Cache": folder,
            "Dir::Cache::archives": folder / "archives",
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": folder / "sources.list.d",
            "Dir::Etc::preferences": folder / "preferences",
            "Dir::Etc::preferencesparts": folder / "preferences.d",
            "Dir::State::status": folder / "status",
            "Acquire::Languages": "none",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",  # the cache may lie where apt's own user cannot go
            "APT::Update::Post-Invoke-Success": "",
            "Debug::NoLocking": "true",
        }
        (folder / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
        (folder / "status").write_text(installed_without_qemu(Path("/var/lib/dpkg/status").read_text()))
        return cls(folder)

    def run(self, *arguments: str) -> str:
        """Runs apt-get and returns what it prints.

        Raises:
            PackagesMissingError: It failed.
        """
        done = subprocess.run(
            ["apt-get", "-q", "-y", *arguments],
            env={**os.environ, "APT_CONFIG": str(self.folder / "apt.conf"), "LC_ALL": "C"},
            cwd=self.folder / "debs",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]
            raise PackagesMissingError(f"apt-get {arguments[0]}: {' '.join(told) or done.stderr.strip()}")
        return done.stdout

    def wanted(self, *names: str) -> list[str]:
        """The packages that installing these would bring here: they, and libraries that the machine lacks."""
        lines = self.run("-s", "install", *names).splitlines()
        return [line.split()[1] for line in lines if line.startswith("Inst ")]


def installed_without_qemu(status: str) -> str:
    """What dpkg says is installed, without what we unpack ourselves, which would not be fetched otherwise."""
    unwanted = re.compile(r"Package: (qemu-|seabios$|ipxe-qemu|busybox|user-mode-linux|linux-image-)", re.MULTILINE)
    return "\n\n".join(stanza for stanza in status.split("\n\n") if not unwanted.match(stanza))


def fetch(folder: Path, release: str) -> None:
    """Fills the cache; the stamp comes last, so that whoever was killed on the way is followed by a fresh start."""
    for old in ("apt", "root"):
        shutil.rmtree(folder / old, ignore_errors=True)
    apt = Apt.make(folder / "apt", release)
    apt.run("update", "-o", "APT::Update::Error-Mode=any")
    programs = apt.wanted("qemu-system-x86", "busybox-static", "user-mode-linux")
    kernels = [name for name in apt.wanted("linux-image-cloud-amd64") if re.match(r"linux-image-\d", name)]
    apt.run("download", *programs, *kernels)
    root = folder / "root"
    for package in sorted((apt.folder / "debs").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)
        package.unlink()
    keep(root)
    check_libraries(Packages(root))
    shutil.rmtree(apt.folder)
    (folder / "complete").write_text("\n".join([*programs, *kernels]) + "\n")


def keep(root: Path) -> None:
    """Deletes all but what the guests need."""
    wanted = {path for pattern in KEPT for path in root.glob(pattern)}
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in wanted:
            path.unlink()


def check_libraries(packages: Packages) -> None:
    """Raises PackagesMissingError if QEMU would not start for want of a library."""
    program = packages.one("usr/bin/qemu-system-x86_64")
    told = subprocess.run(["ldd", program], env=packages.environment, capture_output=True, text=True, check=True).stdout
    if missing := [line.split()[0] for line in told.splitlines() if "not found" in line]:
        raise PackagesMissingError(f"QEMU lacks libraries: {', '.join(missing)}")
