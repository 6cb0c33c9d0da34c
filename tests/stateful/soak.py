"""The state machine for as long as told: `make soak SECONDS=3600`, with what it takes to replay a failure.

Not collected by itself. Each kind of mapping in turn gets some examples with a seed of its own, which is told first:
SEED=n begins with the same, ARGS="-k memfd" picks kinds.
"""

from __future__ import annotations

import os
import random
import time

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.stateful.machine import RegionMachine
from tests.support.evidence import STEPS
from tests.support.kinds import Made, every_kind_once

TOTAL = float(os.environ.get("SPARSEMEM_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("SPARSEMEM_SOAK_SEED") or random.SystemRandom().randrange(1 << 32))


@pytest.mark.timeout(0)
@every_kind_once
def test_soak(made: Made, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    """One kind for its share of the time."""
    if made.kind.huge:
        request.getfixturevalue("huge_pool")(20)
    # Each kind gets an equal share of the time.
    share = TOTAL / sum(item.name.startswith("test_soak") for item in request.session.items)
    until, number = time.monotonic() + share, SEED
    steps = STEPS.total()
    while True:
        machine = seed(number)(type("Machine", (RegionMachine,), {"made": made}))
        try:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=40,
                    stateful_step_count=80,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        except BaseException:
            with capsys.disabled():
                print(f"\nto replay: make soak SEED={number} SECONDS=60 ARGS='-k \"{made.kind.id}\"'")
            raise
        if time.monotonic() >= until:
            break
        number += 1
    with capsys.disabled():
        print(f"\n{made.kind.id}: {STEPS.total() - steps} steps, seeds {SEED} to {number}")
