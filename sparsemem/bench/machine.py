"""What the benchmark ran on, as labels and texts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import sparsemem
from sparsemem._sys import files
from sparsemem.bench.lab import Lab
from sparsemem.units import format_size


def describe(lab: Lab) -> Mapping[str, str]:
    """Kernel, processors, memory and huge pages, and the software that was used."""
    texts = files.shared_files()
    thp = files.thp_size(texts)
    pools = {size: files.huge_pool(texts, size) for size in files.huge_page_sizes(texts)}
    return {
        "sparsemem": sparsemem.__version__,
        "Kernel": f"Linux {platform.release()} {platform.machine()}",
        "Processor": _field(texts, "/proc/cpuinfo", "model name") or platform.machine(),
        "Virtual machine": "yes"
        if "hypervisor" in _field(texts, "/proc/cpuinfo", "flags").split()
        else "not known to be",
        "Processors used": f"{lab.processors} of {os.cpu_count()}",
        "Memory": format_size(os.sysconf("SC_PHYS_PAGES") * files.PAGE_SIZE),
        "Transparent huge pages": f"{format_size(thp)}, mode {files.thp_mode(texts)}" if thp else "none",
        "Transparent huge pages of shared memory": _chosen(texts.text(f"{files.THP}/shmem_enabled")),
        **{
            f"Huge pages of {format_size(size)}": f"{pool.free} of {pool.total} free"
            for size, pool in pools.items()
            if pool is not None and pool.total
        },
        "Python": platform.python_version(),
        "User": "root" if os.geteuid() == 0 else "not root",
    }


def _field(texts: files.KernelFiles, path: str, name: str) -> str:
    """The first line `name : value`."""
    for line in texts.whole_text(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _chosen(text: str | None) -> str:
    """The word in brackets."""
    return (text or "").partition("[")[2].partition("]")[0] or "unknown"
