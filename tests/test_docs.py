"""Every example of the documents is run, and what they list is held against the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import sparsemem
from sparsemem import Cause, Region, SparseMemError, UnsupportedError
from sparsemem.backends import Anonymous, Backend, File, Memfd, Secret, from_text
from sparsemem.cli.main import build_parser
from sparsemem.recipes import RECIPES, Kind, Step

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
WHY = ROOT / "docs" / "why-did-my-plug-fail.md"
DOCUMENTS = [README, ROOT / "DESIGN.md", *sorted((ROOT / "docs").glob("*.md"))]
# reliability.md is made of the tests and has no examples.
EXECUTED = [README, *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "reliability.md")]
SHOWN = {Step.DONTNEED: "`MADV_DONTNEED`", Step.REMOVE: "`MADV_REMOVE`", Step.PUNCH: "`FALLOC_FL_PUNCH_HOLE`"}


def rows(document: Path) -> list[list[str]]:
    """The cells of all tables."""
    lines = (line for line in document.read_text().splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.name)
def test_the_examples_run(path: Path) -> None:
    examples = list(Sybil(parsers=[PythonCodeBlockParser()]).parse(path).examples())
    assert len(examples) == path.read_text().count("```python"), "an example was not found"
    assert examples
    missing = []
    for example in examples:
        try:
            example.evaluate()
        except UnsupportedError as error:
            missing.append(str(error))
    if missing:
        pytest.skip(f"needs more than this kernel has: {'; '.join(missing)}")


def test_an_example_that_is_wrong_fails(tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    document.write_text("```python\nassert 1 == 2\n```\n")
    (example,) = Sybil(parsers=[PythonCodeBlockParser()]).parse(document).examples()
    with pytest.raises(AssertionError):
        example.evaluate()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#?)([^)]*)\)", path.read_text()):
        if not target.startswith("http"):
            page = path.parent / target if target else path
            assert page.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
                assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


# ---- backends -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_the_table_of_backends_is_the_recipes(kind: Kind) -> None:
    recipe = RECIPES[kind]
    _, _, how, fresh = {row[1]: row for row in rows(README) if len(row) == 4}[kind.value]
    assert how == (", ".join(SHOWN[step] for step in recipe.discard) or "nothing: it can only grow")
    assert fresh == recipe.fresh


MADE = [
    (Kind.ANONYMOUS_PRIVATE, "Anonymous()"),
    (Kind.ANONYMOUS_SHARED, "Anonymous(shared=True)"),
    (Kind.ANONYMOUS_HUGETLB, 'Anonymous(hugetlb="2M")'),
    (Kind.ANONYMOUS_HUGETLB_SHARED, 'Anonymous(shared=True, hugetlb="2M")'),
    (Kind.SHMEM_SHARED, "Memfd()"),
    (Kind.SHMEM_PRIVATE, "Memfd(shared=False)"),
    (Kind.HUGETLB_SHARED, "Memfd(hugetlb=True)"),
    (Kind.HUGETLB_PRIVATE, "Memfd(hugetlb=True, shared=False)"),
    (Kind.SECRET, "Secret()"),
]


@pytest.mark.parametrize(("kind", "text"), MADE, ids=[text for _, text in MADE])
def test_what_the_table_writes_makes_what_it_says(kind: Kind, text: str) -> None:
    first = next(row[0] for row in rows(README) if len(row) == 4 and row[1] == kind.value)
    assert f"`{text}`" in first
    names: dict[str, Any] = {"Anonymous": Anonymous, "Memfd": Memfd, "Secret": Secret}
    try:
        backend: Backend = eval(text, names)
        with Region("2M", backend=backend) as region:
            assert region._mapping.kind is kind  # type: ignore[attr-defined]
            assert region.fresh == RECIPES[kind].fresh
    except (sparsemem.UnsupportedError, sparsemem.ReserveError) as error:
        pytest.skip(f"needs a kernel with {kind.value}: {error}")


def test_the_text_forms_that_are_shown_are_backends() -> None:
    texts = re.findall(r"`((?:memfd|file|anonymous):[^`]+)`", README.read_text())
    assert len(texts) >= 2
    assert {type(from_text(text)) for text in texts} == {Memfd, File}


# ---- causes and errors ----------------------------------------------------------------------


@pytest.mark.parametrize("cause", Cause, ids=lambda cause: cause.name)
def test_every_cause_is_explained(cause: Cause) -> None:
    assert any(row[0] == f"[`{cause.name}`](#{cause.name.lower()})" for row in rows(WHY))
    section = re.search(rf"^## {cause.name}\n\n(.*?)(?=^## )", WHY.read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    told = " ".join(section[1].split())
    assert told.startswith(f"*{cause.value[0].upper()}{cause.value[1:]}.*"), "it can be found by the message's words"
    assert len(told) > len(cause.value) + 40


def test_the_causes_of_exhaustion_come_first() -> None:
    named = [match[1] for row in rows(WHY) if (match := re.match(r"\[`([A-Z_]+)`\]", row[0]))]
    assert named == [cause.name for cause in Cause]
    assert [Cause[name].exhausted for name in named] == [True] * 10 + [False] * (len(named) - 10)


def test_every_error_is_explained() -> None:
    errors = {
        name: getattr(sparsemem, name)
        for name in sparsemem.__all__
        if name.endswith("Error") and getattr(sparsemem, name) is not SparseMemError
    }
    table = {row[0].strip("`"): row for row in rows(README) if row[0].endswith("Error`")}
    assert set(table) == set(errors)
    for name, row in table.items():
        bases = {base.__name__ for base in errors[name].__mro__}
        assert set(re.findall(r"`(\w+)`", row[1])) <= bases, name


# ---- commands --------------------------------------------------------------------------------


def test_the_commands_that_are_shown_exist() -> None:
    lines = [
        line for path in EXECUTED for line in re.findall(r"^\$ sparsemem ([^#\n]*)", path.read_text(), re.MULTILINE)
    ]
    assert {line.split()[0] for line in lines} == {"probe", "demo", "bench", "vhost-user", "ctl"}
    for line in lines:
        build_parser().parse_args(line.split())
    targets = re.findall(r"^\$ make (\w+)", README.read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_example_file_is_listed() -> None:
    listed = {row[0].strip("`") for row in rows(README) if row[0].endswith(".py`")}
    assert listed == {path.name for path in (ROOT / "examples").glob("*.py")}
