"""The decorator: derivatives of the solution against closed forms, autodiff through them, and the Lagrangian formula of the outer Hessian."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab.errors import ArgumentError, MatrixError, PrecisionError, ShapeError, UnknownNameError
from theorylab.hypergradient.implicit import implicit
from theorylab.hypergradient.linear import CG, GMRES, LU

GENERATOR = np.random.default_rng(3)
A, B, A_OUT, B_OUT, Y, D = (jnp.asarray(GENERATOR.standard_normal(s)) for s in ((8, 3), 8, (5, 3), 5, 3, 3))
X0 = jnp.zeros(3)
DATA, LABELS = (A, B), jnp.sign(B)


def ridge(x, y, data):
    A, b = data
    return (A @ x - b) @ A / 8 + jnp.exp(y) * x / 3


def closed(y):
    return jnp.linalg.solve(A.T @ A / 8 + jnp.diag(jnp.exp(y)) / 3, A.T @ B / 8)


def solve_ridge(x0, y, data):
    A, b = data
    return jnp.linalg.solve(A.T @ A / 8 + jnp.diag(jnp.exp(y)) / 3, b @ A / 8) + 0 * x0


def outer(x, y):
    return 0.5 * jnp.sum((A_OUT @ x - B_OUT) ** 2) + jnp.sum(jnp.sin(x) * y) + y @ y


def logistic(x, y):
    return -LABELS * jax.nn.sigmoid(-LABELS * (A @ x)) @ A / 8 + jnp.exp(y) * x / 3


def newton(steps):
    def solve(x0, y):
        return jax.lax.fori_loop(0, steps, lambda _, x: x - jnp.linalg.solve(jax.jacfwd(logistic)(x, y), logistic(x, y)), x0)

    return solve


X_STAR = jax.jit(newton(12))(X0, Y)
close = lambda a, b, tol=1e-12: np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def lineax_solvers():
    import lineax

    return [lineax.Cholesky(), lineax.CG(1e-14, 1e-14)]


def derivatives(loss, *orders):
    return jax.jit(lambda y: tuple(order(loss)(y) for order in orders))(Y)


EXACT = derivatives(lambda y: outer(closed(y), y), jax.grad, jax.hessian)


def test_all_derivatives_through_ridge_are_those_of_the_closed_form():
    loss = lambda y: outer(implicit(ridge)(solve_ridge)(X0, y, DATA), y)
    value, gradient, along, hessian, twice = derivatives(
        loss, lambda f: f, jax.grad, lambda f: lambda y: jax.jvp(f, (y,), (D,))[1], jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)))
    close(value, outer(closed(Y), Y))
    close(gradient, EXACT[0])
    close(along, EXACT[0] @ D)
    close(hessian, EXACT[1])
    close(twice, EXACT[1])


def from_scipy(matvec, b):
    return jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-14)[0]


@pytest.mark.parametrize("linear", [CG(1e-14), LU(), from_scipy, *lineax_solvers()], ids=str)
def test_every_kind_of_linear_solver_gives_them(linear):
    loss = lambda y: outer(implicit(ridge, linear)(solve_ridge)(X0, y, DATA), y)
    close(derivatives(loss, jax.hessian)[0], EXACT[1])


def test_the_derivative_in_further_arguments_and_zero_in_the_start():
    solve = implicit(ridge)(solve_ridge)
    found = jax.grad(lambda data: outer(solve(X0, Y, data), Y))(DATA)
    exact = jax.grad(lambda data: outer(jnp.linalg.solve(data[0].T @ data[0] / 8 + jnp.diag(jnp.exp(Y)) / 3, data[1] @ data[0] / 8), Y))(DATA)
    jax.tree.map(close, found, exact)
    assert not jax.grad(lambda x0: outer(solve(x0, Y, DATA), Y))(X0).any()


@pytest.mark.parametrize("correction", ["none", "one_point", "polish"])
def test_the_outer_hessian_is_that_of_the_lagrangian(correction):
    solve = implicit(logistic, correction=correction)(newton(12))
    found = jax.jit(jax.hessian(lambda y: outer(solve(X0, y), y)))(Y)
    F1, F2 = jax.jacfwd(logistic, (0, 1))(X_STAR, Y)
    J = -jnp.linalg.solve(F1, F2)
    v = jnp.linalg.solve(F1.T, jax.grad(outer)(X_STAR, Y))
    (L11, L12), (L21, L22) = jax.hessian(lambda x, y: outer(x, y) - v @ logistic(x, y), (0, 1))(X_STAR, Y)
    close(found, L22 + L21 @ J + (L21 @ J).T + J.T @ L11 @ J)
    close(L12, L21.T)


def fixed(correction):
    """The solution map of a solver that returns its start, whose distance to the solution is then known."""
    return implicit(logistic, correction=correction)(lambda x0, y: x0)


def test_the_corrected_jacobian_is_the_formula():
    x = X_STAR + 0.1 * D
    J = lambda x: -jnp.linalg.solve(*jax.jacfwd(logistic, (0, 1))(x, Y))
    step = jnp.linalg.solve(jax.jacfwd(logistic)(x, Y), logistic(x, Y))
    expected = J(x) - jax.jvp(J, (x,), (step,))[1]
    close(fixed("none")(x, Y), x)
    close(jax.jacfwd(fixed("none"), 1)(x, Y), J(x))
    close(fixed("one_point")(x, Y), x)
    close(jax.jacrev(fixed("one_point"), 1)(x, Y), expected)
    close(fixed("polish")(x, Y), x - step)
    close(jax.jacfwd(fixed("polish"), 1)(x, Y), expected)


@pytest.mark.parametrize(("correction", "affine", "general"), [("none", 1, 1), ("one_point", 2, 1), ("polish", 2, 2)])
def test_the_order_of_the_gradient_error_is_that_of_the_table(correction, affine, general):
    for objective, order in ((lambda x, y: B_OUT[:3] @ x + y @ y, affine), (outer, general)):
        exact = jax.grad(lambda y, objective=objective: objective(implicit(logistic)(newton(12))(X0, y), y))(Y)
        gradient = jax.jit(jax.grad(lambda y, x, objective=objective: objective(fixed(correction)(x, y), y)))
        errors = [float(jnp.linalg.norm(gradient(Y, X_STAR + t * D) - exact)) for t in (1e-3, 1e-4)]
        assert abs(np.log10(errors[0] / errors[1]) - order) < 0.02


def test_trees_and_scalars():
    @implicit(lambda x, y, c: {"a": c * x["a"] - y["u"], "b": 2.0 * x["b"] + x["a"] * y["v"]}, symmetric=False)
    def solve(x0, y, c):
        a = y["u"] / c
        return {"a": a, "b": -a * y["v"] / 2}

    y, start = {"u": jnp.array(3.0), "v": jnp.array(0.5)}, {"a": jnp.array(0.0), "b": jnp.array(0.0)}
    found = jax.jacrev(lambda y: solve(start, y, 4.0))(y)
    close(found["a"]["u"], 0.25)
    close([found["b"]["u"], found["b"]["v"]], [-0.0625, -0.375])
    forward = jax.jacfwd(lambda y: solve(start, y, 4.0))(y)
    jax.tree.map(close, found, forward)


@pytest.mark.parametrize("linear", ["auto", GMRES(1e-13)], ids=str)
def test_the_adjoint_of_a_root_uses_the_transpose(linear):
    M = jnp.asarray(GENERATOR.standard_normal((3, 3))) + 4 * jnp.eye(3)
    solve = implicit(lambda x, y: M @ x - jnp.sin(y), linear, symmetric=False)(lambda x0, y: jnp.linalg.solve(M, jnp.sin(y)))
    exact = jnp.linalg.solve(M, jnp.diag(jnp.cos(Y)))
    close(jax.jit(jax.jacrev(solve, 1))(X0, Y), exact)
    close(jax.jit(jax.jacfwd(solve, 1))(X0, Y), exact)


def test_batches_and_whole_number_arguments():
    ys = Y + jnp.arange(4.0)[:, None]
    solve = implicit(logistic)(newton(12))
    gradient = jax.grad(lambda y: outer(solve(X0, y), y))
    close(jax.jit(jax.vmap(gradient))(ys), jnp.stack([jax.jit(gradient)(y) for y in ys]))
    power = implicit(lambda x, y, k: x - y**k)(lambda x0, y, k: y**k)
    close(jax.grad(lambda y: power(0.0, y, 3))(2.0), 12.0)


def test_float32_stays_float32():
    solve = implicit(ridge, correction="polish")(solve_ridge)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (X0, Y, DATA))
    gradient = jax.grad(lambda y: outer(*(a.astype(jnp.float64) for a in (solve(single[0], y, single[2]), y))))(single[1])
    assert gradient.dtype == jnp.float32
    close(gradient, jax.grad(lambda y: outer(closed(y), y))(Y), 1e-4)


def test_a_wrong_symmetry_declaration_is_refused_eagerly_and_gives_nan_in_compiled_code():
    M = jnp.array([[2.0, 1.0], [0.0, 1.0]])
    solve = implicit(lambda x, y: M @ x - y)(lambda x0, y: jnp.linalg.solve(M, y))
    with pytest.raises(ArgumentError, match="symmetric must be False"):
        jax.grad(lambda y: solve(jnp.zeros(2), y).sum())(jnp.ones(2))
    solve = implicit(lambda x, y: M @ x - y)(lambda x0, y: jnp.linalg.solve(M, y))
    assert jnp.isnan(jax.jit(jax.grad(lambda y: solve(jnp.zeros(2), y).sum()))(jnp.ones(2))).all()


def test_a_failed_iteration_gives_nan_and_not_a_wrong_number():
    solve = implicit(ridge, CG(1e-12, max_steps=1))(solve_ridge)
    assert jnp.isnan(jax.jit(jax.grad(lambda y: outer(solve(X0, y, DATA), y)))(Y)).all()


IDENTITY = lambda x0, y: x0


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: implicit(3)(IDENTITY), ArgumentError, "residual must be a function"),
    (lambda: implicit(logistic)(3), ArgumentError, "implicit decorates a function"),
    (lambda: implicit(logistic, linear="cg"), ArgumentError, "linear must be 'auto', a linear solver"),
    (lambda: implicit(logistic, linear=CG(), symmetric=False), ArgumentError, "use LU\\(\\) or GMRES\\(\\)"),
    (lambda: implicit(logistic, symmetric=1), ArgumentError, "symmetric must be True or False"),
    (lambda: implicit(logistic, correction="onepoint"), UnknownNameError, "correction 'onepoint' is not known"),
    (lambda: implicit(lambda x, y: x[:2])(IDENTITY)(X0, Y), ShapeError, r"residual must return a tree like x, float64\[3\], got float64\[2\]"),
    (lambda: implicit(logistic)(lambda x0, y: jnp.arange(3))(X0, Y), PrecisionError, "the solver must return floats of one dtype"),
    (lambda: implicit(lambda x, y: -x - y)(IDENTITY)(X0, Y), MatrixError, "must be positive definite, its smallest eigenvalue is -1"),
    (lambda: implicit(lambda x, y: 0 * x - y, symmetric=False)(IDENTITY)(X0, Y), MatrixError, "must be invertible"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
