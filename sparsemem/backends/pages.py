"""Which page size `hugetlb=` means, and which block size goes with it."""

from __future__ import annotations

from sparsemem._sys.files import PAGE_SIZE, default_huge_page, huge_page_sizes, shared_files, thp_size
from sparsemem.errors import UnsupportedError
from sparsemem.units import Size, exact_size, parse_size


def resolve_page_size(hugetlb: bool | Size | None) -> int:
    """Bytes of a page for a `hugetlb=` option: None or False, True, or a size.

    Raises:
        UnsupportedError: The machine has no huge pages, or none of that size.
    """
    if hugetlb is None or hugetlb is False:
        return PAGE_SIZE
    files = shared_files()
    sizes, default = huge_page_sizes(files), default_huge_page(files)
    size = default if hugetlb is True else parse_size(hugetlb, "hugetlb")
    if size is None or size not in sizes:
        known = ", ".join(map(exact_size, sizes)) or "none"
        wanted = "huge pages" if size is None else f"huge pages of {exact_size(size)}"
        raise UnsupportedError(f"hugetlb={hugetlb!r}: this machine has no {wanted}; it has {known}")
    return size


def block_size_for(page_size: int) -> int:
    """The default block: 2 MiB, the transparent huge page or the backend's page, whichever is largest."""
    return max(2 << 20, thp_size(shared_files()) or 0, page_size)


def huge_text(hugetlb: bool | Size | None, page_size: int) -> str | None:
    """The `hugetlb=` option as text, or None if it is off."""
    return None if hugetlb is None or hugetlb is False else exact_size(page_size)
