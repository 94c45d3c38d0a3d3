"""Writes the generated pages of the documentation into `docs/generated/`: examples, figures, claims, derivations, API.

Run by `make docs` before MkDocs, so that the site is built from plain Markdown alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docs import gallery, inventory, runner, symbolic

KINDS = ("examples", "api", "figures", "claims", "derivations")


def write(path: Path, text: str) -> None:
    """Write a page; one that did not change keeps its time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def examples(target: Path, *, fresh: bool) -> None:
    """A page, its pictures and a notebook for each example, and the page that lists them."""
    folder = target / "examples"
    blocks = ["# Examples", "Scripts of a few lines each. Every one runs in the tests; the output shown is what it printed."]
    for path in scripts():
        cells = runner.run(path, fresh=fresh)
        text, pictures = runner.markdown(cells, path.stem)
        foot = f"---\n\n[Download as a notebook]({path.stem}.ipynb){{ download }} or as a [script]({path.name}){{ download }}.\n"
        write(folder / f"{path.stem}.md", text + "\n" + foot)
        write(folder / f"{path.stem}.ipynb", json.dumps(runner.notebook(cells), indent=1, ensure_ascii=False) + "\n")
        shutil.copyfile(path, folder / path.name)
        for name, content in pictures.items():
            write(folder / name, content)
        blocks.append(f"**[{runner.title(cells, path.stem)}]({path.stem}.md)**  \n{runner.summary(cells)}")
    if len(blocks) == 2:
        blocks.append("There is no example yet.")
    write(folder / "index.md", "\n\n".join(blocks) + "\n")


def scripts() -> list[Path]:
    """The examples in the order of their names."""
    return sorted((runner.ROOT / "examples").glob("[!_]*.py"))


def api(target: Path) -> None:
    """One page for core, lab and each family."""
    for stem, (title, rows) in inventory.pages().items():
        write(target / "api" / f"{stem}.md", inventory.page(title, rows, stem))


def main(argv: list[str] | None = None) -> int:
    """Write the pages that were asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=KINDS, action="append", help="write this kind of page (may be repeated)")
    parser.add_argument("--fresh", action="store_true", help="run every example again")
    options = parser.parse_args(argv)
    target = runner.GENERATED
    for kind in options.only or KINDS:
        begun = time.perf_counter()
        if kind == "examples":
            examples(target, fresh=options.fresh)
        elif kind == "api":
            api(target)
        elif kind == "figures":
            write(target / "figures.md", gallery.figures(target, runner.ROOT))
        elif kind == "derivations":
            write(target / "derivations.md", symbolic.derivations())
        else:
            write(target / "claims.md", gallery.claims(runner.ROOT))
        print(f"{kind}: {time.perf_counter() - begun:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
