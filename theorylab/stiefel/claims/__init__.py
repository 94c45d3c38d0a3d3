"""What the paper and its companion derivation say about the landing method, measured."""

from theorylab.stiefel.claims import (
    components as components,
    descent as descent,
    fields as fields,
    flows as flows,
    sampling as sampling,
    spectra as spectra,
    steps as steps,
)
