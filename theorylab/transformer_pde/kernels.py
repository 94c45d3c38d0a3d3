"""Numerical kernels of attention: averages over tokens in tiles, and ridge systems that keep their digits and batch well."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

Array = jax.Array

UNROLLED = 4
"""Matrices up to this size are factored by plain arithmetic: it batches over thousands of states, the calls of LAPACK do not."""


def tiled_average(queries: Float[Array, "m k"], keys: Float[Array, "n k"], bias: Float[Array, "n"], values: Float[Array, "n d"],
                  tile: int) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
    r"""Averages of `values` with weights $p_{ij} \propto e^{q_i \cdot k_j + b_j}$, and the effective sample sizes $1 / \sum_j p_{ij}^2$.

    Keys are visited in tiles while a running maximum keeps the exponentials in range (online softmax), queries too, so that the largest array has
    `tile ** 2` entries whatever the number of tokens.
    """
    count, asked = keys.shape[0], queries.shape[0]
    key_tiles = (_tiles(keys, tile, 0.0), _tiles(bias, tile, -jnp.inf), _tiles(values, tile, 0.0))

    def of_queries(block: Array) -> tuple[Array, Array]:
        def visit(carry: tuple[Array, ...], part: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
            top, mass, square_mass, total = carry
            logits = block @ part[0].T + part[1]
            new_top = jnp.maximum(top, logits.max(1))
            safe = jnp.where(jnp.isfinite(new_top), new_top, 0.0)              # a tile may hold tokens of weight zero only
            shrink, weight = jnp.exp(top - safe), jnp.exp(logits - safe[:, None])
            return (new_top, mass * shrink + weight.sum(1), square_mass * shrink**2 + (weight * weight).sum(1),
                    total * shrink[:, None] + weight @ part[2]), None

        rows = block.shape[0]
        zero = jnp.zeros(rows, block.dtype)
        begin = (jnp.full(rows, -jnp.inf, block.dtype), zero, zero, jnp.zeros((rows, values.shape[1]), block.dtype))
        if count <= tile:
            (_, mass, square_mass, total), _ = visit(begin, (keys, bias, values))
        else:
            (_, mass, square_mass, total), _ = lax.scan(visit, begin, key_tiles)
        return total / mass[:, None], mass**2 / square_mass

    if asked <= tile:
        return of_queries(queries)
    average, sample_size = lax.map(of_queries, _tiles(queries, tile, 0.0))
    return average.reshape(-1, values.shape[1])[:asked], sample_size.reshape(-1)[:asked]


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
