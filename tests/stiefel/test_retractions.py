"""Retractions against SciPy, and Newton-Schulz against the polar factor."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings, strategies as st

from theorylab import stiefel
from theorylab.errors import MatrixError, ShapeError, UnknownNameError

N, P = 6, 3
KINDS = ["cholesky", "polar", "newton_schulz"]


def instance(seed: int, violation: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(N, N)))[0]
    b = q @ np.diag(np.geomspace(1, 0.05, N)) @ q.T
    x = rng.normal(size=(N, P))
    h = rng.normal(size=(P, P))
    h = violation * (h + h.T) / np.linalg.norm(h + h.T)
    return (b + b.T) / 2, x @ np.linalg.inv(np.linalg.cholesky(x.T @ b @ x)).T @ np.linalg.cholesky(np.eye(P) + h).T


@given(st.integers(0, 10**6), st.sampled_from(KINDS))
@settings(max_examples=15, deadline=None)
def test_every_retraction_lands_on_the_manifold_and_keeps_the_span(seed, kind):
    b, x = instance(seed)
    y = np.asarray(stiefel.retract(x, b, kind))
    assert np.abs(y.T @ b @ y - np.eye(P)).max() < 1e-14 * N
    assert np.abs(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).max() < 1e-12


def test_cholesky_keeps_the_flag_and_polar_is_the_nearest_point():
    b, x = instance(0)
    gram = x.T @ b @ x
    assert np.abs(stiefel.retract(x, b) - scipy.linalg.solve_triangular(np.linalg.cholesky(gram), x.T, lower=True).T).max() < 1e-13
    polar = x @ np.linalg.inv(scipy.linalg.sqrtm(gram))
    assert np.abs(stiefel.retract(x, b, "polar") - polar).max() < 1e-13
    assert np.abs(stiefel.retract(x, b, "newton_schulz") - polar).max() < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_of_the_manifold_stays(kind):
    b, x = instance(1, violation=0.0)
    assert np.abs(stiefel.retract(x, b, kind) - x).max() < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_the_metric_may_be_a_function_rows_or_nothing_and_precision_stays(kind):
    b, x = instance(2, 0.3)
    expected = stiefel.retract(x, b, kind)
    assert np.abs(stiefel.retract(x, lambda y: b @ y, kind) - expected).max() < 1e-13
    rows = np.concatenate([np.linalg.cholesky(b).T, np.zeros((2, N))]) * np.sqrt(N + 2)
    assert np.abs(stiefel.retract(x, rows, kind) - expected).max() < 1e-12
    q = np.linalg.qr(x)[0]
    assert np.abs(stiefel.retract(q * 1.1, None, kind) - q).max() < 1e-13
    low = stiefel.retract(jnp.asarray(x, jnp.float32), jnp.asarray(b, jnp.float32), kind)
    assert low.dtype == jnp.float32
    assert np.abs(low.T @ b.astype(np.float32) @ low - np.eye(P, dtype=np.float32)).max() < 1e-5
    assert stiefel.retract(jnp.asarray(x, jnp.float32), lambda y: jnp.asarray(b, jnp.float32) @ y, kind).dtype == jnp.float32


def test_compiled_code_and_one_or_all_columns():
    b, x = instance(3, 0.5)
    assert np.abs(jax.jit(lambda x: stiefel.retract(x, b, "polar"))(x) - stiefel.retract(x, b, "polar")).max() < 1e-14
    one, full = stiefel.retract(x[:, :1], b), stiefel.retract(np.eye(N), b)
    assert abs(one.T @ b @ one - 1) < 1e-14
    assert np.abs(full.T @ b @ full - np.eye(N)).max() < 1e-13


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: stiefel.retract(np.ones((3, 2))), MatrixError, "columns of X must be independent"),
    (lambda: stiefel.retract(2 * np.eye(3), None, "newton_schulz"), MatrixError, r"eigenvalues in \(0, 3\)"),
    (lambda: stiefel.retract(np.eye(3), None, "qr"), UnknownNameError, "kind"),
    (lambda: stiefel.retract(np.ones((2, 3))), ShapeError, "X must have at most as many columns"),
    (lambda: stiefel.retract(np.eye(3), np.eye(2)), ShapeError, "B must be 3 x 3"),
    (lambda: stiefel.retract(np.eye(3), np.diag([1.0, 1.0, -1.0])), MatrixError, "B must be positive semidefinite, its smallest eigenvalue is -1"),
    (lambda: stiefel.retract(np.eye(3), np.triu(np.ones((3, 3)))), MatrixError, "B must be symmetric"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
