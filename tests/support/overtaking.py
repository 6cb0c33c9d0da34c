"""What happens between the look of one thread and its claim, without a second thread: in that very moment."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparsemem.blocks import Claim, Want

Overtake = Callable[[Callable[[], object]], None]


@pytest.fixture
def overtake(monkeypatch: pytest.MonkeyPatch) -> Overtake:
    """Has something happen while the next one who wants the whole region (a close, say) still waits for it."""

    def overtake(happens: Callable[[], object]) -> None:
        class Waiting(Claim):
            def take(self, want: Want, strict: bool = True, look: Callable[[], object] | None = None) -> None:
                monkeypatch.undo()
                happens()
                super().take(want, strict, look)

        monkeypatch.setattr("sparsemem.operations.whole.Claim", Waiting)

    return overtake
