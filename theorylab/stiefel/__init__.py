"""Optimization over X'BX = I without retractions: the landing method, its problems, and B known only through samples."""

from theorylab.stiefel.baselines import (
    PCAL as PCAL,
    PLAM as PLAM,
    GeneralizedHebbian as GeneralizedHebbian,
    GenOja as GenOja,
    QuadraticPenalty as QuadraticPenalty,
)
from theorylab.stiefel.cca import CCA as CCA, MultiviewCCA as MultiviewCCA
from theorylab.stiefel.certificate import Certificate as Certificate, certificate as certificate
from theorylab.stiefel.closed_forms import Exact as Exact, closed_form as closed_form
from theorylab.stiefel.descent import RiemannianDescent as RiemannianDescent, RollingRiemannian as RollingRiemannian
from theorylab.stiefel.eigen import GEVP as GEVP, LDA as LDA
from theorylab.stiefel.fields import (
    landing_field as landing_field,
    normal_gradient as normal_gradient,
    normal_newton_schulz as normal_newton_schulz,
    plam as plam,
    relative as relative,
    relative_solved as relative_solved,
    riemannian as riemannian,
    two_sample_field as two_sample_field,
    u_statistic_field as u_statistic_field,
)
from theorylab.stiefel.ica import ICA as ICA
from theorylab.stiefel.implicit import SolutionMap as SolutionMap, solution_map as solution_map
from theorylab.stiefel.landing import Landing as Landing
from theorylab.stiefel.moments import Moments as Moments, add_moments as add_moments, moments as moments
from theorylab.stiefel.operators import Gram as Gram, Implicit as Implicit, Population as Population
from theorylab.stiefel.polish import polish as polish
from theorylab.stiefel.problem import Procrustes as Procrustes, StiefelProblem as StiefelProblem
from theorylab.stiefel.quantities import amari_distance as amari_distance, infeasibility as infeasibility, merit as merit, multiplier as multiplier
from theorylab.stiefel.retractions import retract as retract
from theorylab.stiefel.safe_step import safe_step_size as safe_step_size
from theorylab.stiefel.stochastic import StochasticLanding as StochasticLanding
