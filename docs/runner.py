"""Runs a script in percent format cell by cell, keeps what it printed and drew, and writes it as a Markdown page and as a notebook."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import html
import io
import json
import os
import re
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
STORE = GENERATED / ".outputs"
_MARKER = re.compile(r"^# %%(.*)$")


@dataclasses.dataclass
class Cell:
    """A piece of a script: Markdown text or code, with the outputs of the code as pairs (kind, content).

    Kinds are those of notebooks: `stream` (what was printed), `text/plain`, `text/html`, `image/svg+xml`.
    """

    kind: str
    text: str
    line: int
    outputs: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class ExampleError(Exception):
    """A cell raised; the message says which and what."""


def parse(source: str) -> list[Cell]:
    """The cells of a script: `# %%` begins code, `# %% [markdown]` begins text; a docstring at the top is text."""
    cells, kind, start, lines = [], "code", 1, []

    def close() -> None:
        body = [re.sub(r"^# ?", "", one) for one in lines] if kind == "markdown" else lines
        lead = next((i for i, one in enumerate(body) if one.strip()), len(body))
        text = "\n".join(body).strip("\n")
        if text.strip():
            cells.append(Cell(kind, text, start + lead))

    for number, line in enumerate(source.splitlines(), 1):
        marker = _MARKER.match(line)
        if marker:
            close()
            kind, start, lines = "markdown" if "[markdown]" in marker[1] else "code", number + 1, []
        else:
            lines.append(line)
    close()
    if cells and cells[0].kind == "code":
        tree = ast.parse(cells[0].text)
        if len(tree.body) == 1 and ast.get_docstring(tree):
            first, _, rest = (ast.get_docstring(tree) or "").partition("\n")
            cells[0] = Cell("markdown", f"# {first.rstrip('.')}\n{rest}".strip(), cells[0].line)
    return cells


def title(cells: list[Cell], default: str) -> str:
    """The first heading."""
    for cell in cells:
        found = re.search(r"^# (.+)$", cell.text, re.MULTILINE) if cell.kind == "markdown" else None
        if found:
            return found[1].strip()
    return default


def summary(cells: list[Cell]) -> str:
    """The first paragraph below the first heading, as one line."""
    text = "\n".join(cell.text for cell in cells if cell.kind == "markdown")
    blocks = [b for b in re.split(r"\n\s*\n", re.sub(r"^#+ .*$", "\n", text, flags=re.MULTILINE)) if b.strip()]
    return " ".join(blocks[0].split()) if blocks else ""


def execute(cells: list[Cell], path: Path) -> None:
    """Run the code cells in one namespace, as a fresh script would, and fill in their outputs.

    Raises:
        ExampleError: a cell raised; the message holds the cell, its line and the end of the traceback.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib
    import matplotlib.pyplot as plt

    plt.close("all")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}), contextlib.chdir(ROOT), _as_main(path) as space:
        for number, cell in enumerate(cells, 1):
            if cell.kind == "code":
                cell.outputs = []
                printed, said = io.StringIO(), io.StringIO()
                try:
                    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
                        result = _run(cell, path, space)
                except Exception as error:
                    trace = "".join(traceback.format_exception(error)[-4:])
                    raise ExampleError(f"{path.name}, cell {number} (line {cell.line}) raised {type(error).__name__}: {error}\n{trace}") from error
                if printed.getvalue():
                    cell.outputs.append(("stream", printed.getvalue()))
                cell.outputs += _shown(result)
                cell.outputs += [("image/svg+xml", _svg(plt.figure(n))) for n in plt.get_fignums()]
                plt.close("all")


@contextlib.contextmanager
def _as_main(path: Path) -> Iterator[dict[str, Any]]:
    """The namespace of a new main module, so that what a script defines can be found again by name, as when it is run alone."""
    module, before = types.ModuleType("__main__"), sys.modules["__main__"]
    module.__file__ = str(path)
    sys.modules["__main__"] = module
    try:
        yield vars(module)
    finally:
        sys.modules["__main__"] = before


def _run(cell: Cell, path: Path, space: dict[str, Any]) -> Any:
    """Execute a cell; the value of its last line, if that is an expression not ended by a semicolon."""
    tree = ast.parse(cell.text, str(path))
    ast.increment_lineno(tree, cell.line - 1)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) and not cell.text.rstrip().endswith(";") else None
    exec(compile(tree, str(path), "exec"), space)
    return eval(compile(ast.Expression(last.value), str(path), "eval"), space) if isinstance(last, ast.Expr) else None


def _shown(result: Any) -> list[tuple[str, str]]:
    """What a notebook shows for a value. Objects of matplotlib are shown by their figure alone."""
    first = result[0] if isinstance(result, (list, tuple)) and result else result
    if result is None or type(first).__module__.startswith("matplotlib"):
        return []
    as_html = getattr(result, "_repr_html_", None)
    rich = as_html() if callable(as_html) else None
    return ([("text/html", rich)] if isinstance(rich, str) else []) + [("text/plain", repr(result))]


def _svg(figure: Any) -> str:
    """The figure as SVG without a date, so that equal pictures are equal files."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # glyphs that a system font lacks
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def fingerprint(source: str) -> str:
    """Changes when the script, the package or the libraries below it change."""
    digest = hashlib.sha256(source.encode())
    for file in [*sorted((ROOT / "theorylab").rglob("*.py")), Path(__file__)]:
        digest.update(file.read_bytes())
    for name in ("jax", "jaxlib", "numpy", "matplotlib", "diffrax"):
        digest.update(metadata.version(name).encode())
    digest.update(sys.version.encode())
    return digest.hexdigest()


def run(path: Path, *, fresh: bool = False) -> list[Cell]:
    """The cells of a script with outputs; taken from the last run when nothing changed since, unless `fresh`."""
    source = path.read_text(encoding="utf-8")
    kept, mark = STORE / f"{path.stem}.json", fingerprint(source)
    if not fresh and kept.is_file():
        record = json.loads(kept.read_text(encoding="utf-8"))
        if record["fingerprint"] == mark:
            return [Cell(c["kind"], c["text"], c["line"], [tuple(o) for o in c["outputs"]]) for c in record["cells"]]
    cells = parse(source)
    execute(cells, path)
    STORE.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"fingerprint": mark, "cells": [dataclasses.asdict(c) for c in cells]}), encoding="utf-8")
    os.replace(part, kept)
    return cells


def markdown(cells: list[Cell], name: str) -> tuple[str, dict[str, str]]:
    """The page, and the pictures it refers to by file name."""
    blocks, pictures = [], {}
    for cell in cells:
        if cell.kind == "markdown":
            blocks.append(cell.text)
            continue
        blocks.append(f"```python\n{cell.text}\n```")
        rich = any(kind == "text/html" for kind, _ in cell.outputs)
        for kind, content in cell.outputs:
            if kind == "image/svg+xml":
                file = f"{name}-{len(pictures) + 1}.svg"
                pictures[file] = content
                blocks.append(f"![Figure {len(pictures)} of this example]({file})")
            elif kind == "text/html":
                blocks.append(f'<div class="output" markdown="0">{_one_block(content)}</div>')
            elif kind == "stream" or not rich:
                blocks.append(f'<pre class="output">{_escape(content)}</pre>')
    return "\n\n".join(blocks) + "\n", pictures


def _one_block(content: str) -> str:
    """HTML without blank lines, which would end the block in Markdown."""
    return re.sub(r"\n\s*\n", "\n", content.strip())


def _escape(content: str) -> str:
    """Plain text as it stands: no HTML, no Markdown, no end of the block at a blank line."""
    return html.escape(content.rstrip("\n"), quote=False).replace("\n", "&#10;")


def notebook(cells: list[Cell]) -> dict[str, Any]:
    """The same cells in notebook format 4.5."""
    body = []
    for number, cell in enumerate(cells):
        common = {"id": f"cell-{number:02d}", "metadata": {}, "source": cell.text.splitlines(keepends=True)}
        if cell.kind == "markdown":
            body.append({"cell_type": "markdown", **common})
        else:
            body.append({"cell_type": "code", **common, "execution_count": None, "outputs": _notebook_outputs(cell)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "cells": body}


def _notebook_outputs(cell: Cell) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = []
    shown = {kind: content.splitlines(keepends=True) for kind, content in cell.outputs if kind.startswith("text/")}
    for kind, content in cell.outputs:
        if kind == "stream":
            outputs.append({"output_type": "stream", "name": "stdout", "text": content.splitlines(keepends=True)})
        elif kind == "image/svg+xml":
            outputs.append({"output_type": "display_data", "metadata": {}, "data": {kind: content.splitlines(keepends=True)}})
    if shown:
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": shown})
    return outputs
