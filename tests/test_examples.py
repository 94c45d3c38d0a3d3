"""Everything that is shown runs: the examples, the Python blocks of README and of the hand-written pages, the examples in docstrings."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import re
import sys
import textwrap
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from docs import runner

ROOT = runner.ROOT
EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))
TEXTS = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if not {"generated", "assets"} & set(p.relative_to(ROOT).parts))]
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
DECIMAL = re.compile(r"-?\d+\.\d*(?:e[-+]?\d+)?")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a Markdown text with the line each begins on."""
    return [(text[: m.start(2)].count("\n") + 1, textwrap.dedent(m[2])) for m in BLOCK.finditer(text)]


def docstrings() -> list[tuple[str, str, int]]:
    """Module, qualified name and line of every docstring in the package that holds an example. Reads the sources; imports nothing."""
    found = []

    def visit(node: ast.AST, module: str, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                visit(child, module, f"{name}.{child.name}" if name else child.name)
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ">>>" in (ast.get_docstring(node) or ""):
            found.append((module, name, node.body[0].lineno))

    for path in sorted((ROOT / "theorylab").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        visit(ast.parse(path.read_text(encoding="utf-8")), ".".join(parts[:-1] if parts[-1] == "__init__" else parts), "")
    return found


class UpToRoundOff(doctest.OutputChecker):
    """Numbers with a decimal point may differ by round-off, which depends on the processor; everything else must be equal."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if super().check_output(want, got, optionflags):
            return True
        same_words = super().check_output(DECIMAL.sub("#", want), DECIMAL.sub("#", got), optionflags)
        wanted, found = ([float(number) for number in DECIMAL.findall(text)] for text in (want, got))
        return same_words and len(wanted) == len(found) and np.allclose(found, wanted, rtol=1e-12, atol=1e-12)


def run_docstring(text: str, name: str, space: dict) -> str:
    """What doctest has to say against the examples in a docstring."""
    test = doctest.DocTestParser().get_doctest(text, space, name, None, None)
    report = io.StringIO()
    doctest.DocTestRunner(UpToRoundOff(), optionflags=FLAGS, verbose=False).run(test, out=report.write)
    return report.getvalue()


# One short script of each family; the documentation build runs them all.
SHORT = {"transformer_pde_collapse", "acvi_own_game", "stiefel_layer", "hypergradient_cleaning", "moe_regimes"}


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=() if p.stem in SHORT else pytest.mark.slow) for p in EXAMPLES])
def test_the_example_runs(path):
    cells = runner.run(path, fresh=True)        # the outputs stay for the documentation
    assert any(cell.outputs for cell in cells), "an example shows something"


def as_parameter(path: Path) -> object:
    """A page as a parameter; the guides take ten to forty seconds each."""
    return pytest.param(path, id=path.relative_to(ROOT).as_posix(), marks=pytest.mark.slow if path.parent.name == "guide" else ())


@pytest.mark.parametrize("path", [as_parameter(p) for p in TEXTS if blocks(p.read_text(encoding="utf-8"))])
def test_the_python_blocks_of_the_page_run_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType(f"page_{path.stem}")
    monkeypatch.setitem(sys.modules, page.__name__, page)       # what a page defines can be found by name, as in a script
    for line, block in blocks(path.read_text(encoding="utf-8")):
        tree = ast.increment_lineno(ast.parse(block, str(path)), line - 1)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(tree, str(path), "exec"), vars(page))


# Examples that take more than three seconds, nearly all of it compiling.
LONG = {"sklearn_moe.TopKMoERegressor", "sklearn.StochasticCCA", "sklearn.LandingICA", "mean_field.mean_field_error", "nested.AmIGO",
        "routing.RoutingSearch", "routing.best_run", "study.rate_study", "selection.select_order", "implicit.implicit",
        "exponent.exponent_certificate", "desingularized.Desingularized", "outer.OuterDescent", "starts.best_start",
        "starts.general_start"}


def example(module: str, name: str) -> object:
    """A docstring as a parameter."""
    whole = f"{module}.{name}" if name else module
    return pytest.param(module, name, id=whole, marks=pytest.mark.slow if ".".join(whole.split(".")[-2:]) in LONG else ())


@pytest.mark.parametrize(("module", "name"), [example(m, n) for m, n, _ in docstrings()])
def test_the_docstring_example_runs(module, name):
    space = dict(vars(importlib.import_module(module)))
    thing = importlib.import_module(module)
    for part in name.split(".") if name else ():
        thing = vars(thing)[part]
    text = thing.fget.__doc__ if isinstance(thing, property) else getattr(thing, "__func__", thing).__doc__
    complaint = run_docstring(text, f"{module}.{name}", space | {"jnp": jnp, "np": np, "tl": tl})
    assert not complaint, complaint


def test_every_docstring_with_an_example_says_so_with_a_section():
    for module, name, line in docstrings():
        path = ROOT / Path(*module.split("."))
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        near = "\n".join(source.splitlines()[line - 1 :]).split(">>>")[0]
        assert re.search(r"^\s*Examples?:\s*$", near, re.MULTILINE), f"{module}.{name}: the example stands below no `Example:` line"


def test_a_wrong_docstring_example_is_found():
    assert "Expected" in run_docstring(">>> 1 + 1\n3\n", "wrong", {})
    assert "Expected" in run_docstring(">>> 0.1 + 0.2\n0.3001\n", "wrong", {})
    assert not run_docstring(">>> 1 + 1\n2\n", "right", {})
    assert not run_docstring(">>> [0.1 + 0.2, 1]\n[0.3, 1]\n", "right up to round-off", {})


def test_blocks_are_found_with_their_lines():
    text = "a\n\n```python\nx = 1\n```\n\n- item\n\n    ```python\n    y = 2\n    ```\n\n```sh\nls\n```\n"
    assert blocks(text) == [(4, "x = 1\n"), (10, "y = 2\n")]


SCRIPT = '''# %% [markdown]
# # A title
#
# What it shows, with $x_1$.

# %%
import matplotlib.pyplot as plt
print("a < b\\n\\nend")

# %%
fig, ax = plt.subplots()
ax.plot([0, 1])

# %%
[1, 2]
'''


def test_a_script_becomes_a_page_with_text_output_and_picture(tmp_path):
    path = tmp_path / "demo.py"
    path.write_text(SCRIPT)
    cells = runner.parse(SCRIPT)
    runner.execute(cells, path)
    page, pictures = runner.markdown(cells, "demo")
    assert runner.title(cells, "") == "A title"
    assert runner.summary(cells) == "What it shows, with $x_1$."
    assert '<pre class="output">a &lt; b&#10;&#10;end</pre>' in page
    assert "![Figure 1 of this example](demo-1.svg)" in page
    assert pictures["demo-1.svg"].startswith("<?xml") and "</svg>" in pictures["demo-1.svg"]
    assert '<pre class="output">[1, 2]</pre>' in page
    assert "Line2D" not in page
    book = runner.notebook(cells)
    assert [c["cell_type"] for c in book["cells"]] == ["markdown", "code", "code", "code"]
    assert book["cells"][3]["outputs"][0]["data"] == {"text/plain": ["[1, 2]"]}


def test_a_cell_that_raises_is_named_with_its_line(tmp_path):
    path = tmp_path / "demo.py"
    cells = runner.parse("# %%\nx = 1\n\n# %%\n\ny = x / 0\n")
    with pytest.raises(runner.ExampleError, match=r"demo.py, cell 2 \(line 6\) raised ZeroDivisionError"):
        runner.execute(cells, path)
