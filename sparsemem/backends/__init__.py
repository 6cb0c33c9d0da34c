"""Where memory comes from: one class for each way to obtain it."""

from __future__ import annotations

from typing import Any

import attrs

from sparsemem.backends.anonymous import Anonymous
from sparsemem.backends.base import Backend, Limit, Mapping, Request
from sparsemem.backends.file import File
from sparsemem.backends.memfd import Memfd
from sparsemem.backends.secret import Secret
from sparsemem.backends.simulated import Fault, Simulated
from sparsemem.backends.text import split_options
from sparsemem.backends.tmpfs import Tmpfs

__all__ = [
    "Anonymous",
    "Backend",
    "Fault",
    "File",
    "Limit",
    "Mapping",
    "Memfd",
    "Request",
    "Secret",
    "Simulated",
    "Tmpfs",
    "from_text",
]

_BY_NAME: dict[str, type[Any]] = {
    "anonymous": Anonymous,
    "memfd": Memfd,
    "file": File,
    "secret": Secret,
    "simulated": Simulated,
    "tmpfs": Tmpfs,
}


def from_text(text: str) -> Backend:
    r"""A backend from its text form; `str(backend)` is the inverse.

    Args:
        text: A name, then after a colon a path (`file` only) and options, with
            commas between: `anonymous`, `memfd:hugetlb=2M,private`,
            `file:/dev/shm/x,existing=adopt`, `simulated:capacity=1P`.  A path that
            begins with neither / nor . is `path=x`; a comma in it is `\,`.
            Faults and latencies of `Simulated` have no text form.

    Raises:
        ValueError: No such backend or option, or a value that does not fit.
    """
    name, path, options = split_options(text)
    make = _BY_NAME.get(name)
    if make is None:
        raise ValueError(f"backend {text!r}: {name!r} is none of {', '.join(_BY_NAME)}")
    known = {field.alias: field for field in attrs.fields(make) if field.init}
    if "shared" in known:
        known["private"] = known["shared"]
    if options.get("path") is True:
        raise ValueError(f"backend {text!r}: path is where the file is: path=name")
    for option, value in options.items():
        if option not in known or option in ("faults", "latency") or (option == "path" and path is not None):
            raise ValueError(f"backend {text!r}: {name} has no option {option!r}")
        if option in ("fd", "numa_node"):
            options[option] = _number(text, option, value)
    if "private" in options:
        options["shared"] = not _switch(text, "private", options.pop("private"))
    for option in ("shared", "seal", "thp", "delete", "follow_symlinks"):
        if option in options:
            _switch(text, option, options[option])
    backend: Backend = make(*([] if path is None else [path]), **options)
    return backend


def _switch(text: str, option: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"backend {text!r}: {option} is on or off, not {value!r}")
    return value


def _number(text: str, option: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"backend {text!r}: {option}={value!r} is not a number") from None
