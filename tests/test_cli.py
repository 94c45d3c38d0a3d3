"""The command line: lists, reports, JSON, exit statuses and refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import theorylab as tl
from tests.lab.test_figures import MODULE
from theorylab import cli
from theorylab.lab import claims, figures, files
from theorylab.lab.claims import claim

BENCH = '''"""Times nothing.

More text.
"""
def main(argv):
    print("ran with", argv)
    return RETURN
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one figure module and two benchmarks, and two claims of the family `demo`."""
    for name in ("made_up", "made_bench"):
        (tmp_path / name).mkdir()
    (tmp_path / "made_up" / "demo.py").write_text(MODULE)
    (tmp_path / "made_bench" / "good.py").write_text(BENCH.replace("RETURN", "0"))
    (tmp_path / "made_bench" / "slow.py").write_text(BENCH.replace("RETURN", "1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THEORYLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(figures, "checkout_folder", lambda name: tmp_path / "made_up")
    monkeypatch.setattr(files, "checkout_folder", lambda name: tmp_path / "made_bench")
    before = claims.registered() | figures.registered()
    claim("demo.half", statement="$1/2$", source="demo", fast={"n": 2}, full={"n": 4})(lambda check, n: check.equal("half", n / 4, 0.5, tol=1e-9))
    claim("demo.other-half", statement="$1/2$", source="demo", fast={})(lambda check: check.true("half", True))
    yield tmp_path
    for name in set(claims.registered() | figures.registered()) - set(before):
        claims.forget(name)
        figures.forget(name)
    for module in [m for m in sys.modules if m.startswith(("made_up.", "made_bench."))]:
        del sys.modules[module]


@pytest.fixture
def run(checkout, capsys):
    """Runs a command line; returns exit status, standard output and standard error."""

    def command(*argv):
        code = cli.main([str(a) for a in argv])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return command


def test_claims_are_measured_and_reported(run):
    code, out, err = run("claims", "--family", "demo")
    assert (code, err) == (0, "")
    assert "demo.half" in out and "2 passed of 2 claims (fast)" in out


def test_a_failing_claim_ends_with_one(run, tmp_path):
    code, out, _ = run("claims", "demo.half", "--full", "--out", tmp_path / "report.json")
    assert code == 1 and "half: 1 within 1e-09 of 0.5: FAILED (off by 0.5)" in out
    assert json.loads((tmp_path / "report.json").read_text())["claims"][0]["verdict"] == "failed"


def test_json_is_the_only_thing_on_standard_output(run):
    code, out, err = run("claims", "demo.half", "--json")
    assert code == 0 and json.loads(out)["claims"][0]["name"] == "demo.half" and "demo.half" in err
    code, out, err = run("figures", "demo/line", "--preset", "quick", "--json")
    assert code == 0 and json.loads(out)["figures"][0]["files"] == ["demo/line.svg"] and "time" in err
    code, out, _ = run("info", "--json")
    assert code == 0 and json.loads(out)["versions"]["theorylab"] == tl.__version__


def test_lists_name_what_there_is(run):
    code, out, _ = run("claims", "--list", "--family", "demo")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[2:]] == ["demo.half", "demo.other-half"]
    code, out, _ = run("figures", "--list", "demo", "--json")
    assert code == 0 and [(row["name"], row["presets"]) for row in json.loads(out)] == [("demo/line", ["quick", "paper"])]
    code, out, _ = run("bench", "--list")
    assert code == 0 and "good  Times nothing." in out and "slow" in out


def test_names_are_looked_up_within_the_families(run):
    code, out, _ = run("claims", "--list", "--json", "--family", "demo", "other-*")
    assert code == 0 and [row["name"] for row in json.loads(out)] == ["demo.other-half"]


def test_figures_are_drawn(run, checkout):
    code, out, _ = run("figures", "demo", "--preset", "quick", "--out", checkout / "pictures", "--png")
    assert code == 0 and (checkout / "pictures" / "demo" / "line.png").exists()
    assert "1 figure, preset quick: time" in out and "pictures are in" in out
    assert run("figures", "demo", "--preset", "quick", "--out", checkout / "pictures", "--force")[0] == 0
    assert sys.modules["made_up.demo"].CALLS == [3, 3]


def test_a_failing_figure_ends_with_one(run, checkout):
    (checkout / "made_up" / "demo.py").write_text(MODULE.replace("count - 1", "count"))
    code, out, _ = run("figures", "demo", "--preset", "quick", "--no-progress")
    assert code == 1 and "FAILED" in out and (checkout / "paper_figures" / "out" / "demo" / "line.svg").exists()


def test_a_module_that_cannot_be_loaded_is_told_with_the_list(run, checkout):
    (checkout / "made_up" / "broken.py").write_text("1 / 0\n")
    code, out, err = run("figures", "--list", "demo")
    assert code == 1 and "demo/line" in out and "broken cannot be loaded: ZeroDivisionError" in err


def test_benchmarks_get_their_arguments_and_give_their_status(run):
    assert run("bench", "good", "--json", "--", "--size", "3") == (0, "ran with ['--json', '--size', '3']\n", "")
    assert run("bench", "slow")[0] == 1


def test_a_benchmark_that_breaks_does_not_stop_the_others(run, checkout):
    (checkout / "made_bench" / "bad.py").write_text("def main(argv):\n    raise RuntimeError('no peer installed')\n")
    (checkout / "made_bench" / "bare.py").write_text("x = 1\n")
    code, out, err = run("bench", "b*", "good")
    assert code == 1 and "bad broke: RuntimeError: no peer installed (bad.py:2)" in err and "bare has no main(argv)" in err
    assert out == "ran with []\n"


def test_info_tells_versions_precision_and_cache(run, checkout, monkeypatch):
    monkeypatch.setenv("THEORYLAB_CACHE", str(checkout / "store"))
    (checkout / "store").mkdir()
    (checkout / "store" / "a.npz").write_bytes(b"0" * 2_500_000)
    code, out, _ = run("info")
    assert code == 0 and "64-bit" in out and f"{checkout / 'store'} (1 files, 2.5 MB)" in out and "jaxlib" in out


@pytest.mark.parametrize(("argv", "words"), [
    (["figure"], "command 'figure' is not known; did you mean 'figures'?"),
    (["claims", "demo.hal"], "claim 'demo.hal' is not known; did you mean 'demo.half'"),
    (["figures", "demo/lin"], "figure 'demo/lin' is not known; did you mean 'demo/line'"),
    (["figures", "--preset", "quik"], "preset 'quik' is not known; did you mean 'quick'?"),
    (["bench", "goood"], "benchmark 'goood' is not known; did you mean 'good'?"),
    (["claims", "--family", "demo.half"], "--family takes a family, got 'demo.half'"),
    (["figures", "demo", "--out", "made_up/demo.py/out"], "demo.py/out/.writable cannot be written"),
    (["info", "--", "more"], "only bench passes arguments on to a script"),
    (["claims", "--fast", "--full"], "not allowed with argument"),
    (["figures", "--sped"], "unrecognized arguments: --sped"),
])
def test_what_cannot_be_done_is_said_in_one_sentence_and_ends_with_two(run, argv, words):
    code, _, err = run(*argv)
    assert code == 2 and words in err and "Traceback" not in err


def test_help_and_no_command_end_with_zero(run):
    for argv in ([], ["--help"], ["claims", "--help"]):
        code, out, _ = run(*argv)
        assert code == 0 and "theorylab" in out


def test_an_interrupt_ends_with_130_and_keeps_the_report(run, checkout):
    def interrupt(check):
        raise KeyboardInterrupt

    claim("demo.z", statement="s", source="t", fast={})(interrupt)
    code, _, err = run("claims", "demo", "--out", checkout / "report.json")
    assert code == 130 and "what was written is kept" in err
    assert [c["name"] for c in json.loads((checkout / "report.json").read_text())["claims"]] == ["demo.half", "demo.other-half"]


def test_the_module_runs_as_a_program_and_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m theorylab.cli info | head -n 1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith("python")
