"""Mixtures of any experts under any top-K gate: one protocol for both, one likelihood, one EM."""

from theorylab.moe.general.em import GeneralEM as GeneralEM
from theorylab.moe.general.experts import (
    Experts as Experts,
    LinearExperts as LinearExperts,
    PolynomialExperts as PolynomialExperts,
)
from theorylab.moe.general.gates import (
    CosineGate as CosineGate,
    Gate as Gate,
    QuadraticGate as QuadraticGate,
    SigmoidGate as SigmoidGate,
    SoftmaxGate as SoftmaxGate,
)
from theorylab.moe.general.likelihood import GeneralLikelihood as GeneralLikelihood
from theorylab.moe.general.mixture import GeneralMixture as GeneralMixture
from theorylab.moe.general.noise import NoisyGate as NoisyGate
from theorylab.moe.general.nonlinear import LogisticExperts as LogisticExperts, NeuralExperts as NeuralExperts
from theorylab.moe.general.starts import general_start as general_start
from theorylab.moe.general.student import StudentExperts as StudentExperts
