"""Figures: the registry, the store of results, the runner and its files."""

from __future__ import annotations

import errno
import json
import os
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest

from theorylab.errors import ArgumentError, RunWarning, StorageError, UnknownNameError
from theorylab.lab import figures, results
from theorylab.lab.figures import figure, run_figures

MODULE = '''"""Made-up figures."""
import numpy as np
from theorylab.lab.figures import figure

CALLS = []


@figure("demo/line", source="demo, Figure 1", caption="A line, $y = x$.", quick={"count": 3}, paper={"count": 5})
class Line:
    @staticmethod
    def compute(progress, count):
        progress.start("line", count)
        for i in range(count):
            progress.update(i + 1)
        CALLS.append(count)
        return {"x": np.arange(count), "set": "made"}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots()
        ax.plot(data["x"], data["x"], label="a line")
        ax.set(xlabel="width", ylabel="height $h$")
        return figure

    @staticmethod
    def expect(check, data, count):
        check.equal("last", data["x"][-1], count - 1, tol=0)
'''
SECOND = MODULE.replace("demo/line", "demo/second").replace("class Line", "class Second")


@pytest.fixture
def folder(tmp_path):
    """A folder of figure modules; `add(name, text)` writes one. Figures and modules are gone afterwards."""
    place, before = tmp_path / "made_up", figures.registered()
    place.mkdir()
    (place / "demo.py").write_text(MODULE)
    yield place
    for name in set(figures.registered()) - set(before):
        figures.forget(name)
    for module in [m for m in sys.modules if m.startswith("made_up.")]:
        del sys.modules[module]


@pytest.fixture
def draw(folder, tmp_path):
    """Runs figures of the folder quietly; what was said is in `draw.said`."""

    def run(names="demo", preset="quick", **options):
        run.said = []
        places = {"folder": folder, "out": tmp_path / "out", "cache": tmp_path / "cache"}
        return run_figures(names, preset, say=run.said.append, **(places | options))

    return run


def calls():
    return sys.modules["made_up.demo"].CALLS


def sidecar(tmp_path, name="line"):
    return json.loads((tmp_path / "out" / "demo" / f"{name}.json").read_text())


def replace(folder, old, new):
    text = (folder / "demo.py").read_text()
    assert old in text
    (folder / "demo.py").write_text(text.replace(old, new))


def test_a_figure_leaves_a_picture_and_its_facts(draw, tmp_path):
    gallery = draw()
    assert gallery.passed and [o.files for o in gallery.outcomes] == [("demo/line.svg",)]
    facts = sidecar(tmp_path)
    assert facts["settings"] == {"count": 3} and facts["preset"] == "quick" and facts["passed"] and facts["caption"] == "A line, $y = x$."
    assert facts["checks"][0]["measured"] == 2 and facts["checks"][0]["relation"] == "within 0 of" and facts["facts"] == {"set": "made"}
    assert facts["times"]["compute"]["seconds"] >= 0 and "versions" in facts["provenance"]
    assert str(tmp_path) not in json.dumps(facts)
    assert "1 of 1" in repr(gallery) and "<td>demo/line</td>" in gallery._repr_html_() and gallery.to_dict()["passed"]


def test_the_picture_is_text_and_the_same_bytes_each_time(draw, tmp_path):
    path = tmp_path / "out" / "demo" / "line.svg"
    draw()
    first = path.read_bytes()
    draw(force=True)
    assert path.read_bytes() == first
    texts = [node.text for node in ElementTree.fromstring(first).iter("{http://www.w3.org/2000/svg}text")]
    assert "width" in texts
    assert b"<dc:date>" not in first


def test_png_is_written_when_asked_for(draw, tmp_path):
    assert draw(png=True).outcomes[0].files == ("demo/line.svg", "demo/line.png")
    assert (tmp_path / "out" / "demo" / "line.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_computed_once_per_settings(draw):
    assert not draw().outcomes[0].cached and draw().outcomes[0].cached
    assert calls() == [3]
    draw(preset="paper")
    assert calls() == [3, 5]
    draw(force=True)
    assert calls() == [3, 5, 3]


def test_the_key_follows_settings_and_both_sources(monkeypatch):
    base = results.key({"n": 1}, "text")
    assert base == results.key({"n": 1}, "text")
    assert base != results.key({"n": 2}, "text") and base != results.key({"n": 1}, "text ")
    monkeypatch.setattr(results, "source_hash", lambda: "another package")
    assert base != results.key({"n": 1}, "text")


def test_a_changed_module_is_computed_again(draw, folder):
    draw()
    replace(folder, '"set": "made"', '"set": "changed"')
    del sys.modules["made_up.demo"]
    assert not draw().outcomes[0].cached


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2], lambda content: b"not a result"])
def test_a_damaged_result_is_computed_again_with_a_warning(draw, tmp_path, damage):
    draw()
    (path,) = (tmp_path / "cache").glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RunWarning, match="stored result of demo/line .* computed again"):
        assert not draw().outcomes[0].cached
    assert draw().outcomes[0].cached


def test_a_cache_that_cannot_be_written_costs_a_warning_only(draw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RunWarning, match="not kept for the next time"):
        assert draw(cache=tmp_path / "file" / "cache").passed


def test_old_results_are_dropped(tmp_path):
    store = results.Store(tmp_path)
    for i in range(6):
        store.save("demo/line", "quick", f"{i:064d}"[::-1], {"x": np.arange(i)}, {"seconds": float(i)})
        os.utime(next(iter(store._all("demo/line", "quick"))), ns=(i, i))
    assert len(list(tmp_path.glob("*.npz"))) == 3
    assert store.load("demo/line", "quick", f"{5:064d}"[::-1])[0]["x"].tolist() == [0, 1, 2, 3, 4]


def test_the_time_is_estimated_from_the_last_run(draw, folder):
    draw()
    assert draw.said[0] == "1 figure, preset quick: time unknown (1 of unknown duration)"
    draw()
    assert "about 1 s (1 stored)" in draw.said[0]
    draw(force=True)
    assert draw.said[0].startswith("1 figure, preset quick: time about ") and "stored" not in draw.said[0]
    (folder / "other.py").write_text(SECOND)
    draw(force=True)
    assert "or more (1 of unknown duration)" in draw.said[0]


def test_the_estimate_survives_the_loss_of_the_cache(draw, tmp_path):
    draw()
    draw(cache=tmp_path / "empty")
    assert "unknown" not in draw.said[0]


def test_a_figure_that_fails_its_check_is_drawn_with_a_mark(draw, folder, tmp_path):
    replace(folder, "count - 1, tol=0", "count, tol=0")
    gallery = draw()
    assert not gallery.passed and gallery.outcomes[0].verdict == "failed"
    assert "CHECK FAILED: last: 2 within 0 of 3" in (tmp_path / "out" / "demo" / "line.svg").read_text()
    assert sidecar(tmp_path)["passed"] is False
    assert any("last: 2 within 0 of 3: FAILED" in line for line in draw.said)


@pytest.mark.parametrize(("old", "new", "words", "drawn"), [
    ("check.equal(", "1 / 0, check.equal(", "expect: ZeroDivisionError", True),
    ("check.equal(\"last\", data[\"x\"][-1], count - 1, tol=0)", "pass", "expect measured nothing", True),
    ("CALLS.append(count)", "raise MemoryError('too large')", "MemoryError: too large", False),
    ('return {"x": np.arange(count), "set": "made"}', "return [1, 2]", "must return a dictionary of arrays, got list", False),
    ('"set": "made"', '"set": object()', "returned 'set' as object", False),
    ("return figure", "return ax", "must return a matplotlib Figure, got Axes", False),
])
def test_what_breaks_in_one_figure_is_told_and_the_others_are_drawn(draw, folder, tmp_path, old, new, words, drawn):
    replace(folder, old, new)
    (folder / "other.py").write_text(SECOND)
    gallery = draw()
    assert [(o.name, o.verdict) for o in gallery.outcomes] == [("demo/line", "error"), ("demo/second", "passed")]
    assert words in gallery.outcomes[0].message and words in gallery.text()
    assert (tmp_path / "out" / "demo" / "line.svg").exists() == drawn
    assert words in sidecar(tmp_path)["message"] and sidecar(tmp_path)["verdict"] == "error"


def test_a_module_that_cannot_be_loaded_is_told_and_the_others_are_drawn(draw, folder):
    (folder / "broken.py").write_text("import a_package_that_is_missing\n")
    gallery = draw(None)
    assert {o.name: o.verdict for o in gallery.outcomes if o.name.startswith(("demo", "broken"))} == {"broken.py": "error", "demo/line": "passed"}
    assert draw("demo").passed  # it was not asked for
    with pytest.raises(UnknownNameError, match=r"broken/one.*not loaded: broken.py: ModuleNotFoundError"):
        draw("broken/one")


def test_a_preset_that_a_figure_does_not_have_is_told(draw):
    gallery = draw(preset="full")
    assert gallery.outcomes[0].verdict == "not offered" and gallery.passed
    with pytest.raises(UnknownNameError, match="preset 'paperr' is not known; did you mean 'paper'"):
        draw(preset="paperr")


def test_with_a_folder_no_other_figures_are_drawn(draw, tmp_path):
    other = tmp_path / "made_up_too"
    other.mkdir()
    (other / "demo.py").write_text(SECOND)
    try:
        figures.discover(other)
        assert [o.name for o in draw(None).outcomes] == ["demo/line"]
        with pytest.raises(UnknownNameError, match="demo/second"):
            draw("demo/second")
    finally:
        del sys.modules["made_up_too.demo"]


def test_an_unknown_name_suggests_near_ones(draw):
    with pytest.raises(UnknownNameError, match="figure 'demo/lin' is not known; did you mean 'demo/line'"):
        draw("demo/lin")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(draw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file.* cannot be written"):
        draw(out=tmp_path / "file" / "out")
    assert calls() == []


def test_a_full_disk_leaves_the_old_files_whole(draw, folder, tmp_path, monkeypatch):
    draw()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "demo").iterdir()}
    real, full = os.fsync, []

    def fsync(handle):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(sys.modules["made_up.demo"].Line, "draw", staticmethod(lambda data: (full.append(1), plt.figure())[1]))
    gallery = draw()
    assert gallery.outcomes[0].verdict == "error" and "line.svg cannot be written: No space left on device" in gallery.outcomes[0].message
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "demo").iterdir()} == before


def test_an_interrupt_keeps_what_was_written(draw, folder, tmp_path):
    (folder / "other.py").write_text(SECOND.replace("CALLS.append(count)", "raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        draw()
    assert (tmp_path / "out" / "demo" / "line.svg").exists() and not (tmp_path / "out" / "demo" / "second.svg").exists()


def test_progress_reaches_compute_and_is_closed(draw):
    events = []

    class Log:
        def start(self, label, total):
            events.append((label, total))

        def update(self, done, note=""):
            events.append(done)

        def close(self):
            events.append("close")

    draw(progress=Log())
    assert events == [("line", 3), 1, 2, 3, "close"]


def test_a_missing_folder_is_told_with_the_places_that_were_looked_at(tmp_path, monkeypatch):
    import theorylab as tl

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tl, "__file__", str(tmp_path / "site" / "theorylab" / "__init__.py"))
    with pytest.raises(StorageError, match="no folder 'paper_figures' was found; looked for .*site.*paper_figures and .*paper_figures"):
        figures.discover()
    with pytest.raises(StorageError, match="is not a folder of figure modules"):
        figures.discover(tmp_path / "nothing")


def three(**changes):
    parts = {"compute": staticmethod(lambda progress, n: {}), "draw": staticmethod(lambda data: None),
             "expect": staticmethod(lambda check, data, n: None)} | changes
    return type("Three", (), {k: v for k, v in parts.items() if v is not None} | {"__module__": __name__})


@pytest.mark.parametrize(("name", "body", "words"), [
    ("line", three(), "must be family/kebab-case in lower case, got 'line'"),
    ("demo/a_b", three(), "must be family/kebab-case"),
    ("demo/x", three(draw=None), "draw is not one"),
    ("demo/x", three(compute=lambda progress, n: {}), "compute is not one"),
    ("demo/x", three(compute=staticmethod(lambda progress: {})), r"compute does not take the settings of 'quick' \(n\)"),
    ("demo/x", three(expect=staticmethod(lambda check, n: None)), r"expect does not take the settings of 'quick' \(n\)"),
])
def test_a_bad_figure_is_refused_when_it_is_written(name, body, words):
    with pytest.raises(ArgumentError, match=words):
        figure(name, source="s", caption="c", quick={"n": 1}, paper={"n": 2})(body)
    assert name not in figures.registered()


def test_a_name_is_taken_once(folder):
    (folder / "copy.py").write_text(MODULE)
    broken = figures.discover(folder)
    assert list(broken) == ["demo"] and "registered twice: by made_up.copy.Line and by made_up.demo.Line" in str(broken["demo"])
