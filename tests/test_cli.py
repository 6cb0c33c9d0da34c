"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsemem
from sparsemem import demonstration
from sparsemem.cli import main as cli
from tests.support.children import unprivileged


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-m", "sparsemem", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_demo_shows_real_memory_on_every_backend() -> None:
    done = run("demo", "--plug", "16M", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    reports = {report["name"]: report for report in shown["reports"]}
    assert {"anonymous private", "memfd shared", "memfd private", "disk file template"} <= reports.keys()
    for report in shown["reports"][:-1]:
        if report["skipped"]:
            assert len(report["skipped"]) > 10
            continue
        assert report["figures"][0]["used"] == 0
        assert report["figures"][1]["used"] >= report["figures"][1]["plugged"] > 0
        assert report["checks"]
    memfd = reports["memfd shared"]
    assert memfd["size"] == 1 << 40
    assert [figure["used"] for figure in memfd["figures"]] == [figure["plugged"] for figure in memfd["figures"]]
    exhausted = shown["reports"][-1]
    assert "exhausted on purpose" in exhausted["name"]
    assert "BackendExhaustedError" in exhausted["note"]
    assert shown["summary"]["ok"]
    assert shown["summary"]["failed"] == 0


def test_the_demo_is_readable() -> None:
    done = run("demo", "--plug", "16M", "--backend", "memfd:private", "--backend", "secret:nonsense")
    assert done.returncode == 2
    done = run("demo", "--plug", "16M", "--backend", "memfd:private", "--backend", "memfd:hugetlb=1G")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reserved 1T in blocks of 2M" in done.stdout
    assert "██" in done.stdout
    assert "RANGE" in done.stdout
    assert "memfd:hugetlb=1G: not here: " in done.stdout
    assert done.stdout.rstrip().endswith("checks held")


def test_a_check_that_fails_is_shown_and_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demonstration, "used_bytes", lambda region: 12345)
    assert cli.main(["demo", "--plug", "8M", "--backend", "memfd"]) == 1
    assert "FAILED reserving 1T uses no memory" in capsys.readouterr().out


def test_the_demo_never_discards_data_that_somebody_has(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(500 << 20)  # beyond what the demo would plug
        file.write(b"precious")
    done = run("demo", "--plug", "8M", "--size", "1G", "--backend", f"file:{path},existing=adopt")
    assert "which a demonstration would discard" in done.stdout
    assert done.returncode == 1
    with path.open("rb") as file:
        file.seek(500 << 20)
        assert file.read(8) == b"precious"


def test_the_demo_runs_without_privileges(capsys: pytest.CaptureFixture[str]) -> None:
    def child() -> int:
        os.chdir("/tmp")
        return cli.main(["demo", "--plug", "8M", "--backend", "memfd", "--backend", "anonymous"])

    assert unprivileged(child).result() == 0


def test_probe_says_what_works_and_why_not() -> None:
    done = run("probe", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["machine"]["page_size"] == os.sysconf("SC_PAGESIZE")
    works = {(backend["name"], backend["strategy"]): backend for backend in found["backends"]}
    assert works["anonymous private", "futex"]["works"]
    assert works["memfd shared", "populate_write"]["works"] is found["machine"]["populate_write"]
    for backend in found["backends"]:
        assert backend["works"] or backend["why"], f"{backend} does not say why"
    shown = run("probe").stdout
    assert "MADV_POPULATE_WRITE:" in shown
    assert "BACKEND" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required"),
        (["nonsense"], "invalid choice"),
        (["demo", "--size", "1TB"], "ambiguous"),
        (["demo", "--backend", "floppy"], "none of"),
        (["demo", "--plug"], "expected one argument"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["probe", "--help"], ["demo", "--help"]])
def test_help_helps(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert "usage: sparsemem" in done.stdout


def test_version() -> None:
    assert run("--version").stdout == f"sparsemem {sparsemem.__version__}\n"


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (sparsemem.ReserveError(12, "no room"), 1, "error: [Errno 12] no room"),
        (ValueError("what"), 1, "error: what"),
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
    captured = capsys.readouterr()
    assert captured.err == f"sparsemem: {says}\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m sparsemem probe | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("Kernel:")
    assert not done.stderr
