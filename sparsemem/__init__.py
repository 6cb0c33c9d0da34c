"""sparsemem: sparse memory, managed from Python the way a hypervisor does it.

A `Region` reserves a large mapping that costs nothing, and plugs and unplugs
blocks of it: populated all or nothing, discarded for certain, with an error
instead of SIGBUS when memory runs out.
"""

import sys

if sys.platform != "linux":
    raise ImportError(
        f"sparsemem manages memory with Linux system calls (MADV_POPULATE_WRITE and others); this is {sys.platform}"
    )

from sparsemem import backends
from sparsemem.audit import Audit
from sparsemem.backends import Anonymous, File, Memfd, Secret, Simulated, Tmpfs
from sparsemem.budget import Budget
from sparsemem.errors import (
    AdviceError,
    BackendExhaustedError,
    BlockRangeError,
    BlockStateError,
    Cause,
    DeadlineError,
    DiscardError,
    ForkedRegionError,
    HugePageSplitWarning,
    ListenerVetoError,
    OperationCancelledError,
    PopulateError,
    RegionClosedError,
    ReserveError,
    SnapshotError,
    SnapshotIOError,
    SparseMemError,
    UnsupportedError,
    ViewsAliveError,
)
from sparsemem.headroom import Headroom
from sparsemem.listeners import Listener
from sparsemem.region import BlockState, Region
from sparsemem.snapshot import Snapshot
from sparsemem.statistics import Stats
from sparsemem.stray import StrayAccess
from sparsemem.units import format_size, parse_size

__version__ = "0.1.0"

__all__ = [
    "AdviceError",
    "Anonymous",
    "Audit",
    "BackendExhaustedError",
    "BlockRangeError",
    "BlockState",
    "BlockStateError",
    "Budget",
    "Cause",
    "DeadlineError",
    "DiscardError",
    "File",
    "ForkedRegionError",
    "Headroom",
    "HugePageSplitWarning",
    "Listener",
    "ListenerVetoError",
    "Memfd",
    "OperationCancelledError",
    "PopulateError",
    "Region",
    "RegionClosedError",
    "ReserveError",
    "Secret",
    "Simulated",
    "Snapshot",
    "SnapshotError",
    "SnapshotIOError",
    "SparseMemError",
    "Stats",
    "StrayAccess",
    "Tmpfs",
    "UnsupportedError",
    "ViewsAliveError",
    "__version__",
    "backends",
    "format_size",
    "parse_size",
]
