"""The problems that the tests of this family share, with the reference numbers of the companion derivation."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab import hypergradient as hg

Array = jax.Array


class Case(NamedTuple):
    """A problem at a hyper-parameter y, a unit direction d in x, and what is known there (names of the specification)."""

    problem: Any
    y: Array
    d: Array
    known: dict[str, Any]


def _generic_energy(x, y, A, b, W, Q, c, Bq, linear):
    scale = jnp.exp(0.3 * (W @ y))
    return (jnp.sum(jax.nn.softplus(A @ x - b * (1 + 0.1 * jnp.sum(y)))) + jnp.sum(scale * x**2) / 2 + 0.05 * jnp.sum(x**4)
            + 0.1 * jnp.sum(jnp.sin(x) * jnp.cos(W @ y)))


def _generic_outer(x, y, A, b, W, Q, c, Bq, linear):
    return jnp.sum((Q @ x - c) ** 2) / 2 + y @ jnp.sin(Bq @ x) + 0.3 * y @ y + jnp.sum(jnp.cosh(0.3 * x))


def _affine_outer(x, y, A, b, W, Q, c, Bq, linear):
    return linear @ x + jnp.sum(jnp.cos(y))


def _generic_residual(x, y, A, b, W, Q, c, Bq, linear):
    """A root that is no gradient: the generic energy plus a rotation that depends on y."""
    skew = jnp.tanh(Q - Q.T)
    return jax.grad(_generic_energy)(x, y, A, b, W, Q, c, Bq, linear) + (1 + 0.2 * y[0]) * (skew @ x) + 0.1 * jnp.roll(x, 1) * x


class _Draw(NamedTuple):
    args: tuple
    y: np.ndarray
    d: np.ndarray
    rho: np.ndarray


@cache
def draw() -> _Draw:
    """The arrays of the generic problem, in the draw order of the specification."""
    rng = np.random.default_rng(0)
    A, b, W, Q, c, Bq = (rng.standard_normal(shape) for shape in ((9, 4), 9, (4, 3), (4, 4), 4, (3, 4)))
    y, d, linear, rho = rng.standard_normal(3), rng.standard_normal(4), rng.standard_normal(4), rng.standard_normal(4)
    return _Draw((A, b, W, Q, c, Bq, linear), y, d / np.linalg.norm(d), rho / np.linalg.norm(rho))


def _case(known: dict[str, Any], dtype: Any = float, **functions: Any) -> Case:
    given = draw()
    args = tuple(jnp.asarray(a, dtype) for a in given.args)
    y, d = jnp.asarray(given.y, dtype), jnp.asarray(given.d, dtype)
    return Case(hg.Bilevel(args=args, x=jnp.zeros(4, dtype), y=y, **functions), y, d, known)


GENERIC = {"x": (0.384749771213, 0.060224964623, -0.221445912118, -0.811741096012), "L": 10.278912551589,
           "gradient": (1.188568274063, -0.057092888186, 0.443384580765), "C": 4.928050347235, "turned": 1.393603662841,
           "jacobi": 0.406974453496}


def generic(dtype: Any = float) -> Case:
    """The generic problem of section 3: n = 4, m = 3, nothing special."""
    return _case(GENERIC, dtype, inner=_generic_energy, outer=_generic_outer)


def affine() -> Case:
    """The generic inner problem with an affine outer objective."""
    return _case({"x": GENERIC["x"]}, inner=_generic_energy, outer=_affine_outer)


def root() -> Case:
    """A root problem with a Jacobian that is not symmetric, and the generic outer objective."""
    return _case({}, residual=_generic_residual, outer=_generic_outer)


def declared_root() -> Case:
    """The generic problem given by its gradient alone, declared symmetric."""
    return _case(GENERIC, residual=jax.grad(_generic_energy), outer=_generic_outer, symmetric=True)


def _cosh_energy(x, y):
    return jnp.cosh(x) - y * x


def _x(x, y):
    return x


def p1() -> Case:
    """P1: E = cosh x - y x, G = x, at y = 1."""
    known = {"x": 0.881373587020, "gradient": 2**-0.5, "C": 0.5, "newton": -0.176776695297, "one_point": -0.176776695297,
             "at": 0.1, "Plain": 0.657264595340, "NewtonPoint": 0.705304443578, "OnePoint": 0.705014394652}
    return Case(hg.Bilevel(_cosh_energy, _x, x=0.0, y=1.0), jnp.array([1.0]), jnp.array([1.0]), known)


def p3() -> Case:
    """P3: a ridge problem in the plane with the outer objective |x - (1, 1)|^2 / 2."""
    known = {"x": (0.885245901639, -0.098360655738), "gradient": (-0.002854864504, -0.036082315260), "L": 0.609782316582,
             "hessian": ((0.155098704369, 0.021267180520), (0.021267180520, -0.009998525911)),
             "C": {"Plain": 0.424991959235, "Preconditioned": 0.113090415092, "linear": 0.398033054292, "exponential": 0.628610736630,
                   "hessian": 0.394469130546},
             "at": (0.1, 0.05), "Plain": (-0.044363867460, -0.017383712734), "Preconditioned": (0.002222513935, -0.040423200469),
             "linear": (-0.039217785378, -0.039350701894), "exponential": (0.155922189129, 0.057647799684),
             "hessian_estimate": (-0.039861045638, -0.035356703865)}
    train = (jnp.array([[1.0, 2.0], [0.0, 1.0], [1.0, -1.0]]), jnp.array([1.0, 0.0, 2.0]))
    problem = hg.RidgeSelection(train, (jnp.eye(2), jnp.ones(2)), objective="quadratic")
    return Case(problem, jnp.array([0.0, np.log(2.0)]), jnp.array([1.0, 0.5]) / np.sqrt(1.25), known)


def p4() -> Case:
    """P4: logistic regression with one feature, the outer objective softplus(-x), at y = 0."""
    known = {"x": -0.174344862163, "gradient": -0.066404275074, "C": 0.416745118368, "newton": 0.017419035121, "one_point": 0.239525197306,
             "at": 0.1, "Plain": -0.026856463117, "NewtonPoint": -0.066295029178, "Preconditioned": -0.066295029178,
             "linear": -0.062885921985, "exponential": 0.078629668066, "OnePoint": -0.064273395493}
    train = (jnp.array([[1.0], [-2.0], [0.5]]), jnp.array([1.0, 1.0, -1.0]))
    problem = hg.LogisticSelection(train, (jnp.ones((1, 1)), jnp.ones(1)))
    return Case(problem, jnp.zeros(1), jnp.ones(1), known)


# (N, N_v, p, q), condition number, L, |x*|, |gradient|, C, constants of Precond, PzPhi and ExpPhi, |I - P^-1 F_1|, first and last component
_TABLE = {
    "diabetes": ((221, 221, 10, 1), 56.7232, 0.220416932134, 0.467903037942, 0.00388225190081, 0.0399019, 0.064103721, 0.035337023, 0.153271,
                 2.82996, (-1.578414592e-05, 8.566552373e-05)),
    "breast_cancer": ((285, 284, 30, 1), 23.5585, 0.125350219486, 2.21167726347, 0.00852848097622, 0.017821631, 0.037178145, 0.023946664,
                      0.102361, 3.90909, (-1.280666696e-04, 8.622757815e-04)),
    "wine": ((89, 89, 13, 3), 20.0928, 0.19248435803, 1.98229632576, 0.0378823703918, 0.071490217, 0.094188374, 0.078007672, 0.169669, 2.59513,
             (0.01372861978, 0.025430611)),
    "iris": ((75, 75, 4, 3), 8.90807, 0.530548662448, 1.22206635191, 0.0608980729113, 0.076958964, 0.030388958, 0.078374817, 0.0805443, 1.37232,
             (0.005627210008, 0.04854218981)),
    "linnerud": ((10, 10, 3, 3), 2.61189, 2.8877352148, 0.661248654994, 0.156750867709, 0.83343634, 0.43422183, 0.45923722, 0.797086, 0.624382,
                 (-0.005834519969, -0.08660873279)),
    "digits": ((899, 898, 64, 10), 68.3551, 0.259283332992, 5.02528793835, 0.019805530693, 0.11716965, 0.074365021, 0.056222873, np.nan, 8.28874,
               (0.0, -2.462598744e-04)),
}
_FIELDS = ("shape", "condition", "L", "x_norm", "gradient_norm", "C", "C_precond", "C_linear", "C_exponential", "jacobi", "ends")


@cache
def data(name: str) -> Case:
    """One row of the table of section 3.2: scikit-learn data, even rows train, odd rows validate, y_j = sin(j); d is random."""
    from sklearn import datasets

    X, t = getattr(datasets, f"load_{name}")(return_X_y=True)
    regression = name in ("diabetes", "linnerud")
    (A, A_out), b, b_out = _standardized(X[::2], X[1::2]), t[::2], t[1::2]
    if regression:
        b, b_out = _standardized(b, b_out)
    elif name == "breast_cancer":
        b, b_out = 2.0 * b - 1, 2.0 * b_out - 1
    kind = hg.RidgeSelection if regression else hg.LogisticSelection if name == "breast_cancer" else hg.SoftmaxSelection
    problem = kind((A, b), (A_out, b_out))
    d = np.random.default_rng(1).standard_normal(problem.n)
    return Case(problem, jnp.sin(jnp.arange(1, A.shape[1] + 1, dtype=float)), jnp.asarray(d / np.linalg.norm(d)),
                dict(zip(_FIELDS, _TABLE[name], strict=True)))


def _standardized(train: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, scale = train.mean(0), train.std(0)
    scale = np.where(scale == 0, 1, scale)
    return (train - mean) / scale, (other - mean) / scale


@jax.jit
def _residual(problem: Any, x: Array, y: Array) -> Array:
    return problem.residual(x, y)


@jax.jit
def _jacobian(problem: Any, x: Array, y: Array) -> Array:
    return jax.jacfwd(problem.residual)(x, y)


def solved(problem: Any, y: Array, steps: int = 40) -> Array:
    """x*(y) to round-off by Newton's method in NumPy on the derivatives of autodiff: independent of the inner methods."""
    F, jacobian = partial(_residual, problem), partial(_jacobian, problem)
    x = np.asarray(problem.start_x(y))
    for _ in range(steps):
        f = np.asarray(F(x, y))
        step, t = np.linalg.solve(np.asarray(jacobian(x, y)), f), 1.0
        while np.linalg.norm(F(x - t * step, y)) > np.linalg.norm(f) and t > 1e-3:
            t /= 2
        x = x - t * step
        if t == 1 and np.linalg.norm(step) <= 1e-15 * max(1.0, np.linalg.norm(x)):
            break
    return jnp.asarray(x)
