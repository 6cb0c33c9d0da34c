"""One run measured in parts: what `sparsemem bench --json` has said of each, put together again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sparsemem.bench.catalogue import CASES
from sparsemem.bench.model import Case, Measure, Published, Result, Row, Scale, Spread
from sparsemem.bench.outcome import Judged, Outcome, Verdict
from sparsemem.bench.targets import Kind, Target


def read(paths: Iterable[str]) -> tuple[Outcome, ...]:
    """The parts, in this order.

    Raises:
        OSError: A file cannot be read.
        ValueError: It is none that `sparsemem bench --json` has written.
    """
    return tuple(map(_outcome, paths))


def joined(parts: Iterable[Outcome]) -> Outcome:
    """All parts as one run, in the order of one.

    Of what the machine was, all that was said is kept: a pool of huge pages, say, may have
    been made for one part.

    Raises:
        ValueError: They do not belong together: measured at different scales, or with one
            case in two of them.
    """
    first, *others = outcomes = list(parts)
    for other in others:
        if other.scale != first.scale:
            raise ValueError(f"a {other.scale.name} run and a {first.scale.name} one are not parts of the same")
    place = {case.name: i for i, case in enumerate(CASES)}
    results = sorted(
        (result for outcome in outcomes for result in outcome.results),
        key=lambda result: place.get(result.case.name, len(place)),
    )
    judged = sorted(
        (judged for outcome in outcomes for judged in outcome.judged),
        key=lambda judged: place.get(judged.target.case, len(place)),
    )
    names = [result.case.name for result in results]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"case {name} is in more than one part")
    said: dict[str, dict[str, None]] = {}
    for outcome in outcomes:
        for label, text in outcome.machine.items():
            said.setdefault(label, {})[text] = None
    machine = {label: "; ".join(texts) for label, texts in said.items()}
    return Outcome(machine, first.scale, tuple(results), tuple(judged))


def _outcome(path: str) -> Outcome:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return Outcome(
            machine=dict(data["machine"]),
            scale=Scale(**data["scale"]),
            results=tuple(map(_result, data["cases"])),
            judged=tuple(map(_judged, data["targets"])),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what sparsemem bench --json writes: {error}") from None


def _result(data: Mapping[str, Any]) -> Result:
    case = Case(
        name=data["name"],
        title=data["title"],
        measures=tuple(Measure(**measure) for measure in data["measures"]),
        ways=lambda lab: nullcontext([]),  # it has been run
        published=tuple(Published(**published) for published in data["another_machine"]),
    )
    rows = tuple(Row(row["measure"], row["way"], tuple(row["figures"])) for row in data["rows"])
    return Result(case, rows, {skipped["way"]: skipped["reason"] for skipped in data["skipped"]})


def _judged(data: Mapping[str, Any]) -> Judged:
    target = Target(
        **{name: data[name] for name in ("case", "measure", "way", "peer", "limit", "without_uffd")},
        kind=Kind(data["kind"]),
    )
    measured = None if data["measured"] is None else Spread(**data["measured"])
    return Judged(target, data["limit"], measured, Verdict(data["verdict"]), data["reason"])
