"""The command `sparsemem`: one module for each subcommand, with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import sparsemem
from sparsemem.cli import bench, ctl, demo, probe, vhost_user
from sparsemem.errors import SparseMemError

_COMMANDS = (probe, demo, bench, vhost_user, ctl)
_EPILOG = """\
examples:
  sparsemem probe                   what this kernel, user and machine can do
  sparsemem demo                    plug and unplug real memory on every backend
  sparsemem demo --backend memfd    on this one only
  sparsemem bench --quick           measure, against bare system calls and others
  sparsemem probe --json            for other programs
  sparsemem vhost-user --help       serve virtio-mem and balloon devices to a virtual machine

`sparsemem COMMAND --help` says more.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line, and no usage before it: --help shows that.
        self.exit(2, _error_line(f"{message} (see {self.prog} --help)"))


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
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: 0 is success, 1 failure, 2 wrong usage, 130 an interrupt."""
    try:
        try:
            options = build_parser().parse_args(arguments)
            status: int = options.run(options)
        except SystemExit as leaving:  # argparse is done: --help, --version, wrong usage
            status = leaving.code if isinstance(leaving.code, int) else 1
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`); keep the interpreter
        # from complaining when it flushes at exit.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return 1
    except KeyboardInterrupt:
        print("sparsemem: interrupted", file=sys.stderr)
        return 130
    except (SparseMemError, OSError, ValueError) as error:
        sys.stderr.write(_error_line(str(error)))
        return 1


def _error_line(message: str) -> str:
    return f"sparsemem: error: {' '.join(message.split())}\n"
