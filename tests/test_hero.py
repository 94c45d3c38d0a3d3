"""The picture of the README: text on white, small, the same bytes each time, and true to the package."""

from __future__ import annotations

import re

import numpy as np
import pytest

from docs import hero
from theorylab import transformer_pde as tp

WHITE = re.compile(r'<g id="patch_1">\s*<path d="[^"]*" style="fill: #ffffff"')


@pytest.fixture(scope="module")
def runs():
    """Random runs of the right shapes: drawing needs no more."""
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((3, 41, 2, 2))
    covs = roots @ np.swapaxes(roots, -1, -2)
    path = np.repeat(covs[2][:, None] / np.trace(covs[2], axis1=1, axis2=2)[:, None, None, None], 7, axis=1)
    return hero.Runs(covs[0], covs[1], covs[0, -1], (rng.standard_normal((41, 4, 2)), rng.standard_normal((41, 4, 2))), 0.25, path,
                     np.array([True, False, False, False, False, True, False]))


def test_the_committed_picture_is_text_on_white_and_small():
    picture = hero.OUTPUT.read_text(encoding="utf-8")
    assert hero.OUTPUT.stat().st_size < 300_000
    assert WHITE.search(picture), "the page of the picture is not white"
    assert ">Collapse to a line</text>" in picture


def test_the_depth_in_the_committed_picture_is_the_blow_up_time():
    spread = tp.GaussianFlow(tp.Softmax(hero.QUERY, -hero.QUERY, -1.0))
    end = float(tp.blow_up_time(spread, tp.Gaussian(np.zeros(2), hero.START)))
    assert f">Blow-up at depth {end:.3f}</text>" in hero.OUTPUT.read_text(encoding="utf-8")


def test_the_same_runs_give_the_same_bytes_with_their_own_numbers(runs):
    first = hero.svg(runs)
    assert first == hero.svg(runs)
    assert WHITE.search(first)
    for text in (">Blow-up at depth 0.250</text>", ">7 starts under one head</text>", ">2 blow up</text>", ">5 freeze</text>"):
        assert text in first


def test_only_coordinates_of_paths_are_rounded(runs):
    paths = re.findall(r'\bd="([^"]*)"', hero.svg(runs))
    assert paths and not any(re.search(r"\.\d{3}", path) for path in paths)


def test_the_starts_are_covariances_of_trace_one_inside_the_disc():
    covs = hero.disc(30)
    assert len(covs) == 648
    assert np.allclose(np.trace(covs, axis1=1, axis2=2), 1.0)
    assert (np.linalg.eigvalsh(covs) > 0).all()
