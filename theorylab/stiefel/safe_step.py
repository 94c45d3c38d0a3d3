r"""The largest step along a field that keeps $\lVert X^\top B X - I\rVert_F$ within a bound: exact, proved, and as published.

With $W = X^\top B \Lambda + \Lambda^\top B X$ and $Z = \Lambda^\top B \Lambda$ the residual moves as $h(\eta) = h - \eta W + \eta^2 Z$, so its
squared norm is a quartic in $\eta$, known from p by p matrices. The exact rule is its first upward crossing of the level (companion derivation).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import checks
from theorylab.core.psd import product
from theorylab.errors import ArgumentError, ShapeError
from theorylab.stiefel.fields import NORMALS, _gram, _residual, _sym
from theorylab.stiefel.operators import as_operator

Array = jax.Array
Blocks = tuple[Array, ...]
RULES = ("exact", "rigorous", "official")
REFINEMENTS = 10


def safe_step_size(x: Any, field: Any, B: Any = None, radius: Any = 0.5, rule: str = "exact", *, attraction: Any = 1.0,
                   normal: str = "newton_schulz", spectrum: Any = None, largest: Any = jnp.inf) -> Array:
    r"""The largest $\eta$ up to which $\lVert h(X - \eta\Lambda)\rVert_F$ stays within `radius`.

    `"exact"`: the first upward crossing of the quartic, for any field. `"rigorous"`: the closed form
    $(\omega n^2 + \sqrt{\omega^2 n^4 + \tfrac12 L_N l^2 (\epsilon^2 - d^2)}) / (L_N l^2)$, $L_N = \beta_1(2 + 3\epsilon)$, never larger than the
    exact one, for landing fields with a relative tangent term (companion derivation; the paper's rule in another scaling). `"official"`: the rule of
    the official code, whose constant is no bound; for figures only. A point outside the radius may stay as far as it is.

    Args:
        x: point X, shape `(n, p)`.
        field: landing field at X, shape `(n, p)`.
        B: a matrix, an operator, a function, rows of data, or None for the identity.
        radius: $\epsilon$ in (0, 1); the official rule also takes 1.
        rule: `"exact"`, `"rigorous"` or `"official"`.
        attraction: the weight $\omega$ in the field, for the two closed forms.
        normal: the normal term in the field, for the rigorous rule.
        spectrum: smallest and largest eigenvalue of B, for the two closed forms; computed from the matrix if None.
        largest: what is returned where no step leaves the radius.

    Raises:
        ShapeError: shapes that do not match.
        ArgumentError: a radius outside its interval.
        UnknownNameError: another rule or normal term.

    Example:
        >>> round(float(safe_step_size(jnp.eye(1), jnp.array([[1.0]]), radius=0.75)), 12)
        0.5
    """
    checks.among("rule", rule, RULES)
    checks.among("normal", normal, NORMALS)
    check_radius("radius", radius, rule)
    x = checks.array("x", x, (None, None))
    field = checks.array("field", field, (None, None))
    if x.shape[1] > x.shape[0]:
        raise ShapeError(f"x must have at most as many columns as rows, got shape {x.shape}")
    if x.shape != field.shape:
        raise ShapeError(f"field must have the shape of x, {x.shape}, got {field.shape}")
    checks.same_dtype(x=x, field=field)
    operator = as_operator("B", B, x.shape[0], dtype=x.dtype)
    xt, ft = x.mT, field.mT
    image, image_field = operator.image(xt), operator.image(ft)
    gram = _sym(operator.inner(xt, image, xt, image))
    if rule == "exact":
        w, z = moves(operator.inner(xt, image, ft, image_field), operator.inner(ft, image_field, ft, image_field))
        return exact_step(_residual(gram), w, z, radius, largest)
    if spectrum is None:
        values = jnp.linalg.eigvalsh(operator.matrix())
        spectrum = values[0], values[-1]
    slope = decrease(gram, _gram(operator.product(xt, image), operator.product(xt, image)), normal)
    return bounded_step(gram, slope, jnp.sum(ft**2), radius, largest, rule, attraction, *spectrum)


def check_radius(name: str, radius: Any, rule: str) -> None:
    """A radius in (0, 1), or (0, 1] for the official rule."""
    if not checks.known(radius) or radius is None:
        return
    top = {"high": 1.0} if rule == "official" else {"below": 1.0}
    if jnp.ndim(radius) != 0:
        raise ArgumentError(f"{name} must be one number, got shape {jnp.shape(radius)}")
    checks.real(name, radius, above=0.0, **top)


def moves(cross: Array, square: Array) -> tuple[Array, Array]:
    r"""W and Z from $X^\top B \Lambda$ and $\Lambda^\top B \Lambda$."""
    return cross + cross.mT, _sym(square)


def decrease(gram: Array, square: Array, normal: str) -> Array:
    r"""The inner product of the normal term with $BXh$: $\lVert BXh\rVert^2$ or, for X h, $\mathrm{tr}(h M h)$."""
    h = _residual(gram)
    return jnp.sum(h * product(square if normal == "gradient" else gram, h))


def bounded_step(gram: Array, slope: Array, length: Array, radius: Any, largest: Any, rule: str, attraction: Any, low: Any, high: Any) -> Array:
    """The closed forms; `slope` is `decrease`, `length` the squared norm of the field, `low` and `high` the extreme eigenvalues of B."""
    d2 = jnp.sum(_residual(gram) ** 2)
    pull = attraction * slope
    if rule == "rigorous":
        reach = jnp.maximum(jnp.square(radius).astype(d2.dtype) if isinstance(radius, jax.Array) else radius**2, d2)
        curve = high * (2 + 3 * jnp.sqrt(reach)) * length
        root = pull**2 + curve * (reach - d2) / 2
    else:
        curve = (low * radius + 2 * (1 + radius) * (low / high)) * length
        root = pull**2 + curve * (radius**2 - d2)
    moving = curve > 0
    step = (pull + jnp.sqrt(jnp.maximum(root, 0))) / jnp.where(moving, curve, jnp.ones_like(curve))
    return jnp.where(moving, jnp.minimum(step, largest), largest)


def exact_steps(grams: Blocks, moved: tuple[tuple[Array, Array], ...], radius: Any, largest: Any) -> Array:
    """`exact_step` for each block, from Gram matrices and pairs (W, Z), compiled once for all."""
    h, w, z = (jnp.stack(parts) for parts in (tuple(_residual(m) for m in grams), *zip(*moved, strict=True)))
    return jax.vmap(lambda h, w, z: exact_step(h, w, z, radius, largest))(h, w, z)


@jax.jit
def exact_step(h: Array, w: Array, z: Array, radius: Any, largest: Any) -> Array:
    r"""The first $\eta$ at which $\lVert h - \eta W + \eta^2 Z\rVert_F$ rises through $\max(\epsilon, \lVert h\rVert_F)$; at most `largest`.

    The answer never lies beyond the crossing. It is 0 if the norm begins by rising from a point outside the radius. Its derivative is that of the
    crossing, by the implicit function theorem.
    """
    return _first_crossing(h, w, z, jnp.asarray(radius, h.dtype), jnp.asarray(largest, h.dtype))


@jax.custom_jvp
def _first_crossing(h: Array, w: Array, z: Array, radius: Array, largest: Array) -> Array:
    hh, ww, zz = jnp.sum(h**2), jnp.sum(w**2), jnp.sum(z**2)
    hw, hz, wz = jnp.sum(h * w), jnp.sum(h * z), jnp.sum(w * z)
    level = jnp.maximum(hh, radius**2)
    # |h(eta)| >= eta^2 |Z| - eta |W| - |h| bounds the crossing; with eta = reach t all that follows happens on [0, 1].
    moving = zz > 0
    nz, nw, total = jnp.sqrt(jnp.where(moving, zz, jnp.ones_like(zz))), jnp.sqrt(ww), jnp.sqrt(hh) + jnp.sqrt(level)
    bound = (nw + jnp.sqrt(ww + 4 * nz * total)) / (2 * nz)
    reach = jnp.where(moving, jnp.minimum(bound, largest), jnp.ones_like(bound))
    c4, c3, c2 = zz * reach**4 / level, -2 * wz * reach**3 / level, (ww + 2 * hz) * reach**2 / level
    c1, c0 = -2 * hw * reach / level, hh / level - 1
    quartic = jnp.stack([c4, c3, c2, c1, c0])
    slope = jnp.stack([jnp.zeros_like(c4), 4 * c4, 3 * c3, 2 * c2, c1])
    turns = _quadratic_roots(12 * c4, 6 * c3, 2 * c2)
    ends = jnp.concatenate([jnp.zeros(1, h.dtype), turns, jnp.ones(1, h.dtype)])
    extremes, _ = _bisect(slope, ends[:-1], ends[1:])
    ends = jnp.concatenate([jnp.zeros(1, h.dtype), extremes, jnp.ones(1, h.dtype)])
    above = _value(quartic, ends[1:]) > 0
    first = jnp.argmax(above)
    _, (inside, _) = _bisect(quartic, ends[first][None], ends[first + 1][None])
    step = jnp.where(jnp.any(above), inside[0], jnp.ones_like(reach)) * reach
    return jnp.where(moving, step, largest)


@_first_crossing.defjvp
def _crossing_rule(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (h, w, z, radius, largest), (dh, dw, dz, dradius, dlargest) = primals, tangents
    eta = _first_crossing(*primals)
    ahead = h - eta * w + eta**2 * z
    slope = 2 * jnp.sum(ahead * (2 * eta * z - w))
    shift = 2 * jnp.sum(ahead * (dh - eta * dw + eta**2 * dz))
    level = jnp.where(jnp.sum(h**2) > radius**2, 2 * jnp.sum(h * dh), 2 * radius * dradius)
    rising = slope > 0
    turn = jnp.where(rising, (level - shift) / jnp.where(rising, slope, jnp.ones_like(slope)), jnp.zeros_like(slope))
    return eta, jnp.where(eta < largest, turn, dlargest)


def _value(c: Array, t: Array) -> Array:
    return (((c[0] * t + c[1]) * t + c[2]) * t + c[3]) * t + c[4]


def _quadratic_roots(a: Array, b: Array, c: Array) -> Array:
    """The real roots of a t^2 + b t + c clipped to [0, 1] in ascending order; 1 where there is none."""
    disc = b**2 - 4 * a * c
    q = -(b + jnp.where(b < 0, -1.0, 1.0).astype(b.dtype) * jnp.sqrt(jnp.maximum(disc, 0))) / 2
    one = jnp.ones_like(a)
    roots = jnp.stack([jnp.where(a == 0, one, q / jnp.where(a == 0, one, a)), jnp.where(q == 0, one, c / jnp.where(q == 0, one, q))])
    return jnp.sort(jnp.where(disc > 0, jnp.clip(roots, 0, 1), 1.0))


def _bisect(c: Array, left: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    """A sign change of a polynomial in each [left, right] on which it is monotone; `right` where there is none. Also the final brackets.

    Halving, secant and Newton steps together close in on the root from both sides once the curvature keeps its sign; the
    bracket is kept throughout, so its left end never passes the root.
    """
    rising = jnp.where(_value(c, left) <= 0, 1.0, -1.0).astype(left.dtype)
    change = rising * _value(c, right) > 0

    def shrink(bracket: tuple[Array, Array], t: Array) -> tuple[Array, Array]:
        low, high = bracket
        t = jnp.where((t >= low) & (t <= high), t, (low + high) / 2)
        below = rising * _value(c, t) <= 0
        return jnp.where(below, t, low), jnp.where(below, high, t)

    def refine(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        ends = jnp.stack(shrink(bracket, (bracket[0] + bracket[1]) / 2))
        value, slope = _value(c, ends), ((4 * c[0] * ends + 3 * c[1]) * ends + 2 * c[2]) * ends + c[3]
        newton = ends - value / jnp.where(slope == 0, jnp.ones_like(slope), slope)
        rise = value[1] - value[0]
        secant = ends[0] - value[0] * (ends[1] - ends[0]) / jnp.where(rise == 0, jnp.ones_like(rise), rise)
        return shrink(shrink(shrink((ends[0], ends[1]), secant), newton[0]), newton[1])

    def tighten(k: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        # a right end that has converged pulls the left end up to round-off: by 2^18, 2^12, 2^6, 1 units
        units = jnp.asarray([2.0**18, 2.0**12, 2.0**6, 2.0], left.dtype)[k]
        return shrink(bracket, bracket[1] * (1 - units * jnp.finfo(left.dtype).eps))

    low, high = lax.fori_loop(0, 4, tighten, lax.fori_loop(0, REFINEMENTS, refine, (left, right)))
    return jnp.where(change, high, right), (low, high)
