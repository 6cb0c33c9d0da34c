"""`sparsemem probe`: what this kernel, user and machine support."""

from __future__ import annotations

import argparse
import json
from typing import Any

import attrs

from sparsemem.cli.table import columns, show_size
from sparsemem.survey import machine, survey

_HELP = "find out what works here"
_DESCRIPTION = """\
Finds out what this kernel, user and machine support. Every line is found by
trying it: a small region is reserved, a block plugged, written, read, unplugged
and audited, for each backend and each way to populate it.
"""
_YES_NO = {True: "yes", False: "no", None: "-"}


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "probe", help=_HELP, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--bytes", action="store_true", help="print sizes in bytes")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints what was found; always succeeds, since "no" is an answer, too."""
    facts, findings = machine(), survey()
    if options.json:
        print(json.dumps({"machine": facts, "backends": [attrs.asdict(found) for found in findings]}, indent=2))
        return 0
    print(columns(_facts(facts, options.bytes)))
    print()
    rows = [("BACKEND", "STRATEGY", "WORKS", "WHY")]
    rows += [(found.name, found.strategy, _YES_NO[found.works], found.why) for found in findings]
    print(columns(rows))
    return 0


def _facts(facts: dict[str, Any], raw: bool) -> list[tuple[str, str]]:
    def size(name: str) -> str:
        return "none" if not facts[name] else show_size(facts[name], raw)

    rows = [
        ("Kernel:", f"{facts['kernel']} {facts['architecture']}"),
        ("User:", facts["user"]),
        ("Page size:", size("page_size")),
        ("Transparent huge pages:", f"{size('thp_size')}, mode {facts['thp_mode'] or '-'}"),
        ("Overcommit mode:", str(facts["overcommit_memory"])),
        ("Largest reservation:", size("largest_reservation")),
        ("MADV_POPULATE_WRITE:", _YES_NO[facts["populate_write"]]),
        ("PAGEMAP_SCAN:", _YES_NO[facts["pagemap_scan"]]),
        ("MADV_WIPEONFORK:", _YES_NO[facts["wipe_on_fork"]]),
        ("Named mappings:", _YES_NO[facts["named_mappings"]]),
    ]
    for name, pool in facts["huge_pages"].items():
        rows.append((f"Huge pages of {name}:", f"{pool['free']} of {pool['total']} free"))
    for limit in facts["cgroup_limits"]:
        rows.append(("Control group limit:", f"{show_size(limit['limit'], raw)} at {limit['group']}"))
    return rows
