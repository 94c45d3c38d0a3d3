"""theorylab: theory and numerics on one JAX core.

Two verbs compute (`iterate`, `integrate`), one chooses for you (`solve`), one repeats (`sweep`), one judges (`fit_rate`, inside a
`claim`). The families bring the nouns: `theorylab.transformer_pde`, `acvi`, `stiefel`,
`hypergradient` and `moe`.
"""

__version__ = "0.1.0"

from theorylab.core.integrate import integrate as integrate
from theorylab.core.iterate import iterate as iterate, solve as solve, whole as whole
from theorylab.core.module import Module as Module, choice as choice, count as count, number as number, size as size
from theorylab.core.problem import Event as Event, Flow as Flow, Method as Method, Problem as Problem
from theorylab.core.progress import Progress as Progress
from theorylab.core.psd import bures as bures
from theorylab.core.rows import Rows as Rows
from theorylab.core.schedule import (
    Constant as Constant,
    Cosine as Cosine,
    Geometric as Geometric,
    Inverse as Inverse,
    InverseSqrt as InverseSqrt,
    Schedule as Schedule,
    Staircase as Staircase,
)
from theorylab.core.solution import History as History, Solution as Solution, Stats as Stats, Status as Status
from theorylab.core.stop import Above as Above, And as And, Below as Below, Or as Or, Stalled as Stalled, Stop as Stop
from theorylab.core.store import load as load
from theorylab.core.stream import Batches as Batches, Stream as Stream, fold as fold
from theorylab.lab.claims import claim as claim
from theorylab.lab.compare import Comparison as Comparison, compare as compare
from theorylab.lab.evidence import Check as Check
from theorylab.lab.figures import figure as figure
from theorylab.lab.rates import RateFit as RateFit, fit_rate as fit_rate
from theorylab.lab.replicates import Replicates as Replicates, Table as Table, gather as gather
from theorylab.lab.sweep import sweep as sweep, sweep_grid as sweep_grid
from theorylab.runtime import enable_x64 as _enable_x64

_enable_x64()
