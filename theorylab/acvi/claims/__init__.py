"""What the papers and their companion derivations say about ACVI, measured."""

from theorylab.acvi.claims import barriers as barriers, fixed_mu as fixed_mu, gap_bounds as gap_bounds, rates as rates, steps as steps
