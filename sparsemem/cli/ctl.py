"""`sparsemem ctl`: commands for a running `sparsemem vhost-user`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sparsemem.cli.live import picture
from sparsemem.cli.table import add_output_options, columns, show_size
from sparsemem.units import parse_size

_HELP = "talk to a running `sparsemem vhost-user`"
_DESCRIPTION = """\
Sends a command to the control socket of a running `sparsemem vhost-user`.
"""
_EPILOG = """\
examples:
  sparsemem ctl --socket ctl.sock resize 2G      ask the guest to plug 2 GiB in all
  sparsemem ctl --socket ctl.sock inflate 256M   ask the guest for a balloon of 256 MiB
  sparsemem ctl --socket ctl.sock stats --json
  sparsemem ctl --socket ctl.sock map
"""


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "ctl",
        help=_HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--socket", required=True, help="where `vhost-user --control` listens")
    orders = parser.add_subparsers(dest="order", metavar="ORDER", required=True, parser_class=type(parser))
    resize = orders.add_parser("resize", help="ask the guest to plug so much in all")
    inflate = orders.add_parser("inflate", help="ask the guest for a balloon of so much")
    for sized in (resize, inflate):
        sized.add_argument("size", type=_bytes, help="bytes, or 2G")
    others = [orders.add_parser("stats", help="what the devices have done")]
    others.append(orders.add_parser("map", help="which blocks are plugged"))
    for each in (resize, inflate, *others):
        add_output_options(each)
        each.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Sends the command and prints its result."""
    from sparsemem.virtio.vhost_user.control import ask

    arguments = {"size": options.size} if hasattr(options, "size") else {}
    result = ask(options.socket, options.order, **arguments)
    if options.json:
        print(json.dumps(result, indent=2))
    elif options.order == "stats":
        print("\n".join(picture(result)))
    elif options.order == "map":
        print(_map(result, options.bytes))
    else:
        print(columns([[name.replace("_", " "), show_size(size, options.bytes)] for name, size in result.items()]))
    return 0


def _map(found: dict[str, Any], raw: bool) -> str:
    """The plugged ranges, as lsmem prints them."""
    rows = [("RANGE", "SIZE", "BLOCK")]
    for first, count in found["plugged"]:
        start, length = found["address"] + first * found["block_size"], count * found["block_size"]
        blocks = str(first) if count == 1 else f"{first}-{first + count - 1}"
        rows.append((f"0x{start:016x}-0x{start + length - 1:016x}", show_size(length, raw), blocks))
    return columns(rows, right=(1,))
