"""What the benchmarks share: their options, and their tables as text, as Markdown or as JSON, with where they were taken."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from theorylab import runtime
from theorylab.core.show import text_table

Table = Sequence[Mapping[str, Any]]


def parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Options of every script: `--quick` (what it leaves out is said in `quick`), `--json` for machines, `--markdown` for the documentation."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help=quick)
    shape = made.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return made


def show(tables: Mapping[str, Table], options: argparse.Namespace, *, small: Sequence[str] = ("error", "gap", "tol"), **settings: Any) -> None:
    """Print the tables by title, then date, versions, devices, threads and `settings`.

    Columns whose name contains a word of `small` hold numbers of any size and are printed with an exponent.
    """
    threads = {"cores": os.cpu_count(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "XLA_FLAGS": os.environ.get("XLA_FLAGS")}
    about = {"date": time.strftime("%Y-%m-%d"), "versions": runtime.versions(), "devices": runtime.devices(), "threads": threads, **settings}
    if options.json:
        print(json.dumps({**tables, **about}, indent=1))
        return
    for title, table in tables.items():
        names = list(table[0])
        body = [[_cell(row[name], any(word in name for word in small)) for name in names] for row in table]
        print(f"\n{'### ' if options.markdown else ''}{title}\n")
        print("\n".join("| " + " | ".join(cells) + " |" for cells in [names, ["---"] * len(names), *body]) if options.markdown
              else text_table(names, body))
    print()
    for name, value in about.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        print(f"{'* ' if options.markdown else ''}{name}: {text}")


def _cell(value: Any, small: bool) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return str(value)
    if small:
        return f"{value:.1e}".replace("e-0", "e-") if value else "0"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
