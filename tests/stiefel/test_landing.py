"""Landing and stochastic landing: published numbers, exact solutions, unbiased steps, safe steps, memory and refusals."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import theorylab as tl
from theorylab import stiefel
from theorylab.errors import ArgumentError, InfeasibleStartError, NonFiniteError, ShapeError
from theorylab.stiefel.contract import Batch

N, P = 6, 3
RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(N, N)))[0]
A, B = np.diag(np.linspace(2.0, 0.1, N)), BASIS @ np.diag(np.linspace(1.0, 0.4, N)) @ BASIS.T
B = (B + B.T) / 2
DATA = RNG.normal(size=(60, N)) @ RNG.normal(size=(N, N)) / 2
OTHER = DATA[:, :4] + RNG.normal(size=(60, 4))


def gevp() -> stiefel.GEVP:
    return stiefel.GEVP(A, B, p=P)


@jax.jit
def walk(method, problem, x0, steps):
    """The state after some steps, without history."""
    method = method.prepare(problem)
    start = jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), method.init(problem, x0, key=jax.random.key(0)))
    return jax.lax.fori_loop(0, steps, lambda k, s: method.step(problem, s, key=None), start)


def published(n: int, p: int) -> tuple:
    """The instance of the paper's figure 1, at any size, from its published seed."""
    rng = np.random.RandomState(123)
    spectra = np.linspace(1, 1 / 100, n), np.exp(np.log(1 / n) * (1 - np.linspace(n, 1, n) / n))
    bases = [np.linalg.qr(rng.randn(n, n))[0] for _ in range(2)]
    a, b = (q @ np.diag(values) @ q.T for q, values in zip(bases, spectra))
    q = np.linalg.qr(rng.randn(n, p))[0]
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return a, b, scipy.linalg.solve_triangular(np.linalg.cholesky(q.T @ b @ q), q.T, lower=True).T


@pytest.mark.parametrize("last", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_run_of_the_official_code_is_reproduced(last):
    """Figure 1 at n = 100, p = 50: objective, feasible gap and squared violation of the official code at three iterations."""
    a, b, x0 = published(100, 50)
    problem = stiefel.GEVP(a, b, p=50)
    best = float(problem.optimum)
    assert abs(best + 287.723092120898) < 1e-10
    method = stiefel.Landing(20.0, 0.1, normal="gradient", safe=1.0, rule="official", margin=1.0)
    run = tl.iterate(problem, method, x0, steps=last).history
    table = {1: (7.4012e-1, 7.4108e-1, 7.2346e-4), 100: (1.4444e-2, 1.6616e-2, 4.7580e-5), 1000: (8.3997e-5, 8.4035e-5, 3.4649e-12)}
    for k, expected in ((k, row) for k, row in table.items() if k <= last):
        found = (run["objective"][k] - best) / abs(best), run["gap"][k] / abs(best), run["infeasibility"][k] ** 2 / 4
        assert np.abs(np.array(found) / expected - 1).max() < 2e-4                       # the digits that are published


def test_a_correction_after_each_step_keeps_the_iterates_feasible():
    a, b, x0 = published(100, 50)
    problem = stiefel.GEVP(a, b, p=50, reference="value")
    early = walk(stiefel.Landing(40.0, normal="correction"), problem, x0, 50)
    late = walk(stiefel.Landing(40.0, normal="correction"), problem, x0, 600)
    assert problem.metrics(problem.unpack(early.point.x))["infeasibility"] < 1e-4
    row = problem.metrics(problem.unpack(late.point.x))
    assert row["infeasibility"] < 1e-11
    assert row["gap"] < 1e-3 * abs(problem.optimum)


def test_landing_finds_the_eigenvectors_and_never_leaves_the_safe_region():
    problem = gevp()
    sol = tl.iterate(problem, stiefel.Landing(step_size=0.5, safe=0.5), steps=20_000, stop=tl.Below("gap", 1e-10))
    assert sol.status.name == "CONVERGED"
    assert sol.history["infeasibility"].max() <= 0.5
    vectors = scipy.linalg.eigh(A, B)[1][:, -P:]
    root = scipy.linalg.sqrtm(B)
    assert scipy.linalg.subspace_angles(root @ np.asarray(sol.value), root @ vectors).max() < 1e-4
    assert sol.history["step_size"][0] == 0
    assert set(sol.history.columns) >= {"objective", "gap", "infeasibility", "residual", "error", "step_size", "field_norm"}


@pytest.mark.slow
def test_steps_that_are_too_long_are_cut():
    again = tl.iterate(gevp(), stiefel.Landing(step_size=50.0, safe=0.4), steps=300)
    assert again.history["infeasibility"].max() <= 0.4
    assert again.history["step_size"].max() < 50.0


@pytest.mark.parametrize("options", [
    {"tangent": "plam", "safe": 0.3}, {"tangent": "relative_solved", "normal": "correction"},
    pytest.param({"tangent": "relative_solved"}, marks=pytest.mark.slow),
    pytest.param({"tangent": "riemannian", "step_size": 0.05, "attraction": 8.0}, marks=pytest.mark.slow),
    pytest.param({"normal": "gradient", "safe": 0.3, "rule": "rigorous"}, marks=pytest.mark.slow),
], ids=lambda options: "-".join(map(str, options.values())))
def test_every_field_lands_on_the_same_solution(options):
    problem = gevp()
    state = walk(stiefel.Landing(**({"step_size": 0.3} | options)), problem, problem.start(jax.random.key(1)), 1500)
    row = problem.metrics(problem.unpack(state.point.x))
    assert row["gap"] < 1e-9
    assert row["infeasibility"] < 1e-9
    assert np.abs(problem.unpack(state.point.images) - B @ problem.unpack(state.point.x)).max() < 1e-14     # no drift of carried products


@pytest.mark.slow
def test_the_default_method_solves_problems_with_a_known_solution():
    problem = stiefel.CCA(DATA, OTHER, p=2, ridge=0.1)
    sol = tl.solve(problem, tolerance=1e-8)
    assert sol.steps < 200
    assert np.abs(sol.history["objective"][-1] - stiefel.closed_form(problem).objective) < 1e-6
    problem = stiefel.Procrustes(None, DATA[:N, :2])
    state = walk(problem.default_method(), problem, problem.start(jax.random.key(0)), 200)
    assert problem.metrics(problem.unpack(state.point.x))["gap"] < 1e-9


@pytest.mark.slow
def test_a_function_as_constraint_and_an_objective_of_ones_own():
    c = RNG.normal(size=(N, 2))
    problem = stiefel.StiefelProblem(lambda x, c: -jnp.sum(c * x), lambda x: 4 * x, p=2, args=c, n=N)
    state = walk(problem.default_method(), problem, problem.start(jax.random.key(0)), 100)
    left, _, right = np.linalg.svd(c, full_matrices=False)
    assert np.abs(problem.unpack(state.point.x) - left @ right / 2).max() < 1e-6


def nothing(x, args):
    return jnp.zeros(())


@pytest.mark.parametrize(("p", "method"), [(1, stiefel.Landing(0.5, safe=0.5)), (N, stiefel.Landing(None, normal="correction"))])
def test_a_constant_objective_leaves_pure_attraction(p, method):
    problem = stiefel.StiefelProblem(nothing, B, p=p)
    x0 = problem.start(jax.random.key(0))
    still = walk(method, problem, x0, 3)                                                 # d = 0 and G = 0: no 0 / 0
    assert np.abs(problem.unpack(still.point.x) - x0).max() < 1e-13
    assert method.step_size is None or abs(float(still.step_size) - 0.5) < 1e-15
    moved = walk(method, problem, 1.1 * x0, 12)
    assert np.abs(problem.unpack(moved.point.x) - x0).max() < 1e-13


def test_logging_makes_no_product_with_a_matrix_of_full_size():
    problem, method = gevp(), stiefel.Landing(0.1)
    state = jax.eval_shape(lambda x: method.init(problem, x, key=jax.random.key(0)), jnp.ones((N, P)))

    carried = jax.make_jaxpr(lambda s: method.measure(problem, s))(state)
    assert not any((N, N) in [v.aval.shape for v in eqn.invars] for eqn in equations(carried.jaxpr) if eqn.primitive.name == "dot_general")
    afresh = jax.make_jaxpr(problem.metrics)(jnp.ones((N, P)))
    assert any((N, N) in [v.aval.shape for v in eqn.invars] for eqn in equations(afresh.jaxpr) if eqn.primitive.name == "dot_general")


def equations(jaxpr):
    """All equations, those of inner functions included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("estimator", ["one_batch", "two_sample", "u_statistic"])
def test_an_online_step_holds_no_array_of_full_size_squared(estimator):
    rows = np.random.default_rng(0).normal(size=(24, 1100)).astype(np.float32)
    problem = stiefel.CCA(rows, rows[:, :1050] ** 2, p=2)
    method = stiefel.StochasticLanding(0.1, batch_size=12, estimator=estimator)
    state = jax.eval_shape(lambda: method.init(problem, problem.start(jax.random.key(0)), key=jax.random.key(0)))
    step = jax.make_jaxpr(lambda problem, s: method.step(problem, s, key=None))(problem, state)
    sizes = [var.aval.size for eqn in equations(step.jaxpr) for var in (*eqn.invars, *eqn.outvars) if hasattr(var.aval, "size")]
    assert max(sizes) <= 24 * 1100


def test_new_numbers_do_not_retrace():
    traces, problem = [], gevp()

    @jax.jit
    def step(method, state):
        traces.append(1)
        return method.step(problem, state, key=None)

    state = jax.eval_shape(lambda x: stiefel.Landing(0.1).init(problem, x, key=jax.random.key(0)), jnp.ones((N, P)))
    for eta, omega, safe, margin in ((0.1, 1.0, 0.5, 0.9), (0.2, 0.5, 0.4, 0.8)):
        jax.eval_shape(step, stiefel.Landing(eta, omega, safe=safe, margin=margin), state)
    assert len(traces) == 1


@pytest.mark.slow
def test_problems_are_solved_side_by_side_under_vmap():
    stack = jnp.stack([A, 2 * A + np.eye(N)])

    def solve(a):
        problem = stiefel.GEVP(a, B, p=P)
        x0 = problem.start(jax.random.key(0))
        return tl.iterate(problem, stiefel.Landing(0.3, safe=0.5), x0, steps=1500, keep="last").history["gap"][-1]

    assert jax.vmap(solve)(stack).max() < 1e-9


@pytest.mark.slow
def test_float32_stays_and_a_refreshed_product_does_not_drift():
    problem = stiefel.GEVP(jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32), p=P)
    state = walk(stiefel.Landing(0.3, safe=0.5), problem, problem.start(jax.random.key(0)), 5000)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.point)} == {jnp.dtype("float32")}
    row = problem.metrics(problem.unpack(state.point.x))
    assert row["infeasibility"] < 5e-6
    assert np.abs(state.point.images[0] - problem.operator.image(state.point.x[0])).max() < 2e-6


# ------------------------------------------------------------------------------- stochastic


@pytest.mark.slow
def test_stochastic_correlations_run_side_by_side_and_resume(tmp_path):
    problem, path = stiefel.CCA(DATA, OTHER, p=2, ridge=0.1), tmp_path / "cca.npz"
    method = stiefel.StochasticLanding(tl.InverseSqrt(0.3), batch_size=20)
    whole = tl.iterate(problem, method, steps=600, every=100, runs=3, key=7)
    tl.iterate(problem, method, steps=250, every=100, runs=3, key=7, checkpoint=path)
    resumed = tl.iterate(problem, method, steps=600, every=100, runs=3, key=7, checkpoint=path)
    assert all(np.array_equal(a, b) for a, b in zip(whole.value, resumed.value, strict=True))
    assert np.all(whole.history["gap"][-1] < 0.05 * abs(problem.optimum))
    assert np.all(whole.history["infeasibility"][-1] < 0.2)
    assert whole.history["samples"][-1] == 600 * 20


@pytest.mark.slow
def test_streamed_correlations_reach_what_those_in_memory_do():
    rows = tl.Rows((DATA, OTHER), 20)
    cov = tl.fold(stiefel.add_moments, rows, stiefel.moments(N, 4))
    problem = stiefel.CCA.streamed(cov, p=2, ridge=0.1)
    sol = tl.iterate(problem, stiefel.StochasticLanding(tl.InverseSqrt(0.3)), steps=600, every=300, data=rows)
    assert abs(problem.optimum - stiefel.CCA(DATA, OTHER, p=2, ridge=0.1).optimum) < 1e-12
    assert sol.history["gap"][-1] < 0.05 * abs(problem.optimum)


POINTS = np.random.default_rng(5).normal(size=(5, N))


@pytest.mark.parametrize(("estimator", "normal"), [("u_statistic", "gradient"), ("u_statistic", "newton_schulz"), ("two_sample", "gradient"),
                                                   ("two_sample", "newton_schulz")])
def test_the_mean_step_over_all_batches_of_a_population_follows_the_exact_field(estimator, normal):
    problem = stiefel.ICA(POINTS, p=P, sign=1, center=False, ridge=0.2)
    x = np.random.default_rng(6).normal(size=(N, P)) / 3
    method = stiefel.StochasticLanding(1.0, batch_size=3, estimator=estimator, normal=normal, safe=None, attraction=0.7)
    batches = jnp.asarray(list(itertools.product(range(5), repeat=3)))

    @jax.jit
    @jax.vmap
    def moved(index):
        held = problem.holding(Batch((stiefel.Gram(jnp.asarray(POINTS)[index], None, problem.ridge),)))
        return jnp.asarray(x) - method.step(held, method.init(held, x, key=jax.random.key(0)), key=None).x[0].mT

    b = POINTS.T @ POINTS / 5 + 0.2 * np.eye(N)
    g = POINTS.T @ np.tanh(POINTS @ x) / 5
    exact = stiefel.landing_field(g, x, b @ x, 0.7, normal=normal)
    assert np.abs(moved(batches).mean(0) - exact).max() < 1e-13 * np.abs(moved(batches)).max() + 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_after_the_first_pass_the_averages_are_the_full_covariances(order):
    problem = stiefel.CCA(DATA, OTHER, p=2, ridge=0.1)
    method = stiefel.StochasticLanding(0.2, batch_size=16, average="first_pass", order=order)           # the last batch has 12 rows
    x0 = problem.start(jax.random.key(0))
    for steps in (4, 7):
        matrices, cross = walk(method, problem, x0, steps).average[0]
        for found, expected in zip((*matrices, *cross), (*(op.array for op in problem.operators), *problem.cross), strict=True):
            assert np.abs(found - expected).max() < 1e-13
    x, y = (problem.unpack(walk(method, problem, x0, steps).x) for steps in (7, 8))
    exact = walk(stiefel.Landing(0.2, safe=0.75), problem, x, 1)                          # from then on the steps are exact
    assert max(np.abs(a - b).max() for a, b in zip(y, problem.unpack(exact.point.x))) < 1e-13


@pytest.mark.slow
def test_averages_keep_the_gradient_of_components_stochastic():
    problem = stiefel.ICA(DATA, p=2, sign=1)
    method = stiefel.StochasticLanding(0.1, batch_size=15, average="first_pass")
    state = walk(method, problem, problem.start(jax.random.key(0)), 40)
    centred = DATA - DATA.mean(0)
    assert np.abs(state.average[0][0] - centred.T @ centred / 60).max() < 1e-13
    assert problem.metrics(problem.unpack(state.x))["infeasibility"] < 0.1


def test_a_batch_of_bad_numbers_is_rejected_and_halves_the_step():
    problem = stiefel.ICA(DATA, p=2, sign=1)
    method = stiefel.StochasticLanding(0.1)
    state = method.init(problem.feed(DATA), problem.start(jax.random.key(0)), key=jax.random.key(0))
    bad = method.step(problem.feed(np.where(np.arange(60)[:, None] == 3, np.nan, DATA)), state, key=None)
    assert np.array_equal(bad.x[0], state.x[0])
    assert (int(bad.rejected), float(bad.factor), float(bad.step_size)) == (1, 0.5, 0.0)
    good = method.step(problem.feed(DATA), bad, key=None)
    assert float(good.step_size) <= 0.05
    assert abs(float(good.factor) - 0.525) < 1e-15


@pytest.mark.slow
def test_the_safe_step_on_the_batch_turns_divergence_into_convergence():
    problem = stiefel.CCA(DATA, OTHER, p=2, ridge=0.1)
    schedule = tl.InverseSqrt(3.0)
    with pytest.raises(NonFiniteError, match="diverges"):
        tl.iterate(problem, stiefel.StochasticLanding(schedule, batch_size=20, safe=None), steps=200, every=100)
    state = walk(stiefel.StochasticLanding(schedule, batch_size=20), problem, problem.start(jax.random.key(0)), 4000)
    row = problem.metrics(problem.unpack(state.x))
    assert row["gap"] < 0.05 * abs(problem.optimum)
    assert row["infeasibility"] < 0.75
    assert int(state.rejected) == 0


@pytest.mark.slow
def test_populations_give_fresh_batches_to_the_stochastic_method():
    problem = stiefel.GEVP(stiefel.Population(A), stiefel.Population(B), p=2)
    method = stiefel.StochasticLanding(tl.InverseSqrt(0.5), batch_size=30, estimator="two_sample")
    state = walk(method, problem, problem.start(jax.random.key(0)), 4000)
    assert problem.metrics(problem.unpack(state.x))["gap"] < 0.05 * abs(problem.optimum)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("call", "words"), [
    (lambda: stiefel.Landing(0.0), "Landing: step_size must be above 0, got 0"),
    (lambda: stiefel.Landing(-1.0), "step_size must be above 0"),
    (lambda: stiefel.Landing(0.1, -1.0), "attraction must be at least 0"),
    (lambda: stiefel.Landing(0.1, safe=1.0), "Landing: safe must be a number above 0 and below 1, got 1"),
    (lambda: stiefel.Landing(0.1, safe=0.0), "safe must be a number above 0"),
    (lambda: stiefel.Landing(0.1, margin=1.5), "margin must be above 0 and at most 1"),
    (lambda: stiefel.Landing(0.1, tangent="psi"), "tangent must be one of 'relative'"),
    (lambda: stiefel.Landing(0.1, normal="psi"), "normal must be one of"),
    (lambda: stiefel.Landing(0.1, rule="best"), "rule must be one of"),
    (lambda: stiefel.Landing(0.1, tangent="plam", normal="correction"), "normal 'correction' needs the tangent 'relative'"),
    (lambda: stiefel.Landing(None, rule="official"), "rule must be 'exact' for steps of own choice"),
    (lambda: stiefel.StochasticLanding(0.1, estimator="two_samples"), "estimator must be one of"),
    (lambda: stiefel.StochasticLanding(0.1, batch_size=0), "batch_size must be at least 1"),
    (lambda: stiefel.StochasticLanding(0.1, batch_size=2, estimator="u_statistic"), "batch_size must be at least 3 for estimator 'u_statistic'"),
    (lambda: stiefel.StochasticLanding(0.1, batch_size=2, estimator="two_sample"), "batch_size must be at least 3"),
    (lambda: stiefel.StochasticLanding(0.1, safe=1.0), "StochasticLanding: safe must be a number above 0 and below 1"),
    (lambda: stiefel.StochasticLanding(0.1, average="first_pass", estimator="u_statistic"), "needs the estimator 'one_batch'"),
    (lambda: stiefel.StochasticLanding(0.1, order="random"), "order must be one of"),
])
def test_bad_settings_are_refused(call, words):
    with pytest.raises(ArgumentError, match=words):
        call()


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: tl.iterate(gevp(), stiefel.StochasticLanding(0.1), steps=1), ArgumentError, "batch_size must be given"),
    (lambda: tl.iterate(gevp(), stiefel.StochasticLanding(0.1, 8), steps=1), ArgumentError, "GEVP holds no rows of data to draw batches from"),
    (lambda: tl.iterate(stiefel.ICA(DATA, p=2), stiefel.StochasticLanding(0.1, 61), steps=1), ArgumentError, "at most the 60 rows"),
    (lambda: tl.iterate(gevp(), stiefel.Landing(0.1), np.ones((N, 2)), steps=1), ShapeError, r"x must have shape \(6, 3\), got \(6, 2\)"),
    (lambda: tl.iterate(stiefel.ICA.streamed(DATA, p=2), stiefel.StochasticLanding(0.1, estimator="u_statistic"), steps=1, data=[DATA[:2]]),
     ArgumentError, "a batch must hold at least 3 rows"),
    (lambda: tl.iterate(stiefel.GEVP(DATA, DATA, p=2), stiefel.StochasticLanding(0.1, 8, estimator="u_statistic"), steps=1), ArgumentError,
     "GEVP has no gradient that is a sum over the rows of the constraint"),
    (lambda: stiefel.Landing(0.1, safe=0.5).check(gevp(), 3 * gevp().start(jax.random.key(0))), InfeasibleStartError, "begin at retract"),
    (lambda: stiefel.StochasticLanding(0.1).check(gevp(), 3 * gevp().start(jax.random.key(0))), InfeasibleStartError, "begin at retract"),
])
def test_what_does_not_fit_the_problem_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
