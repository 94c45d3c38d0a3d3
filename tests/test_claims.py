"""Every claim of the papers, measured with its fast settings."""

from __future__ import annotations

import pytest

from theorylab.lab import claims

BROKEN = claims.discover()
FAST = sorted(name for name, one in claims.registered().items() if one.settings("fast") is not None)


def test_every_family_can_be_loaded():
    assert BROKEN == {} and FAST


@pytest.mark.parametrize("name", FAST)
def test_fast(name):
    report = claims.run(name)
    report.raise_if_failed()
    assert report.outcomes[0].rows
