"""`sparsemem bench`: how fast it is, against whom, and whether that is enough."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsemem.bench.model import Case, Scale
    from sparsemem.bench.outcome import Outcome

_HELP = "measure, side by side with bare system calls and others"
_DESCRIPTION = """\
Measures plugging and unplugging in this process, side by side with others that
do the same: loops of system calls in C (compiled now, with $CC or cc), QEMU's
ways of preallocating, CPython's mmap, numpy.  All of a case take turns, round
after round, on host memory that was warmed just before.  Figures are medians
with their least and most; a ratio is to the case's peer, in the same round.

The last table says which targets were reached.  Missing one is no failure: the
exit status says whether it could be measured.
"""
_EPILOG = """\
examples:
  sparsemem bench --quick                   a minute, on less memory
  sparsemem bench anonymous-4k 'memfd*'     these cases only
  sparsemem bench --markdown > RESULTS.md   a full run, on 10 GiB of free memory
  sparsemem bench 'stalls*' --json > 2.json        a part of one, for when the machine is quiet
  sparsemem bench --from 1.json 2.json --markdown  all parts as one run
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "bench",
        help=_HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only this case; * at the end stands for anything")
    parser.add_argument("--list", action="store_true", help="list the cases and what they measure")
    parser.add_argument("--quick", action="store_true", help="measure less, within 60 s")
    parser.add_argument(
        "--from",
        dest="parts",
        nargs="+",
        metavar="FILE",
        help="measure nothing, but show runs of one machine that --json has written as one",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON (times in seconds, sizes in bytes)")
    shown.add_argument("--markdown", action="store_true", help="print a report such as benchmarks/RESULTS.md")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios, too (PNG, SVG or PDF; needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the cases and prints what came of them; 0 if anything could be measured."""
    # Late, for these load what no other command needs.
    from sparsemem.bench import catalogue, model, parts

    if options.parts and (options.names or options.quick or options.list):
        raise ValueError("--from shows what was measured: it takes no case, --quick or --list")
    cases = catalogue.select(options.names)
    if options.list:
        _list(cases, options.json)
        return 0
    if options.plot:
        from sparsemem.bench import plot

        plot.check(options.plot)
    read = parts.read(options.parts or ())
    outcome = parts.joined(read) if read else _measure(cases, model.QUICK if options.quick else model.FULL, options)
    if options.plot:
        plot.draw(outcome, options.plot)
    _show(outcome, read, options)
    return 0 if any(result.rows for result in outcome.results) else 1


def _list(cases: tuple[Case, ...], as_json: bool) -> None:
    from sparsemem.cli.table import columns

    if as_json:
        listed = [
            {"name": case.name, "title": case.title, "measures": [measure.name for measure in case.measures]}
            for case in cases
        ]
        print(json.dumps(listed, indent=2))
        return
    print(columns([("NAME", "WHAT"), *((case.name, case.title) for case in cases)]))


def _measure(cases: tuple[Case, ...], scale: Scale, options: argparse.Namespace) -> Outcome:
    """One case after the other; its table is printed as soon as it is there."""
    from sparsemem.bench.lab import laboratory, run_case
    from sparsemem.bench.machine import describe
    from sparsemem.bench.outcome import Outcome, judge
    from sparsemem.cli import figures

    results = []
    with laboratory(scale) as lab:
        machine = describe(lab)
        for case in cases:
            print(f"{case.name} ...", end="", file=sys.stderr, flush=True)
            results.append(run_case(case, lab))
            print("\r\033[K" if sys.stderr.isatty() else "\n", end="", file=sys.stderr, flush=True)
            if not (options.json or options.markdown):
                print(figures.case_text(results[-1]), flush=True)
    return Outcome(machine, scale, tuple(results), judge(results))


def _show(outcome: Outcome, read: tuple[Outcome, ...], options: argparse.Namespace) -> None:
    from sparsemem.bench.outcome import as_data
    from sparsemem.cli import figures

    if options.json:
        print(json.dumps(as_data(outcome), indent=2))
    elif options.markdown:
        # What gives such a report again, in one go.
        quick = ["--quick"] if outcome.scale.name == "quick" else []
        print(figures.report(outcome, [*quick, *options.names, "--markdown"], parts=len(read)))
    else:
        if read:
            print(*map(figures.case_text, outcome.results), sep="\n")
        print(figures.targets_text(outcome))
