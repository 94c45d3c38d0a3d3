"""Other packages on the problems of the hypergradient benchmark, as their documentation shows; a package that is not installed is left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Calls = dict[str, Callable[[], Any]]
PEERS = ("jaxopt", "optimistix", "lineax", "torch", "torchopt")


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def energy(x: Any, y: Any, data: Any) -> Any:
    """The inner energy as a user of another package writes it."""
    A, b = data
    return jnp.mean(jax.nn.softplus(-b * (A @ x))) + jnp.sum(jnp.exp(y) * x * x) / (2 * x.shape[0])


def outer_loss(x: Any, data: Any) -> Any:
    A, b = data
    return jnp.mean(jax.nn.softplus(-b * (A @ x)))


def at_a_point(x: Any, y: Any, train: Any, valid: Any) -> Calls:
    """One hypergradient from one inner point."""
    F = jax.grad(energy)
    calls: Calls = {}

    @jax.jit
    def dense(x: Any, y: Any, train: Any, valid: Any) -> Any:
        H, F2 = jax.hessian(energy)(x, y, train), jax.jacobian(F, 1)(x, y, train)
        return -F2.T @ jnp.linalg.solve(H, jax.grad(outer_loss)(x, valid))

    calls["jax.hessian and solve, all derivatives by autodiff"] = lambda: dense(x, y, train, valid)
    if installed("lineax"):
        import lineax

        @jax.jit
        def krylov(x: Any, y: Any, train: Any, valid: Any) -> Any:
            product = jax.linearize(lambda x: F(x, y, train), x)[1]
            operator = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: x), lineax.positive_semidefinite_tag)
            v = lineax.linear_solve(operator, jax.grad(outer_loss)(x, valid), lineax.CG(1e-10, 1e-10), throw=False).value
            return -jax.vjp(lambda y: F(x, y, train), y)[1](v)[0]

        calls["lineax CG 1e-10"] = lambda: krylov(x, y, train, valid)
    if installed("jaxopt"):
        from jaxopt import linear_solve
        from jaxopt.implicit_diff import root_vjp

        def peer(solve: Callable) -> Callable:
            return jax.jit(lambda x, y, train, valid: root_vjp(F, x, (y, train), jax.grad(outer_loss)(x, valid), solve=solve)[0])

        for name, solve in (("normal CG (default)", linear_solve.solve_normal_cg), ("CG 1e-10", partial(linear_solve.solve_cg, tol=1e-10)),
                            ("Cholesky", linear_solve.solve_cholesky)):
            run = peer(solve)
            calls[f"jaxopt root_vjp, {name}"] = lambda run=run: run(x, y, train, valid)
    if installed("torch"):
        calls |= _torch(x, y, train, valid)
    return calls


def _torch(x: Any, y: Any, train: Any, valid: Any) -> Calls:
    """CG with double backward passes, and the decorator of torchopt."""
    import torch

    torch.set_num_threads(1)
    A, b, A_out, b_out = (torch.tensor(np.asarray(a)) for a in (*train, *valid))
    point, theta, p = torch.tensor(np.asarray(x)), torch.tensor(np.asarray(y)), x.shape[0]
    softplus = torch.nn.functional.softplus

    def inner(x: Any, y: Any) -> Any:
        return softplus(-b * (A @ x)).mean() + (y.exp() * x * x).sum() / (2 * p)

    def outer(x: Any) -> Any:
        return softplus(-b_out * (A_out @ x)).mean()

    def double_backward() -> Any:
        x, y = point.clone().requires_grad_(), theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(outer(x), x)
        (F,) = torch.autograd.grad(inner(x, y), x, create_graph=True)
        v, r = torch.zeros_like(g), g.clone()
        d, rr = r.clone(), r @ r
        stop = 1e-20 * rr
        while rr > stop:
            (q,) = torch.autograd.grad(F, x, d, retain_graph=True)
            alpha = rr / (d @ q)
            v, r = v + alpha * d, r - alpha * q
            rr, old = r @ r, rr
            d = r + rr / old * d
        (out,) = torch.autograd.grad(F, y, v)
        return -out.numpy()

    calls: Calls = {"torch, CG with double backward, 1e-10": double_backward}
    if installed("torchopt"):
        from torchopt import linear_solve
        from torchopt.diff.implicit import custom_root

        for name, options in (("solve_cg, rtol 1e-10", {"solve": linear_solve.solve_cg(rtol=1e-10, maxiter=10 * p)}), ("default", {})):
            solver = custom_root(torch.func.grad(inner), argnums=1, **options)(lambda x, y: x)

            def run(solver: Any = solver) -> Any:
                y = theta.clone().requires_grad_()
                (out,) = torch.autograd.grad(outer(solver(point.clone().requires_grad_(), y)), y)
                return out.numpy()

            calls[f"torchopt custom_root, {name}"] = run
    return calls


def from_nothing(y: Any, train: Any, valid: Any, zero: Any) -> Calls:
    """Inner solver and hypergradient together, from x = 0, one compiled program each."""
    calls: Calls = {}

    def add(name: str, solved: Callable) -> None:
        gradient = jax.jit(jax.grad(lambda y, train, valid, zero: outer_loss(solved(y, train, zero), valid)))
        calls[name] = lambda: gradient(y, train, valid, zero)

    if installed("jaxopt"):
        import jaxopt
        from jaxopt import linear_solve

        run = lambda solver: lambda y, train, zero: solver.run(zero, y, train).params
        add("jaxopt LBFGS, all defaults", run(jaxopt.LBFGS(energy)))
        add("jaxopt GradientDescent, all defaults", run(jaxopt.GradientDescent(energy)))
        for level, adjoint in ((4e-4, 1e-3), (1e-4, 1e-4), (1e-6, 1e-6), (1e-9, 1e-9)):
            conjugate = partial(linear_solve.solve_cg, tol=adjoint)
            add(f"jaxopt LBFGS {level:.0e}, CG {adjoint:.0e}", run(jaxopt.LBFGS(energy, tol=level, maxiter=1000, implicit_diff_solve=conjugate)))
    if installed("optimistix", "lineax"):
        import lineax
        import optimistix

        def minimized(minimizer: Any, **options: Any) -> Callable:
            tags = frozenset({lineax.positive_semidefinite_tag})
            return lambda y, train, zero: optimistix.minimise(lambda x, args: energy(x, *args), minimizer, zero, (y, train), max_steps=1000,
                                                              throw=False, tags=tags, **options).value

        for level, adjoint in ((1e-3, 1e-3), (1e-4, 1e-6), (1e-8, 1e-10)):
            conjugate = optimistix.ImplicitAdjoint(linear_solver=lineax.CG(adjoint, adjoint))
            add(f"optimistix LBFGS {level:.0e}, CG {adjoint:.0e}", minimized(optimistix.LBFGS(level, level), adjoint=conjugate))
        add("optimistix BFGS 1e-8, default adjoint", minimized(optimistix.BFGS(1e-8, 1e-8)))

    def unrolled(y: Any, train: Any, zero: Any) -> Any:
        step = 20.0 / (jnp.max(jnp.sum(train[0] ** 2, axis=1)) / 4 + jnp.max(jnp.exp(y)) / zero.shape[0])
        return jax.lax.scan(lambda x, _: (x - step * jax.grad(energy)(x, y, train), None), zero, length=200)[0]

    add("200 gradient steps, unrolled", unrolled)
    return calls
