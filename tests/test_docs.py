"""Every example of the documents is run, and their tables are held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from sparsemem import Cause
from sparsemem.recipes import RECIPES, Kind, Step

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").glob("*.md"))]
_SHOWN = {Step.DONTNEED: "`MADV_DONTNEED`", Step.REMOVE: "`MADV_REMOVE`", Step.PUNCH: "`FALLOC_FL_PUNCH_HOLE`"}


@pytest.mark.parametrize("name", ["README.md", "docs/why-did-my-plug-fail.md"])
def test_the_examples_run(name: str) -> None:
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(ROOT / name)
    examples = list(document.examples())
    assert examples, "no example was found"
    for example in examples:
        example.evaluate()


def _rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_the_table_of_backends_is_the_recipes(kind: Kind) -> None:
    rows = {row[1]: row for row in _rows((ROOT / "README.md").read_text())}
    recipe = RECIPES[kind]
    _, _, how, fresh = rows[kind.value]
    assert how == (", ".join(_SHOWN[step] for step in recipe.discard) or "nothing: it can only grow")
    assert fresh == recipe.fresh


def test_every_cause_is_explained() -> None:
    rows = {row[0] for row in _rows((ROOT / "docs" / "why-did-my-plug-fail.md").read_text())}
    assert {f"`{cause.name}`" for cause in Cause} <= rows


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
