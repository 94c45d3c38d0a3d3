"""Reparametrized estimators against the plain formula on the changed problem, by autodiff, and the golden numbers."""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hypergradient import cases, oracles
from theorylab import hypergradient as hg
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, MatrixError, NoClosedFormError, UnknownNameError
from theorylab.hypergradient.reparametrize import Reparametrized

X, Y = oracles.X3, oracles.Y2
NAMES = ("linear", "exponential", "outer_agnostic", "outer_aware")
DRAW = np.random.default_rng(5)
LEAD, TAIL, BEND = (jnp.asarray(0.3 * DRAW.standard_normal(shape)) for shape in ((3, 3), (3, 2), (3, 3, 2)))


def near(found, expected, rtol=1e-10):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


def smooth(z, y):
    """An invertible map without structure."""
    return 1.5 * z + jnp.tanh(LEAD @ z + TAIL @ y) + 0.1 * jnp.einsum("kij,i,j", BEND, z, y) + 0.2 * jnp.sin(z)


def changed(problem, phi, z, y):
    """The plain formula on E(phi(z, y), y) and G(phi(z, y), y), by autodiff, where F is a gradient."""

    def F(z, y):
        return jax.vjp(lambda z: phi(z, y), z)[1](problem.residual(phi(z, y), y))[0]

    G = lambda z, y: problem.outer(phi(z, y), y)
    v = jnp.linalg.solve(jax.jacfwd(F)(z, y).T, jax.grad(G)(z, y))
    return jax.grad(G, 1)(z, y) - jax.jacfwd(F, 1)(z, y).T @ v


@functools.cache
def chart():
    """The z of the smooth map at X, by Newton's method."""
    return jax.jit(lambda: jax.lax.fori_loop(0, 40, lambda _, z: z - jnp.linalg.solve(jax.jacfwd(smooth)(z, Y), smooth(z, Y) - X), X))()


def _known(x, y):
    return chart()


EVERY = [*map(Reparametrized, NAMES), Reparametrized(smooth)]


@functools.cache
def found(solved=False):
    """Values of all estimators at X, or at the solution."""
    problem = oracles.tiny()
    return [np.asarray(one.value) for one in oracles.each(EVERY, problem, oracles.solution(problem, Y) if solved else X, Y)]


@pytest.mark.parametrize("kind", ["energy", "root"])
def test_the_closed_form_is_the_plain_formula_of_the_changed_problem(kind):
    problem = oracles.tiny(kind)
    value = found()[-1] if kind == "energy" else oracles.each([Reparametrized(smooth, inverse=_known)], problem, X, Y)[0].value
    near(value, eqx.filter_jit(changed)(problem, smooth, chart(), Y))


def test_every_map_is_consistent():
    problem = oracles.tiny()
    expected = eqx.filter_jit(oracles.omega)(problem, oracles.solution(problem, Y), Y)
    for value in found(solved=True):
        near(value, expected, 1e-9)


def _maps(problem, x, y):
    """The named maps as the specification writes them; z = x for the last two."""
    at = problem.at(x, y)
    H, J = jax.jacfwd(problem.residual)(x, y), oracles.jacobian(problem, x, y)
    v, inverse = jnp.linalg.solve(H.T, at.outer_x), jnp.linalg.inv(H)
    twist = jax.jacfwd(lambda x: jax.jacfwd(problem.residual, 1)(x, y))(x)  # F_21[:, j, k] along e_k
    bend = jax.jacfwd(lambda x: jax.jacfwd(problem.residual)(x, y))(x)
    R = jnp.einsum("ijk,kl->lij", twist, inverse) + jnp.einsum("iak,kl,aj->lij", bend, inverse, J)  # R[H^-1 e_l]
    aware = oracles.omega_x(problem, x, y) @ inverse
    P = lambda y: jnp.diagonal(jax.jacfwd(problem.residual)(x, y))
    return {"linear": (lambda z, t: z / P(t), P(y) * x), "exponential": (lambda z, t: jnp.sign(x) * jnp.exp(z), jnp.log(jnp.abs(x))),
            "outer_agnostic": (lambda z, t: z - jnp.einsum("i,lij,j->l", z - x, R, t - y), x),
            "outer_aware": (lambda z, t: z + ((z - x) @ v) / (v @ v) * (aware.T @ (t - y)), x)}


def test_named_maps_have_the_closed_forms_of_their_formulas():
    @eqx.filter_jit
    def direct(problem):
        return [(phi(z, Y), changed(problem, phi, z, Y)) for phi, z in _maps(problem, X, Y).values()]

    for (reached, expected), value in zip(direct(oracles.tiny()), found()[:-1], strict=True):
        near(reached, X)
        near(value, expected)


def test_the_outer_aware_map_is_the_one_point_correction():
    near(found()[3], hg.hypergradient(oracles.tiny(), X, Y).value)


@pytest.mark.parametrize(("make", "order", "size"), [(cases.affine, 2, 0.0623), (cases.generic, 1, 0.73776)], ids=["affine", "generic"])
def test_a_map_that_does_not_know_the_outer_objective_removes_its_share_only(make, order, size):
    case = make()
    x, t = oracles.solution(case.problem, case.y), 1e-4
    values = oracles.along(Reparametrized("outer_agnostic"), case.problem, jnp.stack([x, x + t * case.d]), case.y)
    np.testing.assert_allclose(float(jnp.linalg.norm(values[1] - values[0])) / t**order, size, rtol=1e-3)


def test_golden_numbers():
    problem, y, _, known = cases.p3()
    names = ("linear", "exponential", "hessian")
    values = oracles.each(list(map(Reparametrized, names)), problem, problem.exact(y) + jnp.array(known["at"]), y)
    for one, key in zip(values, ("linear", "exponential", "hessian_estimate"), strict=True):
        near(one.value, known[key], 1e-9)
    problem, y, _, known = cases.p4()
    for name, one in zip(names, oracles.each(list(map(Reparametrized, names[:2])), problem, jnp.array([known["x"] + known["at"]]), y), strict=False):
        near(one.value, [known[name]], 1e-9)


def test_the_linear_map_is_the_preconditioner_where_the_energy_is_quadratic_and_the_outer_objective_affine():
    A, b = cases.draw().args[:2]
    problem = hg.RidgeSelection((A, b), (None, np.array([1.0, -2.0, 0.5, 0.3])), objective="linear")
    x, y = jnp.array([0.3, -0.2, 0.5, 1.0]), jnp.array([0.5, -0.3, 0.1, 0.8])
    linear, precond = oracles.each([Reparametrized("linear"), hg.Preconditioned()], problem, x, y)
    near(linear.value, precond.value, 1e-13)


def _scalar_energy(x, y, a, b):
    return a * x**2 / 2 - b * x + jnp.exp(y) * x**2 / 2


def _x(x, y, a, b):
    return x


def test_powers_in_one_dimension_divide_the_constant():
    a, b, y, t = 1.3, 2.0, 0.2, 1e-6
    problem = hg.Bilevel(_scalar_energy, _x, args=(jnp.asarray(a), jnp.asarray(b)), x=0.0, y=0.0)
    x, c, powers = b / (a + np.exp(y)), a + np.exp(y), (1, 2, 3, 5, -1, -2)
    chosen = [Reparametrized(functools.partial(_power, q), inverse=functools.partial(_root, q)) for q in powers]
    up, down = (np.array([float(one.value[0]) for one in oracles.each(chosen, problem, jnp.array([x + s]), jnp.array([y]))]) for s in (t, -t))
    np.testing.assert_allclose((up - down) / (2 * t), [-np.exp(y) / c / q for q in powers], rtol=1e-6)


def _power(q, z, y):
    return z**q


def _root(q, x, y):
    return x ** (1 / q)


def test_the_exponential_map_in_one_dimension_has_its_exact_error():
    a, b, y = 1.3, 2.0, 0.2
    problem = hg.Bilevel(_scalar_energy, _x, args=(jnp.asarray(a), jnp.asarray(b)), x=0.0, y=0.0)
    c, x = a + np.exp(y), b / (a + np.exp(y))
    for delta in (-0.2, 0.01, 0.3, 2.0):
        found = float(hg.hypergradient(problem, x + delta, y, Reparametrized("exponential")).value)
        near(found + np.exp(y) * x / c, -np.exp(y) / c * delta**2 / (x + 2 * delta))


def test_the_pole_of_the_exponential_map_is_not_silent():
    problem = hg.Bilevel(_scalar_energy, _x, args=(jnp.asarray(1.0), jnp.asarray(2.0)), x=0.0, y=0.0)
    inside = jax.jit(lambda x: hg.hypergradient(problem, x, 0.0, Reparametrized("exponential")))(jnp.asarray(0.5))
    assert Status(int(inside.status)) == Status.NONFINITE
    with pytest.raises(MatrixError, match="must be invertible"):
        hg.hypergradient(problem, 0.5, 0.0, Reparametrized("exponential"))


def test_an_outer_objective_that_is_flat_leaves_the_outer_aware_map_undefined():
    problem = hg.Bilevel(lambda x, y: jnp.sum((x - y) ** 2), lambda x, y: jnp.sum(y), x=jnp.zeros(2), y=jnp.ones(2))
    found = hg.hypergradient(problem, jnp.zeros(2), jnp.ones(2), Reparametrized("outer_aware"))
    assert Status(int(found.status)) == Status.UNDECIDED
    near(found.value, [1.0, 1.0])


def _flat(z, y):
    return jnp.stack([z[0], z[0] + 1e-12 * z[1]])


def _same(x, y):
    return jnp.stack([x[0], (x[1] - x[0]) / 1e-12])


def _shift(z, y):
    return z + 1


def _keep(x, y):
    return x


PLANE = hg.Bilevel(lambda x, y: jnp.sum((x - y) ** 2), lambda x, y: jnp.sum(x), x=jnp.zeros(2), y=jnp.ones(2))
ONES = jnp.ones(2)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: Reparametrized("cubic"), UnknownNameError, "map 'cubic' is not known"),
    (lambda: Reparametrized(3), ArgumentError, r"map must be one of 'linear', .* or a function of \(z, y\), got 3"),
    (lambda: Reparametrized("linear", inverse=_keep), ArgumentError, "inverse belongs to a map given as a function, got one with map='linear'"),
    (lambda: hg.hypergradient(PLANE, jnp.array([1.0, 0.0]), ONES, Reparametrized("exponential")), ArgumentError,
     "x must have no zero entry for the exponential map, got 0 at index 1"),
    (lambda: hg.hypergradient(PLANE, ONES, ONES, Reparametrized("hessian")), NoClosedFormError, "map='hessian' needs the exact inner solution"),
    (lambda: hg.hypergradient(PLANE, ONES, ONES, Reparametrized(_flat, inverse=_same)), MatrixError,
     "map must be invertible in z, the condition number of its Jacobian is"),
    (lambda: hg.hypergradient(PLANE, ONES, ONES, Reparametrized(_shift, inverse=_keep)), ArgumentError, "map must reach x"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_map_that_is_not_invertible_has_a_status_in_compiled_code():
    found = jax.jit(lambda x: hg.hypergradient(PLANE, x, ONES, Reparametrized(_flat, inverse=_same)))(ONES)
    assert Status(int(found.status)) in (Status.UNDECIDED, Status.NONFINITE)
