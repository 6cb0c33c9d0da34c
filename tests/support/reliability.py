"""Makes docs/reliability.md of the promises, the markers on the tests, and the cases that a run counted.

`python -m tests.support.reliability evidence.json docs/reliability.md`
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.promises import PROMISES

TESTS = Path(__file__).parent.parent

_HEAD = """\
# What is promised, and what shows it

Made by `make reliability` from the markers on the tests and from a run of them; not written by hand. The cases are
those that the tests went through in that run: parameters, examples, steps, injected faults or operations, as the test
counts them. A dash means that the test did not run then: it was skipped on that machine, or left out as a slow one.

"""


@dataclass
class Shown:
    """A promise with what shows it."""

    tests: list[str] = field(default_factory=list)
    """`tests/file.py::name`, without parameters."""
    found: list[tuple[str, str]] = field(default_factory=list)
    """Faults that the tests found, each with the test that would find it again."""


def marked() -> dict[str, Shown]:
    """All promises, with the tests that are marked with them in the source."""
    shown = {name: Shown() for name in PROMISES}
    for path in sorted(TESTS.rglob("test_*.py")):
        for test, name, found in _markers(path):
            entry = shown.setdefault(name, Shown())
            entry.tests.append(test)
            if found:
                entry.found.append((found, test))
    return shown


def _markers(path: Path) -> Iterator[tuple[str, str, str]]:
    tree = ast.parse(path.read_text())
    where = path.relative_to(TESTS.parent).as_posix()
    of_all = [
        marker
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "pytestmark"
        for marker in _promises(node.value)
    ]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            own = [marker for decorator in node.decorator_list for marker in _promises(decorator)]
            for name, found in own + [marker for marker in of_all if marker[0] not in dict(own)]:
                yield f"{where}::{node.name}", name, found


def _promises(node: ast.expr) -> Iterator[tuple[str, str]]:
    """`pytest.mark.promise(...)` in a decorator, or in a list of marks."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.promise":
            name = ast.literal_eval(call.args[0])
            found = next((ast.literal_eval(word.value) for word in call.keywords if word.arg == "found"), "")
            yield name, found


def document(cases: dict[str, int]) -> str:
    """The text of docs/reliability.md."""
    lines, shown = [_HEAD], marked()
    tests = {test for entry in shown.values() for test in entry.tests}
    total = sum(cases.get(test, 0) for test in tests)
    lines.append(f"{len(shown)} promises, {len(tests)} tests, {total:,} cases.\n")
    lines.append("| promise | tests | cases | found |\n|---|---|---|---|")
    for name, entry in shown.items():
        number = sum(cases.get(test, 0) for test in entry.tests)
        lines.append(f"| [{name}](#{name}) | {len(entry.tests)} | {number:,} | {len(entry.found) or ''} |")
    for name, entry in shown.items():
        lines.append(f"\n## {name}\n\n{PROMISES[name]}\n\n| test | cases |\n|---|---|")
        lines += [f"| `{test}` | {format(cases[test], ',') if test in cases else '-'} |" for test in entry.tests]
        if entry.found:
            lines.append("\nFound, and mended:\n")
            lines += [f"- {found} (`{test.partition('::')[2]}`)" for found, test in entry.found]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Writes the document from one or several reports of counts."""
    *reports, target = map(Path, arguments)
    cases: dict[str, int] = {}
    for report in reports:
        cases |= json.loads(report.read_text())
    target.write_text(document(cases))


if __name__ == "__main__":
    main(sys.argv[1:])
