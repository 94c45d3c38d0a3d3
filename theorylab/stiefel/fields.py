r"""The landing field as pure functions: tangent terms, normal terms, and estimates of their sum from samples of B.

Points are tall, `n` by `p`. With $M = X^\top B X$, $h = M - I$ and the Euclidean gradient G of the objective, a step is
$X \leftarrow X - \eta (\Psi + \omega\,N)$: the tangent term $\Psi$ satisfies that $X^\top B \Psi$ is skew, so it changes h to second order
only, and the normal term N attracts to $X^\top B X = I$. The scaling is that of the official code, half of the display in the paper:
its step size is half of $\eta$, its attraction equals $\omega$.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from theorylab.core import checks
from theorylab.core.psd import product
from theorylab.errors import ArgumentError, ShapeError
from theorylab.stiefel.operators import Gram

Array = jax.Array
TANGENTS = ("relative", "relative_solved", "riemannian", "plam")
NORMALS = ("newton_schulz", "gradient")
SOLVED = ("relative_solved", "riemannian")


def _tall(**arrays: Any) -> list[Array]:
    """Points of one shape, transposed."""
    found = {name: checks.array(name, a, (None, None), batched=True) for name, a in arrays.items()}
    checks.same_dtype(**found)
    if len({a.shape for a in found.values()}) > 1:
        raise ShapeError(f"{' and '.join(found)} must have the same shape, got {', '.join(str(a.shape) for a in found.values())}")
    shape = next(iter(found.values())).shape
    if shape[-1] > shape[-2]:
        raise ShapeError(f"{next(iter(found))} must have at most as many columns as rows, got shape {shape}")
    return [a.mT for a in found.values()]


def _sym(a: Array) -> Array:
    return (a + a.mT) / 2


def relative(gradient: Any, x: Any, bx: Any) -> Array:
    r"""$\Psi_B = \mathrm{skew}(G X^\top B)\, B X$, from products only (paper, relative ascent direction).

    Args:
        gradient: Euclidean gradient G, shape `(n, p)`.
        x: point X, shape `(n, p)`.
        bx: the product B X, shape `(n, p)`.

    Raises:
        ShapeError: shapes differ, or more columns than rows.

    Example:
        >>> x = jnp.eye(2)
        >>> relative(jnp.array([[0.0, 1.0], [0.0, 0.0]]), x, x).tolist()
        [[0.0, 0.5], [-0.5, 0.0]]
    """
    gt, _, bt = _tall(gradient=gradient, x=x, bx=bx)
    return _relative(gt, bt).mT


def relative_solved(gradient: Any, x: Any, bx: Any, solved: Any) -> Array:
    r"""$\Psi_R = 2\,\mathrm{skew}(B^{-1} G X^\top)\, B X = B^{-1}G\,M - X\,(G^\top X)$, whose speed does not depend on the condition of B.

    Args:
        gradient: Euclidean gradient G, shape `(n, p)`.
        x: point X, shape `(n, p)`.
        bx: the product B X, shape `(n, p)`.
        solved: the solution $B^{-1} G$, shape `(n, p)`.

    Raises:
        ShapeError: shapes differ, or more columns than rows.

    Example:
        >>> g, x = jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.eye(2)
        >>> relative_solved(g, x, x, g).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    gt, xt, bt, st = _tall(gradient=gradient, x=x, bx=bx, solved=solved)
    return (product(bt, xt.mT) @ st - product(xt, gt.mT) @ xt).mT


def riemannian(gradient: Any, x: Any, solved: Any) -> Array:
    r"""$B^{-1} G - X\,\mathrm{sym}(X^\top G)$: the Riemannian gradient where h = 0; it is not tangent elsewhere.

    Arguments and errors are those of `relative_solved`.

    Example:
        >>> g, x = jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.eye(2)
        >>> riemannian(g, x, g).tolist()
        [[0.0, 0.5], [-0.5, 0.0]]
    """
    gt, xt, st = _tall(gradient=gradient, x=x, solved=solved)
    return (st - _sym(product(xt, gt.mT)) @ xt).mT


def plam(gradient: Any, x: Any, bx: Any) -> Array:
    r"""$G - B X\,\mathrm{sym}(X^\top G)$: the direction of the augmented Lagrangian method PLAM (Gao, Liu, Yuan 2019, with B).

    It is not tangent off the manifold. Arguments and errors are those of `relative`.

    Example:
        >>> plam(jnp.array([[2.0], [1.0]]), jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [0.0]])).tolist()
        [[0.0], [1.0]]
    """
    gt, xt, bt = _tall(gradient=gradient, x=x, bx=bx)
    return (gt - _sym(product(xt, gt.mT)) @ bt).mT


def normal_gradient(x: Any, bx: Any) -> Array:
    r"""$B X h$, the gradient of $\tfrac14\lVert h\rVert_F^2$ (paper). It is quadratic in B: an unbiased estimate needs two samples.

    Args:
        x: point X, shape `(n, p)`.
        bx: the product B X, shape `(n, p)`.

    Raises:
        ShapeError: shapes differ, or more columns than rows.

    Example:
        >>> normal_gradient(2 * jnp.eye(2), 2 * jnp.eye(2)).tolist()
        [[6.0, 0.0], [0.0, 6.0]]
    """
    xt, bt = _tall(x=x, bx=bx)
    return (_residual(_gram(xt, bt)) @ bt).mT


def normal_newton_schulz(x: Any, bx: Any) -> Array:
    r"""$X h$, the gradient of $\tfrac14\lVert h\rVert_F^2$ in the metric of B (companion derivation).

    It is linear in B, so one sample of B estimates it without bias, and with $\eta\omega = 1/2$ it is a Newton-Schulz step towards the B-polar
    factor, $h \to -\tfrac34 h^2 + \tfrac14 h^3$. Arguments and errors are those of `normal_gradient`.

    Example:
        >>> normal_newton_schulz(2 * jnp.eye(2), 4 * jnp.eye(2)).tolist()
        [[14.0, 0.0], [0.0, 14.0]]
    """
    xt, bt = _tall(x=x, bx=bx)
    return (_residual(_gram(xt, bt)) @ xt).mT


def landing_field(gradient: Any, x: Any, bx: Any, attraction: Any = 1.0, *, tangent: str = "relative", normal: str = "newton_schulz",
                  solved: Any = None) -> Array:
    r"""The landing field $\Lambda = \Psi + \omega N$, with its p by p factors combined before the tall products.

    Args:
        gradient: Euclidean gradient G, shape `(n, p)`.
        x: point X, shape `(n, p)`.
        bx: the product B X, shape `(n, p)`.
        attraction: weight $\omega$ of the normal term; at least 0.
        tangent: `"relative"`, `"relative_solved"`, `"riemannian"` or `"plam"`.
        normal: `"newton_schulz"` (X h) or `"gradient"` (B X h).
        solved: the solution $B^{-1} G$, for the tangents `"relative_solved"` and `"riemannian"`.

    Raises:
        ShapeError: shapes differ, or more columns than rows.
        ArgumentError: a negative attraction, or `solved` is missing.
        UnknownNameError: another tangent or normal term.

    Example:
        >>> x = 2 * jnp.eye(2)
        >>> landing_field(jnp.zeros((2, 2)), x, x, 0.5, normal="gradient").tolist()
        [[3.0, 0.0], [0.0, 3.0]]
    """
    checks.among("tangent", tangent, TANGENTS)
    checks.among("normal", normal, NORMALS)
    checks.real("attraction", attraction, low=0.0)
    if tangent in SOLVED and solved is None:
        raise ArgumentError(f"solved must be given for the tangent {tangent!r}: the solution of B Z = gradient")
    gt, xt, bt, st = _tall(gradient=gradient, x=x, bx=bx, solved=bx if solved is None else solved)
    return field_of(gt, xt, bt, _gram(xt, bt), attraction, tangent=tangent, normal=normal, solved=st).mT


def two_sample_field(gradient: Any, x: Any, bx1: Any, bx2: Any, attraction: Any = 1.0, *, normal: str = "gradient") -> Array:
    r"""The landing field from independent samples $b_1 = B_\zeta X$, $b_2 = B_{\zeta'} X$ and a gradient sample (paper, stochastic landing).

    $\tfrac12 (G\,(b_1^\top b_2) - b_1 (G^\top b_2))$ plus $\omega$ times $\tfrac12 (b_1 (X^\top b_2 - I) + b_2 (X^\top b_1 - I))$; its mean is the
    field exactly if the three samples are independent. With `normal="newton_schulz"` the normal term is that of the mean of both samples.

    Args:
        gradient: sample of the gradient, shape `(n, p)`.
        x: point X, shape `(n, p)`.
        bx1: first product, shape `(n, p)`.
        bx2: second product, shape `(n, p)`.
        attraction: weight $\omega$ of the normal term.
        normal: `"gradient"` or `"newton_schulz"`.

    Raises:
        ShapeError: shapes differ, or more columns than rows.
        UnknownNameError: another normal term.

    Example:
        >>> x = 2 * jnp.eye(2)
        >>> two_sample_field(jnp.zeros((2, 2)), x, x, x).tolist()
        [[6.0, 0.0], [0.0, 6.0]]
    """
    checks.among("normal", normal, NORMALS)
    checks.real("attraction", attraction, low=0.0)
    gt, xt, b1, b2 = _tall(gradient=gradient, x=x, bx1=bx1, bx2=bx2)
    return two_sample_of(gt, xt, b1, b2, attraction, normal=normal).mT


def u_statistic_field(rows: Any, coefficients: Any, x: Any, ridge: Any = None, attraction: Any = 1.0, *, normal: str = "newton_schulz") -> Array:
    r"""The landing field estimated without bias from ONE batch: the mean over all ordered triples of distinct rows (companion derivation).

    For $B = E[a a^\top] + R$ and gradient samples $g_i = a_i c_i^\top$ (independent component analysis: $c_i = \tanh(X^\top a_i)$; canonical
    correlations: $c_i = -Y^\top b_i$) the sum over triples is written with matrix products: work O(rows n p), and no Gram matrix.

    Args:
        rows: the batch A, shape `(rows, n)`, at least three rows, independent of each other.
        coefficients: C, shape `(rows, p)`.
        x: point X, shape `(n, p)`.
        ridge: None, a number $\rho$ for $R = \rho I$, or a matrix R of shape `(n, n)`.
        attraction: weight $\omega$ of the normal term; 0 leaves the tangent term alone.
        normal: `"newton_schulz"` (linear in B, plain) or `"gradient"` (over ordered pairs).

    Raises:
        ShapeError: shapes that do not match.
        ArgumentError: fewer than three rows, or a negative ridge.
        MatrixError: a ridge that is not symmetric.
        UnknownNameError: another normal term.

    Example:
        >>> u_statistic_field(jnp.eye(3), jnp.ones((3, 1)), jnp.array([[1.0], [0.0], [0.0]]), attraction=0.0).ravel().round(12).tolist()
        [0.0, 0.0, 0.0]
    """
    checks.among("normal", normal, NORMALS)
    checks.real("attraction", attraction, low=0.0)
    xt = _tall(x=x)[0]
    rows = checks.array("rows", rows, (None, xt.shape[-1]))
    coefficients = checks.array("coefficients", coefficients, (rows.shape[0], xt.shape[-2]))
    if rows.shape[0] < 3:
        raise ArgumentError(f"rows must hold at least 3 rows for an unbiased estimate, got {rows.shape[0]}")
    checks.same_dtype(rows=rows, coefficients=coefficients, x=xt)
    if ridge is not None and checks.known(ridge):
        ridge = checks.real("ridge", ridge, low=0.0) if jnp.ndim(ridge) == 0 else checks.symmetric("ridge", ridge, xt.shape[-1])
    return u_statistic_of(Gram(rows, None, ridge), coefficients.mT, xt, xt @ rows.mT, attraction, normal=normal).mT


# ---------------------------------------------------------------------------- the same on transposed points (p by n), as the methods carry them


def _gram(xt: Array, bt: Array) -> Array:
    return _sym(product(xt, bt.mT))


def _residual(gram: Array) -> Array:
    return gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)


def lifted(inverse: Any, a: Array) -> Array:
    """Transposed columns multiplied by an approximate inverse of B: None for I, a vector for a diagonal matrix, or a matrix."""
    if inverse is None:
        return a
    return a * inverse if jnp.ndim(inverse) == 1 else a @ inverse


def _relative(gt: Array, bt: Array) -> Array:
    return (product(bt, bt.mT) / 2) @ gt - (product(bt, gt.mT) / 2) @ bt


@partial(jax.jit, static_argnames=("tangent", "normal"))
def field_of(gt: Array, xt: Array, bt: Array, gram: Array, attraction: Any, *, tangent: str, normal: str, solved: Any = None,
             inverse: Any = None) -> Array:
    r"""The landing field; every p by p factor of a tall product is summed first.

    With `inverse` $= P P^\top$ the relative field is the one of the coordinates $Z = P^{-1} X$, where B is $P^\top B P$, written in X.
    """
    sent = lifted(inverse, bt)
    pull, base = attraction * _residual(gram), sent if normal == "gradient" else xt
    if tangent == "relative":
        along, turn, rest = sent, product(sent, gt.mT) / 2, (product(sent, bt.mT) / 2) @ lifted(inverse, gt)
    elif tangent == "plam":
        along, turn, rest = bt, _sym(product(xt, gt.mT)), gt
    else:
        along, turn = xt, product(xt, gt.mT)
        turn, rest = (turn, gram @ solved) if tangent == "relative_solved" else (_sym(turn), solved)
    return rest + ((pull - turn) @ along if along is base else pull @ base - turn @ along)


@partial(jax.jit, static_argnames="normal")
def two_sample_of(gt: Array, xt: Array, b1: Array, b2: Array, attraction: Any, *, normal: str, inverse: Any = None) -> Array:
    """The estimate from three independent samples; `inverse` as for `field_of`."""
    first, second = _residual(product(xt, b1.mT)), _residual(product(xt, b2.mT))
    b1, b2, plain = lifted(inverse, b1), lifted(inverse, b2), b1
    tangent = (product(b2, plain.mT) / 2) @ lifted(inverse, gt) - (product(b2, gt.mT) / 2) @ b1
    if normal == "gradient":
        return tangent + attraction / 2 * (second.mT @ b1 + first.mT @ b2)
    return tangent + (attraction / 2 * _sym(first + second)) @ xt


@partial(jax.jit, static_argnames="normal")
def u_statistic_of(batch: Gram, ct: Array, xt: Array, yt: Array, attraction: Any, *, normal: str, inverse: Any = None) -> Array:
    """The estimate over distinct rows of a batch; `yt` are their scores (A x)ᵀ."""
    r, ridge = batch.number, batch.ridge
    one, two = r - 1, r - 2
    ut, vt = lifted(inverse, r * batch.lift(yt)), lifted(inverse, r * batch.lift(ct))
    kyt, kct = batch.image(ut), batch.image(vt)
    dt = kyt - jnp.sum(lifted(inverse, batch.centred) * batch.centred, axis=-1) * yt
    weight = (jnp.sum(yt * kct, axis=-2) - jnp.sum(ct * kyt, axis=-2)) / (2 * r * one * two)
    on_v = product(dt, yt.mT) / (2 * r * one * two)
    on_u = -product(dt, ct.mT) / (2 * r * one * two)
    squares = product(yt, yt.mT)
    on_x, on_t, tt = jnp.zeros_like(squares), jnp.zeros_like(squares), None
    moment = squares / r
    if ridge is not None:
        plain = xt @ ridge if jnp.ndim(ridge) == 2 else ridge * xt
        tt = lifted(inverse, plain)
        st = batch.image(tt)
        cross = product(st, yt.mT)
        on_v = on_v + (cross + cross.mT) / (2 * r * one) + product(tt, plain.mT) / (2 * r)
        weight = weight - jnp.sum(ct * st, axis=-2) / (2 * r * one)
        on_u = on_u - product(st, ct.mT) / (2 * r * one)
        on_t = -product(dt, ct.mT) / (2 * r * one) - product(plain, vt.mT) / (2 * r)
        moment = moment + product(plain, xt.mT)
    if normal == "newton_schulz":
        on_x = attraction * _residual(_sym(moment))
    else:
        pairs = squares / (r * one) - jnp.eye(squares.shape[-1], dtype=squares.dtype) / r
        weight = weight - attraction * jnp.sum(yt**2, axis=-2) / (r * one)
        if tt is not None:
            stretch = product(xt, plain.mT)
            pairs, on_t = pairs + stretch / r, on_t + attraction * _residual(squares / r + stretch)
        on_u = on_u + attraction * pairs
    total = on_v @ vt + on_u @ ut + lifted(inverse, r * batch.lift(weight * yt))
    if tt is not None:
        total = total + on_t @ tt
    return total + on_x @ xt if normal == "newton_schulz" else total
