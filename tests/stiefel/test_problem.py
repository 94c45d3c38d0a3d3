"""Problems: objectives, gradients and exact solutions against SciPy, scikit-learn data and autodiff; every form of B; refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import theorylab as tl
from theorylab import stiefel
from theorylab.errors import (
    ArgumentError,
    InfeasibleStartError,
    MatrixError,
    NoClosedFormError,
    NonFiniteInputError,
    PrecisionError,
    ShapeError,
    UnknownNameError,
)

N, P = 6, 3
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, N, N))
A, B = A + A.T, B @ B.T / N + 0.2 * np.eye(N)
DATA = RNG.normal(size=(60, N)) @ RNG.normal(size=(N, N))
OTHER = DATA[:, :4] + RNG.normal(size=(60, 4))
TARGET = RNG.normal(size=(60, P))
PROBLEMS = {
    "gevp": lambda: stiefel.GEVP(A, B, p=P),
    "gevp of rows": lambda: stiefel.GEVP(DATA, OTHER @ RNG.normal(size=(4, N)) + DATA, p=P),
    "lda": lambda: stiefel.LDA(DATA, np.arange(60) % 4, p=P),
    "procrustes": lambda: stiefel.Procrustes(DATA, TARGET, B),
    "own": lambda: stiefel.StiefelProblem(lambda x, a: jnp.sum(a * x**4) + jnp.sum(x), B, p=P, args=np.ones((N, 1))),
    "cca": lambda: stiefel.CCA(DATA, OTHER, p=P, ridge=0.1),
    "three views": lambda: stiefel.MultiviewCCA((DATA, OTHER, DATA[:, 1:] ** 2), p=2),
    "ica": lambda: stiefel.ICA(DATA, p=P, sign=1),
    "ica, gauss": lambda: stiefel.ICA(DATA, p=P, contrast="gauss", sign=-1),
}


@jax.jit
def objective_and_slope(problem, x):
    return jax.value_and_grad(lambda y: problem.at(problem.pack(y)).objective)(x)


def point(problem, seed: int = 0, away: float = 0.1):
    """A point near the manifold."""
    x = problem.start(jax.random.key(seed))
    return jax.tree.map(lambda a: a + away * np.random.default_rng(seed).normal(size=a.shape), x)


@pytest.mark.parametrize("name", PROBLEMS)
def test_starts_are_feasible_and_gradients_are_those_of_the_objective(name):
    problem = PROBLEMS[name]()
    start = problem.start(jax.random.key(3))
    assert problem.metrics(start)["infeasibility"] < 1e-12
    x = point(problem)
    found = problem.unpack(problem.at(problem.pack(x)).gradients)
    value, expected = objective_and_slope(problem, x)
    assert abs(value - problem.metrics(x)["objective"]) < 1e-10 * abs(value)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(one - two).max() < 1e-10 * max(1, np.abs(np.asarray(two)).max())


@pytest.mark.parametrize("name", ["gevp", "gevp of rows", "lda", "cca"])
def test_the_exact_solution_is_feasible_stationary_and_has_no_gap(name):
    problem = PROBLEMS[name]()
    exact = stiefel.closed_form(problem)
    row = problem.metrics(exact.point)
    assert row["infeasibility"] < 1e-11
    assert row["residual"] < 1e-9
    assert row["gap"] < 1e-10
    assert row["error"] < 1e-10
    assert abs(row["objective"] - exact.objective) < 1e-10
    assert problem.metrics(problem.start(jax.random.key(0)))["gap"] > 1e-3


def test_eigenvalues_gap_and_error_agree_with_scipy():
    problem = PROBLEMS["gevp"]()
    values, vectors = scipy.linalg.eigh(A, B)
    exact = stiefel.closed_form(problem)
    assert np.abs(exact.values - values[::-1][:P]).max() < 1e-12
    x = np.asarray(point(problem))
    row = problem.metrics(x)
    assert abs(row["objective"] + np.trace(x.T @ A @ x) / 2) < 1e-12
    y = x @ np.linalg.inv(np.linalg.cholesky(x.T @ B @ x)).T
    assert abs(row["gap"] - (values[-P:].sum() - np.trace(y.T @ A @ y)) / 2) < 1e-12
    root = scipy.linalg.sqrtm(B)
    angles = scipy.linalg.subspace_angles(root @ x, root @ vectors[:, -P:])
    assert abs(row["error"] - np.linalg.norm(np.sin(angles))) < 1e-12


def test_the_error_is_accurate_near_the_solution():
    exact = stiefel.closed_form(PROBLEMS["gevp"]()).point
    rest = scipy.linalg.eigh(A, B)[1][:, :1]
    moved = exact.at[:, :1].add(1e-12 * rest)
    assert abs(PROBLEMS["gevp"]().metrics(moved)["error"] / 1e-12 - 1) < 1e-3


def test_the_residual_vanishes_at_every_critical_point_and_only_there():
    problem, vectors = PROBLEMS["gevp"](), scipy.linalg.eigh(A, B)[1]
    assert problem.metrics(vectors[:, [0, 2, 5]])["residual"] < 1e-12           # a saddle point
    assert problem.metrics(problem.start(jax.random.key(0)))["residual"] > 0.1
    x, y = stiefel.closed_form(PROBLEMS["cca"]()).point
    turned = (x @ np.linalg.qr(np.random.default_rng(0).normal(size=(P, P)))[0], y)      # right subspaces, wrong pairing
    row = PROBLEMS["cca"]().metrics(turned)
    assert row["gap"] < 1e-12
    assert row["residual"] > 0.1


@pytest.mark.slow
def test_iris_discriminants_and_digits_correlations_have_their_known_values():
    from sklearn.datasets import load_digits, load_iris

    iris, images = load_iris(), (load_digits().images / 16 - 0.5) / 0.5
    values = stiefel.closed_form(stiefel.LDA(iris.data, iris.target, p=2)).values
    assert np.abs(values / np.array([32.19192919827802, 0.285391042623078]) - 1).max() < 1e-11
    left, right = images[:, :, :4].reshape(1797, -1), images[:, :, 4:].reshape(1797, -1)
    known = {1e-3: 3.59991999445, 1e-6: 3.62191010250, 0.0: 3.62283405431}                # no ridge: covariances of rank 30 and 31
    for ridge, total in known.items():
        assert abs(-stiefel.CCA(left, right, p=5, ridge=ridge).optimum - total) < 1e-9     # round-off times a condition number of 1e6
    values = stiefel.closed_form(stiefel.CCA(left, right, p=5, ridge=1e-3)).values
    assert np.abs(values - np.array([0.81362574, 0.79992832, 0.69068892, 0.66886005, 0.62681697])).max() < 1e-8


def test_captured_correlation_is_that_of_the_two_subspaces():
    problem = PROBLEMS["cca"]()
    x, y = (np.asarray(part) for part in point(problem))
    centred, other = DATA - DATA.mean(0), OTHER - OTHER.mean(0)
    ca, cb, cab = centred.T @ centred / 60 + 0.1 * np.eye(N), other.T @ other / 60 + 0.1 * np.eye(4), centred.T @ other / 60
    inner = scipy.linalg.inv(scipy.linalg.sqrtm(x.T @ ca @ x)) @ x.T @ cab @ y @ scipy.linalg.inv(scipy.linalg.sqrtm(y.T @ cb @ y))
    row = problem.metrics((x, y))
    assert abs(row["gap"] + problem.optimum + np.linalg.svd(inner, compute_uv=False).sum()) < 1e-12
    assert abs(row["objective"] + np.trace(x.T @ cab @ y)) < 1e-12


def test_procrustes_solutions_agree_with_scipy():
    c = RNG.normal(size=(60, N))
    known, _ = scipy.linalg.orthogonal_procrustes(DATA, c)
    assert np.abs(stiefel.closed_form(stiefel.Procrustes(DATA, c)).point - known).max() < 1e-10
    root = np.real(scipy.linalg.sqrtm(B))
    turned, _ = scipy.linalg.orthogonal_procrustes(DATA @ np.linalg.inv(root), c)
    square = stiefel.Procrustes(DATA, c, B)
    assert np.abs(stiefel.closed_form(square).point - np.linalg.inv(root) @ turned).max() < 1e-10
    for seed in range(4):                                        # starts lie in the component of the solution
        assert np.linalg.det(square.start(jax.random.key(seed))) * np.linalg.det(square.solution) > 0
    nearest = stiefel.closed_form(stiefel.Procrustes(None, TARGET[:N])).point
    left, _, right = np.linalg.svd(TARGET[:N], full_matrices=False)
    assert np.abs(nearest - left @ right).max() < 1e-12
    with pytest.raises(NoClosedFormError, match="no closed form is known for this Procrustes"):
        stiefel.closed_form(PROBLEMS["procrustes"]())


def test_independent_components_have_the_values_of_their_densities():
    rng = np.random.default_rng(1)
    s = np.stack([rng.laplace(size=20000) / 2**0.5, rng.uniform(-(3**0.5), 3**0.5, 20000), rng.normal(size=20000)], 1)
    problem = stiefel.ICA(s, p=3)
    scores = np.eye(3) @ (s - s.mean(0)).T
    assert problem.signs(jnp.asarray(scores)).tolist()[:2] == [1.0, -1.0]
    laplace = stiefel.ICA(s[:, :1], p=1, sign=1).metrics(np.ones((1, 1)))["objective"]
    assert abs(laplace - 0.338236772315562) < 0.005                                        # quadrature; standard error 0.002
    gaussian = stiefel.ICA(s[:, 2:], p=1, sign=1).metrics(np.ones((1, 1)))["objective"]
    assert abs(gaussian - 0.374567207491438) < 0.01
    known = stiefel.ICA(DATA, p=N, mixing=np.linalg.inv(B))
    assert known.metrics(B)["error"] < 1e-12


@pytest.mark.parametrize("form", ["matrix", "operator", "function", "rows", "stream"])
def test_every_form_of_the_constraint_gives_the_same_problem(form):
    rows = np.linalg.cholesky(B).T * N**0.5
    padded = np.concatenate([rows, np.zeros((3, N))]) * ((N + 3) / N) ** 0.5
    forms = {"matrix": B, "operator": stiefel.Gram(jnp.asarray(rows)), "function": lambda x: B @ x, "rows": padded, "stream": tl.Rows(padded, N + 3)}
    f = lambda x, a: jnp.sum(a * x)
    found = stiefel.StiefelProblem(f, forms[form], p=P, args=np.ones((N, P)), n=N if form == "function" else None)
    expected = stiefel.StiefelProblem(f, B, p=P, args=np.ones((N, P)))
    x = point(expected)
    for name, value in expected.metrics(x).items():
        assert abs(found.metrics(x)[name] - value) < 1e-12
    assert np.abs(found.start(jax.random.key(1)) - expected.start(jax.random.key(1))).max() < 1e-12


def test_a_known_optimum_gives_a_gap_after_the_nearest_retraction():
    c = RNG.normal(size=(N, P))
    left, values, right = np.linalg.svd(c, full_matrices=False)
    problem = stiefel.StiefelProblem(lambda x, c: -jnp.sum(c * x), None, p=P, args=c, n=N, optimum=-values.sum(), solution=left @ right)
    x = np.asarray(point(problem))
    u, _, v = np.linalg.svd(x, full_matrices=False)
    assert abs(problem.metrics(x)["gap"] - (values.sum() - np.sum(c * (u @ v)))) < 1e-12
    assert problem.metrics(left @ right)["error"] < 1e-12


@pytest.mark.parametrize(("n", "p"), [(1, 1), (N, 1), (N, N)])
def test_one_column_and_square_points_are_allowed(n, p):
    problem = stiefel.GEVP(A[:n, :n], None, p=p)
    assert abs(problem.optimum + np.linalg.eigvalsh(A[:n, :n])[::-1][:p].sum() / 2) < 1e-12
    assert problem.metrics(problem.start(jax.random.key(0)))["infeasibility"] < 1e-12


# ------------------------------------------------------------------------------- moments, batches, streams


def test_moments_of_a_stream_are_those_of_the_rows_whatever_the_batches():
    shifted = np.concatenate([DATA, OTHER], 1) + 1e6
    rows = tl.Rows(shifted, 7, columns=(N, 4))                   # 60 rows: the last batch is shorter
    total = tl.fold(stiefel.add_moments, rows, stiefel.moments(N, 4))
    exact = np.cov(shifted.T, bias=True)
    assert total.count == 60
    assert np.abs(total.second - exact).max() < 1e-8
    assert np.abs(total.cov(0, 1) - exact[:N, N:]).max() < 1e-8
    weighted = tl.fold(stiefel.add_moments, tl.Rows((DATA, OTHER), 7, remainder="weight"), stiefel.moments(N, 4))
    assert np.abs(weighted.second - exact).max() < 1e-8
    assert stiefel.moments(N, dtype=jnp.float32).scatter.dtype == jnp.float32


def test_constant_columns_carry_no_round_off():
    data = np.concatenate([DATA, np.full((60, 1), 0.1)], axis=1)
    total = tl.fold(stiefel.add_moments, tl.Rows(data, 7), stiefel.moments(N + 1))
    assert np.abs(total.second[N]).max() == 0
    assert abs(stiefel.CCA(data, OTHER, p=2).optimum - stiefel.CCA(DATA, OTHER, p=2).optimum) < 1e-12


def test_a_streamed_problem_measures_with_its_reference_and_steps_with_its_batch():
    memory = stiefel.CCA(DATA, OTHER, p=2, ridge=0.1)
    total = stiefel.add_moments(stiefel.moments(N, 4), (DATA, OTHER))
    x = point(memory)
    for reference in (total, (DATA, OTHER)):
        streamed = stiefel.CCA.streamed(reference, p=2, ridge=0.1)
        for name, value in memory.metrics(x).items():
            assert abs(streamed.metrics(x)[name] - value) < 1e-9
    fed = streamed.feed((DATA, OTHER))
    batch, blocks = fed.batch, fed.pack(x)
    value, gradients = fed.oracle(batch, blocks, batch.images(blocks))
    assert abs(value - memory.metrics(x)["objective"]) < 1e-12
    for one, two in zip(gradients, memory.at(blocks).gradients, strict=True):
        assert np.abs(one - two).max() < 1e-12
    short = streamed.feed(((np.concatenate([DATA, DATA]), np.concatenate([OTHER, OTHER])), np.arange(120) < 60)).batch
    assert np.abs(short.grams(blocks, short.images(blocks))[0] - batch.grams(blocks, batch.images(blocks))[0]).max() < 1e-12
    assert stiefel.CCA.streamed(total, p=2, dtype=jnp.float32).start(jax.random.key(0))[0].dtype == jnp.float32


@pytest.mark.parametrize("order", ["shuffled", "sequential", "independent"])
def test_batches_are_rows_of_the_data_and_a_pass_holds_each_once(order):
    data = np.arange(10.0)[:, None] * np.ones((1, 2))
    problem = stiefel.ICA(data, p=1, center=False)
    seen = []
    for step in range(3):
        operator = problem.sample(jax.random.key(0), 4, step, order, True).batch.operators[0]
        seen += np.asarray(operator.rows[: int(operator.number), 0]).tolist()
        assert float(jnp.abs(operator.rows[int(operator.number):]).max(initial=0)) == 0
    if order == "independent":
        assert set(seen) <= set(range(10))
        assert len(seen) == 12
    else:
        assert sorted(seen) == list(range(10))
    assert (seen == sorted(seen)) == (order == "sequential")


def test_the_signs_of_components_do_not_see_padding():
    problem = stiefel.ICA(DATA, p=P)
    scores = jnp.asarray(np.random.default_rng(0).laplace(size=(P, 50)))
    padded = jnp.concatenate([scores, jnp.zeros((P, 500))], axis=1)
    assert problem.signs(padded, 50.0).tolist() == problem.signs(scores).tolist()


def test_populations_are_sampled_afresh_with_their_covariance():
    problem = stiefel.GEVP(stiefel.Population(B), stiefel.Population(B + np.eye(N)), p=2)
    assert abs(problem.optimum + scipy.linalg.eigh(B, B + np.eye(N), eigvals_only=True)[-2:].sum() / 2) < 1e-12
    held = problem.sample(jax.random.key(0), 20000)
    assert np.abs(held.batch.operators[0].matrix() - B - np.eye(N)).max() < 0.15
    assert np.abs(held.batch.cost.matrix() - B).max() < 0.15
    again = problem.sample(jax.random.key(0), 20000, step=1)
    assert np.abs(again.batch.cost.rows - held.batch.cost.rows).max() > 0.1


def test_wide_views_are_never_squared():
    wide = np.random.default_rng(0).normal(size=(8, 1100)).astype(np.float32)
    problem = stiefel.CCA(wide, wide[:, :1030] ** 2, p=2)
    shapes = [leaf.shape for leaf in jax.tree.leaves(problem)]
    assert all(max(shape, default=0) <= 1100 and shape.count(1100) + shape.count(1030) <= 1 for shape in shapes)
    assert "gap" not in problem.metrics(problem.start(jax.random.key(0)))


@pytest.mark.slow
def test_problems_in_float32_measure_in_float32():
    low, problem = stiefel.CCA(DATA.astype(np.float32), OTHER.astype(np.float32), p=P, ridge=0.1), PROBLEMS["cca"]()
    x = low.start(jax.random.key(0))
    row, same = low.metrics(x), problem.metrics(jax.tree.map(lambda a: jnp.asarray(a, float), x))
    assert {str(v.dtype) for v in row.values()} == {"float32"}
    assert abs(row["objective"] / np.float32(same["objective"]) - 1) < 1e-4
    for made in (stiefel.GEVP(jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32), p=P), stiefel.ICA(DATA.astype(np.float32), p=P)):
        assert {str(v.dtype) for v in jax.eval_shape(made.metrics, jnp.ones((N, P), jnp.float32)).values()} == {"float32"}


def test_problems_are_made_and_solved_inside_vmap():
    stack = jnp.stack([A, 2 * A, A + np.eye(N)])
    found = jax.vmap(lambda a: stiefel.GEVP(a, B, p=P).optimum)(stack)
    assert np.abs(found + np.array([scipy.linalg.eigh(a, B, eigvals_only=True)[-P:].sum() / 2 for a in stack])).max() < 1e-12


def test_whole_numbers_become_real_and_replace_checks_names():
    problem = stiefel.GEVP(np.eye(3, dtype=int), np.diag([1, 2, 3]), p=1)
    assert problem.dtype == jnp.float64
    assert problem.replace(optimum=None).optimum is None
    with pytest.raises(ArgumentError, match="GEVP has no field 'q'"):
        problem.replace(q=1)


# ------------------------------------------------------------------------------- refusals


def test_a_start_far_from_the_manifold_is_refused_where_a_safe_step_is_asked_for():
    problem = PROBLEMS["gevp"]()
    good = problem.start(jax.random.key(0))
    problem.check_start(good, 0.5)
    problem.check_start(2 * good)
    with pytest.raises(InfeasibleStartError, match="begin at retract"):
        problem.check_start(2 * good, 0.5)
    with pytest.raises(InfeasibleStartError, match="smallest eigenvalue is 0"):
        problem.check_start(0 * good)
    with pytest.raises(InfeasibleStartError, match=r"x0\[1\]"):
        cca = PROBLEMS["cca"]()
        x, y = cca.start(jax.random.key(0))
        cca.check_start((x, 3 * y), 0.5)


def test_a_singular_constraint_is_refused_below_rank_p_and_reported_above_it():
    flat = np.diag([1.0, 1.0, 0.0])
    with pytest.raises(MatrixError, match="B must have rank at least p = 3 .* got rank 2"):
        stiefel.GEVP(np.eye(3), flat, p=3)
    with pytest.warns(UserWarning, match="B has rank 2 of 3: points are unbounded along its kernel"):
        stiefel.GEVP(np.eye(3), flat, p=2)
    with pytest.raises(MatrixError, match="the covariance of Y must have rank at least p = 2, got rank 1"):
        stiefel.CCA(DATA, OTHER[:, :1] * np.ones((1, 4)), p=2)


def test_round_off_in_the_constraint_is_accepted():
    noisy = B + 1e-10 * np.triu(np.ones((N, N)))
    assert abs(stiefel.GEVP(A, noisy, p=P).optimum - stiefel.GEVP(A, B, p=P).optimum) < 1e-8
    with pytest.warns(UserWarning, match="rank 2 of 3"):
        stiefel.GEVP(np.eye(3), np.diag([1.0, 1.0, -1e-12]), p=2)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: stiefel.GEVP(A, np.ones((N, N, 1)), p=P), ShapeError, "B must be"),
    (lambda: stiefel.GEVP(A, np.eye(4), p=P), ShapeError, "B must be 6 x 6"),
    (lambda: stiefel.GEVP(A, B + 1e-6 * np.triu(np.ones((N, N)), 1), p=P), MatrixError, "B must be symmetric"),
    (lambda: stiefel.GEVP(np.triu(np.ones((N, N))), B, p=P), MatrixError, "A must be symmetric"),
    (lambda: stiefel.GEVP(A, np.diag([1.0] * 5 + [-1e-6]), p=P), MatrixError, "B must be positive semidefinite, its smallest eigenvalue is -1e-06"),
    (lambda: stiefel.GEVP(A, np.full((N, N), np.nan), p=P), NonFiniteInputError, "B must be finite"),
    (lambda: stiefel.GEVP(A, B.astype(complex), p=P), PrecisionError, "B must hold real numbers"),
    (lambda: stiefel.GEVP(A, B.astype(np.float32), p=P), PrecisionError, "A and B must have one dtype"),
    (lambda: stiefel.GEVP(A, B, p=0), ArgumentError, "p must be a whole number at least 1 and at most 6, got 0"),
    (lambda: stiefel.GEVP(A, B, p=7), ArgumentError, "at most 6, got 7"),
    (lambda: stiefel.GEVP(A, B, p=P, reference="best"), UnknownNameError, "reference"),
    (lambda: stiefel.GEVP(lambda x: x, lambda x: x, p=1), ArgumentError, "n must be given when A is a function"),
    (lambda: stiefel.StiefelProblem(1.0, B, p=P), ArgumentError, "objective must be a function"),
    (lambda: stiefel.StiefelProblem(lambda x, a: x, B, p=P), ShapeError, r"objective must return one number, got shape \(6, 3\)"),
    (lambda: stiefel.StiefelProblem(lambda x, a: jnp.sum(x), B, p=P, args=np.array([np.inf])), NonFiniteInputError, "args"),
    (lambda: stiefel.CCA(DATA, OTHER[:50], p=2), ShapeError, "X and Y must have the same length along axis 0, got X 60, Y 50"),
    (lambda: stiefel.CCA(DATA, OTHER, p=5), ArgumentError, "p must be a whole number at least 1 and at most 4"),
    (lambda: stiefel.CCA(DATA, OTHER, p=2, ridge=-1.0), ArgumentError, "ridge must be a number at least 0"),
    (lambda: stiefel.CCA(DATA, OTHER, p=2, ridge=(1.0,)), ShapeError, "ridge must be one number or one for each of the 2 views"),
    (lambda: stiefel.CCA(DATA, DATA[:, 0], p=1), ShapeError, "Y must have shape"),
    (lambda: stiefel.CCA.streamed(stiefel.moments(3, 3), p=1), ArgumentError, "reference must hold at least 2 rows"),
    (lambda: stiefel.CCA.streamed((DATA, OTHER, DATA), p=1), ShapeError, "reference must hold two views, got 3"),
    (lambda: stiefel.CCA.streamed((DATA, OTHER), p=1).feed((DATA, OTHER[:9])), ShapeError, "same number of rows"),
    (lambda: stiefel.MultiviewCCA((DATA,), p=1), ArgumentError, "views must be at least two arrays"),
    (lambda: stiefel.MultiviewCCA((DATA, DATA, DATA), p=1, reference="value"), ArgumentError, "no closed form is known"),
    (lambda: stiefel.ICA(DATA, p=2, contrast="cosh"), UnknownNameError, "did you mean 'logcosh'"),
    (lambda: stiefel.ICA(DATA, p=2, sign=0), UnknownNameError, "sign"),
    (lambda: stiefel.ICA(DATA, p=2, mixing=np.eye(N)), ShapeError, r"mixing must have shape \(6, 2\)"),
    (lambda: stiefel.LDA(DATA, np.zeros(60), p=1), ArgumentError, "labels must name at least two classes"),
    (lambda: stiefel.LDA(DATA, np.zeros(59), p=1), ShapeError, r"labels must have shape \(60,\)"),
    (lambda: stiefel.Procrustes(np.eye(3), np.ones((4, 2))), ShapeError, "A must have shape"),
    (lambda: stiefel.Procrustes(np.ones((4, 1)), np.ones((4, 2))), ShapeError, "C must have at most 1 columns"),
    (lambda: PROBLEMS["gevp"]().metrics(np.ones((N, 2))), ShapeError, r"x must have shape \(6, 3\), got \(6, 2\)"),
    (lambda: PROBLEMS["cca"]().metrics(np.ones((N, P))), ShapeError, "x must be a tuple of 2 blocks"),
    (lambda: PROBLEMS["gevp"]().sample(jax.random.key(0), 4), ArgumentError, "GEVP holds no rows of data"),
    (lambda: stiefel.closed_form(PROBLEMS["ica"]()), NoClosedFormError, "no closed form is known for this ICA"),
    (lambda: stiefel.add_moments(stiefel.moments(2, 2), (DATA, OTHER)), ShapeError, r"views of \(2, 2\) columns, got \(6, 4\)"),
    (lambda: stiefel.moments(0), ArgumentError, "dims must be a whole number at least 1"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
