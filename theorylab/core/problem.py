"""The three contracts: a `Problem` owns what is measured, a `Method` owns how to move, a `Flow` is an ordinary differential equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from theorylab.core import tree
from theorylab.core.keys import Key
from theorylab.core.module import Module
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError

X = TypeVar("X")
P = TypeVar("P", bound="Problem")
S = TypeVar("S")
Array = jax.Array


class Problem(Module):
    """Data and oracles; no algorithm inside, and no knowledge of which method runs on it."""

    def start(self, key: Key) -> Any:
        """A default starting point."""
        raise ArgumentError(f"{type(self).__name__} has no default starting point: pass x0")

    def metrics(self, x: Any) -> dict[str, Array]:
        """What every method is judged by at `x`: fixed names, numbers or arrays."""
        return {}

    def feed(self: P, batch: Any) -> P:
        """The same problem holding this batch of data; only streamed problems have it."""
        raise ArgumentError(f"{type(self).__name__} takes no streamed data: it has no feed(batch)")

    def default_method(self) -> Any:
        """The method that `solve` uses, chosen by class and shape."""
        raise ArgumentError(f"{type(self).__name__} names no default method: use iterate(problem, method)")

    def goal(self, tolerance: float) -> Any:
        """The stop rule that `solve` uses: by default the metric `residual` below `tolerance`; a problem with a proved bound overrides it."""
        from theorylab.core.stop import Below

        return Below("residual", tolerance)


class Method(Module, Generic[P, S]):
    """How to move. Holds hyper-parameters only; the state is whatever `init` returns."""

    def prepare(self, problem: P) -> Any:
        """A copy with what depends on the problem but not on the iterate (a factor, a Lipschitz constant). Made once per call."""
        return self

    def init(self, problem: P, x0: Any, *, key: Key) -> S:
        """The state at the starting point `x0`."""
        raise NotImplementedError(f"{type(self).__name__} must define init(problem, x0, *, key)")

    def step(self, problem: P, state: S, *, key: Key) -> S:
        """One step; pure."""
        raise NotImplementedError(f"{type(self).__name__} must define step(problem, state, *, key)")

    def value(self, problem: P, state: S) -> Any:
        """The iterate in `state`."""
        raise NotImplementedError(f"{type(self).__name__} must define value(problem, state)")

    def check(self, problem: P, x0: Any) -> None:
        """Raise if the run cannot begin at `x0`: called once by `iterate` outside compiled code, for each run, with a start that was given."""

    def measure(self, problem: P, state: S) -> dict[str, Array]:
        """The metrics of the problem at the iterate. A method whose state holds products that they need may override it to reuse them."""
        return problem.metrics(self.value(problem, state))

    def metrics(self, problem: P, state: S) -> dict[str, Array]:
        """Internal quantities and cumulative counters (`gradients`, `operator_evaluations`, `products`, `factorizations`, `samples`)."""
        return {}

    def cost(self, problem: P) -> dict[str, float]:
        """Cost of one step, by counter name, where it is a constant; recorded as cumulative columns."""
        return {}


class Event(NamedTuple):
    """Ends one trajectory with `status` at the first time where `test(t, y)` is true.

    Attributes:
        name: what happened, as in `"blow-up"`.
        test: boolean array of the time and the state; it is looked at after each accepted step.
        status: the end status.
    """

    name: str
    test: Callable[[Array, Any], Array]
    status: Status = Status.CONVERGED


class Flow(Module):
    """An ordinary differential equation y' = field(t, y)."""

    def lift(self, y0: Any) -> Any:
        """The initial state in the form that is integrated, with any leading axes; a state that has that form already is kept."""
        return y0

    def field(self, t: Array, y: Any) -> Any:
        """Time derivative, with the structure of `y`."""
        raise NotImplementedError(f"{type(self).__name__} must define field(t, y)")

    def metrics(self, t: Array, y: Any) -> dict[str, Array]:
        """What is recorded at each save time."""
        return {}

    def size(self, y: Any) -> Array:
        """What grows without bound at a blow-up; the Euclidean norm unless a flow knows better."""
        return tree.norm(y)

    def events(self) -> tuple[Event, ...]:
        """Events that end a trajectory."""
        return ()
