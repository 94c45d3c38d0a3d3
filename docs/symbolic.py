"""The page of derivations: what computer algebra shows, and how far the compiled code is from it."""

from __future__ import annotations

from typing import Any

SEED, SAMPLES = 0, 8
INTRODUCTION = r"""Each statement is put into the definition it comes from and reduced to zero by SymPy. Its right-hand side is then evaluated with
30 digits at random numbers and compared with what the package computes in double precision; the difference is relative where the value is above one.

Velocities are the paper's; closed forms and the Sinkhorn formula are companion derivations. Notation: queries, keys and values $Q, K, V$, logit scale
$c$, $A = cK^\top Q$, $P = cK^\top K$, Sinkhorn temperature $\varepsilon$; tokens with the law $\mathcal N(\alpha, \Sigma)$ and the velocity
$\Gamma(x) = m + B(x - \alpha)$, so that $\alpha' = m$ and $\Sigma' = B\Sigma + \Sigma B^\top$. Matrices are $2 \times 2$ with symbols as entries
unless $d = 1$ is said; nothing in the steps depends on the size."""


def display(formula: str) -> str:
    """A displayed formula of arithmatex."""
    return f"$$\n{formula}\n$$"


def entry(one: Any) -> str:
    """Heading, statement, steps and the two checks of a derivation."""
    if not one.residual.is_zero_matrix:
        raise RuntimeError(f"the derivation {one.name} leaves the remainder {one.residual}")
    difference = one.compare(SEED, SAMPLES)
    code = ", ".join(f"`{name.strip()}`" for name in one.kernel.split(","))
    checks = (f"Remainder: zero in {len(one.residual)} {'entry' if len(one.residual) == 1 else 'entries'}. "
              f"Largest difference to {code} at {SAMPLES} random inputs: {difference:.1e}.")
    blocks = [f"## {one.name.replace('-', ' ')} {{ #{one.name} }}", display(one.statement), "Steps:", *map(display, one.steps), checks]
    return "\n\n".join(blocks)


def derivations() -> str:
    """The page."""
    from theorylab.transformer_pde import symbolic

    return "\n\n".join(["# Derivations", INTRODUCTION, *map(entry, symbolic.derivations())]) + "\n"
