"""Variants that grow without blowing up, and the one case in which L2 attention does."""

from __future__ import annotations

import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.transformer_pde.attention import L2
from theorylab.transformer_pde.claims._ensembles import DIM, Heads, definite, follow, heads, spectral, trace, turned
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian
from theorylab.transformer_pde.oracles import blow_up_time


def _rate(cov: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The growth rate of the trace between the last two times."""
    return np.log(trace(cov[:, -1]) / trace(cov[:, -2])) / (times[-1] - times[-2])


@claim("transformer_pde.l2-blows-up-without-injective-keys", source="companion derivation, L2 attention with a singular key matrix",
       statement=r"L2 with $K = (1, 0)$, $Q = (0, 1)$, $V = \operatorname{diag}(0, 1)$ blows up at $t^* = 3/(2b_0)$ with $\Sigma_{11} = 1$, "
                 r"$\Sigma_{12} = b_0/(1 - 2b_0t/3)$, $\Sigma_{22} = c_0/(1 - 2b_0t/3)^2$.",
       fast={"solve": False}, full={"solve": True})
def _(check: Check, solve: bool) -> None:
    Q, K, V, cov = [[0.0, 1.0]], [[1.0, 0.0]], np.diag([0.0, 1.0]), np.array([[1.0, 0.5], [0.5, 1.0]])
    times = np.array([1.5, 2.9, 2.99])
    run, = follow(("l2", Heads.of(Q, K, V, np.linalg.cholesky(cov)), times))
    left = 1 - times / 3
    exact = np.stack([np.ones(3), 0.5 / left, 1 / left**2], axis=-1)
    found = run.cov[0][:, (0, 0, 1), (0, 1, 1)]
    check.below("covariance against its formula at t = 1.5, 2.9, 2.99 (relative)", np.abs(found / exact - 1), 1e-8)
    if solve:
        flow, start = GaussianFlow(L2(Q, K, V)), Gaussian(np.zeros(2), cov)
        check.equal("blow-up time by the desingularized flow", blow_up_time(flow, start), 3.0, 1e-10)


@claim("transformer_pde.l2-is-global-with-injective-keys", source="companion derivation, growth of L2 attention",
       statement=r"L2 with injective keys: $\|\Sigma(t)\| \le \|\Sigma_0\|e^{2\|V\|\|A\|\|P^{-1}\|t}$; and where all eigenvalues of $VK^{-1}Q$ "
                 r"have positive real part and the dominant one is real, $\log\operatorname{tr}\Sigma$ grows at the rate "
                 r"$2\lambda_{\max}(VK^{-1}Q)$.",
       fast={"count": 20}, full={"count": 200})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=9)
    base = base.but(K=base.K + 1.5 * np.eye(DIM))
    times, keys = np.array([0.5, 1.0, 3.0]), np.linalg.svd(base.K, compute_uv=False)[:, -1] ** 2
    run, = follow(("l2", base, times))
    grown = np.log(spectral(run.cov) / spectral(base.cov)[:, None])
    bound = 2 * (spectral(base.V) * spectral(base.A) / keys)[:, None] * times
    check.below("growth of log |cov| over its bound with injective keys", grown / bound, 1.0)

    times = np.array([8.0, 9.0])                                              # the slowest direction has grown by e^7 in variance
    S, K = np.eye(DIM) + 0.2 * base.Q, np.eye(DIM) + 0.2 * base.V
    drive = S @ np.diag([1.0, 0.5, 0.45]) @ np.linalg.inv(S)
    run, = follow(("l2", base.but(V=np.eye(DIM), K=K, Q=K @ drive, factor=3 * np.eye(DIM) + base.factor), times))
    check.equal("growth rate of the trace against 2 lambda_max", _rate(run.cov, times), 2.0, 0.01)
    Q = np.array([[-0.09678415830991538, 0.42220166048145347], [-0.22546156340099752, -0.6379430932117882]]) / np.sqrt(2)
    K = np.array([[-0.016286303695742424, 1.0442167783791647], [-1.0848803286340662, -2.2059248271588077]])
    times = np.array([37.5, 38.5])
    run, = follow(("l2", Heads.of(Q, K, 1.0, np.sqrt(0.5) * np.eye(2)), times))
    expected = 2 * np.linalg.eigvals(np.linalg.solve(K, Q)).max()
    check.equal("growth rate of the weights of the explosion figure at t = 38", _rate(run.cov, times), expected, 2e-3)


@claim("transformer_pde.sinkhorn-is-global", source="companion derivation, growth of Sinkhorn attention",
       statement=r"Sinkhorn: $\|\Sigma(t)\| \le \|\Sigma_0\|e^{2\|V\|t/\varepsilon}$; for $A \succ 0$, $V \succ 0$ symmetric, "
                 r"$\log\operatorname{tr}\Sigma$ grows at the rate $2\lambda_{\max}(V)/\varepsilon$.",
       fast={"count": 20}, full={"count": 200})
def _(check: Check, count: int) -> None:
    base, times = heads(count, seed=31).but(temperature=0.7), np.array([0.5, 1.0, 2.0])
    run, = follow(("sinkhorn", base, times))
    bound = spectral(base.cov)[:, None] * np.exp(2 * spectral(base.V)[:, None] / 0.7 * times)
    check.below("norm over its bound", spectral(run.cov) / bound, 1.0)
    turn = np.linalg.qr(base.V)[0]
    V = turn @ np.diag([1.0, 0.5, 0.4]) @ turned(turn)
    times = np.array([8.0, 10.0])
    run, = follow(("sinkhorn", base.but(V=V, Q=definite(base.K, 1.0), K=np.eye(DIM)), times))
    check.equal("growth rate of the trace against 2 lambda_max / eps", _rate(run.cov, times), 2 / 0.7, 1e-3)
    single, times = Heads.of([[1.0, 0.3], [0.3, 0.8]], 1.0, np.diag([1.0, 0.05]), np.eye(2), temperature=0.7), np.array([6.0, 7.0])
    run, = follow(("sinkhorn", single, times))
    check.equal("the same with a wide gap below lambda_max", _rate(run.cov, times), 2 / 0.7, 1e-6)
