"""The optax face: landing as a gradient transformation that keeps optax's contracts, and optax optimizers inside `iterate`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.stiefel.test_landing import DATA, OTHER, A, B, N, gevp
from theorylab import stiefel
from theorylab.errors import ArgumentError, ShapeError

pytest.importorskip("optax")
import optax

from theorylab.interop.optax import OptaxMethod, TwoSamples, landing

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(N, 2))) / 2, "b": jnp.ones(3)}
GRADS = {"w": jnp.asarray(RNG.normal(size=(N, 2))), "b": jnp.arange(3.0)}
WHERE = {"w": True, "b": False}


def test_updates_are_steps_along_the_landing_field_and_plain_descent_elsewhere():
    for kind, matrix in ((True, np.eye(N)), (B, B), (DATA, DATA.T @ DATA / 60), (lambda x: 2 * x, 2 * np.eye(N)), (stiefel.Gram(DATA), None)):
        matrix = DATA.T @ DATA / 60 if matrix is None else matrix
        tx = landing(0.1, 0.7, {"w": kind, "b": False}, normal="gradient")
        updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        expected = -0.1 * stiefel.landing_field(GRADS["w"], PARAMS["w"], matrix @ PARAMS["w"], 0.7, normal="gradient")
        assert np.abs(updates["w"] - expected).max() < 1e-13
        assert np.abs(updates["b"] + 0.1 * GRADS["b"]).max() == 0
        assert int(state.count) == 1
    pair = TwoSamples(DATA[:20], DATA[20:])
    updates, _ = tx.update(GRADS, state, PARAMS, constraint={"w": pair, "b": False})     # the batch of this update
    first, second = (rows.T @ (rows @ PARAMS["w"]) / len(rows) for rows in pair)
    expected = stiefel.two_sample_field(GRADS["w"], PARAMS["w"], first, second, 0.7, normal="gradient")
    assert np.abs(updates["w"] + 0.1 * expected).max() < 1e-13


def test_the_contracts_of_optax_are_kept():
    """jit, scan, chain, masked, multi_transform, schedules, apply_updates, and a state that is a pytree of arrays."""
    where = lambda params: jax.tree.map(lambda a: a.ndim == 2, params)
    schedule = optax.constant_schedule(0.1)
    variants = {
        "plain": landing(0.1, constraint=WHERE),
        "schedule": landing(schedule, constraint=WHERE),
        "own schedule": landing(tl.Constant(0.1), constraint=WHERE),
        "chain": optax.chain(optax.identity(), landing(0.1, constraint=WHERE)),
        "masked": optax.chain(optax.masked(landing(0.1), where), optax.masked(optax.sgd(0.1), lambda p: jax.tree.map(lambda m: not m, where(p)))),
        "multi": optax.multi_transform({"on": landing(0.1), "off": optax.sgd(0.1)}, {"w": "on", "b": "off"}),
    }

    def run(tx, scanned):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(GRADS, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = PARAMS, tx.init(PARAMS)
        if scanned:
            return jax.jit(lambda s: jax.lax.scan(step, s, None, length=3)[0])(start)
        for _ in range(3):
            start, _ = step(start, None)
        return start

    expected, _ = run(variants["plain"], False)
    for name, tx in variants.items():
        params, state = run(tx, True)
        assert all(np.abs(params[k] - expected[k]).max() < 1e-14 for k in PARAMS), name
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)), name


def test_leading_axes_half_precision_and_safe_steps():
    stack = jnp.stack([PARAMS["w"], 1.1 * PARAMS["w"]])
    updates, _ = landing(0.1).update(stack, landing(0.1).init(stack), stack)
    assert np.abs(updates[1] - landing(0.1).update(stack[1], landing(0.1).init(stack), stack[1])[0]).max() < 1e-15
    half = PARAMS["w"].astype(jnp.bfloat16)
    assert landing(0.1).update(half, landing(0.1).init(half), half)[0].dtype == jnp.bfloat16
    x = stiefel.retract(PARAMS["w"])
    moved = x + landing(100.0, safe=0.3).update(GRADS["w"], landing(0.1).init(x), x)[0]
    assert 0.1 < stiefel.infeasibility(moved) <= 0.3
    x = 1.2 * x
    for _ in range(6):                                                                   # Newton-Schulz steps
        x = x + landing(0.01, "auto").update(0 * x, landing(0.1).init(x), x)[0]
    assert stiefel.infeasibility(x) < 1e-14


class Bowl(tl.Problem):
    """A smooth problem of no family; its gradient is that of its objective."""

    def metrics(self, x):
        return {"objective": jnp.sum(jnp.cosh(x["a"])), "residual": jnp.linalg.norm(jnp.sinh(x["a"]))}


def test_optimizers_run_inside_iterate_and_landing_sees_the_constraint():
    sol = tl.iterate(Bowl(), OptaxMethod(optax.adam(0.1)), {"a": jnp.ones(2)}, steps=600, stop=tl.Below("residual", 1e-6), every=20)
    assert sol.status.name == "CONVERGED"
    problem = gevp()
    mine = tl.iterate(problem, stiefel.Landing(0.2), problem.start(jax.random.key(0)), steps=20, every=20)
    theirs = tl.iterate(problem, OptaxMethod(landing(0.2)), problem.start(jax.random.key(0)), steps=20, every=20)
    assert np.abs(mine.value - theirs.value).max() < 1e-13
    streamed = stiefel.CCA.streamed((DATA, OTHER), p=2, ridge=0.1, dtype=None)
    method = OptaxMethod(optax.chain(optax.trace(0.5), landing(0.1)))
    state = method.init(streamed, streamed.start(jax.random.key(0)), key=None)
    after = jax.jit(lambda s: method.step(streamed.feed((DATA[:20], OTHER[:20])), s, key=None))(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: landing(0.0), ArgumentError, "learning_rate must be a number above 0"),
    (lambda: landing(0.1, -1.0), ArgumentError, "attraction must be a number at least 0"),
    (lambda: landing(0.1, "auto", normal="gradient"), ArgumentError, "attraction must be a number for normal 'gradient'"),
    (lambda: landing(0.1, safe=1.0), ArgumentError, "safe must be a number above 0 and below 1"),
    (lambda: landing(0.1).update(GRADS, landing(0.1).init(PARAMS)), ValueError, "landing needs the parameters"),
    (lambda: landing(0.1).update(GRADS, landing(0.1).init(PARAMS), PARAMS), ShapeError, r"shape \(\.\.\., n, p\) with p at most n, got \(3,\)"),
    (lambda: landing(0.1, constraint=A[:4, :4]).update(GRADS["w"], landing(0.1).init(0), PARAMS["w"]), ShapeError, "constraint must be 6 x 6"),
    (lambda: OptaxMethod(0.1), ArgumentError, "tx must be an optax gradient transformation"),
    (lambda: OptaxMethod(optax.sgd(0.1)).step(tl.Problem(), OptaxMethod(optax.sgd(0.1)).init(tl.Problem(), jnp.ones(2), key=None), key=None),
     ArgumentError, "measures its objective, Problem measures nothing"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
