r"""Closed forms and blow-up times verified by computer algebra: each is put into the moment equations, and compared with the numeric code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from theorylab.transformer_pde.attention import L2, Softmax
from theorylab.transformer_pde.closed_forms import closed_form
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian
from theorylab.transformer_pde.oracles import blow_up_time
from theorylab.transformer_pde.symbolic import Derivation, comparison, matrix, remainder, turn_rows, vector

EYE = np.eye(2)


def softmax_covariance() -> Derivation:
    """Softmax with V = v I: the covariance for any A."""
    import sympy as sp

    A, S0 = matrix("a"), matrix("s", True)
    v, t = sp.symbols("v t", real=True)
    form = A + A.T
    J = sp.eye(2) - v * t * form * S0
    top, bottom = S0 * J.adjugate(), J.det()
    # Sigma = top / bottom, and Sigma' = v Sigma (A + A') Sigma times bottom^2
    rest = top.diff(t) * bottom - top * bottom.diff(t) - v * top * form * top
    return Derivation(
        "softmax-covariance",
        r"V = vI:\qquad \Sigma(t) = \Sigma_0\big(I - v t\,(A + A^\top)\Sigma_0\big)^{-1}",
        (r"\Sigma' = v\,\Sigma (A + A^\top)\Sigma \quad\Leftrightarrow\quad (\Sigma^{-1})' = -v (A + A^\top)",
         r"\Sigma(t)^{-1} = \Sigma_0^{-1} - v t (A + A^\top); \text{ the stated form needs no inverse of } \Sigma_0",
         r"\det\big(I - vt(A + A^\top)\Sigma_0\big)^2\,\big(\Sigma' - v\Sigma(A + A^\top)\Sigma\big) = 0 \text{ as a polynomial}"),
        remainder(rest, top - top.T, top.subs(t, 0) - S0), "closed_form",
        comparison("softmax-covariance", [A, S0, v, t], top / bottom, lambda d: [d.array(2, 2), d.definite(), d.number(), d.positive() / 16],
                   lambda A, S0, v, t: closed_form(GaussianFlow(Softmax.bilinear(A, float(v))), Gaussian(np.zeros(2), S0), t[None]).cov[0]))


def softmax_mean() -> Derivation:
    """Softmax with V = v I and symmetric A: the mean and the flow map."""
    import sympy as sp

    v, t, turn, one, two = sp.symbols("v t h n_1 n_2", real=True)
    U, root, mean = sp.Matrix(turn_rows(turn)) / (1 + turn**2), matrix("h", True), vector("m")
    growth = [(1 - 2 * v * t * n) ** sp.Rational(-1, 2) for n in (one, two)]
    scalar = [sp.simplify(sp.diff(g, t) - v * n * g**3) for g, n in zip(growth, (one, two), strict=True)]
    # with g' = v n g^3 the whitened flow map F = U diag(g) U' solves F' = v F F' N F, which is Phi' = B Phi
    g1, g2 = sp.symbols("g_1 g_2", positive=True)
    N, F = U * sp.diag(one, two) * U.T, U * sp.diag(g1, g2) * U.T
    whole = (U * sp.diag(v * one * g1**3, v * two * g2**3) * U.T - v * F * F.T * N * F).applyfunc(sp.cancel)
    flow = root * U * sp.diag(*growth) * U.T * root.inv()
    found = sp.exp(v * t) * flow * mean

    def kernel(root: Any, angle: Any, n: Any, v: Any, t: Any, mean: Any) -> Any:
        U, inverse = jnp.array(turn_rows(angle)) / (1 + angle**2), jnp.linalg.inv(root)
        form = inverse @ U @ jnp.diag(n) @ U.T @ inverse
        return closed_form(GaussianFlow(Softmax.bilinear((form + form.T) / 2, float(v))), Gaussian(mean, root @ root), t[None]).mean[0]

    return Derivation(
        "softmax-mean",
        r"V = vI,\ A = A^\top:\qquad \alpha(t) = e^{vt}\,\Phi(t)\,\alpha_0, \qquad \Phi(t) = h\,(I - 2vtN)^{-1/2} h^{-1},\quad "
        r"h = \Sigma_0^{1/2},\ N = hAh",
        (r"\Sigma = \Phi\Sigma_0\Phi^\top,\ \Phi = hFh^{-1}:\quad \Phi' = B\Phi,\ B = v\Sigma A \quad\Leftrightarrow\quad F' = v F F^\top N F",
         r"N = U\,\mathrm{diag}(n_i)\,U^\top,\ F = U\,\mathrm{diag}(g_i)\,U^\top:\quad g_i' = vn_ig_i^3 \;\Rightarrow\; g_i = (1 - 2vtn_i)^{-1/2}",
         r"\alpha' = v(\alpha + \Sigma A\alpha) = v\alpha + B\alpha \;\Rightarrow\; \alpha = e^{vt}\Phi\alpha_0"),
        remainder(*scalar, whole), "closed_form",
        comparison("softmax-mean", [root, turn, [one, two], v, t, mean], found,
                   lambda d: [d.definite(), d.number(), d.array(2), d.number(), d.positive() / 4, d.array(2)], kernel))


def scalar_laws() -> Derivation:
    """V = v I and one symmetric form: what an eigenvalue does under softmax, L2 and Sinkhorn."""
    import sympy as sp

    v, sign = sp.symbols("v varsigma", real=True)
    lam, eps, t, w, u = sp.symbols("lambda varepsilon t w u", positive=True)
    power = 1 / (1 - 2 * v * sign * lam * t)
    softmax = sp.cancel(sp.diff(power, t) - 2 * v * sign * lam * power**2)
    # L2: the root of the implicit law by the Wright function, omega + log omega = z
    z = 1 / (2 * lam) - sp.log(2 * lam) - 2 * sign * v * t
    omega: Any = sp.LambertW(sp.exp(z))
    slope: Any = sp.diff(omega, t).subs(omega, u / (2 * lam)) * 2 * lam
    l2 = sp.cancel(-slope / u**2 - 4 * v * sign * lam / u**2 / (1 + 2 * lam / u))
    # Sinkhorn: delta = eps sinh(w) / (2 lambda); w' from w - coth(w/2) = const + 2 sign v t / eps, in e = exp(w/2)
    e = sp.symbols("e", positive=True)
    sinh, cosh = (e - 1 / e) / 2, (e + 1 / e) / 2
    rate = (2 * sign * v / eps) / (1 + 1 / (2 * sinh**2))
    size: Any = sp.Symbol("s", positive=True)
    delta = eps * sinh * cosh / lam
    gain: Any = 2 * size / (1 + sp.sqrt(1 + 4 * size**2))
    tau = (gain.subs(sp.sqrt(1 + 4 * size**2), 1 + 2 * sinh**2)).subs(size, lam * delta / eps)            # sqrt(1 + sinh(w)^2) = cosh(w)
    sinkhorn = sp.cancel(eps * (1 + 2 * sinh**2) / (2 * lam) * rate - 2 * sign * (v / eps) * tau * delta)
    root = sp.cancel(1 + 4 * (lam * delta / eps) ** 2 - (1 + 2 * sinh**2) ** 2)

    grown = eps * sp.sinh(w) / (2 * lam)
    found = sp.Matrix([power, 1 / (2 * lam * omega), 2 * sign * v / eps * sp.tanh(w / 2) * grown])

    def kernel(lam: Any, v: Any, sign: Any, t: Any, eps: Any, w: Any) -> list[float]:
        start, one = Gaussian.standard(1), jnp.ones((1, 1))
        forms = [closed_form(GaussianFlow(kind(sign * one, one, float(v), float(lam))), start, t[None]).cov.item() for kind in (Softmax, L2)]
        cov = eps * jnp.sinh(w) / (2 * lam) * one
        matrix = Sinkhorn(sign * one, one, float(v), float(lam), float(eps)).velocity(jnp.zeros(1), cov).matrix
        return [*forms, 2 * (matrix @ cov).item()]

    return Derivation(
        "scalar-laws",
        r"V = vI,\ S^\top A S = \mathrm{diag}(\varsigma_i\lambda_i),\ \Sigma = S\,\mathrm{diag}(\delta_i)\,S^\top,\ \varsigma_i = \pm1:\quad"
        r"\delta = \frac{1}{1 - 2v\varsigma\lambda t}\ \text{(softmax)},\quad \delta = \frac{1}{2\lambda\,\omega(z)},\ "
        r"z = \frac1{2\lambda} - \log 2\lambda - 2\varsigma v t\ \text{(L2)},\quad \delta = \frac{\varepsilon \sinh w}{2\lambda},\ "
        r"w - \coth\frac w2 = \text{const} + \frac{2\varsigma v t}{\varepsilon}\ \text{(Sinkhorn)}",
        (r"\text{softmax: } \delta' = 2v\varsigma\lambda\,\delta^2",
         (r"\text{L2, } A = \varsigma P:\quad \delta' = \frac{4 v\varsigma\lambda\,\delta^2}{1 + 2\lambda\delta}, \qquad u = 1/\delta:\ "
          r"u + 2\lambda\log u = 1 - 4\varsigma\lambda v t, \qquad u = 2\lambda\,\omega(z),\ \omega + \log\omega = z"),
         (r"\text{Sinkhorn: } \delta' = \frac{2 v\varsigma}{\varepsilon}\,\tau\,\delta,\quad \tau = \frac{2s}{1 + \sqrt{1 + 4s^2}},\quad "
          r"s = \frac{\lambda\delta}{\varepsilon} = \tfrac12\sinh w \;\Rightarrow\; \tau = \tanh\tfrac w2"),
         (r"\cosh w\; w' = \tfrac{2 v\varsigma}{\varepsilon}\tanh\tfrac w2 \sinh w \quad\Leftrightarrow\quad "
          r"\Big(1 + \frac{1}{2\sinh^2(w/2)}\Big)\, w' = \frac{2 v\varsigma}{\varepsilon}")),
        remainder(softmax, l2, sinkhorn, root), "closed_form, Sinkhorn.velocity",
        comparison("scalar-laws", [lam, v, sign, t, eps, w], found,
                   lambda d: [d.positive(), d.number(), np.sign(d.number()), d.positive() / 4, d.positive(), d.positive()],
                   kernel))


def rank_one_head() -> Derivation:
    """One query row, K = +-Q: one orbit of covariances for all variants, with three clocks."""
    import sympy as sp

    q, z, V, S0, S = vector("q"), vector("z"), matrix("v"), matrix("s", True), matrix("r", True)
    c, eps, k = sp.symbols("c varepsilon k", positive=True)
    sign = sp.symbols("varsigma", real=True)
    y0 = S0 * q
    s0, h = q.dot(y0), q.dot(z)
    orbit = S0 + (z * z.T - y0 * y0.T) / s0
    size = q.dot(S * q)
    pulled = [sp.cancel(entry) for entry in (orbit * q - z * h / s0)]
    J = sp.eye(2) + 2 * c * S * q * q.T
    l2 = 2 * sign * c * V * (J.adjugate() * (1 + 2 * c * size) - sp.eye(2) * J.det()) * S * q * q.T
    # Sinkhorn: C = k S q q' S solves the optimality condition if k = (sign c / eps)(1 - k^2 s^2)
    plan = k * q * q.T * S - k / (1 - k**2 * size**2) * q * q.T * (S - k**2 * size * S * q * q.T * S)
    sinkhorn = plan.applyfunc(sp.cancel)
    root = 2 * c / eps / (1 + sp.sqrt(1 + 4 * c**2 * size**2 / eps**2))
    s = sp.symbols("s", positive=True)
    clock = sp.simplify(root.subs(size, s) - (c / eps) * (1 - root.subs(size, s) ** 2 * s**2))

    s_now = h**2 / s0
    moved = V * z * z.T / s0
    rates = (sign * c, 2 * sign * c / (1 + 2 * c * s_now), 2 * sign * c / eps**2 / (1 + sp.sqrt(1 + 4 * c**2 * s_now**2 / eps**2)))
    found = sp.Matrix.vstack(*(rate * s_now * (moved + moved.T) for rate in rates))

    def kernel(q: Any, z: Any, V: Any, S0: Any, c: Any, eps: Any, sign: Any) -> np.ndarray:
        y0 = S0 @ q
        cov = S0 + (jnp.outer(z, z) - jnp.outer(y0, y0)) / (q @ y0)
        weights = (sign * q[None], q[None], V, float(c))
        heads = (Softmax(*weights), L2(*weights), Sinkhorn(*weights, float(eps)))
        moved = [np.asarray(head.velocity(jnp.zeros(2), cov).matrix) @ cov for head in heads]
        return np.concatenate([one + one.T for one in moved])

    return Derivation(
        "rank-one-head",
        r"A = \varsigma c\, qq^\top:\quad \Sigma(\tau) = \Sigma_0 + \frac{zz^\top - y_0y_0^\top}{s_0},\quad y_0 = \Sigma_0 q,\ s_0 = q^\top y_0,\ "
        r"z' = Vz,\quad s = q^\top\Sigma q = \frac{(q^\top z)^2}{s_0},\quad dt = \frac{d\tau}{\kappa(s)\,s}, \quad \kappa = \varsigma c,\ "
        r"\frac{2\varsigma c}{1 + 2cs},\ \frac{2\varsigma c}{\varepsilon^2\big(1 + \sqrt{1 + 4c^2s^2/\varepsilon^2}\big)}",
        (r"B\,\Sigma = \kappa(s)\, V\,(\Sigma q)(\Sigma q)^\top \text{ for softmax, L2 and Sinkhorn}",
         r"\text{L2: } (I + 2c\,\Sigma qq^\top)^{-1}\Sigma q = \Sigma q/(1 + 2cs)",
         r"\text{Sinkhorn: } C = k\,\Sigma qq^\top\Sigma,\quad k = \tfrac{\varsigma c}{\varepsilon}(1 - k^2s^2), \quad \kappa = k/\varepsilon",
         (r"\Sigma(\tau)\,q = z\,\frac{q^\top z}{s_0} \;\Rightarrow\; "
          r"\Sigma' = \kappa s\,\frac{Vzz^\top + zz^\top V^\top}{s_0} = \kappa s\,\frac{d\Sigma}{d\tau}")),
        remainder(*pulled, l2, sinkhorn, clock), "Softmax.velocity, L2.velocity, Sinkhorn.velocity",
        comparison("rank-one-head", [q, z, V, S0, c, eps, sign], found,
                   lambda d: [d.array(2), d.array(2), d.array(2, 2), d.definite(), d.positive(), d.positive(), np.sign(d.number())],
                   kernel))


def rank_one_state() -> Derivation:
    """A covariance of rank one: it stays one, on the orbit of the value matrix."""
    import sympy as sp

    z, V, Q, K = vector("z"), matrix("v"), matrix("q"), matrix("k")
    eps = sp.symbols("varepsilon", positive=True)
    A, P = K.T * Q, K.T * K
    a, p = z.dot(A * z), z.dot(P * z)
    softmax = V * z * z.T * A * z - a * V * z
    J = sp.eye(2) + 2 * z * z.T * P
    l2 = J * z - (1 + 2 * p) * z
    n = sp.symbols("n", real=True)
    tau = 2 * n / (1 + sp.sqrt(1 + 4 * n**2))
    sinkhorn = sp.simplify(tau - n * (1 - tau**2))
    clocks = (a, 2 * a / (1 + 2 * p), 2 * a / (eps**2 * (1 + sp.sqrt(1 + 4 * a**2 / eps**2))))
    found = sp.Matrix.vstack(*(clock * V * z for clock in clocks))

    def kernel(z: Any, V: Any, Q: Any, K: Any, eps: Any) -> np.ndarray:
        heads = (Softmax(Q, K, V), L2(Q, K, V), Sinkhorn(Q, K, V, temperature=float(eps)))
        return np.concatenate([np.asarray(head.factor_velocity(jnp.zeros(2), z[:, None])[1]) for head in heads])

    return Derivation(
        "rank-one-state",
        r"\Sigma_0 = u_0u_0^\top:\quad \Sigma = zz^\top,\quad z = e^{\tau V}u_0,\quad d\tau = g\,dt,\quad g = a,\ \frac{2a}{1+2p},\ "
        r"\frac{2a}{\varepsilon^2\big(1 + \sqrt{1 + 4a^2/\varepsilon^2}\big)}, \qquad a = z^\top Az,\ p = z^\top Pz",
        (r"\text{softmax: } Bz = V zz^\top A z = a\,Vz",
         r"\text{L2: } (I + 2zz^\top P)\,z = (1 + 2p)\,z \;\Rightarrow\; Bz = \frac{2a}{1+2p}\,Vz",
         r"\text{Sinkhorn: } L = z,\ N = a/\varepsilon \text{ is a number},\ T = N(1 - T^2),\ Bz = \tfrac1\varepsilon T\,Vz"),
        remainder(softmax, l2, sinkhorn), "Softmax.factor_velocity, L2.factor_velocity, Sinkhorn.factor_velocity",
        comparison("rank-one-state", [z, V, Q, K, eps], found,
                   lambda d: [d.array(2), d.array(2, 2), d.array(2, 2), d.array(2, 2), d.positive()], kernel))


def riccati() -> Derivation:
    """V = v I with an affine layer and noise: the Riccati equation is a linear one in twice the dimension."""
    import sympy as sp

    X, Z, W, A, D, S = matrix("x"), matrix("z"), matrix("w"), matrix("a"), matrix("d", True), matrix("s", True)
    v = sp.symbols("v", real=True)
    form = A + A.T
    # Sigma = X Z^-1 = top / bottom; the adjugate of a 2 x 2 matrix is linear in it
    X1, Z1 = W * X + 2 * D * Z, -v * form * X - W.T * Z
    top, bottom = X * Z.adjugate(), Z.det()
    top1, bottom1 = X1 * Z.adjugate() + X * Z1.adjugate(), (Z.adjugate() * Z1).trace()
    rest = top1 * bottom - top * bottom1 - bottom * (W * top + top * W.T) - 2 * D * bottom**2 - v * top * form * top
    # without noise the precision solves a linear equation
    Y = S.adjugate() / S.det()
    right = W * S + S * W.T + v * S * form * S
    precision = ((-Y * right * Y + Y * W + W.T * Y + v * form) * S.det()).applyfunc(sp.cancel)
    # d = 1 in full: r^2 = w^2 - 4 D v a, and e = exp(r t) stands for hyperbolic functions
    w, a, s0, r, e = sp.symbols("w a sigma_0 r e", real=True)
    noise = (w**2 - r**2) / (4 * v * a)
    cosh, sinh = (e + 1 / e) / 2, (e - 1 / e) / (2 * r)
    line = (s0 * cosh + (w * s0 + 2 * noise) * sinh) / (cosh - (w + 2 * v * a * s0) * sinh)
    scalar = sp.cancel(sp.diff(line, e) * r * e - (2 * w * line + 2 * noise + 2 * v * a * line**2))
    found = W * S + S * W.T + 2 * D + v * S * form * S

    def kernel(W: Any, A: Any, D: Any, S: Any, v: Any) -> Any:
        flow = GaussianFlow(Softmax.bilinear(A, float(v)), feed_forward=(W, None), noise=D, form="covariance")
        return flow.field(jnp.zeros(()), Gaussian._raw(jnp.zeros(2), None, S)).cov

    return Derivation(
        "riccati",
        r"V = vI,\ \text{layer } Wx,\ \text{noise } \sqrt{2D}\,dB:\quad \Sigma' = W\Sigma + \Sigma W^\top + 2D + v\,\Sigma(A + A^\top)\Sigma,\quad"
        r"\Sigma = XZ^{-1},\quad \begin{pmatrix}X\\Z\end{pmatrix} = \exp t\begin{pmatrix}W & 2D\\ -v(A+A^\top) & -W^\top\end{pmatrix}"
        r"\begin{pmatrix}\Sigma_0\\I\end{pmatrix}",
        (r"\Sigma' = X'Z^{-1} - XZ^{-1}Z'Z^{-1}, \qquad X' = WX + 2DZ,\quad Z' = -v(A + A^\top)X - W^\top Z",
         r"D = 0:\quad Y = \Sigma^{-1},\quad Y' = -(YW + W^\top Y) - v(A + A^\top)",
         (r"d = 1,\ r = \sqrt{w^2 - 4Dva}:\quad \sigma(t) = \frac{\sigma_0\cosh rt + (w\sigma_0 + 2D)\,\frac{\sinh rt}{r}}"
          r"{\cosh rt - (w + 2va\sigma_0)\,\frac{\sinh rt}{r}}")),
        remainder(rest, precision, scalar), "GaussianFlow.field",
        comparison("riccati", [W, A, D, S, v], found,
                   lambda d: [d.array(2, 2), d.array(2, 2), d.definite(), d.definite(), d.number()], kernel))


def softmax_blow_up() -> Derivation:
    """Softmax with V = v I: the first time at which the closed form has no inverse."""
    import sympy as sp

    A, L = matrix("a"), matrix("l")
    v, t = sp.symbols("v t", real=True)
    form = v * L.T * (A + A.T) * L
    middle, half = form.trace() / 2, (form[0, 0] - form[1, 1]) / 2
    radius = sp.sqrt(half**2 + form[0, 1] ** 2)
    product = sp.expand((sp.eye(2) - t * form).det() - (1 - t * (middle + radius)) * (1 - t * (middle - radius)))

    def draw(d: Any) -> list[Any]:
        A = d.array(2, 2)
        return [A + 2 * EYE, d.array(2, 2) + EYE, d.positive()]                        # a positive top eigenvalue: there is a blow-up

    return Derivation(
        "softmax-blow-up",
        r"V = vI:\quad t^* = \frac{1}{\lambda_{\max}\big(v\,L_0^\top(A + A^\top)L_0\big)} \text{ if that eigenvalue is positive, else there is none}",
        (r"\Sigma(t) = L_0\big(I - t\,F\big)^{-1}L_0^\top, \qquad F = v\,L_0^\top(A + A^\top)L_0",
         (r"d = 2:\quad \det(I - tF) = (1 - t\lambda_+)(1 - t\lambda_-), \qquad \lambda_\pm = \frac{F_{11} + F_{22}}2 \pm "
          r"\sqrt{\Big(\frac{F_{11} - F_{22}}2\Big)^2 + F_{12}^2}")),
        remainder(product), "blow_up_time",
        comparison("softmax-blow-up", [A, L, v], [[1 / (middle + radius)]], draw,
                   lambda A, L, v: blow_up_time(GaussianFlow(Softmax.bilinear(A, float(v))), Gaussian.from_factor(np.zeros(2), L))))


def l2_blow_up() -> Derivation:
    """L2 attention with keys that are blind in one direction can blow up."""
    import sympy as sp

    b0, c0, t = sp.symbols("b_0 c_0 t", positive=True)
    b = b0 / (1 - 2 * b0 * t / 3)
    S = sp.Matrix([[1, b], [b, c0 * b**2 / b0**2]])
    K, Q, V = sp.Matrix([[1, 0]]), sp.Matrix([[0, 1]]), sp.diag(0, 1)
    B = 2 * V * (sp.eye(2) + 2 * S * K.T * K).inv() * S * K.T * Q
    rest = (S.diff(t) - B * S - S * B.T).applyfunc(sp.cancel)

    def kernel(b0: Any, c0: Any, t: Any) -> Any:
        b = b0 / (1 - 2 * b0 * t / 3)
        cov = jnp.array([[1.0, b], [b, c0 * (b / b0) ** 2]])
        moved = L2([[0.0, 1.0]], [[1.0, 0.0]], np.diag([0.0, 1.0])).velocity(jnp.zeros(2), cov).matrix @ cov
        return moved + moved.T

    return Derivation(
        "l2-blow-up",
        r"K = (1, 0),\ Q = (0, 1),\ V = \mathrm{diag}(0, 1),\ \Sigma_0 = \begin{pmatrix}1 & b_0\\ b_0 & c_0\end{pmatrix}:\quad \Sigma_{11} = 1,\ "
        r"\Sigma_{12} = \frac{b_0}{1 - \frac23 b_0 t},\ \Sigma_{22} = \frac{c_0}{(1 - \frac23 b_0 t)^2}, \qquad t^* = \frac{3}{2b_0}",
        (r"(I + 2\Sigma P)^{-1}\Sigma A = \begin{pmatrix}0 & \Sigma_{11}/(1 + 2\Sigma_{11})\\ 0 & \Sigma_{12}/(1 + 2\Sigma_{11})\end{pmatrix}",
         r"\Sigma_{11}' = 0, \qquad \Sigma_{12}' = \tfrac23\Sigma_{12}^2, \qquad \Sigma_{22}' = \tfrac43\Sigma_{12}\Sigma_{22}"),
        remainder(rest), "L2.velocity",
        comparison("l2-blow-up", [b0, c0, t], S.diff(t), lambda d: [d.positive() / 2, d.positive() + 0.5, d.positive()], kernel))


FORMS: tuple[Callable[[], Derivation], ...] = (
    softmax_covariance, softmax_mean, scalar_laws, rank_one_head, rank_one_state, riccati, softmax_blow_up, l2_blow_up)
