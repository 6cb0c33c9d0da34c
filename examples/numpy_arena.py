"""numpy arrays in a region: memory that is surely there, given back when no array uses it any more."""

from __future__ import annotations

import gc
import sys

from sparsemem import Region, ViewsAliveError, format_size

try:
    import numpy as np
except ImportError:
    print("this example needs numpy")
    sys.exit(0)


class Arena:
    """Hands out arrays, each on blocks of its own."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def zeros(self, shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
        """A zeroed array; MemoryError (and nothing changed) if there is no memory for it."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        count = -(-size // self.region.block_size)
        first = self.region.plug_fit(count, fit="best")
        if first is None:
            raise MemoryError(f"no {count} blocks in a row")
        # A plugged block reads zero: nothing has to be cleared.
        array: np.ndarray = np.frombuffer(self.region.view(first, count)[:size], dtype=dtype).reshape(shape)
        return array

    def trim(self) -> int:
        """Gives the blocks back that no array uses any more; bytes."""
        freed = 0
        for first, count in list(self.region.plugged_runs()):
            for block in range(first, first + count):
                try:
                    freed += self.region.unplug(block)
                except ViewsAliveError:
                    continue  # an array, or a slice of one, still lives here
        return freed * self.region.block_size


def main() -> None:
    with Region("16G", block_size="2M") as region:
        arena = Arena(region)
        a = arena.zeros((1000, 1000))
        b = arena.zeros((500, 500), "float32")
        a += 1.5
        b[:] = np.arange(500, dtype="float32")
        print(f"two arrays: {format_size(region.plugged_size)} plugged of {format_size(region.size)}")
        assert float(a.sum()) == 1.5e6
        column = b[:, 7]  # a slice keeps its blocks, whoever else lets go
        del a, b
        gc.collect()
        print(f"one array dropped, one sliced: {format_size(arena.trim())} given back")
        assert float(column.sum()) == 7 * 500
        assert region.plugged_size == 2 << 20
        again = arena.zeros((1000, 1000))
        assert not again.any(), "memory used before reads zero"
        try:
            arena.zeros((1 << 40,))
        except MemoryError as error:
            print(f"too much: {error}")
        del column, again
        gc.collect()
        arena.trim()
        assert region.plugged_size == 0
    print("no array is left, and no memory")


if __name__ == "__main__":
    main()
