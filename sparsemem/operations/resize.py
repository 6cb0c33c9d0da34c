"""Growing and shrinking to a size: whichever blocks that takes."""

from __future__ import annotations

from sparsemem.blocks import Claim, Map
from sparsemem.errors import BlockStateError, Run
from sparsemem.operations.operation import Core, execute
from sparsemem.operations.plug import Plug
from sparsemem.operations.unplug import Unplug
from sparsemem.runs import subtract


def resize(core: Core, target: int) -> int:
    """Plugs the lowest unplugged blocks or unplugs the highest plugged ones; the change in blocks.

    Raises:
        BlockStateError: Too few blocks can be plugged, since some are tainted.
        As Plug and Unplug.
    """
    while True:
        core.blocks.check_open()
        change = target - int(core.blocks.counts().plugged)
        if change == 0:
            return 0
        try:
            if change > 0:
                free = _lowest_free(core, change)
                if free is None:
                    continue
                runs = core.block_runs(free)
                return execute(Plug(core, Claim(core.blocks, runs)))
            plugged = list(core.blocks.runs(Map.PLUGGED, True))
            runs = core.block_runs(_highest(plugged, -change))
            return -execute(Unplug(core, Claim(core.blocks, runs)))
        except BlockStateError as error:
            # Somebody else has changed one of the blocks since we looked: look
            # again.  Without a block it is something that will not pass.
            if error.block is None:
                raise


def _lowest_free(core: Core, count: int) -> list[Run] | None:
    tainted = list(core.blocks.runs(Map.TAINTED, True))
    taken, left = [], count
    for first, n in subtract(core.blocks.runs(Map.PLUGGED, False), tainted):
        taken.append((first, min(n, left)))
        left -= taken[-1][1]
        if left == 0:
            return taken
    if left > sum(n for _, n in tainted):
        return None  # taint is not why: somebody else has plugged some since we counted
    raise BlockStateError(
        f"cannot grow by {count} blocks: all but {count - left} of the unplugged ones are tainted; scrub() mends them"
    )


def _highest(plugged: list[Run], count: int) -> list[Run]:
    taken, left = [], count
    for first, n in reversed(plugged):
        size = min(n, left)
        taken.append((first + n - size, size))
        left -= size
        if left == 0:
            break
    return taken
