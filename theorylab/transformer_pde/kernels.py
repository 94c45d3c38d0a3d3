"""Numerical kernels of attention: sums over tokens in tiles, bistochastic scaling, and ridge systems that keep their digits and batch well."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Float

from theorylab.transformer_pde.ring import largest, round_trip, shard, total

Array = jax.Array

MEMORY = 5
"""Earlier steps that Anderson acceleration combines."""
ROUND_OFF_UNITS = 20
"""Units of round-off, relative to the potentials, below which their change is not followed."""
LANES = 8
"""Numbers in a vector register, at most: the products of tiles run over so many columns at a time."""
UNROLLED = 4
"""Matrices up to this size are factored by plain arithmetic: it batches over thousands of states, the calls of LAPACK do not."""


def tiled_average(queries: Float[Array, "m k"], keys: Float[Array, "n k"], bias: Float[Array, "n"], values: Float[Array, "n d"], tile: int,
                  causal: bool = False) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
    r"""Averages of `values` with weights $p_{ij} \propto e^{q_i \cdot k_j + b_j}$, and the effective sample sizes $1 / \sum_j p_{ij}^2$.

    Keys are visited in tiles while a running maximum keeps the exponentials in range (online softmax), queries too, so that the largest array has
    `tile ** 2` entries whatever the number of tokens; derivatives recompute the tiles, so they keep that bound. Where norms show that no logit is
    large, the maximum is left out. With `causal`, query i sees the keys j <= i only, and tiles of later keys are skipped. Tokens may be spread over
    devices, see `ring`.
    """
    _, mass, square_mass, total = _exponential_sums(queries, keys, bias, values, tile, causal)
    return total / mass[:, None], mass**2 / square_mass


def tiled_log_sum(queries: Float[Array, "m k"], keys: Float[Array, "n k"], bias: Float[Array, "n"], tile: int) -> Float[Array, "m"]:
    r"""The logarithms $\log \sum_j e^{q_i \cdot k_j + b_j}$, tile by tile as in `tiled_average`."""
    top, mass, _, _ = _exponential_sums(queries, keys, bias, keys[:, :0], tile, False)
    return top + jnp.log(mass)


def tiled_sum(queries: Float[Array, "m k"], keys: Float[Array, "n k"], values: Float[Array, "n d"], tile: int, activation: Callable[[Array], Array],
              causal: bool = False) -> Float[Array, "m d"]:
    r"""The sums $\sum_j a(q_i \cdot k_j)\, v_j$ with the function `activation` as $a$, tile by tile as in `tiled_average`."""

    def visit(total: Array, block: Array, part: tuple[Array, ...], seen: Array | None) -> Array:
        weight = activation(block @ part[0].T)
        return total + (weight if seen is None else jnp.where(seen, weight, 0.0)) @ part[1]

    begin = jnp.zeros((queries.shape[0], values.shape[1]), queries.dtype)
    return fold_tiles(visit, begin, queries, (keys, values), (0.0, 0.0), tile, causal)


def _exponential_sums(queries: Array, keys: Array, bias: Array, values: Array, tile: int, causal: bool) -> tuple[Array, Array, Array, Array]:
    """A shift of the logits of every query and, relative to its exponential, the sums of weights, of their squares and of weighted values."""
    faintest = math.log(jnp.finfo(queries.dtype).smallest_subnormal)
    small = _are_small(queries, keys, bias, causal)
    counted = values.shape[1] % LANES > 0                                         # a column of ones that fits a register saves the pass of a sum

    def plain(logits: Array, top: Array) -> tuple[Array, Array, Array]:
        return top, jnp.ones_like(top), jnp.exp(logits)

    def shifted(logits: Array, top: Array) -> tuple[Array, Array, Array]:
        highest = logits.max(1)
        new_top = lax.stop_gradient(jnp.maximum(top, highest))                    # any shift gives the same quotient
        safe = jnp.where(jnp.isfinite(new_top), new_top, 0.0)                     # a tile may hold tokens of weight zero only
        return new_top, jnp.exp(top - safe), _exponential(logits - safe[:, None], (highest - safe).max() >= faintest)

    def visit(carry: tuple[Array, ...], block: Array, part: tuple[Array, ...], seen: Array | None) -> tuple[Array, ...]:
        top, mass, square_mass, total = carry
        logits = _with_column(block, jnp.ones_like(block[:, 0])) @ _with_column(part[0], part[1]).T       # adding the bias costs no pass
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        top, shrink, weight = lax.cond(small, plain, shifted, logits, top)
        moved = weight @ part[2]
        return (top, mass * shrink + (moved[:, -1] if counted else weight.sum(1)), square_mass * shrink**2 + (weight * weight).sum(1),
                total * shrink[:, None] + moved[:, :values.shape[1]])

    rows, dtype = queries.shape[0], queries.dtype
    zero = jnp.zeros(rows, dtype)
    begin = (jnp.where(small, zero, -jnp.inf).astype(dtype), zero, zero, jnp.zeros((rows, values.shape[1]), dtype))
    lowest = float(jnp.finfo(dtype).min) / 4                                      # an infinite bias would spoil derivatives: 0 times infinity
    columns = _with_column(values, jnp.ones_like(values, shape=values.shape[:1])) if counted else values
    return fold_tiles(visit, begin, queries, (keys, jnp.maximum(bias, lowest), columns), (0.0, lowest, 0.0), tile, causal)


def _are_small(queries: Array, keys: Array, bias: Array, causal: bool) -> Array:
    """Whether norms show that exponentials of logits need no shift: none overflows, nor does the largest one of a query vanish, nor its square."""
    queries, keys, bias = lax.stop_gradient((queries, keys, bias))
    reach = largest(jnp.sqrt((queries * queries).sum(1).max())) * largest(jnp.sqrt((keys * keys).sum(1).max()))
    least = largest(-bias.min()) if causal else -largest(bias.max())                # the first query of a mask sees one key, whatever its bias
    return _for_all(reach + jnp.maximum(largest(bias.max()), least) < math.log(jnp.finfo(queries.dtype).max) / 3)


@custom_vmap
def _for_all(flag: Array) -> Array:
    """A flag that the lanes of a batch share: a branch on a flag of each would run both branches."""
    return flag


@_for_all.def_vmap
def _for_all_lanes(size: int, batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return (flag.all(0) if batched[0] else flag), False


def _with_column(rows: Array, column: Array) -> Array:
    return jnp.concatenate([rows, column[:, None]], 1)


def _exponential(shifted: Array, needed: Array) -> Array:
    """The exponential of a tile, or zeros where all of it would underflow.

    On a CPU the branch also keeps the shift out of the loop of the exponential, which then runs at twice the speed.
    """
    branch = lambda x, wanted: lax.cond(wanted, jnp.exp, jnp.zeros_like, x)  # noqa: E731
    return lax.platform_dependent(shifted, needed, cpu=branch, default=lambda x, wanted: jnp.exp(x))


def fold_tiles(visit: Callable[..., Any], begin: Any, queries: Array, parts: tuple[Array, ...], fills: tuple[float, ...], tile: int,
                causal: bool) -> Any:
    """Fold `visit(carry, queries, parts, seen)` over the tiles of `parts` for every tile of queries; `begin` has a row for each query."""
    asked, count = queries.shape[0], parts[0].shape[0]
    size, wide = min(tile, asked), min(tile, count)
    starts, key_starts = size * jnp.arange(-(-asked // size)), wide * jnp.arange(-(-count // wide))

    def fold(carry: Any, key_tiles: tuple[Array, ...], number: Any) -> Any:
        """What the queries here gather from the keys of one shard."""
        ahead = (number - shard()) * count

        @jax.checkpoint
        def of_queries(block: tuple[Array, Any, Array]) -> Any:
            rows, begun, start = block

            @jax.checkpoint
            def look(carry: Any, part: tuple[Array, ...], key_start: Array) -> Any:
                seen = key_start + jnp.arange(wide) <= start + jnp.arange(size)[:, None] if causal else None
                return visit(carry, rows, part, seen)

            def at(carry: Any, tiles: Any) -> tuple[Any, None]:
                part, key_start = tiles[0], tiles[1] + ahead
                if not causal:
                    return look(carry, part, key_start), None
                return lax.cond(key_start < start + size, look, lambda carry, *_: carry, carry, part, key_start), None

            return lax.scan(at, begun, (key_tiles, key_starts))[0]

        return lax.map(of_queries, (query_tiles, carry, starts))

    query_tiles, carry = jax.tree.map(lambda rows: _tiles(rows, size, 0.0), (queries, begin))
    done = round_trip(fold, carry, tuple(_tiles(part, wide, fill) for part, fill in zip(parts, fills, strict=True)))
    return jax.tree.map(lambda rows: rows.reshape(len(starts) * size, *rows.shape[2:])[:asked], done)


def _tiles(rows: Array, tile: int, fill: float) -> Array:
    """Rows cut into tiles, the last one padded with `fill`."""
    count = -(-rows.shape[0] // tile)
    padded = jnp.pad(rows, ((0, count * tile - rows.shape[0]),) + ((0, 0),) * (rows.ndim - 1), constant_values=fill)
    return padded.reshape(count, tile, *rows.shape[1:])


def sinkhorn_bias(queries: Float[Array, "n k"], keys: Float[Array, "n k"], log_weights: Float[Array, "n"], tile: int,
                  start: Float[Array, "n"] | None = None, tolerance: float = 1e-12, max_iterations: int = 1000) -> tuple[Float[Array, "n"], Array]:
    r"""The potential $g$ of the bistochastic scaling of $e^{q_i \cdot k_j}$, and the error that is left in it.

    $\sum_j w_j e^{f_i + q_i \cdot k_j + g_j} = 1 = \sum_i w_i e^{f_i + q_i \cdot k_j + g_j}$, with $\sum_j w_j g_j = 0$. Sinkhorn's alternating
    updates, in logarithms, are sped up by Anderson acceleration; they start at the potential of Gaussians with the moments of queries and keys
    (companion derivation). Derivatives are those of the solution, by the implicit function theorem.
    """
    weights = jnp.exp(log_weights)

    def residual(g: Array) -> Array:
        f = -tiled_log_sum(queries, keys, g + log_weights, tile)
        return -tiled_log_sum(keys, queries, f + log_weights, tile) - g - total(weights @ g)         # the last term fixes the free constant

    def solve(residual: Callable[[Array], Array], start: Array) -> tuple[Array, Array]:
        return _fixed_point(lambda g: g + residual(g), start, tolerance, max_iterations)

    def tangent_solve(linear: Callable[[Array], Array], right: Array) -> Array:
        solve = lambda matvec, b: _fixed_point(lambda x: x + matvec(x) - b, jnp.zeros_like(b), tolerance, max_iterations)[0]  # noqa: E731
        return lax.custom_linear_solve(linear, right, solve, solve)

    begin = _gaussian_potential(queries, keys, weights) if start is None else start
    return lax.custom_root(residual, begin, solve, tangent_solve, has_aux=True)


def _gaussian_potential(queries: Array, keys: Array, weights: Array) -> Array:
    r"""$g$ for Gaussian queries and keys: $-\frac12 (k - \bar k)^\top G (k - \bar k) - \bar q \cdot k$ up to a constant.

    With $S_q = L L^\top$ and $S_k$ the covariances, $G = 2 L\, (I + (I + 4 L^\top S_k L)^{1/2})^{-1} L^\top$.
    """

    def moments(rows: Array) -> tuple[Array, Array]:
        mean = total(weights @ rows)
        return mean, total((rows - mean).T @ (weights[:, None] * (rows - mean)))

    (query_mean, query_cov), (key_mean, key_cov) = moments(queries), moments(keys)
    values, vectors = jnp.linalg.eigh(query_cov)
    factor = vectors * jnp.sqrt(jnp.maximum(values, 0.0))
    values, vectors = jnp.linalg.eigh(factor.T @ key_cov @ factor)
    root = (keys - key_mean) @ factor @ vectors
    return -(root * root / (1 + jnp.sqrt(1 + 4 * jnp.maximum(values, 0.0)))).sum(1) - keys @ query_mean


def _fixed_point(update: Callable[[Array], Array], start: Array, tolerance: float, max_iterations: int) -> tuple[Array, Array]:
    """A fixed point of `update` by Anderson acceleration, and the largest last change; round-off bounds the tolerance from below."""
    unit = jnp.finfo(start.dtype).eps

    def going(state: tuple[Array, ...]) -> Array:
        count, x, change = state[0], state[1], state[2]
        error, size = largest(jnp.abs(change).max()), largest(jnp.abs(x).max())
        return (error > jnp.maximum(tolerance, ROUND_OFF_UNITS * unit * (1 + size))) & (count < max_iterations)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        count, x, change, moves, bends = state
        gram = total(bends @ bends.T)
        gram = gram + (10 * unit * jnp.trace(gram) + jnp.finfo(start.dtype).tiny) * jnp.eye(MEMORY, dtype=gram.dtype)
        mix = jnp.linalg.solve(gram, total(bends @ change))
        new = x + change - mix @ (moves + bends)
        new_change = update(new) - new
        slot = count % MEMORY
        return count + 1, new, new_change, moves.at[slot].set(new - x), bends.at[slot].set(new_change - change)

    empty = jnp.zeros((MEMORY, *start.shape), start.dtype)
    _, x, change, _, _ = lax.while_loop(going, step, (jnp.asarray(0), start, update(start) - start, empty, empty))
    return x, largest(jnp.abs(change).max())


def solve_shifted(gram: Float[Array, "k k"], right: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """Solve (I + gram) x = right for a positive semidefinite `gram`."""
    k = gram.shape[0]
    matrix = gram + jnp.eye(k, dtype=gram.dtype)
    if k > UNROLLED:
        factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
        return jax.scipy.linalg.cho_solve((factor, True), right)
    rows = [jnp.concatenate([matrix[i], right[i]]) for i in range(k)]
    for i in range(k):                                                               # elimination needs no pivots: the matrix is definite
        rows[i] = rows[i] / rows[i][i]
        rows = [row if j == i else row - row[i] * rows[i] for j, row in enumerate(rows)]
    return jnp.stack(rows)[:, k:]


def ridge_basis(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m n"], Float[Array, "n n"]]:
    r"""The blocks $(E, F)$ of the orthonormal basis of the columns of $(M; I)$: $(I + M^\top M)^{-1} M^\top = F E^\top$.

    Half the digits that a solve with $I + M^\top M$ would lose are kept.
    """
    m, n = matrix.shape
    stacked = jnp.concatenate([matrix, jnp.eye(n, dtype=matrix.dtype)])
    if n > UNROLLED:
        basis = jnp.linalg.qr(stacked)[0]
    else:
        columns: list[Array] = []
        for j in range(n):
            column = stacked[:, j]
            for done in columns:
                column = column - (done @ column) * done
            columns.append(column / jnp.sqrt(column @ column))
        basis = jnp.stack(columns, axis=1)
    return basis[:m], basis[m:]
