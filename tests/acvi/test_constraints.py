from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linprog

from theorylab import acvi
from theorylab.acvi import prox
from theorylab.errors import ArgumentError, NonFiniteInputError, ShapeError

DIM = 4
A = jnp.array([[1.0, 1, 0, 0], [-1, 0, 1, 0], [0, -1, 0, 1], [0, 0, -1, -1], [1, -1, 1, -1], [-1, 0, 0, 0]])
B = jnp.array([1.0, 1, 2, 1, 1.5, 0.5])
SETS = {
    "nonnegative": acvi.Nonnegative(), "box": acvi.Box(jnp.array([-1.0, 0, 0.5, -2]), 1.0), "lower": acvi.Box(0.5), "upper": acvi.Box(None, -0.5),
    "halfspace": acvi.HalfSpace(A[0], -1.0), "ball": acvi.Ball(jnp.array([1.0, 0, 0, -1]), 1.5), "polyhedron": acvi.Polyhedron(A, B),
    "psd": acvi.Cone("psd"), "second order": acvi.Cone("second_order"),
    "smooth": acvi.Smooth(lambda x, a: jnp.stack([a * jnp.sum(x**4) - 1.0, jnp.sum(jnp.exp(x)) - 8.0]), jnp.array(2.0)),
    "product": acvi.Product([(acvi.Ball(0.0, 1.0), 3), (acvi.Box(-1.0, 2.0), 1)]),
}
POINTS = jnp.asarray(np.random.default_rng(1).standard_normal((6, DIM)) * np.array([0.1, 1, 2, 3, 5, 10])[:, None])


@functools.cache
def bound(name):
    return SETS[name].bind(DIM)


@functools.cache
def many(name, method):
    """A method of a set on a batch of points, compiled once."""
    K = bound(name)
    function = getattr(K, method)
    return jax.jit(jax.vmap(function, (0, None)) if method == "prox" else jax.vmap(function))


def distance(w, width, t):
    """The root in (0, width/2] of s - w - t/s + t/(width - s), by bisection of its logarithm with 60 digits."""
    with mpmath.workdps(60):
        w, width, t = mpmath.mpf(float(w)), mpmath.mpf(float(width)), mpmath.mpf(float(t))
        low, high = mpmath.log(mpmath.mpf(10) ** -60), mpmath.log(width / 2)
        for _ in range(200):
            middle = (low + high) / 2
            s = mpmath.exp(middle)
            low, high = (low, middle) if s - w - t / s + t / (width - s) > 0 else (middle, high)
        return mpmath.exp((low + high) / 2)


def relative(found, exact):
    return float(abs(mpmath.mpf(float(found)) / exact - 1))


def test_slack_has_full_relative_accuracy_where_the_textbook_formula_cancels(rng):
    w = np.concatenate([-(10.0 ** rng.uniform(-3, 3, 60)), 10.0 ** rng.uniform(-3, 4, 60)])
    t = 10.0 ** rng.uniform(-12, 1, 120)
    found = np.asarray(prox.slack(jnp.asarray(w), jnp.asarray(t)))
    with mpmath.workdps(80):
        exact = [(mpmath.mpf(a) + mpmath.sqrt(mpmath.mpf(a) ** 2 + 4 * mpmath.mpf(b))) / 2 for a, b in zip(w, t)]
        assert max(relative(f, e) for f, e in zip(found, exact)) <= 4.5e-16
    naive = (-1.0 + np.sqrt(1 + 4e-12)) / 2
    assert abs(naive / (1e-12 * (1 - 1e-12)) - 1) > 1e-6


def test_slack_at_weight_zero_is_the_projection_and_has_a_derivative():
    assert prox.slack(jnp.array([-1.0, 0.0, 2.0]), 0.0).tolist() == [0.0, 0.0, 2.0]
    slopes = jax.jit(jax.vmap(jax.grad(lambda w: prox.slack(w, 1e-6))))(jnp.array([-1.0, 0.0, 2.0]))
    assert np.all(np.isfinite(slopes)) and abs(float(slopes[1]) - 0.5) < 1e-12


def test_six_newton_steps_give_the_slack_of_a_box_to_round_off_on_extreme_data(rng):
    width = 10.0 ** rng.uniform(-2, 2, 80)
    t = 10.0 ** rng.uniform(-16, 3, 80)
    w = np.where(rng.uniform(size=80) < 0.5, width * rng.uniform(-3, 0.5, 80), -(10.0 ** rng.uniform(-3, 3, 80)))
    found = np.asarray(prox.wall_slack(jnp.asarray(w), jnp.asarray(width), jnp.asarray(t)))
    assert max(relative(f, distance(*z)) for f, z in zip(found, zip(w, width, t))) <= 4.5e-16


def test_the_prox_of_a_ball_is_that_of_an_interval_along_the_ray(rng):
    ball = acvi.Ball(jnp.array([1.0, -1.0, 0.0, 2.0]), 1.5)
    step = jax.jit(lambda v, t: ball.prox(v, t))  # noqa: PLW0108 (a bound method of a Module is not hashable)
    for t, scale in ((1e-8, 3.0), (1e-3, 0.5), (1.0, 1.0)):
        away = rng.standard_normal(DIM) * scale
        y = step(ball.center + away, t)
        length = np.linalg.norm(away)
        radius = 1.5 - float(distance(1.5 - length, 3.0, t))
        np.testing.assert_allclose(np.asarray(y - ball.center), away / length * radius, rtol=1e-14, atol=1e-15)
    assert np.allclose(step(ball.center, 0.1), ball.center)


def test_the_entropy_prox_is_the_lambert_function(rng):
    v, t = rng.uniform(-1, 5, 100), 10.0 ** rng.uniform(-2, 1, 100)
    with mpmath.workdps(80):
        exact = [mpmath.mpf(b) * mpmath.lambertw(mpmath.exp(mpmath.mpf(a) / mpmath.mpf(b) - 1) / mpmath.mpf(b)).real for a, b in zip(v, t)]
        errors = [relative(f, e) for f, e in zip(np.asarray(prox.entropy(jnp.asarray(v), jnp.asarray(t))), exact)]
    # the exponent v/t - 1 is itself rounded: an error of its size times round-off is the conditioning of the data
    assert np.all(np.asarray(errors) <= 5e-16 * (2 + np.abs(v / t)))
    assert np.isfinite(float(prox.entropy(1e3, 1e-3))), "exp(v/t) would overflow"


def test_the_extended_barrier_prox_is_stationary_on_both_branches():
    t, switch = 0.1, 0.2
    v = jnp.linspace(-3.0, 2.0, 41)
    y = prox.extended(v, t, switch)
    slope = jnp.where(y >= switch, -t / y, -t / switch)
    np.testing.assert_allclose(np.asarray(y - v + slope), 0, atol=1e-15)
    assert float(jnp.min(y)) < 0, "the linear branch is finite outside"
    assert np.array_equal(prox.extended(v, t, 0.0), prox.slack(v, t))


@pytest.mark.parametrize("name", SETS)
def test_the_prox_is_strictly_inside_and_stationary(name):
    for t in (1.0, 1e-3):
        y = many(name, "prox")(POINTS, t)
        start = jax.vmap(lambda v: (v.reshape(2, 2) + v.reshape(2, 2).T).reshape(-1) / 2)(POINTS) if name == "psd" else POINTS
        residual = y - start + t * many(name, "barrier_gradient")(y)
        assert float(many(name, "slack")(y).min()) > 0
        assert float(jnp.abs(residual).max()) < 1e-10


@pytest.mark.parametrize("name", SETS)
def test_the_barrier_gradient_is_the_derivative_of_the_barrier(name):
    K = bound(name)
    y = many(name, "prox")(POINTS, 0.5)
    found, by_autodiff = many(name, "barrier_gradient")(y), jax.jit(jax.vmap(jax.grad(K.barrier)))(y)
    np.testing.assert_allclose(np.asarray(found), np.asarray(by_autodiff), rtol=1e-8, atol=1e-10)
    outside = many(name, "slack")(-POINTS) <= 0
    assert bool(outside.any()), "some point is outside"
    assert np.array_equal(many(name, "barrier")(-POINTS) == jnp.inf, outside)


@pytest.mark.parametrize("name", SETS)
def test_the_projection_is_feasible_and_satisfies_the_obtuse_angle_condition(name):
    z, inside = many(name, "project")(POINTS), many(name, "prox")(POINTS, 0.3)
    angles = jnp.einsum("id,ijd->ij", POINTS - z, inside[None, :, :] - z[:, None, :])
    assert float(many(name, "violation")(z).max()) < 1e-12
    assert float(angles.max()) < 1e-8
    np.testing.assert_allclose(np.asarray(many(name, "project")(inside)), np.asarray(inside), atol=1e-14)


@pytest.mark.parametrize("name", SETS)
def test_prox_and_projection_differ_by_at_most_the_root_of_m_t(name):
    m = bound(name).barrier_terms(DIM)
    for t in (1.0, 1e-2, 1e-6):
        gaps = jnp.linalg.norm(many(name, "prox")(POINTS, t) - many(name, "project")(POINTS), axis=1)
        assert float(gaps.max()) <= (m * t) ** 0.5 * (1 + 1e-12) + 1e-9 * (name == "smooth")


def test_the_bound_between_prox_and_projection_is_attained_at_the_wall():
    assert float(acvi.Nonnegative().prox(jnp.zeros(3), 1e-4)[0]) == pytest.approx(1e-2, rel=1e-15)


def test_the_number_of_barrier_terms():
    terms = {name: bound(name).barrier_terms(DIM) for name in SETS}
    assert terms == {"nonnegative": 4, "box": 8, "lower": 4, "upper": 4, "halfspace": 1, "ball": 1, "polyhedron": 6, "psd": 2, "second order": 2,
                     "smooth": 2, "product": 3}
    assert acvi.Free().barrier_terms(7) == 0


@pytest.mark.parametrize("name", SETS)
def test_the_interior_point_is_inside(name):
    points = jnp.tile(bound(name).interior_point(DIM), (6, 1))
    assert float(many(name, "slack")(points)[0]) > 0
    assert float(many(name, "violation")(points)[0]) == 0


def test_support_functions_of_simple_sets_bound_all_points_and_are_attained(rng):
    for name in ("box", "ball", "product"):
        K, s = bound(name), POINTS[3]
        inside = many(name, "project")(jnp.asarray(rng.standard_normal((200, DIM)) * 3))
        touching = K.project(1e4 * s)
        assert float((inside @ s).max()) <= float(K.support(s)) + 1e-12
        assert float(K.support(s)) == pytest.approx(float(touching @ s), rel=1e-3)
    for name, along in (("nonnegative", -POINTS[3] ** 2), ("halfspace", 2 * A[0])):
        assert np.isfinite(float(bound(name).support(along)))
        assert bound(name).support(-along) == jnp.inf
    assert bound("halfspace").support(2 * A[0]) == -2.0
    negative = -jnp.eye(2).reshape(-1)
    assert bound("psd").support(negative) == 0 and bound("psd").support(-negative) == jnp.inf


@pytest.mark.parametrize("name", ["box", "ball", "halfspace", "psd", "product"])
def test_single_precision_stays_single(name):
    K, v = bound(name), POINTS[1].astype(jnp.float32)
    values = jax.jit(lambda v: (K.prox(v, 1e-3), K.project(v), K.barrier_gradient(K.prox(v, 0.1)), K.support(v), K.slack(v), K.barrier(v),
                                K.violation(v)))(v)
    assert all(value.dtype == jnp.float32 for value in values)
    double = many(name, "prox")(POINTS, 1e-3)[1]
    assert float(jnp.abs(values[0].astype(float) - double).max()) < 1e-4 * (1 + float(jnp.abs(double).max()))


def test_single_precision_slacks_keep_their_relative_accuracy():
    found = float(prox.slack(jnp.float32(-1.0), 1e-6))
    assert found == pytest.approx(1e-6 * (1 - 1e-6), rel=3e-7)


@given(st.lists(st.floats(-50, 50), min_size=8, max_size=8), st.floats(1e-6, 10.0), st.sampled_from(["box", "ball", "second order", "product"]))
@settings(max_examples=30, deadline=None)
def test_the_prox_is_firmly_nonexpansive(entries, t, name):
    v, w = pair = jnp.asarray(entries).reshape(2, DIM)
    p, q = many(name, "prox")(jnp.concatenate([pair, POINTS[2:]]), t)[:2]
    assert float((p - q) @ (p - q)) <= float((p - q) @ (v - w)) * (1 + 1e-12) + 1e-9


def test_a_weight_per_coordinate_is_the_prox_of_each():
    t = jnp.array([1e-3, 1.0, 0.1, 2.0])
    for K in (acvi.Nonnegative(), acvi.Box(-1.0, 1.0), acvi.Product([(acvi.Box(-1.0, 1.0), 3), (acvi.Nonnegative(), 1)])):
        step = jax.jit(K.prox.__func__)
        whole, apart = step(K, POINTS[1], t), jnp.stack([step(K, POINTS[1], t[i])[i] for i in range(DIM)])
        assert np.array_equal(whole, apart)


def test_a_smooth_set_searches_its_own_inner_point():
    far = acvi.Smooth(lambda x, a: jnp.sum((x - a) ** 2) - 0.01, jnp.array([3.0, -2.0])).bind(2)
    assert float(far.slack(far.interior_point())) > 0
    np.testing.assert_allclose(np.asarray(far.project(jnp.zeros(2))), np.array([3.0, -2.0]) * (1 - 0.1 / np.sqrt(13)), rtol=1e-8)
    with pytest.raises(ArgumentError, match="no point strictly inside"):
        acvi.Smooth(lambda x, a: jnp.sum(x**2) + 1.0).bind(2)


@jax.jit
def polyhedron_values(A, b, s, v):
    K = acvi.Polyhedron(A, b)
    return K.support(s), K.project(v), K.interior_point()


@pytest.mark.slow
def test_random_polyhedra_agree_with_linear_programs_and_dual_ascent(rng):
    solid = 0
    for _ in range(20):
        A, b, s, v = rng.standard_normal((14, DIM)), rng.uniform(-0.3, 1, 14), rng.standard_normal(DIM), 3 * rng.standard_normal(DIM)
        ball = linprog(np.append(np.zeros(DIM), -1), A_ub=np.c_[A, np.linalg.norm(A, axis=1)], b_ub=b, bounds=[(None, None)] * DIM + [(None, 1)])
        value, nearest, inside = polyhedron_values(A, b, s, v)
        assert (np.min(b - A @ np.asarray(inside)) > 0) == (ball.x[-1] > 0), "an interior is found exactly when there is one"
        if ball.x[-1] > 1e-6:
            solid += 1
            program = linprog(-s, A_ub=A, b_ub=b, bounds=(None, None))
            assert float(value) == (pytest.approx(-program.fun, abs=1e-10) if program.status == 0 else np.inf)
            np.testing.assert_allclose(np.asarray(nearest), np.asarray(acvi.hildreth(v, A, b)), atol=1e-11)
    assert solid >= 5


def test_a_polyhedron_without_interior_is_refused():
    with pytest.raises(ArgumentError, match="needs an interior"):
        acvi.Polyhedron(np.array([[1.0, 0], [-1, 0]]), np.array([1.0, -1.0]))
    with pytest.raises(ArgumentError, match="needs an interior"):
        acvi.Polyhedron(np.array([[1.0, 0], [-1, 0]]), np.array([1.0, -3.0]))
    thin = acvi.Polyhedron(np.array([[1.0, 0], [-1, 0]]), np.array([1e-3, 0]))
    assert float(thin.slack(thin.interior_point())) > 0


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: acvi.Box(1.0, 1.0), ArgumentError, "lower must be below upper"),
    (lambda: acvi.Box(np.zeros(3), np.array([1.0, -1.0, 1.0])), ArgumentError, "index 1"),
    (lambda: acvi.Box(np.zeros(3), np.ones(2)), ShapeError, "one length"),
    (acvi.Box, ArgumentError, "Free"),
    (lambda: acvi.Box(np.array([np.nan])), NonFiniteInputError, "lower"),
    (lambda: acvi.Box(np.zeros((2, 1)), 1.0), ShapeError, "lower"),
    (lambda: acvi.Ball(0.0, 0.0), ArgumentError, "radius must be above 0"),
    (lambda: acvi.Ball(0.0, -1.0), ArgumentError, "radius must be above 0"),
    (lambda: acvi.Ball(0.0, np.ones(2)), ShapeError, "radius must be a number"),
    (lambda: acvi.HalfSpace(np.zeros(3), 1.0), ArgumentError, "normal must not be 0"),
    (lambda: acvi.HalfSpace(np.ones((3, 1)), 1.0), ShapeError, "normal"),
    (lambda: acvi.Polyhedron(np.ones((2, 3)), np.ones(3)), ShapeError, "Polyhedron b"),
    (lambda: acvi.Polyhedron(np.array([[1.0, 0], [0, 0]]), np.ones(2)), ArgumentError, "row 1 of A is 0"),
    (lambda: acvi.Cone("cube"), ArgumentError, "kind"),
    (lambda: acvi.Cone("psd").bind(5), ShapeError, "square number"),
    (lambda: acvi.Cone("second_order").bind(1), ShapeError, "at least 2"),
    (lambda: acvi.Ball(np.zeros(3), 1.0).bind(4), ShapeError, "dimension 3"),
    (lambda: acvi.Product([]), ArgumentError, "blocks"),
    (lambda: acvi.Product([(acvi.Nonnegative(), 0)]), ArgumentError, "Product size"),
    (lambda: acvi.Product([("box", 2)]), ArgumentError, "constraint set"),
    (lambda: acvi.Product([(acvi.Ball(np.zeros(3), 1.0), 2)]), ShapeError, "dimension 3"),
    (lambda: acvi.Smooth(3.0), ArgumentError, "function"),
    (lambda: acvi.Smooth(lambda x, a: x @ x - 1.0, inside=np.ones(2)), ArgumentError, "must make the function negative"),
    (lambda: acvi.Smooth(lambda x, a: x[:, None]).bind(2), ShapeError, "number or a vector"),
    (lambda: acvi.Nonnegative().interior_point(), ArgumentError, "pass dim"),
])
def test_bad_sets_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_sets_that_know_their_dimension_stand_alone_in_a_product():
    last = (acvi.Nonnegative(), 1)
    alone, pairs = acvi.Product([acvi.Ball(np.zeros(3), 1.0), last]), acvi.Product([(acvi.Ball(0.0, 1.0), 3), last])
    assert alone.sizes == pairs.sizes == (3, 1)
    assert np.array_equal(alone.project(POINTS[-1]), pairs.project(POINTS[-1]))
    with pytest.raises(ArgumentError, match="pairs"):
        acvi.Product([acvi.Nonnegative()])


def test_whole_numbers_do_not_cut_the_data_of_a_set():
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(acvi.Ball(0.5, 1.0).project(jnp.array([3, 4])), acvi.Ball(0.5, 1.0).project(jnp.array([3.0, 4.0])))
        np.testing.assert_allclose(acvi.HalfSpace([0.5, 1.0], 0.5).project(jnp.array([1, 1])), acvi.HalfSpace([0.5, 1.0], 0.5).project(jnp.ones(2)))
