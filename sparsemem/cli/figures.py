"""The figures of `sparsemem bench`, as text for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from shlex import quote

from sparsemem.bench.model import BYTES, RATE, SECONDS, Result, Row, Spread
from sparsemem.bench.outcome import Judged, Outcome, ratio_of
from sparsemem.bench.targets import Kind
from sparsemem.cli.table import columns
from sparsemem.units import format_size

_SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_ANOTHER = "another machine's, as published"

_INTRODUCTION = """\
# Results of one run

One run of `sparsemem bench`, on one machine; what another gives is best measured there. What is missed, and why, is in
[README.md](README.md). To repeat it, with {memory} of
free memory, a C compiler, numpy and nothing else running (and 512 pages in /proc/sys/vm/nr_hugepages for the cases of
the huge page pool):

```console
$ sparsemem bench {command} > benchmarks/RESULTS.md
```
{parts}
All ways of a case take turns in one process, for {rounds} rounds after one that does not count. A figure is the median
of the rounds, with the least and the most; a ratio is to the case's peer, round by round. Lower is better, except for
rates. Just before each way is measured as much memory as it needs is populated and freed: the host has given it then.

## The machine

{machine}
"""


def value(figure: float, unit: str) -> str:
    """A figure with its unit: `250 ms`, `64K`, `1.00 x`, `4.2 GiB/s`."""
    if unit == BYTES:
        return format_size(round(figure))
    if unit != SECONDS:
        return f"{_digits(figure)} {unit}"
    scale, name = next((each for each in _SCALES if abs(figure) >= each[0]), _SCALES[-1])
    return f"{_digits(figure / scale)} {name}"


def _digits(figure: float) -> str:
    """Three significant digits, without an exponent."""
    size = abs(figure)
    return f"{figure:.0f}" if size >= 100 else f"{figure:.1f}" if size >= 10 else f"{figure:.2f}"


def _ratio(ratio: float) -> str:
    if ratio >= 10:
        return _digits(ratio)
    return f"{ratio:.3f}" if ratio >= 0.1 or not ratio else f"{ratio:.{2 - math.floor(math.log10(ratio))}f}"


def _range(spread: Spread, unit: str) -> str:
    return f"{value(spread.least, unit)} .. {value(spread.most, unit)}"


# ---- cases ------------------------------------------------------------------------------------


def _tables(result: Result) -> Iterator[list[tuple[str, ...]]]:
    """One for each measure: way, median, range, ratio, range."""
    for measure in result.case.measures:
        rows = [_cells(result, row, measure.unit) for row in result.rows if row.measure == measure.name]
        if not rows:
            continue
        rows += [
            (f"{published.name} ({_ANOTHER})", value(published.value, RATE), "", "", "")
            for published in result.case.published
            if published.measure == measure.name
        ]
        yield [(measure.name, "median", "least .. most", f"to {measure.peer}", "least .. most"), *rows]


def _cells(result: Result, row: Row, unit: str) -> tuple[str, ...]:
    spread, ratio = row.spread, ratio_of(result, row)
    shown = (_ratio(ratio.median), f"{_ratio(ratio.least)} .. {_ratio(ratio.most)}") if ratio else ("-", "-")
    return (row.way, value(spread.median, unit), _range(spread, unit), *shown)


def _skipped(result: Result) -> Iterator[str]:
    """What was not measured; ways with one reason in one line."""
    ways: dict[str, list[str]] = {}
    for way, reason in result.skipped.items():
        ways.setdefault(reason, []).append(way)
    for reason, names in ways.items():
        yield f"not measured: {'; '.join(names)}: {reason}" if names != [""] else f"not measured: {reason}"


def case_text(result: Result) -> str:
    """A case for the terminal."""
    lines = [f"{result.case.name}: {result.case.title}"]
    for heading, *rows in _tables(result):
        lines.append(
            columns([[cell.upper() for cell in heading[:3]] + [*heading[3:]], *rows], right=(1, 2, 4), indent="  ")
        )
    lines += [f"  {line}" for line in _skipped(result)]
    return "\n".join(lines) + "\n"


# ---- targets -----------------------------------------------------------------------------------


def _target_rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    units = {(result.case.name, each.name): each.unit for result in outcome.results for each in result.case.measures}
    for judged in outcome.judged:
        target = judged.target
        unit = units[target.case, target.measure]
        against = f"over {target.peer}" if target.kind is Kind.DIFFERENCE else target.peer or "-"
        yield (
            f"{target.case}: {target.measure}",
            target.way,
            against,
            *_measured(judged, unit),
            judged.verdict.value + (f": {judged.reason}" if judged.reason else ""),
        )


def _measured(judged: Judged, unit: str) -> tuple[str, str, str]:
    """Limit, median, range."""
    spread = judged.measured
    if judged.target.kind is Kind.RATIO:
        limit = f"<= {judged.limit:g}"
        return (
            (limit, _ratio(spread.median), f"{_ratio(spread.least)} .. {_ratio(spread.most)}")
            if spread
            else (limit, "-", "-")
        )
    limit = f"<= {value(judged.limit, unit)}"
    return (limit, value(spread.median, unit), _range(spread, unit)) if spread else (limit, "-", "-")


_TARGETS = ("case", "way", "against", "target", "median", "least .. most", "")


def _summary(outcome: Outcome) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in outcome.counts().items())


def targets_text(outcome: Outcome) -> str:
    """The targets for the terminal."""
    if not outcome.judged:
        return "none of the targets is about these cases"
    table = columns([[cell.upper() for cell in _TARGETS], *_target_rows(outcome)], right=(3, 4, 5))
    return f"{table}\n\ntargets: {_summary(outcome)}"


# ---- Markdown ----------------------------------------------------------------------------------


_PARTS = """
This one was measured in {n} parts, between which the machine did other things: `--json` for each, and `--from` to put
them together. No figure is compared with one of another part.
"""


def report(outcome: Outcome, arguments: Iterable[str], *, parts: int = 0) -> str:
    """All of it as a document.

    Args:
        outcome: What came of it.
        arguments: Of the command that gives such a document again.
        parts: In how many parts it was measured; 0 or 1 if in one go.
    """
    machine = _markdown([("", ""), *outcome.machine.items()])
    introduction = _INTRODUCTION.format(
        command=" ".join(map(quote, arguments)),
        parts=_PARTS.format(n=parts) if parts > 1 else "",
        memory="10 GiB" if outcome.scale.name == "full" else "1 GiB",
        rounds=outcome.scale.rounds,
        machine=machine,
    )
    sections = [introduction]
    sections.append(f"## The targets\n\n{_summary(outcome)}.\n\n{_markdown([_TARGETS, *_target_rows(outcome)])}\n")
    for result in outcome.results:
        sections.append(f"## {result.case.name}\n\n{result.case.title[0].upper()}{result.case.title[1:]}.\n")
        sections += [_markdown(table) + "\n" for table in _tables(result)]
        sections += [f"{line}\n" for line in _skipped(result)]
    return "\n".join(sections).rstrip()


def _markdown(rows: list[tuple[str, ...]]) -> str:
    heading, *rest = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [heading, ["---"] * len(heading), *rest]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
