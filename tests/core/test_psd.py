"""Positive semidefinite matrices against SciPy, POT, closed forms and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
import scipy.linalg
from hypothesis import given, settings, strategies as st

from theorylab.core import psd
from theorylab.errors import ArgumentError, MatrixError, NonFiniteInputError, PrecisionError, ShapeError

N = 4
PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)


def spd(seed: int, n: int = N, rank: int | None = None) -> np.ndarray:
    g = np.random.default_rng(seed).standard_normal((n, rank or n))
    return g @ g.T + (0.1 * np.eye(n) if rank is None else 0)


def symmetric(seed: int, n: int = N) -> np.ndarray:
    g = np.random.default_rng(seed).standard_normal((n, n))
    return (g + g.T) / 2


A, B, E = spd(0), spd(1), symmetric(2)
SINGULAR = spd(3, rank=2)


# Values.


def test_sqrtm_agrees_with_scipy():
    np.testing.assert_allclose(psd.sqrtm(A), scipy.linalg.sqrtm(A), atol=1e-13)


def test_inv_sqrtm_agrees_with_scipy():
    np.testing.assert_allclose(psd.inv_sqrtm(A), scipy.linalg.inv(scipy.linalg.sqrtm(A)), atol=1e-12)


def test_inv_sqrtm_of_a_singular_matrix_is_the_pseudo_inverse_of_the_root():
    np.testing.assert_allclose(psd.inv_sqrtm(SINGULAR), np.linalg.pinv(scipy.linalg.sqrtm(SINGULAR).real, rcond=1e-6), atol=1e-10)


def test_cut_of_inv_sqrtm_drops_small_eigenvalues():
    result = psd.inv_sqrtm(np.diag([4.0, 1.0, 1e-3, 0.0]), cut=1e-2)
    np.testing.assert_allclose(result, np.diag([0.5, 1.0, 0.0, 0.0]), atol=1e-15)


def test_lyapunov_agrees_with_scipy():
    c = np.random.default_rng(4).standard_normal((N, N))
    np.testing.assert_allclose(psd.lyapunov(A, c), scipy.linalg.solve_continuous_lyapunov(A, c), atol=1e-12)


def test_bures_agrees_with_pot_with_and_without_means():
    mean_a, mean_b = np.arange(4.0), np.ones(4)
    np.testing.assert_allclose(psd.bures(A, B), ot.gaussian.bures_wasserstein_distance(0 * mean_a, 0 * mean_b, A, B), rtol=1e-13)
    np.testing.assert_allclose(psd.bures(A, B, mean_a, mean_b), ot.gaussian.bures_wasserstein_distance(mean_a, mean_b, A, B), rtol=1e-13)


def test_bures_map_agrees_with_pot_and_carries_a_to_b():
    mapping, _ = ot.gaussian.bures_wasserstein_mapping(np.zeros(N), np.zeros(N), A, B)
    np.testing.assert_allclose(psd.bures_map(A, B), mapping, atol=1e-12)
    np.testing.assert_allclose(psd.bures_map(A, B) @ A @ psd.bures_map(A, B), B, atol=1e-12)


def test_bures_map_of_a_singular_covariance_lives_on_its_range():
    root = np.diag([1.0, 2.0, 0.0, 0.0])
    np.testing.assert_allclose(psd.bures_map(root, 4 * root), 2 * np.diag([1.0, 1.0, 0.0, 0.0]), atol=1e-14)


def test_bures_of_commuting_matrices_is_the_distance_of_the_roots_of_their_eigenvalues():
    q = scipy.linalg.qr(np.random.default_rng(5).standard_normal((N, N)))[0]
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 0.5, 3.0, 1.0])
    np.testing.assert_allclose(psd.bures((q * a) @ q.T, (q * b) @ q.T), np.linalg.norm(np.sqrt(a) - np.sqrt(b)), rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9])
def test_bures_of_close_matrices_does_not_cancel(scale):
    # a -> (1 + s)² a moves every root by s: the distance is s |a^(1/2)|. The formula by traces is off by 1e-8 here.
    expected = scale * np.sqrt(np.trace(A))
    np.testing.assert_allclose(psd.bures(A, (1 + scale) ** 2 * A), expected, atol=1e-14)  # a few units of round-off of |a^(1/2)| = 4.2


def test_bures_of_a_matrix_to_itself_is_round_off():
    assert psd.bures(A, A) < 1e-14
    # of a singular matrix the root is known to the root of round-off only: sqrt(2e-16 * 10) = 5e-8
    assert psd.bures(SINGULAR, SINGULAR) < 5e-8


def test_project_psd_agrees_with_a_brute_force_search():
    import scipy.optimize

    a = symmetric(6, 2)

    def distance(entries: np.ndarray) -> float:
        factor = np.array([[entries[0], 0.0], [entries[1], entries[2]]])
        return float(np.sum((factor @ factor.T - a) ** 2))

    best = min(scipy.optimize.minimize(distance, start, tol=1e-14).fun for start in np.random.default_rng(0).standard_normal((5, 3)))
    found = np.asarray(psd.project_psd(a))
    assert np.linalg.eigvalsh(found)[0] >= -1e-15
    np.testing.assert_allclose(np.sum((found - a) ** 2), best, rtol=1e-6)  # the search stops at 1e-7


def test_project_psd_raises_eigenvalues_to_the_floor():
    values = np.linalg.eigvalsh(psd.project_psd(E, floor=0.3))
    np.testing.assert_allclose(values, np.maximum(np.linalg.eigvalsh(E), 0.3), atol=1e-13)


def test_symmetrize_is_the_symmetric_part():
    assert psd.symmetrize([[1, 4], [0, 1]]).tolist() == [[1.0, 2.0], [2.0, 1.0]]


# Invariants.


@PROPERTY
@given(seed=st.integers(0, 10**6))
def test_sqrtm_squares_to_its_argument_and_commutes_with_rotations(seed):
    a, q = spd(seed), scipy.linalg.qr(np.random.default_rng(seed).standard_normal((N, N)))[0]
    root = np.asarray(psd.sqrtm(a))
    np.testing.assert_allclose(root @ root, a, atol=1e-12)
    np.testing.assert_allclose(psd.sqrtm(q @ a @ q.T), q @ root @ q.T, atol=1e-11)


@PROPERTY
@given(seed=st.integers(0, 10**6))
def test_bures_is_a_symmetric_metric(seed):
    a, b, c = spd(seed), spd(seed + 1), spd(seed + 2, rank=2)
    ab, ba, bc, ac = (float(psd.bures(*pair)) for pair in ((a, b), (b, a), (b, c), (a, c)))
    assert abs(ab - ba) < 1e-12
    assert ac <= ab + bc + 1e-12


@PROPERTY
@given(seed=st.integers(0, 10**6))
def test_bures_map_back_inverts_bures_map(seed):
    a, b = spd(seed), spd(seed + 1)
    np.testing.assert_allclose(psd.bures_map(a, b) @ psd.bures_map(b, a), np.eye(N), atol=1e-9)


# Derivatives.


def derivatives(f, order: int = 2) -> list:
    """The first derivatives of f at 0 by reverse mode, compiled together."""
    each = [jax.grad(f)]
    for _ in range(order - 1):
        each.append(jax.grad(each[-1]))
    return jax.jit(lambda t: [g(t) for g in each])(0.0)


def differences(f, h: float = 1e-4) -> tuple[float, float]:
    """Central differences of f at 0, first and second."""
    return (f(h) - f(-h)) / (2 * h), (f(h) - 2 * f(0.0) + f(-h)) / h**2


def test_second_and_third_derivative_of_sqrtm_at_the_identity_have_their_closed_form():
    # (I + t E)^(1/2) = I + t E / 2 - t² E² / 8 + t³ E³ / 16 - ...
    first, second, third = derivatives(lambda t: jnp.sum(B * psd.sqrtm(jnp.eye(N) + t * E)), order=3)
    np.testing.assert_allclose(first, np.sum(B * E) / 2, rtol=1e-13)
    np.testing.assert_allclose(second, -np.sum(B * (E @ E)) / 4, rtol=1e-13)
    np.testing.assert_allclose(third, 3 * np.sum(B * (E @ E @ E)) / 8, rtol=1e-12)


def test_first_and_second_derivative_of_sqrtm_at_a_repeated_eigenvalue_agree_with_finite_differences():
    base = np.diag([2.0, 2.0, 2.0, 5.0])
    first, second = derivatives(lambda t: jnp.sum(B * psd.sqrtm(base + t * E)))
    expected = differences(lambda t: np.sum(B * scipy.linalg.sqrtm(base + t * E)))
    np.testing.assert_allclose(first, expected[0], rtol=1e-7)
    np.testing.assert_allclose(second, expected[1], rtol=1e-5)


def test_derivative_of_sqrtm_of_a_rank_deficient_matrix_is_that_of_its_range():
    block, change, weight = spd(7, 2), symmetric(8, 2), symmetric(9, 2)
    q = scipy.linalg.qr(np.random.default_rng(10).standard_normal((N, N)))[0][:, :2]
    expected = np.sum(weight * scipy.linalg.solve_continuous_lyapunov(scipy.linalg.sqrtm(block), change))
    found = derivatives(lambda t: jnp.sum((q @ weight @ q.T) * psd.sqrtm(q @ (block + t * change) @ q.T)), order=1)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_derivative_of_sqrtm_along_a_curve_of_constant_rank_agrees_with_finite_differences():
    factor, change = np.random.default_rng(11).standard_normal((2, N, 2))
    curve = lambda t: (factor + t * change) @ (factor + t * change).T

    def exact(t):  # by the thin decomposition, which never sees the kernel
        u, s, _ = np.linalg.svd(curve(t), hermitian=True)
        return np.sum(B * ((u[:, :2] * np.sqrt(s[:2])) @ u[:, :2].T))

    found = derivatives(lambda t: jnp.sum(B * psd.sqrtm(curve(t))), order=1)[0]
    np.testing.assert_allclose(found, differences(exact)[0], rtol=1e-7)


@jax.jit
def inv_sqrtm_derivatives(base):
    along = lambda t: jnp.sum(B * psd.inv_sqrtm(base + t * E))
    return jax.grad(along)(0.0), jax.jvp(jax.grad(along), (0.0,), (1.0,))[1]


@pytest.mark.parametrize("base", [A, np.eye(N), np.diag([3.0, 3.0, 1.0, 1.0])])
def test_derivatives_of_inv_sqrtm_agree_with_finite_differences(base):
    first, second = inv_sqrtm_derivatives(base)
    expected = differences(lambda t: np.sum(B * scipy.linalg.inv(scipy.linalg.sqrtm(base + t * E))))
    np.testing.assert_allclose(first, expected[0], rtol=1e-5)
    np.testing.assert_allclose(second, expected[1], rtol=1e-3)


def test_derivative_of_inv_sqrtm_along_a_curve_of_constant_rank_agrees_with_finite_differences():
    factor, change = np.random.default_rng(12).standard_normal((2, N, 2))

    def exact(t):  # by the thin decomposition, which never sees the kernel
        u, s, _ = np.linalg.svd(factor + t * change, full_matrices=False)
        return np.sum(B * ((u / s) @ u.T))

    found = derivatives(lambda t: jnp.sum(B * psd.inv_sqrtm((factor + t * change) @ (factor + t * change).T)), order=1)[0]
    np.testing.assert_allclose(found, differences(exact)[0], rtol=1e-5)


bures_gradient = jax.jit(jax.grad(psd.bures_squared, argnums=(0, 1)))


def test_gradient_of_the_squared_bures_distance_is_identity_minus_map():
    by_a, by_b = bures_gradient(A, B)
    np.testing.assert_allclose(by_a, np.eye(N) - psd.bures_map(A, B), atol=1e-13)
    np.testing.assert_allclose(by_b, np.eye(N) - psd.bures_map(B, A), atol=1e-13)


def test_gradient_of_bures_is_finite_and_zero_at_distance_zero():
    # of two equal identities the distance is exactly zero
    np.testing.assert_array_equal(jax.jit(jax.grad(psd.bures))(np.eye(N), np.eye(N)), np.zeros((N, N)))
    np.testing.assert_allclose(bures_gradient(np.eye(N), np.eye(N))[0], np.zeros((N, N)), atol=1e-15)


@jax.jit
def bures_curvature(a, b):
    """Second derivative at t = 0 of d(a + t E, b)²."""
    return jax.grad(jax.grad(lambda t: psd.bures_squared(a + t * E, b)))(0.0)


def test_second_derivative_of_the_squared_bures_distance_agrees_with_finite_differences():
    slope = lambda t: np.sum(E * (np.eye(N) - np.asarray(psd.bures_map(np.eye(N) + t * E, B))))
    np.testing.assert_allclose(bures_curvature(np.eye(N), B), differences(slope)[0], rtol=1e-6)


def test_second_derivative_of_the_squared_bures_distance_at_zero_is_that_of_the_metric():
    # d(I + t E, I)² = t² |E|² / 4 + ...
    np.testing.assert_allclose(bures_curvature(np.eye(N), np.eye(N)), np.sum(E**2) / 2, rtol=1e-12)


def test_derivative_of_bures_map_agrees_with_finite_differences():
    along = lambda t: jnp.sum(symmetric(13) * psd.bures_map(A + t * E, B + 2 * t * E))
    np.testing.assert_allclose(derivatives(along, order=1)[0], differences(along)[0], rtol=1e-6)


@jax.jit
def projection_derivatives(base):
    along = lambda t: jnp.sum(B * psd.project_psd(base + t * symmetric(14)))
    return along(0.0), jax.grad(along)(0.0), jax.jvp(jax.grad(along), (0.0,), (1.0,))[1]


@pytest.mark.parametrize("base", [E, np.diag([1.0, 1.0, -2.0, -2.0])])
def test_derivatives_of_project_psd_agree_with_finite_differences(base):
    _, first, second = projection_derivatives(base)
    expected = differences(lambda t: projection_derivatives(base + t * symmetric(14))[0])
    np.testing.assert_allclose(first, expected[0], rtol=1e-6)
    np.testing.assert_allclose(second, expected[1], rtol=1e-4)


def test_forward_and_reverse_mode_agree_on_lyapunov():
    along = jax.jit(lambda t: jnp.sum(B * psd.lyapunov(A + t * E, symmetric(15) + t * B)))
    forward = jax.jit(lambda t: jax.jvp(along, (t,), (1.0,))[1])(0.0)
    np.testing.assert_allclose(derivatives(along, order=1)[0], forward, rtol=1e-12)
    np.testing.assert_allclose(forward, differences(along)[0], rtol=1e-6)


# Batches, precision, compilation.


def test_leading_axes_broadcast_and_equal_single_calls():
    many = np.stack([spd(20), spd(21), SINGULAR])
    np.testing.assert_allclose(psd.bures(A, many), [psd.bures(A, b) for b in many], atol=1e-13)
    np.testing.assert_allclose(psd.bures(many, many[::-1]), [psd.bures(a, b) for a, b in zip(many, many[::-1])], atol=1e-7)
    np.testing.assert_allclose(psd.bures_map(A, many), np.stack([psd.bures_map(A, b) for b in many]), atol=1e-12)
    np.testing.assert_allclose(psd.sqrtm(many), np.stack([psd.sqrtm(b) for b in many]), atol=1e-12)
    assert psd.bures(many[:, None], many[None], np.zeros((3, 1, N)), np.zeros(N)).shape == (3, 3)


def test_one_matrix_against_many_is_factored_once():
    text = str(jax.make_jaxpr(psd._bures_squared)(jnp.asarray(A), jnp.stack([jnp.asarray(B)] * 5)))
    assert [line.count("[5,4,4]") for line in text.splitlines() if " = eigh[" in line] == [0, 1]


def test_vmap_and_jit_agree_with_plain_calls():
    many = jnp.stack([jnp.asarray(spd(22)), jnp.asarray(spd(23))])
    gradient = jax.jit(jax.vmap(jax.grad(lambda a: psd.bures_squared(a, B))))(many)
    np.testing.assert_allclose(gradient, np.stack([np.eye(N) - psd.bures_map(a, B) for a in many]), atol=1e-12)


def test_float32_stays_float32_and_is_accurate_to_its_round_off():
    a, b = A.astype(np.float32), B.astype(np.float32)
    for call in (psd.sqrtm, psd.inv_sqrtm, psd.project_psd, psd.symmetrize):
        assert jax.eval_shape(call, a).dtype == jnp.float32
    for call in (psd.bures, psd.bures_map, psd.lyapunov):
        assert jax.eval_shape(call, a, b).dtype == jnp.float32
    assert jax.eval_shape(jax.grad(psd.bures_squared), a, b).dtype == jnp.float32
    np.testing.assert_allclose(psd.sqrtm(a), scipy.linalg.sqrtm(A), atol=1e-5)
    np.testing.assert_allclose(psd.bures(a, b), psd.bures(A, B), rtol=1e-5)


def test_zero_matrices_have_finite_roots_distances_and_derivatives():
    zero = jnp.zeros((N, N))
    np.testing.assert_array_equal(psd.sqrtm(zero), zero)
    np.testing.assert_array_equal(psd.inv_sqrtm(zero), zero)
    np.testing.assert_allclose(psd.bures(zero, A), np.sqrt(np.trace(A)), rtol=1e-13)
    assert all(np.isfinite(g).all() for g in bures_gradient(np.zeros((N, N)), A))


# Refusals.


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: psd.sqrtm(np.ones((2, 3))), ShapeError, "a must be a square matrix"),
    (lambda: psd.sqrtm(np.diag([1.0, -2.0])), MatrixError, "a must be positive semidefinite, its smallest eigenvalue is -2"),
    (lambda: psd.inv_sqrtm(np.array([[1.0, 2.0], [0.0, 1.0]])), MatrixError, "a must be symmetric, got 2 at"),
    (lambda: psd.inv_sqrtm(A, cut=1.5), ArgumentError, "cut must be a number at least 0 and below 1, got 1.5"),
    (lambda: psd.bures(A, np.eye(3)), ShapeError, "b must be 4 x 4"),
    (lambda: psd.bures(A, B, mean_a=np.zeros(N)), ArgumentError, "mean_b must be given with mean_a"),
    (lambda: psd.bures(A, B, np.zeros(3), np.zeros(N)), ShapeError, "mean_a must have shape"),
    (lambda: psd.bures(A, B.astype(np.float32)), PrecisionError, "a float64, b float32"),
    (lambda: psd.bures(np.stack([A] * 3), np.stack([B] * 2)), ShapeError, "leading axes of a and b must broadcast"),
    (lambda: psd.bures(A * np.nan, B), NonFiniteInputError, "a must be finite"),
    (lambda: psd.bures_map(A, -B), MatrixError, "b must be positive semidefinite"),
    (lambda: psd.lyapunov(A, np.eye(3)), ShapeError, "c must be 4 x 4"),
    (lambda: psd.project_psd(E, floor=np.inf), ArgumentError, "floor must be a number"),
    (lambda: psd.sqrtm(np.eye(2) * 1j), PrecisionError, "complex128"),
    (lambda: psd.symmetrize(np.ones(3)), ShapeError, "a must be a square matrix"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
