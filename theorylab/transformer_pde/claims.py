r"""What the paper and its companion derivations say about softmax and L2 attention on Gaussians, measured.

Random heads of one shape share one compiled program per variant, so a claim costs its arithmetic and not a compilation.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.integrate import integrate
from theorylab.core.keys import stream
from theorylab.core.solution import Status, count_statuses
from theorylab.errors import NotConvergedError
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.transformer_pde.attention import L2, Softmax, random_attention
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Cloud, Gaussian, moments
from theorylab.transformer_pde.oracles import Regime, blow_up_time, energy, limit
from theorylab.transformer_pde.particles import Particles

Array = jax.Array
KINDS = {"softmax": Softmax, "l2": L2}
DIM = 3
PAPER = "A Unified Perspective on the Dynamics of Deep Transformers"


class Heads(NamedTuple):
    """A batch of heads and of starts: arrays with a leading axis."""

    Q: Any
    K: Any
    V: Any
    mean: Any
    factor: Any

    @property
    def A(self) -> np.ndarray:
        return np.einsum("nki,nkj->nij", self.K, self.Q)

    @property
    def cov(self) -> np.ndarray:
        return self.factor @ np.swapaxes(self.factor, -1, -2)


def heads(count: int, seed: int, rank: int = DIM, size: float = 0.7) -> Heads:
    """Independent normal heads and starts; `size` scales the starts."""
    draw = lambda name, *shape: np.asarray(jax.random.normal(stream(seed, name), (count, *shape))) / np.sqrt(DIM)  # noqa: E731
    factor = size * (np.eye(DIM) + 0.5 * draw("factor", DIM, DIM))
    return Heads(draw("Q", rank, DIM), draw("K", rank, DIM), draw("V", DIM, DIM), draw("mean", DIM), factor)


@partial(jax.jit, static_argnames="kind")
def _follow(kind: str, batch: Heads, times: Array) -> tuple[Gaussian, Array]:
    def one(Q: Array, K: Array, V: Array, mean: Array, factor: Array, times: Array) -> tuple[Gaussian, Array]:
        flow = GaussianFlow(KINDS[kind](Q, K, V))
        sol = integrate(flow, Gaussian.from_factor(mean, factor), times, rtol=1e-10, atol=1e-12, throw=False)
        return sol.value, sol.status

    return jax.vmap(one)(*batch, times)


def follow(kind: str, batch: Heads, *times: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Means and covariances of each head at each of two times after the start; a time may differ from head to head."""
    count = len(batch.mean)
    grid = np.stack([np.zeros(count), *(np.broadcast_to(np.asarray(t, float), count) for t in times)], axis=1)
    states, status = _follow(kind, Heads(*map(jnp.asarray, batch)), jnp.asarray(grid))
    if (np.asarray(status) != Status.COMPLETED).any():
        raise NotConvergedError(f"{kind}: {count_statuses(status)} where every run must be COMPLETED")
    return [(np.asarray(states.mean[:, i]), np.asarray(states.cov[:, i])) for i in range(1, grid.shape[1])]


def safe_time(batch: Heads) -> np.ndarray:
    """Half the time before which no softmax head of the batch can blow up."""
    spectral = lambda a: np.linalg.norm(a, 2, axis=(-2, -1))  # noqa: E731
    return 0.5 / (2 * spectral(batch.V) * spectral(batch.A) * spectral(batch.cov))


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Frobenius distance relative to the size of b, per head."""
    return np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))


# ------------------------------------------------------------------------------------------------ invariance and mean-field limit


@claim("transformer_pde.velocity-on-gaussians", source=f"{PAPER}, attention on Gaussian measures",
       statement=r"On $\mathcal N(\alpha, \Sigma)$ attention is affine: $\Gamma(x) = m + B(x - \alpha)$, softmax $B = V\Sigma A$, "
                 r"L2 $B = 2V(I + 2\Sigma P)^{-1}\Sigma A$.",
       fast={"count": 3}, full={"count": 30})
def _(check: Check, count: int) -> None:
    for kind, made in KINDS.items():
        worst = []
        for i in range(count):
            head: Any = random_attention(kind, i, dim=2)
            root = np.eye(2) + 0.3 * np.asarray(jax.random.normal(stream(i, "factor"), (2, 2)))
            # the oracle is exact only while the tilted measure stays inside the node cloud
            tilt = [np.asarray(head.A)] if kind == "softmax" else [2 * np.asarray(head.A), 2 * np.asarray(head.P)]
            size = max(np.linalg.norm(root.T @ a @ root, 2) for a in tilt)
            state = Gaussian.from_factor(np.array([0.3, -0.2]), root * np.sqrt(0.4 / max(size, 0.4)))
            cloud, (mean, matrix) = state.quadrature(32), head.velocity(state.mean, state.cov)
            tokens = np.asarray(head.token_velocity(cloud.points, cloud.weights)[0])
            exact = np.asarray(mean + (cloud.points - state.mean) @ matrix.T)
            worst.append(np.sqrt(np.asarray(cloud.weights) @ ((tokens - exact) ** 2).sum(1)))
        check.below(f"{made.__name__}: L2(mu) distance of the formula from quadrature tokens", worst, 1e-11)


@claim("transformer_pde.mean-field-rate", source="companion derivation, Monte-Carlo rate",
       statement=r"The velocity of $n$ independent tokens is within $O(n^{-1/2})$ of the mean field while "
                 r"$\|\Sigma^{1/2} A \Sigma^{1/2}\|_2 < 1/\sqrt 2$.",
       fast={"sizes": (100, 400, 1600), "replicates": 40, "tol": 0.12}, full={"sizes": (100, 400, 1600, 6400), "replicates": 300, "tol": 0.05})
def _(check: Check, sizes: tuple[int, ...], replicates: int, tol: float) -> None:
    head, state = Softmax(0.6 * jnp.eye(2), 0.6 * jnp.eye(2), 1.0), Gaussian.standard(2)
    mean, matrix = head.velocity(state.mean, state.cov)
    places = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)))
    exact = mean + places @ matrix.T

    def error(n: int, key: Array) -> Array:
        tokens = jax.random.normal(key, (n, 2))
        return ((head.token_velocity(tokens, queries=places)[0] - exact) ** 2).sum(1).mean()

    squares = [np.asarray(jax.vmap(partial(error, n))(jax.random.split(stream(0, f"n={n}"), replicates))) for n in sizes]
    check.slope("log-log slope of the squared error", np.array(sizes), np.stack(squares), expected=-1.0, tol=2 * tol)


@claim("transformer_pde.finite-clouds-never-blow-up", source=f"{PAPER}, well-posedness for compact support",
       statement=r"$\max_i |x_i(t)| \le e^{\|V\| t} \max_i |x_i(0)|$: a finite cloud outlives the blow-up $t^* = 1/2$ of its Gaussian limit "
                 r"($V = A = \Sigma_0 = I$).",
       fast={"tokens": 200}, full={"tokens": 4000})
def _(check: Check, tokens: int) -> None:
    head, start = Softmax(jnp.eye(2), jnp.eye(2), 1.0), Gaussian.standard(2)
    check.equal("blow-up time of the Gaussian", blow_up_time(GaussianFlow(head), start), 0.5, 1e-14)
    cloud = start.sample(tokens, key=0)
    root = np.linalg.cholesky(np.linalg.inv(np.asarray(moments(cloud).cov)))
    white = Cloud((cloud.points - cloud.points.mean(0)) @ root)
    sol = integrate(Particles(head), white, [0.0, 0.3, 1.0], rtol=1e-6)
    radius = np.linalg.norm(np.asarray(sol.value.points), axis=-1).max(1)
    check.true("all tokens are finite at twice the blow-up time", np.isfinite(radius).all())
    check.below("largest radius over its bound", radius[1:] / (radius[0] * np.exp([0.3, 1.0])), 1 + 1e-9)


# ------------------------------------------------------------------------------------------------ structure


@claim("transformer_pde.equivariance", source="companion derivation, change of basis",
       statement=r"$(\alpha, \Sigma, V, A, P) \mapsto (M\alpha, M\Sigma M^\top, MVM^{-1}, M^{-\top}AM^{-1}, M^{-\top}PM^{-1})$ "
                 r"maps solutions to solutions.",
       fast={"count": 16}, full={"count": 256})
def _(check: Check, count: int) -> None:
    base, M = heads(count, seed=1), np.eye(DIM) + 0.4 * np.asarray(jax.random.normal(stream(1, "M"), (DIM, DIM)))
    inverse, t = np.linalg.inv(M), safe_time(base)
    moved = Heads(base.Q @ inverse, base.K @ inverse, M @ base.V @ inverse, base.mean @ M.T, M @ base.factor)
    for kind in KINDS:
        (mean, cov), (there_mean, there_cov) = follow(kind, base, t / 2, t)[-1], follow(kind, moved, t / 2, t)[-1]
        check.below(f"{kind}: relative distance of the covariances", apart(there_cov, M @ cov @ M.T), 1e-8)
        check.below(f"{kind}: distance of the means", np.abs(there_mean - mean @ M.T), 1e-8)


@claim("transformer_pde.scaling", source="companion derivation, homogeneity of softmax",
       statement=r"Softmax: $\Sigma(t;\, s\Sigma_0) = s\,\Sigma(st;\, \Sigma_0)$; and every flow has the semigroup property.",
       fast={"count": 16}, full={"count": 256})
def _(check: Check, count: int) -> None:
    base, s = heads(count, seed=2), 1.7
    t = safe_time(base) / s
    scaled = base._replace(factor=np.sqrt(s) * base.factor, mean=0 * base.mean)
    check.below("relative distance", apart(follow("softmax", scaled, t / 2, t)[-1][1], s * follow("softmax", base, s * t / 2, s * t)[-1][1]), 1e-8)
    for kind in KINDS:
        (mean, half), (_, whole) = follow(kind, base, t / 2, t)
        again = follow(kind, base._replace(mean=mean, factor=np.linalg.cholesky(half)), t / 4, t / 2)[-1][1]
        check.below(f"{kind}: two halves against the whole", apart(again, whole), 1e-8)


@claim("transformer_pde.conserved-quantities", source="companion derivation, conservation laws",
       statement=r"$u^\top\Sigma(t)^{-1}u$ is constant for $u \in \ker A$, and $w^\top\Sigma(t)w$ for $w \in \ker V^\top$.",
       fast={"count": 16}, full={"count": 256})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=3)
    query, value = base.Q.copy(), base.V.copy()
    query[:, -1] = 0                                                         # A = K'Q and V lose one rank each
    value[:, :, -1] = value[:, :, 0]
    base = base._replace(Q=query, V=np.swapaxes(value, -1, -2))
    u, w = np.linalg.svd(base.A)[2][:, -1], np.linalg.svd(np.swapaxes(base.V, -1, -2))[2][:, -1]
    form = lambda a, x: np.einsum("ni,nij,nj->n", x, a, x)  # noqa: E731
    t = safe_time(base)
    for kind in KINDS:
        cov = follow(kind, base, t / 2, t)[-1][1]
        check.below(f"{kind}: relative change of u' inv(cov) u", np.abs(form(np.linalg.inv(cov), u) / form(np.linalg.inv(base.cov), u) - 1), 1e-8)
        check.below(f"{kind}: relative change of w' cov w", np.abs(form(cov, w) / form(base.cov, w) - 1), 1e-8)


@claim("transformer_pde.inverse-is-affine", source="companion derivation, closed form for V = vI",
       statement=r"Softmax with $V = vI$: $\Sigma(t)^{-1} + v t\,(A + A^\top)$ is constant, and $\Sigma_0 \preceq \Sigma_0'$ stays so.",
       fast={"count": 16}, full={"count": 256})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=4)
    base = base._replace(V=np.broadcast_to(-0.8 * np.eye(DIM), base.V.shape))
    larger = base._replace(factor=np.linalg.cholesky(base.cov + 0.3 * np.eye(DIM)[None]))
    t = np.minimum(safe_time(base), safe_time(larger))
    symmetric = base.A + np.swapaxes(base.A, -1, -2)
    cov, above = (follow("softmax", b, t / 2, t)[-1][1] for b in (base, larger))
    check.below("relative distance", apart(np.linalg.inv(cov) - 0.8 * t[:, None, None] * symmetric, np.linalg.inv(base.cov)), 1e-8)
    check.above("smallest eigenvalue of the difference of ordered states", np.linalg.eigvalsh(above - cov)[:, 0], 0.0)


@claim("transformer_pde.gradient-flow", source="companion derivation, Bures gradient flows",
       statement=r"Softmax with $V = A$ symmetric descends $F = -\tfrac14\operatorname{tr}(A\Sigma A\Sigma)$: "
                 r"$\Sigma' = -2(\nabla F\,\Sigma + \Sigma\nabla F)$; L2 with $Q = K$, $V = P$ its own $F$.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    distance: dict[str, list[float]] = {kind: [] for kind in KINDS}
    base = heads(count, seed=5)
    for K, cov in zip(base.K, base.cov, strict=True):
        form = K.T @ K
        for kind, head in (("softmax", Softmax.bilinear(K + K.T, K + K.T)), ("l2", L2(K, K, form))):
            factor = np.linalg.cholesky(cov)

            def potential(root: Array, head: Any = head) -> Array:
                return energy(head, Gaussian.from_factor(jnp.zeros(DIM), root))

            slope = np.asarray(jax.grad(potential)(jnp.asarray(factor)))     # 2 (gradient of F) L for a symmetric gradient
            gradient = np.linalg.solve(factor.T, slope.T).T / 2
            matrix = np.asarray(head.velocity(jnp.zeros(DIM), jnp.asarray(cov)).matrix)
            field = matrix @ cov + cov @ matrix.T
            distance[kind].append(float(np.linalg.norm(field + 2 * (gradient @ cov + cov @ gradient)) / np.linalg.norm(field)))
    for kind, seen in distance.items():
        check.below(f"{kind}: field against the gradient by automatic differentiation", seen, 1e-10)


# ------------------------------------------------------------------------------------------------ blow-up


@claim("transformer_pde.blow-up-bounds", source="companion derivation, bounds of the blow-up time",
       statement=r"Softmax: $t^* \ge 1 / (2\|V\|\|A\|\|\Sigma_0\|)$; and $t^* \le d / (2\lambda_{\min}(\operatorname{sym} A)\lambda_{\min}(V)^2 "
                 r"\operatorname{tr}(V^{-1}\Sigma_0))$ for $V \succ 0$ symmetric, $\operatorname{sym} A \succ 0$.",
       fast={"count": 32}, full={"count": 500})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=6)
    times = blow_up_times(base)
    check.above("blow-up time over its lower bound", np.where(np.isnan(times), np.inf, times) / (2 * safe_time(base)), 1.0)
    V = np.einsum("nij,nkj->nik", base.V, base.V) + 0.2 * np.eye(DIM)
    skew = base.Q - np.swapaxes(base.Q, -1, -2)
    A = np.einsum("nij,nkj->nik", base.K, base.K) + 0.2 * np.eye(DIM) + skew
    positive = base._replace(Q=A, K=np.broadcast_to(np.eye(DIM), A.shape), V=V)
    lowest = lambda a: np.linalg.eigvalsh((a + np.swapaxes(a, -1, -2)) / 2)[:, 0]  # noqa: E731
    upper = DIM / (2 * lowest(A) * lowest(V) ** 2 * np.trace(np.linalg.solve(V, base.cov), axis1=1, axis2=2))
    times = blow_up_times(positive)
    check.true("every positive head blows up", np.isfinite(times).all(), f"{int(np.isfinite(times).sum())} of {count}")
    check.below("blow-up time over its upper bound", times / upper, 1.0)


@jax.jit
def _times(batch: Heads) -> Array:
    one = lambda Q, K, V, mean, factor: blow_up_time(GaussianFlow(Softmax(Q, K, V)), Gaussian.from_factor(mean, factor))  # noqa: E731
    return jax.vmap(one)(*batch)


def blow_up_times(batch: Heads) -> np.ndarray:
    """Blow-up times of softmax heads by the desingularized flow; infinite where there is none, NaN where undecided."""
    return np.asarray(_times(Heads(*map(jnp.asarray, batch))))


@claim("transformer_pde.dichotomy", source="companion derivation, Sylvester inertia",
       statement=r"Softmax with $V = vI$, $\Sigma_0 \succ 0$: global iff $v(A + A^\top) \preceq 0$, else blow-up at "
                 r"$1/\lambda_{\max}(v L_0^\top (A + A^\top) L_0)$.",
       fast={"count": 32}, full={"count": 500})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=7)
    definite = -np.einsum("nij,nkj->nik", base.K, base.K)                     # every second head has a negative form
    Q = np.where((np.arange(count) % 2 == 0)[:, None, None], definite, base.Q)
    base = base._replace(Q=Q, K=np.broadcast_to(np.eye(DIM), Q.shape), V=np.broadcast_to(np.eye(DIM), Q.shape))
    symmetric = Q + np.swapaxes(Q, -1, -2)
    form = np.swapaxes(base.factor, -1, -2) @ symmetric @ base.factor
    top, measured = np.linalg.eigvalsh(form)[:, -1], blow_up_times(base)
    finite = top > 0
    check.true("blow-up exactly where the form has a positive eigenvalue", (np.isfinite(measured) == finite).all(),
               f"{int(finite.sum())} of {count} blow up")
    check.below("relative error of the blow-up time", np.abs(measured[finite] * top[finite] - 1), 1e-6)


@claim("transformer_pde.blow-up-profile", source="companion derivation, profile at the blow-up; the exception is a finding of this package",
       statement=r"At the blow-up $\Sigma / \operatorname{tr}\Sigma$ tends to a matrix whose range is invariant under $V$. It is $uu^\top$ with "
                 r"$Vu = \lambda u$, $\lambda\,u^\top A u > 0$, for most heads; if tokens keep rotating, its range is a plane.",
       fast={"count": 32}, full={"count": 500})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=8)
    symmetric = np.einsum("nij,nkj->nik", base.V, base.V) + 0.2 * np.eye(DIM)
    found = _limits(Heads(*map(jnp.asarray, base._replace(V=symmetric))))
    blown, settled = np.asarray(found.regime) == Regime.BLOWUP, np.asarray(found.error) < 1e-6
    check.above("heads that blow up", int(blown.sum()), count // 4)
    check.above("share of profiles that settled within the clock", settled[blown].mean(), 0.95,
                note=f"{int((blown & ~settled).sum())} of {int(blown.sum())} did not, and say so in their error")
    blown &= settled
    rank, values, A = np.asarray(found.rank)[blown], symmetric[blown], base.A[blown]
    vectors = np.linalg.eigh(np.asarray(found.cov)[blown])[1]
    plane = np.where(np.arange(DIM) >= DIM - rank[:, None, None], vectors, 0.0)             # eigenvectors of the range, zero elsewhere
    inside = plane @ np.swapaxes(plane, -1, -2)
    leaving = np.linalg.norm((np.eye(DIM) - inside) @ values @ inside, axis=(1, 2))
    line, u = rank == 1, vectors[..., -1]
    check.below("part of V that leaves the range", leaving, 1e-5)
    check.above("share of profiles that are lines", line.mean(), 0.8, note=f"{int((~line).sum())} of {len(line)} are planes")
    check.above("lambda u'Au of the lines", np.einsum("ni,nij,nj,nk,nkl,nl->n", u, A, u, u, values, u)[line], 0.0)


@jax.jit
def _limits(batch: Heads) -> Any:
    return jax.vmap(lambda Q, K, V, mean, factor: limit(GaussianFlow(Softmax(Q, K, V)), Gaussian.from_factor(mean, factor)))(*batch)


@claim("transformer_pde.l2-blows-up-without-injective-keys", source="companion derivation, L2 attention with a singular key matrix",
       statement=r"L2 with $K = (1, 0)$, $Q = (0, 1)$, $V = \operatorname{diag}(0, 1)$ blows up at $t^* = 3/(2b_0)$ with "
                 r"$\Sigma_{22} = c_0/(1 - 2b_0t/3)^2$; with injective keys $\|\Sigma(t)\| \le \|\Sigma_0\| e^{2\|V\|\|A\|\|P^{-1}\| t}$.",
       fast={"count": 16}, full={"count": 256})
def _(check: Check, count: int) -> None:
    head, start = L2([[0.0, 1.0]], [[1.0, 0.0]], np.diag([0.0, 1.0])), Gaussian(np.zeros(2), [[1.0, 0.5], [0.5, 1.0]])
    times = np.array([0.0, 1.5, 2.9])
    cov = np.asarray(integrate(GaussianFlow(head), start, times, rtol=1e-10, atol=1e-12).value.cov)
    check.below("covariance against its formula (relative)", np.abs(cov[:, 1, 1] * (1 - times / 3) ** 2 - 1), 1e-7)
    check.equal("blow-up time", blow_up_time(GaussianFlow(head), start), 3.0, 1e-8)
    base = heads(count, seed=9)
    base = base._replace(K=base.K + 1.5 * np.eye(DIM))
    spectral = lambda a: np.linalg.norm(a, 2, axis=(-2, -1))  # noqa: E731
    keys = np.linalg.svd(base.K, compute_uv=False)[:, -1] ** 2
    grown = spectral(follow("l2", base, 0.5, 1.0)[-1][1])
    bound = spectral(base.cov) * np.exp(2 * spectral(base.V) * spectral(base.A) / keys)
    check.below("norm over its bound with injective keys", grown / bound, 1.0)


# ------------------------------------------------------------------------------------------------ limits


@claim("transformer_pde.limit-is-the-schur-complement", source="companion derivation, rank of the limit",
       statement=r"$V = I$, $K = -Q$: $\Sigma_\infty = \Sigma_0 - \Sigma_0Q^\top(Q\Sigma_0Q^\top)^{-1}Q\Sigma_0$, of rank "
                 r"$d - \operatorname{rank} Q$, for softmax and L2.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=10, rank=1)
    cross = base.Q @ base.cov
    exact = base.cov - np.swapaxes(cross, -1, -2) @ np.linalg.solve(cross @ np.swapaxes(base.Q, -1, -2), cross)
    state = Gaussian.from_factor(np.zeros((count, DIM)), base.factor)
    for kind, made in KINDS.items():
        found = [limit(GaussianFlow(made(q, -q, 1.0)), jax.tree.map(lambda a, i=i: a[i], state)) for i, q in enumerate(base.Q)]
        check.below(f"{kind}: relative distance of the limit", apart(np.stack([f.cov for f in found]), exact), 1e-6)
        check.equal(f"{kind}: rank", [int(f.rank) for f in found], DIM - 1, 0)


@claim("transformer_pde.decay", source="companion derivation, decay",
       statement=r"Softmax with $V = I$, $A + A^\top \prec 0$: $t\,\Sigma(t) \to (-(A + A^\top))^{-1}$ at rate $1/t$, whatever $\Sigma_0$.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=11)
    A = -np.einsum("nij,nkj->nik", base.K, base.K) - 0.3 * np.eye(DIM) + base.Q - np.swapaxes(base.Q, -1, -2)
    identity = np.broadcast_to(np.eye(DIM), A.shape)
    base = base._replace(Q=A, K=identity, V=identity, mean=0 * base.mean)   # the mean would grow like e^t
    target = np.linalg.inv(-(A + np.swapaxes(A, -1, -2)))
    unit = np.linalg.norm(np.linalg.inv(base.cov), 2, axis=(1, 2))          # the time after which a start begins to be forgotten
    errors = [apart(t[:, None, None] * cov, target) for t, (_, cov) in zip((1e2 * unit, 1e4 * unit), follow("softmax", base, 1e2 * unit, 1e4 * unit),
                                                                          strict=True)]
    check.below("relative distance at t = 1e4 |inv(Sigma_0)|", errors[1], 1e-3)
    check.between("order of convergence in 1/t", np.log(errors[0] / errors[1]) / np.log(100), 0.9, 1.1)


@claim("transformer_pde.lyapunov", source="companion derivation, Lyapunov function",
       statement=r"$V \succ 0$ symmetric, $\operatorname{sym} A \preceq 0$: $\operatorname{tr}(V^{-1}\Sigma)$ does not increase, for softmax; "
                 r"for L2 if $A = -P$.",
       fast={"count": 16}, full={"count": 256})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=12)
    V = np.einsum("nij,nkj->nik", base.V, base.V) + 0.2 * np.eye(DIM)
    for kind in KINDS:
        batch = base._replace(V=V, Q=-base.K)
        level = [np.trace(np.linalg.solve(V, cov), axis1=1, axis2=2) for cov in (base.cov, *(cov for _, cov in follow(kind, batch, 1.0, 10.0)))]
        check.below(f"{kind}: largest increase", np.diff(level, axis=0) / level[0], 0.0)


@claim("transformer_pde.scalar-laws", source="companion derivation, one dimension",
       statement=r"$d = 1$, $V = 1$, $A = a$: blow-up at $1/(2a\sigma_0)$ (softmax); $t\sigma \to 1/(2|a|)$ (softmax) and "
                 r"$1/(4|a|)$ (L2, $K = -Q$) for $a < 0$; L2 grows like $e^{2t}$ for $a = P > 0$.",
       fast={"far": 1e4}, full={"far": 1e6})
def _(check: Check, far: float) -> None:
    a, one = 0.7, Gaussian.from_factor(np.zeros(1), [[1.2]])
    q, run = np.array([[np.sqrt(a)]]), partial(integrate, rtol=1e-10, atol=1e-14)
    check.equal("softmax blow-up", blow_up_time(GaussianFlow(Softmax(q, q, 1.0)), one), 1 / (2 * a * 1.44), 1e-13)
    for made, constant in ((Softmax, 1 / (2 * a)), (L2, 1 / (4 * a))):
        cov = float(run(GaussianFlow(made(q, -q, 1.0)), one, [0.0, far / 2, far]).value.cov[-1, 0, 0])
        check.equal(f"{made.__name__}: t times the variance", far * cov / constant, 1.0, 100 / far)
    cov = np.asarray(run(GaussianFlow(L2(q, q, 1.0)), one, [0.0, 6.0, 8.0]).value.cov)[:, 0, 0]
    check.equal("L2 growth rate of the variance", np.log(cov[2] / cov[1]) / 2, 2.0, 1e-4)
