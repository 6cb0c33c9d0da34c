"""A region owns memory, so there is one of it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest

from sparsemem import Region

BLOCK = 64 << 10


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda how: how.__name__)
def test_a_region_is_not_copied(how: Callable[[Region], object]) -> None:
    """The end of a shallow copy would unmap the memory under the original."""
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            how(region)
        gc.collect()
        with region.view(0) as view:
            assert not any(view)
