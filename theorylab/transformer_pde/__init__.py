"""The Transformer PDE on Gaussian measures: moment equations, closed forms, limits and blow-up, and the particles behind them."""

from theorylab.transformer_pde.attention import L2 as L2, Head as Head, Linear as Linear, Softmax as Softmax
from theorylab.transformer_pde.closed_forms import closed_form as closed_form, flow_map as flow_map
from theorylab.transformer_pde.closures import ClosureFlow as ClosureFlow, moment_closure as moment_closure
from theorylab.transformer_pde.clusters import (
    Clusters as Clusters,
    attention_rank as attention_rank,
    cluster_count as cluster_count,
    clusters as clusters,
    rescaled as rescaled,
)
from theorylab.transformer_pde.combined import FeedForward as FeedForward, Layered as Layered, Masked as Masked, MultiHead as MultiHead
from theorylab.transformer_pde.contract import Attention as Attention, Velocity as Velocity, velocity as velocity
from theorylab.transformer_pde.desingularized import Desingularized as Desingularized, Direction as Direction, last as last
from theorylab.transformer_pde.energy import energy as energy, interaction_energy as interaction_energy, lyapunov as lyapunov
from theorylab.transformer_pde.ensembles import random_attention as random_attention
from theorylab.transformer_pde.entropic import Sinkhorn as Sinkhorn
from theorylab.transformer_pde.flow import GaussianFlow as GaussianFlow
from theorylab.transformer_pde.gaussian import Cloud as Cloud, Gaussian as Gaussian, effective_rank as effective_rank, moments as moments
from theorylab.transformer_pde.layers import OfficialEuler as OfficialEuler, ResidualLayers as ResidualLayers
from theorylab.transformer_pde.mean_field import (
    MeanFieldError as MeanFieldError,
    mean_field_error as mean_field_error,
    velocity_error as velocity_error,
    wasserstein as wasserstein,
)
from theorylab.transformer_pde.oracles import (
    Limit as Limit,
    Regime as Regime,
    blow_up_time as blow_up_time,
    limit as limit,
    limits as limits,
    regime as regime,
)
from theorylab.transformer_pde.particles import Particles as Particles
from theorylab.transformer_pde.positions import (
    PositionFlow as PositionFlow,
    conditional_bures as conditional_bures,
    mixture_velocity as mixture_velocity,
)
from theorylab.transformer_pde.riccati import equilibrium as equilibrium
from theorylab.transformer_pde.spherical import Spherical as Spherical, equiangular_rate as equiangular_rate
from theorylab.transformer_pde.stability import (
    BlowUpLines as BlowUpLines,
    FrozenLines as FrozenLines,
    Stationarity as Stationarity,
    blow_up_lines as blow_up_lines,
    frozen_lines as frozen_lines,
    stationarity as stationarity,
)
from theorylab.transformer_pde.steering import Steering as Steering, steer as steer
from theorylab.transformer_pde.symbolic import Derivation as Derivation, derivations as derivations
from theorylab.transformer_pde.unnormalized import Exponential as Exponential, Sigmoid as Sigmoid
