"""A region that comes to nothing leaves everything as it was: files, their content, budgets, descriptors, mappings."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sparsemem
from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    Budget,
    Cause,
    File,
    PopulateError,
    Region,
    ReserveError,
    SparseMemError,
)
from sparsemem.backends import Backend
from sparsemem.recipes import Step
from tests.support import accounting
from tests.support.injector import Injector

pytestmark = pytest.mark.promise("make-or-leave-nothing")

BLOCK = 64 << 10
DATA = b"precious" * 512


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sparse file of 4 blocks with data in block 1."""
    path = tmp_path / "file"
    with path.open("wb") as opened:
        opened.truncate(4 * BLOCK)
        opened.seek(BLOCK)
        opened.write(DATA)
    return path


def state(path: Path) -> tuple[int, int, bytes]:
    return path.stat().st_size, accounting.allocated_bytes(path), path.read_bytes()


# What can be wrong with a region apart from the file; each is known only after the file was opened.
WRONG: dict[str, Callable[[Backend], Region]] = {
    "thp=True with small blocks": lambda backend: Region("1M", block_size=BLOCK, backend=backend),
    "the budget": lambda backend: Region("4M", backend=backend, budget=Budget("1M"), plugged=[(1, 1)]),
}


@pytest.mark.parametrize("existing", ["error", "adopt", "discard"])
@pytest.mark.parametrize("wrong", WRONG)
def test_an_existing_file_is_neither_punched_nor_extended(existing: str, wrong: str, file: Path) -> None:
    before = state(file)
    with pytest.raises((ValueError, BackendExhaustedError, ReserveError)):
        WRONG[wrong](File(file, existing=existing, thp=True))
    assert state(file) == before


@pytest.mark.parametrize("call", ["reserve", "madvise", "name_mapping", "ftruncate"])
def test_an_existing_file_keeps_its_data_if_a_call_fails(call: str, file: Path, inject: Injector) -> None:
    before = state(file)
    inject.call(call, errno=errno.EIO)
    with pytest.raises(ReserveError) as caught:
        Region("1M", block_size=BLOCK, backend=File(file, existing="discard"))
    assert caught.value.errno == errno.EIO
    assert state(file) == before


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_was_made_for_it_goes(wrong: str, delete: bool, tmp_path: Path) -> None:
    with pytest.raises((ValueError, BackendExhaustedError)):
        WRONG[wrong](File(tmp_path / "new", delete=delete, thp=True))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call", ["madvise", "name_mapping"])
def test_the_error_is_the_first_one_and_not_that_of_cleaning_up(call: str, tmp_path: Path, inject: Injector) -> None:
    inject.call(call, errno=errno.EIO)
    with pytest.raises(ReserveError) as caught:
        Region("1M", block_size=BLOCK, backend=File(tmp_path / "new", delete=True))
    assert caught.value.errno == errno.EIO
    assert not (tmp_path / "new").exists()


def test_a_file_that_was_made_goes_if_the_blocks_that_start_plugged_cannot_be_had(
    tmp_path: Path, inject: Injector
) -> None:
    inject.step(Step.POPULATE_WRITE, errno=errno.EFAULT, after=4096)
    with pytest.raises(SparseMemError):
        Region("1M", block_size=BLOCK, backend=File(tmp_path / "new"), plugged=[(3, 4)])
    assert not (tmp_path / "new").exists()


def test_the_budget_has_its_share_back_at_once(inject: Injector) -> None:
    """While the error is still being handled, too: that is when somebody would try again with less."""
    budget = Budget("1M")
    inject.step(Step.UFFD_COPY, errno=errno.EFAULT, after=4096)
    with pytest.raises(PopulateError) as populate:
        Region("1M", block_size=BLOCK, backend=Anonymous(strategy="uffd_copy"), budget=budget, plugged=[(0, 4)])
    assert populate.value.errno == errno.EFAULT
    assert budget.used == 0
    with pytest.raises(BackendExhaustedError, match="256K is more than the 64K that are left") as caught:
        Region("1M", block_size=BLOCK, budget=Budget(BLOCK), plugged=[(0, 4)])
    assert caught.value.cause is Cause.BUDGET
    with pytest.raises(ReserveError):
        Region("1M", block_size=BLOCK, backend=File("/nonexistent/x"), budget=budget, plugged=[(0, 4)])
    assert budget.used == 0


def test_the_budget_has_its_share_back_from_a_region_that_was_never_closed() -> None:
    budget = Budget("1M")
    region = Region("1M", block_size=BLOCK, budget=budget)
    region.plug(0, 4)
    assert budget.used == 4 * BLOCK
    with pytest.warns(ResourceWarning):
        del region
        gc.collect()
    assert budget.used == 0


def test_blocks_that_are_both_found_and_named_are_adopted_once(file: Path) -> None:
    budget = Budget("1M")
    with Region(
        "1M", block_size=BLOCK, backend=File(file, existing="adopt"), plugged=[(0, 3)], budget=budget
    ) as region:
        assert list(region.plugged_runs()) == [(0, 3)]
        assert budget.used == 3 * BLOCK
        with region.view(1) as view:
            assert view[: len(DATA)] == DATA


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"budget": 7}, TypeError, "budget must be a Budget, not 7"),
        ({"budget": "1G"}, TypeError, "'1G'"),
        ({"plugged": 7}, TypeError, "int"),
        ({"plugged": [(0, 4), (3, 2)]}, sparsemem.BlockRangeError, r"run \(3, 2\) overlaps"),
        ({"name": "x" * 300}, ValueError, "name 'xxx"),
        ({"name": 7}, TypeError, "not 7"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_file_is_made(
    options: dict[str, Any], error: type[Exception], names: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=names):
        Region("1M", block_size=BLOCK, backend=File(tmp_path / "new"), **options)
    assert not (tmp_path / "new").exists()


def test_a_path_may_be_bytes(tmp_path: Path) -> None:
    backend = File(os.fsencode(tmp_path / "file"), delete=True)
    assert str(backend) == f"file:{tmp_path / 'file'},delete"
    Region("1M", block_size=BLOCK, backend=backend).close()


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("call", ["ftruncate", "filesystem", "reserve", "madvise", "name_mapping"])
def test_what_somebody_has_put_in_the_place_of_a_new_file_stays(
    call: str, delete: bool, tmp_path: Path, inject: Injector
) -> None:
    path = tmp_path / "file"

    def replace(*_: object) -> bool:
        if not path.exists():
            return False  # it is the folder that is looked at
        other = tmp_path / "other"
        other.write_bytes(b"precious")
        other.rename(path)
        return True

    inject.call(call, errno=errno.EIO, when=replace)
    with pytest.raises(ReserveError):
        Region("4M", backend=File(path, delete=delete))
    assert path.read_bytes() == b"precious"
