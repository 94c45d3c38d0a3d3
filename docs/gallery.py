"""The pages of figures and of claims."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

OUT = "paper_figures/out"
FIGURES = """Each figure is computed by the package, drawn, and checked: what it shows is stated as inequalities, listed below it.
`make figures` draws all of them with the settings of the papers."""
CLAIMS = """A claim is a statement of a paper as a measurement that passes or fails. `make test` measures the fast cases, `make claims` the full ones
and records the report that this page shows."""


def text_in_table(text: str) -> str:
    """Text for a cell of a Markdown table: one line, and no bar that would end the cell."""
    inside = re.sub(r"\$[^$]*\$", lambda m: m[0].replace(r"\|", r"\Vert ").replace("|", r"\vert "), " ".join(str(text).split()))
    return inside.replace("|", r"\|") if "$" not in inside else inside


def number(value: Any) -> str:
    """A measured value as text."""
    from theorylab.core.show import number_text

    return number_text(value)


def checks_table(rows: list[dict[str, Any]]) -> str:
    """Measured values beside their bounds."""
    lines = ["| check | measured | relation | bound | verdict |", "|---|---:|---|---:|---|"]
    for row in rows:
        cells = (row["label"], number(row["measured"]), row["relation"], number(row["bound"]), "passed" if row["passed"] else "**FAILED**")
        lines.append("| " + " | ".join(map(text_in_table, cells)) + " |")
    return "\n".join(lines)


def settings_text(settings: dict[str, Any]) -> str:
    """The arguments of a preset on one line."""
    return ", ".join(f"`{name}={json.dumps(value)}`" for name, value in settings.items()) or "none"


def current(one: Any, root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and facts of a picture that `make figures` left, if it belongs to the present sources and settings."""
    from theorylab.lab import results

    sidecar = root / OUT / f"{one.name}.json"
    if not sidecar.is_file() or not sidecar.with_suffix(".svg").is_file():
        return None
    facts = json.loads(sidecar.read_text(encoding="utf-8"))
    settings = one.presets.get(facts.get("preset"))
    fresh = settings is not None and facts.get("key") == results.key({"name": one.name, **settings}, one.text)
    return (sidecar.parent, facts) if fresh else None


def figures(target: Path, root: Path) -> str:
    """The gallery. Pictures that `make figures` drew are taken; the others are drawn with the preset `quick`."""
    from theorylab.lab import figures as lab

    blocks = ["# Figures", FIGURES]
    broken = lab.discover(root / "paper_figures") if (root / "paper_figures").is_dir() else {}
    if broken:
        raise RuntimeError("; ".join(f"paper_figures/{name}.py cannot be loaded: {error}" for name, error in broken.items()))
    found = {one.name: current(one, root) for one in lab.registered().values()}
    missing = [name for name, have in found.items() if have is None]
    if missing:
        made = lab.run_figures(missing, "quick", out=target / "figures", folder=root / "paper_figures", say=lambda _: None)
        lines = [line for outcome in made.outcomes for line in outcome.problems()]
        if lines:
            raise RuntimeError("figures that do not hold:\n" + "\n".join(lines))
    if not found:
        blocks.append("No figure is registered yet.")
    family = ""
    for name, have in found.items():
        folder, facts = have or (target / "figures" / Path(name).parent, {})
        stem = name.split("/")[1]
        facts = facts or json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        place = target / "figures" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if folder != place.parent:
            shutil.copyfile(folder / f"{stem}.svg", place.with_suffix(".svg"))
        if name.split("/")[0] != family:
            family = name.split("/")[0]
            blocks.append(f"## {family}")
        origin = f"Source: {facts['source']}. Preset `{facts['preset']}`: {settings_text(facts['settings'])}. Drawn by `theorylab figures {name}`."
        blocks += [f"### {stem.replace('-', ' ')} {{ #{name.replace('/', '-')} }}", f"![{name}](figures/{name}.svg)", facts["caption"], origin]
        blocks.append(checks_table(facts["checks"]))
    return "\n\n".join(blocks) + "\n"


def claims(root: Path) -> str:
    """The claims page: every registered statement, and the last recorded report of `make claims`."""
    from theorylab.lab import claims as lab

    blocks = ["# Claims", CLAIMS]
    broken = lab.discover()
    if broken:
        raise RuntimeError("; ".join(f"claims of {name} cannot be loaded: {error}" for name, error in broken.items()))
    report = root / "docs" / "claims.json"
    record = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    if record is None:
        blocks.append("No full report has been recorded yet.")
    else:
        facts = record["provenance"]
        versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("theorylab", "python", "jax", "jaxlib") if name in facts["versions"])
        blocks.append(f"Recorded report, preset `{record['preset']}`" + (f", {record['date']}" if record.get("date") else "")
                      + f": {versions}, on {facts['devices']['backend']}.")
    measured = {one["name"]: one for one in record["claims"]} if record else {}
    family = ""
    for one in lab.registered().values():
        if one.family != family:
            family = one.family
            blocks.append(f"## {family}")
        blocks += [f"### {one.name} {{ #{one.name} }}", one.statement, f"Source: {one.source}." + (" Full case only." if one.fast is None else "")]
        outcome = measured.get(one.name)
        if outcome:
            blocks += [f"Verdict: **{outcome['verdict']}** in {outcome['seconds']:.1f} s, with {settings_text(outcome['settings'])}."]
            blocks += [checks_table(outcome["rows"])] * bool(outcome["rows"])
        elif record is not None:
            blocks.append("Not in the recorded report.")
    return "\n\n".join(blocks) + "\n"
