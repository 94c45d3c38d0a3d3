"""Along inner runs: certificates against true errors, and unrolled differentiation against the implicit formula."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import hypergradient as hg
from theorylab.hypergradient.claims.baselines import unrolling
from theorylab.hypergradient.claims.family import Parts
from theorylab.hypergradient.claims.references import shipped
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS, figsize

shared: ModuleType = load_module(Path(__file__).with_name("_hypergradient.py"))


@eqx.filter_jit
def _certified(problem: Any, path: Any, y: Any, raw: bool) -> dict[str, Any]:
    """Values and bounds at each iterate."""

    def one(x: Any) -> dict[str, Any]:
        plain, newton = (hg.certificate(problem, x, y, how) for how in (hg.Plain(), hg.NewtonPoint()))
        found = {"plain": plain.value, "sharp": plain.error_bound, "newton": newton.value, "newton sharp": newton.error_bound}
        point = hg.OnePoint().estimate(problem, x, y)
        found |= {"estimate": point.error_estimate, "corrected": point.value}
        return found | ({"raw": hg.certificate(problem, x, y, hg.Plain(), kind="raw").error_bound} if raw else {})

    return jax.lax.map(one, path)


@figure("hypergradient/certificate", source="companion derivation; not in the paper",
        quick={"steps": 60, "raw": False}, paper={"steps": 60, "raw": True},
        caption=r"Logistic regression on breast-cancer data, y uniform in $[-1, 1]^{30}$, along L-BFGS: (a) true error of the plain formula, its "
                r"certificate anchored at x (raw) and at the Newton point (sharp), and the estimate by the one-point correction, which is no bound. "
                r"(b) Bound over true error: never below 1, and within 5 % of 1 once Newton's method converges. (c) The estimate at the Newton "
                r"point with its own certificate.")
class Certificate:
    """Bounds against errors."""

    @staticmethod
    def compute(progress, steps, raw):
        problem, _, _ = shipped("breast_cancer")
        y = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, problem.n))
        x = hg.reference(problem, y)
        run = tl.iterate(problem.inner(y), hg.LBFGS(), jnp.zeros(problem.n), steps=steps, stop=tl.Below("residual", 1e-9), record=tl.whole,
                         throw=False)
        path, residual = np.asarray(run.history["x"]), np.asarray(run.history["residual"])
        found = {name: np.asarray(value) for name, value in _certified(problem, jnp.asarray(path), y, raw).items()}
        truth = np.asarray(hg.hypergradient(problem, x, y, hg.Plain()).value)
        bounds = {name: found[name] for name in ("sharp", "newton sharp", "estimate", *(("raw",) if raw else ()))}
        return bounds | {"residual": residual, "truth": np.linalg.norm(truth)} | {
            f"error {name}": np.linalg.norm(found[name] - truth, axis=1) for name in ("plain", "newton", "corrected")}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, (left, middle, right) = plt.subplots(1, 3, figsize=figsize(2, 0.4))
        steps = np.arange(len(data["residual"]))
        left.semilogy(steps, data["error plain"], color="black", linestyle="-", linewidth=2.2, alpha=0.5, label="true error")
        names = (("raw", "raw bound", "orange", "-."), ("sharp", "sharp bound", "blue", "--"), ("estimate", "estimate", "green", ":"))
        for name, shown, shade, style in names:
            if name in data:
                finite = np.where(data[name] < 1e6, data[name], np.nan)
                left.semilogy(steps, finite, color=COLORS[shade], linestyle=style, label=shown)
                middle.loglog(data["error plain"], finite / data["error plain"], color=COLORS[shade], linestyle=style)
        middle.axhline(1, color="0.5", linewidth=0.7, linestyle="-")
        middle.set(xlabel="true error", ylabel="bound / true error", ylim=(0.2, 1e4))
        middle.invert_xaxis()
        right.semilogy(steps, data["error newton"] / data["truth"], color="black", linestyle="-", linewidth=2.2, alpha=0.5)
        bound = data["newton sharp"] / data["truth"]
        right.semilogy(steps, np.where(bound < 1e6, bound, np.nan), color=COLORS["blue"], linestyle="--")
        left.set(xlabel="step of L-BFGS", ylabel="norm")
        right.set(xlabel="step of L-BFGS", ylabel="relative error")
        shared.letters((left, middle, right), ["plain formula", "effectivity", "Newton point"])
        shared.legend(picture, (left,), ncols=4)
        return picture

    @staticmethod
    def expect(check, data, steps, raw):
        error = data["error plain"]
        seen = error > 1e-12
        ratio = data["sharp"] / error
        check.above("sharp bound over true error of the plain formula", ratio[seen], 1)
        late = seen & (error < 1e-6) & (error > 1e-11)
        check.below("the same where the error is between 1e-11 and 1e-6", ratio[late], 1.05, note=f"{late.sum()} iterates")
        for at in (2.5e-4, 2.8e-5, 1.6e-6, 4.0e-8):
            k = int(np.argmin(np.abs(np.log(error / at))))
            check.above(f"near an error of {at:.1e}: sharp bound over it", ratio[k], 1, note=f"{ratio[k]:.4g} at {error[k]:.2e}")
        polished = data["error newton"] > 1e-15
        check.above("bound over true error at the Newton point", (data["newton sharp"] / data["error newton"])[polished], 1)
        check.below("certified relative error of the Newton point, at the last iterate", data["newton sharp"][-1] / data["truth"], 1e-9)
        close = (error < 1e-2 * data["truth"]) & (error > 1e-10)
        check.between("estimate over true error, once that is below 1 %", (data["estimate"] / error)[close], 0.8, 1.2)
        check.below("error of the one-point correction over that of the plain formula, likewise", (data["error corrected"] / error)[close], 0.3)
        if raw:
            check.above("raw bound over true error", (data["raw"] / error)[seen], 1)
            check.between("the same where the error is between 1e-11 and 1e-6", (data["raw"] / error)[late], 50, 5000)


# ------------------------------------------------------------------------------------------------ unrolled

RATIOS = {5: 6.9, 10: 8.9, 20: 29.8, 40: 64.6, 60: 97.5}
LENGTH = 60


@eqx.filter_jit
def _unrolled(problem: Any, x: Any, y: Any, eta: Any, terms: tuple[int, ...]) -> list:
    return [hg.Unrolled(K, eta).estimate(problem, x, y).value for K in terms]


_forward = eqx.filter_jit(unrolling)


@figure("hypergradient/unrolled", source="companion derivation; not in the paper",
        quick={"terms": (5,)}, paper={"terms": tuple(RATIOS)},
        caption=r"Ridge regression, quadratic G, first seed, gradient descent from its first point (not displaced): (a) error of the implicit "
                r"formula and of unrolled differentiation after K steps, for two step sizes. (b) Error of the Jacobian of unrolled differentiation "
                r"over that of the implicit one: it grows linearly in K, with a slope that depends on the step.")
class UnrolledDescent:
    """Unrolled differentiation loses a factor K."""

    @staticmethod
    def compute(progress, terms):
        run = shared.run("ridge", "quadratic", 3.0, 0, 400)
        parts = Parts(run.problem, run.solution, run.y)
        truth, top = parts.G2 + parts.J.T @ parts.G1, np.linalg.eigvalsh(parts.H)[-1]
        first, y, data = jnp.asarray(run.first), jnp.asarray(run.y), {}
        progress.start("step sizes", 2)
        for i, step in enumerate((1.8, 1.0)):
            found = _forward(run.problem, first, y, jnp.asarray(step / top), LENGTH)
            size = lambda a, b: np.linalg.norm((np.asarray(a) - b).reshape(LENGTH, -1), axis=1)  # noqa: E731
            data |= {f"{step:g}/unrolled": size(found.unrolled, truth), f"{step:g}/implicit": size(found.implicit, truth),
                     f"{step:g}/unrolled jacobian": size(found.unrolled_jacobian, parts.J),
                     f"{step:g}/implicit jacobian": size(found.implicit_jacobian, parts.J)}
            progress.update(i + 1, f"step {step:g}/L")
        library = _unrolled(run.problem, first, y, jnp.asarray(1.8 / top), terms)
        return data | {"library": np.array([np.linalg.norm(np.asarray(v) - truth) for v in library]), "source": np.array(shared.source("ridge")),
                       "substitute": np.array(shared.data("ridge")[2])}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.42))
        K = np.arange(1, LENGTH + 1)
        for step, shade in (("1.8", "blue"), ("1", "vermilion")):
            left.semilogy(K, data[f"{step}/unrolled"], color=COLORS[shade], linestyle="-", label=f"unrolled, $\\eta = {step}/L$")
            left.semilogy(K, data[f"{step}/implicit"], color=COLORS[shade], linestyle="--", label=f"implicit, $\\eta = {step}/L$")
            right.plot(K, data[f"{step}/unrolled jacobian"] / data[f"{step}/implicit jacobian"], color=COLORS[shade], linestyle="-",
                       label=f"$\\eta = {step}/L$")
        right.plot(K, 2.2 * K, color="0.5", linestyle=":", label="2.2 K")
        right.plot(K, 0.3 * K, color="0.5", linestyle="-.", label="0.3 K")
        left.set(xlabel="steps K", ylabel="error of the hypergradient")
        right.set(xlabel="steps K", ylabel="ratio of errors of the Jacobian")
        left.legend(loc="lower left")
        right.legend(loc="upper left")
        shared.letters((left, right), [f"hypergradient, {data['source']}", "Jacobian, unrolled over implicit"])
        return picture

    @staticmethod
    def expect(check, data, terms):
        ratio = data["1.8/unrolled"] / data["1.8/implicit"]
        forward = data["1.8/unrolled"][np.array(terms) - 1]
        check.equal("Unrolled of the library against the forward recursion", data["library"], forward, 1e-9, relative=True)
        jacobians = {step: data[f"{step}/unrolled jacobian"] / data[f"{step}/implicit jacobian"] for step in ("1.8", "1")}
        if not str(data["substitute"]):
            found = np.array([ratio[K - 1] for K in RATIOS])
            check.equal("ratio of errors at K = 5, 10, 20, 40, 60", found, np.array(list(RATIOS.values())), 0.06)
            for step, slope in (("1.8", 2.2), ("1", 0.3)):
                over = jacobians[step][19:] / (slope * np.arange(20, 61))
                check.between(f"step {step}/L: ratio for the Jacobian over {slope} K, K from 20", over, 0.8, 1.25)
        for step, each in jacobians.items():
            check.between(f"step {step}/L: ratio at 60 over that at 20", each[59] / each[19], 1.5, 4.5)
