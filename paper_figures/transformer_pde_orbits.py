"""Beyond the figures of the paper: one orbit for all variants of a head with one row of keys, and the stops of the published scheme in exact time."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from theorylab import transformer_pde as tp
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS, figsize, look

numbers: ModuleType = load_module(Path(__file__).with_name("_panels.py"))
COMPANION = "Beyond the paper (companion derivation)"

# ------------------------------------------------------------------------------------------------ orbits

FORMS = {"saddle": ("$V$ with eigenvalues $1$ and $-1/2$", np.array([[0.8, 0.5], [0.52, -0.3]])),
         "node": ("$V$ positive", np.array([[1.1, -0.35], [-0.35, 0.5]])),
         "focus": ("$V$ with complex eigenvalues", np.array([[0.3, -1.0], [1.0, 0.3]]))}
KEY = np.array([1.0, 0.0])                                                 # q: Sigma moves while q'z is not zero
CLOCKS = {"softmax": ("softmax", "o", COLORS["vermilion"]), "l2": ("L2", "s", COLORS["blue"]), "sinkhorn": ("Sinkhorn", "^", COLORS["green"])}
START = np.array([[1.0, 0.6], [0.6, 0.8]])
TICKS = (0.25, 0.5, 1.0, 2.0, 4.0)
SPAN, PLACES = 3.0, 601                                                    # of the parameter tau along the shown orbits


def head(kind, V, sign):
    """One row of queries and keys, K = q' and Q = sign q'."""
    q = KEY[None]
    return {"softmax": tp.Softmax, "l2": tp.L2, "sinkhorn": tp.Sinkhorn}[kind](sign * q, q, V)


def orbit(V, y, tau):
    """e^(tau V) y, shape (len(tau), 2)."""
    from scipy.linalg import expm

    return np.array([expm(t * V) @ y for t in tau])


def speed(kind, s, sign):
    """The clock of a variant, dtau / dt at q' Sigma q = s."""
    return sign * s * {"softmax": 1.0 + 0 * s, "l2": 2 / (1 + 2 * s), "sinkhorn": 2 / (1 + np.sqrt(1 + 4 * s**2))}[kind]


@jax.jit
def derivatives(head, covs):
    """The derivative of each covariance under a head."""

    def one(cov):
        moved = head.velocity(jnp.zeros(2), cov).matrix @ cov
        return moved + moved.T

    return jax.vmap(one)(covs)


@figure("transformer_pde/rank-one-orbits", source=f"{COMPANION}, heads with one row of keys", quick={"fan": 8}, paper={"fan": 16},
        caption=r"Heads with one row of keys and $Q = \pm K = \pm q^\top$: $\Sigma(t) = \Sigma_0 + (zz^\top - z_0z_0^\top)/q^\top z_0$ with "
                r"$z = e^{\tau V}z_0$, $z_0 = \Sigma_0 q$, so softmax, L2 and Sinkhorn move along one curve, each with its own clock $\tau(t)$. "
                r"(a, b, c) Curves of $z$ for three $V$; they end on the line $q^\top z = 0$ (dashed), where tokens are at rest. On the black curve, "
                r"marks are the times $1/4, 1/2, 1, 2, 4$ of each variant, forward ($Q = K$, filled) and backward ($Q = -K$, open). (d) The clocks "
                "of (b).")
class RankOneOrbits:
    """Phase portraits of exact orbits, with the clocks of three variants."""

    @staticmethod
    def compute(progress, fan):
        progress.start("portraits", len(FORMS))
        data, y0 = {}, START @ KEY
        s0 = KEY @ y0
        for i, (name, (_, V)) in enumerate(FORMS.items()):
            angles = np.linspace(-np.pi / 2, np.pi / 2, fan + 2)[1:-1]
            tau = np.linspace(-8, 8, 1601)
            data[f"{name}_fan"] = np.array([orbit(V, 1.3 * np.array([np.cos(a), np.sin(a)]), tau) for a in angles])
            for sign, side in ((1, "forward"), (-1, "backward")):
                along = sign * np.linspace(0, SPAN, PLACES)
                z = orbit(V, y0, along)
                h = z @ KEY
                stop = int(np.argmax(h <= 0)) if (h <= 0).any() else PLACES     # behind it the line of rest is crossed
                along, z, h = along[:stop], z[:stop], h[:stop]
                covs = START + (z[:, :, None] * z[:, None, :] - np.outer(y0, y0)) / s0
                tangent = (V @ z[:, :, None] * z[:, None, :] + z[:, :, None] * (V @ z[:, :, None])[:, None, :, 0]) / s0
                data |= {f"{name}_{side}_tau": along, f"{name}_{side}_z": z}
                for kind in CLOCKS:
                    rate = np.abs(speed(kind, h**2 / s0, sign))
                    slow = 1 / rate                                         # t is its integral, by Simpson's rule on pairs of intervals
                    middle = np.abs(speed(kind, (orbit(V, y0, (along[1:] + along[:-1]) / 2) @ KEY) ** 2 / s0, sign))
                    steps = np.abs(np.diff(along)) * (slow[1:] + slow[:-1] + 4 / middle) / 6
                    data[f"{name}_{side}_{kind}_time"] = np.pad(steps.cumsum(), (1, 0))
                    moved = np.asarray(derivatives(head(kind, V, sign), padded(covs)))[:stop]
                    expected = speed(kind, h**2 / s0, sign)[:, None, None] * tangent
                    data[f"{name}_{side}_{kind}_error"] = np.abs(moved - expected).max((1, 2)) / (1 + np.abs(expected).max((1, 2)))
            progress.update(i + 1, name)
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(2, 2, figsize=figsize(2, 0.86))
        for ax, letter, (name, (title, _)) in zip(axes.flat, "abc", FORMS.items(), strict=False):
            for path in data[f"{name}_fan"]:
                inside = path @ KEY > 0
                middle = len(path) // 2
                after = middle + np.argmax(~np.append(inside[middle:], False))
                before = middle - np.argmax(~np.append(inside[middle::-1], False)) + 1
                ax.plot(*path[before:after].T, color="0.72", linewidth=0.7, linestyle="-")
            for side in ("backward", "forward"):
                ax.plot(*data[f"{name}_{side}_z"].T, color=COLORS["black"], linewidth=1.1, linestyle="-")
                for kind, (_, marker, color) in CLOCKS.items():
                    at = [t for t in TICKS if t <= data[f"{name}_{side}_{kind}_time"][-1]]
                    place = [np.interp(at, data[f"{name}_{side}_{kind}_time"], column) for column in data[f"{name}_{side}_z"].T]
                    ax.plot(*place, marker=marker, linestyle="none", color=color, markersize=3.5, markeredgewidth=0.8,
                            markerfacecolor=color if side == "forward" else "white", zorder=4)
            ax.plot(*data[f"{name}_forward_z"][0], marker="x", color=COLORS["black"], markersize=5, zorder=5)
            ax.axvline(0, color=COLORS["purple"], linewidth=1.0, linestyle="--")
            if letter == "a":
                for label, marker, color in CLOCKS.values():
                    ax.plot([], [], marker=marker, color=color, linestyle="none", label=label)
                ax.legend(loc="upper right", ncols=3, handletextpad=0.1, columnspacing=1.0)
            ax.set(xlim=(-0.15, 3.2), ylim=(-2, 2.4), xlabel="$z_1 = q^\\top z$", ylabel="$z_2$", title=f"({letter}) {title}")
        last = axes[1, 1]
        for i, (kind, (label, _, color)) in enumerate(CLOCKS.items()):
            for side in ("backward", "forward"):
                last.plot(data[f"node_{side}_{kind}_time"], data[f"node_{side}_tau"], color=color, linestyle=look(i)["linestyle"],
                          label=label if side == "forward" else None)
        last.axhline(0, color="0.6", linewidth=0.6, linestyle="-")
        last.set(xlim=(0, 4), xlabel="time $t$", ylabel=r"$\tau$", title="(d) clocks of (b): forward above, backward below")
        last.legend()
        return picture

    @staticmethod
    def expect(check, data, fan):
        from scipy.linalg import expm

        for kind, (label, _, _) in CLOCKS.items():
            errors = np.concatenate([data[name] for name in data if name.endswith(f"_{kind}_error")])
            check.below(f"{label}: its velocity on the curve against the tangent times its clock", errors, 1e-12)
        y0 = START @ KEY
        for name, (_, V) in FORMS.items():
            for sign, side in ((1, "forward"), (-1, "backward")):
                for kind in ("softmax", "l2"):
                    time = data[f"{name}_{side}_{kind}_time"]
                    at = min(1.0, 0.5 * time[-1])
                    exact = tp.closed_form(tp.GaussianFlow(head(kind, V, sign)), tp.Gaussian(np.zeros(2), START), np.array([at])).cov[0]
                    z = expm(np.interp(at, time, data[f"{name}_{side}_tau"]) * V) @ y0
                    cov = START + (np.outer(z, z) - np.outer(y0, y0)) / (KEY @ y0)
                    check.below(f"{name}, {side}, {kind}: distance from the closed form at t = {at:.2g}", np.abs(cov - np.asarray(exact)), 1e-3)


def padded(covs):
    """All curves in one shape, so that one compiled program serves them."""
    return np.pad(covs, ((0, PLACES - len(covs)), (0, 0), (0, 0)), mode="edge")


# ------------------------------------------------------------------------------------------------ stops


@figure("transformer_pde/published-stops", source=f"{numbers.PAPER}, explosion and divergence; exact times added",
        quick={"starts": 100}, paper={"starts": 1184},
        caption=r"Where the published scheme stops (trace above 1000), against what the covariance does. (a) Starts and weights of the published "
                "explosion: time of the stop over the exact blow-up time, which it exceeds by up to 14 %; two heads with a five times smaller step "
                "by up to 4 %. (b) L2 with the weights of the panel with both behaviors, starts whose trace passes 500: all converge. The scheme "
                "calls six of them diverged, though one never reaches 1000 (dotted).")
class PublishedStops:
    """Stops of the scheme of Figures D and E in exact time."""

    @staticmethod
    def compute(progress, starts):
        progress.start("panels", 3)
        states, data = numbers.grid(40, 1.0, starts), {}
        for i, (kind, step) in enumerate({"softmax": 0.01, "multihead": 0.002}.items()):
            attention = numbers.attention(kind, numbers.GROWTH_Q, numbers.GROWTH_K, np.eye(2))
            found = numbers.follow(attention, states, normalized=True) | numbers.published(attention, states, step, 1e-5, 1e3, 50000)
            data |= {f"{kind}_blow_up_time": found["blow_up_time"], f"{kind}_stop": step * found["scheme_count"], f"{kind}_how": found["scheme_stop"]}
            progress.update(i + 1, kind)
        attention = numbers.attention("l2", numbers.MIXED_Q, numbers.MIXED_K, numbers.MIXED_V)
        times = tuple(np.geomspace(0.1, 1e3, 241))
        found = numbers.follow(attention, numbers.grid(30, 1.0, 648), normalized=True, times=times)
        chosen = found["traces_at"].max(1) > 500
        how = numbers.published(attention, found["start"][chosen], 0.002, 1e-4, 1e3, 50000)["scheme_stop"]
        progress.update(3, "l2")
        return data | {"times": np.array(times), "traces": found["traces_at"][chosen], "how": how, "status": found["status"]}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.42))
        for i, (kind, label) in enumerate({"softmax": "softmax, step 0.01", "multihead": "two heads, step 0.002"}.items()):
            time = data[f"{kind}_blow_up_time"]
            left.semilogx(time, data[f"{kind}_stop"] / time, marker=".", markersize=2.5, linestyle="none", color=look(i)["color"], label=label,
                          rasterized=True)
        left.axhline(1, color="0.5", linewidth=0.7, linestyle="-")
        left.set(xlabel="exact blow-up time $t^*$", ylabel="time of the published stop, over $t^*$", title="(a) explosion")
        left.legend(markerscale=3)
        right.axhline(1e3, color="0.5", linewidth=0.8, linestyle=":")
        names = {-1: ("the scheme calls it diverged", COLORS["blue"]), 1: ("the scheme converges", COLORS["orange"])}
        for trace, how in zip(data["traces"], data["how"], strict=True):
            name, color = names.get(int(how), ("the scheme does not stop", "0.5"))
            right.loglog(data["times"], trace, color=color, linewidth=0.9, linestyle="-", label=name)
        shown = dict(zip(*right.get_legend_handles_labels()[::-1], strict=True))
        right.legend(shown.values(), shown.keys(), loc="upper left")
        right.set(xlabel="time", ylabel=r"$\mathrm{tr}\,\Sigma$", title="(b) L2: called diverged, and convergent")
        return picture

    @staticmethod
    def expect(check, data, starts):
        for kind, bounds in {"softmax": (1.005, 1.145), "multihead": (0.99, 1.04)}.items():
            check.true(f"{kind}: every run stops as an explosion", data[f"{kind}_how"] == -1)
            check.between(f"{kind}: stop over blow-up time", data[f"{kind}_stop"] / data[f"{kind}_blow_up_time"], *bounds)
        check.between("softmax: median of the stop over the blow-up time", np.median(data["softmax_stop"] / data["softmax_blow_up_time"]), 1.05, 1.1)
        numbers.number_of(check, "l2: runs that come to rest", data["status"] == 1, len(data["status"]))
        numbers.number_of(check, "l2: runs that the published scheme calls diverged", data["how"] == -1, 6)
        numbers.number_of(check, "l2: starts whose trace does pass 1000", data["traces"].max(1) > 1e3, 5)
