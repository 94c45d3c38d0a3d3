"""Hypergradients: bilevel problems, estimators of the implicit-function gradient, and what their errors are."""

from theorylab.hypergradient.bilevel import AutodiffLinearization as AutodiffLinearization, Bilevel as Bilevel
from theorylab.hypergradient.cleaning import DataCleaning as DataCleaning
from theorylab.hypergradient.contract import BilevelProblem as BilevelProblem, InnerProblem as InnerProblem, Linearization as Linearization
from theorylab.hypergradient.inner import (
    AcceleratedGradient as AcceleratedGradient,
    GradientDescent as GradientDescent,
    Newton as Newton,
    reference as reference,
)
from theorylab.hypergradient.quasi_newton import LBFGS as LBFGS, Optimistix as Optimistix
from theorylab.hypergradient.selection import (
    LogisticSelection as LogisticSelection,
    RidgeSelection as RidgeSelection,
    SoftmaxSelection as SoftmaxSelection,
    standardize as standardize,
)
