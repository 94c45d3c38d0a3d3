"""Random heads, for ensembles over weights."""

from __future__ import annotations

import math

import jax

from theorylab.core.keys import Key, as_key, stream
from theorylab.errors import UnknownNameError
from theorylab.transformer_pde.attention import L2, Head, Linear, Softmax
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.gaussian import _whole
from theorylab.transformer_pde.unnormalized import Exponential, Sigmoid

KINDS: dict[str, type[Head]] = {"softmax": Softmax, "l2": L2, "linear": Linear, "sinkhorn": Sinkhorn, "sigmoid": Sigmoid, "exponential": Exponential}


def random_attention(kind: str, key: Key | int, dim: int, rank: int | None = None, scale: float = 1.0) -> Head:
    """A head whose matrices have independent normal entries of variance `1 / dim`.

    Args:
        kind: `"softmax"`, `"l2"`, `"linear"`, `"sinkhorn"` (of temperature 1), `"sigmoid"` (without bias) or `"exponential"`, in any case.
        key: random key or seed.
        dim: dimension of a token.
        rank: rows of queries and keys; None means `dim`.
        scale: the logit scale.

    Raises:
        UnknownNameError: `kind` is not known.

    Example:
        >>> random_attention("softmax", 0, dim=4, rank=2).Q.shape
        (2, 4)
    """
    name = kind.lower() if isinstance(kind, str) else kind
    if name not in KINDS:
        raise UnknownNameError.of("attention", kind, KINDS)
    rows = dim if rank is None else rank
    _whole("dim", dim)
    _whole("rank", rows)
    draw = lambda letter, m: jax.random.normal(stream(as_key(key), f"attention.{letter}"), (m, dim)) / math.sqrt(dim)  # noqa: E731
    return KINDS[name](draw("Q", rows), draw("K", rows), draw("V", dim), scale)
