"""Hypergradients: bilevel problems, estimators of the implicit-function gradient with their error theory, certificates and outer methods."""

from theorylab.hypergradient.analysis import (
    EfficiencyConstant as EfficiencyConstant,
    PredictedError as PredictedError,
    efficiency_constant as efficiency_constant,
    predicted_error as predicted_error,
    value_correction as value_correction,
)
from theorylab.hypergradient.baselines import JacobianFree as JacobianFree, Neumann as Neumann, OneStep as OneStep, Unrolled as Unrolled
from theorylab.hypergradient.bilevel import AutodiffLinearization as AutodiffLinearization, Bilevel as Bilevel
from theorylab.hypergradient.bounds import certificate as certificate
from theorylab.hypergradient.cleaning import DataCleaning as DataCleaning
from theorylab.hypergradient.contract import BilevelProblem as BilevelProblem, InnerProblem as InnerProblem, Linearization as Linearization
from theorylab.hypergradient.curves import (
    ErrorCurve as ErrorCurve,
    Order as Order,
    check_super_efficiency as check_super_efficiency,
    error_curve as error_curve,
)
from theorylab.hypergradient.estimators import (
    Estimator as Estimator,
    Hypergradient as Hypergradient,
    NewtonPoint as NewtonPoint,
    OnePoint as OnePoint,
    Plain as Plain,
    Polish as Polish,
    Preconditioned as Preconditioned,
    hypergradient as hypergradient,
)
from theorylab.hypergradient.hessian_free import BOME as BOME, F2SA as F2SA, PZOBO as PZOBO
from theorylab.hypergradient.implicit import implicit as implicit
from theorylab.hypergradient.inner import (
    AcceleratedGradient as AcceleratedGradient,
    GradientDescent as GradientDescent,
    Newton as Newton,
    StochasticGradient as StochasticGradient,
    reference as reference,
)
from theorylab.hypergradient.linear import (
    CG as CG,
    GMRES as GMRES,
    LU as LU,
    Cholesky as Cholesky,
    LinearSolver as LinearSolver,
    NeumannSeries as NeumannSeries,
    Solved as Solved,
    Work as Work,
)
from theorylab.hypergradient.nested import (
    BSA as BSA,
    MRBO as MRBO,
    SUSTAIN as SUSTAIN,
    TTSA as TTSA,
    VRBO as VRBO,
    AmIGO as AmIGO,
    StocBiO as StocBiO,
)
from theorylab.hypergradient.outer import (
    InnerCertificate as InnerCertificate,
    InnerEstimate as InnerEstimate,
    InnerResidual as InnerResidual,
    InnerRule as InnerRule,
    OuterDescent as OuterDescent,
)
from theorylab.hypergradient.plan import CorrectionPlan as CorrectionPlan, plan_correction as plan_correction
from theorylab.hypergradient.quasi_newton import LBFGS as LBFGS, Optimistix as Optimistix
from theorylab.hypergradient.reparametrize import Reparametrized as Reparametrized
from theorylab.hypergradient.selection import (
    LogisticSelection as LogisticSelection,
    RidgeSelection as RidgeSelection,
    SoftmaxSelection as SoftmaxSelection,
    standardize as standardize,
)
from theorylab.hypergradient.simulated import simulated as simulated
from theorylab.hypergradient.stochastic import FSLA as FSLA, SABA as SABA, SOBA as SOBA, SRBA as SRBA
