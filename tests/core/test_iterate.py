"""`iterate`: the host loop, its twins inside compiled code, and what it refuses."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.shapes import DIM, TRACES, Descent, NoisyDescent, Quadratic, quadratic, quadratic_path
from theorylab.core.keys import run_key
from theorylab.errors import (
    ArgumentError,
    NonFiniteError,
    NonFiniteInputError,
    NotConvergedError,
    RunWarning,
    ShapeError,
    ToleranceError,
    UnknownNameError,
)

PROBLEM = quadratic()
X0 = np.linspace(1.0, 2.0, DIM)


def test_the_history_is_that_of_a_plain_numpy_loop():
    sol = tl.iterate(PROBLEM, Descent(0.5), X0, steps=25, record=tl.whole)
    path = quadratic_path(PROBLEM, X0, 0.5, 25)
    np.testing.assert_allclose(sol.history["x"], path, rtol=1e-13)
    np.testing.assert_allclose(sol.history["objective"], np.einsum("ki,ij,kj->k", path, PROBLEM.matrix, path) / 2, rtol=1e-13)
    assert sol.status == tl.Status.COMPLETED and sol.steps == 25
    assert sol.history["step"].tolist() == list(range(26))
    assert sol.history["gradients"].tolist() == list(range(26))


def test_rows_stand_at_multiples_of_every_and_at_the_last_step():
    sol = tl.iterate(PROBLEM, Descent(0.5), X0, steps=25, every=10)
    assert sol.history.axis("step").tolist() == [0, 10, 20, 25]
    assert (np.diff(sol.history.axis("seconds")) >= 0).all()


def test_keep_last_leaves_one_row_and_the_same_value():
    full = tl.iterate(PROBLEM, Descent(0.5), X0, steps=25)
    last = tl.iterate(PROBLEM, Descent(0.5), X0, steps=25, keep="last")
    assert len(last.history) == 1 and last.history["step"].tolist() == [25]
    assert last.history["objective"][0] == full.history["objective"][-1]
    np.testing.assert_array_equal(last.value, full.value)


def test_a_run_stops_at_the_first_row_below_the_level():
    sol = tl.iterate(PROBLEM, Descent(0.5), X0, steps=5000, stop=tl.Below("residual", 1e-6))
    residual = sol.history["residual"]
    assert sol.status == tl.Status.CONVERGED and len(residual) == sol.steps + 1
    assert residual[-1] < 1e-6 <= residual[-2]


def test_a_start_that_meets_the_rule_takes_no_step():
    sol = tl.iterate(PROBLEM, Descent(0.5), np.zeros(DIM), steps=100, stop=tl.Below("residual", 1e-6))
    assert sol.status == tl.Status.CONVERGED and sol.steps == 0 and len(sol.history) == 1


def test_zero_steps_measure_the_start():
    sol = tl.iterate(PROBLEM, Descent(0.5), X0, steps=0)
    assert sol.status == tl.Status.COMPLETED and sol.steps == 0
    np.testing.assert_array_equal(sol.value, X0)


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_the_recording_period_does_not_change_the_run(every):
    base = tl.iterate(PROBLEM, NoisyDescent(0.5), X0, steps=50, key=4)
    other = tl.iterate(PROBLEM, NoisyDescent(0.5), X0, steps=50, key=4, every=every)
    np.testing.assert_array_equal(other.value, base.value)


@pytest.mark.parametrize("growth", [1, 2, 5])
def test_the_length_of_compiled_calls_does_not_change_the_run(growth, monkeypatch):
    base = tl.iterate(PROBLEM, NoisyDescent(0.5), X0, steps=50, key=4, every=3)
    monkeypatch.setattr("theorylab.core.driver.GROWTH", growth)
    monkeypatch.setattr("theorylab.core.driver.CALL_SECONDS", 1e-9 if growth == 1 else 10.0)
    other = tl.iterate(PROBLEM, NoisyDescent(0.5), X0, steps=50, key=4, every=3)
    assert other.stats.chunks > base.stats.chunks
    np.testing.assert_array_equal(other.value, base.value)
    np.testing.assert_array_equal(other.history["objective"], base.history["objective"])


def test_changed_numbers_do_not_compile_again():
    tl.iterate(PROBLEM, NoisyDescent(0.5), X0, steps=30, stop=tl.Below("residual", 1e-3), throw=False)
    before = len(TRACES)
    for change in ({"key": 9}, {"steps": 31}, {"every": 2}, {"stop": tl.Below("residual", 1e-5)}):
        options: dict[str, Any] = {"steps": 30, "stop": tl.Below("residual", 1e-3)} | change
        tl.iterate(PROBLEM, NoisyDescent(0.5), X0, **options, throw=False)
    for step_size in (0.1, 0.2, 1):
        tl.iterate(PROBLEM, NoisyDescent(step_size, noise=0.3), X0, steps=30, stop=tl.Below("residual", 1e-3), throw=False)
    tl.iterate(Quadratic(PROBLEM.matrix * 2), NoisyDescent(0.5), X0 + 1, steps=30, stop=tl.Below("residual", 1e-3), throw=False)
    assert len(TRACES) == before


def test_float32_data_stay_float32():
    sol = tl.iterate(quadratic(dtype=jnp.float32), NoisyDescent(0.5), X0.astype(np.float32), steps=5)
    assert sol.value.dtype == jnp.float32 and sol.history["objective"].dtype == np.float32 and sol.stats.dtype == "float32"


def test_each_run_of_a_batch_is_the_run_of_its_own_key():
    batch = tl.iterate(PROBLEM, NoisyDescent(0.5), steps=40, runs=3, key=7)
    assert batch.value.shape == (3, DIM) and batch.history["objective"].shape == (41, 3)
    assert (batch.status == tl.Status.COMPLETED).all() and batch.steps.tolist() == [40] * 3
    for r in range(3):
        alone = tl.iterate(PROBLEM, NoisyDescent(0.5), steps=40, key=run_key(7, r))
        np.testing.assert_allclose(batch.value[r], alone.value, rtol=1e-13)


def test_a_batch_of_one_equals_the_single_run():
    one = tl.iterate(PROBLEM, Descent(0.5), X0[None], steps=20, runs=1)
    single = tl.iterate(PROBLEM, Descent(0.5), X0, steps=20)
    np.testing.assert_allclose(one.value[0], single.value, rtol=1e-14)


def test_a_finished_run_waits_frozen_for_the_others():
    starts = np.stack([X0 * 1e-4, X0])
    sol = tl.iterate(PROBLEM, Descent(0.5), starts, steps=2000, runs=2, stop=tl.Below("residual", 1e-6))
    short, long = sol.steps
    assert short < long and (sol.status == tl.Status.CONVERGED).all()
    for r in range(2):
        np.testing.assert_allclose(sol.value[r], quadratic_path(PROBLEM, starts[r], 0.5, sol.steps[r])[-1], rtol=1e-10)
    assert sol.history.valid[:, 0].sum() == short + 1
    assert np.isnan(sol.history["residual"][short + 1 :, 0]).all() and np.isfinite(sol.history["residual"][:, 1]).all()
    assert sol.history.last("residual")[0] == sol.history["residual"][short, 0]


def test_divergence_keeps_the_last_finite_iterate():
    with pytest.raises(NonFiniteError, match="smaller step size") as caught:
        tl.iterate(PROBLEM, Descent(1e150), X0, steps=100)
    sol = caught.value.solution
    assert sol.status == tl.Status.NONFINITE and 0 < sol.steps < 5
    assert np.isfinite(sol.value).all() and len(sol.history) == sol.steps + 1
    np.testing.assert_allclose(sol.value, quadratic_path(PROBLEM, X0, 1e150, sol.steps)[-1], rtol=1e-10)


def test_a_batch_warns_once_and_counts():
    starts = np.stack([X0, X0 * 1e300])
    with pytest.warns(RunWarning, match="1 of 2 runs did not end as asked: 1 NONFINITE"):
        sol = tl.iterate(PROBLEM, Descent(1e3), starts, steps=20, runs=2)
    assert sol.status.tolist() == [tl.Status.COMPLETED, tl.Status.NONFINITE]
    assert np.isfinite(sol.value).all()


def test_a_missed_rule_raises_with_the_partial_solution():
    with pytest.raises(NotConvergedError, match=r"not met within 5 steps \(residual = ") as caught:
        tl.iterate(PROBLEM, Descent(0.5), X0, steps=5, stop=tl.Below("residual", 1e-9))
    assert caught.value.solution.steps == 5
    assert tl.iterate(PROBLEM, Descent(0.5), X0, steps=5, stop=tl.Below("residual", 1e-9), throw=False).status == tl.Status.MAX_STEPS


def test_solve_chooses_the_method_and_stops_at_the_residual():
    sol = tl.solve(PROBLEM, X0, tolerance=1e-8)
    assert sol.status == tl.Status.CONVERGED and isinstance(sol.method, Descent)
    assert np.linalg.norm(PROBLEM.matrix @ sol.value) < 1e-8
    with pytest.raises(ArgumentError, match="stop"):
        tl.solve(PROBLEM, X0, stop=tl.Below("residual", 1e-3))
    with pytest.raises(ArgumentError, match="tolerance must be above 0"):
        tl.solve(PROBLEM, X0, tolerance=-1.0)


def test_the_time_budget_stops_and_keeps():
    began = time.perf_counter()
    sol = tl.iterate(PROBLEM, Descent(1e-6), X0, steps=2_000_000_000, every=100_000, seconds=0.3)
    assert sol.status == tl.Status.STOPPED and sol.steps > 0
    assert time.perf_counter() - began < 20


class _Interrupting:
    def start(self, label: str, total: int | None) -> None:
        self.calls = 0

    def update(self, done: int, note: str = "") -> None:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


def test_ctrl_c_keeps_what_was_done(monkeypatch):
    monkeypatch.setattr("theorylab.core.driver.GROWTH", 1)
    progress = _Interrupting()
    sol = tl.iterate(PROBLEM, Descent(0.5), X0, steps=1000, progress=progress)
    assert sol.status == tl.Status.STOPPED and sol.steps == 2 and progress.closed
    np.testing.assert_allclose(sol.value, quadratic_path(PROBLEM, X0, 0.5, 2)[-1], rtol=1e-13)


# ------------------------------------------------------------------------------------------------ inside compiled code


def test_inside_jit_the_same_run_is_one_loop():
    host = tl.iterate(PROBLEM, NoisyDescent(0.5), X0, steps=23, every=5, key=3)
    sol = jax.jit(lambda x: tl.iterate(PROBLEM, NoisyDescent(0.5), x, steps=23, every=5, key=3))(X0)
    np.testing.assert_allclose(sol.value, host.value, rtol=1e-13)
    np.testing.assert_allclose(sol.history["objective"], host.history["objective"], rtol=1e-13)
    assert sol.history["step"].tolist() == host.history["step"].tolist()
    assert int(sol.status) == tl.Status.COMPLETED and sol.stats is None


def test_inside_vmap_lanes_stop_on_their_own():
    starts = np.stack([X0 * 1e-4, X0])
    host = tl.iterate(PROBLEM, Descent(0.5), starts, steps=400, runs=2, stop=tl.Below("residual", 1e-6))
    sol = jax.vmap(lambda x: tl.iterate(PROBLEM, Descent(0.5), x, steps=400, stop=tl.Below("residual", 1e-6), keep="last"))(starts)
    assert sol.steps.tolist() == host.steps.tolist() and sol.status.tolist() == host.status.tolist()
    np.testing.assert_allclose(sol.value, host.value, rtol=1e-12)
    np.testing.assert_allclose(sol.history["residual"][:, 0], host.history.last("residual"), rtol=1e-10)


def test_scan_has_the_derivative_of_the_closed_form():
    values, vectors = np.linalg.eigh(np.asarray(PROBLEM.matrix))
    weights = (vectors.T @ X0) ** 2

    def last(step_size):
        return tl.iterate(PROBLEM, Descent(step_size), X0, steps=20, every=5, loop="scan").history["objective"][-1]

    value, slope = jax.value_and_grad(last)(0.3)
    np.testing.assert_allclose(value, (values * weights * (1 - 0.3 * values) ** 40).sum() / 2, rtol=1e-12)
    np.testing.assert_allclose(slope, (-20 * values**2 * weights * (1 - 0.3 * values) ** 39).sum(), rtol=1e-12)


def test_scan_stops_where_the_host_loop_stops():
    options: dict[str, Any] = {"steps": 120, "every": 4, "stop": tl.Below("residual", 1e-2)}
    host = tl.iterate(PROBLEM, Descent(0.5), X0, **options)
    scan = tl.iterate(PROBLEM, Descent(0.5), X0, **options, loop="scan")
    assert scan.status == host.status == tl.Status.CONVERGED and scan.steps == host.steps
    np.testing.assert_allclose(scan.value, host.value, rtol=1e-13)
    np.testing.assert_allclose(scan.history["residual"], host.history["residual"], rtol=1e-12)


class Nested(Descent):
    """Each step runs an inner solve of its own."""

    def step(self, problem: Any, x: jax.Array, *, key: jax.Array) -> jax.Array:
        return tl.iterate(problem, Descent(self.step_size), x, steps=3, keep="last").value


def test_a_step_may_iterate_itself_also_in_a_batch():
    nested = tl.iterate(PROBLEM, Nested(0.5), np.stack([X0, 2 * X0]), steps=4, runs=2)
    np.testing.assert_allclose(nested.value[0], quadratic_path(PROBLEM, X0, 0.5, 12)[-1], rtol=1e-12)
    np.testing.assert_allclose(nested.value[1], quadratic_path(PROBLEM, 2 * X0, 0.5, 12)[-1], rtol=1e-12)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": -1}, ArgumentError, "steps must be a whole number of at least 0, got -1"),
        ({"steps": 2.5}, ArgumentError, "steps must be a whole number"),
        ({"steps": 5, "every": 0}, ArgumentError, "every must be a whole number of at least 1, got 0"),
        ({"steps": 5, "runs": 0}, ArgumentError, "runs must be a whole number of at least 1, got 0"),
        ({"steps": 5, "seconds": -1}, ArgumentError, "seconds must be above 0, got -1"),
        ({"steps": 5, "keep": "some"}, ArgumentError, "keep must be one of 'all', 'last', got 'some'"),
        ({"steps": 5, "loop": "for"}, ArgumentError, "loop must be one of"),
        ({"steps": 5, "key": "seed"}, ArgumentError, "key must be an integer seed"),
        ({"steps": 5, "stop": 1e-6}, ArgumentError, r"stop must be a stop rule such as Below"),
        ({"steps": 5, "stop": tl.Below("residul", 1e-6)}, UnknownNameError, "did you mean 'residual'"),
        ({"steps": 5, "stop": tl.Below("residual", 1e-17)}, ToleranceError, "float64"),
        ({"steps": 5, "runs": 3}, ShapeError, r"x0 must have a leading axis of 3 \(runs=3\), got shape \(4,\)"),
        ({"steps": 5, "progress": "yes"}, ArgumentError, "progress must be True, False or an object"),
        ({"steps": 5, "loop": "scan", "checkpoint": "x.npz"}, ArgumentError, "checkpoint needs the host loop"),
        ({"steps": 5, "record": lambda p, x: {"objective": x[0]}}, ArgumentError, "record repeats the name 'objective'"),
    ],
)
def test_wrong_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        tl.iterate(PROBLEM, Descent(0.5), X0, **options)


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteInputError, match=r"x0 must be finite, got nan at index \(1,\)"):
        tl.iterate(PROBLEM, Descent(0.5), np.array([1.0, np.nan, 0.0, 0.0]), steps=5)


def test_swapped_arguments_and_bad_hyper_parameters_are_named():
    with pytest.raises(ArgumentError, match="problem must be a Problem, got Descent"):
        tl.iterate(Descent(0.5), PROBLEM, X0, steps=5)
    with pytest.raises(ArgumentError, match="method must be a Method object"):
        tl.iterate(PROBLEM, Descent, X0, steps=5)
    with pytest.raises(ArgumentError, match="Descent: step_size must be above 0, got -1"):
        Descent(-1)
    with pytest.raises(ArgumentError, match="expected a number or a schedule, got 'fast'"):
        Descent("fast")


class Forgetful(Descent):
    """Its step returns another shape than init."""

    def step(self, problem: Any, x: jax.Array, *, key: jax.Array) -> jax.Array:
        return x[:2]


def test_a_step_that_changes_its_state_is_told_which_leaf():
    with pytest.raises(ShapeError, match=r"Forgetful.step changes state from float64\[4\] to float64\[2\]"):
        tl.iterate(PROBLEM, Forgetful(0.5), X0, steps=5)


class Startless(tl.Problem):
    """Has no default starting point."""


def test_a_problem_without_a_start_asks_for_one():
    with pytest.raises(ArgumentError, match="Startless has no default starting point: pass x0"):
        tl.iterate(Startless(), Descent(0.5), steps=1)


class Picky(Descent):
    """Begins at positive points only, and measures with what its state holds."""

    def check(self, problem: Any, x0: Any) -> None:
        if not (np.asarray(x0) > 0).all():
            raise ArgumentError(f"x0 must be positive, got {np.asarray(x0).min():g}")

    def measure(self, problem: Any, state: jax.Array) -> dict[str, jax.Array]:
        return {"seen": jnp.max(state)}


def test_a_method_may_refuse_a_start_and_measure_from_its_state():
    assert list(tl.iterate(PROBLEM, Picky(0.5), X0, steps=3).history.columns) == ["seen", "gradients"]
    with pytest.raises(ArgumentError, match="x0 must be positive, got -1"):
        tl.iterate(PROBLEM, Picky(0.5), -X0 + 1, steps=3)
    with pytest.raises(ArgumentError, match="x0 must be positive, got -1"):
        tl.iterate(PROBLEM, Picky(0.5), np.stack([X0, -X0 + 1]), steps=3, runs=2)
