"""`integrate`: values against SciPy and closed forms, events, options, compiled code, refusals."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import theorylab as tl
from tests.core.flows import TIMES, TRACES, Decay, Oscillator, Tracking, clock, oscillate, start
from theorylab.core import stepping
from theorylab.core.integrate import integrate
from theorylab.errors import (
    ArgumentError,
    NonFiniteError,
    NonFiniteInputError,
    NotConvergedError,
    PrecisionError,
    RunWarning,
    ShapeError,
    ToleranceError,
)


class Broken(tl.Flow):
    """A field that fails in a chosen way."""

    kind: str = tl.choice("shape")

    def field(self, t: jax.Array, y: Any) -> Any:
        return {"shape": lambda: y[:1], "dtype": lambda: y.astype(jnp.float32), "tree": lambda: (y, y)}[self.kind]()


def van_der_pol(damping: float = 1.0, times: np.ndarray = TIMES) -> np.ndarray:
    def field(t: float, y: np.ndarray) -> list[float]:
        return [y[1], damping * (1 - y[0] ** 2) * y[1] - y[0] + np.sin(t)]

    return solve_ivp(field, times[[0, -1]], [2.0, 0.0], "DOP853", times, rtol=1e-12, atol=1e-12).y


# ------------------------------------------------------------------------------------------------------------------- values and history


def test_states_and_columns_are_those_of_scipy():
    sol, exact = oscillate(), van_der_pol()
    np.testing.assert_allclose([sol.value["q"], sol.value["p"]], exact, atol=1e-6)
    np.testing.assert_allclose(sol.history["energy"], (exact**2).sum(0) / 2, atol=1e-5)
    np.testing.assert_array_equal(sol.history["where"][:, 0], sol.value["q"])
    assert sol.history["clock"].tolist() == sol.history.axis("time").tolist() == TIMES.tolist()
    assert sol.status == tl.Status.COMPLETED and sol.history.valid.all() and sol.success


def test_the_error_follows_the_tolerance():
    exact = van_der_pol()
    errors = [np.abs(oscillate(rtol=tol, atol=tol, solver=diffrax.Dopri8()).value["q"] - exact[0]).max() for tol in (1e-5, 1e-7, 1e-9, 1e-11)]
    assert all(b < a / 10 for a, b in itertools.pairwise(errors)) and errors[-1] < 1e-9


def test_counters_tell_steps_and_the_time_reached():
    sol = oscillate()
    counters = sol.stats.counters
    assert sol.steps == counters["accepted"] > 5 and counters["rejected"] >= 0 and counters["last_time"] == 6.0 and counters["event"] is None
    assert sol.stats.dtype == "float64" and sol.stats.chunks == 1
    assert sol.provenance["settings"]["solver"] == "Dopri8" and isinstance(sol.method, diffrax.Dopri8)
    assert "COMPLETED" in repr(sol)


def test_save_times_cost_no_steps():
    sparse = integrate(Oscillator(), start(), TIMES[[0, -1]], record=clock)
    assert sparse.steps == oscillate().steps
    np.testing.assert_array_equal(sparse.value["q"][-1], oscillate().value["q"][-1])


def test_one_time_gives_back_the_start():
    sol = integrate(Decay(), [1.0, 2.0], [3.0])
    assert sol.status == tl.Status.COMPLETED and sol.steps == 0 and sol.value.tolist() == [[1.0, 2.0]] and sol.history["time"].tolist() == [3.0]


def test_new_numbers_do_not_recompile():
    oscillate()
    before = len(TRACES)
    for damping in (0.5, 2.0):
        for tol in (1e-7, 1e-9):
            integrate(Oscillator(damping), {"q": jnp.asarray(1.0), "p": jnp.asarray(damping)}, TIMES + damping, record=clock, rtol=tol, atol=tol / 7,
                      collapse=tol, max_steps=int(1 / damping * 5000))
    assert len(TRACES) == before


def test_the_solver_follows_the_tolerance_unless_one_is_named():
    flow, y0, times = Decay(), np.array([1.0, 2.0]), [0.0, 1.0]
    assert isinstance(integrate(flow, y0, times, rtol=1e-6).method, diffrax.Tsit5)
    assert isinstance(integrate(flow, y0, times, rtol=0.9e-6).method, diffrax.Dopri8)


# ------------------------------------------------------------------------------------------------------------------------ fixed and stiff


def test_a_fixed_step_is_that_of_euler_and_needs_no_error_estimate():
    sol = integrate(Decay(), np.array([1.0, 2.0]), [0.0, 0.5, 1.0], step=0.01, solver=diffrax.Euler())
    np.testing.assert_allclose(sol.value[:, 0], [1.0, 0.99**50, 0.99**100], rtol=1e-13)
    assert sol.steps == 100 and sol.stats.counters["rejected"] == 0


def test_a_fixed_step_that_is_unstable_ends_at_the_last_finite_state():
    with pytest.raises(NonFiniteError, match="smaller step") as caught:
        integrate(Tracking(1e6), [0.0], [0.0, 0.5, 1.0], step=0.01, solver=diffrax.Euler())
    sol = caught.value.solution
    assert np.isfinite(np.asarray(sol.value)).all() and abs(sol.value[-1]).max() > 1e290


def test_a_stiff_equation_needs_few_implicit_steps_and_is_accurate_at_every_save_time():
    rate, times = 1e5, np.linspace(0.0, 3.0, 7)
    sol = integrate(Tracking(rate), [0.0], times, stiff=True, rtol=1e-7)
    exact = (rate**2 * np.cos(times) + rate * np.sin(times) - rate**2 * np.exp(-rate * times)) / (1 + rate**2)
    np.testing.assert_allclose(sol.value[:, 0], exact, atol=1e-6)
    assert sol.steps < 300
    with pytest.raises(NotConvergedError, match="stiff=True"):
        integrate(Tracking(rate), [0.0], times)


# ----------------------------------------------------------------------------------------------------------------------------------- ends


def test_an_event_ends_a_run_with_its_status_and_name():
    sol = integrate(Decay(level=0.1), [1.0, 0.5], [0.0, 1.0, 5.0])
    assert sol.status == tl.Status.CONVERGED and sol.stats.counters["event"] == "below"
    end = sol.stats.counters["last_time"]
    assert sol.history["time"].tolist() == [0.0, 1.0, end] and np.log(10) <= end < 5
    np.testing.assert_allclose(sol.value[:, 0], np.exp([0.0, -1.0, -end]), rtol=1e-7)


def test_lanes_end_by_different_events():
    y0 = np.array([[1.0, 1.0], [0.15, 0.1], [0.01, 0.05]])
    with pytest.warns(RunWarning, match="1 UNDECIDED"):
        sol = integrate(Decay(level=0.1, limit=1.0), y0, [0.0, 0.25, 5.0], runs=3)
    assert [tl.Status(s).name for s in sol.status] == ["UNDECIDED", "CONVERGED", "CONVERGED"]
    assert sol.stats.counters["event"] == ["late", "below", "below"]
    assert sol.steps[2] == 0 and sol.stats.counters["last_time"][2] == 0
    assert (sol.value[:, 2] == y0[2]).all() and sol.history.valid[:, 2].tolist() == [True, False, False]


def test_too_few_steps_raise_with_the_partial_solution():
    with pytest.raises(NotConvergedError, match=r"max_steps=12 .* before 6 \(\d+ accepted, \d+ rejected\)") as caught:
        oscillate(max_steps=12)
    sol = caught.value.solution
    assert sol.status == tl.Status.MAX_STEPS and 1 < len(sol.history) < len(TIMES)
    full = oscillate()
    np.testing.assert_array_equal(sol.value["q"][:-1], full.value["q"][: len(sol.history) - 1])
    assert oscillate(max_steps=12, throw=False).status == tl.Status.MAX_STEPS


# --------------------------------------------------------------------------------------------------------------------- inside compiled code


@jax.jit
def traced(y0: jax.Array, level: jax.Array) -> tl.Solution:
    return integrate(Decay(level=level), y0, jnp.array([0.0, 1.0, 5.0]))


def test_in_compiled_code_the_solution_is_a_tree_with_a_status():
    sol = traced(jnp.array([1.0, 0.5]), jnp.asarray(0.1))
    host = integrate(Decay(level=0.1), [1.0, 0.5], [0.0, 1.0, 5.0])
    assert sol.status == tl.Status.CONVERGED and sol.stats is None and sol.provenance is None
    np.testing.assert_allclose(sol.value[:2], host.value[:2], rtol=1e-8)
    assert sol.value[2, 0] < 0.1 < 1.2 * sol.value[2, 0]  # a row after the end repeats the state at the end
    assert sol.history.valid.tolist() == [True, True, False] and sol.history["time"].tolist() == [0.0, 1.0, 5.0]


def test_vmap_gives_each_lane_its_own_end():
    y0, level = jnp.array([[1.0, 0.5], [0.2, 0.1], [0.01, 0.01]]), jnp.array([0.1, 0.0, 0.1])
    sol = jax.vmap(traced)(y0, level)
    assert [tl.Status(int(s)).name for s in sol.status] == ["CONVERGED", "COMPLETED", "CONVERGED"]
    for lane in range(3):  # error estimates of the first steps are round-off, so a lane takes other steps than the single run
        valid = sol.history.valid[lane]
        np.testing.assert_allclose(sol.value[lane][valid], traced(y0[lane], level[lane]).value[valid], rtol=1e-8)
    np.testing.assert_array_equal(sol.value[2], np.broadcast_to(y0[2], (3, 2)))


def test_nothing_raises_in_compiled_code():
    sol = jax.jit(lambda y: integrate(Decay(), y, jnp.array([0.0, 1.0, 5.0]), max_steps=3))(jnp.array([1.0, jnp.nan]))
    assert sol.status == tl.Status.NONFINITE and sol.steps == 0


def test_options_of_the_host_are_refused_in_compiled_code(tmp_path):
    for name, value in (("segment", 2), ("checkpoint", tmp_path / "c.npz"), ("progress", True)):
        with pytest.raises(ArgumentError, match=f"{name} needs the host"):
            jax.jit(lambda y: integrate(Decay(), y, [0.0, 1.0], **{name: value}).value)(jnp.ones(2))  # noqa: B023


def test_a_sharded_batch_stays_sharded_and_each_lane_has_its_own_end():
    script = textwrap.dedent("""
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        import theorylab as tl
        from theorylab.core.integrate import integrate

        class Square(tl.Flow):
            def field(self, t, y): return y * y

        lanes = NamedSharding(Mesh(np.array(jax.devices()), ("lanes",)), PartitionSpec("lanes"))
        y0 = np.linspace(0.1, 2.0, 8)[:, None]
        sol = integrate(Square(), jax.device_put(y0, lanes), [0.0, 0.25, 2.0], runs=8, rtol=1e-6)
        assert len(jax.devices()) == 2 and not sol.value.sharding.is_fully_replicated, sol.value.sharding
        np.testing.assert_array_equal(sol.status, np.where(y0[:, 0] > 0.5, tl.Status.BLOWUP, tl.Status.COMPLETED))
        np.testing.assert_allclose(sol.value[1], y0 / (1 - 0.25 * y0), rtol=1e-4)
        print("agrees")
    """)
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu",
                   "PYTHONPATH": str(Path(tl.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "agrees", done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------------------------------------- refusals

Y, T = np.array([1.0, 2.0]), [0.0, 1.0]


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ArgumentError, "flow must be a Flow, got function", (lambda t, y: y, Y, T), {}),
        (ArgumentError, "times must increase, got decreasing times: .* negated times", (Decay(), Y, [1.0, 0.0]), {}),
        (ArgumentError, r"times must increase strictly, got 1 at index 1 and 1 after it", (Decay(), Y, [0.0, 1.0, 1.0]), {}),
        (ArgumentError, r"times must increase strictly, .*float32", (Decay(), Y.astype(np.float32), [1.0, 1.0 + 1e-12]), {"rtol": 1e-5}),
        (ArgumentError, "times must be finite, got inf at index 1", (Decay(), Y, [0.0, np.inf]), {}),
        (ShapeError, r"times must be one axis of at least one time, got shape \(0,\)", (Decay(), Y, []), {}),
        (ShapeError, r"times must be one axis of at least one time, got shape \(1, 2\)", (Decay(), Y, [T]), {}),
        (ArgumentError, "times must be real numbers, got 'soon'", (Decay(), Y, "soon"), {}),
        (NonFiniteInputError, r"y0 must be finite, got nan at index \(1,\)", (Decay(), jnp.array([1.0, np.nan]), T), {}),
        (PrecisionError, "y0 must be of dtype float32 or float64, got int64", (Decay(), np.array([1, 2]), T), {}),
        (PrecisionError, "got complex128; .* real and imaginary parts", (Decay(), Y + 1j, T), {}),
        (PrecisionError, "y0 must be of one dtype", (Oscillator(), {"q": np.float32(1), "p": np.float64(1)}, T), {}),
        (ArgumentError, "y0 must hold at least one array", (Decay(), None, T), {}),
        (ArgumentError, r"y0\['q'\] must be an array, got str", (Oscillator(), {"q": "a", "p": 1.0}, T), {}),
        (ShapeError, r"y0 must have a leading axis of 3 \(runs=3\), got shape \(2,\)", (Decay(), Y, T), {"runs": 3}),
        (ArgumentError, "runs must be a whole number at least 1, got 0", (Decay(), Y, T), {"runs": 0}),
        (ToleranceError, "rtol must be at least 2.2e-15 for float64 data, got 1e-16", (Decay(), Y, T), {"rtol": 1e-16}),
        (ToleranceError, "rtol must be at least 1.2e-06 for float32 data, got 1e-08", (Decay(), Y.astype(np.float32), T), {}),
        (ArgumentError, "rtol must be a number above 0, got 0", (Decay(), Y, T), {"rtol": 0}),
        (ArgumentError, "atol must be a number at least 0, got -1", (Decay(), Y, T), {"atol": -1}),
        (ArgumentError, "collapse must be a number at least 0 and below 1, got 1", (Decay(), Y, T), {"collapse": 1}),
        (ArgumentError, "step must be a number above 0, got -0.1", (Decay(), Y, T), {"step": -0.1}),
        (ArgumentError, "step=1e-05 needs 100000 steps, more than max_steps=4096", (Decay(), Y, T), {"step": 1e-5}),
        (ArgumentError, "max_steps must be a whole number at least 1, got 0", (Decay(), Y, T), {"max_steps": 0}),
        (ArgumentError, "segment must be a whole number at least 1, got 0", (Decay(), Y, T), {"segment": 0}),
        (ArgumentError, "solver must be a diffrax solver", (Decay(), Y, T), {"solver": "dopri8"}),
        (ArgumentError, "pass one of them", (Decay(), Y, T), {"solver": diffrax.Tsit5(), "stiff": True}),
        (ArgumentError, "solver Euler estimates no error .* pass step=", (Decay(), Y, T), {"solver": diffrax.Euler()}),
        (ArgumentError, "progress must be True, False or an object", (Decay(), Y, T), {"progress": 3}),
        (ArgumentError, "record repeats the name 'energy'", (Oscillator(), start(), T), {"record": lambda t, y: {"energy": t}}),
        (ArgumentError, "called 'time'", (Decay(), Y, T), {"record": lambda t, y: {"time": t}}),
        (ShapeError, r"field must return at y an array like the state, float64\[2\], got float64\[1\]", (Broken("shape"), Y, T), {}),
        (ShapeError, r"got float32\[2\]", (Broken("dtype"), Y, T), {}),
        (ShapeError, "Broken.field must return the structure of the state", (Broken("tree"), Y, T), {}),
    ],
)
def test_bad_input_is_refused_in_words(error, message, arguments, options):
    with pytest.raises(error, match=message):
        integrate(*arguments, **options)


def test_an_event_test_must_give_one_truth_value():
    class Vector(Decay):
        def events(self) -> tuple[tl.Event, ...]:
            return (tl.Event("each", lambda t, y: y < 0),)

    with pytest.raises(ShapeError, match=r"event 'each': its test must return one truth value, got bool\[2\]"):
        integrate(Vector(), Y, T)


def test_rows_of_large_states_are_measured_one_at_a_time_with_the_same_result(monkeypatch):
    whole = oscillate()
    monkeypatch.setattr(stepping, "ROWS_AT_ONCE", 4)
    other = integrate(Oscillator(), start(), TIMES[:12], record=clock)
    np.testing.assert_allclose(other.history["energy"], whole.history["energy"][:12], rtol=1e-7)
    assert other.history["where"].shape == (12, 2)
