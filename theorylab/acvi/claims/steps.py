"""Single steps and symmetries: the inner iteration of the x-step, rescaled problems, and the derivative of the central path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.baselines import GradientDescentAscent
from theorylab.acvi.claims._programs import DERIVED, KEY, P2, SMALL, Case, Path, Problem, follow, game, normal, simplex_problem
from theorylab.acvi.implicit import smoothed_equilibrium
from theorylab.acvi.inexact import Root
from theorylab.acvi.problem import MatrixGame
from theorylab.core.keys import stream
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check


@jax.jit(static_argnames="sizes")
def _gradient_step(M: Any, q: Any, beta: Any, eta: Any, x: Any, u: Any, sizes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """A gradient step of the x-step from each point of x, and its derivative."""
    problem, method = simplex_problem(M, q, sizes), GradientDescentAscent(eta)
    root = Root(problem, problem.equality.project(u), beta)
    step = lambda x: method.step(root, method.init(root, x, key=KEY), key=KEY)  # noqa: E731
    return jax.vmap(step)(x), jax.jacfwd(step)(u)


@claim("acvi.inner-steps", source=f"{DERIVED}, for the inexact x-step of {P2}",
       statement=r"(i) A gradient step on the x-step maps $Cx - d$ to $(1 - \eta)(Cx - d)$. (ii) On $Cx = d$, with L the norm of $P_c F'$, it "
                 r"contracts by $\sqrt{1 - 1/(1 + L/\beta)^2}$ for $\eta = 1/(1 + L/\beta)^2$, and for skew F by $\sqrt{\rho/(1 + \rho)}$, "
                 r"$\rho = L^2/\beta^2$, for $\eta = 1/(1 + \rho)$.",
       fast={"count": 10, "shape": (5, 7)}, full={"count": 100, "shape": (20, 30)})
def _(check: Check, count: int, shape: tuple[int, int]) -> None:
    n = sum(shape)
    betas = 10 ** np.asarray(jax.random.uniform(stream(0, "beta"), (count,), minval=-1.5, maxval=1.0))
    plane, general, turning, both = [], [], [], []
    for i, beta in enumerate(betas):
        for strength, ratios in ((0.3, general), (0.0, turning)):
            p = game((*shape, 1e-2, float(beta)), seed=i, strength=strength)
            null = np.linalg.svd(p.C)[2][2:]
            rho = np.linalg.norm(null @ p.M @ null.T, 2) / beta
            points, u = normal(i, "points", 20, n), normal(i, "u", n)
            for skew in (False, True) if strength == 0 else (False,):
                eta = 1 / (1 + rho**2) if skew else 1 / (1 + rho) ** 2
                bound = np.sqrt(rho**2 / (1 + rho**2)) if skew else np.sqrt(1 - 1 / (1 + rho) ** 2)
                after, slope = map(np.asarray, _gradient_step(p.M, p.q, jnp.asarray(beta), jnp.asarray(eta), points, u, shape))
                before = points @ p.C.T - p.d
                plane.append(np.abs(after @ p.C.T - p.d - (1 - eta) * before).max() / np.abs(before).max())
                (both if strength == 0 and not skew else ratios).append(np.linalg.norm(null @ slope @ null.T, 2) / bound)
    check.below("C x - d after a step against (1 - eta)(C x - d), relative", np.array(plane), 2e-15)
    check.below("contraction over its bound, strongly monotone F", np.array(general), 1)
    check.below("contraction over its bound, skew F with the general step size", np.array(both), 1)
    check.below("contraction over its bound, skew F with its own step size", np.array(turning), 1 + 1e-12)
    check.above("the same, the largest", np.max(turning), 1 - 1e-12, note="the bound is attained")


@claim("acvi.equivariance", source=DERIVED,
       statement=r"$(F, \mu, \beta, \lambda) \to (sF, s\mu, s\beta, s\lambda)$ leaves x and y unchanged; $x \to cx$ with "
                 r"$F(\cdot/c), cd, c\mu, \beta/c$ and the same $\lambda$ scales them; permutations of coordinates permute them; "
                 r"adding $C^\top\nu$ to F changes nothing.",
       fast={"cases": SMALL[:2], "steps": 3000}, full={"cases": ((5, 7, 1e-2, 0.5), (20, 30, 1e-3, 0.2)), "steps": 3000})
def _(check: Check, cases: tuple[Case, ...], steps: int) -> None:
    for case in cases:
        p = game(case, seed=4, strength=0.1)._replace(q=normal(4, "q", case[0] + case[1]))
        s, c, order = 7.3, 0.21, np.asarray(jax.random.permutation(stream(4, "order"), len(p.y)))
        back = np.argsort(order)
        changed = {
            "F, mu, beta, lambda times s": (Problem(s * p.M, s * p.q, p.C, p.d, s * p.mu, s * p.beta, p.y, s * p.lam), lambda z: z),
            "x times c": (Problem(p.M / c, p.q, p.C, c * p.d, c * p.mu, p.beta / c, c * p.y, p.lam), lambda z, c=c: z / c),
            "permutation": (Problem(p.M[np.ix_(order, order)], p.q[order], p.C[:, order], p.d, p.mu, p.beta, p.y[order], p.lam[order]),
                            lambda z, back=back: z[:, back]),
            "C' nu added to F": (p._replace(q=p.q + p.C.T @ np.array([1.3, -0.4])), lambda z: z),
        }
        base, *others = follow([p, *(other for other, _ in changed.values())], steps)
        size = np.abs(base.x).max()
        for (name, (_, undo)), path in zip(changed.items(), others, strict=True):
            check.below(f"{case[0]} x {case[1]}, {name}: change of x and y over their size", _apart(base, path, undo) / size, 1e-13)


def _apart(base: Path, path: Path, undo: Any) -> float:
    return max(np.abs(undo(path.x) - base.x).max(), np.abs(undo(path.y) - base.y).max())


@jax.jit
def _points_and_derivatives(A: Any, mu: Any) -> tuple[jax.Array, ...]:
    """The points of the central path of games of one shape, and their derivatives in A."""
    point = lambda A, mu: smoothed_equilibrium(MatrixGame(A), mu)  # noqa: E731
    return jax.lax.map(lambda a: (point(*a), jax.jacrev(point)(*a)), (A, mu))


@claim("acvi.implicit-derivative", source=DERIVED,
       statement=r"$dx^\mu/d\theta$ solves $\begin{pmatrix} F' + \nabla^2 B_\mu & C^\top \\ C & 0 \end{pmatrix}"
                 r"\begin{pmatrix} dx \\ d\nu \end{pmatrix} = -\begin{pmatrix} \partial_\theta F \\ 0 \end{pmatrix}$; on a matrix game "
                 r"$\frac{d}{dA}[x_1^\top A x_2 - \mu\sum\log x_1 + \mu\sum\log x_2] = x_1 x_2^\top$.",
       fast={"shape": (5, 7), "mus": (0.3, 0.1)}, full={"shape": (12, 15), "mus": (0.3, 0.1, 0.03)})
def _(check: Check, shape: tuple[int, int], mus: tuple[float, ...], h: float = 1e-5) -> None:
    A, (n1, n2) = normal(6, "implicit", *shape), shape
    basis = h * np.eye(n1 * n2).reshape(-1, n1, n2)
    stack = np.concatenate([A[None], A + basis, A - basis])
    for mu in mus:
        x, slope = map(np.asarray, _points_and_derivatives(stack, jnp.full(len(stack), mu)))
        central = np.moveaxis((x[1:n1 * n2 + 1] - x[n1 * n2 + 1:]) / (2 * h), 0, -1).reshape(n1 + n2, n1, n2)
        check.below(f"mu {mu:g}: derivative against central differences", np.abs(slope[0] - central), 3e-10)
        x1, x2 = np.split(x[0], [n1])
        force = np.concatenate([A @ x2 - mu / x1, A.T @ x1 + mu / x2])                         # of the value with its barriers, in x
        total = np.outer(x1, x2) + np.einsum("i,ijk->jk", force, slope[0])
        check.below(f"mu {mu:g}: derivative of the value against x1 x2'", np.abs(total - np.outer(x1, x2)), 4e-12)
    small = np.array([1e-6, 1e-7, 1e-8])
    x, slope = map(np.asarray, _points_and_derivatives(np.broadcast_to(A, stack.shape), jnp.asarray(np.resize(small, len(stack)))))
    away = [np.abs(np.einsum("i,ijk->jk", np.concatenate([A @ z[n1:], A.T @ z[:n1]]), d)).max() for z, d in zip(x[:3], slope[:3], strict=True)]
    check.slope("derivative of x1'A x2 alone against x1 x2': order in mu", small, away, expected=1.0, tol=0.1)
