"""The parts that real guests are made of, looked at without a guest."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from tests.guest import initramfs, packages
from tests.guest.console import StuckError, until
from tests.guest.devices import ACK, BUSY, PLUG, UNPLUG, UNPLUG_ALL, parse_traces
from tests.guest.packages import PackagesMissingError

STANZAS = """\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main
"""


def test_the_release_gets_its_backports_from_the_same_place_and_other_sources_are_left_out() -> None:
    found = packages.backports_sources(STANZAS, "bookworm")
    assert found.splitlines() == [
        "Types: deb",
        "URIs: http://mirror.example/debian",
        "Suites: bookworm bookworm-backports",
        "Components: main",
        "Signed-By: /usr/share/keyrings/debian.gpg",
    ]
    assert packages.backports_sources(STANZAS, "trixie") == ""


def test_likewise_in_the_format_of_one_line() -> None:
    text = (
        "# deb http://no.example/debian bookworm main\ndeb [signed-by=/k] http://mirror.example/debian bookworm main\n"
    )
    assert packages.backports_sources(text, "bookworm").splitlines() == [
        "deb [signed-by=/k] http://mirror.example/debian bookworm main",
        "deb [signed-by=/k] http://mirror.example/debian bookworm-backports main",
    ]


def test_sources_come_from_the_machines_own_files(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(STANZAS)
    (tmp_path / "sources.list.d/other.sources").write_text(STANZAS.replace("bookworm", "stable"))
    (tmp_path / "sources.list.d/debian.sources.off").write_text(STANZAS)
    assert [name for name, _ in packages.machine_sources("bookworm", tmp_path)] == ["debian.sources"]
    with pytest.raises(PackagesMissingError, match="no source of apt has the suite trixie"):
        list(packages.machine_sources("trixie", tmp_path))


def test_what_is_unpacked_here_is_fetched_even_where_it_is_installed() -> None:
    status = "Package: qemu-system-x86\nStatus: installed\n\nPackage: libc6\nVersion: 2\n\nPackage: seabios\n"
    assert packages.installed_without_qemu(status) == "Package: libc6\nVersion: 2"


@pytest.mark.parametrize("text", ["", "ID=ubuntu\nVERSION_CODENAME=noble\n", "ID=debian\n"])
def test_another_system_is_told_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "os-release").write_text(text)
    with pytest.raises(PackagesMissingError, match="no Debian release"):
        packages.debian_release(tmp_path / "os-release")


def test_without_apt_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "debian_release", lambda: "bookworm")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("SPARSEMEM_GUEST_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(PackagesMissingError, match="no apt-get"):
        packages.packages()
    assert not list(tmp_path.iterdir())


def test_another_machine_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(PackagesMissingError, match="built for x86_64, this machine is riscv64"):
        packages.packages()


def test_a_failure_of_apt_is_told_and_the_next_try_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    apt = tmp_path / "bin/apt-get"
    apt.write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setattr(packages, "debian_release", lambda: "bookworm")
    monkeypatch.setattr(packages, "machine_sources", lambda release: [("debian.sources", STANZAS)])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(packages, "installed_without_qemu", lambda status: "")
    monkeypatch.setenv("SPARSEMEM_GUEST_CACHE", str(tmp_path / "cache"))
    if shutil.which("dpkg-deb") is None:
        (tmp_path / "bin/dpkg-deb").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for _ in range(2):
        with pytest.raises(PackagesMissingError, match="apt-get update: E: no network"):
            packages.packages()
    assert not (tmp_path / "cache/bookworm-amd64/complete").exists()


def test_only_what_the_guests_need_is_kept(tmp_path: Path) -> None:
    for name in ("bin/busybox", "usr/share/doc/busybox/copyright", "boot/vmlinuz-6", "boot/config-6"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    packages.keep(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "bin",
        "bin/busybox",
        "boot",
        "boot/vmlinuz-6",
    ]


def test_the_archive_has_the_kernels_format() -> None:
    entries = [
        ("bin", stat.S_IFDIR | 0o755, b"", (0, 0)),
        ("init", stat.S_IFREG | 0o755, b"#!/bin/sh\n", (0, 0)),
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
    ]
    archive = initramfs.cpio(iter(entries))
    found, at = [], 0
    while at < len(archive):
        assert at % 4 == 0
        header = archive[at : at + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11]]
        assert name.endswith(b"\0")
        at += -(-(110 + fields[11]) // 4) * 4
        content = archive[at : at + fields[6]]
        at += -(-fields[6] // 4) * 4
        found.append((name[:-1].decode(), fields[1], content, (fields[9], fields[10])))
    assert found == [*entries, ("TRAILER!!!", 0, b"", (0, 0))]


def test_qemus_traces_are_read_as_requests_and_answers() -> None:
    log = """\
17@1.250000:virtio_mem_resized_usable_region old_size=0x0new_size=0x20000000
17@1.500000:virtio_mem_plug_request addr=0x140000000 nb_blocks=64
17@1.750000:virtio_mem_send_response type=0
17@2.000000:virtio_mem_unplug_request addr=0x148000000 nb_blocks=1
17@2.250000:virtio_mem_send_response type=2
17@2.500000:virtio_mem_unplugged_all
17@2.750000:virtio_mem_send_response type=0
"""
    found = list(parse_traces(log))
    assert [request.facts for request in found] == [
        (PLUG, 0x140000000, 64, ACK),
        (UNPLUG, 0x148000000, 1, BUSY),
        (UNPLUG_ALL, 0, 0, ACK),
    ]
    assert [request.time for request in found] == [1.75, 2.25, 2.75]


def test_a_wait_ends_with_the_condition_or_says_what_it_waited_for() -> None:
    answers = iter([0, "", "there"])
    assert until(lambda: next(answers), "an answer") == "there"
    with pytest.raises(StuckError, match="the impossible"):
        until(lambda: False, "the impossible", watchdog=0.05)
