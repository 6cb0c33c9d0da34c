"""`sparsemem demo`: real memory plugged and unplugged on every backend, checked against the kernel."""

from __future__ import annotations

import argparse
import json
from typing import Any

import attrs

from sparsemem.backends import from_text
from sparsemem.cli.table import columns, show_size
from sparsemem.demonstration import Report, demonstrate, exhaust
from sparsemem.survey import Candidate, candidates
from sparsemem.units import parse_size

_HELP = "plug and unplug real memory on every backend that works here"
_DESCRIPTION = """\
On every backend that works here: reserves 1 TiB where the mapping allows it,
plugs some of it, writes and verifies, unplugs, and holds the block map against
the kernel's own accounting. One backend is exhausted on purpose, to show that
the plug fails with an error and is rolled back.

The exit status is 0 only if every check held.
"""


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _candidate(text: str) -> Candidate:
    try:
        backend = from_text(text)
    except (ValueError, OSError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Candidate(text, lambda: backend)


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "demo", help=_HELP, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=_size, default="1T", help="how much to reserve (default: 1T)")
    parser.add_argument("--plug", type=_size, default="64M", help="how much to plug on each backend (default: 64M)")
    parser.add_argument(
        "--backend",
        type=_candidate,
        action="append",
        metavar="TEXT",
        help="only this one, such as memfd:private or file:/dev/shm/x; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--bytes", action="store_true", help="print sizes in bytes")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Shows one report after the other; 0 if all checks held and something ran."""
    reports = []
    with candidates() as known:
        for candidate in options.backend or known:
            reports.append(demonstrate(candidate, options.size, options.plug))
            if not options.json:
                print(_show(reports[-1], options.bytes), flush=True)
    reports.append(exhaust())
    ran = [report for report in reports[:-1] if not report.skipped]
    checks = [check for report in reports for check in report.checks]
    ok = bool(ran) and all(check.ok for check in checks)
    summary = {
        "backends": len(ran),
        "skipped": len(reports) - 1 - len(ran),
        "checks": len(checks),
        "failed": sum(not check.ok for check in checks),
        "ok": ok,
    }
    if options.json:
        print(json.dumps({"reports": [attrs.asdict(report) for report in reports], "summary": summary}, indent=2))
    else:
        print(_show(reports[-1], options.bytes))
        print(
            f"{summary['backends']} backends ran, {summary['skipped']} could not; "
            f"{summary['checks'] - summary['failed']} of {summary['checks']} checks held"
        )
    return 0 if ok else 1


def _show(report: Report, raw: bool) -> str:
    if report.skipped:
        return f"{report.name}: not here: {report.skipped}\n"
    title = f"{report.name}  ({report.backend}, {report.strategy})"
    lines = [title, "-" * len(title)]
    lines.append(
        f"  reserved {show_size(report.size, raw)} in blocks of {show_size(report.block_size, raw)}"
        + (f"; {report.note}" if report.note else "")
    )
    if report.block_map:
        lines.append(f"  blocks   {report.block_map}")
    if report.ranges:
        lines.append(columns(_ranges(report, raw), right=(1,), indent="  "))
    figures = [("MOMENT", "PLUGGED", "USED (kernel)")]
    figures += [(f.moment, show_size(f.plugged, raw), show_size(f.used, raw)) for f in report.figures]
    lines.append(columns(figures, right=(1, 2), indent="  "))
    lines += [f"  {'ok    ' if check.ok else 'FAILED'} {check.claim}" for check in report.checks]
    return "\n".join(lines) + "\n"


def _ranges(report: Report, raw: bool) -> list[tuple[str, str, str, str]]:
    """The table that lsmem prints: range, size, state, blocks."""
    rows = [("RANGE", "SIZE", "STATE", "BLOCKS")]
    for first, count, plugged in report.ranges:
        start, length = first * report.block_size, count * report.block_size
        blocks = str(first) if count == 1 else f"{first}-{first + count - 1}"
        state = "plugged" if plugged else "unplugged"
        rows.append((f"0x{start:012x}-0x{start + length - 1:012x}", show_size(length, raw), state, blocks))
    return rows
