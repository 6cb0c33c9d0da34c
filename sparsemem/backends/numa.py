"""Memory from one NUMA node."""

from __future__ import annotations

import errno
from typing import Any

from sparsemem._sys.calls import Calls
from sparsemem._sys.files import shared_files
from sparsemem._sys.numa import online_nodes, processors
from sparsemem.errors import ReserveError, UnsupportedError
from sparsemem.recipes import Kind
from sparsemem.runs import index_of


def check_node(_: object, attribute: Any, value: object) -> None:
    """An attrs validator for a NUMA node of this machine, or None for no matter which.

    Raises:
        TypeError: Not an integer.
        ValueError: There is no such node; says which there are.
        UnsupportedError: The kernel knows no nodes.
    """
    if value is None:
        return
    node, online = index_of(value, "numa_node"), online_nodes(shared_files())
    if not online:
        raise UnsupportedError(f"numa_node={node}: this kernel has no NUMA")
    if node not in online:
        raise ValueError(f"numa_node {node} is not online: this machine has {', '.join(map(str, online))}")


def bind(calls: Calls, kind: Kind, address: int, size: int, node: int | None) -> frozenset[int]:
    """Binds a new mapping to a node, if there is one; the processors that are near it.

    All of it at once, for a part would become a mapping of its own.

    Raises:
        UnsupportedError: Such memory follows no policy, or the kernel knows no nodes.
        ReserveError: The kernel refused.
    """
    if node is None:
        return frozenset()
    if kind is Kind.DISK_SHARED:
        # mbind(2): of files on disks only private copies follow the policy of a mapping.
        raise UnsupportedError(f"numa_node={node}: the page cache of a disk file takes memory from any node")
    try:
        calls.bind(address, size, node)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise UnsupportedError(f"numa_node={node}: this kernel has no NUMA") from error
        hint = {
            errno.EINVAL: "; it has no memory, or the process's cpuset does not allow it",
            errno.EPERM: "; containers often forbid mbind(2) to those without CAP_SYS_NICE",
        }.get(error.errno or 0, "")
        raise ReserveError(
            error.errno, f"cannot bind the mapping to NUMA node {node}: {error.strerror}{hint}"
        ) from error
    return processors(shared_files(), node)
