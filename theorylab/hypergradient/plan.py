r"""Which preconditioner to correct with: predicted constants of the candidates that a budget of products allows, and a refusal of bad ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.core import checks, tree
from theorylab.core.keys import Key, as_key, stream
from theorylab.core.linear import Factored, cg
from theorylab.core.module import Module, number, size
from theorylab.core.psd import product
from theorylab.errors import ArgumentError, ShapeError
from theorylab.hypergradient.estimators import Estimator, Plain, Preconditioned, compiled, flat_point, plain, turned
from theorylab.hypergradient.linear import CG, DENSE_UP_TO, default_tolerance, fixed_start, largest, solver

Array = jax.Array
CANDIDATES = ("jacobi", "damped", "pcg", "nystrom", "stale")
CHEAPEST_FIRST = ("plain", "jacobi", "damped", "stale", "pcg", "nystrom")
LARGEST_SKETCH = 32
TIE, ROUND_OFF = 1.01, 1e-10            # a constant this near the smallest, or this small against that of plain, is as good
POWER_STEPS = 100


class DampedDiagonal(Module):
    r"""The preconditioner $P = \mathrm{diag}(F_1) / \omega$: a function (at, r) -> $P^{-1} r$ for `Preconditioned`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: 2 * jnp.sum(x**2) - x @ y, lambda x, y: jnp.sum(x), x=jnp.zeros(2), y=jnp.ones(2))
        >>> DampedDiagonal(0.5)(problem.at(jnp.zeros(2), jnp.ones(2)), jnp.ones(2)).tolist()
        [0.125, 0.125]
    """

    omega: Any = number(above=0.0)

    def __call__(self, at: Any, r: Array) -> Array:
        return self.omega * r / at.diagonal()


class Nystrom(Module):
    r"""The Nyström approximation of $F_1$ from `rank` products, scaled by its diagonal: a function (at, r) -> $P^{-1} r$ for `Preconditioned`.

    With $S = D^{-1/2} F_1 D^{-1/2}$, D the diagonal, and an orthonormal basis Q of `rank` fixed vectors, $S \approx SQ (Q^\top S Q)^{-1} (SQ)^\top
    = U \Lambda U^\top$. P takes $\Lambda$ on the range of U and the smallest of its entries elsewhere (Frangella, Tropp and Udell, 2023). For
    symmetric positive definite problems; it may be worse than no correction where the spectrum does not fall, which `plan_correction` sees.

    Args:
        rank: products with F_1 that one correction takes, at most 32.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: 2 * jnp.sum(x**2) - x @ y, lambda x, y: jnp.sum(x), x=jnp.zeros(2), y=jnp.ones(2))
        >>> Nystrom(2)(problem.at(jnp.zeros(2), jnp.ones(2)), jnp.ones(2)).round(12).tolist()
        [0.25, 0.25]
    """

    rank: int = size(high=LARGEST_SKETCH)

    @property
    def products(self) -> int:
        """What one correction takes."""
        return self.rank

    def __call__(self, at: Any, r: Array) -> Array:
        return _sketched(at, at.diagonal(), self.rank)(r)


def _sketched(at: Any, diagonal: Array, rank: int | Array) -> Callable[[Array], Array]:
    """The map r -> P^{-1} r of `Nystrom`; a traced rank is a mask over as many columns as there can be."""
    n, root, eps = diagonal.shape[0], jnp.sqrt(diagonal), float(jnp.finfo(diagonal.dtype).eps)
    vectors = fixed_start(jnp.zeros((n, min(n, LARGEST_SKETCH)), diagonal.dtype))
    Q = jnp.linalg.qr(vectors[:, :rank] if isinstance(rank, int) else vectors)[0]
    if not isinstance(rank, int):
        Q = jnp.where(jnp.arange(Q.shape[1], dtype=jnp.int32) < rank, Q, jnp.zeros_like(Q))
    Y = jax.vmap(lambda q: at.product(q / root) / root, in_axes=1, out_axes=1)(Q)
    values, V = jnp.linalg.eigh(product(Q.T, Y))
    kept = values > eps * values[-1]
    B = product(Y, V) * jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, jnp.ones_like(values))), jnp.zeros_like(values))
    U, s, _ = jnp.linalg.svd(B, full_matrices=False)
    found = s > eps * s[0]
    heights = jnp.where(found, s * s, jnp.inf)
    rest = jnp.min(heights)

    def inverse(r: Array) -> Array:
        z = r / root
        part = product(U.T, z)
        return (z / rest + product(U, jnp.where(found, 1 / heights - 1 / rest, jnp.zeros_like(s)) * part)) / root

    return inverse


class CorrectionPlan(NamedTuple):
    r"""What `plan_correction` chose, and what it predicts.

    Attributes:
        name: `"plain"` (no correction), `"jacobi"`, `"damped"`, `"pcg"`, `"nystrom"` or `"stale"`.
        estimator: to be used as it is, here and near here.
        constants: for each candidate and `"plain"`, the predicted error of the hypergradient per unit of inner error: the root mean square of
            $\lVert\Omega_1 (u - P^{-1} F_1 u)\rVert$ over unit directions u.
        errors: the predicted error $\lVert\Omega_1 (\hat\delta - P^{-1} F)\rVert$ at the given x, likewise.
        refused: candidates with a constant not below that of `"plain"`.
    """

    name: str
    estimator: Estimator
    constants: dict[str, float]
    errors: dict[str, float]
    refused: tuple[str, ...]


def _corrections(at: Any, budget: Array | None, stale: Factored | None, symmetric: bool) -> tuple[dict[str, Any], Array]:
    """The map r -> P^{-1} r of each candidate, and the damping."""
    diagonal, omega = at.diagonal(), jnp.ones((), at.residual.dtype)
    found: dict[str, Any] = {"jacobi": lambda r: r / diagonal}
    if symmetric:
        omega = _damping(at, diagonal)
        found["damped"] = lambda r: omega * r / diagonal
        if budget is not None:  # traced, so that another budget does not compile again; the steps are those of the solver `CG`
            found["pcg"] = lambda r: cg(at.product, r, preconditioner=found["jacobi"], tolerance=default_tolerance(r.dtype), max_steps=budget).value
            found["nystrom"] = _sketched(at, diagonal, budget)
    if stale is not None:
        found["stale"] = stale.solve
    return found, omega


def _damping(at: Any, diagonal: Array) -> Array:
    r"""$2 / (\lambda_{\min} + \lambda_{\max})$ of $P^{-1/2} F_1 P^{-1/2}$: the contraction is then (kappa - 1) / (kappa + 1) in the norm of P."""
    root = jnp.sqrt(diagonal)
    if diagonal.shape[0] <= DENSE_UP_TO:
        values = jnp.linalg.eigvalsh(at.matrix() / root[:, None] / root)
        return 2 / (values[0] + values[-1])
    scaled = lambda q: at.product(q / root) / root  # noqa: E731
    top = largest(scaled, diagonal, POWER_STEPS)
    return 2 / (2 * top - largest(lambda q: top * q - scaled(q), diagonal, POWER_STEPS))


def _survey(problem: Any, x: Array, y: Array, stale: Factored | None, key: Key, budget: Array | None, probes: int, linear: Any) -> Any:
    """Constants and predicted errors of all candidates, and the damping."""
    at = problem.at(x, y)
    system = solver(linear, x.shape[0], problem.symmetric).factor(at, problem.symmetric)
    adjoint = plain(at, system)[1].value
    newton = system.solve(at.residual).value
    length = tree.norm(newton)
    random = jax.random.normal(key, (probes, x.shape[0]), x.dtype)
    # The Newton step is the best guess of the inner error here; random directions stand for what it will be elsewhere.
    first = jnp.where(length > 0, newton / jnp.where(length > 0, length, jnp.ones_like(length)), random[0])
    U = jnp.concatenate([first[None], random])
    U = U / jnp.linalg.norm(U, axis=1, keepdims=True)
    images = jax.vmap(at.product)(U)
    candidates, omega = _corrections(at, budget, stale, problem.symmetric)

    def error(w: Array) -> Array:
        return tree.norm(turned(at, system, at.turn(adjoint, w))[0])

    norms = {name: jax.vmap(lambda u, r, apply=apply: error(u - apply(r)))(U, images)
             for name, apply in {"plain": jnp.zeros_like, **candidates}.items()}
    return {n: jnp.sqrt(jnp.mean(e**2)) for n, e in norms.items()}, {n: length * e[0] for n, e in norms.items()}, omega


def plan_correction(problem: Any, x: Any, y: Any, budget: int, *, stale: Any = None, preconditioner: str = "auto", probes: int = 8,
                    linear: Any = "auto", key: Key | int = 0) -> CorrectionPlan:
    r"""Choose how to correct the inner point before the implicit formula, given how many products with $F_1$ one correction may cost.

    The estimator $\Omega(x - P^{-1} F)$ has the error $\Omega_1 (I - P^{-1} F_1)\delta$ to first order (paper). This is evaluated on the Newton step
    and on random probes, for each P that the budget allows, without forming $\Omega_1$. The smallest is chosen, the cheaper of two alike, and
    whatever is not better than no correction is refused: the diagonal of $F_1$ can be worse than nothing. Planning costs one factorization (or some
    CG runs) and is meant to be done once, for many hypergradients near here (companion derivation).

    | candidate | $P^{-1} F$ | products |
    |---|---|---|
    | `"jacobi"` | $F / \mathrm{diag}(F_1)$ | 0 |
    | `"damped"` | $\omega F / \mathrm{diag}(F_1)$ with the best damping; symmetric problems | 0 |
    | `"pcg"` | `budget` steps of conjugate gradients, preconditioned by the diagonal; symmetric problems | `budget` |
    | `"nystrom"` | with the approximation of rank `budget` (at most 32) of `Nystrom`; symmetric problems | `budget` |
    | `"stale"` | with the given factor | 0 |

    Args:
        problem: a bilevel problem.
        x: an approximate inner solution, like the problem's x.
        y: hyper-parameters, like the problem's y.
        budget: products with $F_1$ that one correction may use.
        stale: a matrix near $F_1$, or its `Factored`, such as $F_1$ at an earlier y.
        preconditioner: `"auto"`, or the name of the candidate to plan for.
        probes: number of random directions.
        linear: solver of the systems of the planning, and of the adjoint system of the estimator.
        key: seed or random key of the probes.

    Returns:
        A `CorrectionPlan`; its estimator is `Plain` if everything else was refused.

    Raises:
        ArgumentError: `budget` is negative, or the named candidate is refused or not available.
        UnknownNameError: another name.
        ShapeError: x, y or `stale` does not match the problem.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.RidgeSelection((jnp.eye(2), jnp.array([3.0, 3.0])), (jnp.eye(2), jnp.ones(2)))
        >>> plan = plan_correction(problem, jnp.ones(2), jnp.zeros(2), budget=0)
        >>> plan.name, plan.estimator.preconditioner, plan.errors["jacobi"] < 1e-12
        ('jacobi', 'jacobi', True)
    """
    problem, flat_x, flat_y = flat_point(problem, x, y)
    budget, probes = checks.whole("budget", budget, low=0), checks.whole("probes", probes, low=1)
    checks.among("preconditioner", preconditioner, ("auto", *CANDIDATES))
    if stale is not None and not isinstance(stale, Factored):
        stale = Factored.of(checks.square("stale", stale))
    if stale is not None and stale.matrix.shape[0] != problem.n:
        raise ShapeError(f"stale must have {problem.n} rows to match x, got {stale.matrix.shape[0]}")
    if tree.is_traced(problem, flat_x, flat_y, stale):
        raise ArgumentError("plan_correction chooses on the host and cannot run inside compiled code; plan before, and use plan.estimator inside")
    traced = jnp.asarray(budget, jnp.int32) if budget else None
    constants, errors, omega = compiled(_survey, problem, flat_x, flat_y, stale, stream(as_key(key), "probes"), traced, probes, linear)
    constants, errors = ({name: float(e) for name, e in found.items()} for found in (constants, errors))
    level = constants["plain"]
    refused = tuple(name for name in constants if name != "plain" and not constants[name] < level)
    if preconditioner == "auto":
        left = [n for n in CHEAPEST_FIRST if n in constants and n not in refused]
        enough = max(TIE * min(constants[n] for n in left), ROUND_OFF * level)
        name = next((n for n in left if constants[n] <= enough), "plain")
    else:
        name = preconditioner
        _check_named(name, constants, refused)
    estimators = {"plain": Plain(linear=linear), "jacobi": Preconditioned("jacobi", linear=linear)}
    if name == "damped":
        estimators[name] = Preconditioned(DampedDiagonal(omega), linear=linear)
    elif name == "pcg":
        estimators[name] = Preconditioned(CG(max_steps=budget, preconditioner="jacobi"), linear=linear)
    elif name == "nystrom":
        estimators[name] = Preconditioned(Nystrom(min(budget, problem.n, LARGEST_SKETCH)), linear=linear)
    elif name == "stale":
        estimators[name] = Preconditioned(stale, linear=linear)
    return CorrectionPlan(name, estimators[name], constants, errors, refused)


def _check_named(name: str, constants: dict[str, float], refused: tuple[str, ...]) -> None:
    if name not in constants:
        both = "a budget of at least 1 and a symmetric problem"
        needs = {"stale": "the argument stale", "pcg": both, "nystrom": both}.get(name, "a symmetric problem")
        raise ArgumentError(f"preconditioner {name!r} needs {needs}")
    if name in refused:
        raise ArgumentError(f"preconditioner {name!r} is refused: a unit of inner error is predicted to become {constants[name]:.3g} in the "
                            f"hypergradient, and {constants['plain']:.3g} without correction; use 'auto', or a larger budget")
