"""Oracles: every regime on a case that is known by hand, blow-up times and their derivatives, limits, ranks, equilibria."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, NoClosedFormError, ShapeError
from theorylab.transformer_pde.claims._ensembles import heads
from theorylab.transformer_pde.oracles import limits
from theorylab.transformer_pde.riccati import equilibrium

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
COV = np.array([[0.8, 0.25], [0.25, 0.5]])
START = tp.Gaussian(np.zeros(2), COV)
EYE = np.eye(2)
TURN = np.array([[0.0, 1.0], [-1.0, 0.0]])
ROW = np.array([[0.6, 0.8], [0.0, 0.0]])                              # rank one, padded so that all heads have one shape
SCHUR = COV - np.outer(COV @ ROW[0], COV @ ROW[0]) / (ROW[0] @ COV @ ROW[0])
FLOW = tp.GaussianFlow

SPREAD = np.diag([1.0, 2.0])                                         # no multiple of the identity: nothing is known in closed form
CASES = {
    "softmax number, positive form": (tp.Softmax(EYE, EYE, 1.0), "BLOWUP", 1),
    "softmax number, negative form": (tp.Softmax(-EYE, EYE, 1.0), "ZERO", 0),
    "softmax number, negative rank one": (tp.Softmax(ROW, -ROW, 1.0), "FROZEN", 1),
    "softmax number, skew form": (tp.Softmax(TURN, EYE, 1.0), "ROTATING", 2),
    "softmax multiple of I, negative rank one": (tp.Softmax(ROW, -ROW, EYE), "FROZEN", 1),
    "softmax matrix, positive form": (tp.Softmax(EYE, EYE, SPREAD), "BLOWUP", 1),
    "softmax matrix, negative form": (tp.Softmax(-EYE, EYE, SPREAD), "ZERO", 0),
    "softmax matrix, negative rank one": (tp.Softmax(ROW, -ROW, SPREAD), "FROZEN", 1),
    "linear": (tp.Linear(ROW, -ROW, SPREAD), "FROZEN", 1),
    "l2 multiple of I, keys equal queries": (tp.L2(EYE, EYE, EYE), "GROWING", 2),
    "l2 multiple of I, one row": (tp.L2(ROW, -ROW, EYE), "FROZEN", 1),
    "l2, keys equal queries": (tp.L2(EYE, EYE, SPREAD), "GROWING", 1),
    "l2, keys opposite": (tp.L2(-EYE, EYE, SPREAD), "ZERO", 0),
    "l2, one row": (tp.L2(ROW, -ROW, SPREAD), "FROZEN", 1),
    "l2, singular keys": (tp.L2([[0.0, 1.0], [0, 0]], [[1.0, 0.0], [0, 0]], np.diag([0.0, 1.0])), "BLOWUP", 1),
    "sinkhorn multiple of I, growing": (tp.Sinkhorn(EYE, EYE, EYE), "GROWING", 2),
    "sinkhorn multiple of I, one row": (tp.Sinkhorn(ROW, -ROW, EYE), "FROZEN", 1),
    "sinkhorn, negative form": (tp.Sinkhorn(-EYE, EYE, SPREAD), "ZERO", 0),
    "sinkhorn, one row": (tp.Sinkhorn(ROW, -ROW, SPREAD), "FROZEN", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_regime_is_recognized(name):
    head, regime, rank = CASES[name]
    found = tp.limit(FLOW(head), START)
    assert (found.regime.name, int(found.rank)) == (regime, rank)
    assert found.regime is tp.regime(FLOW(head), START) and found.regime.sentence.startswith("the covariance")
    time = float(tp.blow_up_time(FLOW(head), START))
    assert np.isfinite(time) == (regime == "BLOWUP") and time > 0
    if regime == "FROZEN":
        kind = tp.Softmax if isinstance(head, tp.Linear) else type(head)
        if "of I" in name or "number" in name:
            np.testing.assert_allclose(found.cov, SCHUR, atol=1e-14)
        else:
            exact = tp.closed_form(FLOW(kind(ROW[:1], -ROW[:1], head.value_matrix)), START, [1e12]).cov[0]       # the orbit of one row
            np.testing.assert_allclose(found.cov, exact, atol=3e-6)
            assert np.linalg.norm(found.cov - exact) <= max(float(found.error), 1e-11)
    if regime in ("BLOWUP", "GROWING"):
        assert float(jnp.trace(found.cov)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("head", [lambda V: tp.L2(0.6 * K, K, V, scale=2.0), lambda V: tp.Sinkhorn(K.T @ K, EYE, V, temperature=0.7)],
                         ids=["l2", "sinkhorn"])
def test_the_exact_direction_of_growth_is_where_the_closed_form_goes(head):
    found = tp.limit(FLOW(head(0.8 * EYE)), START)
    assert found.regime is tp.Regime.GROWING
    far = tp.closed_form(FLOW(head(0.8)), START, [60.0]).cov[0]
    np.testing.assert_allclose(found.cov, far / jnp.trace(far), atol=1e-9)


@pytest.mark.parametrize("v", [1.0, np.eye(2)], ids=["number", "matrix"])
def test_a_factor_without_columns_is_a_point(v):
    point = tp.Gaussian.from_factor(np.ones(2), np.zeros((2, 0)))
    found = tp.limit(FLOW(tp.Softmax(np.eye(2), np.eye(2), v)), point)
    assert found.regime == tp.Regime.ZERO and int(found.rank) == 0
    assert float(tp.blow_up_time(FLOW(tp.Softmax(np.eye(2), np.eye(2), v)), point)) == np.inf


def test_a_rotation_is_told_from_a_frozen_state():
    found = tp.limit(FLOW(tp.Softmax(EYE, EYE, TURN)), tp.Gaussian.standard(2))
    assert found.regime is tp.Regime.ROTATING and int(found.rank) == 2
    np.testing.assert_allclose(found.cov, EYE, atol=1e-12)


def test_the_blow_up_of_singular_keys_is_found_without_knowing_its_exponent():
    start = tp.Gaussian(np.zeros(2), [[1.0, 0.5], [0.5, 2.0]])
    assert float(tp.blow_up_time(FLOW(CASES["l2, singular keys"][0]), start)) == pytest.approx(3.0, rel=1e-10)      # 3 / (2 b0), exponent 2


def test_a_batch_has_the_closed_form_of_its_lanes_and_the_clock_agrees(rng):
    roots = rng.normal(size=(2, 3, 2, 2))
    starts = tp.Gaussian.from_factor(np.zeros((2, 3, 2)), roots)
    closed = FLOW(tp.Softmax(Q, K, 1.0))
    form = np.swapaxes(roots, -1, -2) @ (K.T @ Q + Q.T @ K) @ roots
    exact = 1 / np.linalg.eigvalsh(form)[..., -1]
    np.testing.assert_allclose(tp.blow_up_time(closed, starts), exact, rtol=1e-12)
    found = tp.limit(closed, starts)
    assert found.regime.shape == (2, 3) and (found.regime == tp.Regime.BLOWUP).all()
    one = tp.Gaussian.from_factor(np.zeros(2), roots[1, 2])
    clock = FLOW(tp.Softmax(Q, K, EYE))
    np.testing.assert_allclose(tp.limit(clock, one).cov, found.cov[1, 2], atol=1e-13)
    assert float(tp.blow_up_time(clock, one)) == pytest.approx(exact[1, 2], rel=1e-9)


def test_the_gradient_of_the_blow_up_time_is_that_of_the_formula():
    # dt*/dA = -2 v t*^2 (L u)(L u)', u the top eigenvector
    L, v = np.asarray(START.factor), 0.7
    values, vectors = np.linalg.eigh(v * L.T @ (K.T @ Q + Q.T @ K) @ L)
    t, u = 1 / values[-1], L @ vectors[:, -1]
    change = np.array([[0.3, -1.0], [0.4, 0.2]])
    got = jax.jvp(lambda A: tp.blow_up_time(FLOW(tp.Softmax.bilinear(A, v)), START), (jnp.asarray(K.T @ Q),), (jnp.asarray(change),))
    assert float(got[0]) == pytest.approx(t, rel=1e-13)
    assert float(got[1]) == pytest.approx(-2 * v * t**2 * u @ change @ u, rel=1e-11)


def test_no_blow_up_has_no_gradient_and_no_nan():
    slope = jax.grad(lambda s: tp.blow_up_time(FLOW(tp.Softmax(s * EYE, EYE, -1.0)), START))(1.0)
    assert float(slope) == 0.0


@pytest.mark.slow
def test_the_gradient_of_a_blow_up_time_without_closed_form():
    head = lambda s: FLOW(tp.Softmax(EYE + s * Q, EYE, SPREAD))
    value, slope = jax.jvp(lambda s: tp.blow_up_time(head(s), START), (0.3,), (1.0,))
    h = 1e-4
    around = (float(tp.blow_up_time(head(0.3 + h), START)) - float(tp.blow_up_time(head(0.3 - h), START))) / (2 * h)
    assert float(slope) == pytest.approx(around, rel=1e-6) and float(value) == float(tp.blow_up_time(head(0.3), START))


def desingularized(A: np.ndarray, V: np.ndarray, L: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalized covariance, logarithm of the trace and time of softmax at the ends of the homogeneous clock, by SciPy."""
    d, m = len(A), (L**2).sum()

    def field(s, y):
        R = y[: d * d].reshape(d, d)
        D = V @ (R @ (R.T @ A @ R))
        c = (R * D).sum()
        return np.concatenate([(D - (c + (R * R).sum() - 1) * R).ravel(), [2 * c, np.exp(-y[-2])]])

    y0 = np.concatenate([(L / np.sqrt(m)).ravel(), [np.log(m), 0.0]])
    y = scipy.integrate.solve_ivp(field, (0, ends[-1]), y0, method="LSODA", rtol=1e-9, atol=1e-15, t_eval=ends).y
    R = y[: d * d].T.reshape(-1, d, d)
    return R @ np.swapaxes(R, 1, 2), y[-2], y[-1]


@pytest.mark.slow
def test_slow_freezing_and_lasting_growth_are_told_apart_in_a_batch_of_heads():
    # heads of the ensemble of the claim on profiles: two freeze like t^-1/2, two grow exponentially
    base = heads(500, seed=8)
    V = np.einsum("nij,nkj->nik", base.V, base.V) + 0.2 * np.eye(3)
    chosen = np.array([12, 76, 24, 221])
    flows = jax.vmap(lambda q, k, v: FLOW(tp.Softmax(q, k, v)))(base.Q[chosen], base.K[chosen], V[chosen])
    found = limits(flows, tp.Gaussian.from_factor(np.zeros((4, 3)), base.factor[chosen]))
    names = [tp.Regime(int(r)).name for r in found.regime]
    assert names == ["FROZEN", "FROZEN", "GROWING", "GROWING"]
    for i, n in enumerate(chosen):
        cov, log_trace, time = desingularized(base.A[n], V[n], base.factor[n], np.array([1e6, 1e7, 1e8]))
        if names[i] == "FROZEN":
            assert time[2] / time[1] == pytest.approx(10, rel=1e-3)                            # the clock of a state at rest is the time
            exact = np.exp(log_trace)[:, None, None] * cov
            exact = exact[2] + (exact[2] - exact[1]) / (np.sqrt(10) - 1)                       # without its t^-1/2 tail
            assert np.linalg.norm(found.cov[i] - exact) < float(found.error[i]) < 1e-3
            assert int(found.rank[i]) == 1
        else:
            assert np.diff(log_trace) == pytest.approx(np.log(10), rel=2e-2)                   # c ~ 1 / (2 tau): the trace is e^{rate t}
            rates = np.diff(log_trace) / np.diff(time)
            assert rates[1] == pytest.approx(rates[0], rel=2e-2)
            u = np.linalg.eigh(cov[2])[1][:, -1]
            np.testing.assert_allclose(found.cov[i], np.outer(u, u), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind, numbers, name", [("sinkhorn", (0, 4), "GROWING"), ("softmax", (28, 57), "ZERO")])
def test_growth_and_decay_like_a_power_of_the_time_are_told(kind, numbers, name):
    keys = jax.random.split(jax.random.key(0), 400)[np.array(numbers)]
    flows = jax.vmap(lambda key: FLOW(tp.random_attention(kind, key, 3)))(keys)
    found = limits(flows, tp.Gaussian.from_factor(np.zeros((2, 3)), np.stack([np.eye(3)] * 2)))
    for i in range(2):
        Q, K, V = (np.asarray(a)[i] for a in (flows.attention.Q, flows.attention.K, flows.attention.V))

        def field(t: float, y: np.ndarray, Q: np.ndarray = Q, K: np.ndarray = K, V: np.ndarray = V) -> np.ndarray:
            L = y.reshape(3, 3)
            if kind == "softmax":
                return (V @ L @ ((K @ L).T @ (Q @ L))).ravel()
            left, values, right = np.linalg.svd((Q @ L).T @ (K @ L))
            return (V @ L @ (right.T * (2 * values / (1 + np.sqrt(1 + 4 * values**2)))) @ left.T).ravel()

        sol = scipy.integrate.solve_ivp(field, (0, 1e4), np.eye(3).ravel(), "LSODA", rtol=1e-9, atol=1e-12, t_eval=[1e3, 1e4])
        factors = sol.y.T.reshape(2, 3, 3)
        trace = (factors**2).sum((1, 2))
        assert tp.Regime(int(found.regime[i])).name == name
        if name == "GROWING":                                                           # along an isotropic line, like the square of the time
            assert trace[1] / trace[0] == pytest.approx(100, rel=0.2)
            np.testing.assert_allclose(found.cov[i], factors[1] @ factors[1].T / trace[1], atol=2e-3)
        else:                                                                           # like 1 / t, and turning
            assert 5 < trace[0] / trace[1] < 20 and int(found.rank[i]) == 0


@pytest.mark.slow
def test_vmap_over_heads_gives_a_regime_for_each():
    A = np.stack([EYE, -EYE, ROW.T @ -ROW])
    found = jax.vmap(lambda form: tp.limit(FLOW(tp.Softmax(form, EYE, SPREAD)), START))(jnp.asarray(A))
    assert [tp.Regime(int(r)).name for r in found.regime] == ["BLOWUP", "ZERO", "FROZEN"] and found.rank.tolist() == [1, 0, 1]


@pytest.mark.slow
def test_feed_forward_layers_have_equilibria_and_blow_up_times():
    W = np.array([[0.4, 0.3], [-0.5, 0.6]])
    resting = FLOW(tp.Softmax.bilinear(Q + EYE, -0.7), (W, None))
    found = tp.limit(resting, START)
    assert found.regime is tp.Regime.EQUILIBRIUM and int(found.rank) == 2 and float(tp.blow_up_time(resting, START)) == np.inf
    np.testing.assert_allclose(found.cov, equilibrium(resting), rtol=1e-12)
    by_clock = tp.limit(FLOW(tp.Softmax.bilinear(np.diag([1.0, 0.0]), -0.7), (np.diag([0.5, -0.3]), None)), START)       # no certificate
    assert by_clock.regime is tp.Regime.EQUILIBRIUM and int(by_clock.rank) == 1
    np.testing.assert_allclose(by_clock.cov, np.diag([0.5 / 0.7, 0.0]), atol=3e-6)
    blowing = FLOW(tp.Softmax.bilinear(Q + EYE, 0.4), (W, None))
    end = float(tp.blow_up_time(blowing, START))
    near = tp.closed_form(blowing, START, [end * (1 - 1e-6), end * (1 - 5e-7)]).cov
    assert float(jnp.trace(near[1]) / jnp.trace(near[0])) == pytest.approx(2, rel=1e-4)         # a simple pole, at the time found
    dying = FLOW(tp.Softmax.bilinear(Q + EYE, -0.7), (-W @ W.T - 0.1 * EYE, None))
    assert tp.regime(dying, START) is tp.Regime.ZERO
    noisy = FLOW(tp.Softmax.bilinear(Q + EYE, -0.7), (W, None), 0.1, form="covariance")
    assert tp.regime(noisy, START) is tp.Regime.EQUILIBRIUM and float(tp.blow_up_time(noisy, START)) == np.inf


BAD = {
    "noise": (lambda: tp.limit(FLOW(tp.Softmax(Q, K, V), noise=0.1, form="covariance"), START), NoClosedFormError, "limit with noise is known"),
    "normalize": (lambda: tp.blow_up_time(FLOW(tp.L2(Q, K, V), normalize=True), START), NoClosedFormError, "a flow with normalize"),
    "linear mean": (lambda: tp.limit(FLOW(tp.Linear(Q, K, V)), START.replace(mean=np.ones(2))), NoClosedFormError, "at zero mean only"),
    "depth": (lambda: tp.limit(FLOW(tp.Layered([tp.Softmax(Q, K, V)])), START), NoClosedFormError, "weights that change with depth"),
    "limits axes": (lambda: limits(FLOW(tp.Softmax(Q, K, V)), START), ShapeError, "one leading axis of equal length"),
    "limits type": (lambda: limits(tp.Softmax(Q, K, V), START), ArgumentError, "flows and states must be a GaussianFlow and a Gaussian"),
    "flow": (lambda: tp.regime(tp.Softmax(Q, K, V), START), ArgumentError, "flow must be a GaussianFlow, got Softmax"),
    "state": (lambda: tp.limit(FLOW(tp.Softmax(Q, K, V)), COV), ArgumentError, "state must be a Gaussian, got ndarray"),
    "dim": (lambda: tp.blow_up_time(FLOW(tp.Softmax(Q, K, 1.0)), tp.Gaussian.standard(3)), ShapeError, "state must have dimension 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
