"""What the paper and its companion derivation say about estimates of the hypergradient, measured."""

from theorylab.hypergradient.claims import (
    baselines as baselines,
    charts as charts,
    descent as descent,
    family as family,
    identities as identities,
    orders as orders,
    references as references,
)
