"""The velocity of N tokens under softmax attention: the tiled kernel beside its arithmetic, a dense softmax and `jax.nn.dot_product_attention`.

Floor: the two matrix products and the exponentials of one tile, nothing else, times the number of tiles. Peers that hold all pairs run up to
`--dense` tokens. Time is process CPU time per pair of tokens, the least over interleaved rounds; memory is the temporary memory of the
compiled program, without what a library call takes inside. The time for 100000 tokens is extrapolated from the time per pair at `--measured`
tokens.

    python benchmarks/particles.py [--quick] [--json | --markdown]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from theorylab import transformer_pde as tp
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

Array = jax.Array
TOKENS = 100_000


def floor(x: Array, tile: int, count: int) -> Array:
    """`count` tiles of bare arithmetic; the queries change so that no tile can be left out."""
    keys = x[:tile]

    def visit(total: Array, size: Array) -> tuple[Array, None]:
        return total + jnp.exp((size * keys) @ keys.T) @ keys, None

    return lax.scan(visit, jnp.zeros_like(keys), jnp.linspace(0.5, 1.0, count, dtype=x.dtype))[0]


def contestants(dim: int, tile: int, dense: int, measured: int, dtype: str) -> dict[str, tuple[Callable[[Array], Any], int, int]]:
    """Functions of the tokens, the number of tokens each gets, and the pairs of tokens that it visits."""
    head = tp.Softmax(jnp.eye(dim, dtype=dtype), jnp.eye(dim, dtype=dtype), jnp.asarray(1.0, dtype))

    def softmax(x: Array) -> Array:
        return jax.nn.softmax(x @ x.T) @ x

    def fused(x: Array) -> Array:
        y = x[None, :, None, :]
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(y, y, y, scale=1.0)[0, :, 0]

    masked = tp.Masked(head)
    count = max(measured**2 // tile**2 // 8, 1)
    return {
        "tiled": (lambda x: head.token_velocity(x, tile=tile)[0], measured, measured**2),
        "tiled, with effective sample sizes": (lambda x: head.token_velocity(x, tile=tile), measured, measured**2),
        "tiled, masked": (lambda x: masked.token_velocity(x, tile=tile)[0], measured, measured**2),
        "floor": (lambda x: floor(x, tile, count), tile, count * tile**2),
        "tiled, dense size": (lambda x: head.token_velocity(x, tile=tile)[0], dense, dense**2),
        "dense softmax": (softmax, dense, dense**2),
        "jax.nn.dot_product_attention": (fused, dense, dense**2),
    }


def measure(dim: int, tile: int, dense: int, measured: int, rounds: int, dtype: str) -> list[dict[str, Any]]:
    """One row per contestant."""
    programs = {}
    for name, (function, count, pairs) in contestants(dim, tile, dense, measured, dtype).items():
        x = jax.random.normal(jax.random.key(0), (count, dim), dtype) / dim**0.5
        program = jax.jit(function).lower(x).compile()
        jax.block_until_ready(program(x))
        programs[name] = (program, x, pairs)
    least = dict.fromkeys(programs, float("inf"))
    for _ in range(rounds):
        for name, (program, x, _) in programs.items():
            began = time.process_time()
            jax.block_until_ready(program(x))
            least[name] = min(least[name], time.process_time() - began)
    bare = least["floor"] / programs["floor"][2]
    table = []
    for name, (program, x, pairs) in programs.items():
        each, used = least[name] / pairs, temporary(program) / (len(x) ** 2 * jnp.dtype(dtype).itemsize)
        table.append({"dim": dim, "dtype": dtype, "row": name, "tokens": len(x), "CPU ns per pair": 1e9 * each, "row / floor": each / bare,
                      f"CPU-s at {TOKENS} (extrapolated)": each * TOKENS**2 if name.startswith("tiled") else None,
                      "memory / N^2 buffer": None if name == "floor" else used})
    return table


def temporary(program: Any) -> int:
    """Bytes of temporary memory of a compiled program."""
    return program.memory_analysis().temp_size_in_bytes


def whole(dim: int, tile: int, dtype: str) -> dict[str, Any]:
    """Memory of the program for all tokens, which is compiled and not run."""
    head = tp.Softmax(jnp.eye(dim, dtype=dtype), jnp.eye(dim, dtype=dtype), jnp.asarray(1.0, dtype))
    program = jax.jit(lambda x: head.token_velocity(x, tile=tile)[0]).lower(jax.ShapeDtypeStruct((TOKENS, dim), dtype)).compile()
    used = temporary(program)
    return {"dim": dim, "dtype": dtype, "tokens": TOKENS, "tile": tile, "temporary MB": used / 1e6,
            "in tables of tokens": used / (TOKENS * dim * jnp.dtype(dtype).itemsize), "N^2 buffer MB": TOKENS**2 * jnp.dtype(dtype).itemsize / 1e6}


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables; `--json` for machines, `--markdown` for the documentation."""
    parser = report.parser(__doc__, "fewer tokens, dimensions and rounds")
    parser.add_argument("--tile", type=int, default=1024, help="tokens in a block")
    parser.add_argument("--measured", type=int, help="tokens of the measured runs (default 20000; 2048 with --quick)")
    parser.add_argument("--dense", type=int, help="tokens of the peers that hold all pairs (default 8192; 1024 with --quick)")
    parser.add_argument("--rounds", type=int, help="rounds of interleaved calls (default 5; 2 with --quick)")
    options = parser.parse_args(argv)
    quick = options.quick
    measured, dense = options.measured or (2048 if quick else 20_000), options.dense or (1024 if quick else 8192)
    rounds = options.rounds or (2 if quick else 5)
    cases = [(2, "float64")] if quick else [(dim, dtype) for dtype in ("float64", "float32") for dim in (2, 16, 64)]
    rows = [row for dim, dtype in cases for row in measure(dim, options.tile, dense, measured, rounds, dtype)]
    memory = [whole(dim, options.tile, dtype) for dim, dtype in cases]
    report.show({"Velocity of all tokens": rows, f"Memory of the program for {TOKENS} tokens": memory}, options, tile=options.tile, rounds=rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
