"""The contract on bad input and on edges: every item is refused in a sentence that names the argument, or works."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.stiefel.test_landing import DATA, OTHER, A, B, N, gevp, nothing, walk
from theorylab import stiefel
from theorylab.errors import ArgumentError, InfeasibleStartError, MatrixError, NonFiniteInputError, PrecisionError, ShapeError

X = np.eye(N, 2)
HOLE = np.where(np.arange(N)[:, None] + np.arange(N) == 3, np.nan, B)
SKEWED = B + 1e-6 * np.triu(np.ones((N, N)), 1)
NEGATIVE = B - 1.5 * np.eye(N)


@pytest.mark.parametrize(("call", "error", "words"), [
    # points
    (lambda: stiefel.relative(X[:, 0], X[:, 0], X[:, 0]), ShapeError, "gradient must have shape"),
    (lambda: stiefel.landing_field(X.T, X.T, X.T), ShapeError, "at most as many columns as rows"),
    (lambda: stiefel.infeasibility(np.ones((3, 0))), ShapeError, "X must not be empty"),
    (lambda: stiefel.infeasibility(X + 1j), PrecisionError, "X must hold real numbers"),
    (lambda: stiefel.infeasibility(np.where(X > 0, np.inf, X)), NonFiniteInputError, "X must be finite"),
    (lambda: stiefel.retract(0 * X), MatrixError, "columns of X must be independent"),
    # matrices
    (lambda: stiefel.GEVP(A, B[:, :4], p=2), ShapeError, "B must"),
    (lambda: stiefel.GEVP(A, B[:4, :4], p=2), ShapeError, "B must be 6 x 6"),
    (lambda: stiefel.GEVP(A, SKEWED, p=2), MatrixError, "B must be symmetric"),
    (lambda: stiefel.GEVP(A, NEGATIVE, p=2), MatrixError, "B must be positive semidefinite, its smallest eigenvalue is"),
    (lambda: stiefel.GEVP(A, HOLE, p=2), NonFiniteInputError, "B must be finite"),
    (lambda: stiefel.GEVP(A + 1j * B, B, p=2), PrecisionError, "A must hold real numbers"),
    (lambda: stiefel.GEVP(A, B, p=0), ArgumentError, "p must be a whole number at least 1"),
    (lambda: stiefel.GEVP(A, B, p=N + 1), ArgumentError, "at most 6"),
    (lambda: stiefel.GEVP(A, np.diag([1.0, 1, 0, 0, 0, 0]), p=3), MatrixError, "B must have rank at least p = 3"),
    (lambda: stiefel.CCA(DATA, OTHER[:-1], p=2), ShapeError, "same length along axis 0"),
    (lambda: stiefel.CCA(DATA, np.hstack([OTHER[:, :1]] * 3), p=2), MatrixError, "the covariance of Y must have rank at least p = 2"),
    (lambda: stiefel.StiefelProblem(nothing, np.stack([B, B]), p=2), ShapeError, "B must be a square matrix"),
    (lambda: stiefel.StiefelProblem(nothing, np.diag([1.0, 0, 0]), p=2), MatrixError, "B must have rank at least p = 2 .*, got rank 1"),
    (lambda: stiefel.GEVP(A, np.diag([1.0, 0, 0, 0, 0, 0]), p=2, reference="none"), MatrixError, "B must have rank at least p = 2"),
    (lambda: stiefel.ICA(np.outer(DATA[:, 0], np.ones(3)), p=2), MatrixError, "the covariance of X must have rank at least p = 2 .*, got rank 1"),
    (lambda: gevp().metrics(X + 1j), PrecisionError, "x must hold real numbers"),
    (lambda: stiefel.CCA.streamed((DATA, OTHER), p=2).feed((DATA, DATA)), ShapeError, r"batch must have views of \(6, 4\) columns, got \(6, 6\)"),
    (lambda: stiefel.ICA.streamed(DATA, p=2).feed(OTHER), ShapeError, "batch must have 6 columns, got 4"),
    # numbers
    (lambda: stiefel.Landing(0.0), ArgumentError, "step_size must be above 0"),
    (lambda: stiefel.Landing(-0.1), ArgumentError, "step_size must be above 0"),
    (lambda: stiefel.StochasticLanding(float("nan")), ArgumentError, "step_size must be above 0"),
    (lambda: stiefel.Landing(0.1, attraction=-1.0), ArgumentError, "attraction must be at least 0"),
    (lambda: stiefel.Landing(0.1, safe=0.0), ArgumentError, "safe must be a number above 0 and below 1"),
    (lambda: stiefel.safe_step_size(X, X, radius=1.0), ArgumentError, "radius must be a number above 0 and below 1"),
    # batches
    (lambda: stiefel.u_statistic_field(DATA[:2], np.ones((2, 2)), X), ArgumentError, "at least 3 rows"),
    (lambda: stiefel.StochasticLanding(0.1, 2, estimator="two_sample"), ArgumentError, "batch_size must be at least 3"),
    (lambda: stiefel.CCA.streamed((DATA, OTHER), p=2).feed((DATA, OTHER[:9])), ShapeError, "same number of rows, got \\[60, 9\\]"),
    (lambda: stiefel.CCA.streamed((DATA, OTHER), p=2).feed(DATA), ShapeError, "batch must hold 2 arrays of rows"),
    # starts
    (lambda: tl.iterate(gevp(), stiefel.Landing(0.1, safe=0.5), 3 * gevp().start(jax.random.key(0)), steps=1), InfeasibleStartError,
     "begin at retract"),
    (lambda: tl.iterate(gevp(), stiefel.Landing(0.1), np.ones((N, 3)), steps=1), InfeasibleStartError, "smallest eigenvalue"),
    (lambda: tl.iterate(gevp(), stiefel.Landing(0.1), np.full((N, 3), np.nan), steps=1), NonFiniteInputError, "x0 must be finite"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_whole_numbers_are_promoted_without_a_warning_and_a_low_rank_is_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stiefel.infeasibility(np.array([[2], [0]])) == 3
        assert stiefel.GEVP(np.diag([3, 2, 1]), None, p=1).dtype == jnp.float64
    with pytest.warns(UserWarning, match="B has rank 4 of 6: .*add a ridge"):
        stiefel.GEVP(np.zeros((N, N)), np.diag([1.0, 1, 1, 1, 0, 0]), p=2)


def test_a_stream_of_rows_as_the_constraint_makes_a_streamed_problem_and_an_objective_may_take_the_point_alone():
    problem = stiefel.StiefelProblem(lambda x: -jnp.sum(x), tl.Rows(DATA, 20), p=2)
    assert problem.fed and np.abs(problem.operator.matrix() - DATA[:20].T @ DATA[:20] / 20).max() < 1e-12
    assert abs(problem.metrics(np.ones((N, 2)) / 10)["objective"] + 0.2 * N) < 1e-12
    function = stiefel.GEVP(lambda x: 2 * x, lambda x: x, p=2, n=4)
    assert function.dims == (4,) and function.metrics(np.eye(4, 2))["objective"] == -2


def test_points_take_the_precision_of_the_data():
    low = stiefel.GEVP(np.diag([3.0, 2, 1]).astype(np.float32), np.eye(3, dtype=np.float32), p=1)
    assert low.pack(np.eye(3, 1))[0].dtype == jnp.float32
    assert gevp().pack(np.ones((N, 3), np.float32))[0].dtype == jnp.float64


def test_a_pass_of_one_batch_is_the_whole_data():
    problem = stiefel.ICA(DATA, p=2, sign=1)
    whole = problem.exact().operators[0].matrix()
    for order in ("shuffled", "sequential"):
        batch = problem.sample(jax.random.key(0), 60, 5, order).batch
        assert np.abs(batch.operators[0].matrix() - whole).max() < 1e-14


def test_a_start_outside_the_unit_distance_lands_without_a_safe_step():
    problem = stiefel.StiefelProblem(nothing, B, p=2)
    x0 = 1.6 * problem.start(jax.random.key(0))
    assert stiefel.infeasibility(x0, B) > 1
    stiefel.Landing(0.25).check(problem, x0)
    assert stiefel.infeasibility(problem.unpack(walk(stiefel.Landing(0.25), problem, x0, 60).point.x), B) < 1e-9
