"""Beyond the figures of the paper: tokens against their mean field, a map of regimes, and networks of finite depth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.lab.figures import figure
from theorylab.lab.rates import fit_rate
from theorylab.lab.style import COLORS, figsize, look, slope_triangle

COMPANION = "Beyond the paper (companion derivation)"


def rotation(degrees):
    """The rotation by an angle."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s], [s, c]])


# ------------------------------------------------------------------------------------------------ particles

LEVELS = (0.3, 0.6, 1.2, 2.4, 4.8)
LAYERS, STEP = 10, 0.1
FORM = rotation(30) @ np.diag([1.0, -0.5]) @ rotation(30).T                # A is a multiple of this, of norm one, and Sigma is the identity


@jax.jit
def square_error(head, clouds, weights, asked):
    """The mean square over `asked` of the error of the velocity of tokens with these weights, for each cloud."""
    exact = tp.velocity(head, tp.Gaussian.standard(2))

    def one(points):
        moved = head.token_velocity(points, weights, queries=asked.points)[0]
        return (asked.weights * ((moved - exact.mean - asked.points @ exact.matrix.T) ** 2).sum(1)).sum()

    return jax.vmap(one)(clouds)


def weights_of(count, most):
    """Equal weights of the first `count` of `most` tokens: one compiled program then serves all counts."""
    return np.where(np.arange(most) < count, 1 / count, 0.0)


def clouds_of(key, runs, most):
    """Samples of the standard Gaussian, shape (runs, most, 2)."""
    return np.asarray(tp.Gaussian.standard(2).sample(runs * most, key=key).points).reshape(runs, most, 2)


def wasserstein(x, y):
    """The exact distance W_2 of two clouds of equally many tokens, which is an assignment."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    cost = cdist(x, y, "sqeuclidean")
    return np.sqrt(cost[linear_sum_assignment(cost)].mean())


@figure("transformer_pde/mean-field-rate", source=f"{COMPANION}, mean-field limit",
        quick={"counts": [100, 200, 400], "repeats": 12, "coupled": [50, 100, 200], "runs": 8},
        paper={"counts": [100, 400, 1600, 6400], "repeats": 40, "coupled": [50, 100, 200, 400, 800], "runs": 12},
        caption=r"Softmax tokens against the moment equations of their Gaussian, $d = 2$, $\Sigma_0 = I$. (a) $V = I$: root mean square error of "
                r"the velocity from $n$ tokens. It falls like $n^{-1/2}$ while $\|A\| < 1/\sqrt 2$, where the weights $e^{x^\top A^\top y}$ have a "
                r"variance that is finite on average, and hardly at all for large $\|A\|$. (b) A network of 10 layers with $V = -I$, $\|A\| = 0.3$: "
                "exact Wasserstein distance $W_2$ of its tokens to the same starts moved by the mean field and to as many fresh samples of the "
                "Gaussian, and the error of their covariance.")
class MeanFieldRate:
    """Slopes of the mean-field error for several sizes of the logits."""

    @staticmethod
    def compute(progress, counts, repeats, coupled, runs):
        progress.start("panels", 2)
        asked, clouds = tp.Gaussian.standard(2).quadrature(12), clouds_of(0, repeats, counts[-1])
        square = np.array([[square_error(tp.Softmax(level * FORM, np.eye(2), 1.0), clouds, weights_of(n, counts[-1]), asked) for n in counts]
                           for level in LEVELS])
        progress.update(1, "velocity")
        head, layers, most = tp.Softmax(LEVELS[0] * FORM, np.eye(2), -np.eye(2)), tp.ResidualLayers(STEP), coupled[-1]
        limit = tl.iterate(head, layers, tp.Gaussian.standard(2), steps=LAYERS).value
        motion = np.asarray(limit.factor).T                                # the mean field moves rows of the identity, so tokens, by this
        starts, fresh = clouds_of(1, runs, most), clouds_of(2, runs, most) @ motion
        columns = {"to_moved": [], "to_fresh": [], "cov_error": []}
        for n in coupled:
            cloud = tp.Cloud(starts, np.broadcast_to(weights_of(n, most), (runs, most)))
            ends = np.asarray(tl.iterate(head, layers, cloud, steps=LAYERS, runs=runs, keep="last").value.points)[:, :n]
            columns["to_moved"].append([wasserstein(x, y) for x, y in zip(ends, starts[:, :n] @ motion, strict=True)])
            columns["to_fresh"].append([wasserstein(x, y) for x, y in zip(ends, fresh[:, :n], strict=True)])
            columns["cov_error"].append([np.linalg.norm(np.cov(x.T, bias=True) - np.asarray(limit.cov)) for x in ends])
        progress.update(2, "tokens")
        return {"counts": np.array(counts), "square_error": square, "coupled": np.array(coupled), **{k: np.array(v) for k, v in columns.items()}}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.42))
        for i, (level, square) in enumerate(zip(LEVELS, data["square_error"], strict=True)):
            error = np.sqrt(square.mean(1))
            slope = np.polyfit(np.log(data["counts"]), np.log(error), 1)[0]
            left.loglog(data["counts"], error, marker="o", **look(i), label=rf"$\|A\| = {level:g}$, slope {slope:.2f}".replace("-", "\N{MINUS SIGN}"))
        names = {"to_fresh": "$W_2$ to fresh samples", "cov_error": "error of the covariance", "to_moved": "$W_2$ to the moved starts"}
        for i, (name, label) in enumerate(names.items()):
            right.loglog(data["coupled"], np.sqrt((data[name] ** 2).mean(1)), marker="o", **look(i), label=label)
        low = np.sqrt((data["to_moved"][0] ** 2).mean())
        slope_triangle(right, -0.5, (data["coupled"][0], 0.8 * low), width=3, label="\N{MINUS SIGN}1/2", flip=True)
        left.set(xlabel="tokens $n$", ylabel="root mean square error", title="(a) velocity")
        right.set(xlabel="tokens $n$", title="(b) tokens after 10 layers")
        right.margins(x=0.12)
        for ax in (left, right):
            ax.legend(loc="lower left", bbox_to_anchor=(0, 0), fontsize="x-small")
            low, high = ax.get_ylim()
            ax.set_ylim(low / (high / low) ** 0.45, high)
        return picture

    @staticmethod
    def expect(check, data, counts, repeats, coupled, runs):
        errors = {level: np.sqrt(square) for level, square in zip(LEVELS, data["square_error"], strict=True)}
        fit = {level: fit_rate(data["counts"], np.sqrt((e**2).mean(1))).slope for level, e in errors.items()}
        for level in (0.3, 0.6):
            check.between(f"slope of the velocity error, norm {level}", fit[level], -0.65, -0.35)
        if len(data["counts"]) > 3:
            for level, slope in {1.2: -0.3, 2.4: -0.13, 4.8: -0.05}.items():
                check.equal(f"slope of the velocity error, norm {level}", fit[level], slope, 0.12)
        check.above("slope of the velocity error, norm 4.8", fit[4.8], -0.25)
        for name in ("to_moved", "cov_error"):
            slope = fit_rate(data["coupled"], np.sqrt((data[name] ** 2).mean(1))).slope
            check.between(f"{name}: slope after 10 layers", slope, -0.7, -0.3)
        check.below("distance to the moved starts over that to fresh samples", data["to_moved"].mean(1) / data["to_fresh"].mean(1), 1)


# ------------------------------------------------------------------------------------------------ regimes

ANGLE = 30.0
SIGNS = {"positive": 1.0, "negative": -1.0}                                # of the first eigenvalue of A


def regime_of_cell(cell, key, i):
    """Regime, rank and error of the limit from the identity, for V = diag(1, b) and A with the eigenvalues first and a at an angle."""
    turn = jnp.asarray(rotation(ANGLE))
    form = (turn * jnp.stack([cell["first"][i], cell["a"][i]])) @ turn.T
    head = tp.Softmax(form, jnp.eye(2), jnp.diag(jnp.stack([jnp.ones(()), cell["b"][i]])))
    found = tp.limit(tp.GaussianFlow(head), tp.Gaussian.standard(2))
    return {"regime": found.regime, "rank": found.rank, "error": found.error}


@figure("transformer_pde/phase-diagram", source=f"{COMPANION}, regimes", quick={"side": 8}, paper={"side": 40},
        caption=r"Softmax with $V = \operatorname{diag}(1, b)$ and a symmetric $A$ whose eigenvectors are turned by $30\degree$, from $\Sigma_0 = "
                r"I$: what the covariance does in the long run. The eigenvalues of $A$ are (a) 1 and $a$, (b) $-1$ and $a$. Each cell is one run, "
                "decided by its own stopping rule.")
class PhaseDiagram:
    """Regimes over the second eigenvalues of A and V."""

    @staticmethod
    def compute(progress, side):
        axis = (np.arange(side) + 0.5) / side * 4 - 2                       # no cell on a wall, where an eigenvalue is zero
        first, a, b = (g.ravel() for g in np.meshgrid(np.array(list(SIGNS.values())), axis, axis, indexing="ij"))
        table = tl.sweep(regime_of_cell, {"first": first, "a": a, "b": b}, len(a), key=0, chunk=64, progress=progress)
        shape = (len(SIGNS), side, side)
        return {"axis": axis, **{name: np.asarray(table[name]).reshape(shape) for name in ("regime", "rank", "error")}}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.patches import Patch

        look_of = {"FROZEN": (COLORS["sky"], "freezes"), "ZERO": (COLORS["green"], "decays to zero"), "BLOWUP": (COLORS["vermilion"], "blows up"),
                   "GROWING": (COLORS["orange"], "grows for ever"), "ROTATING": (COLORS["purple"], "rotates")}
        look_of = {regime.name: look_of.get(regime.name, ("0.6", regime.name.lower())) for regime in tp.Regime}
        colors = ListedColormap([color for color, _ in look_of.values()])
        picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.5), sharey=True)
        for ax, found, letter, sign in zip(axes, data["regime"], "ab", ("1", "-1"), strict=True):
            levels = BoundaryNorm(np.arange(len(tp.Regime) + 1) - 0.5, len(tp.Regime))
            ax.imshow(found.T, origin="lower", extent=(-2, 2, -2, 2), cmap=colors, norm=levels, interpolation="nearest", rasterized=True)
            for line in (ax.axhline, ax.axvline):
                line(0, color="white", linewidth=0.8, linestyle="-")
            ax.set(xlabel="second eigenvalue $a$ of $A$", xticks=(-2, -1, 0, 1, 2), yticks=(-2, -1, 0, 1, 2),
                   title=rf"({letter}) first eigenvalue of $A$: ${sign}$")
        axes[0].set_ylabel("second eigenvalue $b$ of $V$")
        seen = [regime.name for regime in tp.Regime if (data["regime"] == regime).any()]
        picture.legend(handles=[Patch(color=look_of[name][0], label=look_of[name][1]) for name in seen], loc="outside lower center", ncols=len(seen))
        return picture

    @staticmethod
    def expect(check, data, side):
        a, b = np.meshgrid(data["axis"], data["axis"], indexing="ij")
        up, down = data["regime"]
        check.true("V and A positive: blow-up", up[(a > 0) & (b > 0)] == tp.Regime.BLOWUP)
        check.true("V positive and A negative: decay to zero", down[(a < 0) & (b > 0)] == tp.Regime.ZERO)
        frozen = data["regime"] == tp.Regime.FROZEN
        check.true("what freezes in the plane has rank one, because A is invertible", data["rank"][frozen] == 1)
        check.below("cells that are not decided", (data["regime"] == tp.Regime.UNDECIDED).mean(), 0.03)
        number = [int((data["regime"] == regime).sum()) for regime in (tp.Regime.FROZEN, tp.Regime.ZERO, tp.Regime.BLOWUP)]
        check.above("cells that freeze, decay, blow up", number, 1)


# ------------------------------------------------------------------------------------------------ finite depth

NETWORK_A = np.diag([1.0, 0.5])
DEPTHS = {"error": (8, 16, 32, 64, 128, 256, 512, 1024), "beyond": (4, 8, 16, 32, 64)}


def flow(time):
    """The exact covariance of the flow, (I - 2 t A)^-1."""
    return np.linalg.inv(np.eye(2) - 2 * np.asarray(time)[..., None, None] * NETWORK_A)


@figure("transformer_pde/finite-depth", source=f"{COMPANION}, finite depth", quick={"most": 256}, paper={"most": 1024},
        caption=r"A network of $L$ residual softmax layers on a Gaussian against the flow, $V = I$, $A = \operatorname{diag}(1, 1/2)$, $\Sigma_0 = "
                r"I$, blow-up at $t^* = 1/2$. (a) Relative error of the covariance at depth $0.8\,t^*$: the exact network and the published Euler "
                r"scheme both converge like $1/L$. (b) Trace along networks of depth $2\,t^*$: finite at every layer, while the flow (black) ends at "
                "$t^*$; more layers follow it further up.")
class FiniteDepth:
    """Networks against the flow, below and beyond its blow-up."""

    @staticmethod
    def compute(progress, most):
        head, start, end = tp.Softmax(NETWORK_A, np.eye(2), np.eye(2)), tp.Gaussian.standard(2), 0.5 / NETWORK_A.max()
        depths, errors = [depth for depth in DEPTHS["error"] if depth <= most], {"network": [], "scheme": []}
        progress.start("networks", len(depths) + len(DEPTHS["beyond"]))
        exact = flow(np.array(0.8 * end))
        for i, depth in enumerate(depths):
            for name, method in (("network", tp.ResidualLayers(0.8 * end / depth)), ("scheme", tp.OfficialEuler(0.8 * end / depth))):
                cov = np.asarray(tl.iterate(head, method, start, steps=depth).value.cov)
                errors[name].append(np.linalg.norm(cov - exact) / np.linalg.norm(exact))
            progress.update(i + 1, f"{depth} layers")
        data = {"depths": np.array(depths), "end": np.array(end), **{name: np.array(error) for name, error in errors.items()}}
        for i, depth in enumerate(DEPTHS["beyond"]):
            sol = tl.iterate(head, tp.ResidualLayers(2 * end / depth), start, steps=depth, throw=False)
            data[f"trace_{depth}"] = np.asarray(sol.history["trace"])
            progress.update(len(depths) + i + 1, f"{depth} layers, beyond the blow-up")
        data["flow_time"] = end * (1 - np.geomspace(1, 1e-6, 200))
        return data | {"flow_trace": np.trace(flow(data["flow_time"]), axis1=1, axis2=2)}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.42))
        for i, (name, label) in enumerate({"network": "residual network", "scheme": "published Euler scheme"}.items()):
            left.loglog(data["depths"], data[name], marker="o", **look(i), label=label)
        slope_triangle(left, -1, (data["depths"][1], 0.45 * data["network"][1]), width=3, label="\N{MINUS SIGN}1", flip=True)
        left.set(xlabel="layers $L$", ylabel="relative error of the covariance", title=r"(a) at depth $0.8\,t^*$")
        left.legend()
        shades = plt.get_cmap("viridis")(np.linspace(0.85, 0.1, len(DEPTHS["beyond"])))
        for depth, shade in zip(DEPTHS["beyond"], shades, strict=True):
            trace = data[f"trace_{depth}"]
            right.semilogy(2 * np.arange(len(trace)) / depth, trace, color=shade, marker=".", markersize=3, linewidth=0.9, linestyle="-",
                           label=f"{depth} layers")
        right.semilogy(data["flow_time"] / data["end"], data["flow_trace"], color=COLORS["black"], linestyle="-", label="flow")
        right.axvline(1, color="0.5", linewidth=0.7, linestyle=":")
        right.set(xlabel="depth over $t^*$", ylabel=r"$\mathrm{tr}\,\Sigma$", ylim=(1, 1e14), xlim=(0, 2),
                  title="(b) beyond the blow-up of the flow")
        right.legend(fontsize="x-small")
        return picture

    @staticmethod
    def expect(check, data, most):
        for name in ("network", "scheme"):
            check.equal(f"{name}: slope of the error, last two depths", np.log2(data[name][-1] / data[name][-2]), -1, 0.1)
        for depth in DEPTHS["beyond"][:2]:
            check.below(f"trace after {depth} layers", data[f"trace_{depth}"], 1e30)
        check.true("traces grow with the number of layers at depth t*",
                   np.diff([data[f"trace_{depth}"][depth // 2] for depth in DEPTHS["beyond"]]) > 0)
        # below the blow-up a network lags behind the flow: each layer uses the smaller covariance before it
        for depth in DEPTHS["beyond"]:
            time = 2 * data["end"] * np.arange(depth // 2) / depth
            ratio = data[f"trace_{depth}"][: depth // 2] / np.trace(flow(time), axis1=1, axis2=2)
            check.below(f"trace of {depth} layers over that of the flow", ratio, 1 + 1e-12)
