"""The rule about skips, as functions and in a real run of pytest."""

import json

import pytest

from tests.support.skips import AllowedSkip, Skip, judge, parse_allowed
from tests.test_support_resources import run_pytest

LIST = """
# a comment
tests/test_a.py::test_x[*] | any          | soft-dirty
*                          | unprivileged | needs root: * mount
tests/test_b.py            | root         | a | b
"""


def test_the_list_is_parsed():
    assert parse_allowed(LIST) == [
        AllowedSkip(3, "tests/test_a.py::test_x[*]", "any", "soft-dirty"),
        AllowedSkip(4, "*", "unprivileged", "needs root: * mount"),
        AllowedSkip(5, "tests/test_b.py", "root", "a | b"),
    ]


@pytest.mark.parametrize("line", ["tests/a.py | any", "tests/a.py | everyone | x", "tests/a.py | any |", "words"])
def test_a_malformed_line_is_refused(line):
    with pytest.raises(ValueError, match="line 2: not"):
        parse_allowed(f"# first\n{line}")


def test_skips_are_judged_by_id_pass_and_reason():
    allowed = parse_allowed(LIST)
    dirty = Skip("tests/test_a.py::test_x[4096-a]", "this kernel has no soft-dirty bit")
    other_reason = Skip("tests/test_a.py::test_x[4096-a]", "tired")
    mount = Skip("tests/test_c.py::test_y", "needs root: to mount tmpfs")
    verdict = judge([dirty, other_reason, mount], allowed, "root")
    assert verdict.expected == [dirty]
    assert verdict.unexpected == [other_reason, mount]
    assert [line.line for line in verdict.unused] == [5]
    verdict = judge([mount], allowed, "unprivileged")
    assert verdict.unexpected == []
    assert [line.line for line in verdict.unused] == [3]


SOURCE = """
import pytest
def test_passes(): pass
@pytest.mark.skipif(True, reason={reason!r})
def test_skipped(): pass
"""


def test_a_user_may_skip_as_needed(tmp_path):
    done = run_pytest(tmp_path, SOURCE.format(reason="just so"), SPARSEMEM_SKIP_POLICY="", SPARSEMEM_PASS_REPORT="")
    assert done.returncode == 0, done.stdout


def test_an_allowed_skip_passes_and_is_reported(tmp_path):
    report = tmp_path / "report.json"
    source = SOURCE.format(reason="needs root: to mount")
    done = run_pytest(tmp_path, source, SPARSEMEM_SKIP_POLICY="unprivileged", SPARSEMEM_PASS_REPORT=str(report))
    assert done.returncode == 0, done.stdout
    told = json.loads(report.read_text())
    assert told["counts"]["passed"] == 1
    assert told["skips"] == [{"test": "test_it.py::test_skipped", "reason": "needs root: to mount"}]
    assert told["unexpected"] == []


@pytest.mark.parametrize(
    "source",
    [
        SOURCE.format(reason="just so"),
        "import pytest\ndef test_passes(): pass\n@pytest.mark.xfail(reason='just so')\ndef test_it(): assert False",
    ],
)
def test_any_other_skip_fails_the_run(tmp_path, source):
    done = run_pytest(tmp_path, source, SPARSEMEM_SKIP_POLICY="root", SPARSEMEM_PASS_REPORT="")
    assert done.returncode == 1, done.stdout
    assert "just so" in done.stdout
    assert "does not allow" in done.stdout


def test_a_skipped_module_counts(tmp_path):
    (tmp_path / "test_other.py").write_text("")
    source = "import pytest\npytest.skip('all of it', allow_module_level=True)"
    done = run_pytest(tmp_path, source, SPARSEMEM_SKIP_POLICY="root", SPARSEMEM_PASS_REPORT="")
    assert done.returncode != 0
    assert "test_it.py | root | all of it" in done.stdout
