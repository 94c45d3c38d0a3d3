"""theorylab: theory and numerics on one JAX core.

Two verbs compute (`iterate`, `integrate`), one chooses for you (`solve`), one repeats (`sweep`), one judges (`fit_rate`, inside a
`claim`). The families bring the nouns: `theorylab.transformer_pde`.
"""

__version__ = "0.1.0"

from theorylab.core.iterate import iterate as iterate
from theorylab.core.iterate import solve as solve
from theorylab.core.iterate import whole as whole
from theorylab.core.module import Module as Module
from theorylab.core.module import choice as choice
from theorylab.core.module import count as count
from theorylab.core.module import number as number
from theorylab.core.module import size as size
from theorylab.core.problem import Event as Event
from theorylab.core.problem import Flow as Flow
from theorylab.core.problem import Method as Method
from theorylab.core.problem import Problem as Problem
from theorylab.core.rows import Rows as Rows
from theorylab.core.schedule import (
    Constant as Constant,
)
from theorylab.core.schedule import (
    Geometric as Geometric,
)
from theorylab.core.schedule import (
    Inverse as Inverse,
)
from theorylab.core.schedule import (
    InverseSqrt as InverseSqrt,
)
from theorylab.core.schedule import (
    Schedule as Schedule,
)
from theorylab.core.schedule import (
    Staircase as Staircase,
)
from theorylab.core.solution import History as History
from theorylab.core.solution import Solution as Solution
from theorylab.core.solution import Stats as Stats
from theorylab.core.solution import Status as Status
from theorylab.core.stop import And as And
from theorylab.core.stop import Below as Below
from theorylab.core.stop import Or as Or
from theorylab.core.stop import Stalled as Stalled
from theorylab.core.stop import Stop as Stop
from theorylab.core.store import load as load
from theorylab.core.stream import Batches as Batches
from theorylab.core.stream import Stream as Stream
from theorylab.core.stream import fold as fold
from theorylab.lab.claims import claim as claim
from theorylab.lab.compare import Comparison as Comparison
from theorylab.lab.compare import compare as compare
from theorylab.lab.evidence import Check as Check
from theorylab.lab.figures import figure as figure
from theorylab.lab.rates import RateFit as RateFit
from theorylab.lab.rates import fit_rate as fit_rate
from theorylab.runtime import enable_x64 as _enable_x64

_enable_x64()
