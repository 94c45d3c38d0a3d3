"""Top-K sparse softmax-gated Gaussian mixtures of experts: model and estimation."""

from theorylab.moe.em import EM as EM
from theorylab.moe.model import Draw as Draw, Mixture as Mixture, example as example, weyl_sample as weyl_sample
from theorylab.moe.moments import Statistics as Statistics, statistics as statistics
from theorylab.moe.newton import LikelihoodNewton as LikelihoodNewton, information as information
from theorylab.moe.problem import Likelihood as Likelihood
from theorylab.moe.regions import (
    Regions as Regions,
    boundaries as boundaries,
    plot as plot,
    plot_regions as plot_regions,
    region_masses as region_masses,
)
from theorylab.moe.starts import (
    best_start as best_start,
    dense_first as dense_first,
    kmeans as kmeans,
    near as near,
    random_responsibilities as random_responsibilities,
)
from theorylab.moe.streamed import StreamedEM as StreamedEM
