"""What the kernel tells about NUMA nodes: which there are, their processors, their memory."""

from __future__ import annotations

from sparsemem._sys.files import KernelFiles

NODES = "/sys/devices/system/node"


def online_nodes(files: KernelFiles) -> list[int]:
    """The nodes that are there, ascending; [] on a kernel without NUMA."""
    return _listed(files.whole_text(f"{NODES}/online"))


def processors(files: KernelFiles, node: int) -> frozenset[int]:
    """The processors of a node; some nodes are memory alone."""
    return frozenset(_listed(files.whole_text(f"{NODES}/node{node}/cpulist")))


def meminfo(node: int) -> str:
    """Where a node's memory is told."""
    return f"{NODES}/node{node}/meminfo"


def available(files: KernelFiles, node: int) -> int | None:
    """Bytes that a node can still give: what is free, and page cache that is not in use; None if nobody tells."""
    # Lines as `Node 0 MemFree:  7948356 kB`.
    lines = (line.split() for line in (files.text(meminfo(node)) or "").splitlines())
    fields = {words[2]: int(words[3]) << 10 for words in lines if len(words) == 5}
    free = fields.get("MemFree:")
    return None if free is None else free + fields.get("Inactive(file):", 0)


def free_huge_pages(files: KernelFiles, node: int, page_size: int) -> int | None:
    """Bytes of free hugetlb pages of that size on a node."""
    free = files.number(f"{NODES}/node{node}/hugepages/hugepages-{page_size // 1024}kB/free_hugepages")
    return None if free is None else free * page_size


def _listed(text: str) -> list[int]:
    """The numbers of a list such as `0-3,8`."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers += range(int(first), int(last or first) + 1)
    return numbers
