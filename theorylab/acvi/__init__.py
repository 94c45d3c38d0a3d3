"""ACVI: variational inequalities with general constraints, by an interior-point method on top of operator splitting; games, merits, baselines."""

from theorylab.acvi import games as games
from theorylab.acvi.acvi import ACVI as ACVI, ProjectedACVI as ProjectedACVI
from theorylab.acvi.barriers import (
    EntropyBarrier as EntropyBarrier,
    ExtendedLogBarrier as ExtendedLogBarrier,
    LogBarrier as LogBarrier,
    MuSchedule as MuSchedule,
)
from theorylab.acvi.baselines import (
    Extragradient as Extragradient,
    GoldenRatio as GoldenRatio,
    GradientDescentAscent as GradientDescentAscent,
    Lookahead as Lookahead,
    MirrorProx as MirrorProx,
    OptimisticGradient as OptimisticGradient,
    Popov as Popov,
)
from theorylab.acvi.cones import Cone as Cone
from theorylab.acvi.constraints import (
    Ball as Ball,
    Box as Box,
    ConstraintSet as ConstraintSet,
    Free as Free,
    HalfSpace as HalfSpace,
    Nonnegative as Nonnegative,
)
from theorylab.acvi.equality import (
    BlockSimplex as BlockSimplex,
    DenseEquality as DenseEquality,
    Equality as Equality,
    MatrixFree as MatrixFree,
    NoEquality as NoEquality,
)
from theorylab.acvi.games import (
    ball_bilinear as ball_bilinear,
    bilinear_quadrant as bilinear_quadrant,
    bilinear_simplex as bilinear_simplex,
    braess as braess,
    conditioned_bilinear as conditioned_bilinear,
    constrained_bilinear as constrained_bilinear,
    cournot as cournot,
    forsaken as forsaken,
    matrix_game as matrix_game,
    ratio_game as ratio_game,
    rotations as rotations,
    sparse_game as sparse_game,
    toy_gan as toy_gan,
)
from theorylab.acvi.implicit import smoothed_equilibrium as smoothed_equilibrium
from theorylab.acvi.inexact import InexactACVI as InexactACVI, InexactProjectedACVI as InexactProjectedACVI, Krylov as Krylov
from theorylab.acvi.interior import InteriorPoint as InteriorPoint
from theorylab.acvi.merit import (
    Certificate as Certificate,
    central_path as central_path,
    certificate as certificate,
    gap as gap,
    minty_gap as minty_gap,
    natural_residual as natural_residual,
    quantal_response as quantal_response,
    repair as repair,
    saddle_gap as saddle_gap,
)
from theorylab.acvi.pdhg import PrimalDualHybridGradient as PrimalDualHybridGradient
from theorylab.acvi.problem import (
    AffineVariationalInequality as AffineVariationalInequality,
    MatrixGame as MatrixGame,
    VariationalInequality as VariationalInequality,
)
from theorylab.acvi.projections import dykstra as dykstra, hildreth as hildreth, project_simplex as project_simplex
from theorylab.acvi.restarted import HalpernACVI as HalpernACVI
from theorylab.acvi.sets_general import Polyhedron as Polyhedron, Product as Product, Smooth as Smooth
