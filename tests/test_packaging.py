"""What importing costs and loads, and whether the pins, the ranges and the versions agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import theorylab
from docs import check_site
from tests import budget

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# loaded by what needs them, not by `import theorylab`
LAZY = {"ot", "matplotlib", "sympy", "pandas", "diffrax", "lineax", "optimistix", "tqdm", "sklearn", "optax", "distributed"}
OWN_CPU_SECONDS = 0.5

PROBE = """
import json, sys, time
import jax, jax.numpy, numpy, equinox, jaxtyping
before, known = time.process_time(), set(sys.modules)
import theorylab
used = time.process_time() - before
print(json.dumps({"seconds": used, "loaded": sorted({m.split(".")[0] for m in set(sys.modules) - known}), "x64": jax.config.jax_enable_x64,
                  "backends": len(jax._src.xla_bridge._backends)}))
"""


@pytest.fixture(scope="module")
def fresh_import():
    """Facts about `import theorylab` in a new process, past what JAX and equinox cost anyhow."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def test_importing_loads_no_slow_library(fresh_import):
    assert not LAZY & set(fresh_import["loaded"])


def test_importing_takes_little_beyond_jax(fresh_import):
    assert fresh_import["seconds"] < OWN_CPU_SECONDS, f"own CPU-s of `import theorylab`: {fresh_import['seconds']:.2f}"


def test_importing_turns_on_64_bit_mode_and_starts_no_device(fresh_import):
    assert fresh_import["x64"] is True
    assert fresh_import["backends"] == 0


def requirements() -> list[tuple[str, Requirement]]:
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return [(extra, Requirement(text)) for extra, texts in groups.items() for text in texts]


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            found.setdefault(canonicalize_name(one.name), []).append(one)
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_dependency_has_one_pin_inside_its_range(python):
    place = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux", "platform_system": "Linux"}
    for extra, wanted in requirements():
        fitting = [p for p in pins().get(canonicalize_name(wanted.name), []) if p.marker is None or p.marker.evaluate(place)]
        assert len(fitting) == 1, f"{wanted.name} ({extra or 'base'}) has {len(fitting)} pins for Python {python}: run `make pins`"
        (version,) = (s.version for s in fitting[0].specifier)
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted} does not allow the pin {version}: run `make pins`"


def test_the_pins_name_no_address():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|^-|--(extra-)?index|find-links| @ ", text, re.MULTILINE)


def test_the_version_is_the_same_everywhere():
    assert PROJECT["dynamic"] == ["version"]
    assert f"version: {theorylab.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(theorylab.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_make_alone_lists_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    assert phony == set(re.findall(r"^([a-z]+):.*## ", text, re.MULTILINE))
    assert {"figures", "test", "docs", "claims", "bench", "lint", "notebooks", "clean"} <= phony


@pytest.mark.parametrize(("nodeid", "row"), [
    ("tests/core/test_psd.py::test_a", "core and lab"),
    ("tests/lab/test_rates.py::test_a[x]", "core and lab"),
    ("tests/acvi/test_games.py::test_a", "acvi"),
    ("tests/test_claims.py::test_fast[moe.exact-fit-rate]", "moe claims"),
    ("tests/test_figures.py::test_quick[stiefel/landing]", "stiefel figures"),
    ("tests/test_examples.py::test_the_example_runs[00_quickstart]", "examples"),
    ("tests/test_examples.py::test_the_docstring_example_runs[theorylab.moe.em.EM]", "examples"),
    ("tests/test_layers.py::test_a", "other"),
    ("tests/interop/test_optax.py::test_a", "interop"),
])
def test_every_test_belongs_to_one_row_of_the_cpu_table(nodeid, row):
    assert budget.part(nodeid) == row


def test_the_shares_add_up_to_the_budget_and_excess_is_found():
    assert sum(budget.SHARES.values()) == 1200
    share = budget.SHARES["moe"]
    assert budget.exceeded({"tests/moe/test_em.py::a": share, "tests/moe/test_em.py::b": 0.6 * share}) == ["moe"]
    assert not budget.exceeded({"tests/moe/test_em.py::a": 1.4 * share})


@pytest.mark.parametrize(("body", "match"), [
    ('<script src="https://cdn.example.org/a.js"></script>', "loads https://cdn.example.org/a.js"),
    ('<link rel="stylesheet" href="//fonts.example.org/css">', "loads //fonts.example.org/css"),
    ('<img src="http://example.org/a.png">', "loads http://example.org/a.png"),
    ("<style>@import url(https://example.org/a.css)</style>", "in a style"),
    ("<p style=\"background: url('https://example.org/a.png')\">", "in a style"),
    ('<script>fetch("https://example.org/data")</script>', "in a script"),
    ('<pre class="mermaid">a</pre>', "class mermaid"),
    ('<img src="absent.svg">', "absent.svg is not in the site"),
])
def test_the_site_check_finds_what_is_loaded_from_elsewhere(tmp_path, body, match):
    (tmp_path / "index.html").write_text(f"<html><body>{body}</body></html>")
    found, _ = check_site.check(tmp_path)
    assert len(found) == 1 and match in found[0]


def test_the_site_check_passes_links_to_follow(tmp_path):
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path / "index.html").write_text('<a href="https://example.org">x</a><img src="a.svg"><link rel="canonical" href="https://example.org/">')
    assert check_site.check(tmp_path) == ([], 2)
