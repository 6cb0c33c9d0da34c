"""`sparsemem probe`: what this kernel, user and machine support."""

from __future__ import annotations

import argparse
import json
from typing import Any

import attrs

from sparsemem.cli.table import add_output_options, columns, show_size
from sparsemem.survey import Finding, machine, shields, survey

_HELP = "find out what works here"
_DESCRIPTION = """\
Finds out what this kernel, user and machine support. Every line is found by
trying it: for each backend and each way to populate it, a small region is
reserved, a block plugged, written, read, unplugged and audited. What does not
work says why. So is each protection of unplugged blocks.
"""
_EPILOG = """\
examples:
  sparsemem probe
  sparsemem probe --json | jq '.backends[] | select(.works | not)'
"""
_YES_NO = {True: "yes", False: "no"}
_OVERCOMMIT = {0: "0 (heuristic)", 1: "1 (always)", 2: "2 (strict)"}


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "probe",
        help=_HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints what was found; always succeeds, since "no" is an answer, too."""
    facts, findings, shielded = machine(), survey(), shields()
    if options.json:
        told = {
            "machine": facts,
            "backends": [attrs.asdict(found) for found in findings],
            "protections": [attrs.asdict(found) for found in shielded],
        }
        print(json.dumps(told, indent=2))
        return 0
    print(columns(_facts(facts, options.bytes)))
    print()
    rows = [("BACKEND", "STRATEGY", "WORKS", "REMARK")]
    rows += [(found.name, found.strategy, _YES_NO[found.works], _remark(found)) for found in findings]
    print(columns(rows))
    print()
    rows = [("BACKEND", "PROTECTION", "WORKS", "REMARK")]
    rows += [(found.name, found.protection, _YES_NO[found.works], found.why) for found in shielded]
    print(columns(rows))
    return 0


def _remark(found: Finding) -> str:
    """What there is to say of it; the way that regions take by themselves is marked."""
    return "; ".join(filter(None, (found.why, "auto" if found.chosen and found.works else "")))


def _facts(facts: dict[str, Any], raw: bool) -> list[tuple[str, str]]:
    def size(name: str, none: str = "none") -> str:
        return none if facts[name] is None else show_size(facts[name], raw)

    tried = {
        "MADV_POPULATE_WRITE:": "populate_write",
        "PAGEMAP_SCAN:": "pagemap_scan",
        "memfd_secret:": "memfd_secret",
        "MADV_WIPEONFORK:": "wipe_on_fork",
        "Vectored process_madvise:": "vectored",
        "userfaultfd, private memory:": "uffd_copy",
        "userfaultfd, shared memory:": "uffd_shmem",
        "UFFDIO_MOVE (warm pool):": "uffd_move",
        "MADV_COLLAPSE, private memory:": "collapse_private",
        "MADV_COLLAPSE, shared memory:": "collapse",
        "MADV_COLD, MADV_PAGEOUT:": "cold",
        "Trap (protection):": "trap",
        "Trap that tells (catch_stray):": "catch",
        "Guard pages (protection):": "guard",
        "Named mappings:": "named_mappings",
    }
    rows = [
        ("Kernel:", f"{facts['kernel']} {facts['architecture']}"),
        ("User:", facts["user"]),
        ("Page size:", size("page_size")),
        ("Transparent huge pages:", f"{size('thp_size')}, mode {facts['thp_mode'] or '-'}"),
        *(
            (f"Huge pages of {name}:", f"{pool['free']} of {pool['total']} free")
            for name, pool in facts["huge_pages"].items()
        ),
        ("NUMA nodes:", ", ".join(map(str, facts["numa_nodes"])) or "none"),
        ("Largest reservation:", size("largest_reservation")),
        ("Overcommit mode:", _OVERCOMMIT.get(facts["overcommit_memory"], "unknown")),
        ("Locked memory limit:", size("locked_memory_limit", "unlimited")),
    ]
    limits = [
        (
            "Control group limit:",
            f"{show_size(limit['limit'], raw)}, {show_size(limit['usage'], raw)} of it used, at {limit['group']}",
        )
        for limit in facts["cgroup_limits"]
    ]
    rows += limits or [("Control group limit:", "none")]
    return rows + [(label, _YES_NO[facts[name]]) for label, name in tried.items()]
