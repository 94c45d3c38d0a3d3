"""theorylab: one JAX core, five families of solvers."""

__version__ = "0.1.0"

from theorylab.runtime import enable_x64

enable_x64()

from theorylab.core.iterate import iterate as iterate, solve as solve, whole as whole
from theorylab.core.module import Module as Module, choice as choice, count as count, number as number, size as size
from theorylab.core.problem import Event as Event, Flow as Flow, Method as Method, Problem as Problem
from theorylab.core.solution import History as History, Solution as Solution, Stats as Stats, Status as Status
from theorylab.core.stop import And as And, Below as Below, Or as Or, Stalled as Stalled
