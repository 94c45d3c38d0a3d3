from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize, nnls

from theorylab import acvi
from theorylab.acvi import projections
from theorylab.errors import ArgumentError, NoClosedFormError, ShapeError

N = 6


def simplex_by_enumeration(v, total=1.0):
    """The projection of least violation of its optimality conditions over all supports."""
    best, where = np.inf, v
    for size in range(1, len(v) + 1):
        for support in itertools.combinations(range(len(v)), size):
            inside = np.isin(np.arange(len(v)), support)
            shift = (v[inside].sum() - total) / size
            x = np.where(inside, v - shift, 0.0)
            violation = max(-x.min(), np.max(v[~inside] - shift, initial=0.0))
            if violation < best:
                best, where = violation, x
    return where


@given(st.lists(st.floats(-10, 10), min_size=N, max_size=N), st.floats(0.1, 5.0))
@settings(max_examples=30, deadline=None)
def test_the_simplex_projection_matches_enumeration(entries, total):
    v = np.asarray(entries)
    np.testing.assert_allclose(np.asarray(acvi.project_simplex(v, total)), simplex_by_enumeration(v, total), atol=1e-13)


def test_the_simplex_projection_keeps_ties_and_its_sum_at_scale(rng):
    assert np.array_equal(acvi.project_simplex(np.ones(4)), np.full(4, 0.25))
    v = rng.standard_normal(100_000) * 1e3
    x = np.asarray(acvi.project_simplex(v))
    assert abs(x.sum() - 1) < 1e-12 and x.min() >= 0
    single = acvi.project_simplex(v.astype(np.float32))
    assert single.dtype == jnp.float32 and abs(float(single.sum()) - 1) < 1e-3


@given(st.lists(st.floats(-10, 10), min_size=N, max_size=N), st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_a_box_with_a_sum_satisfies_its_optimality_conditions(entries, part):
    low, high = np.array([-1.0, 0, 0, 0.5, -2, 0]), np.array([1.0, 3, 0.5, 1, 2, 10])
    v, total = np.asarray(entries), low.sum() + part * (high - low).sum()
    x = np.asarray(jax.jit(projections.box_sum)(jnp.asarray(v), jnp.asarray(low), jnp.asarray(high), jnp.asarray(total)))
    assert abs(x.sum() - total) < 1e-12 and np.all(x >= low) and np.all(x <= high)
    below, above = (v - x)[x > low], (v - x)[x < high]  # v - x is the multiplier; at most it where not at the lower wall, and conversely
    assert below.min(initial=np.inf) >= above.max(initial=-np.inf) - 1e-11


def test_hildreth_solves_the_dual_that_nnls_solves(rng):
    A, b, v = rng.standard_normal((15, N)), rng.uniform(0.1, 1, 15), 3 * rng.standard_normal(N)
    # min |y - v| over A y <= b is a least-distance problem: nonnegative least squares on [A'; (A v - b)'] against (0, ..., 0, -1)
    E = np.vstack([-A.T, (A @ v - b)[None]])
    u, _ = nnls(E, np.append(np.zeros(N), 1.0))
    r = E @ u - np.append(np.zeros(N), 1.0)
    exact = v - r[:N] / r[N]
    np.testing.assert_allclose(np.asarray(acvi.hildreth(v, A, b)), exact, atol=1e-9)


def test_projecting_on_the_most_violated_halfspace_is_not_the_projection(rng):
    A, b, v = rng.standard_normal((10, 3)), np.full(10, 0.3), 4 * np.ones(3)
    x = v.copy()
    for _ in range(10_000):
        worst = np.argmax((A @ x - b) / np.linalg.norm(A, axis=1))
        excess = A[worst] @ x - b[worst]
        if excess <= 1e-13:
            break
        x = x - A[worst] * excess / (A[worst] @ A[worst])
    y = np.asarray(acvi.hildreth(v, A, b))
    assert (A @ y - b).max() < 1e-12 and (A @ x - b).max() < 1e-10
    assert np.linalg.norm(y - v) < np.linalg.norm(x - v) - 1e-3


def test_dykstra_agrees_with_the_sorted_projection(rng):
    v = jnp.asarray(rng.standard_normal(N))
    found = acvi.dykstra([lambda x: jnp.maximum(x, 0), lambda x: x - (jnp.sum(x) - 1) / N], v)
    np.testing.assert_allclose(np.asarray(found), np.asarray(acvi.project_simplex(v)), atol=1e-12)


ROWS = np.random.default_rng(3).standard_normal((2, N))
INSIDE = np.array([0.2, 0.5, 0.7, 0.4, 0.3, 0.9])
POLY = np.random.default_rng(4).standard_normal((9, N))
LEVEL = POLY @ INSIDE + 0.3
KINDS = {
    "nonnegative": (acvi.Nonnegative(), lambda x: x), "box": (acvi.Box(-0.5, 1.0), lambda x: np.r_[x + 0.5, 1 - x]),
    "halfspace": (acvi.HalfSpace(POLY[0], LEVEL[0]), lambda x: (LEVEL - POLY @ x)[:1]),
    "ball": (acvi.Ball(0.5, 0.8), lambda x: 0.64 - np.sum((x - 0.5) ** 2)),
    "polyhedron": (acvi.Polyhedron(POLY, LEVEL), lambda x: LEVEL - POLY @ x),
    "smooth": (acvi.Smooth(lambda x, a: jnp.sum(x**4) - 1.0), lambda x: 1.0 - np.sum(x**4)),
    "product": (acvi.Product([(acvi.Ball(0.5, 0.8), 4), (acvi.Nonnegative(), 2)]), lambda x: np.r_[0.64 - np.sum((x[:4] - 0.5) ** 2), x[4:]]),
}
EQUATIONS = {"matrix": ((ROWS, ROWS @ INSIDE), ROWS), "blocks": (acvi.BlockSimplex((2, 4), [INSIDE[:2].sum(), INSIDE[2:].sum()]),
                                                               np.array([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]))}


def affine(kind, equations):
    return acvi.AffineVariationalInequality(np.eye(N), None, KINDS[kind][0], EQUATIONS[equations][0])


@pytest.mark.parametrize(("kind", "equations"), [("nonnegative", "matrix"), ("box", "blocks"), ("ball", "matrix"), ("polyhedron", "matrix"),
                                                  ("smooth", "blocks"), ("product", "blocks")])
def test_the_projection_on_inequalities_and_equations_matches_a_general_solver(kind, equations):
    problem, matrix = affine(kind, equations), EQUATIONS[equations][1]
    v = 2 * np.random.default_rng(5).standard_normal(N)
    x = np.asarray(problem.project(jnp.asarray(v)))
    reference = minimize(lambda z: np.sum((z - v) ** 2) / 2, INSIDE, jac=lambda z: z - v, method="SLSQP", options={"ftol": 1e-14, "maxiter": 300},
                         constraints=[{"type": "ineq", "fun": KINDS[kind][1]}, {"type": "eq", "fun": lambda z: matrix @ (z - INSIDE)}]).x
    assert float(problem.infeasibility(jnp.asarray(x))) < 1e-12
    assert np.linalg.norm(x - v) <= np.linalg.norm(reference - v) + 1e-7      # the solver may step outside by 1e-8
    np.testing.assert_allclose(x, reference, atol=1e-6)


@pytest.mark.slow
def test_cones_and_equations_without_a_matrix_go_through_dykstra(rng):
    trace = np.eye(2).reshape(1, 4)
    spectraplex = acvi.AffineVariationalInequality(np.eye(4), None, acvi.Cone("psd"), (trace, np.ones(1)))
    V = rng.standard_normal((2, 2))
    values, vectors = np.linalg.eigh((V + V.T) / 2)
    exact = (vectors * simplex_by_enumeration(values, 1.0)) @ vectors.T
    np.testing.assert_allclose(np.asarray(spectraplex.project(jnp.asarray(V.reshape(-1)))), exact.reshape(-1), atol=1e-9)
    with pytest.raises(NoClosedFormError, match="cone with equations"):
        spectraplex.support(jnp.ones(4))
    free = acvi.MatrixFree(lambda x, a: a @ x, lambda z, a: a.T @ z, ROWS @ INSIDE, jnp.asarray(ROWS))
    problem = acvi.AffineVariationalInequality(np.eye(N), None, acvi.Nonnegative(), free)
    v = jnp.asarray(rng.standard_normal(N))
    np.testing.assert_allclose(np.asarray(problem.project(v)), np.asarray(affine("nonnegative", "matrix").project(v)), atol=1e-8)
    with pytest.raises(NoClosedFormError, match="without a matrix"):
        problem.support(v)


@pytest.mark.parametrize("kind", ["box", "ball", "smooth"])
def test_the_support_function_with_equations_is_the_maximum(kind):
    problem, s = affine(kind, "blocks"), np.random.default_rng(6).standard_normal(N)
    matrix = EQUATIONS["blocks"][1]
    limits = [(-10, 10)] * N
    reference = minimize(lambda z: -s @ z, INSIDE, jac=lambda z: -s, method="SLSQP", bounds=limits, options={"ftol": 1e-14, "maxiter": 500},
                         constraints=[{"type": "ineq", "fun": KINDS[kind][1]}, {"type": "eq", "fun": lambda z: matrix @ (z - INSIDE)}])
    assert np.abs(reference.x).max() < 9
    assert float(problem.support(jnp.asarray(s))) == pytest.approx(-reference.fun, abs=1e-7)


def test_a_batch_of_projections_is_the_projections_of_the_batch(rng):
    batch = jnp.asarray(rng.standard_normal((5, N)))
    for kind, equations in (("nonnegative", "blocks"), ("nonnegative", "matrix")):
        problem = affine(kind, equations)
        together = jax.jit(jax.vmap(problem.project))(batch)
        np.testing.assert_allclose(np.asarray(together), np.stack([problem.project(v) for v in batch]), atol=1e-13)


@pytest.mark.parametrize("kind", [acvi.Nonnegative(), acvi.Box(0.0, None), acvi.HalfSpace(-np.ones(2), 0.0), acvi.Ball(1.0, 1.0),
                                  acvi.Polyhedron(-np.eye(2), np.zeros(2))], ids=lambda kind: type(kind).__name__)
def test_contradicting_constraints_are_refused(kind):
    with pytest.raises(ArgumentError, match="no common point"):
        acvi.AffineVariationalInequality(np.eye(2), None, kind, (np.ones((1, 2)), np.array([-1.0])))


def test_constraints_that_meet_at_the_boundary_only_are_warned_about():
    with pytest.warns(UserWarning, match="no central path"):
        acvi.AffineVariationalInequality(np.eye(2), None, acvi.Nonnegative(), (np.ones((1, 2)), np.zeros(1)))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: acvi.project_simplex(np.ones((2, 2))), ShapeError, "v must have shape"),
    (lambda: acvi.project_simplex(np.ones(2), 0.0), ArgumentError, "total must be a number above 0"),
    (lambda: acvi.hildreth(np.ones(3), np.ones((2, 2)), np.ones(2)), ShapeError, "v must have shape"),
    (lambda: acvi.hildreth(np.ones(2), np.ones((2, 2)), np.ones(3)), ShapeError, "b must have shape"),
    (lambda: acvi.hildreth(np.ones(2), np.zeros((1, 2)), np.ones(1)), ArgumentError, "no zero row"),
    (lambda: acvi.hildreth(np.ones(2), np.ones((1, 2)), np.ones(1), cycles=0), ArgumentError, "cycles"),
    (lambda: acvi.dykstra([], np.ones(2)), ArgumentError, "at least one set"),
    (lambda: acvi.dykstra([lambda x: x], np.ones((2, 1))), ShapeError, "v must have shape"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_simplex_level_is_that_of_a_sorted_running_sum(rng):
    for size, scale, total in ((1, 1.0, 1.0), (7, 1e8, 1e-3), (200, 1e-6, 1.0), (200, 1.0, 50.0), (200, 1e3, 1.0)):
        v = scale * rng.standard_normal(size)
        down, counts = -np.sort(-v), np.arange(1, size + 1)
        sums = np.cumsum(down) - total
        active = np.flatnonzero(down > sums / counts)[-1]
        expected = np.maximum(v - sums[active] / counts[active], 0)
        np.testing.assert_allclose(acvi.project_simplex(v, total), expected, atol=1e-14 * max(scale, total))


def test_the_derivative_of_the_simplex_projection_centres_the_support():
    v = jnp.array([1.0, 0.5, -1.0])
    expected = np.array([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    for derivative in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(derivative(acvi.project_simplex)(v), expected, atol=1e-15)
