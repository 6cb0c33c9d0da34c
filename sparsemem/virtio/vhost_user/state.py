"""The state file: a device's state and its last answer, for the backend that comes after this one.

It is one line that names the format and the SHA-256 of what follows, and then JSON.
The file is replaced as a whole, so whoever reads it finds one state or the next.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from attrs import asdict, define, field, frozen

from sparsemem._sys import replace as _files
from sparsemem.errors import SparseMemError

_MAGIC = "sparsemem-vhost-user-state 1"
_MOST = 256 << 20


class StateError(SparseMemError, ValueError):
    """A state file is not what it should be: damaged, of another device, or open to others."""


@frozen
class Answer:
    """The last answer, and the request that it belongs to.

    Attributes:
        queue: On which queue.
        index: At which index of it.
        request: What tells the request from another, as `digest` makes it.
        answer: In hexadecimal digits.
    """

    queue: int
    index: int
    request: str
    answer: str


def digest(*parts: object) -> str:
    """What tells one request from another."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@define(eq=False)
class Journal:
    """The state file of one device.

    Args:
        path: Where it is.
        device_id: Whose it is.
    """

    path: str
    device_id: int
    written: int = field(init=False, default=0)

    def load(self) -> tuple[dict[str, Any], Answer | None] | None:
        """The device's state and its last answer, or None if there is no file.

        Raises:
            StateError: It is damaged, or of another device.
            OSError: It cannot be read.
        """
        try:
            content = _files.read_private(self.path, _MOST)
        except ValueError as error:
            raise StateError(str(error)) from None
        if content is None:
            return None
        head, _, body = content.partition(b"\n")
        magic, _, checksum = head.decode("ascii", "replace").rpartition(" ")
        if magic != _MAGIC:
            raise StateError(f"{self.path}: no state file of this version ({_MAGIC!r} is not how it begins)")
        if hashlib.sha256(body).hexdigest() != checksum:
            raise StateError(f"{self.path}: damaged; the checksum is wrong")
        try:
            found = json.loads(body)
            device, state, answer = found["device"], found["state"], found["answer"]
            last = None if answer is None else Answer(**answer)
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"{self.path}: not what was ever written there: {error!r}") from None
        if device != self.device_id:
            raise StateError(f"{self.path}: of a device {device}, and not {self.device_id}")
        return state, last

    def record(self, state: dict[str, Any], answer: Answer | None) -> None:
        """Replaces the file; when this returns it is on the disk.

        Raises:
            OSError: It cannot be written; what was there before still is.
        """
        found = {"device": self.device_id, "state": state, "answer": None if answer is None else asdict(answer)}
        body = json.dumps(found, sort_keys=True, separators=(",", ":")).encode()
        _files.replace(self.path, f"{_MAGIC} {hashlib.sha256(body).hexdigest()}\n".encode() + body)
        self.written += 1
