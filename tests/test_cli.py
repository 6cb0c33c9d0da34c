"""The command line: usage, errors, and what `probe` finds out."""

from __future__ import annotations

import contextlib
import encodings.ascii
import encodings.idna
import io
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

import sparsemem
from sparsemem import survey
from sparsemem._sys import calls, lib
from sparsemem.cli import main as cli
from tests.support.children import unprivileged

# What the commands import late: without privileges an interpreter in somebody's home folder cannot be read any more.
LATE = (encodings.ascii, encodings.idna, socket)

COMMAND = [sys.executable, "-X", "dev", "-m", "sparsemem"]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=120, encoding="utf-8", **options
    )


def output_of(*arguments: str) -> tuple[int, str]:
    """In this process: the exit status and what was printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        status = cli.main(arguments)
    return status, text.getvalue()


# ---- usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required"),
        (["nonsense"], "invalid choice"),
        (["probe", "--nonsense"], "unrecognized"),
        (["probe", "too", "many"], "unrecognized"),
        (["demo", "--size", "1TB"], "ambiguous"),
        (["demo", "--size", "-1T"], "expected one argument"),
        (["demo", "--size", "5"], "multiple of 2M"),
        (["demo", "--plug", "0"], "from 16M on"),
        (["demo", "--plug", "1T"], "more than half of --size 1T"),
        (["demo", "--backend", "floppy"], "none of"),
        (["demo", "--backend", "secret:nonsense"], "no option"),
        (["demo", "--backend", "two\nlines"], "none of"),
        (["demo", "--plug"], "expected one argument"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("sparsemem: error: ")
    assert len(captured.err.splitlines()) == 1
    assert says in captured.err
    assert not captured.out


def test_the_exit_status_of_wrong_usage_reaches_the_shell() -> None:
    done = run("nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("sparsemem: error: ")


@pytest.mark.parametrize("command", ["", "probe", "demo", "bench", "vhost-user", "ctl"])
def test_help_shows_examples(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: sparsemem")
    assert "examples:\n  sparsemem " in done.stdout


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"sparsemem {sparsemem.__version__}\n")


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (sparsemem.ReserveError(12, "no room"), 1, "error: [Errno 12] no room"),
        (ValueError("two\nlines"), 1, "error: two lines"),
    ],
)
def test_errors_are_one_line_and_no_traceback(
    raised: BaseException,
    status: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr("sparsemem.cli.probe.machine", fail)
    assert cli.main(["probe"]) == status
    assert capsys.readouterr().err == f"sparsemem: {says}\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    with subprocess.Popen([*COMMAND, "demo", "--plug", "16M"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        assert demo.stdout.readline() == b"anonymous private\n"
        demo.stdout.close()
        told = demo.stderr.read()
    assert told == b""
    assert demo.returncode == 1


def test_an_interrupt_is_one_line_and_leaves_no_file_behind(tmp_path: Any) -> None:
    for _ in range(5):
        demo = subprocess.Popen(
            [*COMMAND, "demo", "--plug", "16M"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            # A test run in the background may have it ignored, which children inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with demo:
            assert demo.stdout is not None
            demo.stdout.readline()
            demo.send_signal(signal.SIGINT)
            _, told = demo.communicate(timeout=60)
        if b"Exception ignored in" not in told:
            break  # else it came within a finaliser, where Python itself swallows it
    assert told == b"sparsemem: interrupted\n"
    assert demo.returncode == 130
    assert list(tmp_path.iterdir()) == []


# ---- probe ------------------------------------------------------------------------------------


def test_probe_says_what_works_and_why_not() -> None:
    done = run("probe", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    machine = found["machine"]
    assert machine["page_size"] == os.sysconf("SC_PAGESIZE")
    assert machine["kernel"] == os.uname().release
    assert machine["largest_reservation"] >= 1 << 40
    assert {"thp_mode", "huge_pages", "overcommit_memory", "cgroup_limits", "named_mappings"} <= machine.keys()
    works = {(backend["name"], backend["strategy"]): backend for backend in found["backends"]}
    assert works["anonymous private", "futex"]["works"]
    assert works["disk file template", "futex"]["works"]
    assert works["memfd shared", "populate_write"]["works"] is machine["populate_write"]
    for backend in found["backends"]:
        assert backend["works"] or backend["why"], f"{backend} does not say why"
        assert "\n" not in backend["why"]
    protected = {(found["name"], found["protection"]): found for found in found["protections"]}
    for name in ("anonymous private", "memfd shared", "tmpfs file private"):
        assert protected[name, "trap"]["works"] is (machine["trap"] and machine["populate_write"])
        assert protected[name, "guard"]["works"] is machine["guard"]
        assert protected[name, "prot_none"]["works"]
    assert "files on disks" in protected["disk file shared", "trap"]["why"]
    assert all(one["works"] or one["why"] for one in found["protections"])


def test_probe_prints_columns() -> None:
    done = run("probe")
    assert done.returncode == 0
    facts, *tables = done.stdout.split("\n\n")
    assert "Page size:" in facts
    for table, middle in zip(tables, ("STRATEGY", "PROTECTION"), strict=True):
        rows = table.splitlines()
        columns = {rows[0].index(word) for word in ("BACKEND", middle, "WORKS")}
        for row in rows[1:]:
            assert all(row[column] != " " and (column == 0 or row[column - 2 : column] == "  ") for column in columns)


def test_probe_can_print_bytes() -> None:
    status, shown = output_of("probe", "--bytes")
    assert status == 0
    assert f"{os.sysconf('SC_PAGESIZE')}\n" in shown


def test_probe_runs_without_privileges() -> None:
    def child() -> tuple[int, str]:
        os.chdir("/tmp")
        return output_of("probe", "--json")

    status, shown = unprivileged(child).result()
    assert status == 0
    backends = json.loads(shown)["backends"]
    assert {"anonymous private", "memfd private", "disk file shared"} <= {b["name"] for b in backends if b["works"]}


class WithoutPopulateWrite:
    """The kernel before 5.14, with an advice that it does not know; else the real one."""

    def __init__(self, kernel: calls.Calls) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def madvise(self, address: int, length: int, advice: int) -> None:
        if advice == lib.MADV_POPULATE_WRITE:
            raise OSError(22, "Invalid argument")
        self._kernel.madvise(address, length, advice)


def test_probe_finds_out_by_trying_what_a_kernel_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "kernel", WithoutPopulateWrite(calls.kernel))
    assert survey.machine()["populate_write"] is False
    candidate = survey.Candidate("memfd", lambda: sparsemem.Memfd())
    found = survey.attempt(candidate, "populate_write")
    assert not found.works
    assert "no MADV_POPULATE_WRITE" in found.why
    assert survey.attempt(candidate, "futex").works


def test_probe_says_that_the_huge_page_pool_is_empty(empty_pool: None) -> None:
    found = survey.attempt(survey.Candidate("huge", lambda: sparsemem.Memfd(hugetlb="2M")), "populate_write")
    assert found == survey.Finding("huge", "populate_write", False, "the huge page pool is empty")


def test_probe_tries_hugetlbfs_where_it_is_mounted(huge_pool: Any, hugetlbfs_mount: Any) -> None:
    huge_pool(16)
    hugetlbfs_mount()
    with survey.candidates() as known:
        found = {c.name: survey.attempt(c, "futex") for c in known if c.name.startswith("hugetlbfs")}
    assert [finding.works for finding in found.values()] == [True, True], found


def test_the_survey_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with survey.candidates() as known:
        assert any(survey.attempt(candidate, "futex").works for candidate in known if "file" in candidate.name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["1T", "100M"])
def test_a_reservation_is_as_large_as_the_backend_allows(size: str) -> None:
    def child() -> tuple[int, int, str]:
        region, why = survey.reserve(sparsemem.Memfd(), sparsemem.parse_size(size), 16 << 20)
        with region:
            return region.size, region.nblocks, why

    got, blocks, why = unprivileged_with_file_limit(child)
    assert got == 64 << 20
    assert blocks >= 16
    assert "File too large" in why


def unprivileged_with_file_limit(function: Any) -> Any:
    import resource

    from tests.support.children import run_child

    def child() -> Any:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return function()

    return run_child(child, limits={resource.RLIMIT_FSIZE: 64 << 20}).result()
