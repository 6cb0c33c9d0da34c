"""The operations on blocks, each a sequence that can stop anywhere.

Every operation is an object that knows how far it has come, so that `undo` can
put things right from any point: after an error, after a KeyboardInterrupt at
any bytecode, and again if the undoing itself was interrupted.  Steps that change
the state of blocks are one C call each.

The order within is what makes it safe, and is explained where it matters.
"""

from sparsemem.operations.inner import Inner
from sparsemem.operations.operation import Core, Operation, execute, require_discard
from sparsemem.operations.plug import Plug, plug_at_once_error, refill
from sparsemem.operations.relief import relieve
from sparsemem.operations.resize import resize
from sparsemem.operations.unplug import Unplug, flush, flush_due, unplug_at_once_error
from sparsemem.operations.whole import Close, Join, Leave, check_listens, protect

__all__ = [
    "Close",
    "Core",
    "Inner",
    "Join",
    "Leave",
    "Operation",
    "Plug",
    "Unplug",
    "check_listens",
    "execute",
    "flush",
    "flush_due",
    "plug_at_once_error",
    "protect",
    "refill",
    "relieve",
    "require_discard",
    "resize",
    "unplug_at_once_error",
]
