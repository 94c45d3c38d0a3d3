"""The registry, runner and report of claims, on small made-up families."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import pytest

import theorylab as tl
from theorylab.errors import ArgumentError, ClaimFailed, StorageError, UnknownNameError
from theorylab.lab import claims
from theorylab.lab.claims import claim


@pytest.fixture
def demo():
    """Registers claims of the family `demo`; they are gone afterwards."""
    before = claims.registered()

    def add(name, body, fast=None, full=None):
        return claim(f"demo.{name}", statement="$a = b$", source="demo, claim 1", fast={} if fast is None and full is None else fast, full=full)(body)

    yield add
    for name in set(claims.registered()) - set(before):
        claims.forget(name)


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Writes `theorylab/<name>/claims.py` in a folder that the package is made to include."""
    monkeypatch.setattr(tl, "__path__", [*tl.__path__, str(tmp_path)])
    before, made = claims.registered(), []

    def add(name, text):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "claims.py").write_text("from theorylab.lab.claims import claim\n" + text)
        made.append(name)

    yield add
    for name in set(claims.registered()) - set(before):
        claims.forget(name)
    for module in [m for m in sys.modules if any(m.startswith(f"theorylab.{name}") for name in made)]:
        del sys.modules[module]
    for name in made:
        vars(tl).pop(name, None)


def half(check, tol=1e-15):
    check.equal("half", 1 / 2, 0.5, tol)


def wrong(check):
    check.below("gap", 0.5, 0.25)
    check.true("fine", True)


def broken(check):
    check.true("before", True)
    raise ValueError("no such game")


def test_a_claim_is_measured_with_the_arguments_of_its_preset(demo):
    seen = []
    demo("sizes", lambda check, n: (seen.append(n), check.above("n", n, 1)), fast={"n": 2}, full={"n": 200})
    assert claims.run("demo.sizes").passed and claims.run("demo.sizes", "full").passed
    assert seen == [2, 200]


def test_full_falls_back_to_fast_and_a_claim_without_fast_is_reported_as_full_only(demo):
    demo("small", half, fast={"tol": 1e-15})
    demo("large", half, full={"tol": 1e-15})
    fast, full = claims.run("demo"), claims.run("demo", "full")
    assert [o.verdict for o in fast.outcomes] == ["full only", "passed"] and fast.passed
    assert [o.verdict for o in full.outcomes] == ["passed", "passed"]
    assert "full only" in fast.text()


def test_a_claim_that_fails_or_breaks_does_not_stop_the_others(demo):
    for name, body in (("a-breaks", broken), ("b-fails", wrong), ("c-empty", lambda check: None), ("d-holds", half)):
        demo(name, body)
    report = claims.run("demo")
    assert [o.verdict for o in report.outcomes] == ["error", "failed", "error", "passed"]
    assert not report.passed
    first = report.outcomes[0]
    assert "ValueError: no such game (test_claims.py:" in first.message and [r.label for r in first.rows] == ["before"]
    assert report.outcomes[2].message == "the claim measured nothing"
    with pytest.raises(ClaimFailed) as caught:
        report.raise_if_failed()
    for words in ("demo.a-breaks: ValueError: no such game", "demo.b-fails: gap: 0.5 <= 0.25: FAILED", "demo.c-empty: the claim measured nothing"):
        assert words in str(caught.value)
    assert "d-holds" not in str(caught.value)


def test_the_table_has_one_line_per_row_and_a_summary(demo):
    demo("fails", wrong)
    text = claims.run("demo").text()
    table = [line for line in text.splitlines() if line.startswith("demo.fails  fast")]
    assert len(table) == 2 and "FAILED" in table[0] and "0.5" in table[0] and "<=" in table[0] and "passed" in table[1]
    assert "0 passed, 1 failed of 1 claim (fast)" in text
    assert "<td>demo.fails</td>" in claims.run("demo")._repr_html_()


def test_the_json_report_holds_settings_rows_and_provenance(demo, tmp_path):
    demo("half", half, fast={"tol": 1e-15})
    report = claims.run("demo.half", out=tmp_path / "deep" / "report.json")
    stored = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["complete"] and stored["passed"] and stored["preset"] == "fast" and len(stored["date"]) == 10
    assert stored["provenance"]["versions"]["theorylab"] == tl.__version__
    (one,) = stored["claims"]
    assert one["settings"] == {"tol": 1e-15} and one["rows"][0]["measured"] == 0.5 and one["statement"] == "$a = b$"


def test_an_interrupted_run_keeps_what_it_measured(demo, tmp_path):
    def interrupt(check):
        raise KeyboardInterrupt

    demo("a-half", half)
    demo("b-interrupt", interrupt)
    demo("c-half", half)
    with pytest.raises(KeyboardInterrupt):
        claims.run("demo", out=tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert [c["name"] for c in stored["claims"]] == ["demo.a-half"]
    assert not stored["complete"] and not stored["passed"]


def test_a_report_that_cannot_be_written_is_refused_with_its_name(demo, tmp_path):
    demo("half", half)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="report.json cannot be written"):
        claims.run("demo", out=tmp_path / "file" / "report.json")


def test_names_families_and_patterns_select(demo):
    for name in ("rate-fast", "rate-slow", "bound"):
        demo(name, half)
    names = lambda wanted: [c.name for c in claims.select(wanted)[0]]
    assert names("demo.bound") == ["demo.bound"]
    assert names("demo") == ["demo.bound", "demo.rate-fast", "demo.rate-slow"]
    assert names("demo.rate-*") == ["demo.rate-fast", "demo.rate-slow"]
    assert names(["demo.bound", "demo.*-slow"]) == ["demo.bound", "demo.rate-slow"]


def test_an_unknown_name_suggests_near_ones(demo):
    demo("voronoi-rate", half)
    with pytest.raises(UnknownNameError, match=r"claim 'demo.voronoi-rat' is not known; did you mean 'demo.voronoi-rate'"):
        claims.run("demo.voronoi-rat")
    with pytest.raises(UnknownNameError, match="preset 'slow' is not known; known: fast, full"):
        claims.run("demo", "slow")


def test_families_are_found_by_their_claims_module(family):
    family("alpha", "@claim('alpha.one', statement='s', source='t', fast={})\ndef _(check):\n    check.true('one', True)\n")
    assert claims.run("alpha.one").passed
    assert claims.discover("alpha") == {}
    assert [o.name for o in claims.run("alpha").outcomes] == ["alpha.one"]


def test_a_family_that_cannot_be_imported_is_an_error_and_the_others_run(family):
    family("alpha", "@claim('alpha.one', statement='s', source='t', fast={})\ndef _(check):\n    check.true('one', True)\n")
    family("omega", "import a_package_that_is_missing\n")
    report = claims.run(["alpha", "omega"])
    assert {o.name: o.verdict for o in report.outcomes} == {"omega.claims": "error", "alpha.one": "passed"}
    assert "a_package_that_is_missing" in report.outcomes[0].message and not report.passed
    assert claims.run("omega.some-claim").outcomes[0].verdict == "error"


def test_a_name_is_taken_once(demo):
    demo("half", half)
    demo("half", half)  # the same function again, as when a module is loaded twice
    with pytest.raises(ArgumentError, match=r"claim 'demo.half' is registered twice: in .*test_claims and in .*test_claims"):
        demo("half", lambda check: None)


@pytest.mark.parametrize(("name", "options", "words"), [
    ("half", {"fast": {}}, "must be family.kebab-case in lower case, got 'half'"),
    ("demo.Half", {"fast": {}}, "must be family.kebab-case"),
    ("demo.snake_case", {"fast": {}}, "must be family.kebab-case"),
    ("demo.none", {"fast": None}, "claim 'demo.none' has no preset"),
    ("demo.extra", {"fast": {"sizes": 3}}, r"its body does not take \(check, sizes\)"),
    ("demo.extra", {"fast": {}, "full": {"sizes": 3}}, r"its body does not take \(check, sizes\)"),
])
def test_a_bad_claim_is_refused_when_it_is_written(name, options, words):
    with pytest.raises(ArgumentError, match=words):
        claim(name, statement="s", source="t", **options)(wrong)
    assert name not in claims.registered()


def test_progress_is_told_each_claim_and_always_closed(demo):
    events = []

    class Log:
        def start(self, label, total):
            events.append(("start", total))

        def update(self, done, note=""):
            events.append((done, note))

        def close(self):
            events.append("close")

    demo("half", half)
    demo("wrong", broken)
    shown = []
    claims.run("demo", progress=Log(), show=lambda outcome: shown.append(outcome.name))
    assert events == [("start", 2), (0, "demo.half"), (1, "demo.wrong"), (2, ""), "close"]
    assert shown == ["demo.half", "demo.wrong"]


def test_an_inner_trace_is_not_counted_twice():
    from theorylab.lab.clock import _union

    assert _union([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (7.0, 8.0)]) == 6.0 and _union([]) == 0.0


def test_compiling_is_told_apart_from_computing(demo):
    def compiles(check):
        # A function made here is compiled here, whatever ran before.
        check.above("sum", float(jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones(3))), 0)

    demo("compiles", compiles)
    demo("waits", lambda check: check.true("done", True))
    first, second = claims.run("demo").outcomes
    assert 0 < first.compile_seconds <= first.seconds and first.cpu_seconds > 0
    assert second.compile_seconds == 0.0 and second.seconds < first.seconds
