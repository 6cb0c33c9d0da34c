"""Builds the shim, `sparsemem._sys._shim`, with cffi in API mode.

The declarations are the C header itself, so that the two cannot drift apart;
constants take the value of the machine that compiles.
"""

from pathlib import Path

from cffi import FFI

SHIM = Path(__file__).parent / "shim"
SOURCES = (
    "bits.c",
    "blocks.c",
    "engine.c",
    "steps.c",
    "quick.c",
    "uffd.c",
    "stray.c",
    "shared.c",
    "snapshot.c",
    "calls.c",
)

# name -> fallback where an older header lacks it (None: every header has it)
CONSTANTS: dict[str, str | None] = {
    "MAP_PRIVATE": None,
    "MAP_SHARED": None,
    "MAP_ANONYMOUS": None,
    "MAP_NORESERVE": None,
    "MAP_HUGETLB": None,
    "MAP_HUGE_SHIFT": "26",
    "MFD_CLOEXEC": None,
    "MFD_ALLOW_SEALING": None,
    "MFD_HUGETLB": "0x0004U",
    "MFD_NOEXEC_SEAL": "0x0008U",
    "MADV_DONTNEED": None,
    "MADV_REMOVE": None,
    "MADV_DONTFORK": None,
    "MADV_WIPEONFORK": "18",
    "MADV_DONTDUMP": None,
    "MADV_HUGEPAGE": None,
    "MADV_NOHUGEPAGE": None,
    "MADV_POPULATE_READ": "22",
    "MADV_COLD": "20",
    "MADV_PAGEOUT": "21",
    "MADV_COLLAPSE": "25",
    "MADV_POPULATE_WRITE": "23",
    "MADV_GUARD_INSTALL": "102",
    "MADV_GUARD_REMOVE": "103",
    "PROT_NONE": None,
    "FALLOC_FL_KEEP_SIZE": None,
    "FALLOC_FL_PUNCH_HOLE": None,
    "F_SEAL_SEAL": None,
    "F_SEAL_SHRINK": None,
    "F_SEAL_GROW": None,
    "F_SEAL_WRITE": None,
    "F_SEAL_FUTURE_WRITE": "0x0010",
    "F_ADD_SEALS": None,
    "F_GET_SEALS": None,
    "HUGETLBFS_MAGIC": None,
    "TMPFS_MAGIC": None,
}

_fallbacks = "".join(f"#ifndef {name}\n#define {name} {value}\n#endif\n" for name, value in CONSTANTS.items() if value)

ffibuilder = FFI()
ffibuilder.cdef((SHIM / "shim.h").read_text())
ffibuilder.cdef("".join(f"#define {name} ...\n" for name in CONSTANTS))
ffibuilder.set_source(
    "sparsemem._sys._shim",
    f"""
    #include <stddef.h>
    #include <stdint.h>
    #include <fcntl.h>
    #include <sys/mman.h>
    #include <linux/falloc.h>
    #include <linux/magic.h>
    #include "shim.h"
    {_fallbacks}
    """,
    sources=[f"sparsemem/_sys/shim/{name}" for name in SOURCES],
    include_dirs=["sparsemem/_sys/shim"],
    depends=[f"sparsemem/_sys/shim/{name}" for name in ("shim.h", "internal.h")],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
    # glibc before 2.34 keeps pthread in a library of its own
    libraries=["pthread"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
