"""`sparsemem demo`: real memory plugged and unplugged on every backend, checked against the kernel."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import attrs

from sparsemem.backends import from_text
from sparsemem.cli.progress import showing
from sparsemem.cli.table import add_output_options, columns, show_size
from sparsemem.demonstration import Report, demonstrate, exhaust
from sparsemem.survey import Candidate, candidates
from sparsemem.units import exact_size, parse_size

_HELP = "plug and unplug real memory on every backend that works here"
_DESCRIPTION = """\
On every backend that works here: reserves 1 TiB where the mapping allows it,
plugs some of it, writes and verifies, unplugs, and holds the block map against
the kernel's own accounting. One backend is exhausted on purpose, to show that
the plug fails with an error and is rolled back.

Every figure is measured in this run. KERNEL is what the kernel says that this
very mapping uses. Nothing is left behind.

The exit status is 0 only if every check held.
"""
_EPILOG = """\
examples:
  sparsemem demo
  sparsemem demo --backend memfd:private --backend anonymous --plug 256M
  sparsemem demo --backend file:/mnt/big/file --size 8T
  sparsemem demo --json | jq .summary
"""
_SMALLEST = 16 << 20
_GRAIN = 2 << 20


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < _SMALLEST or size % _GRAIN:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a multiple of {exact_size(_GRAIN)} from {exact_size(_SMALLEST)} on"
        )
    return size


def _candidate(text: str) -> Candidate:
    try:
        backend = from_text(text)
    except (ValueError, OSError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Candidate(text, lambda: backend)


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "demo",
        help=_HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=_size, default="1T", help="how much to reserve (default: 1T)")
    parser.add_argument("--plug", type=_size, default="64M", help="how much to plug on each backend (default: 64M)")
    parser.add_argument(
        "--backend",
        type=_candidate,
        action="append",
        metavar="TEXT",
        help="only this one, such as memfd:hugetlb=2M,private or file:/dev/shm/x; may be repeated",
    )
    add_output_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Shows one report after the other; 0 if all checks held and something ran."""
    if options.plug > options.size // 2:
        options.usage_error(f"--plug {exact_size(options.plug)} is more than half of --size {exact_size(options.size)}")
    reports = []
    with candidates() as known:
        for candidate in options.backend or known:
            with showing(f"plugging {candidate.name}") as progress:
                reports.append(demonstrate(candidate, options.size, options.plug, progress))
            if not options.json:
                print(_show(reports[-1], options.bytes), flush=True)
    exhausted = exhaust()
    summary = _summary(reports, exhausted)
    if options.json:
        shown = {"reports": [attrs.asdict(report) for report in (*reports, exhausted)], "summary": summary}
        print(json.dumps(shown, indent=2))
    else:
        print(_show(exhausted, options.bytes))
        print(_overview([*reports, exhausted], options.bytes))
        print(
            f"\n{summary['backends']} backends ran, {summary['skipped']} could not; "
            f"{summary['checks'] - summary['failed']} of {summary['checks']} checks held"
        )
    return 0 if summary["ok"] else 1


def _summary(reports: list[Report], exhausted: Report) -> dict[str, Any]:
    ran = [report for report in reports if not report.skipped]
    checks = [check for report in (*reports, exhausted) for check in report.checks]
    failed = sum(not check.ok for check in checks)
    return {
        "backends": len(ran),
        "skipped": len(reports) - len(ran),
        "checks": len(checks),
        "failed": failed,
        "ok": bool(ran) and not failed,
    }


def _show(report: Report, raw: bool) -> str:
    if report.skipped:
        return f"{report.name}\n  not here: {report.skipped}\n"
    lines = [
        report.name,
        f"  {report.backend}, {show_size(report.size, raw)} in blocks of {show_size(report.block_size, raw)}, "
        f"strategy {report.strategy}",
        *(f"  {note}" for note in report.notes),
    ]
    rows = [("STEP", "PLUGGED", "KERNEL", "", f"CHECK (kernel: {report.source})")]
    for step in report.steps:
        figures = (step.action, show_size(step.plugged, raw), show_size(step.used, raw))
        told = [("ok" if check.ok else "FAILED", check.claim) for check in step.checks] or [("", "")]
        rows.append((*figures, *told[0]))
        rows += [("", "", "", *more) for more in told[1:]]
    lines += [columns(rows, right=(1, 2), indent="  "), "  " + _block_map(report)]
    lines.append(columns(_ranges(report, raw), right=(1,), indent="  "))
    return "\n".join(lines) + "\n"


def _block_map(report: Report) -> str:
    """Plugged blocks full, others dotted, where the terminal has such characters."""
    rest = report.size // report.block_size > len(report.block_map)
    text = report.block_map.replace("#", "█").replace(".", "·") + ("…" if rest else "")
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return report.block_map + ("..." if rest else "")
    return text


def _ranges(report: Report, raw: bool) -> list[tuple[str, str, str, str]]:
    """The table that lsmem prints: range, size, state, blocks."""
    rows = [("RANGE", "SIZE", "STATE", "BLOCK")]
    for first, count, plugged in report.ranges:
        start, length = first * report.block_size, count * report.block_size
        blocks = str(first) if count == 1 else f"{first}-{first + count - 1}"
        state = "plugged" if plugged else "unplugged"
        rows.append((f"0x{start:016x}-0x{start + length - 1:016x}", show_size(length, raw), state, blocks))
    return rows


def _overview(reports: list[Report], raw: bool) -> str:
    """One line for each backend."""
    rows: list[tuple[str, ...]] = [("BACKEND", "RESERVED", "PLUGGED", "KERNEL", "CHECKS", "REMARK")]
    for report in reports:
        if report.skipped:
            rows.append((report.name, "-", "-", "-", "-", f"not here: {report.skipped}"))
            continue
        most = max(report.steps, key=lambda step: step.plugged)
        failed = [check.claim for check in report.checks if not check.ok]
        held = f"{len(report.checks) - len(failed)} of {len(report.checks)}"
        figures = (show_size(number, raw) for number in (report.size, most.plugged, most.used))
        remark = f"FAILED: {'; '.join(failed)}" if failed else "".join(report.notes[:1]).partition(":")[0]
        rows.append((report.name, *figures, held, remark))
    return columns(rows, right=(1, 2, 3, 4))
