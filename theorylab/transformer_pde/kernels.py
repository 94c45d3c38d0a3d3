"""Numerical kernels of attention: averages over tokens in tiles, and ridge systems that keep their digits and batch well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

Array = jax.Array

UNROLLED = 4
"""Matrices up to this size are factored by plain arithmetic: it batches over thousands of states, the calls of LAPACK do not."""


def tiled_average(queries: Float[Array, "m k"], keys: Float[Array, "n k"], bias: Float[Array, "n"], values: Float[Array, "n d"], tile: int,
                  causal: bool = False) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
    r"""Averages of `values` with weights $p_{ij} \propto e^{q_i \cdot k_j + b_j}$, and the effective sample sizes $1 / \sum_j p_{ij}^2$.

    Keys are visited in tiles while a running maximum keeps the exponentials in range (online softmax), queries too, so that the largest array has
    `tile ** 2` entries whatever the number of tokens; derivatives recompute the tiles, so they keep that bound. With `causal`, query i sees the
    keys j <= i only, and tiles of later keys are skipped.
    """

    def visit(carry: tuple[Array, ...], block: Array, part: tuple[Array, ...], seen: Array | None) -> tuple[Array, ...]:
        top, mass, square_mass, total = carry
        logits = block @ part[0].T + part[1]
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        new_top = lax.stop_gradient(jnp.maximum(top, logits.max(1)))              # any shift gives the same quotient
        safe = jnp.where(jnp.isfinite(new_top), new_top, 0.0)                     # a tile may hold tokens of weight zero only
        shrink, weight = jnp.exp(top - safe), jnp.exp(logits - safe[:, None])
        return (new_top, mass * shrink + weight.sum(1), square_mass * shrink**2 + (weight * weight).sum(1),
                total * shrink[:, None] + weight @ part[2])

    rows, dtype = queries.shape[0], queries.dtype
    zero = jnp.zeros(rows, dtype)
    begin = (jnp.full(rows, -jnp.inf, dtype), zero, zero, jnp.zeros((rows, values.shape[1]), dtype))
    _, mass, square_mass, total = _over_tiles(visit, begin, queries, (keys, bias, values), (0.0, -jnp.inf, 0.0), tile, causal)
    return total / mass[:, None], mass**2 / square_mass


def tiled_sum(queries: Float[Array, "m k"], keys: Float[Array, "n k"], values: Float[Array, "n d"], tile: int, activation: Callable[[Array], Array],
              causal: bool = False) -> Float[Array, "m d"]:
    r"""The sums $\sum_j a(q_i \cdot k_j)\, v_j$ with the function `activation` as $a$, tile by tile as in `tiled_average`."""

    def visit(total: Array, block: Array, part: tuple[Array, ...], seen: Array | None) -> Array:
        weight = activation(block @ part[0].T)
        return total + (weight if seen is None else jnp.where(seen, weight, 0.0)) @ part[1]

    begin = jnp.zeros((queries.shape[0], values.shape[1]), queries.dtype)
    return _over_tiles(visit, begin, queries, (keys, values), (0.0, 0.0), tile, causal)


def tiled_log_sum(queries: Float[Array, "m k"], keys: Float[Array, "n k"], bias: Float[Array, "n"], tile: int) -> Float[Array, "m"]:
    r"""The logarithms $\log \sum_j e^{q_i \cdot k_j + b_j}$, tile by tile as in `tiled_average`."""

    def visit(carry: tuple[Array, Array], block: Array, part: tuple[Array, ...], seen: None) -> tuple[Array, Array]:
        top, mass = carry
        logits = block @ part[0].T + part[1]
        new_top = lax.stop_gradient(jnp.maximum(top, logits.max(1)))
        safe = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        return new_top, mass * jnp.exp(top - safe) + jnp.exp(logits - safe[:, None]).sum(1)

    begin = (jnp.full(queries.shape[0], -jnp.inf, queries.dtype), jnp.zeros(queries.shape[0], queries.dtype))
    top, mass = _over_tiles(visit, begin, queries, (keys, bias), (0.0, -jnp.inf), tile, False)
    return top + jnp.log(mass)


def sinkhorn_bias(queries: Float[Array, "n k"], keys: Float[Array, "n k"], log_weights: Float[Array, "n"], tile: int,
                  start: Float[Array, "n"] | None = None, tolerance: float = 1e-12, max_iterations: int = 1000) -> tuple[Float[Array, "n"], Array]:
    r"""The potential $g$ of the bistochastic scaling $e^{f_i + q_i \cdot k_j + g_j}$, and its last change.

    Rows and columns, weighted, have sum one: $\sum_j w_j e^{f_i + q_i \cdot k_j + g_j} = 1 = \sum_i w_i e^{f_i + q_i \cdot k_j + g_j}$.
    """

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, old, _ = carry
        f = -tiled_log_sum(queries, keys, old + log_weights, tile)
        new = -tiled_log_sum(keys, queries, f + log_weights, tile)
        return count + 1, new, jnp.abs(new - old).max()

    begin = jnp.zeros_like(log_weights) if start is None else start
    going = lambda carry: (carry[2] > tolerance) & (carry[0] < max_iterations)  # noqa: E731
    _, g, error = lax.while_loop(going, step, (jnp.asarray(0), begin, jnp.asarray(jnp.inf, begin.dtype)))
    return g, error


def _over_tiles(visit: Callable[..., Any], begin: Any, queries: Array, parts: tuple[Array, ...], fills: tuple[float, ...], tile: int,
                causal: bool) -> Any:
    """Fold `visit(carry, queries, parts, seen)` over the tiles of `parts` for every tile of queries; `begin` has a row for each query."""
    asked, count = queries.shape[0], parts[0].shape[0]
    size, wide = min(tile, asked), min(tile, count)
    key_tiles = tuple(_tiles(part, wide, fill) for part, fill in zip(parts, fills, strict=True))
    key_starts = wide * jnp.arange(key_tiles[0].shape[0])

    @jax.checkpoint
    def of_queries(block: tuple[Array, Any, Array]) -> Any:
        rows, carry, start = block

        @jax.checkpoint
        def look(carry: Any, part: tuple[Array, ...], key_start: Array) -> Any:
            seen = key_start + jnp.arange(wide) <= start + jnp.arange(size)[:, None] if causal else None
            return visit(carry, rows, part, seen)

        def scanned(carry: Any, tiles: Any) -> tuple[Any, None]:
            part, key_start = tiles
            if not causal:
                return look(carry, part, key_start), None
            return lax.cond(key_start <= start + size - 1, look, lambda carry, *_: carry, carry, part, key_start), None

        return lax.scan(scanned, carry, (key_tiles, key_starts))[0]

    starts = size * jnp.arange(-(-asked // size))
    cut = jax.tree.map(lambda rows: _tiles(rows, size, 0.0), (queries, begin))
    if len(starts) == 1:
        return jax.tree.map(lambda rows: rows[:asked], of_queries(jax.tree.map(lambda a: a[0], (*cut, starts))))
    done = lax.map(of_queries, (*cut, starts))
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:])[:asked], done)


def _tiles(rows: Array, tile: int, fill: float) -> Array:
    """Rows cut into tiles, the last one padded with `fill`."""
    missing = -rows.shape[0] % tile
    padded = jnp.pad(rows, ((0, missing),) + ((0, 0),) * (rows.ndim - 1), constant_values=fill)
    return padded.reshape(-1, tile, *rows.shape[1:])


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
