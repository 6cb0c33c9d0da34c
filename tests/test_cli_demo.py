"""`sparsemem demo`: real memory on every backend, checks that can fail, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsemem import Anonymous, File, Memfd, PopulateError, Region, Secret, demonstration
from sparsemem._sys import probe, tmpfs
from sparsemem.demonstration import demonstrate
from sparsemem.survey import Candidate
from tests.support import accounting
from tests.support.children import run_child, unprivileged
from tests.test_cli import output_of, run

MIB = 1 << 20
PLUG = 16 * MIB


def steps_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["action"].split()[0]: step for step in report["steps"]}


def test_the_demo_shows_real_memory_on_every_backend() -> None:
    done = run("demo", "--plug", "16M", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    shown = json.loads(done.stdout)
    reports = {report["name"]: report for report in shown["reports"]}
    assert {"anonymous private", "memfd shared", "memfd private", "disk file template"} <= reports.keys()
    for report in shown["reports"]:
        if report["skipped"]:
            assert len(report["skipped"]) > 10
            assert not report["steps"]
            continue
        assert report["steps"][0]["action"].startswith("reserve ")
        assert report["steps"][0]["used"] == 0
        for step in report["steps"]:
            assert 0 <= step["used"] - step["plugged"] <= 64 << 10, (report["name"], step)
            assert all(check["ok"] for check in step["checks"])
    memfd = reports["memfd shared"]
    assert memfd["size"] == 1 << 40
    assert [step["used"] for step in memfd["steps"]] == [step["plugged"] for step in memfd["steps"]]
    assert steps_of(memfd)["write"]["used"] == PLUG
    assert memfd["block_map"] == "###.####........"
    assert sum(count for _, count, _ in memfd["ranges"]) == memfd["size"] // memfd["block_size"]
    assert shown["summary"]["ok"]
    assert shown["summary"]["failed"] == 0
    assert shown["summary"]["checks"] == sum(
        len(step["checks"]) for report in shown["reports"] for step in report["steps"]
    )


def test_the_demo_is_readable() -> None:
    done = run("demo", "--plug", "16M", "--backend", "memfd:private", "--backend", "file:/etc")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["memfd:private", "  memfd:private, 1T in blocks of 2M, strategy " + lines[1].split()[-1]]
    assert "  ███·████········…" in lines
    assert ["0x0000000000600000-0x00000000007fffff", "2M", "unplugged", "3"] in [line.split() for line in lines]
    assert "file:/etc" in lines
    assert "  not here: /etc: Is a directory" in lines
    assert "exhausted on purpose" in lines
    assert lines[-1].startswith("1 backends ran, 1 could not; ")
    assert lines[-1].endswith(" checks held")
    assert all(len(line) <= 160 for line in lines)


def test_a_terminal_without_block_characters_gets_others() -> None:
    done = run("demo", "--plug", "16M", "--backend", "memfd", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "  ###.####..........." in done.stdout.splitlines()


def test_the_demo_can_print_bytes() -> None:
    status, shown = output_of("demo", "--plug", "16M", "--backend", "memfd", "--bytes")
    assert status == 0
    assert f"{1 << 40} in blocks of {2 * MIB}" in shown
    assert f"  {PLUG}  {PLUG}  ok" in shown


def test_the_demo_runs_without_privileges(tmp_path_factory: pytest.TempPathFactory) -> None:
    def child() -> tuple[int, str]:
        os.chdir("/tmp")
        return output_of("demo", "--plug", "16M", "--json")

    status, text = unprivileged(child).result()
    shown = json.loads(text)
    failed = [check for r in shown["reports"] for step in r["steps"] for check in step["checks"] if not check["ok"]]
    assert not failed
    assert status == 0
    ran = {report["name"]: report for report in shown["reports"] if not report["skipped"]}
    assert {"anonymous private", "anonymous shared", "memfd shared", "disk file shared", "exhausted on purpose"} <= set(
        ran
    )
    # Reserving 1 TiB is shown even where the rest goes on with less.
    assert ran["anonymous shared"]["steps"][0]["action"] == "reserve 1T"


# ---- checks that fail ---------------------------------------------------------------------


def _also(real: Callable[..., Any], extra: int) -> Callable[[Region], tuple[int, str]]:
    def measure(region: Region) -> tuple[int, str]:
        used, source = real(region)
        return used + extra, source

    return measure


@pytest.mark.parametrize(
    ("broken", "instead", "claim"),
    [
        ("measure", _also(demonstration.measure, 4096), "uses no memory"),
        ("measure", _also(demonstration.measure, 4096), "takes exactly the plugged bytes"),
        ("measure", _also(demonstration.measure, 4096), "gives exactly those bytes back"),
        ("measure", _also(demonstration.measure, 4096), "gives everything back"),
        ("_intact", lambda *_: False, "every byte reads back"),
        ("_intact", lambda *_: False, "the neighbours keep their content"),
        ("_is_fresh", lambda *_: False, "reads zero, not the old data"),
        ("_plug_too_many", lambda *_: None, "fails with an error"),
        (
            "_plug_too_many",
            lambda *_: PopulateError(errno.EFAULT, "no", populated=1, rolled_back=False),
            "rolled back, with 1 or more populated by then",
        ),
    ],
)
def test_a_check_that_fails_is_shown_and_is_the_exit_status(
    broken: str, instead: Any, claim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demonstration, broken, instead)
    status, shown = output_of("demo", "--plug", "16M", "--backend", "memfd")
    assert status == 1
    assert any(line.rstrip().endswith(f"  FAILED  {claim}") for line in shown.splitlines()), shown
    assert "FAILED: " in shown.split("BACKEND", 1)[1]
    status, text = output_of("demo", "--plug", "16M", "--backend", "memfd", "--json")
    assert status == 1
    assert json.loads(text)["summary"]["failed"] > 0


def test_a_leak_behind_the_librarys_back_fails_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = demonstration._audit

    def stray(report: Any, region: Region, count: int) -> None:
        with region.view() as everything:
            everything[-1] = 1
        real(report, region, count)

    monkeypatch.setattr(demonstration, "_audit", stray)
    status, shown = output_of("demo", "--plug", "16M", "--backend", "memfd")
    assert status == 1
    assert "FAILED  every block is as the block map says: NOT ok: " in shown


def test_nothing_that_could_run_is_a_failure() -> None:
    status, shown = output_of("demo", "--backend", "file:/nonexistent/file")
    assert status == 1
    assert "not here: /nonexistent/file: No such file or directory" in shown


# ---- files of others -----------------------------------------------------------------------


def test_a_file_that_the_demo_makes_is_removed_and_one_that_was_there_stays(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.touch()
    for path in (new, old):
        assert not demonstrate(Candidate("file", lambda path=path: File(str(path))), 1 << 30, PLUG).skipped  # type: ignore[misc]
    assert not new.exists()
    assert old.exists()
    assert accounting.allocated_bytes(old) == 0


@pytest.mark.parametrize("existing", ["error", "adopt"])
def test_data_in_a_file_is_never_discarded(existing: str, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(b"precious" * 1000)
    report = demonstrate(Candidate("file", lambda: File(str(path), existing=existing)), 1 << 30, PLUG)
    assert "already" in report.skipped
    assert path.read_bytes()[:8000] == b"precious" * 1000


def test_a_template_is_as_large_as_its_file_and_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "template"
    content = os.urandom(40 * MIB)
    path.write_bytes(content)
    report = demonstrate(Candidate("template", lambda: File(str(path), shared=False)), 1 << 40, PLUG)
    assert report.size == 32 * MIB
    assert report.notes[0].startswith("no more than 32M: ")
    assert any(check.claim == "reads the file's content" for check in report.checks)
    assert all(check.ok for check in report.checks)
    assert path.read_bytes() == content


def test_a_small_limit_on_locked_memory_gives_a_small_secret() -> None:
    if not probe.makes_secrets(demonstration._calls.kernel):
        pytest.skip("needs memfd_secret")

    def child() -> Any:
        import resource

        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 * MIB, 4 * MIB))
        return demonstrate(Candidate("secret", lambda: Secret()), 1 << 40, 64 * MIB)

    report = unprivileged(child).result()
    assert not report.skipped
    assert 0 < report.size <= 4 * MIB
    assert "ulimit -l" in report.notes[0]
    assert max(step.used for step in report.steps) > 0
    assert all(check.ok for check in report.checks)


# ---- running out ------------------------------------------------------------------------------


def _refused(*_: Any) -> int:
    raise OSError(errno.EPERM, "not allowed")


@pytest.mark.parametrize("refused", [(), ("detached_file",), ("detached_file", "user_file")])
def test_something_real_is_exhausted_and_rolled_back(refused: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if refused == ("detached_file",):  # the other way is built on it, in a child: only the caller's is refused
        monkeypatch.setattr(tmpfs, "user_file", _made_by(tmpfs.detached_file, tmpfs.user_file))
    for name in refused:
        if name == "detached_file" or len(refused) > 1:
            monkeypatch.setattr(tmpfs, name, _refused)
    report = demonstration.exhaust()
    assert all(check.ok for check in report.checks), report
    claims = [check.claim for check in report.checks]
    assert any(claim.startswith("fails with an error and not with SIGBUS: ") for claim in claims)
    assert "no block has changed its state" in claims
    assert report.steps[-1].used == report.steps[-1].plugged


def _made_by(detached: Callable[..., int], user: Callable[..., int]) -> Callable[..., int]:
    def make(size: int, huge: str = "never") -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tmpfs, "detached_file", detached)
            return user(size, huge)

    return make


def test_an_unprivileged_user_gets_a_tmpfs_of_their_own() -> None:
    def child() -> tuple[int, int, bool]:
        try:
            fd = tmpfs.user_file(2 * MIB)
        except OSError as error:
            return -(error.errno or 1), 0, False
        about = os.fstatvfs(fd)
        return fd, about.f_blocks * about.f_frsize, os.get_inheritable(fd)

    fd, size, inheritable = unprivileged(child).result()
    if fd < 0:
        pytest.skip(f"needs user namespaces for everybody ({os.strerror(-fd)})")
    assert size == 2 * MIB
    assert not inheritable


def test_an_empty_pool_of_huge_pages_is_exhausted_where_there_is_no_tmpfs(
    empty_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tmpfs, "detached_file", _refused)
    monkeypatch.setattr(tmpfs, "user_file", _refused)
    report = demonstration.exhaust()
    assert report.notes[0] == "the pool of huge pages, which is empty"
    assert "BackendExhaustedError" in report.notes[1]
    assert all(check.ok for check in report.checks)


def test_the_figures_are_the_kernels_own() -> None:
    with Region("1G", backend=Memfd()) as region:
        region.plug(0, 3)
        assert demonstration.measure(region) == (accounting.allocated_bytes(region.fileno()), "st_blocks of the file")
    with Region("1G", backend=Anonymous()) as region:
        region.plug(0, 3)
        fields = accounting.smaps(region.address, region.size)
        assert demonstration.measure(region) == (fields["Rss"], "smaps: Rss + Swap")


def test_what_cannot_be_had_says_why_and_shows_no_figures() -> None:
    def child() -> Any:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
        return demonstrate(Candidate("memfd", lambda: Memfd()), 1 << 40, PLUG)

    report = run_child(child).result()
    assert "ulimit -v" in report.skipped
    assert not report.steps
