"""What traps accesses to missing pages of one mapping, from its reservation to its end."""

from __future__ import annotations

import logging
from typing import Any

from sparsemem._sys.calls import Calls
from sparsemem._sys.files import PAGE_SIZE
from sparsemem._sys.stray import Watch
from sparsemem._sys.uffd import Purpose, Userfaultfd
from sparsemem.errors import ReserveError

_log = logging.getLogger("sparsemem")


class Trap:
    """Owns the userfaultfd of one mapping, with which the mapping is filled, too: for a range there can be only one.

    Args:
        calls: The kernel.
        page_size: Bytes of a page of the mapping.
        catch: Whether accesses are told of (`watch`) instead of killed.

    Raises:
        ReserveError: The kernel gives none.
    """

    def __init__(self, calls: Calls, page_size: int, *, catch: bool) -> None:
        self._page_size = page_size
        self._catch = catch
        self._armed: tuple[int, int] | None = None
        self._watch: Watch | None = None
        try:
            self.uffd = Userfaultfd(calls, Purpose.CATCH if catch else Purpose.TRAP, page_size)
        except OSError as error:
            raise _refused(error) from error

    def arm(self, address: int, size: int) -> None:
        """From now on what is missing in the range traps.

        Raises:
            ReserveError: The kernel refuses; somebody else's userfaultfd may have it.
        """
        try:
            self.uffd.register(address, size)
        except OSError as error:
            raise _refused(error) from error
        self._armed = (address, size)

    def watch(self, plugged: Any, shift: int, keeps: Any) -> Watch:
        """Has accesses resolved and noted from now on.

        Raises:
            OSError: There is no thread to be had.
        """
        assert self._armed is not None
        # Shared memory gets a page for it, private memory the zero page; hugetlb pages have neither.
        zero_page = self._page_size == PAGE_SIZE
        self._watch = Watch(
            self.uffd, plugged, shift, self._armed[0], self._page_size, zero_page=zero_page, keeps=keeps
        )
        self._watch.start()
        return self._watch

    def after_fork_in_child(self, *, usable: bool) -> None:
        """A child's copy of the mapping traps nothing (measured on 6.18): one that it may use is armed anew.

        Not where accesses are told of: the child has not the threads, and whoever came there would wait for ever.
        """
        if self._armed is None or not usable or self._catch:
            self.uffd.close()
            return
        try:
            self.uffd.renew()
            self.uffd.register(*self._armed)
        except OSError as error:
            self.uffd.close()
            _log.warning("stray accesses are not trapped in this child: %s", error)

    def release(self) -> None:
        """Ends it, while the memory is still mapped and cannot be somebody else's; a second time does nothing."""
        if self._watch is not None:
            self._watch.stop()  # before the descriptor that it reads can be another one
        armed, self._armed = self._armed, None
        if armed is not None:
            self.uffd.release(*armed)
        self.uffd.close()


def _refused(error: OSError) -> ReserveError:
    return ReserveError(error.errno, f"userfaultfd does not trap in the mapping: {error.strerror}")
