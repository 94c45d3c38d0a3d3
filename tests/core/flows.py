"""The equations that the tests of `integrate` share, so that they compile few programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab.core.integrate import integrate

TRACES: list[str] = []
TIMES = np.linspace(0.0, 6.0, 13)


class Oscillator(tl.Flow):
    """Van der Pol with a force in time; the state is a tree. Counts its traces."""

    damping: Any = tl.number(1.0)

    def field(self, t: jax.Array, y: dict) -> dict:
        TRACES.append("Oscillator")
        return {"q": y["p"], "p": self.damping * (1 - y["q"] ** 2) * y["p"] - y["q"] + jnp.sin(t)}

    def metrics(self, t: jax.Array, y: dict) -> dict:
        return {"energy": (y["q"] ** 2 + y["p"] ** 2) / 2}


class Decay(tl.Flow):
    """y' = -rate y, which ends when y falls below `level` or, with another status, when time passes `limit`."""

    rate: Any = tl.number(1.0)
    level: Any = tl.number(0.0)
    limit: Any = tl.number(1e9)

    def field(self, t: jax.Array, y: jax.Array) -> jax.Array:
        return -self.rate * y

    def events(self) -> tuple[tl.Event, ...]:
        return (tl.Event("below", lambda t, y: y.max() < self.level), tl.Event("late", lambda t, y: t > self.limit, tl.Status.UNDECIDED))


class Tracking(tl.Flow):
    """y' = rate (cos t - y): stiff for a large rate."""

    rate: Any = tl.number(1.0)

    def field(self, t: jax.Array, y: jax.Array) -> jax.Array:
        return self.rate * (jnp.cos(t) - y)


def clock(t: jax.Array, y: dict) -> dict:
    return {"clock": t, "where": jnp.stack([y["q"], y["p"]])}


def start() -> dict:
    return {"q": jnp.asarray(2.0), "p": jnp.asarray(0.0)}


def oscillate(**options: Any) -> tl.Solution:
    return integrate(Oscillator(), start(), TIMES, record=clock, **options)
