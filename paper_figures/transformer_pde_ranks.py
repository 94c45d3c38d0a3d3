"""Histograms of the rank of the limit for K = -Q, by the published scheme, by the limit with the published threshold, and as it is.

All draws and settings are the published ones. The procedure behind the published histograms counts eigenvalues above 0.1 where the Euler scheme
stops; the scheme replaces negative eigenvalues, and a run that does not converge is repeated from the next start. `published` repeats all that. Its
softmax runs with random V are slow, so the preset `paper` does them for the first draws only where the plot says so; `full` does all.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from theorylab import transformer_pde as tp
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS, figsize

numbers: ModuleType = load_module(Path(__file__).with_name("_ranks.py"))
PAPER = "A Unified Perspective on the Dynamics of Deep Transformers"
LARGE = 0.1                                                                # the published threshold of an eigenvalue that counts
VALUES = {"identity": "$V = I$", "random": "$V$ random"}
KINDS = {"softmax": "softmax", "l2": "L2"}
SEEDS = {"softmax": 26, "l2": 27}                                          # of random values
# by kind, values and dimension: step of the scheme, residual at which it stops, most steps
SETTINGS = {"softmax": {"identity": {3: (0.09, 1e-4, 60000), 4: (0.05, 1e-4, 60000), 5: (0.02, 1e-4, 60000)},
                        "random": {3: (0.09, 5e-5, 90000), 4: (0.06, 5e-5, 90000), 5: (0.02, 5e-5, 90000)}},
            "l2": {"identity": {3: (0.09, 1e-4, 60000), 4: (0.06, 1e-4, 60000), 5: (0.02, 1e-4, 60000)},
                   "random": dict.fromkeys((3, 4, 5), (0.15, 5e-5, 50000))}}
OVERLAYS = {"published": ("published scheme", COLORS["orange"]), "limit": ("limit, eigenvalues above 0.1", COLORS["sky"]),
            "rank": ("rank of the limit", COLORS["blue"])}
MOST_UNDECIDED = 0.1
# numbers of draws of rank 0, 1, 2, 3 (companion tables)
SCHEME = {"softmax": {"identity": {3: (3, 48, 49, 0), 4: (11, 47, 42, 0), 5: (0, 5, 54, 41)},
                      "random": {3: (4, 64, 31, 1), 4: (21, 68, 11, 0), 5: (0, 25, 64, 11)}},
          "l2": {"identity": {3: (0, 32, 68, 0), 4: (0, 31, 69, 0), 5: (0, 0, 46, 54)},
                 "random": {3: (0, 50, 50, 0), 4: (4, 64, 32, 0), 5: (0, 22, 68, 10)}}}
EXACT = {3: (1, 31, 68, 0), 4: (0, 32, 68, 0), 5: (0, 0, 46, 54)}
CLEAR = {"softmax": {3: (1, 27, 71, 0), 4: (0, 29, 71, 0), 5: (0, 0, 43, 57)}, "l2": {3: (1, 28, 71, 0), 4: (0, 30, 70, 0), 5: (0, 0, 43, 57)}}


def panel(data, kind, values, d):
    """The arrays of one histogram as attributes."""
    start = f"{kind}_{values}_{d}_"
    return SimpleNamespace(**{name.removeprefix(start): a for name, a in data.items() if name.startswith(start)})


def counts(one):
    """Numbers of draws by rank, for each overlay; draws whose limit is undecided do not count in the last two."""
    decided = one.regime == tp.Regime.FROZEN
    ranks = {"published": (one.scheme_eigenvalues > LARGE).sum(1), "limit": (np.linalg.eigvalsh(one.cov) > LARGE).sum(1)[decided],
             "rank": one.rank[decided]}
    return {name: np.bincount(rank, minlength=one.cov.shape[-1] + 1) for name, rank in ranks.items()}


@figure("transformer_pde/limiting-rank", source=f"{PAPER}, histograms of the rank",
        quick={"kinds": ["softmax"], "values": ["identity"], "dims": [3], "draws": 20, "slow": [20]},
        paper={"kinds": ["softmax", "l2"], "values": ["identity", "random"], "dims": [3, 4, 5], "draws": 100, "slow": [100, 40, 15]},
        full={"kinds": ["softmax", "l2"], "values": ["identity", "random"], "dims": [3, 4, 5], "draws": 100, "slow": [100, 100, 100]},
        caption=r"$K = -Q$ with $\lfloor d/2 \rfloor$ rows, random starts: rank of the limit. The published procedure (orange) counts eigenvalues "
                r"above 0.1 where its Euler scheme stops; the same threshold on the limit itself gives the second bar. The true rank (blue) is "
                r"$d - \operatorname{rank} Q = \lceil d/2 \rceil$ in every draw: eigenvalues of the limit lie below any threshold, and where the "
                "first steps of the scheme leave the cone, the repair of negative eigenvalues destroys rank for good.")
class LimitingRank:
    """Figure F: 100 draws of each dimension."""

    @staticmethod
    def compute(progress, kinds, values, dims, draws, slow):
        data, done = {}, 0
        progress.start("panels", 2 * len(kinds) * len(values) * len(dims))
        for kind, value, d in itertools.product(kinds, values, dims):
            given = numbers.draws(d, SEEDS[kind] if value == "random" else None)
            tried = slow[d - 3] if (kind, value) == ("softmax", "random") else draws
            found = numbers.published(kind, given, tried, *SETTINGS[kind][value][d])
            progress.update(done := done + 1, f"{KINDS[kind]}, {value}, dimension {d}, published scheme")
            heads = numbers.heads(kind, given.Q[:draws], given.V[:draws])
            if value == "identity" and kind == "softmax":                 # a number as V has a closed form
                heads = jax.vmap(lambda head: tp.Softmax(head.Q, head.K, 1.0, scale=head.scale))(heads)
            limit = numbers.limits(heads, tp.Gaussian(jnp.zeros((draws, d)), given.starts[:draws]))
            found |= {"cov": limit.cov, "rank": limit.rank, "regime": limit.regime, "error": limit.error}
            progress.update(done := done + 1, f"{KINDS[kind]}, {value}, dimension {d}")
            data |= {f"{kind}_{value}_{d}_{name}": np.asarray(array) for name, array in found.items()}
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        dims = [d for d in numbers.DIMS if f"softmax_identity_{d}_rank" in data]
        rows = [(kind, values) for kind in KINDS for values in VALUES if f"{kind}_{values}_{dims[0]}_rank" in data]
        picture, axes = plt.subplots(len(rows), len(dims), figsize=figsize(2, 0.06 + 0.23 * len(rows)), sharey=True, squeeze=False)
        for (kind, values), row in zip(rows, axes, strict=True):
            for ax, d in zip(row, dims, strict=True):
                one = panel(data, kind, values, d)
                for i, (name, number) in enumerate(counts(one).items()):
                    label, color = OVERLAYS[name]
                    ax.bar(np.arange(d + 1) + 0.3 * (i - 1), number, 0.28, color=color, label=label)
                    for rank in np.flatnonzero(number):
                        ax.text(rank + 0.31 * (i - 1), number[rank] + 1, str(number[rank]), ha="center", va="bottom", fontsize=5, color="0.2")
                undecided, tried = int((one.regime != tp.Regime.FROZEN).sum()), len(one.scheme_steps)
                notes = [f"{undecided} undecided"] * (undecided > 0) + [f"scheme: first {tried}"] * (tried < len(one.rank))
                ax.text(0.02, 0.98, "\n".join(notes), transform=ax.transAxes, ha="left", va="top", fontsize="x-small", color="0.35")
                ax.set(xticks=range(d + 1), title=f"{KINDS[kind]}, {VALUES[values]}, $d = {d}$")
                ax.margins(y=0.1)
            row[0].set_ylabel(f"draws of {len(one.rank)}")
        for ax in axes[-1]:
            ax.set_xlabel("rank")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside lower center", ncols=3)
        return picture

    @staticmethod
    def expect(check, data, kinds, values, dims, draws, slow):
        for kind, value, d in itertools.product(kinds, values, dims):
            one, half, what = panel(data, kind, value, d), -(-d // 2), f"{KINDS[kind]}, {VALUES[value]}, d = {d}"
            found, decided = counts(one), one.regime == tp.Regime.FROZEN
            undecided = int((~decided).sum())
            check.true(f"{what}: every limit that is decided has rank {half}", one.rank[decided] == half)
            check.below(f"{what}: draws that are not decided", undecided, 0 if value == "identity" else MOST_UNDECIDED * draws)
            given = numbers.draws(d, None)
            if value == "identity":
                seen = given.starts[:draws] @ np.swapaxes(given.Q[:draws], 1, 2)
                schur = given.starts[:draws] - seen @ np.linalg.solve(given.Q[:draws] @ seen, np.swapaxes(seen, 1, 2))
                check.below(f"{what}: distance of the limits from the Schur complements", np.abs(one.cov - schur), 1e-7)
            else:
                blind = np.abs(given.Q[:draws] @ one.cov)[decided].max((1, 2)) / np.trace(one.cov[decided], axis1=1, axis2=2)
                check.below(f"{what}: Q Sigma over the trace, of the limits", blind, 1e-4)
            if draws < numbers.COUNT:
                continue
            table = EXACT[d] if value == "identity" else CLEAR[kind][d]
            gap = np.abs(found["limit"][:4] - np.array(table)[: d + 1]).max()
            # a few draws with random V have an eigenvalue of V near zero, and were followed to t = 1e9 only for the table
            check.below(f"{what}: counts of the limits, distance from the table", gap, 0 if value == "identity" else undecided + 1)
            if len(one.scheme_steps) == draws:
                check.equal(f"{what}: counts of the published procedure", found["published"][:4], np.array(SCHEME[kind][value][d])[: d + 1], 0)
