"""Numbers of the companion derivation: worked cases in closed form, and the data sets that scikit-learn ships."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.hypergradient.bilevel import Bilevel
from theorylab.hypergradient.claims._programs import DERIVED, estimates
from theorylab.hypergradient.claims.family import WAYS, Parts, values
from theorylab.hypergradient.estimators import compiled
from theorylab.hypergradient.inner import reference
from theorylab.hypergradient.selection import LogisticSelection, RidgeSelection, SoftmaxSelection
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check

Array = jax.Array
ROUND = 6e-13                           # half a unit of the last printed digit, and some


def _cosh(x, y):
    return jnp.cosh(x) - y * x


def _first(x, y):
    return x


@claim("hypergradient.worked-cases", source=DERIVED,
       statement=r"Worked cases to 12 digits: $E = \cosh x - yx$, $G = x$ at $y = 1$; a ridge problem in the plane; logistic regression with one "
                 r"feature.",
       fast={"tol": ROUND})
def _(check: Check, tol: float) -> None:
    problem, y = Bilevel(_cosh, _first, x=0.0, y=0.0), jnp.array([1.0])
    x = np.asarray(reference(problem, 1.0)).reshape(1)
    check.equal("cosh: solution", x, 0.881373587020, tol)
    names = ("Plain", "NewtonPoint", "OnePoint")
    found = estimates({name: WAYS[name] for name in names}, problem, x + _around(1)[:, :1], y)
    for name, value in zip(names, (0.657264595340, 0.705304443578, 0.705014394652), strict=True):
        check.equal(f"cosh: {name} at the solution + 0.1", found[name].value[0], value, tol)
    check.equal("cosh: Omega_1 by finite differences", (found["Plain"].value[1] - found["Plain"].value[2]) / 2e-4, -0.5, 1e-8)
    for name in names[1:]:
        check.equal(f"cosh: (value - gradient) / t^2 of {name}, t = 0.0001", (found[name].value[1] - 0.5**0.5) / 1e-8, -0.176776695297, 2e-4)

    A, b = [[1.0, 2.0], [0.0, 1.0], [1.0, -1.0]], [1.0, 0.0, 2.0]
    plane, x, y = _padded(RidgeSelection, A, b, np.eye(2), np.ones(2), np.array([0.0, np.log(2.0)]))
    check.equal("plane: solution", x[:2], np.array([0.885245901639, -0.098360655738]), tol)
    parts = Parts(plane, x, y)
    check.equal("plane: outer value", float(plane.outer(jnp.asarray(x), y)), 0.609782316582, tol)
    jacobians = {name: jacobian[:2, :2] for name, jacobian in parts.jacobians().items()}
    found = {name: each.value[:, :2] for name, each in values(plane, x + _around(2), y).items()}
    for name, value, constant in (
        ("Plain", (-0.044363867460, -0.017383712734), 0.424991959235), ("Precond", (0.002222513935, -0.040423200469), 0.113090415092),
        ("PzPhi", (-0.039217785378, -0.039350701894), 0.398033054292), ("ExpPhi", (0.155922189129, 0.057647799684), 0.628610736630),
        ("OptPhi", (-0.039861045638, -0.035356703865), 0.394469130546)):
        check.equal(f"plane: {name} at the solution + (0.1, 0.05)", found[name][0], np.array(value), tol)
        check.equal(f"plane: constant of {name}", np.linalg.norm(jacobians[name], 2), constant, tol)
    check.equal("plane: NewtonPoint, exact", found["NewtonPoint"], np.tile([-0.002854864504, -0.036082315260], (4, 1)), tol)
    L12, L22 = -np.diag(parts.D * parts.v), -np.diag(parts.D * parts.x * parts.v)
    hessian = L22 + L12 @ parts.J + (L12 @ parts.J).T + parts.J.T @ (parts.G11 - parts.W) @ parts.J
    check.equal("plane: Hessian of L", hessian[:2, :2], np.array([[0.155098704369, 0.021267180520], [0.021267180520, -0.009998525911]]), tol)

    one, x, y = _padded(LogisticSelection, [[1.0], [-2.0], [0.5]], [1.0, 1.0, -1.0], np.ones((1, 1)), np.ones(1), np.zeros(1))
    check.equal("one feature: solution", x[0], -0.174344862163, tol)
    found = {name: each.value[:, 0] for name, each in values(one, x + _around(1), y).items()}
    for name, value in (("Plain", -0.026856463117), ("NewtonPoint", -0.066295029178), ("OnePoint", -0.064273395493), ("Precond", -0.066295029178),
                        ("PzPhi", -0.062885921985), ("ExpPhi", 0.078629668066)):
        check.equal(f"one feature: {name} at the solution + 0.1", found[name][0], value, tol)
    check.equal("one feature: Omega_1", Parts(one, x, y).jacobians()["Plain"][0, 0], 0.416745118368, tol)
    for name, constant in (("NewtonPoint", 0.017419035121), ("OnePoint", 0.239525197306)):
        check.equal(f"one feature: (value - gradient) / t^2 of {name}, t = 0.0001", (found[name][1] + 0.066404275074) / 1e-8, constant, 2e-4)


def _padded(kind: Any, A: Any, b: Any, A_out: Any, b_out: Any, y: np.ndarray) -> tuple[Any, np.ndarray, Array]:
    """A small problem with its solution and y, each sample three times and with unknowns that do nothing: it shares programs with other claims.

    Their x is 1, where no estimator mixes them with the others; the shift of y makes up for the division by their number.
    """
    n = len(y)
    rows, targets = np.zeros((9, 4)), np.repeat(b, 3)
    rows[:, :n] = np.repeat(A, 3, axis=0)
    out, aims = np.zeros((4, 4)), np.zeros(4)
    if kind is RidgeSelection:
        out[:n, :n], aims[:n] = A_out, b_out
    else:
        out[:, :n], aims = np.repeat(A_out, 4, axis=0), np.repeat(b_out, 4)
    objective = "quadratic" if kind is RidgeSelection else "validation"
    problem = kind((jnp.asarray(rows), jnp.asarray(targets)), (jnp.asarray(out), jnp.asarray(aims)), objective)
    whole = jnp.asarray(np.concatenate([y, np.zeros(4 - n)]) + np.log(4 / n))
    x = np.array(reference(problem, whole))
    x[n:] = 1.0
    return problem, x, whole


def _around(n: int) -> np.ndarray:
    """Displacements: that of the reference values, short ones, and none."""
    moves = np.zeros((4, 4))
    moves[0, :n], moves[1, :n], moves[2, :n] = 0.1 / np.arange(1, n + 1), 1e-4, -1e-4
    return moves


def _summary(problem: Any, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Outer value, inner Hessian and plain formula."""
    return problem.outer(x, y), problem.at(x, y).matrix(), WAYS["Plain"].estimate(problem, x, y).value


def _with_slopes(problem: Any, names: tuple[str, ...], x: Array, y: Array) -> Any:
    """Value and x-Jacobian of each estimator."""
    values = {name: lambda x, how=WAYS[name]: how.estimate(problem, x, y).value for name in names}
    jacobian = jax.jacrev if y.shape[0] < x.shape[0] else jax.jacfwd
    return {name: (value(x), jacobian(value)(x)) for name, value in values.items()}


# (N, N_v, p, q), condition number, L, |x*|, |gradient|, C, constants of Precond, PzPhi and ExpPhi, |I - P^-1 F_1|, first and last component
TABLE: dict[str, tuple] = {
    "diabetes": ((221, 221, 10, 1), 56.7232, 0.220416932134, 0.467903037942, 0.00388225190081, 0.0399019, 0.064103721, 0.035337023, 0.153271,
                 2.82996, (-1.578414592e-05, 8.566552373e-05)),
    "breast_cancer": ((285, 284, 30, 1), 23.5585, 0.125350219486, 2.21167726347, 0.00852848097622, 0.017821631, 0.037178145, 0.023946664, 0.102361,
                      3.90909, (-1.280666696e-04, 8.622757815e-04)),
    "wine": ((89, 89, 13, 3), 20.0928, 0.19248435803, 1.98229632576, 0.0378823703918, 0.071490217, 0.094188374, 0.078007672, 0.169669, 2.59513,
             (0.01372861978, 0.025430611)),
    "iris": ((75, 75, 4, 3), 8.90807, 0.530548662448, 1.22206635191, 0.0608980729113, 0.076958964, 0.030388958, 0.078374817, 0.0805443, 1.37232,
             (0.005627210008, 0.04854218981)),
    "linnerud": ((10, 10, 3, 3), 2.61189, 2.8877352148, 0.661248654994, 0.156750867709, 0.83343634, 0.43422183, 0.45923722, 0.797086, 0.624382,
                 (-0.005834519969, -0.08660873279)),
    "digits": ((899, 898, 64, 10), 68.3551, 0.259283332992, 5.02528793835, 0.019805530693, 0.11716965, 0.074365021, 0.056222873, np.nan, 8.28874,
               (0.0, -2.462598744e-04)),
}


@cache
def shipped(name: str) -> tuple[Any, Array, tuple]:
    """A data set of scikit-learn as a selection problem with its y and its row of the table: even rows train, odd rows validate, y_j = sin(j)."""
    from sklearn import datasets

    X, t = getattr(datasets, f"load_{name}")(return_X_y=True)
    regression = name in ("diabetes", "linnerud")
    (A, A_out), b, b_out = _standardized(X[::2], X[1::2]), t[::2], t[1::2]
    if regression:
        b, b_out = _standardized(b, b_out)
    elif name == "breast_cancer":
        b, b_out = 2.0 * b - 1, 2.0 * b_out - 1
    kind = RidgeSelection if regression else LogisticSelection if name == "breast_cancer" else SoftmaxSelection
    return kind((A, b), (A_out, b_out)), jnp.sin(jnp.arange(1, A.shape[1] + 1, dtype=float)), TABLE[name]


def _standardized(train: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population spread of the training rows; a constant column keeps the scale 1."""
    scale = train.std(0)
    return (train - train.mean(0)) / np.where(scale == 0, 1, scale), (other - train.mean(0)) / np.where(scale == 0, 1, scale)


@claim("hypergradient.reference-data", source=f"{DERIVED}; data shipped with scikit-learn",
       statement=r"Selection of regularization on six data sets: condition number, L, $\lVert x^*\rVert$, $\nabla L$ and the constants of the plain "
                 r"formula, of the diagonal preconditioner and of the linear and exponential maps.",
       fast={"names": ("breast_cancer",), "library": False}, full={"names": tuple(TABLE), "library": True})
def _(check: Check, names: tuple[str, ...], library: bool) -> None:
    for name in names:
        problem, y, row = shipped(name)
        shape, condition, L, size, length, C, precond, linear, exponential, jacobi, ends = row
        p, q = problem.shape if len(problem.shape) == 2 else (*problem.shape, 1)
        check.true(f"{name}: shapes", (*problem.samples, p, q) == shape)
        x = np.asarray(reference(problem, y)).reshape(-1)
        outer, H, value = map(np.asarray, compiled(_summary, problem, jnp.asarray(x), y))
        check.equal(f"{name}: condition number", np.linalg.cond(H), condition, 1e-5, relative=True)
        check.equal(f"{name}: |I - P^-1 F_1|", np.linalg.norm(np.eye(len(H)) - H / np.diag(H)[:, None], 2), jacobi, 1e-5, relative=True)
        check.equal(f"{name}: L", outer, L, 1e-11, relative=True)
        check.equal(f"{name}: |x*|", np.linalg.norm(x), size, 1e-11, relative=True)
        ways = ("Plain", "Precond", "PzPhi") if np.isnan(exponential) else ("Plain", "Precond", "PzPhi", "ExpPhi")
        if library:
            found = compiled(_with_slopes, problem, ways, jnp.asarray(x), y)
            jacobians = {way: found[way][1] for way in ways}
            check.below(f"{name}: gradients by the others less that by Plain", np.abs([found[way][0] - value for way in ways]), 1e-9 * length)
        else:
            jacobians = Parts(problem, x, y).jacobians()
        check.equal(f"{name}: |gradient|", np.linalg.norm(value), length, 1e-9, relative=True)
        check.equal(f"{name}: its first and last component", value[[0, -1]], np.array(ends), 1e-9 * length + 1e-14)
        constants = np.array([np.linalg.norm(jacobians[way], 2) for way in ways])
        known = np.array([C, precond, linear, exponential])[: len(ways)]
        check.equal(f"{name}: constants of {', '.join(ways)}", constants, known, 5e-6, relative=True)
