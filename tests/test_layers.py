"""The import rule and the length of files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "theorylab"
# a folder that is not listed is a family: layer 3
LAYERS = {"errors": -1, "runtime": 0, "core": 1, "lab": 2, "interop": 4, "cli": 4, "__main__": 5}
LONGEST = 400


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Dotted names of what a module imports from theorylab, at top level and inside functions, with the line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((node.lineno, "." * node.level + (node.module or "")))
            elif node.module == "theorylab":
                found += [(node.lineno, f"theorylab.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return [(line, name) for line, name in found if name.startswith((".", "theorylab.")) or name == "theorylab"]


def front_door(tree: ast.AST) -> list[tuple[int, str]]:
    """Uses of a public name through `import theorylab`: it would make a lower layer depend on all. `theorylab.__file__` is harmless."""
    doors = {alias.asname or "theorylab" for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names if alias.name == "theorylab" or (alias.name.startswith("theorylab.") and not alias.asname)}
    return [(node.lineno, node.attr) for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in doors and not node.attr.startswith("__")]


def violations(relative: Path, source: str) -> list[str]:
    """Imports of one file that break the rule: relative ones, the package's front door, a layer above or beside its own."""
    here = relative.parts[0].removesuffix(".py")
    if here == "__init__":
        return []                        # the front door gathers names from every layer
    tree, layer = ast.parse(source), LAYERS.get(here, 3)
    found = []
    if layer < 4:
        found += [f"{relative}:{line}: theorylab.{name} comes through the front door; import its module" for line, name in front_door(tree)]
    for line, name in imported(tree):
        there = name.split(".")[1] if name.startswith("theorylab.") else ""
        place = f"{relative}:{line}"
        if name.startswith("."):
            found.append(f"{place}: relative import {name}")
        elif there and not there.startswith("__") and there != here and LAYERS.get(there, 3) >= layer:
            found.append(f"{place}: {here} (layer {layer}) imports {there} (layer {LAYERS.get(there, 3)})")
    return found


def sources() -> list[Path]:
    """Every Python file of the project that is written by hand."""
    folders = ("theorylab", "tests", "examples", "paper_figures", "benchmarks", "docs")
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py") if not {"generated", "out"} & set(p.relative_to(ROOT).parts))


def test_no_module_imports_from_its_own_layer_or_above():
    found = [v for path in sorted(PACKAGE.rglob("*.py")) for v in violations(path.relative_to(PACKAGE), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("file", "line"), [
    ("core/kernel.py", "from theorylab.lab.rates import fit_rate"),
    ("core/kernel.py", "from theorylab import lab"),
    ("core/kernel.py", "def f():\n    import theorylab.moe.em"),
    ("lab/sweep.py", "from theorylab.acvi import ACVI"),
    ("moe/em.py", "from theorylab.acvi.problem import MatrixGame"),
    ("moe/em.py", "from theorylab.interop.optax import landing"),
    ("moe/em.py", "from .model import Mixture"),
    ("moe/em.py", "import theorylab as tl\ntl.iterate"),
    ("errors.py", "from theorylab.runtime import versions"),
])
def test_the_rule_sees_a_forbidden_import(file, line):
    assert violations(Path(file), line)


@pytest.mark.parametrize(("file", "line"), [
    ("core/kernel.py", "from theorylab.errors import ShapeError\nfrom theorylab.core.module import Module\nimport jax"),
    ("runtime.py", "from theorylab import __version__\nfrom theorylab.errors import ArgumentError"),
    ("moe/em.py", "from theorylab.moe.model import Mixture\nfrom theorylab.lab.claims import claim"),
    ("lab/files.py", "import theorylab\ntheorylab.__file__"),
    ("cli.py", "import theorylab\ntheorylab.iterate\nfrom theorylab.moe import EM"),
    ("__init__.py", "from theorylab.core.iterate import iterate"),
])
def test_the_rule_passes_an_allowed_import(file, line):
    assert not violations(Path(file), line)


def test_every_file_can_be_read_in_one_sitting():
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text(encoding="utf-8").splitlines())) >= LONGEST}
    assert not long, f"files of {LONGEST} lines or more hold two ideas: {long}"
