"""Everything that came of a benchmark: results, targets reached and missed, as plain data for JSON."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from attrs import frozen

from sparsemem._sys import calls, probe
from sparsemem.bench.model import Result, Row, Scale, Spread
from sparsemem.bench.targets import TARGETS, Kind, Target


class Verdict(enum.Enum):
    """What came of a target."""

    REACHED = "reached"
    MISSED = "missed"
    SKIPPED = "not measured"


@frozen
class Judged:
    """A target and what was measured.

    Attributes:
        target: The target.
        limit: The limit that holds on this machine.
        measured: The figures, if there are any.
        verdict: Reached if their median is within the limit.
        reason: Why there are none.
    """

    target: Target
    limit: float
    measured: Spread | None
    verdict: Verdict
    reason: str = ""


@frozen
class Outcome:
    """One run.

    Attributes:
        machine: What it ran on.
        scale: How much was measured.
        results: One for each case.
        judged: The targets of these cases.
    """

    machine: Mapping[str, str]
    scale: Scale
    results: tuple[Result, ...]
    judged: tuple[Judged, ...]

    def counts(self) -> dict[str, int]:
        """How many targets there are of each verdict."""
        return {verdict.value: sum(judged.verdict is verdict for judged in self.judged) for verdict in Verdict}


def judge(results: Iterable[Result]) -> tuple[Judged, ...]:
    """Holds the targets of the cases that were run against their results."""
    by_name = {result.case.name: result for result in results}
    fills = probe.uffd_copy(calls.kernel)
    return tuple(_judge(target, by_name[target.case], fills) for target in TARGETS if target.case in by_name)


def _judge(target: Target, result: Result, fills: bool) -> Judged:
    limit = target.limit if fills or target.without_uffd is None else target.without_uffd
    row = result.row(target.measure, target.way)
    peer = result.row(target.measure, target.peer) if target.peer else None
    if row is None or (target.peer and peer is None):
        missing = target.way if row is None else target.peer
        reason = result.skipped.get("") or result.skipped.get(missing) or f"{missing!r} has no such figure here"
        return Judged(target, limit, None, Verdict.SKIPPED, reason)
    measured = _measured(target.kind, row, peer)
    if measured is None:
        return Judged(target, limit, None, Verdict.SKIPPED, f"{target.peer!r} measured 0")
    return Judged(target, limit, measured, Verdict.REACHED if measured.median <= limit else Verdict.MISSED)


def _measured(kind: Kind, row: Row, peer: Row | None) -> Spread | None:
    if peer is None:
        return row.spread
    return row.above(peer) if kind is Kind.DIFFERENCE else row.over(peer)


def as_data(outcome: Outcome) -> dict[str, Any]:
    """Numbers and texts only; times in seconds, sizes in bytes."""
    return {
        "machine": dict(outcome.machine),
        "scale": attrs.asdict(outcome.scale),
        "cases": [_case_data(result) for result in outcome.results],
        "targets": [_judged_data(judged) for judged in outcome.judged],
        "summary": outcome.counts(),
    }


def _case_data(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "name": case.name,
        "title": case.title,
        "measures": [attrs.asdict(measure) for measure in case.measures],
        "rows": [_row_data(result, row) for row in result.rows],
        "skipped": [{"way": way, "reason": reason} for way, reason in result.skipped.items()],
        "another_machine": [attrs.asdict(published) for published in case.published],
    }


def _row_data(result: Result, row: Row) -> dict[str, Any]:
    ratio = ratio_of(result, row)
    return {
        **attrs.asdict(row),
        **attrs.asdict(row.spread),
        "ratio": None if ratio is None else attrs.asdict(ratio),
    }


def ratio_of(result: Result, row: Row) -> Spread | None:
    """To the measure's peer, if that ran."""
    measure = next(measure for measure in result.case.measures if measure.name == row.measure)
    peer = result.row(measure.name, measure.peer)
    return None if peer is None else row.over(peer)


def _judged_data(judged: Judged) -> dict[str, Any]:
    return {
        **attrs.asdict(judged.target, value_serializer=lambda _, __, value: getattr(value, "value", value)),
        "limit": judged.limit,
        "measured": None if judged.measured is None else attrs.asdict(judged.measured),
        "verdict": judged.verdict.value,
        "reason": judged.reason,
    }
