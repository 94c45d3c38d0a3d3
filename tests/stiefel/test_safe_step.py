"""Safe steps: the exact quartic against polynomial roots, the proved bound, and the published rule that is no bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from theorylab import stiefel
from theorylab.errors import ArgumentError, ShapeError, UnknownNameError
from theorylab.stiefel.safe_step import exact_step

N, P = 6, 3
EXACT = jax.jit(exact_step)


def instance(seed: int, outside: bool = False) -> tuple:
    """B, a point within (or outside) the radius, a landing field with the weight of its normal term, and the radius."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(N, N)))[0]
    b = q @ np.diag(np.geomspace(1, 10 ** -rng.uniform(0, 2), N)) @ q.T
    radius = rng.uniform(0.1, 0.9)
    x = rng.normal(size=(N, P))
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ b @ x)).T
    h = rng.normal(size=(P, P))
    h = (h + h.T) / np.linalg.norm(h + h.T) * (min(0.95, 1.1 * radius) if outside else radius * rng.uniform(0, 1))
    x = x @ np.linalg.cholesky(np.eye(P) + h).T
    attraction = 10 ** rng.uniform(-1, 1)
    g = rng.normal(size=(N, P)) * 10 ** rng.uniform(-2, 2)
    return b, x, g, attraction, radius


def violation(b, x):
    return np.linalg.norm(x.T @ b @ x - np.eye(P))


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_exact_step_is_the_first_upward_root_of_the_quartic(seed, outside):
    b, x, g, attraction, radius = instance(seed, outside)
    field = np.asarray(stiefel.landing_field(g, x, b @ x, attraction, normal="gradient"))
    h, cross, z = x.T @ b @ x - np.eye(P), x.T @ b @ field, field.T @ b @ field
    w, level = cross + cross.T, max(radius**2, np.sum(h**2))
    quartic = np.array([np.sum(z * z), -2 * np.sum(w * z), np.sum(w * w) + 2 * np.sum(h * z), -2 * np.sum(h * w), np.sum(h * h) - level])
    quartic = quartic if np.sum(h**2) < radius**2 else quartic[:4]                 # the root at 0 is divided out
    roots = np.roots(quartic)
    real = np.sort(roots[(np.abs(roots.imag) < 1e-9 * np.abs(roots)) & (roots.real > 0)].real)
    expected = next(r for r in real if np.polyval(np.polyder(quartic), r) > 0)
    assert abs(EXACT(h, w, z, radius, np.inf) - expected) < 1e-9 * expected


@pytest.mark.parametrize("normal", ["gradient", "newton_schulz"])
def test_the_rigorous_step_is_safe_all_the_way_and_never_larger_than_the_exact_one(normal):
    for seed in range(25):
        b, x, g, attraction, radius = instance(seed)
        field = np.asarray(stiefel.landing_field(g, x, b @ x, attraction, normal=normal))
        exact = float(stiefel.safe_step_size(x, field, b, radius))
        bound = float(stiefel.safe_step_size(x, field, b, radius, "rigorous", attraction=attraction, normal=normal))
        assert 0 < bound <= exact
        assert all(violation(b, x - c * bound * field) <= radius * (1 + 1e-12) for c in (0.25, 0.5, 0.75, 1.0))
        assert abs(violation(b, x - exact * field) / radius - 1) < 1e-6
        assert violation(b, x - 1.001 * exact * field) > radius


def test_the_rigorous_step_is_the_closed_form():
    b, x, g, attraction, radius = instance(3)
    field = np.asarray(stiefel.landing_field(g, x, b @ x, attraction, normal="gradient"))
    h = x.T @ b @ x - np.eye(P)
    n2, l2, d2 = np.sum((b @ x @ h) ** 2), np.sum(field**2), np.sum(h**2)
    c = np.linalg.eigvalsh(b)[-1] * (2 + 3 * radius)
    expected = (attraction * n2 + np.sqrt(attraction**2 * n2**2 + c * l2 * (radius**2 - d2) / 2)) / (c * l2)
    assert abs(stiefel.safe_step_size(x, field, b, radius, "rigorous", attraction=attraction, normal="gradient") - expected) < 1e-12 * expected


def test_the_official_step_leaves_the_region_in_most_cases():
    """The share depends on the condition of B: none of 100 at condition 10 with unit gradients, all of 100 at condition 1000."""
    left = 0
    for seed in range(10):
        _, x, g, _, _ = instance(seed)
        b = np.diag(np.geomspace(1, 1e-3, N))
        x = np.asarray(stiefel.retract(x, b)) @ np.linalg.cholesky(np.eye(P) * (1 + 0.1 * seed / 10)).T
        field = np.asarray(stiefel.landing_field(g / np.linalg.norm(g), x, b @ x, normal="gradient"))
        step = float(stiefel.safe_step_size(x, field, b, 0.5, "official", normal="gradient"))
        left += violation(b, x - step * field) > 0.5 * (1 + 1e-9)
    assert left >= 6


def test_without_a_field_any_step_is_safe():
    x = np.eye(N)[:, :P]
    for rule in ("exact", "rigorous", "official"):
        assert stiefel.safe_step_size(x, 0 * x, None, 0.5, rule, largest=7.0) == 7.0


def test_a_field_that_leads_out_from_outside_has_no_safe_step():
    x = 1.4 * np.eye(N)[:, :1]
    assert stiefel.safe_step_size(x, -x, None, 0.5) == 0
    inward = float(stiefel.safe_step_size(x, x, None, 0.5))
    assert abs((1.4 * (1 - inward)) ** 2 - 1 + (1.96 - 1)) < 1e-12       # until the violation is as large on the other side


def test_the_largest_step_is_returned_where_nothing_is_crossed_before_it():
    b, x, g, attraction, radius = instance(1)
    field = np.asarray(stiefel.landing_field(g, x, b @ x, attraction))
    exact = float(stiefel.safe_step_size(x, field, b, radius))
    assert stiefel.safe_step_size(x, field, b, radius, largest=exact / 2) == exact / 2


def test_three_positive_roots_occur_and_the_first_is_taken():
    """|1/2 - 8 t + 9.2 t^2| leaves the interval of radius 0.9 three times before it stays outside."""
    radius, t = 0.9, np.linspace(0, 1, 2_000_001)
    crossings = np.flatnonzero(np.diff((np.abs(0.5 - 8 * t + 9.2 * t**2) > radius).astype(int)))
    assert len(crossings) == 3
    h, w, z = (jnp.asarray([[v]]) for v in (0.5, 8.0, 9.2))
    assert abs(EXACT(h, w, z, radius, np.inf) - t[crossings[0]]) < 1e-6


@pytest.mark.parametrize("outside", [False, True])
def test_the_exact_step_has_the_derivative_of_the_crossing(outside):
    b, x, g, attraction, radius = instance(5, outside)
    field, push, t = np.asarray(stiefel.landing_field(g, x, b @ x, attraction)), np.ones((N, P)) / 50, 1e-5

    def step(s, largest):
        return stiefel.safe_step_size(x + s * push, (1 + s) * field, b, radius, largest=largest)

    slope, far = jax.grad(step)(0.0, jnp.inf), float(step(0.0, jnp.inf))
    assert abs(slope - (step(t, jnp.inf) - step(-t, jnp.inf)) / (2 * t)) < 1e-6 * max(far, abs(slope))
    assert [float(d) for d in jax.grad(step, (0, 1))(0.0, far / 2)] == [0, 1]       # the bound on the step is what stops it


@pytest.mark.slow
def test_float32_and_batches_of_steps():
    b, x, g, attraction, radius = instance(2)
    field = np.asarray(stiefel.landing_field(g, x, b @ x, attraction))
    low = stiefel.safe_step_size(*(jnp.asarray(a, jnp.float32) for a in (x, field, b)), radius)
    assert low.dtype == jnp.float32
    high = stiefel.safe_step_size(x, field, b, radius)
    assert abs(low / np.float32(high) - 1) < 1e-3
    many = jax.vmap(lambda f: stiefel.safe_step_size(jnp.asarray(x), f, jnp.asarray(b), radius))(jnp.stack([field, 2 * field]))
    assert np.abs(many / np.array([high, high / 2]) - 1).max() < 1e-10


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"radius": 1.0}, ArgumentError, "radius must be a number above 0 and below 1, got 1"),
    ({"radius": 0.0}, ArgumentError, "radius must be a number above 0"),
    ({"radius": 1.5, "rule": "official"}, ArgumentError, "above 0 and at most 1"),
    ({"rule": "best"}, UnknownNameError, "rule"),
    ({"normal": "best"}, UnknownNameError, "normal"),
    ({"x": np.ones((1, 3)), "field": np.ones((1, 3))}, ShapeError, "at most as many columns as rows"),
    ({"field": np.ones((2, 1))}, ShapeError, "field must have the shape of x"),
    ({"B": np.eye(2)}, ShapeError, "B must be 3 x 3"),
])
def test_bad_input_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        stiefel.safe_step_size(**({"x": np.eye(3)[:, :1], "field": np.ones((3, 1))} | change))
