"""What the papers and their companion derivations say about top-K mixtures of experts, measured."""

from theorylab.moe.claims import (
    distances as distances,
    estimation as estimation,
    exponents as exponents,
    gate as gate,
    inference as inference,
    rates as rates,
)
