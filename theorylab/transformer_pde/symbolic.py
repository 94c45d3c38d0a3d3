r"""The velocities of attention on Gaussians derived by computer algebra from the definition, and compared with the numeric code.

A derivation ends in a remainder that SymPy reduces to zero and in an expression that is evaluated with 30 digits at random dyadic numbers and
compared with the compiled kernel. `symbolic_forms` holds those of the closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.keys import Key, as_key, stream
from theorylab.errors import UnknownNameError
from theorylab.transformer_pde.attention import L2, Linear, Softmax
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian

DIGITS = 30
GRID = 2**20


class Derivation(NamedTuple):
    """A statement, how it follows, and two checks of it: by algebra and against the code.

    Attributes:
        name: in kebab-case.
        statement: the result, as LaTeX.
        steps: the way there, LaTeX formulas.
        residual: SymPy column of what must vanish; each entry is reduced to zero.
        kernel: the code that `compare` calls.
        compare: a function of a key or seed; the largest difference between expression and kernel at random dyadic inputs, relative to the
            size of the value where that is above one.
    """

    name: str
    statement: str
    steps: tuple[str, ...]
    residual: Any
    kernel: str
    compare: Callable[..., float]


def derivations(*names: str) -> tuple[Derivation, ...]:
    r"""The derivations of these names, or all: velocities, moment equations, closed forms and blow-up, each from its definition.

    Raises:
        UnknownNameError: there is none of that name.

    Example:
        >>> [one] = derivations("linear")
        >>> one.residual.is_zero_matrix, one.compare(0) < 1e-13
        (True, True)
    """
    makers = _makers()
    for name in names:
        if name not in makers:
            raise UnknownNameError.of("derivation", name, makers)
    return tuple(makers[name]() for name in names or makers)


def _makers() -> dict[str, Callable[[], Derivation]]:
    from theorylab.transformer_pde import symbolic_forms

    return {make.__name__.replace("_", "-"): make for make in (softmax, l2, linear, sinkhorn, moment_equations, *symbolic_forms.FORMS)}


# --------------------------------------------------------------------------------------------------------------- symbols and numbers


def matrix(name: str, symmetric: bool = False) -> Any:
    """A 2 x 2 matrix of real symbols."""
    import sympy as sp

    a, b, c, d = sp.symbols(" ".join(f"{name}_{i}{j}" for i in "12" for j in "12"), real=True)
    return sp.Matrix([[a, b], [b if symmetric else c, d]])


def vector(name: str) -> Any:
    """Two real symbols in a column."""
    import sympy as sp

    return sp.Matrix(sp.symbols(f"{name}_1 {name}_2", real=True))


def turn_rows(h: Any) -> list[list[Any]]:
    """The rotation by twice the arctangent of `h`, times $1 + h^2$: rational in a symbol or a number."""
    return [[1 - h**2, -2 * h], [2 * h, 1 - h**2]]


def remainder(*parts: Any) -> Any:
    """All entries of numbers and matrices in one column, expanded."""
    import sympy as sp

    flat = [entry for part in parts for entry in (part.flat() if isinstance(part, sp.MatrixBase) else [part])]
    return sp.Matrix([sp.expand(entry) for entry in flat])


def velocity_of(field: Any, x: Any, mean: Any) -> Any:
    r"""The 2 x 3 table $(B \,|\, m)$ of an affine field: its Jacobian and its value at the mean."""
    import sympy as sp

    return sp.Matrix.hstack(field.jacobian(x), field.subs(dict(zip(x, mean, strict=True))))


class Draw:
    """Random dyadic numbers, which binary floating point holds exactly."""

    def __init__(self, key: Key | int, name: str):
        self._pool = iter(np.asarray(jax.random.randint(stream(as_key(key), f"symbolic.{name}"), (64,), -GRID, GRID + 1)).tolist())

    def array(self, *shape: int) -> np.ndarray:
        """Numbers between -1 and 1."""
        return np.array([next(self._pool) / GRID for _ in range(int(np.prod(shape)))]).reshape(shape)

    def number(self) -> np.ndarray:
        """A number between -1 and 1."""
        return self.array(1).reshape(())

    def positive(self) -> np.ndarray:
        """A number between 1/8 and 9/8."""
        return (np.abs(self.array(1)) + 0.125).reshape(())

    def definite(self) -> np.ndarray:
        """A positive definite 2 x 2 matrix."""
        root = self.array(2, 2)
        return root @ root.T + np.eye(2) / 4


def comparison(name: str, symbols: Sequence[Any], expression: Any, draw: Callable[[Draw], Sequence[Any]], kernel: Callable[..., Any]) -> Callable:
    """The function that evaluates `expression` in its symbols, and `kernel`, at what `draw` gives, and returns the largest difference."""

    def compare(key: Key | int = 0, samples: int = 3) -> float:
        import mpmath
        import sympy as sp

        groups = [group.flat() if isinstance(group, sp.MatrixBase) else group for group in symbols]
        exact = sp.lambdify(groups, sp.Matrix(expression), "mpmath")
        worst = 0.0
        for sample in range(samples):
            values = [np.asarray(v, float) for v in draw(Draw(key, f"{name}.{sample}"))]
            with mpmath.workdps(DIGITS):
                found = exact(*([mpmath.mpf(x) for x in v.ravel().tolist()] if v.ndim else mpmath.mpf(float(v)) for v in values))
                want = np.array([complex(x).real for x in found]).reshape(found.rows, found.cols)
            got = np.asarray(kernel(*map(jnp.asarray, values))).reshape(want.shape)
            worst = max(worst, float(np.abs(got - want).max() / max(1.0, np.abs(want).max())))
        return worst

    return compare


def table(velocity: Any) -> np.ndarray:
    r"""$(B \,|\, m)$ of a `Velocity`."""
    return np.concatenate([np.asarray(velocity.matrix), np.asarray(velocity.mean)[:, None]], axis=1)


# ---------------------------------------------------------------------------------------------------------------------- the velocities


def softmax() -> Derivation:
    """Softmax attention: tilt a Gaussian by an exponential and complete the square."""
    import sympy as sp

    a, alpha, u, z = sp.symbols("a alpha x y", real=True)
    s = sp.symbols("sigma", positive=True)
    weight = sp.exp(a * u * z - (z - alpha) ** 2 / (2 * s))
    ratio = sp.integrate(z * weight, (z, -sp.oo, sp.oo)) / sp.integrate(weight, (z, -sp.oo, sp.oo))
    line = sp.simplify(ratio - (alpha + s * a * u))

    A, S, V, mean, x, y = matrix("a"), matrix("s", True), matrix("v"), vector("m"), vector("x"), vector("y")
    tilted, adjoint, det = mean + S * A * x, S.adjugate(), S.det()
    level = (mean.dot(A * x) + (A * x).dot(S * A * x) / 2) * det
    square = det * (A * x).dot(y) - (y - mean).dot(adjoint * (y - mean)) / 2 - (level - (y - tilted).dot(adjoint * (y - tilted)) / 2)
    found = velocity_of(V * tilted, x, mean)
    return Derivation(
        "softmax",
        r"\Gamma(x) = m + B(x - \alpha), \qquad m = V(\alpha + \Sigma A \alpha), \qquad B = V \Sigma A",
        (r"\Gamma_\mu(x) = \frac{\int e^{(Ax)\cdot y}\, V y\, d\mu(y)}{\int e^{(Ax)\cdot y}\, d\mu(y)}, \qquad \mu = \mathcal N(\alpha, \Sigma)",
         (r"(Ax)\cdot y - \tfrac12 (y-\alpha)^\top \Sigma^{-1} (y-\alpha) = -\tfrac12 (y-\beta)^\top \Sigma^{-1}(y-\beta)"
          r" + \alpha\cdot Ax + \tfrac12 (Ax)^\top \Sigma A x, \qquad \beta = \alpha + \Sigma A x"),
         r"\text{so } y \text{ has the law } \mathcal N(\beta, \Sigma) \text{ under the weights, and } \Gamma(x) = V\beta",
         r"d = 1,\ \text{by integration: } \frac{\int e^{axy} y\, d\mu}{\int e^{axy}\, d\mu} = " + sp.latex(sp.expand(sp.simplify(ratio)))),
        remainder(line, square), "Softmax.velocity",
        comparison("softmax", [A, S, V, mean], found, lambda d: [d.array(2, 2), d.definite(), d.array(2, 2), d.array(2)],
                   lambda A, S, V, m: table(Softmax.bilinear(A, V).velocity(m, S))))


def l2() -> Derivation:
    r"""L2 attention: the tilt changes the precision too."""
    import sympy as sp

    Q, K, S, V, mean, x, y = matrix("q"), matrix("k"), matrix("s", True), matrix("v"), vector("m"), vector("x"), vector("y")
    c = sp.symbols("c", positive=True)
    A, P = c * K.T * Q, c * K.T * K
    logit = -c * (Q * x - K * y).dot(Q * x - K * y)
    gradient = sp.Matrix([sp.diff(logit, entry) for entry in y])
    bend = gradient.jacobian(y) + 2 * P
    J = sp.eye(2) + 2 * S * P
    # S times the gradient of the log density is linear in y: S (2 A x - 2 P y) - (y - mean), and J y = mean + 2 S A x is its zero
    zero = S * gradient - (y - mean) - (mean + 2 * S * A * x - J * y)
    inverse = J.adjugate() / J.det()
    found = velocity_of(V * inverse * (mean + 2 * S * A * x), x, mean)
    return Derivation(
        "l2",
        r"m = V (I + 2\Sigma P)^{-1}(\alpha + 2\Sigma A\alpha), \qquad B = 2 V (I + 2\Sigma P)^{-1} \Sigma A, \qquad A = cK^\top Q,\ P = cK^\top K",
        (r"\log w(y) = -c\,|Qx - Ky|^2 - \tfrac12 (y-\alpha)^\top\Sigma^{-1}(y-\alpha)",
         r"-\nabla_y^2 \log w = \Sigma^{-1} + 2P: \text{ a Gaussian with its mean } \beta \text{ where the gradient vanishes}",
         r"\Sigma\nabla_y \log w = \alpha + 2\Sigma Ax - (I + 2\Sigma P)\, y \quad\Rightarrow\quad \beta = (I + 2\Sigma P)^{-1}(\alpha + 2\Sigma Ax)",
         r"\Gamma(x) = V\beta; \text{ nothing is inverted but } I + 2\Sigma P, \text{ so } \Sigma \text{ may be singular}"),
        remainder(bend, zero), "L2.velocity",
        comparison("l2", [Q, K, c, S, V, mean], found,
                   lambda d: [d.array(2, 2), d.array(2, 2), d.positive(), d.definite(), d.array(2, 2), d.array(2)],
                   lambda Q, K, c, S, V, m: table(L2(Q, K, V, float(c)).velocity(m, S))))


def linear() -> Derivation:
    """Linear attention: second moments from the moment generating function."""
    import sympy as sp

    A, S, V, mean, x, u = matrix("a"), matrix("s", True), matrix("v"), vector("m"), vector("x"), vector("u")
    generating = sp.exp(u.dot(mean) + u.dot(S * u) / 2)
    second = sp.hessian(generating, list(u)).subs(dict.fromkeys(u, 0))
    return Derivation(
        "linear",
        r"m = V(\Sigma + \alpha\alpha^\top) A \alpha, \qquad B = V(\Sigma + \alpha\alpha^\top) A",
        (r"\Gamma_\mu(x) = \int \big((Ax)\cdot y\big)\, V y\, d\mu(y) = V\, E[y y^\top]\, A x \quad\text{for any measure}",
         (r"E\, e^{u\cdot y} = e^{u\cdot\alpha + \frac12 u^\top\Sigma u}, \qquad "
          r"E[yy^\top] = \nabla_u^2\, E\, e^{u\cdot y}\big|_{u=0} = \Sigma + \alpha\alpha^\top")),
        remainder(second - (S + mean * mean.T)), "Linear.velocity",
        comparison("linear", [A, S, V, mean], velocity_of(V * second * A * x, x, mean),
                   lambda d: [d.array(2, 2), d.definite(), d.array(2, 2), d.array(2)],
                   lambda A, S, V, m: table(Linear(A, np.eye(2), V).velocity(m, S))))


def sinkhorn() -> Derivation:
    """Sinkhorn attention: the optimal plan is a Gaussian with prescribed marginals and a prescribed cross precision."""
    import sympy as sp

    # d = 1: a plan of density exp(-p x^2/2 - p y^2/2 + a x y/eps) has the covariance below; its variance sigma eliminates p
    p, a, eps = sp.symbols("p a varepsilon", positive=True)
    s, cross = sp.Matrix([[p, -a / eps], [-a / eps, p]]).inv().row(0).flat()
    scalar = sp.cancel(cross / s - (a / eps) * (s - cross**2 / s))
    n, tau = sp.symbols("n tau", positive=True)
    root = 2 * n / (1 + sp.sqrt(1 + 4 * n**2))
    solved = [sp.simplify(r - root) for r in sp.solve(tau - n * (1 - tau**2), tau) if r.subs(n, 1) > 0]

    # any d: in coordinates of a factor L the optimality condition is L^-T (T - N (I - T' T)) L'
    L, N, T = matrix("l"), matrix("n"), matrix("t")
    L[0, 1] = 0
    inverse = L.inv()
    S, C, M = L * L.T, L * T * L.T, inverse.T * N * inverse                                       # M / eps
    condition = inverse.T * inverse * C - M * (S - C.T * inverse.T * inverse * C)
    reduced = (condition - inverse.T * (T - N * (sp.eye(2) - T.T * T)) * L.T).applyfunc(sp.cancel)

    # singular coordinates: N = U diag(n) W', n = tau / (1 - tau^2), with rational rotations
    half, other, one, two = sp.symbols("h k tau_1 tau_2", real=True)
    left, right = (sp.Matrix(turn_rows(h)) / (1 + h**2) for h in (half, other))
    values = sp.diag(one, two)
    form = left * sp.diag(one / (1 - one**2), two / (1 - two**2)) * right.T
    contraction = left * values * right.T
    diagonal = (contraction - form * (sp.eye(2) - right * values**2 * right.T)).applyfunc(sp.cancel)

    V, mean = matrix("v"), vector("m")
    B = V * L * contraction.T * inverse / eps
    found = sp.Matrix.hstack(B, V * mean / eps)

    def kernel(L: Any, V: Any, mean: Any, angles: Any, values: Any, eps: Any) -> np.ndarray:
        L = jnp.array([[L[0], 0.0], [L[1], L[2]]])
        left, right = (jnp.array(turn_rows(h)) / (1 + h**2) for h in angles)
        inverse = jnp.linalg.inv(L)
        bilinear = eps * inverse.T @ left @ jnp.diag(values / (1 - values**2)) @ right.T @ inverse
        return table(Sinkhorn(bilinear.T, np.eye(2), V, temperature=float(eps)).velocity(mean, L @ L.T))

    return Derivation(
        "sinkhorn",
        r"m = \tfrac1\varepsilon V\alpha, \qquad B = \tfrac1\varepsilon V C^\top \Sigma^{-1}, \qquad "
        r"\Sigma^{-1} C = \tfrac1\varepsilon A^\top\big(\Sigma - C^\top\Sigma^{-1}C\big)",
        ((r"\kappa(x, y) = e^{f(x) + x^\top A^\top y/\varepsilon + g(y)} \text{ with quadratic } f, g: \text{ the plan } \pi = \kappa\,\mu\otimes\mu"
          r"\text{ is Gaussian with cross precision } -A^\top/\varepsilon"),
         (r"\begin{pmatrix}\Sigma & C\\ C^\top & \Sigma\end{pmatrix}^{-1}_{12} = -\Sigma^{-1} C\,(\Sigma - C^\top\Sigma^{-1}C)^{-1}, \qquad "
          r"\Gamma(x) = \tfrac1\varepsilon V E_\pi[y\,|\,x] = \tfrac1\varepsilon V\big(\alpha + C^\top\Sigma^{-1}(x - \alpha)\big)"),
         (r"d = 1:\quad \frac{C}{\sigma} = \tau, \quad n = \frac{a\sigma}{\varepsilon}, \quad \tau = n(1-\tau^2) \;\Rightarrow\; \tau = "
          + sp.latex(root)),
         r"\Sigma = LL^\top,\ C = LTL^\top,\ N = L^\top A^\top L/\varepsilon:\quad T = N(I - T^\top T)",
         r"N = U\,\mathrm{diag}(n_i)\,W^\top \;\Rightarrow\; T = U\,\mathrm{diag}(\tau_i)\,W^\top, \quad \tau_i = n_i(1 - \tau_i^2)"),
        remainder(scalar, *solved, reduced, diagonal), "Sinkhorn.velocity",
        comparison("sinkhorn", [[L[0, 0], L[1, 0], L[1, 1]], V, mean, [half, other], [one, two], eps], found,
                   lambda d: [np.array([1.0, 0.0, 1.0]) + d.array(3) / 2, d.array(2, 2), d.array(2), d.array(2),
                              0.75 * np.abs(d.array(2)), d.positive()], kernel))


def moment_equations() -> Derivation:
    """The moment equations: a Gaussian solves the continuity equation of an affine field."""
    import sympy as sp

    B, S, Y, mean, m, x = matrix("b"), matrix("s", True), matrix("y", True), vector("m"), vector("u"), vector("x")
    z = x - mean
    # with Y the inverse of S:  Y' = -Y S' Y  and  (log det S)' = tr(Y S')
    change = -(Y * B + B.T * Y)
    log_rate = m.dot(Y * z) - z.dot(change * z) / 2 - B.trace()
    transport = log_rate + (m + B * z).dot(-Y * z) + B.trace()
    volume = sp.cancel((S.inv() * (B * S + S * B.T)).trace() - 2 * B.trace())
    A, V = matrix("a"), matrix("v")
    moved = V * S * A * S
    return Derivation(
        "moment-equations",
        r"\alpha' = m, \qquad \Sigma' = B\Sigma + \Sigma B^\top",
        ((r"\partial_t\mu + \mathrm{div}(\mu\,\Gamma) = 0 \;\Leftrightarrow\; "
          r"\partial_t\log\mu + \Gamma\cdot\nabla\log\mu + \mathrm{div}\,\Gamma = 0, \qquad \Gamma(x) = m + B(x-\alpha)"),
         r"\log\mu = -\tfrac12 (x-\alpha)^\top \Sigma^{-1}(x-\alpha) - \tfrac12\log\det\Sigma + \text{const}",
         r"(\Sigma^{-1})' = -(\Sigma^{-1}B + B^\top\Sigma^{-1}), \qquad (\log\det\Sigma)' = 2\,\mathrm{tr}\,B",
         r"\text{all powers of } x \text{ cancel}"),
        remainder(transport, volume), "GaussianFlow.field",
        comparison("moment-equations", [A, S, V], moved + moved.T, lambda d: [d.array(2, 2), d.definite(), d.array(2, 2)],
                   lambda A, S, V: GaussianFlow(Softmax.bilinear(A, V), form="covariance").field(
                       jnp.zeros(()), Gaussian._raw(jnp.zeros(2), None, S)).cov))
