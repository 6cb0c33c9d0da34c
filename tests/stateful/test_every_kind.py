"""Every kind of mapping, driven at random with every operation there is; see `machine`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from sparsemem import Anonymous, Memfd, Region, Simulated
from tests.stateful.driver import SMALL
from tests.stateful.machine import RegionMachine
from tests.support import accounting
from tests.support.evidence import Cases
from tests.support.kinds import KINDS, Kind, Made, every_kind_once

pytestmark = [pytest.mark.slow, pytest.mark.promise("any-order-of-operations")]

EXAMPLES, STEPS_EACH = 18, 50


def drive(made: Made, cases: Cases, capacity: int | None = None, examples: int = EXAMPLES) -> None:
    machine = type("Machine", (RegionMachine,), {"made": made, "capacity": capacity})
    before = cases.steps
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=STEPS_EACH, deadline=None)
    )
    cases.add(cases.steps - before)


@every_kind_once
def test_a_region_of_any_kind_is_its_model(made: Made, request: pytest.FixtureRequest, cases: Cases) -> None:
    if made.kind.huge:
        request.getfixturevalue("huge_pool")(20)  # a template's own pages, its copies, and a stray one
    drive(made, cases)


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.id == name)


def test_on_a_tmpfs_that_is_too_small(tmpfs_mount: Any, cases: Cases) -> None:
    kind = _kind("tmpfs file shared")
    made = Made(kind, kind.make(tmpfs_mount(size=10 * SMALL)))
    drive(made, cases, capacity=10 * SMALL)


@pytest.mark.parametrize("name", ["hugetlbfs file shared", "hugetlbfs file private"])
def test_on_a_hugetlbfs_that_is_too_small(name: str, huge_pool: Any, hugetlbfs_mount: Any, cases: Cases) -> None:
    huge_pool(16)
    kind = _kind(name)
    drive(Made(kind, kind.make(hugetlbfs_mount(pages=5))), cases, capacity=5 << 21)


@pytest.mark.parametrize(
    "name", ["anonymous hugetlb", "memfd hugetlb shared", "memfd hugetlb private", "anonymous shared hugetlb"]
)
def test_with_a_pool_of_huge_pages_that_is_too_small(
    name: str, huge_pool: Any, kernel_setting: Any, cases: Cases
) -> None:
    huge_pool(16)
    kernel_setting(accounting.huge_pool_folder() / "nr_overcommit_hugepages", 0)
    kind = _kind(name)
    with Region("1G", backend=Anonymous(hugetlb="2M"), headroom="off") as other:
        other.plug(0, accounting.huge_pool().available - 5)
        drive(Made(kind, kind.make(Path())), cases, capacity=5 << 21)


def test_with_a_simulated_capacity_that_is_too_small(cases: Cases) -> None:
    kind = _kind("simulated")
    drive(Made(kind, Simulated(capacity=5 * kind.block_size)), cases, capacity=5 * kind.block_size)


def test_an_adopted_memfd(cases: Cases) -> None:
    fd = os.memfd_create("adopted")
    try:
        drive(Made(_kind("memfd shared"), Memfd(fd=fd)), cases)
    finally:
        os.close(fd)
