"""Top-K sparse softmax-gated Gaussian mixtures of experts: model, estimation, routing search, losses, rates, selection."""

from theorylab.moe.distances import (
    Estimate as Estimate,
    hellinger as hellinger,
    kullback_leibler as kullback_leibler,
    total_variation as total_variation,
)
from theorylab.moe.em import EM as EM
from theorylab.moe.exponent import (
    Certificate as Certificate,
    Exponent as Exponent,
    Rates as Rates,
    Witness as Witness,
    exponent as exponent,
    exponent_certificate as exponent_certificate,
    nontrivial_solution as nontrivial_solution,
    rates as rates,
    series_residuals as series_residuals,
)
from theorylab.moe.general import (
    CosineGate as CosineGate,
    Experts as Experts,
    Gate as Gate,
    GeneralEM as GeneralEM,
    GeneralLikelihood as GeneralLikelihood,
    GeneralMixture as GeneralMixture,
    LinearExperts as LinearExperts,
    LogisticExperts as LogisticExperts,
    NeuralExperts as NeuralExperts,
    NoisyGate as NoisyGate,
    PolynomialExperts as PolynomialExperts,
    QuadraticGate as QuadraticGate,
    SigmoidGate as SigmoidGate,
    SoftmaxGate as SoftmaxGate,
    StudentExperts as StudentExperts,
    general_start as general_start,
)
from theorylab.moe.identifiability import (
    CoactivationGraph as CoactivationGraph,
    Identifiability as Identifiability,
    admissible_multiplicities as admissible_multiplicities,
    coactivation_graph as coactivation_graph,
    identifiability as identifiability,
    null_directions as null_directions,
)
from theorylab.moe.intervals import Delta as Delta, Intervals as Intervals, Parameters as Parameters, confidence_intervals as confidence_intervals
from theorylab.moe.losses import align as align, voronoi_cells as voronoi_cells, voronoi_loss as voronoi_loss
from theorylab.moe.model import Draw as Draw, Mixture as Mixture, example as example, weyl_sample as weyl_sample
from theorylab.moe.moments import Statistics as Statistics, statistics as statistics
from theorylab.moe.newton import LikelihoodNewton as LikelihoodNewton, information as information
from theorylab.moe.polynomials import PolynomialSystem as PolynomialSystem, polynomial_system as polynomial_system
from theorylab.moe.problem import Likelihood as Likelihood
from theorylab.moe.regions import (
    Regions as Regions,
    boundaries as boundaries,
    plot as plot,
    plot_regions as plot_regions,
    region_masses as region_masses,
)
from theorylab.moe.routing import (
    Routing as Routing,
    RoutingSearch as RoutingSearch,
    best_run as best_run,
    perturbed as perturbed,
    scattered as scattered,
)
from theorylab.moe.scan import Scan as Scan, scan_breakpoints as scan_breakpoints
from theorylab.moe.selection import (
    Dendrogram as Dendrogram,
    OrderSelection as OrderSelection,
    aic as aic,
    bic as bic,
    degrees_of_freedom as degrees_of_freedom,
    dendrogram as dendrogram,
    merge as merge,
    select_order as select_order,
    split as split,
)
from theorylab.moe.starts import (
    best_start as best_start,
    dense_first as dense_first,
    kmeans as kmeans,
    near as near,
    random_responsibilities as random_responsibilities,
)
from theorylab.moe.streamed import StreamedEM as StreamedEM
from theorylab.moe.study import rate_study as rate_study
