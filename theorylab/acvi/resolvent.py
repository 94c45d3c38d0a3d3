r"""The x-step: the resolvent $J_\beta$ of F on the plane C x = d, in the form that suits the problem.

$x = J_\beta(u)$ is the root of $G(x) = x + P_c F(x)/\beta - P_c u - d_c$, equivalently $\beta x + F(x) + C^\top\nu = \beta u$ with $Cx = d$. On that
plane G is 1-strongly monotone for monotone F, so the root is unique.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.acvi.problem import MatrixGame
from theorylab.acvi.prox import like
from theorylab.acvi.sparse import SparseLU, SparseMatrix, dense, factors_well
from theorylab.acvi.xstep import Solved, XStep, solved
from theorylab.core.linear import cg
from theorylab.errors import ArgumentError

Array = jax.Array

KINDS = ("auto", "dense", "svd", "blocks", "cg", "krylov", "sparse", "newton")
SVD_SIZE = 2048
DENSE_SIZE = 4096
NEWTON_SIZE = 512
POWER_STEPS = 200


class Dense(XStep):
    r"""Affine F: $x = R u + r$ with $R = (I + P_c M/\beta)^{-1}P_c$ and $r = d_c - R F(d_c)/\beta$ precomputed; one product with a matrix per
    step.
    """

    free: ClassVar[bool] = False
    factorizations: ClassVar[int] = 1
    matrix: Array
    offset: Array

    @classmethod
    def make(cls, problem: Any, penalty: Array) -> Self:
        M, null = problem.matrix, problem.equality.null
        eye, columns = jnp.eye(M.shape[0], dtype=M.dtype), jax.vmap(null, in_axes=1, out_axes=1)
        R = jnp.linalg.solve(eye + columns(M) / penalty, columns(eye))
        point = like(problem.equality.point, M)
        return cls(R, point - R @ problem.operator(point) / penalty)

    def __call__(self, problem: Any, u: Array, x: Array, penalty: Array, tolerance: Any = 0.0) -> Solved:
        return solved(like(self.matrix, u) @ u + like(self.offset, u), 1)


class Spectral(XStep):
    r"""Matrix games: with the singular value decomposition of the double-centered matrix every penalty is free. Four products with N x N factors."""

    factorizations: ClassVar[int] = 1
    left: Array
    values: Array
    right: Array
    force: Array
    """$P_c F(d_c)$."""

    @classmethod
    def make(cls, problem: Any, penalty: Array) -> Self:
        left, values, right = jnp.linalg.svd(double_centered(dense(problem.A)), full_matrices=False)
        return cls(left, values, right, problem.equality.null(problem.operator(like(problem.equality.point, left))))

    def __call__(self, problem: Any, u: Array, x: Array, penalty: Array, tolerance: Any = 0.0) -> Solved:
        left, right, s = like(self.left, u), like(self.right, u), like(self.values, u) / penalty
        b1, b2 = problem.split(problem.equality.null(u) - like(self.force, u) / penalty)
        g1, g2 = b1 @ left, right @ b2
        scale = 1 + s * s
        x1, x2 = b1 + left @ ((g1 - s * g2) / scale - g1), b2 + ((g2 + s * g1) / scale - g2) @ right
        return solved(like(problem.equality.point, u) + jnp.concatenate([x1, x2]), 2)


class Blocks(XStep):
    r"""Affine F with $M = B \otimes I$, one number per pair of players, and equal blocks in C: one small system for all coordinates, any penalty.

    B is read off from k + 1 evaluations of F at the first coordinate of each of the k players. That M has this form is the word of the caller.
    """

    matrix: Array
    force: Array
    """F at the point of the equality."""

    @classmethod
    def make(cls, problem: Any, penalty: Array) -> Self:
        sizes = getattr(problem.equality, "sizes", None)
        if sizes is None or len(set(sizes)) != 1:
            raise ArgumentError(f"linear='blocks' needs an equality BlockSimplex with equal sizes, got {problem.equality!r}")
        point = jnp.asarray(problem.equality.point, problem.dtype)
        base, players = problem.operator(point), len(sizes)
        columns = [(problem.operator(point.at[j * sizes[0]].add(1)) - base)[:: sizes[0]] for j in range(players)]
        return cls(jnp.stack(columns, axis=1), base)

    def __call__(self, problem: Any, u: Array, x: Array, penalty: Array, tolerance: Any = 0.0) -> Solved:
        point, B = like(problem.equality.point, u), like(self.matrix, u)
        b = problem.equality.null(u - like(self.force, u) / penalty).reshape(B.shape[0], -1)
        return solved(point + jnp.linalg.solve(jnp.eye(B.shape[0], dtype=B.dtype) + B / penalty, b).reshape(-1), 1)


class ConjugateGradient(XStep):
    r"""Large bilinear games: eliminating one player leaves $(I + A_P A_P^\top/\beta^2) p = b_1 - A_P b_2/\beta$, solved by warm-started CG.

    Beside a `MatrixGame` it takes any problem with two blocks of a `BlockSimplex`; that its F is $(A x_2 + q_1, -A^\top x_1 + q_2)$ is the word of
    the caller.
    """

    def __call__(self, problem: Any, u: Array, x: Array, penalty: Array, tolerance: Any = 0.0) -> Solved:
        point, null = like(problem.equality.point, u), problem.equality.null
        force, n1, game = problem.operator(point), problem.equality.sizes[0], isinstance(problem, MatrixGame)
        b = null(u - force / penalty)
        b1, b2 = b[:n1], b[n1:]

        def rows(z2: Array) -> Array:
            if game:
                image = problem.A @ z2
                return (image - image.mean()) / penalty
            return null(problem.operator(point.at[n1:].add(z2)) - force)[:n1] / penalty

        def columns(z1: Array) -> Array:
            if game:
                image = problem.A.T @ z1
                return (image - image.mean()) / penalty
            return null(force - problem.operator(point.at[:n1].add(z1)))[n1:] / penalty

        right, least = b1 - rows(b2), max(1e-11, 20 * float(jnp.finfo(u.dtype).eps))
        size = jnp.linalg.norm(right)
        enough = jnp.maximum(like(tolerance, u) / jnp.where(size > 0, size, jnp.ones_like(size)), like(least, u))
        end = cg(lambda p: p + rows(columns(p)), right, x0=(x - point)[:n1], tolerance=jnp.minimum(enough, like(0.5, u)))
        # two products per step of CG and for each of its two residuals, and two here; in a game each costs half an evaluation
        products = 2 * end.steps + 6
        return solved(point + jnp.concatenate([end.value, b2 + columns(end.value)]), (products // 2 if game else products) + 1)


class Krylov(XStep):
    r"""Affine F without a matrix: generalized conjugate residuals on $z + P_c M z/\beta$, warm-started, to round-off; any penalty."""

    memory: ClassVar[int] = 40

    def __call__(self, problem: Any, u: Array, x: Array, penalty: Array, tolerance: Any = 0.0) -> Solved:
        point = like(problem.equality.point, u)
        base = problem.operator(point)
        b = problem.equality.null(u - base / penalty)

        def apply(z: Array) -> Array:
            return z + problem.equality.null(problem.operator(point + z) - base) / penalty

        target = jnp.maximum(50 * jnp.finfo(u.dtype).eps * (jnp.linalg.norm(b) + jnp.linalg.norm(point)), like(tolerance, u))

        def live(loop: tuple[Array, Array, Array, Array]) -> Array:
            _, size, spent, better = loop
            return (size > target) & better & (spent < 50 * self.memory)

        def cycle(loop: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            z, size, spent, _ = loop
            move, steps = conjugate_residuals(apply, b - apply(z), self.memory, target)
            after = jnp.linalg.norm(b - apply(z + move))
            better = after < size
            return jnp.where(better, z + move, z), jnp.minimum(after, size), spent + steps + 2, better & (after < size / 2)

        z = problem.equality.null(x - point)
        start = (z, jnp.linalg.norm(b - apply(z)), jnp.asarray(2, jnp.int32), jnp.asarray(True))
        z, _, spent, _ = lax.while_loop(live, cycle, start)
        return solved(point + z, spent)


def conjugate_residuals(apply: Callable[[Array], Array], r: Array, memory: int, target: Array) -> tuple[Array, Array]:
    r"""The z with the least $|r - Az|$ in the Krylov space of `memory` products, or fewer once that is below `target`; and the products used.

    Generalized conjugate residuals: without breakdown for A with a positive definite symmetric part, which every x-step has.
    """
    basis = jnp.zeros((memory, r.shape[0]), r.dtype)

    def live(loop: tuple) -> Array:
        _, r, _, _, j, stuck = loop
        return (j < memory) & (jnp.linalg.norm(r) > target) & ~stuck

    def step(loop: tuple) -> tuple:
        z, r, P, Q, j, _ = loop
        p, q = r, apply(r)
        for _ in range(2):  # the second pass removes what round-off left of the first
            coefficients = Q @ q
            p, q = p - coefficients @ P, q - coefficients @ Q
        length = jnp.linalg.norm(q)
        good = length > 0
        inverse = 1 / jnp.where(good, length, jnp.ones_like(length))
        p, q = p * inverse, q * inverse
        weight = q @ r
        return z + weight * p, r - weight * q, P.at[j].set(p), Q.at[j].set(q), j + 1, ~good

    z, _, _, _, used, _ = lax.while_loop(live, step, (jnp.zeros_like(r), r, basis, basis, jnp.zeros((), jnp.int32), jnp.asarray(False)))
    return z, used


class Newton(XStep):
    r"""Nonlinear F: Newton's method on G with backtracking on $|G|$, warm-started; a trial point where F is not finite counts as a failed step.

    The Jacobian $I + P_c F'/\beta$ is factored up to dimension 512; beyond that the linear systems are solved by conjugate residuals.
    """

    most: ClassVar[int] = 50
    halvings: ClassVar[int] = 40

    def __call__(self, problem: Any, u: Array, x: Array, penalty: Array, tolerance: Any = 0.0) -> Solved:
        equality = problem.equality
        b = equality.null(u) + like(equality.point, u)

        def root(x: Array) -> Array:
            return x + equality.null(problem.operator(x)) / penalty - b

        def direction(x: Array, g: Array) -> tuple[Array, Array, Array]:
            if x.shape[0] <= NEWTON_SIZE:
                return jnp.linalg.solve(jax.jacfwd(root)(x), -g), jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
            move, used = conjugate_residuals(jax.linearize(root, x)[1], -g, Krylov.memory, 1e-3 * jnp.linalg.norm(g))
            return move, used, jnp.zeros((), jnp.int32)

        def size(g: Array) -> Array:
            return jnp.where(jnp.isfinite(g).all(), jnp.linalg.norm(g), jnp.inf)

        def live(loop: tuple) -> Array:
            _, _, norm, steps, _, _, better = loop
            return (norm > target) & better & (steps < self.most)

        def step(loop: tuple) -> tuple:
            x, g, norm, steps, evaluations, factors, _ = loop
            move, products, factored = direction(x, g)

            def worse(trial: tuple) -> Array:
                _, _, after, halvings = trial
                return ~(after < norm) & (halvings < self.halvings) & (norm > 1e4 * least)  # below that only round-off stands in the way

            def halve(trial: tuple) -> tuple:
                _, _, _, halvings = trial
                at = x + move * 0.5 ** (halvings + 1).astype(x.dtype)
                g = root(at)
                return at, g, size(g), halvings + 1

            full = root(x + move)
            at, after_g, after, halvings = lax.while_loop(worse, halve, (x + move, full, size(full), jnp.zeros((), jnp.int32)))
            better = after < norm
            x, g, left = jnp.where(better, at, x), jnp.where(better, after_g, g), jnp.where(better, after, norm)
            going = better & ((after < norm / 2) | (norm > 1e4 * least))
            return x, g, left, steps + 1, evaluations + products + halvings + 1, factors + factored, going

        g, zero = root(x), jnp.zeros((), jnp.int32)
        least = 10 * jnp.finfo(u.dtype).eps * (jnp.linalg.norm(b) + jnp.linalg.norm(x) + jnp.linalg.norm(g + b - x))
        target = jnp.maximum(least, like(tolerance, u))
        x, _, _, _, evaluations, factors, _ = lax.while_loop(live, step, (x, g, size(g), zero, zero + 1, zero, jnp.asarray(True)))
        return Solved(x, evaluations, factors)


def choose(problem: Any, linear: str) -> type[XStep]:
    """The kind of x-step: as asked, or for `"auto"` by class and shape of the problem.

    Raises:
        ArgumentError: the problem has not what that kind needs.
    """
    game, sparse = isinstance(problem, MatrixGame), isinstance(getattr(problem, "M", None), SparseMatrix)
    if linear == "auto":
        if problem.structure is not None:
            linear = {"affine": "krylov", "bilinear": "cg", "blocks": "blocks"}[problem.structure]
        elif game:
            linear = "svd" if min(problem.A.shape) <= SVD_SIZE and isinstance(problem.A, jax.Array) else "cg"
        elif sparse:
            linear = "sparse" if factors_well(problem) else "krylov"
        elif problem.is_affine:
            linear = "dense" if problem.dim <= DENSE_SIZE else "krylov"
        else:
            linear = "newton"
    if linear == "svd" and not game:
        raise ArgumentError(f"linear='svd' needs a MatrixGame, got {type(problem).__name__}; use 'dense' or 'krylov' for affine operators")
    if linear == "cg" and len(getattr(problem.equality, "sizes", ())) != 2:
        raise ArgumentError(f"linear='cg' needs a game on two simplices (equality BlockSimplex of two blocks), got {type(problem.equality).__name__}")
    if linear == "dense" and not problem.is_affine:
        raise ArgumentError(f"linear='dense' needs a problem with a known matrix, got {type(problem).__name__}; use AffineVariationalInequality")
    if linear == "sparse" and not sparse:
        raise ArgumentError(f"linear='sparse' needs an AffineVariationalInequality with a sparse M, got {type(problem).__name__}; pass a matrix of "
                            "scipy.sparse as M")
    kinds: dict[str, type[XStep]] = {"dense": Dense, "svd": Spectral, "blocks": Blocks, "cg": ConjugateGradient, "krylov": Krylov,
                                     "sparse": SparseLU, "newton": Newton}
    return kinds[linear]


def double_centered(A: Array) -> Array:
    """$P_1 A P_2$: A without its row and column means."""
    return A - A.mean(axis=0) - A.mean(axis=1, keepdims=True) + A.mean()


def operator_norm(problem: Any) -> Array:
    r"""The norm of $P_c M P_c$, the Lipschitz constant of an affine F along C x = d; by power iteration in large dimensions.

    Raises:
        ArgumentError: F is not known to be affine.
    """
    if isinstance(problem, MatrixGame) and isinstance(problem.A, jax.Array) and min(problem.A.shape) <= NEWTON_SIZE:
        return jnp.linalg.norm(double_centered(problem.A), 2)
    if not problem.has_norm:
        raise ArgumentError(f"the norm of F is known for affine problems only, got {type(problem).__name__}; pass a number instead")
    null, point = problem.equality.null, jnp.asarray(problem.equality.point, problem.dtype)
    if problem.is_affine and not isinstance(problem, MatrixGame) and problem.dim <= NEWTON_SIZE:
        columns = jax.vmap(null, in_axes=1, out_axes=1)
        return jnp.linalg.norm(columns(columns(problem.matrix).T), 2)
    product, adjoint = jax.linearize(problem.operator, point)[1], jax.vjp(problem.operator, point)[1]

    def power(_: int, z: Array) -> Array:
        image = null(adjoint(null(product(z)))[0])
        size = jnp.linalg.norm(image)
        return image / jnp.where(size > 0, size, 1.0)                              # F may be constant along C x = d

    z = null(jax.random.normal(jax.random.key(0), point.shape, point.dtype))
    z = lax.fori_loop(0, POWER_STEPS, power, z / jnp.linalg.norm(z))
    return jnp.linalg.norm(null(product(z)))


def step_norm(problem: Any) -> Array:
    """`operator_norm`, or the size of F where that is nothing but round-off: F is then constant along C x = d, and any finite step will do."""
    norm = operator_norm(problem)
    size = jnp.linalg.norm(problem.operator(jnp.asarray(problem.equality.point, problem.dtype)))
    size = jnp.where(size > 0, size, 1.0)
    return jnp.where(norm > 100 * jnp.finfo(norm.dtype).eps * size, norm, size).astype(norm.dtype)
