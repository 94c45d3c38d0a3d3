"""A thumbnail of each family on the bare core: what five families need, in about twenty lines each.

Every thumbnail runs with history and stop rule, as a batch of runs, resumed from a file, and inside a sweep; one is fed from a
memory-mapped file. Each result is checked against an independent computation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import theorylab as tl

Array = jax.Array


# ------------------------------------------------------------------------------- variational inequality: ACVI on a game in the quadrant


class Game(tl.Problem):
    """Find z >= 0 with F(z) = M z + q complementary to z."""

    M: Array
    q: Array

    def start(self, key: Array) -> Array:
        return jax.random.uniform(key, self.q.shape)

    def metrics(self, z: Array) -> dict[str, Array]:
        return {"residual": jnp.linalg.norm(z - jnp.maximum(z - (self.M @ z + self.q), 0))}


class ACVI(tl.Method):
    """ADMM on the log-barrier path; the resolvent is made once, mu falls by `factor` every `inner` steps."""

    penalty: Any = tl.number(1.0, above=0)
    mu: Any = tl.number(1.0, above=0)
    factor: Any = tl.number(0.5, above=0, below=1)
    inner: Any = tl.count(10)
    resolvent: Any = None

    def prepare(self, problem: Game) -> ACVI:
        return self.replace(resolvent=jnp.linalg.inv(jnp.eye(len(problem.q), dtype=problem.q.dtype) + problem.M / self.penalty))

    def init(self, problem: Game, x0: Array, *, key: Array) -> tuple:
        return x0, x0, jnp.zeros_like(x0), jnp.zeros((), jnp.int32)

    def step(self, problem: Game, state: tuple, *, key: Array) -> tuple:
        _, y, dual, k = state
        mu = self.mu * self.factor ** (k // self.inner.astype(k.dtype)).astype(y.dtype)
        x = self.resolvent @ (y - dual / self.penalty - problem.q / self.penalty)
        v = x + dual / self.penalty
        y = (v + jnp.sqrt(v**2 + 4 * mu / self.penalty)) / 2
        return x, y, dual + self.penalty * (x - y), k + 1

    def value(self, problem: Game, state: tuple) -> Array:
        return state[1]


def game() -> tuple:
    M, q = np.array([[0.5, 1.0], [-1.0, 0.5]]), np.array([-1.0, 2.0])
    # of the four complementary patterns only z = (2, 0) is feasible: F(z) = (0, 0)
    return Game(jnp.asarray(M), jnp.asarray(q)), ACVI(), tl.Below("residual", 1e-8), 600, lambda z: np.abs(z - [2.0, 0.0]).max(), 1e-7


# ------------------------------------------------------------------------------- generalized Stiefel: landing on a 10 x 3 eigenproblem


class GEVP(tl.Problem):
    """Maximize tr(X' A X) / 2 subject to X' B X = I."""

    A: Array
    B: Array
    p: int = tl.size(3)

    def start(self, key: Array) -> Array:
        return jax.random.normal(key, (len(self.A), self.p)) / 3

    def metrics(self, X: Array) -> dict[str, Array]:
        h, AX = X.T @ self.B @ X - jnp.eye(self.p), self.A @ X
        return {"objective": -jnp.sum(X * AX) / 2, "infeasibility": jnp.linalg.norm(h), "residual": jnp.linalg.norm(AX - self.B @ X @ (X.T @ AX))}


class Landing(tl.Method):
    """Relative gradient plus attraction; no retraction."""

    step_size: Any = tl.number(0.1, above=0)
    attraction: Any = tl.number(1.0, above=0)

    def init(self, problem: GEVP, x0: Array, *, key: Array) -> Array:
        return x0

    def step(self, problem: GEVP, X: Array, *, key: Array) -> Array:
        BX, AX = problem.B @ X, problem.A @ X
        tangent = (BX @ (AX.T @ BX) - AX @ (BX.T @ BX)) / 2
        return X - self.step_size * (tangent + self.attraction * BX @ (X.T @ BX - jnp.eye(problem.p)))

    def value(self, problem: GEVP, X: Array) -> Array:
        return X


def gevp() -> tuple:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    A, B = np.diag(np.r_[3.0, 2.5, 2.0, np.linspace(0.5, 0.1, 7)]), basis @ np.diag(np.linspace(0.7, 1.3, 10)) @ basis.T
    best = -scipy.linalg.eigh(A, B, eigvals_only=True)[-3:].sum() / 2
    objective = lambda X: abs(-np.trace(X.T @ A @ X) / 2 - best)
    return GEVP(jnp.asarray(A), jnp.asarray(B)), Landing(), tl.Below("residual", 1e-8), 3000, objective, 1e-7


# ------------------------------------------------------------------------------- mixture of experts: EM for two lines


class Lines(tl.Problem):
    """Two regression lines with equal noise; parameters (weights, slopes, intercepts)."""

    x: Array
    y: Array
    noise: Any = tl.number(0.3)

    def start(self, key: Array) -> tuple:
        return jnp.array([0.5, 0.5]), jnp.array([1.0, -1.0]) + 0.1 * jax.random.normal(key, (2,)), jnp.zeros(2)

    def log_joint(self, theta: tuple) -> Array:
        weight, slope, intercept = theta
        error = self.y[:, None] - self.x[:, None] * slope - intercept
        return jnp.log(weight) - error**2 / (2 * self.noise**2) - jnp.log(self.noise * np.sqrt(2 * np.pi))

    def metrics(self, theta: tuple) -> dict[str, Array]:
        return {"log_likelihood": jnp.mean(jax.nn.logsumexp(self.log_joint(theta), axis=1))}

    def feed(self, batch: tuple) -> Lines:
        return self.replace(x=batch[0][:, 0], y=batch[1][:, 0])

    def sums(self, theta: tuple) -> Array:
        """Sufficient statistics per line: total weight and the moments 1, x, xx, y, xy."""
        share = jax.nn.softmax(self.log_joint(theta), axis=1)
        return jnp.stack([jnp.ones_like(self.x), self.x, self.x**2, self.y, self.x * self.y]) @ share


def maximize(sums: Array) -> tuple:
    n, sx, sxx, sy, sxy = sums
    slope = (n * sxy - sx * sy) / (n * sxx - sx**2)
    return n / jnp.sum(n), slope, (sy - slope * sx) / n


class EM(tl.Method):
    """E-step and M-step on all the data; `gain` is the last improvement of the log-likelihood."""

    def init(self, problem: Lines, x0: tuple, *, key: Array) -> tuple:
        return x0, jnp.asarray(jnp.inf)

    def step(self, problem: Lines, state: tuple, *, key: Array) -> tuple:
        theta = maximize(problem.sums(state[0]))
        gain = problem.metrics(theta)["log_likelihood"] - problem.metrics(state[0])["log_likelihood"]
        return theta, gain

    def value(self, problem: Lines, state: tuple) -> tuple:
        return state[0]

    def metrics(self, problem: Lines, state: tuple) -> dict[str, Array]:
        return {"gain": jnp.where(jnp.isinf(state[1]), jnp.nan, state[1])}


class StreamedEM(EM):
    """Sums over one pass, then the M-step."""

    per_pass: Any = tl.count(4)

    def init(self, problem: Lines, x0: tuple, *, key: Array) -> tuple:
        return x0, jnp.zeros((5, 2)), jnp.zeros((), jnp.int32)

    def step(self, problem: Lines, state: tuple, *, key: Array) -> tuple:
        theta, sums, k = state
        sums, k = sums + problem.sums(theta), k + 1
        whole = k % self.per_pass.astype(k.dtype) == 0
        theta = jax.tree.map(lambda new, old: jnp.where(whole, new, old), maximize(sums), theta)
        return theta, jnp.where(whole, 0.0, sums), k

    def metrics(self, problem: Lines, state: tuple) -> dict[str, Array]:
        return {}


def lines_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x, which = rng.uniform(-2, 2, 400), rng.random(400) < 0.6
    return x, np.where(which, 1.5 * x + 0.5, -1.0 * x) + 0.3 * rng.normal(size=400)


def lines() -> tuple:
    x, y = lines_data()

    def score(theta: tuple) -> float:
        """The gradient of the log-likelihood by autodiff vanishes at a fixed point of EM."""
        problem = Lines(jnp.asarray(x), jnp.asarray(y))
        ascent = jax.grad(lambda line: problem.metrics((jnp.asarray(theta[0]), *line))["log_likelihood"])(tuple(map(jnp.asarray, theta[1:])))
        return max(float(jnp.abs(a).max()) for a in ascent)

    return Lines(jnp.asarray(x), jnp.asarray(y)), EM(), tl.Below("gain", 1e-13), 500, score, 1e-5


# ------------------------------------------------------------------------------- hypergradient: the inner path on ridge


class Ridge(tl.Problem):
    """|X w - t|^2 / 2 + exp(log_penalty) |w|^2 / 2."""

    X: Array
    t: Array
    log_penalty: Any = tl.number(0.0)

    def hessian(self) -> Array:
        return self.X.T @ self.X + jnp.exp(self.log_penalty) * jnp.eye(self.X.shape[1])

    def start(self, key: Array) -> Array:
        return jax.random.normal(key, (self.X.shape[1],))

    def gradient(self, w: Array) -> Array:
        return self.hessian() @ w - self.X.T @ self.t

    def metrics(self, w: Array) -> dict[str, Array]:
        return {"residual": jnp.linalg.norm(self.gradient(w))}


class Descent(tl.Method):
    """Gradient descent with step 1 / L, L made once."""

    inverse: Any = None

    def prepare(self, problem: Ridge) -> Descent:
        return self.replace(inverse=1 / jnp.linalg.eigvalsh(problem.hessian())[-1])

    def init(self, problem: Ridge, x0: Array, *, key: Array) -> Array:
        return x0

    def step(self, problem: Ridge, w: Array, *, key: Array) -> Array:
        return w - self.inverse * problem.gradient(w)

    def value(self, problem: Ridge, w: Array) -> Array:
        return w


def ridge() -> tuple:
    rng = np.random.default_rng(2)
    X, t = rng.normal(size=(30, 5)), rng.normal(size=30)
    exact = np.linalg.solve(X.T @ X + np.eye(5), X.T @ t)
    return Ridge(jnp.asarray(X), jnp.asarray(t)), Descent(), tl.Below("residual", 1e-9), 2000, lambda w: np.abs(w - exact).max(), 1e-9


CASES = {"acvi": game, "stiefel": gevp, "moe": lines, "hypergradient": ridge}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]()


def test_history_and_stop_rule_reach_the_independent_answer(case):
    problem, method, stop, steps, error, tolerance = case
    sol = tl.iterate(problem, method, steps=steps, stop=stop, key=1)
    assert sol.status == tl.Status.CONVERGED
    assert error(jax.tree.map(np.asarray, sol.value)) < tolerance
    assert len(sol.history) == sol.steps + 1 and sol.history.last(stop.name) < float(stop.level)


def test_a_batch_of_runs_agrees_with_single_runs(case):
    problem, method, stop, steps, error, tolerance = case
    sol = tl.iterate(problem, method, steps=steps, stop=stop, key=1, runs=3)
    assert (sol.status == tl.Status.CONVERGED).all()
    for r in range(3):
        assert error(jax.tree.map(lambda a, r=r: np.asarray(a[r]), sol.value)) < tolerance
    assert sol.history.valid.sum(axis=0).tolist() == (sol.steps + 1).tolist()


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(case, tmp_path):
    problem, method, *_ = case
    base = tl.iterate(problem, method, steps=20, every=3, key=1)
    tl.iterate(problem, method, steps=11, every=3, key=1, checkpoint=tmp_path / "run.npz")
    resumed = tl.iterate(problem, method, steps=20, every=3, key=1, checkpoint=tmp_path / "run.npz")
    jax.tree.map(np.testing.assert_array_equal, resumed.value, base.value)
    assert resumed.history.names == base.history.names and resumed.history["step"].tolist() == base.history["step"].tolist()
    for name in base.history:
        np.testing.assert_array_equal(resumed.history[name], base.history[name])


def test_inside_a_sweep_each_replicate_is_its_own_run(case):
    problem, method, stop, steps, _, _ = case

    def run(params: dict, key: Array, i: Array) -> dict[str, Array]:
        sol = tl.iterate(params["problem"], method, steps=steps, stop=stop, key=key, keep="last")
        return {"status": sol.status, "steps": sol.steps, stop.name: sol.history[stop.name][-1]}

    table = tl.sweep(run, {"problem": problem}, replicates=3, key=1)
    batch = tl.iterate(problem, method, steps=steps, stop=stop, key=1, runs=3)
    assert table["steps"].tolist() == batch.steps.tolist() and (table["status"] == tl.Status.CONVERGED).all()


def test_em_fed_from_a_memory_mapped_file_takes_the_steps_of_em_in_memory(tmp_path):
    np.save(tmp_path / "rows.npy", np.stack(lines_data(), axis=1))
    rows = tl.Rows(tmp_path / "rows.npy", batch_size=100, columns=(1, 1))
    problem = lines()[0]
    full = tl.iterate(problem, EM(), steps=5, key=1, record=tl.whole)
    options: dict[str, Any] = {"key": 1, "every": rows.per_pass, "record": tl.whole}
    fed = tl.iterate(problem, StreamedEM(rows.per_pass), steps=5 * rows.per_pass, data=rows, **options)
    for name in full.history.names:
        if name.startswith("x["):
            np.testing.assert_allclose(fed.history[name], full.history[name], rtol=1e-11)
    tl.iterate(problem, StreamedEM(rows.per_pass), steps=7, data=rows, checkpoint=tmp_path / "c.npz", **options)
    again = tl.iterate(problem, StreamedEM(rows.per_pass), steps=5 * rows.per_pass, data=rows, checkpoint=tmp_path / "c.npz", **options)
    jax.tree.map(np.testing.assert_array_equal, again.value, fed.value)


def test_along_the_recorded_path_the_corrected_hypergradient_has_order_two():
    problem = ridge()[0]
    path = jnp.asarray(tl.iterate(problem, Descent(), steps=60, key=1, record=tl.whole).history["x"])
    exact = jnp.linalg.solve(problem.hessian(), problem.X.T @ problem.t)

    def plain(w: Array) -> Array:  # derivative of sum(w) with respect to log_penalty by the implicit function theorem, at w
        return -jnp.exp(problem.log_penalty) * jnp.linalg.solve(problem.hessian(), w).sum()

    newton = lambda w: plain(w - jnp.linalg.solve(problem.hessian() + 1e-3 * jnp.linalg.norm(problem.gradient(w)) * jnp.eye(5), problem.gradient(w)))
    inner = np.asarray(jnp.linalg.norm(path - exact, axis=1))
    errors = {f.__name__ if f is plain else "newton": np.abs(np.asarray(jax.vmap(f)(path)) - float(plain(exact))) for f in (plain, newton)}
    slopes = {name: tl.fit_rate(inner, error, within=(1e-4, 1e-1)).slope for name, error in errors.items()}
    assert abs(slopes["plain"] - 1) < 0.05 and abs(slopes["newton"] - 2) < 0.05


# ------------------------------------------------------------------------------- transformer PDE: a Gaussian covariance flow


class Covariance(tl.Flow):
    """Softmax attention with V = I on a centered Gaussian, in the factor L of the covariance L L'."""

    A: Array

    def field(self, t: Array, L: Array) -> Array:
        return L @ (L.T @ self.A @ L)

    def metrics(self, t: Array, L: Array) -> dict[str, Array]:
        return {"trace": jnp.sum(L**2)}


FLOW = Covariance(jnp.array([[-0.5, 0.3], [-0.2, -0.4]]))
TIMES = np.linspace(0, 4, 9)


def exact_covariance(flow: Covariance, L0: np.ndarray, t: float) -> np.ndarray:
    """The inverse covariance is affine in time."""
    A = np.asarray(flow.A)
    return np.linalg.inv(np.linalg.inv(L0 @ L0.T) - t * (A + A.T))


def test_a_covariance_flow_follows_the_closed_form_in_history_batch_and_resume(tmp_path):
    starts = np.stack([np.eye(2), [[1.0, 0.0], [0.5, 0.7]]])
    sol = tl.integrate(FLOW, starts[1], TIMES)
    assert sol.status == tl.Status.COMPLETED
    for t, L, trace in zip(TIMES, np.asarray(sol.value), sol.history["trace"], strict=True):
        exact = exact_covariance(FLOW, starts[1], t)
        np.testing.assert_allclose(L @ L.T, exact, rtol=1e-6)
        np.testing.assert_allclose(trace, np.trace(exact), rtol=1e-6)
    batch = tl.integrate(FLOW, starts, TIMES, runs=2)
    np.testing.assert_allclose(batch.history["trace"][:, 1], sol.history["trace"], rtol=1e-6)
    part = tl.integrate(FLOW, starts[1], TIMES, segment=3, checkpoint=tmp_path / "flow.npz")
    again = tl.integrate(FLOW, starts[1], TIMES, segment=3, checkpoint=tmp_path / "flow.npz")
    np.testing.assert_array_equal(again.value, part.value)
    np.testing.assert_allclose(part.history["trace"], sol.history["trace"], rtol=1e-6)


def test_a_sweep_over_flows_finds_each_blow_up_by_itself():
    def run(flow: Covariance, key: Array, i: Array) -> dict[str, Array]:
        scale = 0.5 + i.astype(float) / 2
        sol = tl.integrate(flow.replace(A=flow.A * -scale), jnp.eye(2), TIMES, throw=False)
        return {"status": sol.status}

    table = tl.sweep(run, FLOW, replicates=2, key=0)
    growth = 1 / np.linalg.eigvalsh(-np.asarray(FLOW.A + FLOW.A.T))[-1]  # blow-up time at scale 1
    expected = [tl.Status.BLOWUP if growth / scale < TIMES[-1] else tl.Status.COMPLETED for scale in (0.5, 1.0)]
    assert table["status"].tolist() == expected
