"""What the paper and its companion derivations say about attention on Gaussians and on tokens, measured."""

from theorylab.transformer_pde.claims import (
    blow_up as blow_up,
    energy as energy,
    growth as growth,
    limits as limits,
    mean_field as mean_field,
    relations as relations,
    structure as structure,
    support as support,
)
