"""The command `sparsemem`: one module for each subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import sparsemem
from sparsemem.cli import demo, probe
from sparsemem.errors import SparseMemError

_EPILOG = """\
examples:
  sparsemem probe                   what this kernel, user and machine can do
  sparsemem demo                    plug and unplug real memory on every backend
  sparsemem demo --backend memfd    only one of them
  sparsemem probe --json | jq .     for other programs
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line, and no usage before it: --help shows that.
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = _Parser(
        prog="sparsemem",
        description="Sparse memory, managed the way a hypervisor does it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparsemem {sparsemem.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in (probe, demo):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: 0 is success, 1 failure, 2 wrong usage, 130 an interrupt."""
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`); keep the interpreter
        # from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("sparsemem: interrupted", file=sys.stderr)
        return 130
    except (SparseMemError, OSError, ValueError) as error:
        print(f"sparsemem: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
