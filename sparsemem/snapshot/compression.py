"""zstd, by the package `zstandard`, which is only imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsemem.errors import SnapshotError, UnsupportedError

WAYS = ("zstd",)


def check_way(compress: str | None) -> bool:
    """Whether to compress.

    Raises:
        ValueError: There is no such way.
    """
    if compress is not None and compress not in WAYS:
        raise ValueError(f"compress {compress!r} is none of {', '.join(map(repr, WAYS))}")
    return compress is not None


def _package() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedError(
            "compressed snapshots need the package zstandard: pip install 'sparsemem[zstd]'"
        ) from error
    return zstandard


def compressor() -> Callable[[Any], bytes]:
    """What makes a frame of a chunk.

    Raises:
        UnsupportedError: The package is not there.
    """
    compress: Callable[[Any], bytes] = _package().ZstdCompressor().compress
    return compress


def decompressor(most: int) -> Callable[[bytes, int], bytes]:
    """What makes a chunk of at most `most` bytes of a frame, given how long it must come to be.

    Raises:
        UnsupportedError: The package is not there.
    """
    zstandard = _package()
    context = zstandard.ZstdDecompressor(max_window_size=max(most, 1 << 10))

    def decompress(frame: bytes, length: int) -> bytes:
        try:
            # Before anything is taken for what a frame says that it holds.
            if zstandard.frame_content_size(frame) == length:
                data: bytes = context.decompress(frame, allow_extra_data=False)
                return data
        except zstandard.ZstdError:
            pass
        raise SnapshotError("has a chunk that is no zstd frame of the right length")

    return decompress
