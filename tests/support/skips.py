"""The rule about skips: where CI runs, a skip must be expected, by test and by reason.

A pytest plugin that is asleep unless the environment names the pass:

    SPARSEMEM_SKIP_POLICY=root        the pass's name, as in the second column of tests/allowed-skips.txt
    SPARSEMEM_PASS_REPORT=file.json   where to write the pass's counts and skips (optional, works alone too)

Lines of tests/allowed-skips.txt: `test id glob | pass (root, unprivileged, any) | reason`. The glob knows `*` and `?`
only, since ids have brackets of their own; the reason is a glob too and may stand anywhere in the actual one. An
expected failure (xfail) counts as a skip with the reason "xfail: ...".
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ALLOWED_SKIPS = Path(__file__).parent.parent / "allowed-skips.txt"
PASSES = ("root", "unprivileged", "any")


@dataclass(frozen=True)
class Skip:
    """A test that did not run."""

    test: str
    reason: str


@dataclass(frozen=True)
class AllowedSkip:
    """One line of the list."""

    line: int
    tests: str
    run: str
    reason: str

    def matches(self, skip: Skip, run: str) -> bool:
        """Whether the line allows this skip in this pass."""
        return (
            self.run in ("any", run)
            and _glob(self.tests).fullmatch(skip.test) is not None
            and _glob(self.reason).search(skip.reason) is not None
        )


def _glob(pattern: str) -> re.Pattern[str]:
    wildcards = {"*": ".*", "?": "."}
    return re.compile("".join(wildcards.get(char, re.escape(char)) for char in pattern), re.DOTALL)


def parse_allowed(text: str) -> list[AllowedSkip]:
    """Read the list.

    Raises:
        ValueError: A line has another form, or lacks one of its parts.
    """
    allowed = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = [part.strip() for part in line.split("|", 2)]
        if len(parts) != 3 or not all(parts) or parts[1] not in PASSES:
            raise ValueError(
                f"allowed skips, line {number}: not `test id glob | {' or '.join(PASSES)} | reason`: {line}"
            )
        allowed.append(AllowedSkip(number, *parts))
    return allowed


@dataclass(frozen=True)
class Verdict:
    """The skips of a pass against the list."""

    unexpected: list[Skip]
    expected: list[Skip]
    unused: list[AllowedSkip]


def judge(skips: list[Skip], allowed: list[AllowedSkip], run: str) -> Verdict:
    """Compare the skips of a pass with the list."""
    unexpected: list[Skip] = []
    expected: list[Skip] = []
    used: set[AllowedSkip] = set()
    for skip in skips:
        lines = [line for line in allowed if line.matches(skip, run)]
        used.update(lines)
        (expected if lines else unexpected).append(skip)
    return Verdict(unexpected, expected, [line for line in allowed if line.run in ("any", run) and line not in used])


class SkipPolicy:
    """The plugin proper."""

    def __init__(self, run: str | None, report: str | None) -> None:
        """Either may be None: no policy, no report."""
        self.run = run
        self.report = report
        self.skips: list[Skip] = []
        self.verdict: Verdict | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a skipped test."""
        if report.skipped:
            self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a module that was skipped as a whole."""
        if report.skipped:
            self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if hasattr(report, "wasxfail"):
            reason = f"xfail: {report.wasxfail}"
        elif isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        else:
            reason = str(report.longrepr)
        self.skips.append(Skip(report.nodeid, reason))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turn an unexpected skip into a failure of the run."""
        if self.run is None:
            return
        self.verdict = judge(self.skips, parse_allowed(ALLOWED_SKIPS.read_text()), self.run)
        if self.verdict.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was not allowed, what no longer needs to be, and write the report."""
        unexpected: list[Skip] = []
        if self.verdict is not None:
            unexpected = self.verdict.unexpected
            for line in self.verdict.unused:
                terminalreporter.write_line(
                    f"notice: {ALLOWED_SKIPS.name}:{line.line} allowed no skip in this pass: "
                    f"{line.tests} | {line.run} | {line.reason}"
                )
            if unexpected:
                terminalreporter.section(f"skips that {ALLOWED_SKIPS.name} does not allow", red=True)
                for skip in unexpected:
                    terminalreporter.write_line(f"{skip.test} | {self.run} | {skip.reason}", red=True)
        if self.report is not None:
            kinds = ("passed", "failed", "error", "xfailed")
            counts = {kind: len(terminalreporter.stats.get(kind, ())) for kind in kinds}
            told = {
                "counts": counts,
                "skips": [asdict(skip) for skip in self.skips],
                "unexpected": [asdict(skip) for skip in unexpected],
            }
            Path(self.report).write_text(json.dumps(told, indent=1))


def pytest_configure(config: pytest.Config) -> None:
    """Wake up if the environment says so."""
    run = os.environ.get("SPARSEMEM_SKIP_POLICY") or None
    report = os.environ.get("SPARSEMEM_PASS_REPORT") or None
    if run is not None and run not in PASSES[:2]:
        raise pytest.UsageError(f"SPARSEMEM_SKIP_POLICY={run}: not one of {', '.join(PASSES[:2])}")
    if run is not None or report is not None:
        config.pluginmanager.register(SkipPolicy(run, report), "sparsemem-skip-policy")
