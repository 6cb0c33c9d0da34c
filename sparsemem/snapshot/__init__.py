"""Snapshots: what is plugged, and its content, in a file.

`format` is the file's bytes, `draft` a file that gets its name when it is whole, `saving` and
`restoring` copy, `tracking` knows what has changed since the last time.
`docs/snapshots.md` describes the format and what is promised.
"""

from sparsemem.snapshot.format import Snapshot
from sparsemem.snapshot.restoring import Chain, describe, opened
from sparsemem.snapshot.saving import save
from sparsemem.snapshot.tracking import Tracker

__all__ = ["Chain", "Snapshot", "Tracker", "describe", "opened", "save"]
