"""The benchmark: that it measures what it says and tells what it could not.  No test is about times."""

from __future__ import annotations

import json
import re
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.bench import catalogue, lab, model, outcome, peers, targets
from sparsemem.bench.cases import memory, stalls
from sparsemem.bench.model import TINY, Case, Measure, Result, Row, Way
from sparsemem.bench.targets import Kind, Target
from sparsemem.cli import figures
from sparsemem.cli import main as cli
from sparsemem.errors import UnsupportedError
from tests.support import accounting

ROOT = Path(__file__).parent.parent
WAY_TAKEN = re.compile(
    r"what auto takes|strategy '\w+' does not work|a tmpfs of its own cannot be had|the pool of huge pages"
    r"|not on a disk|no warm pool|one processor"
)


@pytest.fixture(scope="module")
def tiny() -> Iterator[lab.Lab]:
    with lab.laboratory(TINY) as made:
        yield made


@pytest.fixture
def tiny_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command measures as little as can be."""
    monkeypatch.setattr(model, "QUICK", TINY)
    monkeypatch.setattr(model, "FULL", TINY)


@contextmanager
def stopped_switching() -> Iterator[None]:
    """No other Python thread runs, unless this one waits."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def fake(name: str, *ways: Way, peer: str = "peer") -> Case:
    @contextmanager
    def make(lab: lab.Lab) -> Iterator[list[Way]]:
        yield list(ways)

    return Case(name, name, (Measure("time", peer),), make)


# ---- cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", catalogue.CASES, ids=lambda case: case.name)
def test_every_case_runs(case: Case, tiny: lab.Lab) -> None:
    result = lab.run_case(case, tiny)
    for reason in result.skipped.values():
        assert WAY_TAKEN.search(reason), reason
    if "" in result.skipped:
        assert not result.rows
        return
    assert any(row.way.startswith("sparsemem") for row in result.rows)
    assert all(len(row.figures) == TINY.rounds for row in result.rows)
    assert all(figure >= 0 for row in result.rows for figure in row.figures)
    for measure in case.measures:
        assert result.row(measure.name, measure.peer), f"{measure.peer!r} does not measure {measure.name!r}"


def test_no_case_leaves_anything_behind(tiny: lab.Lab) -> None:
    case = catalogue.select(["memfd-4k"])[0]
    lab.run_case(case, tiny)
    before = len(accounting.open_descriptors()), accounting.vma_count()
    lab.run_case(case, tiny)
    assert len(accounting.open_descriptors()) == before[0]
    assert accounting.vma_count() - before[1] < 20


def test_names_are_unique_and_selected() -> None:
    names = [case.name for case in catalogue.CASES]
    assert len(set(names)) == len(names)
    assert [case.name for case in catalogue.select(["memfd-4k", "bitmap*"])] == [
        "memfd-4k",
        "bitmap-large",
        "bitmap-small",
    ]
    assert catalogue.select([]) == catalogue.CASES
    with pytest.raises(ValueError, match="no case 'nonsense'"):
        catalogue.select(["memfd-4k", "nonsense"])


def test_rounds_are_interleaved_and_the_first_does_not_count(tiny: lab.Lab) -> None:
    told: list[str] = []

    def way(name: str) -> Way:
        return Way(name, lambda: told.append(name) or {"time": float(len(told))})  # type: ignore[func-returns-value]

    result = lab.run_case(fake("fake", way("peer"), way("sparsemem")), tiny)
    assert told == ["peer", "sparsemem", "sparsemem", "peer"], "another one is first each round"
    assert [row.figures for row in result.rows] == [(4.0,), (3.0,)]


def test_a_way_that_fails_is_skipped_and_the_others_go_on(tiny: lab.Lab) -> None:
    def fail() -> model.Figures:
        raise OSError(12, "no\nmemory")

    result = lab.run_case(fake("fake", Way("sparsemem", fail), Way("peer", lambda: {"time": 1.0})), tiny)
    assert [row.way for row in result.rows] == ["peer"]
    assert result.skipped == {"sparsemem": "[Errno 12] no memory"}


def test_what_takes_too_long_is_left_out() -> None:
    late = lab.Lab(model.Scale("quick", 5, 1, 1, 1, 1, 1, 1, seconds=-1), "no peers", "no numpy")
    result = lab.run_case(fake("fake", Way("sparsemem")), late)
    assert result.skipped == {"": "no time is left of the -1 s that --quick has"}


def test_huge_pages_of_a_pool_are_taken_as_far_as_there_are(tiny: lab.Lab, empty_pool: None) -> None:
    case = catalogue.select(["hugetlb-memfd"])[0]
    assert "the pool of huge pages has 0M free" in lab.run_case(case, tiny).skipped[""]


def test_private_memfds_use_memory_once(tiny: lab.Lab) -> None:
    result = lab.run_case(catalogue.select(["memfd-private-4k"])[0], tiny)
    used = {row.way: row.spread.most for row in result.rows if row.measure == "memory used"}
    assert used["sparsemem auto, 1 thread"] == 1.0
    assert used["C populate_write"] == 2.0


# ---- what is not there --------------------------------------------------------------------------


def test_without_a_compiler_the_peers_in_c_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc -g")
    with lab.laboratory(TINY) as poor:
        result = lab.run_case(catalogue.select(["latency-4k"])[0], poor)
    assert result.skipped == {
        "C, the two bare system calls": "no C compiler: /nonexistent/cc: No such file or directory"
    }
    assert {row.way for row in result.rows} == {"sparsemem"}
    assert outcome.ratio_of(result, result.rows[0]) is None


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(1, 70))
def test_the_bitmaps_of_the_peers_in_c_are_right(tiny: lab.Lab, flags: list[bool], count: int) -> None:
    assert tiny.peers is not None
    packed = bytearray(-(-len(flags) // 8))
    for n, flag in enumerate(flags):
        packed[n >> 3] |= flag << (n & 7)
    groups = [(flag, len(list(group))) for flag, group in groupby(flags)]
    starts = list(accumulate((length for _, length in groups), initial=0))
    runs = [(start, length) for start, (flag, length) in zip(starts, groups, strict=False) if flag]
    gaps = [start for start, (flag, length) in zip(starts, groups, strict=False) if not flag and length >= count]
    out = array("Q", bytes(16 * 300))
    found = tiny.peers.runs(packed, len(flags), out)
    assert list(zip(out[: 2 * found : 2], out[1 : 2 * found : 2], strict=True)) == runs
    assert tiny.peers.find(packed, len(flags), count) == min(gaps, default=len(flags))


def test_a_stall_that_still_lasts_counts() -> None:
    with stalls.Ticker() as ticker:
        ticker.start_over()
        with stopped_switching():
            deadline = time.perf_counter() + 0.05
            while time.perf_counter() < deadline:
                pass
            assert 0.02 < ticker.worst < 10


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(UnsupportedError, match="the C compiler fails: status 1"), peers.compiled():
        pass


def test_without_numpy_its_ways_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with lab.laboratory(TINY) as poor:
        result = lab.run_case(catalogue.select(["bitmap-small"])[0], poor)
    assert result.skipped == {"numpy on Region.bitmap": "numpy is not installed"}


# ---- targets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda t: f"{t.case}-{t.measure}-{t.limit}")
def test_targets_are_about_what_is_measured(target: Target, tiny: lab.Lab) -> None:
    case = catalogue.select([target.case])[0]
    assert target.measure in {measure.name for measure in case.measures}
    with case.ways(tiny) as ways:
        names = {way.name for way in ways}
    assert target.way in names
    assert target.peer in names | {""}
    assert (target.kind is Kind.FIGURE) == (not target.peer)


def judged(target: Target, *rows: Row, skipped: dict[str, str] | None = None) -> outcome.Judged:
    result = Result(fake(target.case), rows, skipped or {})
    return outcome._judge(target, result, fills=False)


@pytest.mark.parametrize(
    ("kind", "limit", "verdict", "measured"),
    [
        (Kind.RATIO, 2.0, "reached", 2.0),
        (Kind.RATIO, 1.9, "missed", 2.0),
        (Kind.DIFFERENCE, 2.0, "reached", 2.0),
        (Kind.DIFFERENCE, 1.0, "missed", 2.0),
        (Kind.FIGURE, 4.0, "reached", 4.0),
        (Kind.FIGURE, 3.9, "missed", 4.0),
    ],
)
def test_the_median_of_the_rounds_is_held_against_the_limit(
    kind: Kind, limit: float, verdict: str, measured: float
) -> None:
    target = Target("fake", "time", "ours", "" if kind is Kind.FIGURE else "peer", limit, kind)
    rows = Row("time", "ours", (4.0, 3.0, 12.0)), Row("time", "peer", (2.0, 3.0, 4.0))
    found = judged(target, *rows)
    assert found.measured is not None
    assert (found.verdict.value, found.measured.median) == (verdict, measured)


def test_a_target_that_was_not_measured_says_why() -> None:
    target = Target("fake", "time", "ours", "peer", 1.0)
    ours = Row("time", "ours", (1.0,))
    assert judged(target, ours, skipped={"peer": "no compiler"}).reason == "no compiler"
    assert judged(target, skipped={"": "no memory"}).reason == "no memory"
    assert judged(target, ours).reason == "'peer' has no such figure here"
    assert judged(target, ours, Row("time", "peer", (0.0,))).reason == "'peer' measured 0"


def test_the_limit_depends_on_userfaultfd() -> None:
    target = Target("fake", "time", "ours", "peer", 0.8, without_uffd=1.03)
    rows = Row("time", "ours", (1.0,)), Row("time", "peer", (1.0,))
    result = Result(fake("fake"), rows)
    assert outcome._judge(target, result, fills=True).verdict is outcome.Verdict.MISSED
    assert outcome._judge(target, result, fills=False).verdict is outcome.Verdict.REACHED


# ---- the command ---------------------------------------------------------------------------------


def test_json_has_everything(tiny_runs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--json", "latency-4k", "hyperalloc-2m"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "scale", "cases", "targets", "summary"}
    assert {"Kernel", "Processor", "Processors used", "Memory", "Transparent huge pages"} <= set(found["machine"])
    first, second = found["cases"]
    assert first["name"] == "latency-4k"
    assert {"measure", "way", "figures", "median", "least", "most", "ratio"} == set(first["rows"][0])
    assert {published["name"] for published in second["another_machine"]} == {
        "HyperAlloc",
        "virtio-balloon",
        "virtio-mem",
    }
    assert [target["kind"] for target in found["targets"]] == ["ratio", "difference"]
    assert sum(found["summary"].values()) == 2


def test_the_table_shows_cases_and_targets(tiny_runs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "latency-4k", "hyperalloc-4k", "warm-pool"]) == 0
    captured = capsys.readouterr()
    assert "latency-4k: one 4 KiB block" in captured.out
    assert "HyperAlloc (another machine's, as published)" in captured.out
    assert re.search(r"(reached|missed)\n", captured.out)
    assert re.search(r"\ntargets: \d reached, \d missed, \d not measured\n$", captured.out)
    assert "latency-4k ..." in captured.err


def test_the_report_says_how_to_repeat_it(tiny_runs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--markdown", "latency-4k"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Results of one run\n")
    assert "$ sparsemem bench latency-4k --markdown > benchmarks/RESULTS.md" in out
    assert "parts" not in out
    for heading in ("## The machine", "## The targets", "## latency-4k"):
        assert heading in out
    tables = [line for line in out.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_the_cases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [c.name for c in catalogue.CASES]
    assert cli.main(["bench", "--list", "--json", "memfd-4k"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["measures"] == ["populate", "discard"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["bench", "nonsense"], 1, "no case 'nonsense'"),
        (["bench", "--json", "--markdown"], 2, "not allowed with"),
        (["bench", "--plot", "picture.doc"], 1, "must end in one of"),
        (["bench", "--from", "nowhere.json"], 1, "nowhere.json"),
        (["bench", "--quick", "--from", "part.json"], 1, "takes no case, --quick or --list"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == status
    assert says in capsys.readouterr().err


def test_without_matplotlib_nothing_is_measured_in_vain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--plot", "picture.png"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "sparsemem: error: --plot needs matplotlib: pip install 'sparsemem[plot]'\n"
    assert not captured.out


def measured(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["bench", *arguments]) == 0
    return capsys.readouterr().out


def test_parts_are_put_together(
    tiny_runs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, case in (("1.json", "latency-4k"), ("2.json", "hyperalloc-4k")):
        Path(name).write_text(measured(case, "--json", capsys=capsys))
    first, second = (json.loads(Path(name).read_text()) for name in ("1.json", "2.json"))
    both = json.loads(measured("--from", "2.json", "1.json", "--json", capsys=capsys))
    assert both["cases"] == first["cases"] + second["cases"]
    assert both["targets"] == first["targets"] + second["targets"]
    assert (list(both["machine"]), both["scale"]) == (list(first["machine"]), first["scale"])
    report = measured("--from", "1.json", "2.json", "--markdown", capsys=capsys)
    assert "$ sparsemem bench --markdown > benchmarks/RESULTS.md" in report
    assert "was measured in 2 parts" in report
    assert "## latency-4k" in report
    assert "## hyperalloc-4k" in report
    assert " parts" not in measured("--from", "1.json", "--markdown", capsys=capsys)
    assert "hyperalloc-4k: " in measured("--from", "1.json", "2.json", capsys=capsys)


def test_parts_keep_all_that_was_said_of_the_machine(
    tiny_runs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(measured("latency-4k", "--json", capsys=capsys))
    one, other = tmp_path / "1", tmp_path / "2"
    one.write_text(json.dumps(found))
    found["machine"]["Memory"] = "more"
    found["cases"][0]["name"] = "another"
    found["targets"].clear()
    other.write_text(json.dumps(found))
    memory = json.loads(measured("--from", str(one), str(other), "--json", capsys=capsys))["machine"]["Memory"]
    assert memory.endswith("; more")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found["cases"][0].update(name="another"), "a full run and a tiny one are not parts of the same"),
        (lambda found: found["scale"].update(name="tiny"), "case latency-4k is in more than one part"),
        (lambda found: found.pop("scale"), "is not what sparsemem bench --json writes"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    change: Callable[[Any], object],
    says: str,
    tiny_runs: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = json.loads(measured("latency-4k", "--json", capsys=capsys))
    one, other = tmp_path / "1", tmp_path / "2"
    one.write_text(json.dumps(found))
    found["scale"]["name"] = "full"
    change(found)
    other.write_text(json.dumps(found))
    assert cli.main(["bench", "--from", str(one), str(other)]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.leaky  # matplotlib keeps its fonts
def test_a_plot_is_a_picture(tiny_runs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    picture = tmp_path / "out.png"
    assert cli.main(["bench", "latency-4k", "--json", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("figure", "unit", "shown"),
    [
        (0.25, "s", "250 ms"),
        (1.5, "s", "1.50 s"),
        (3.2e-6, "s", "3.20 us"),
        (-3.2e-6, "s", "-3.20 us"),
        (52e-9, "s", "52.0 ns"),
        (0.0, "s", "0.00 ns"),
        (65536, "bytes", "64K"),
        (1.0, "x", "1.00 x"),
        (34.5, "GiB/s", "34.5 GiB/s"),
    ],
)
def test_figures_are_shown_with_three_digits(figure: float, unit: str, shown: str) -> None:
    assert figures.value(figure, unit) == shown


def test_the_results_are_of_a_run_of_all_cases() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["The machine", "The targets", *(case.name for case in catalogue.CASES)]


def test_every_kind_is_a_case() -> None:
    assert [case.name for case in memory.CASES] == [kind.name for kind in memory.KINDS]
