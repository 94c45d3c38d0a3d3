"""Finishing steps and certificates: solutions to round-off, bounds that hold, intervals that cover."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import theorylab as tl
from tests.stiefel.test_landing import DATA, OTHER, A, B, N, P, gevp
from theorylab import stiefel
from theorylab.errors import ArgumentError, InfeasibleStartError, NonFiniteInputError, ShapeError
from theorylab.stiefel.certificate import squared_violation

RNG = np.random.default_rng(5)
NEAR = 0.03 * RNG.normal(size=(N, P))


def test_polishing_gives_eigenvectors_in_order_to_round_off():
    vectors = scipy.linalg.eigh(A, B)[1]
    expected = vectors[:, ::-1][:, :P] * np.sign(vectors[np.abs(vectors).argmax(axis=0), range(N)])[::-1][:P]
    turn = np.linalg.qr(RNG.normal(size=(P, P)))[0]
    x = stiefel.polish(gevp(), expected @ turn + NEAR)
    assert np.abs(x - expected).max() < 1e-13
    far = stiefel.polish(gevp(), gevp().start(jax.random.key(0)))                        # the residual never rises
    assert gevp().metrics(far)["residual"] <= gevp().metrics(gevp().start(jax.random.key(0)))["residual"]


@pytest.mark.slow
def test_no_newton_step_leaves_retraction_and_ritz_vectors():
    raw = stiefel.polish(gevp(), stiefel.closed_form(gevp()).point + NEAR, steps=0)
    assert gevp().metrics(raw)["infeasibility"] < 1e-14
    assert 1e-5 < gevp().metrics(raw)["gap"] < 1e-2
    assert np.abs(raw.T @ A @ raw - np.diag(np.diag(raw.T @ A @ raw))).max() < 1e-14
    assert np.all(np.diff(np.diag(raw.T @ A @ raw)) < 0)


@pytest.mark.slow
def test_polished_correlations_are_paired_and_agree_with_the_closed_form():
    problem = stiefel.CCA(DATA, OTHER, p=2, ridge=0.1)
    exact = stiefel.closed_form(problem)
    x, y = stiefel.polish(problem, tuple(part + 0.01 * RNG.normal(size=part.shape) for part in exact.point))
    assert all(np.abs(a - b).max() < 1e-12 for a, b in zip((x, y), exact.point, strict=True))


@pytest.mark.slow
def test_every_problem_is_finished_to_round_off_after_a_rough_run():
    problems = [stiefel.ICA(RNG.laplace(size=(400, N)), p=2, sign=1), stiefel.Procrustes(DATA, OTHER[:, :2], B),
                stiefel.GEVP(lambda x: jnp.asarray(A) @ x, B, p=2), stiefel.GEVP(A, lambda x: jnp.asarray(B) @ x, p=2),
                stiefel.MultiviewCCA((DATA, OTHER, DATA[:, 2:] ** 2), p=2, ridge=0.1)]
    for problem in problems:
        sol = tl.iterate(problem, problem.default_method(), steps=500, stop=tl.Below("residual", 1e-3), every=5)
        row = problem.metrics(stiefel.polish(problem, sol.value))
        assert row["residual"] < 1e-11 and row["infeasibility"] < 1e-13, type(problem).__name__


# ------------------------------------------------------------------------------------------------------- certificates


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.3, 3.0])
def test_the_gap_bound_holds_and_is_sharp_near_the_solution(scale):
    x = stiefel.closed_form(gevp()).point + scale * NEAR / 0.03
    found, row = stiefel.certificate(gevp(), x), gevp().metrics(x)
    assert row["gap"] <= found.gap_bound + 1e-14
    assert abs(found.infeasibility - row["infeasibility"]) < 1e-13
    if 0 < scale <= 0.01:
        assert found.gap_bound < 10 * row["gap"]
    if scale == 0:
        values = scipy.linalg.eigh(A, B, eigvals_only=True)
        assert abs(found.ritz_gap - (values[N - P] - values[N - P - 1])) < 1e-13
        assert found.residual < 1e-14 and found.gap_bound < 1e-14


@pytest.mark.slow
def test_the_bounds_hold_for_correlations_and_singular_matrices():
    problem = stiefel.CCA(DATA, OTHER, p=2)
    for scale in (0.0, 0.02, 0.5):
        x = tuple(part + scale * RNG.normal(size=part.shape) for part in stiefel.closed_form(problem).point)
        found = stiefel.certificate(problem, x)
        assert problem.metrics(x)["gap"] <= found.gap_bound + 1e-14
        assert scale > 0 or found.gap_bound < 1e-14
    low = np.diag([2.0, 1.0, 1.0, 0.0])
    problem = stiefel.GEVP(np.diag([1.0, 0.9, 0.1, 0.0]), low + 1e-3 * np.diag([1.0, 1.0, 1.0, 0.0]), p=2, reference="none")
    x = np.array([[0.1, 0.7], [1.0, 0.0], [0.0, 0.1], [5.0, -2.0]])
    best = scipy.linalg.eigh(np.diag([1.0, 0.9, 0.1]), np.diag([2.001, 1.001, 1.001]), eigvals_only=True)[-2:].sum() / 2
    q = np.linalg.inv(np.linalg.cholesky(x.T @ np.asarray(problem.operator.array) @ x)) @ x.T
    assert best - np.trace(q @ np.diag([1.0, 0.9, 0.1, 0.0]) @ q.T) / 2 <= stiefel.certificate(problem, x).gap_bound + 1e-14


def test_points_within_the_safe_radius_are_safe():
    x = np.asarray(gevp().start(jax.random.key(1))) + NEAR
    radius = stiefel.certificate(gevp(), x, radius=0.4).safe_radius
    assert radius > 0
    root = np.linalg.cholesky(B)
    for seed in range(200):
        u = np.random.default_rng(seed).normal(size=(N, P))
        u *= radius / np.linalg.norm(root.T @ u)
        assert np.linalg.norm((x + u).T @ B @ (x + u) - np.eye(P)) <= 0.4 + 1e-12
    one = stiefel.GEVP(A, B, p=1, reference="none")
    x1 = 1.1 * np.asarray(one.start(jax.random.key(0)))
    reach = stiefel.certificate(one, x1, radius=0.4).safe_radius                          # sharp for one column
    assert abs((1.1 + reach) ** 2 - 1 - 0.4) < 1e-12
    assert stiefel.certificate(gevp(), 2 * x).safe_radius == 0


def test_the_squared_violation_is_unbiased_over_all_batches_of_distinct_rows():
    rows, xt = DATA[:5], jnp.asarray(RNG.normal(size=(2, N)))
    ridge = 0.3 * np.eye(N)
    mean = np.mean([float(squared_violation(stiefel.Gram(rows[list(some)], None, jnp.asarray(ridge)), xt))
                    for some in itertools.product(range(5), repeat=2) if len(set(some)) == 2])
    pairs = [np.sum((xt @ (np.outer(rows[i], rows[i]) + ridge) @ xt.T - np.eye(2)) * (xt @ (np.outer(rows[j], rows[j]) + ridge) @ xt.T - np.eye(2)))
             for i in range(5) for j in range(5) if i != j]
    assert abs(mean - np.mean(pairs)) < 1e-12 * abs(mean)


def test_the_interval_covers_the_violation_that_no_one_sees():
    rng, root = np.random.default_rng(0), np.linalg.cholesky(B)
    x = 1.2 * np.asarray(stiefel.closed_form(gevp()).point)
    truth, covered = np.linalg.norm(x.T @ B @ x - np.eye(P)), 0
    problem = stiefel.ICA.streamed(DATA, p=P)                                            # its reference has nothing to do with these rows
    problem = problem.replace(centre=jnp.zeros(N))
    for _ in range(40):
        rows = tl.Rows(rng.normal(size=(600, N)) @ root.T, 30)
        low, high = stiefel.certificate(problem, x, rows, confidence=0.9).interval
        covered += low <= truth <= high
    assert 30 <= covered <= 40                                                           # 36 expected


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: stiefel.polish(gevp(), np.ones((N, 2))), ShapeError, r"x must have shape \(6, 3\)"),
    (lambda: stiefel.polish(gevp(), np.ones((N, P))), InfeasibleStartError, "begin at retract"),
    (lambda: stiefel.polish(gevp(), np.full((N, P), np.nan)), NonFiniteInputError, "x must be finite"),
    (lambda: stiefel.polish(gevp(), NEAR, steps=-1), ArgumentError, "steps must be a whole number at least 0"),
    (lambda: stiefel.certificate(gevp(), np.full((N, P), np.inf)), NonFiniteInputError, "x must be finite"),
    (lambda: stiefel.certificate(gevp(), NEAR, radius=1.0), ArgumentError, "radius must be a number above 0 and below 1"),
    (lambda: stiefel.certificate(gevp(), NEAR, confidence=0.0), ArgumentError, "confidence must be"),
    (lambda: stiefel.certificate(stiefel.ICA.streamed(DATA, p=P), NEAR, [DATA]), ArgumentError, "at least two for an interval, got 1"),
    (lambda: stiefel.certificate(stiefel.ICA.streamed(DATA, p=P), NEAR, [DATA[:1]]), ArgumentError, "at least two rows"),
    (lambda: stiefel.certificate(gevp(), NEAR, [(DATA,), (DATA,)]), ShapeError, "batch must be a pair of arrays of rows"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
