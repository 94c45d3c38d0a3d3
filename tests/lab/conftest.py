"""Fixtures that watch sweeps."""

import pytest

from tests.lab.walks import TRACES
from theorylab.lab import blocks


@pytest.fixture
def traces():
    TRACES.clear()
    return TRACES


@pytest.fixture
def computed(monkeypatch):
    """First lanes of the blocks that are computed."""
    seen, compute = [], blocks.compute
    monkeypatch.setattr(blocks, "compute", lambda task, mesh, first, *rest: (seen.append(first), compute(task, mesh, first, *rest))[1])
    return seen
