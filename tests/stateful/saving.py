"""Rules that save the region to a file, and restore it on other memory."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from sparsemem import (
    Anonymous,
    BlockStateError,
    Memfd,
    Region,
    Snapshot,
    SnapshotIOError,
    UnsupportedError,
    snapshot,
)
from tests.stateful.trouble import Trouble

_OLD = b"what had the name before"
_ELSEWHERE = [Anonymous(), Anonymous(shared=True), Memfd(), Memfd(shared=False)]
_CALLS = ["open", "open_in", "stat_in", "fstat", "ftruncate", "pwrite", "fsync", "link_in", "rename_in"]
"""Not lseek: where nobody can tell what has memory, a save looks at all that is plugged."""
_LOOKED_AT = ("anonymous shared hugetlb", "hugetlbfs file template")
"""Kinds of which nobody can tell which discarded pages have no memory."""

compressions = st.sampled_from([None, None, "zstd"])


class Saving(Trouble):
    """What a file holds of it."""

    @contextlib.contextmanager
    def _path(self) -> Iterator[Path]:
        """Where a snapshot goes; in memory if possible, for a save waits for its disk."""
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="sparsemem-test-", dir=memory) as folder:
            path = Path(folder, "snapshot")
            yield path
            assert os.listdir(folder) in ([], [path.name])

    @property
    def _why_not(self) -> tuple[type[Exception], str] | None:
        """The refusal that a save gets."""
        if not self.made.kind.has_memory:
            return UnsupportedError, "no memory that could be saved"
        if not self.made.kind.discards:
            return UnsupportedError, "secret memory"
        if self.model.tainted & self.model.plugged.keys():
            return BlockStateError, "tainted"
        return None

    def _readable(self) -> bool:
        """What a save would populate by looking at it has its memory beforehand, if there is so much."""
        if self.made.kind.id in _LOOKED_AT:
            cells = self.model.discarded
            if not self._has_memory_for(cells):
                return False
            for block in {block for block, _ in cells}:
                self.region.populate(block * self.block, self.block)
            cells.clear()
        return True

    def _save(self, path: Path, compress: str | None) -> Snapshot:
        with self._kernel():
            return self.region.save(path, compress=compress)

    @rule(compress=compressions, where=st.sampled_from(_ELSEWHERE), lazy=st.booleans())
    def save_and_restore(self, compress: str | None, where: Any, lazy: bool) -> None:
        with self._path() as path:
            if (refusal := self._why_not) is not None:
                with pytest.raises(refusal[0], match=refusal[1]):
                    self._save(path, compress)
                assert not path.exists()
                return
            if not self._readable():
                return
            told = self._save(path, compress)
            assert (told.size, told.block_size) == (self.region.size, self.region.block_size)
            self._is_saved(path, told)
            self._restores(path, lazy=True) if lazy and compress is None else self._restores(path, backend=where)

    @precondition(lambda self: self.injector is not None and self._why_not is None)
    @rule(
        call=st.sampled_from([*_CALLS, "READ", "WRITE"]),
        code=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EACCES]),
        nth=st.integers(1, 4),
        compress=compressions,
        where=st.sampled_from(_ELSEWHERE),
    )
    def a_save_fails(self, call: str, code: int, nth: int, compress: str | None, where: Any) -> None:
        """Or does not, as it makes fewer such calls: what has the name is the old file or the new one, whole."""
        assert self.injector is not None
        if not self._readable():
            return
        with self._path() as path:
            path.write_bytes(_OLD)
            if call in _CALLS:
                self.injector.call(call, errno=code, nth=nth)
            else:
                self.injector.copy(call, errno=code, nth=nth)
            failed = None
            try:
                told = self._save(path, compress)
            except SnapshotIOError as error:
                failed = error
            self._clear_faults()
            if failed is None:
                self._is_saved(path, told)
            else:
                assert failed.errno == code
                # The last call of all makes the new name last.
                if (call, nth) != ("fsync", 2):
                    assert path.read_bytes() == _OLD
                    return
            self._restores(path, backend=where)

    def _is_saved(self, path: Path, told: Snapshot) -> None:
        assert snapshot.describe(path) == told
        assert path.stat().st_mode & 0o777 == 0o600

    def _restores(self, path: Path, **how: Any) -> None:
        """On other memory the region is as the model says: the blocks, what they hold, and nothing else."""
        model = self.model
        with Region.restore(path, **how) as other:
            assert (other.size, other.block_size) == (self.region.size, self.region.block_size)
            assert self._blocks(other.plugged_runs()) == model.plugged.keys()
            assert not list(other.tainted_runs())
            for block, cells in model.plugged.items():
                with other.view(block) as view:
                    self._check_cells(view, cells, set())
            assert other.audit().ok
