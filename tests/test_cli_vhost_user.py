"""`sparsemem vhost-user` and `sparsemem ctl`: from the options to a guest that is served, and to the end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsemem.cli import live
from sparsemem.cli import main as cli
from sparsemem.virtio.vhost_user.control import ask
from tests.test_cli import COMMAND, output_of
from tests.virtio.frontend import Frontend, Guest, Ring
from tests.virtio.test_vhost_user import wait_for

ADDRESS = 0x1_4000_0000
BLOCK = 2 << 20
PLUG, UNPLUG, UNPLUG_ALL = range(3)


class Process:
    """A running `sparsemem vhost-user`."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [*COMMAND, "vhost-user", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test run in the background may have it ignored, which children inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.said: list[str] = []

    def until_serving(self, last: str) -> None:
        """Reads what it prints, up to a line with this in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip("\n"))
            if last in line:
                return
        raise AssertionError(f"it ended: {self.said} {self.process.communicate()[1]}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """The exit status and what it wrote to standard error."""
        self.process.send_signal(number)
        _, told = self.process.communicate(timeout=30)
        return self.process.returncode, told


@contextlib.contextmanager
def serving(*arguments: str | Path, last: str = "virtio-id=") -> Iterator[Process]:
    process = Process(*arguments)
    try:
        process.until_serving(last)
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
        process.process.communicate()


class Machine:
    """A guest that has the virtio-mem device; it outlives backends."""

    def __init__(self) -> None:
        self.guest = Guest(32 << 20)
        self.ring = Ring(self.guest, 128)

    def connect(self, process: Process, path: Path, size: int) -> Frontend:
        match = next(filter(None, (re.search(r"mem-path=/proc/(\d+)/fd/(\d+)", line) for line in process.said)))
        fd = os.open(f"/proc/{match[1]}/fd/{match[2]}", os.O_RDWR)
        frontend = Frontend(str(path))
        frontend.introduce()
        assert frontend.share([(0, self.guest.size, self.guest.fd), (ADDRESS, size, fd)]) == 0
        os.close(fd)
        frontend.start([self.ring], 0, [self.ring.used_index()])
        return frontend

    def ask(self, operation: int, block: int = 0, count: int = 0) -> int:
        request = struct.pack("<H6xQH6x", operation, ADDRESS + block * BLOCK, count)
        return int(struct.unpack("<H6xH", self.ring.request(request, 10))[0])

    def close(self) -> None:
        self.ring.close()
        self.guest.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def run_ctl(path: Path, *arguments: str) -> tuple[int, str]:
    return output_of("ctl", "--socket", str(path), *arguments)


# ---- serving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end_and_leaves_no_file(tmp_path: Path, number: signal.Signals) -> None:
    sockets = tmp_path / "m", tmp_path / "b", tmp_path / "c"
    options = ("--size", "256M", "--requested", "64M", "--control", sockets[2])
    with serving("mem", "--socket", sockets[0], "--with-balloon", sockets[1], *options, last="user-mode") as process:
        assert sorted(os.listdir(tmp_path)) == ["b", "c", "m"]
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in sockets)
        assert process.end(number) == (0, "")
    assert os.listdir(tmp_path) == []


def test_a_guest_is_served_and_told_to_resize_by_ctl(tmp_path: Path, machine: Machine) -> None:
    control = tmp_path / "c"
    options = ("--size", "256M", "--requested", "64M", "--control", control)
    with serving("mem", "--socket", tmp_path / "m", *options) as process:
        with contextlib.closing(machine.connect(process, tmp_path / "m", 256 << 20)) as frontend:
            assert machine.ask(PLUG, 0, 32) == 0
            assert machine.ask(PLUG, 32, 1) == 1, "more than requested: NACK"
            status, said = run_ctl(control, "resize", "128M")
            assert (status, said) == (0, "requested size  128M\nplugged size    64M\n")
            frontend.wait_for_notice()
            assert machine.ask(PLUG, 40, 2) == 0
            status, said = run_ctl(control, "map")
            assert status == 0
            assert said.splitlines() == [
                "RANGE                                  SIZE  BLOCK",
                "0x0000000140000000-0x0000000143ffffff   64M  0-31",
                "0x0000000145000000-0x00000001453fffff    4M  40-41",
            ]
            shown = json.loads(run_ctl(control, "stats", "--json")[1])["mem"]
            assert (shown["plugged_size"], shown["answers"]["PLUG NACK"]) == (68 << 20, 1)
            told = run_ctl(control, "stats")[1]
            assert "mem: running, 3 requests answered" in told
            assert "plugged 68M of 256M, requested 128M" in told
            assert json.loads(run_ctl(control, "map", "--json")[1])["plugged"] == [[0, 32], [40, 2]]
        assert process.end() == (0, "")


def test_it_is_killed_and_started_again_and_the_guest_goes_on(tmp_path: Path, machine: Machine) -> None:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        memory = folder / "memory"
        command = ("mem", "--socket", folder / "m", "--size", "64M", "--requested", "32M")
        command += ("--region", f"file:{memory}", "--state", folder / "state")
        with serving(*command) as process, contextlib.closing(machine.connect(process, folder / "m", 64 << 20)):
            assert machine.ask(PLUG, 3, 4) == 0
            with open(memory, "r+b") as content:
                content.seek(3 * BLOCK)
                content.write(b"the guest's")
            process.process.kill()
            process.process.wait()
        with serving(*command) as process:
            with contextlib.closing(machine.connect(process, folder / "m", 64 << 20)):
                assert machine.ask(PLUG, 3, 1) == 3, "it is plugged already: ERROR"
                assert machine.ask(UNPLUG, 4, 3) == 0
                with open(memory, "rb") as content:
                    content.seek(3 * BLOCK)
                    assert content.read(11) == b"the guest's"
            assert process.end() == (0, "")
        assert os.stat(memory).st_blocks * 512 == BLOCK
        with serving(*command, "--control", folder / "c") as process:
            assert ask(str(folder / "c"), "map")["plugged"] == [[3, 1]]
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_the_balloon_alone(tmp_path: Path) -> None:
    control = tmp_path / "c"
    with serving("balloon", "--socket", tmp_path / "b", "--control", control, last="user-mode") as process:
        assert not any("memory-backend-file" in line for line in process.said)
        assert run_ctl(control, "inflate", "256M") == (0, "target size  256M\nactual size  0\n")
        assert "balloon 0, wanted 256M" in run_ctl(control, "stats")[1]
        assert process.end() == (0, "")


def test_the_arguments_for_qemu_are_those_of_the_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has 107 bytes at most, and this is a long name in a deep folder
    socket = Path("a socket, with commas")
    options = ("--size", "1G", "--address", "0x200000000", "--with-balloon", "b")
    with serving("mem", "--socket", socket, *options, last="user-mode") as process:
        text = "\n".join(line for line in process.said if not line.startswith("#"))
        program, *words = shlex.split(text.replace("\\\n", " "))
        assert program == "qemu-system-x86_64"
        assert len(words) % 2 == 0
        given = list(zip(words[::2], words[1::2], strict=True))
        assert ("-device", "virtio-pmem-pci,memdev=vm,memaddr=0x200000000") in given
        assert ("-chardev", f"socket,id=mem,path={str(socket.absolute()).replace(',', ',,')}") in given, (
            "as QEMU wants a comma"
        )
        devices = dict(re.findall(r"virtio-id=(\d+),(num_vqs=\d+,vq_size=128,config_size=\d+)", text))
        assert devices == {"24": "num_vqs=1,vq_size=128,config_size=56", "5": "num_vqs=5,vq_size=128,config_size=16"}
        (backing,) = [value for _, value in given if value.startswith("memory-backend-file")]
        pid = process.process.pid
        assert re.fullmatch(rf"memory-backend-file,id=vm,size=1G,share=on,mem-path=/proc/{pid}/fd/\d+", backing)
        path = backing.rpartition("=")[2]
        assert os.stat(path).st_size == 1 << 30
        assert ("-m", "512M,maxmem=4G,slots=4") in given


def test_watching_prints_a_line_now_and_then_where_nobody_can_see_a_picture(tmp_path: Path) -> None:
    options = ("--size", "64M", "--requested", "32M", "--watch")
    with serving("mem", "--socket", tmp_path / "m", *options, last="waiting for a VMM") as process:
        line = process.said[-1]
        assert re.match(r"\d\d:\d\d:\d\d mem: waiting for a VMM, 0 requests answered; \[.*\| *", line)
        assert "plugged 0 of 64M, requested 32M" in line
        assert process.end() == (0, "")


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["vhost-user"], 2, "required: DEVICE"),
        (["vhost-user", "disk"], 2, "invalid choice"),
        (["vhost-user", "mem", "--socket", "s"], 2, "required: --size"),
        (["vhost-user", "mem", "--size", "1G"], 2, "required: --socket"),
        (["vhost-user", "mem", "--socket", "s", "--size", "1GB"], 2, "ambiguous"),
        (["vhost-user", "mem", "--socket", "s", "--size", "1G", "--region", "anonymous"], 2, "cannot be shared"),
        (["vhost-user", "mem", "--socket", "s", "--size", "1G", "--region", "memfd:private"], 2, "cannot be shared"),
        (["vhost-user", "mem", "--socket", "s", "--size", "3M"], 1, "not a multiple of"),
        (["vhost-user", "mem", "--socket", "s", "--size", "4M", "--requested", "8M"], 1, "more than the region's size"),
        (["vhost-user", "mem", "--socket", "s", "--size", "4M", "--address", "4096"], 1, "not a multiple of 2M"),
        (["vhost-user", "mem", "--socket", "s", "--size", "4M", "--node", "70000"], 1, "node_id 70000"),
        (["vhost-user", "mem", "--socket", "/nowhere/s", "--size", "4M"], 1, "/nowhere/s: No such file"),
        (["vhost-user", "balloon", "--socket", "/nowhere/s"], 1, "/nowhere/s: No such file"),
        (["ctl", "stats"], 2, "required: --socket"),
        (["ctl", "--socket", "s"], 2, "required: ORDER"),
        (["ctl", "--socket", "s", "resize"], 2, "required: size"),
        (["ctl", "--socket", "s", "resize", "much"], 2, "is not a size"),
        (["ctl", "--socket", "/nowhere/s", "stats"], 1, "/nowhere/s: No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str],
    status: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("sparsemem: error: ")
    assert len(captured.err.splitlines()) == 1
    assert says in captured.err
    assert not captured.out
    assert os.listdir(tmp_path) == []


def test_a_state_whose_memory_is_gone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = json.dumps({"region_size": 64 << 20, "block_size": BLOCK, "plugged": [[0, 1]]})
    from sparsemem.virtio.vhost_user.state import Journal

    Journal(str(tmp_path / "state"), 24).record(json.loads(body), None)
    arguments = ["--socket", str(tmp_path / "s"), "--size", "64M", "--state", str(tmp_path / "state")]
    assert cli.main(["vhost-user", "mem", *arguments]) == 1
    assert "blocks are plugged, but memfd begins with nothing in them" in capsys.readouterr().err


def test_a_refused_command_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("balloon", "--socket", tmp_path / "b", "--control", tmp_path / "c", last="user-mode"):
        assert run_ctl(tmp_path / "c", "resize", "1G") == (1, "")
    assert capsys.readouterr().err == "sparsemem: error: there is no virtio-mem device here\n"


# ---- the live view ----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def figures(**changed: Any) -> dict[str, Any]:
    connection = {"connected": True, "running": 1, "answered": [5], "needs_reset": "", "trouble": ""}
    connection |= {name: changed.pop(name) for name in list(changed) if name in connection}
    return {"connection": connection, **changed}


def test_the_picture_shows_how_far_each_device_is() -> None:
    mem = figures(plugged_size=512 << 20, requested_size=1 << 30, region_size=2 << 30, answers={"PLUG ACK": 7})
    balloon = figures(target_size=64 << 20, actual_size=32 << 20, guest={"total": 224 << 20, "free": 100 << 20})
    assert live.picture({"mem": mem, "balloon": balloon}) == [
        "mem: running, 5 requests answered",
        "  [" + "#" * 12 + "." * 12 + "|" + "." * 24 + "] plugged 512M of 2G, requested 1G",
        "  PLUG ACK 7",
        "balloon: running, 5 requests answered",
        "  [" + "#" * 6 + "." * 6 + "|" + "." * 36 + "] balloon 32M, wanted 64M",
        "  total  224M",
        "  free   100M",
    ]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"connected": False, "running": 0}, "mem: waiting for a VMM"),
        ({"running": 0}, "mem: connected"),
        ({"needs_reset": "queue 0: bad"}, "mem: needs a reset: queue 0: bad"),
        ({"trouble": "the disk is full"}, "mem: the disk is full"),
    ],
)
def test_the_picture_says_what_is_the_matter(changed: dict[str, Any], says: str) -> None:
    assert live.picture({"mem": figures(**changed)})[0] == f"{says}, 5 requests answered"


def test_on_a_terminal_the_picture_stays_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_EVERY_S", 0.001)
    end, stream = threading.Event(), Terminal()
    pictures = [{"a": figures(), "b": figures()}, {"a": figures()}]

    def stats() -> dict[str, Any]:
        if len(pictures) == 1:
            end.set()
        return pictures.pop(0) if len(pictures) > 1 else pictures[0]

    live.watching(stats, end, stream)
    drawn = stream.getvalue().split("\x1b[2A\r")
    assert drawn[0] == "a: running, 5 requests answered\x1b[K\nb: running, 5 requests answered\x1b[K\n"
    assert drawn[1] == "a: running, 5 requests answered\x1b[K\n\x1b[K\n", "what is no more is wiped out"


def test_the_end_of_watching_is_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_EVERY_S", 0.001)
    end, stream = threading.Event(), io.StringIO()
    thread = threading.Thread(target=live.watching, args=(lambda: {"a": figures()}, end, stream))
    thread.start()
    wait_for(lambda: stream.getvalue().count("\n") > 2)
    end.set()
    thread.join()
