"""Stochastic methods: with full batches the recursions in NumPy, with minibatches the noise plateaus; the simulated problem in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.hypergradient import cases, oracles
from theorylab.core.keys import step_key, stream
from theorylab.core.sample import minibatch
from theorylab.errors import ArgumentError, ShapeError
from theorylab.hypergradient.hessian_free import BOME, F2SA, PZOBO
from theorylab.hypergradient.nested import BSA, MRBO, SUSTAIN, TTSA, VRBO, AmIGO, StocBiO, neumann, truncated
from theorylab.hypergradient.simulated import simulated
from theorylab.hypergradient.stochastic import FSLA, SABA, SOBA, SRBA

SMALL = simulated(3, dim_inner=4, dim_outer=3, samples=16, coupling=0.3)
WHOLE = {"step_size": 0.1, "outer_ratio": 2.0, "batch_size": 16}
KEY = jax.random.key(5)
Y0 = np.array([1.0, -0.5, 0.3])
STEPS = 6


@jax.jit
def _last(problem, method, y0, key, steps):
    state = tl.core.tree.strong(method.init(problem, y0, key=key))
    return jax.lax.fori_loop(0, steps, lambda _, s: tl.core.tree.strong(method.step(problem, s, key=key)), state)


def last(problem, method, y0, steps, whole=False):
    """The iterate (or the whole state) after `steps` steps, without the metrics of `iterate`, which cost most of the compiling."""
    state = _last(problem, method, jnp.asarray(y0), KEY, steps)
    return state if whole else state.y


@jax.jit
def _moved(method, state, inner, outer, steps):
    return jax.lax.fori_loop(0, steps, lambda _, s: tl.core.tree.strong(method.move(SMALL, s, inner, outer)._replace(step=s.step + 1)), state)


def moved(method, steps):
    """The iterate after `steps` steps in which every batch holds all rows; the sampler, which costs most of the compiling, is not needed."""
    rows = [jnp.tile(jnp.arange(16, dtype=jnp.int32), (batches, 1)) for batches in (method.inner_batches, method.outer_batches)]
    state = jax.jit(lambda m: tl.core.tree.strong(m.init(SMALL, jnp.asarray(Y0), key=KEY)))(method)
    return _moved(method, state, *rows, steps).y


class Terms:
    """The parts of a step over some rows, in NumPy."""

    def __init__(self, inner=slice(None), outer=slice(None)):
        self.inner, self.outer = (jax.tree.map(lambda a, rows=rows: np.asarray(a)[rows], part)
                                  for part, rows in ((SMALL.inner_rows, inner), (SMALL.outer_rows, outer)))

    def F(self, x, y):
        E = self.inner
        return np.mean(E.a * (E.a @ x)[:, None] + E.d * (E.c @ y)[:, None] + E.s, axis=0)

    def H(self, v):
        return np.mean(self.inner.a * (self.inner.a @ v)[:, None], axis=0)

    def cross(self, v):
        return np.mean(self.inner.c * (self.inner.d @ v)[:, None], axis=0)

    def G_1(self, x, y):
        G = self.outer
        return np.mean(G.a * (G.a @ x)[:, None] + G.d * (G.c @ y)[:, None] + G.s, axis=0)

    def G_2(self, x, y):
        G = self.outer
        return np.mean(G.h * (G.h @ y)[:, None] + G.c * (G.d @ x)[:, None] + G.t, axis=0)


ALL = Terms()


def single_loop(exponent):
    x, y, v = np.zeros(4), Y0, np.zeros(4)
    for t in range(STEPS):
        eta = 0.1 / (t + 1) ** exponent
        x, v, y = x - eta * ALL.F(x, y), v - eta * (ALL.H(v) + ALL.G_1(x, y)), y - eta / 2 * (ALL.cross(v) + ALL.G_2(x, y))
    return y


def fully_single_loop():
    x, y, v, d, y_old = np.zeros(4), Y0, np.zeros(4), np.zeros(3), Y0
    for t in range(STEPS):
        eta = 0.1 / np.sqrt(t + 1)
        x_new = x - eta * ALL.F(x, y)
        v_new = v - eta * (ALL.H(v) - ALL.G_1(x_new, y))
        old = ALL.G_2(x, y_old) - ALL.cross(v)
        d = ALL.G_2(x_new, y) - ALL.cross(v_new) + (1 - 0.5 / np.sqrt(t + 1)) * (d - old)
        x, v, y, y_old = x_new, v_new, y - eta / 2 * d, y
    return y


def series(b, terms):
    return 0.1 * sum(np.linalg.matrix_power(np.eye(4) - 0.1 * np.asarray(SMALL.inner_rows.hessian), k) @ b for k in range(terms + 1))


def nested(adjoint):
    x, y, v = np.zeros(4), Y0, np.zeros(4)
    for _ in range(3):
        x = x - 0.1 * ALL.F(x, y)
    for _ in range(STEPS):
        v = adjoint(v, ALL.G_1(x, y))
        y = y - 0.05 * (ALL.G_2(x, y) - ALL.cross(v))
        for _ in range(3):
            x = x - 0.1 * ALL.F(x, y)
    return y


def warm(v, b):
    for _ in range(3):
        v = v - 0.1 * (ALL.H(v) - b)
    return v


def storm():
    x, y, dx, dy, last = np.zeros(4), Y0, np.zeros(4), np.zeros(3), (np.zeros(4), Y0)
    g = lambda x, y: (ALL.F(x, y), ALL.G_2(x, y) - ALL.cross(series(ALL.G_1(x, y), 5)))
    for t in range(STEPS):
        keep = 1 - 0.5 / (t + 1) ** (2 / 3)
        now, past = g(x, y), g(*last)
        dx, dy = now[0] + keep * (dx - past[0]), now[1] + keep * (dy - past[1])
        last, x, y = (x, y), x - 0.1 / (t + 1) ** (1 / 3) * dx, y - 0.05 / (t + 1) ** (1 / 3) * dy
    return y


def variance_reduced():
    x, y = np.zeros(4), Y0
    slope = lambda x, y: ALL.G_2(x, y) - ALL.cross(series(ALL.G_1(x, y), 5))
    d = slope(x, y)
    for _ in range(STEPS):
        y = y - 0.05 * d
        for _ in range(3):
            d, x = slope(x, y), x - 0.1 * ALL.F(x, y)  # with all rows the directions are those of the last point where they were evaluated
    return y


def penalized():
    x, high, y, penalty = np.zeros(4), np.zeros(4), Y0, 2.0
    for t in range(STEPS):
        eta, plain = 0.1 / (t + 1) ** (5 / 7), 0.1 / (t + 1) ** (4 / 7)
        for _ in range(3):
            high, x = high - eta * (penalty * ALL.F(high, y) + ALL.G_1(high, y)), x - plain * ALL.F(x, y)
        y = y - plain / 2 * (ALL.G_2(high, y) + penalty * ALL.cross(high - x))  # E_2 is linear in x
        penalty = penalty + 0.1 / (t + 1) ** (1 / 7)
    return y


def value_function():
    x, y = np.zeros(4), Y0
    for _ in range(STEPS):
        settled = x
        for _ in range(3):
            settled = settled - 0.1 * ALL.F(settled, y)
        qx, qy, gx, gy = ALL.F(x, y), ALL.cross(x - settled), ALL.G_1(x, y), ALL.G_2(x, y)
        size = qx @ qx + qy @ qy
        weight = max(0.5 * size - gx @ qx - gy @ qy, 0) / size
        x, y = x - 0.1 * (gx + weight * qx), y - 0.05 * (gy + weight * qy)
    return y


def differences():
    x, y, rounds = np.zeros(4), Y0, jax.jit(lambda t: jax.random.normal(step_key(stream(KEY, "directions"), t), (2, 3)))

    def run(x, y):
        for _ in range(3):
            x = x - 0.1 * ALL.F(x, y)
        return x

    for t in range(STEPS):
        new, U = run(x, y), np.asarray(rounds(t))
        slopes = [(run(x, y + 0.1 * u) - new) @ ALL.G_1(new, y) / 0.1 for u in U]
        x, y = new, y - 0.05 * (ALL.G_2(new, y) + np.mean([s * u for s, u in zip(slopes, U, strict=True)], axis=0))
    return y


@pytest.mark.parametrize(("method", "recursion"), [
    (BOME(0.1, 2.0, inner_steps=3), value_function), (PZOBO(0.1, 2.0, inner_steps=3, directions=2), differences)], ids=lambda m: type(m).__name__)
def test_a_method_without_batches_is_its_recursion(method, recursion):
    np.testing.assert_allclose(last(SMALL, method, Y0, STEPS), recursion(), rtol=1e-10)


@pytest.mark.parametrize(("method", "recursion"), [
    (VRBO(**WHOLE, inner_steps=3, terms=5, period_fraction=100.0), variance_reduced), (F2SA(**WHOLE, inner_steps=3, penalty=2.0), penalized),
    (SOBA(**WHOLE), lambda: single_loop(0.5)), (SRBA(**WHOLE, period_fraction=1.5), lambda: single_loop(0)),
    (FSLA(**WHOLE), fully_single_loop), (AmIGO(**WHOLE, inner_steps=3), lambda: nested(warm)),
    (StocBiO(**WHOLE, inner_steps=3, terms=5), lambda: nested(lambda v, b: series(b, 5))), (MRBO(**WHOLE, terms=5), storm)],
    ids=lambda m: type(m).__name__)
def test_with_full_batches_a_method_is_its_recursion(method, recursion):
    np.testing.assert_allclose(moved(method, STEPS), recursion(), rtol=1e-11, atol=1e-13)


def test_saba_keeps_one_direction_for_each_fixed_batch():
    found = last(SMALL, SABA(0.1, batch_size=4), Y0, 11)
    x, y, v = np.zeros(4), Y0, np.zeros(4)
    table = [np.zeros((4, k)) for k in (4, 4, 3, 4, 3)]
    for t in range(11):
        i, j = (int(minibatch(stream(KEY, f"{name} batches"), 4, 1, t)[0]) for name in ("inner", "outer"))
        terms = Terms(slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
        fresh = (terms.F(x, y), terms.H(v), terms.cross(v), terms.G_1(x, y), terms.G_2(x, y))
        steps = []
        for new, old, at in zip(fresh, table, (i, i, i, j, j), strict=True):
            steps.append(new - old[at] + old.mean(0))
            old[at] = new
        x, v, y = x - 0.1 * steps[0], v - 0.1 * (steps[1] + steps[3]), y - 0.1 * (steps[2] + steps[4])
    np.testing.assert_allclose(found, y, rtol=1e-11)


def test_batches_visit_every_row_at_most_once_in_a_pass():
    method = AmIGO(batch_size=5, inner_steps=4)  # nine inner batches a step; three of the sixteen rows make a pass
    state = SOBA().init(SMALL.inner_batch(jnp.arange(64) % 16).outer_batch(jnp.arange(64) % 16), jnp.asarray(Y0), key=KEY)
    draw = jax.jit(lambda m, state: m.draw(SMALL, state))
    inner, outer = draw(method, state)
    assert inner.shape == (9, 5) and outer.shape == (1, 5)
    passes = np.asarray(inner).reshape(3, 15)
    assert all(len(set(one)) == 15 for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    later, _ = draw(method, state._replace(step=state.step + 1))
    assert (np.asarray(later) != np.asarray(inner)).any()


def reached(*methods):
    """The squared norms of the hypergradient after 2000 steps on the simulated problem, and at the start."""
    problem = simulated(0)
    value = jax.jit(lambda y: jnp.sum(oracles.omega(problem, problem.exact(y), y) ** 2))
    return {"start": value(jnp.ones(10)), **{type(m).__name__: value(last(problem, m, jnp.ones(10), 2000)) for m in methods}}


@pytest.mark.slow
def test_variance_reduction_removes_the_noise_plateau():
    found = reached(SOBA(), SABA(), SRBA())
    assert found["SABA"] < 1e-11 and found["SRBA"] < 1e-11
    assert 1e-4 < found["SOBA"] < 0.05 * found["start"]


@pytest.mark.slow
def test_the_order_of_the_noise_plateaus():
    found = reached(SOBA(), FSLA(), AmIGO(), StocBiO(), MRBO(), SUSTAIN(), BSA(), TTSA())
    assert 1e-6 < found["AmIGO"] < found["SOBA"] < found["BSA"] < found["TTSA"] < 0.2 * found["start"]
    assert all(found[name] < 0.2 * found["start"] for name in ("FSLA", "StocBiO", "MRBO", "SUSTAIN"))


def test_the_simulated_problem_is_what_its_closed_forms_say():
    problem = simulated(0)
    y = jax.random.normal(KEY, (10,))
    assert problem.samples == (1024, 1024) and problem.n == 20
    np.testing.assert_allclose(problem.residual(problem.exact(y), y), 0, atol=1e-13)
    value = lambda y: problem.outer(problem.exact(y), y)
    np.testing.assert_allclose(jax.jit(jax.hessian(value))(y), problem.value_curvature(), atol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda y: oracles.omega(problem, problem.exact(y), y))(problem.solution()), 0, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(problem.inner_rows.hessian)
    np.testing.assert_allclose(eigenvalues, np.geomspace(0.1, 1, 20), rtol=0.3)  # 1024 rows: a few times 1/sqrt(1024)
    np.testing.assert_allclose(np.linalg.svd(problem.inner_rows.cross)[1], 0.1, rtol=0.5)
    np.testing.assert_allclose(problem.inner_batch(jnp.arange(1024)).residual(y[:1].repeat(20), y), problem.residual(y[:1].repeat(20), y))


def test_a_random_term_of_the_series_has_the_mean_of_the_series():
    H, b = jnp.diag(jnp.array([0.5, 2.0])), jnp.array([1.0, -1.0])
    draws = jax.vmap(lambda key: truncated(lambda _, p: H @ p, b, 0.3, 5, key))(jax.random.split(KEY, 4000))
    exact = neumann(lambda _, p: H @ p, b, 0.3, 4)
    np.testing.assert_allclose(exact, [0.3 * sum(0.85**k for k in range(5)), -0.3 * sum(0.4**k for k in range(5))], rtol=1e-12)
    assert (np.abs(draws.mean(0) - exact) < 4 * draws.std(0) / np.sqrt(4000)).all()


def test_metrics_and_counters():
    method = SRBA(0.02, batch_size=8, period_fraction=1.0)
    state = last(SMALL, method, Y0, 6, whole=True)
    assert method.metrics(SMALL, state) == {"samples": 128}  # all 32 rows, three times twice 8, and both again
    row = jax.jit(lambda s: method.measure(SMALL, s))(state)
    np.testing.assert_allclose(row["residual"], np.linalg.norm(ALL.F(state.x, state.y)), rtol=1e-12)
    np.testing.assert_allclose(row["gradient_norm"], np.linalg.norm(oracles.omega(SMALL, SMALL.exact(state.y), state.y)), rtol=1e-11)


def test_selection_problems_in_single_precision():
    case = cases.data("breast_cancer")
    single = lambda pair: tuple(np.asarray(a, np.float32) for a in pair)
    problem = type(case.problem)(single((case.problem.A, case.problem.b)), single((case.problem.A_out, case.problem.b_out)))
    y = last(problem, SOBA(0.5, outer_ratio=0.1), jnp.zeros(30, jnp.float32), 3000)
    assert y.dtype == jnp.float32
    value = lambda y: case.problem.outer(cases.solved(case.problem, y), y)
    assert value(y.astype(float)) < 0.9 * value(jnp.zeros(30))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: SOBA(0.0), ArgumentError, "step_size must be above 0"),
    (lambda: MRBO(momentum=2.0), ArgumentError, "momentum must be above 0 and at most 1"),
    (lambda: F2SA(growth=-1.0), ArgumentError, "growth must be at least 0"),
    (lambda: BOME(control=0.0), ArgumentError, "control must be above 0"),
    (lambda: PZOBO(directions=0), ArgumentError, "directions must be at least 1"),
    (lambda: tl.iterate(cases.root().problem, BOME(), steps=1), ArgumentError, "BOME needs an inner energy, and Bilevel is a root problem"),
    (lambda: tl.iterate(SMALL, VRBO(batch_size=17), steps=1), ArgumentError, "batch_size must be at most the 16 samples"),
    (lambda: tl.iterate(SMALL, SOBA(batch_size=17), steps=1), ArgumentError, "batch_size must be at most the 16 samples of the inner objective"),
    (lambda: tl.iterate(SMALL, SABA(batch_size=5), steps=1), ArgumentError, "batch_size must divide the 16 samples of the inner objective"),
    (lambda: tl.iterate(cases.p1().problem, SOBA(), 1.0, steps=1), ArgumentError, "Bilevel is not a mean over samples"),
    (lambda: tl.iterate(SMALL.inner(jnp.ones(3)), SOBA(), jnp.ones(4), steps=1), ArgumentError, "must be a bilevel problem"),
    (lambda: tl.iterate(SMALL, SOBA(batch_size=4), jnp.ones(4), steps=1), ShapeError, "y must"),
    (lambda: simulated(0, dim_outer=1), ArgumentError, "dim_outer must be a whole number at least 2"),
    (lambda: simulated(0, convexity=2.0), ArgumentError, "smoothness must be a number at least 2"),
    (lambda: simulated(0, coupling=30.0, samples=32), ArgumentError, "no convex outer objective in 20 draws"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
