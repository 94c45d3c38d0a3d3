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


def derivatives(loss, *orders):
    return jax.jit(lambda y: tuple(order(loss)(y) for order in orders))(Y)


def along(loss):
    """The derivative of the gradient along D: forward over reverse."""
    return lambda y: jax.jvp(jax.grad(loss), (y,), (D,))


EXACT = derivatives(lambda y: outer(closed(y), y), lambda f: f, jax.grad, jax.hessian)


def test_all_derivatives_through_ridge_are_those_of_the_closed_form():
    loss = lambda y: outer(implicit(ridge)(solve_ridge)(X0, y, DATA), y)
    value, gradient, hessian, twice = derivatives(loss, lambda f: f, jax.grad, jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)))
    close(value, EXACT[0])
    close(gradient, EXACT[1])
    close(hessian, EXACT[2])
    close(twice, EXACT[2])


def from_scipy(matvec, b):
    return jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-14)[0]


def from_lineax(name, *tolerances):
    import lineax

    return getattr(lineax, name)(*tolerances)


@pytest.mark.parametrize("linear", [CG(1e-14), LU(), from_scipy, from_lineax("Cholesky"), from_lineax("CG", 1e-14, 1e-14)],
                         ids=["CG", "LU", "scipy", "lineax Cholesky", "lineax CG"])
def test_every_kind_of_linear_solver_gives_them(linear):
    loss = lambda y: outer(implicit(ridge, linear)(solve_ridge)(X0, y, DATA), y)
    gradient, turned = derivatives(loss, along)[0]
    close(gradient, EXACT[1])
    close(turned, EXACT[2] @ D)


@pytest.mark.slow
def test_conjugate_gradients_under_vmap():
    loss = lambda y: outer(implicit(ridge, CG(1e-14))(solve_ridge)(X0, y, DATA), y)
    close(derivatives(loss, jax.hessian)[0], EXACT[2])


def test_the_derivative_in_further_arguments_and_zero_in_the_start():
    solve = implicit(ridge)(solve_ridge)
    found, start = jax.jit(jax.grad(lambda data, x0: outer(solve(x0, Y, data), Y), (0, 1)))(DATA, X0)
    expected = jax.jit(jax.grad(lambda data: outer(
        jnp.linalg.solve(data[0].T @ data[0] / 8 + jnp.diag(jnp.exp(Y)) / 3, data[1] @ data[0] / 8), Y)))(DATA)
    jax.tree.map(close, found, expected)
    assert not start.any()


@jax.jit
def lagrangian_hessian(x):
    """Claim 4: the Hessian of y -> G(x*(y), y) from the Lagrangian G - v F with v frozen."""
    F1, F2 = jax.jacfwd(logistic, (0, 1))(x, Y)
    J = -jnp.linalg.solve(F1, F2)
    v = jnp.linalg.solve(F1.T, jax.grad(outer)(x, Y))
    (L11, _), (L21, L22) = jax.hessian(lambda x, y: outer(x, y) - v @ logistic(x, y), (0, 1))(x, Y)
    return L22 + L21 @ J + (L21 @ J).T + J.T @ L11 @ J


@pytest.mark.parametrize("correction", ["none", "polish"])
def test_the_outer_hessian_is_that_of_the_lagrangian(correction):
    solve = implicit(logistic, correction=correction)(newton(12))
    close(jax.jit(jax.hessian(lambda y: outer(solve(X0, y), y)))(Y), lagrangian_hessian(X_STAR))


def fixed(correction):
    """The solution map of a solver that returns its start, whose distance to the solution is then known."""
    return implicit(logistic, correction=correction)(lambda x0, y: x0)


@jax.jit
def jacobians(x):
    """The point, the Jacobian of the solution there, and both corrected along the Newton step."""
    J = lambda x: -jnp.linalg.solve(*jax.jacfwd(logistic, (0, 1))(x, Y))
    step = jnp.linalg.solve(jax.jacfwd(logistic)(x, Y), logistic(x, Y))
    plain, turn = jax.jvp(J, (x,), (step,))
    return x, plain, x - step, plain - turn


@pytest.mark.parametrize(("correction", "order"), [("none", jax.jacrev), ("one_point", jax.jacrev), ("polish", jax.jacfwd)])
def test_the_corrected_jacobian_is_the_formula(correction, order):
    point, plain, moved, corrected = jacobians(X_STAR + 0.1 * D)
    value, jacobian = jax.jit(lambda x: (fixed(correction)(x, Y), order(fixed(correction), 1)(x, Y)))(point)
    close(value, moved if correction == "polish" else point)
    close(jacobian, plain if correction == "none" else corrected)


def affine(x, y):
    return B_OUT[:3] @ x + y @ y


@pytest.mark.parametrize(("correction", "orders"), [("none", (1, 1)), ("one_point", (2, 1)), ("polish", (2, 2))])
def test_the_order_of_the_gradient_error_is_that_of_the_table(correction, orders):
    def gradients(x):
        return jnp.stack([jax.grad(lambda y, G=objective: G(fixed(correction)(x, y), y))(Y) for objective in (affine, outer)])

    at = jax.jit(jax.vmap(gradients))(X_STAR + jnp.array([0.0, 1e-3, 1e-4])[:, None] * D)
    errors = np.linalg.norm(at[1:] - at[0], axis=2)
    np.testing.assert_allclose(np.log10(errors[0] / errors[1]), orders, atol=0.02)


def test_trees_and_scalars():
    @implicit(lambda x, y, c: {"a": c * x["a"] - y["u"], "b": 2.0 * x["b"] + x["a"] * y["v"]}, symmetric=False)
    def solve(x0, y, c):
        a = y["u"] / c
        return {"a": a, "b": -a * y["v"] / 2}

    y, start = {"u": jnp.array(3.0), "v": jnp.array(0.5)}, {"a": jnp.array(0.0), "b": jnp.array(0.0)}
    for order in (jax.jacrev, jax.jacfwd):
        found = jax.jit(order(lambda y: solve(start, y, 4.0)))(y)
        close([found["a"]["u"], found["b"]["u"], found["b"]["v"]], [0.25, -0.0625, -0.375])


@pytest.mark.parametrize("linear", ["auto", GMRES(1e-13)], ids=str)
def test_the_adjoint_of_a_root_uses_the_transpose(linear):
    M = jnp.asarray(GENERATOR.standard_normal((3, 3))) + 4 * jnp.eye(3)
    solve = implicit(lambda x, y: M @ x - jnp.sin(y), linear, symmetric=False)(lambda x0, y: jnp.linalg.solve(M, jnp.sin(y)))
    close(jax.jit(jax.grad(lambda y: D @ solve(X0, y)))(Y), jnp.linalg.solve(M, jnp.diag(jnp.cos(Y))).T @ D)


def test_batches_and_whole_number_arguments():
    ys = Y + jnp.arange(4.0)[:, None]
    solve = implicit(ridge)(solve_ridge)
    found = jax.jit(jax.vmap(jax.grad(lambda y: outer(solve(X0, y, DATA), y))))(ys)
    close(found, jax.jit(jax.vmap(jax.grad(lambda y: outer(closed(y), y))))(ys))
    power = implicit(lambda x, y, k: x - y**k)(lambda x0, y, k: y**k)
    close(jax.jit(jax.grad(lambda y, k: power(0.0, y, k)))(2.0, 3), 12.0)


def test_float32_stays_float32():
    solve = implicit(ridge, correction="polish")(solve_ridge)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (X0, Y, DATA))
    gradient = jax.jit(jax.grad(lambda y: solve(single[0], y, single[2]).sum()))(single[1])
    assert gradient.dtype == jnp.float32
    close(gradient, jax.jit(jax.grad(lambda y: closed(y).sum()))(Y), 1e-4)


def test_a_wrong_symmetry_declaration_is_refused_eagerly_and_gives_nan_in_compiled_code():
    M = jnp.array([[2.0, 1.0], [0.0, 1.0]])
    decorated = lambda: implicit(lambda x, y: M @ x - y)(lambda x0, y: jnp.linalg.solve(M, y))
    for call in (lambda: decorated()(jnp.zeros(2), jnp.ones(2)), lambda: jax.grad(lambda y: decorated()(jnp.zeros(2), y).sum())(jnp.ones(2))):
        with pytest.raises(ArgumentError, match="symmetric must be False"):
            call()
    assert jnp.isnan(jax.jit(jax.grad(lambda y: decorated()(jnp.zeros(2), y).sum()))(jnp.ones(2))).all()


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
