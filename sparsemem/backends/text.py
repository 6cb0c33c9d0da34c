"""Backends as text, for the command line: `memfd:hugetlb=2M,private`."""

from __future__ import annotations

import re
from typing import Any


def options_text(name: str, options: dict[str, Any], path: str | None = None) -> str:
    """`name:path,flag,key=value`; options that are None or False are left out.

    False is written out only for options that default to something else, which
    come as `None` when they are at their default.
    """
    words = [] if path is None else [_escaped(path if path[:1] in ("/", ".") else f"path={path}")]
    for key, value in options.items():
        if value is True:
            words.append(key)
        elif value is False and key in ("thp", "seal"):
            words.append(f"{key}=off")
        elif value is not None and value is not False:
            words.append(f"{key}={value}")
    return name + (":" + ",".join(words) if words else "")


def _escaped(word: str) -> str:
    return re.sub(r"[\\,]", r"\\\g<0>", word)


_SWITCHES = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def split_options(text: str) -> tuple[str, str | None, dict[str, Any]]:
    r"""The name, the path (a leading word that begins with / or .), and the options.

    A comma within a word is written as `\,` and a backslash as `\\`.

    Raises:
        ValueError: An empty word or an option given twice.
    """
    name, _, rest = text.partition(":")
    path, options = None, dict[str, Any]()
    for i, raw in enumerate(re.findall(r"(?:^|,)((?:\\.?|[^,\\])*)", rest, re.DOTALL) if rest else ()):
        word = re.sub(r"\\(.)", r"\1", raw, flags=re.DOTALL)
        key, equals, value = word.partition("=")
        if i == 0 and word[:1] in ("/", "."):
            path = word
            continue
        key = key.strip()
        if not key or key in options:
            raise ValueError(f"backend {text!r}: option {word!r} is empty or given twice")
        known = {} if key == "path" else _SWITCHES
        options[key] = known.get(value.lower(), value) if equals else True
    return name.strip(), path, options
