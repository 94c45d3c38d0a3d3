"""The documentation is complete: every public name has a place and words, every page is reachable."""

from __future__ import annotations

import inspect
import re

import pytest

from docs import gallery, inventory, runner

ROOT = runner.ROOT
PACKAGES = ["theorylab", *(f"theorylab.{family}" for family in inventory.families())]


@pytest.fixture(scope="module")
def pages():
    """Text of every API page by file stem."""
    return {stem: inventory.page(title, rows, stem) for stem, (title, rows) in inventory.pages().items()}


@pytest.fixture(scope="module")
def nav():
    """Files that the navigation names."""
    return re.findall(r"([\w/.-]+\.md)\s*$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_an_api_page(package, pages):
    everywhere = "\n".join(pages.values())
    missing = [e.public for e in inventory.entries(package) if f"### {e.name} {{ #{e.public} }}" not in everywhere]
    assert not missing, f"{missing} are on no API page: see PAGES in docs/inventory.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package):
    missing = [e.public for e in inventory.entries(package) if e.documented and not inspect.getdoc(e.thing)]
    assert not missing


def test_every_api_page_is_in_the_navigation(pages, nav):
    missing = {f"generated/api/{stem}.md" for stem in pages} - set(nav)
    assert not missing, f"{missing} are not in the nav of mkdocs.yml"


def test_every_example_and_every_page_is_in_the_navigation(nav):
    examples = {f"generated/examples/{p.stem}.md" for p in (ROOT / "examples").glob("[!_]*.py")}
    by_hand = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    missing = examples | {p for p in by_hand if not p.startswith(("generated/", "assets/"))}
    assert not missing - set(nav), f"{missing - set(nav)} are not in the nav of mkdocs.yml"


def test_the_navigation_names_only_what_exists_or_is_generated(pages, nav):
    made = {f"generated/api/{stem}.md" for stem in pages} | {f"generated/{n}.md" for n in ("figures", "claims", "derivations", "examples/index")}
    made |= {f"generated/examples/{p.stem}.md" for p in (ROOT / "examples").glob("[!_]*.py")}
    assert not [n for n in nav if n not in made and not (ROOT / "docs" / n).is_file()]


def test_a_signature_is_written_as_one_would_type_it():
    def short(a: int, *, b: float = 0.5) -> str: ...
    def long(first_argument: int, second_argument: str = "x", *rest: float, third_argument: bool = False, **options: object) -> None: ...

    assert inventory.signature(short, "short") == "short(a: int, *, b: float = 0.5) -> str"
    assert inventory.signature(long, "long").splitlines() == [
        "long(", "    first_argument: int,", "    second_argument: str = 'x',", "    *rest: float,", "    third_argument: bool = False,",
        "    **options: object,", ") -> None"]


def test_mathematics_with_bars_does_not_end_a_cell_of_a_table():
    assert gallery.text_in_table(r"error $|x|$ and $\|y\|$") == r"error $\vert x\vert $ and $\Vert y\Vert $"
    assert gallery.text_in_table("a | b\nc") == r"a \| b c"


def test_the_claims_page_states_every_registered_claim():
    from theorylab.lab import claims

    text = gallery.claims(ROOT)
    assert all(f"### {name} " in text for name in claims.registered())
