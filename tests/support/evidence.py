"""What the tests are evidence of: promises, the tests that show them, and how many cases those ran.

A test names what it shows with `@pytest.mark.promise("plug-all-or-nothing")`; the names are in `tests/promises.py`. A
test that goes through many cases by itself counts them with the `cases` fixture; any other is one case each time it
passes. With SPARSEMEM_EVIDENCE=file.json the counts are written there, from which `docs/reliability.md` is made
(`make reliability`).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

STEPS: Counter[str] = Counter()
"""Steps of state machines, by kind of mapping; a summary line tells them."""

_CASES = "cases"


class Cases:
    """Counts the cases that a test goes through."""

    def __init__(self, node: pytest.Item) -> None:
        self._node = node
        self._number = 0

    @property
    def steps(self) -> int:
        """Steps of state machines so far, of all tests."""
        return STEPS.total()

    def add(self, number: int = 1) -> None:
        """So many more."""
        self._number += number
        self._node.user_properties[:] = [pair for pair in self._node.user_properties if pair[0] != _CASES]
        self._node.user_properties.append((_CASES, self._number))


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Cases:
    """Counts the cases of this test."""
    return Cases(request.node)


class Evidence:
    """The plugin proper: cases by test, without the parameters, of those that passed."""

    def __init__(self, report: str | None) -> None:
        self._report = report
        self.cases: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a passed test."""
        if report.when == "call" and report.passed:
            number = dict(report.user_properties).get(_CASES, 1)
            assert isinstance(number, int)
            self.cases[report.nodeid.partition("[")[0]] += number

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how many steps there were, and write the counts."""
        if STEPS:
            terminalreporter.write_line(
                f"state machines: {STEPS.total()} steps over {len(STEPS)} kinds of mapping, "
                f"at least {min(STEPS.values())} each"
            )
        if self._report is not None:
            Path(self._report).write_text(json.dumps(dict(sorted(self.cases.items())), indent=1))


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin."""
    config.pluginmanager.register(Evidence(os.environ.get("SPARSEMEM_EVIDENCE") or None), "sparsemem-evidence")
