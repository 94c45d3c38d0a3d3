"""Gates, experts and data of small shapes that the tests of the general mixtures share: three experts, two inputs, sixty rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from theorylab import moe
from theorylab.moe import general as g

K, D, N = 3, 2, 60
GATES = ("slope", "logit", "sigmoid", "cosine", "quadratic", "noisy")
EXPERTS = ("polynomial", "linear", "student", "logistic", "neural")


def gate(kind: str, seed: int = 0) -> g.Gate:
    rng = np.random.default_rng(seed)
    intercept, coef = rng.normal(size=K), rng.normal(size=(K, D))
    bend = rng.normal(size=(K, D, D))
    return {"slope": lambda: g.SoftmaxGate(intercept, coef, temperature=0.7), "logit": lambda: g.SoftmaxGate(intercept, coef, 0.7, "logit"),
            "sigmoid": lambda: g.SigmoidGate(intercept, coef), "cosine": lambda: g.CosineGate(coef, temperature=0.4),
            "quadratic": lambda: g.QuadraticGate(intercept, coef, bend + bend.transpose(0, 2, 1)),
            "noisy": lambda: g.NoisyGate(g.SoftmaxGate(intercept, coef), scale=0.5)}[kind]()


def experts(kind: str, seed: int = 0, k: int = K, d: int = D) -> g.Experts:
    rng = np.random.default_rng(seed + 100)
    coef, level, size = rng.normal(size=(k, d)), rng.normal(size=k), rng.uniform(0.5, 1.5, k)
    root = rng.normal(size=(k, 2, 2))
    covariance = root @ root.transpose(0, 2, 1) + np.eye(2)
    return {"polynomial": lambda: g.PolynomialExperts(rng.normal(size=(k, 1 + d + d * (d + 1) // 2)), size, degree=2),
            "linear": lambda: g.LinearExperts(rng.normal(size=(k, 2, d)), rng.normal(size=(k, 2)), covariance),
            "student": lambda: g.StudentExperts(coef, level, size, rng.uniform(2, 6, k)),
            "logistic": lambda: g.LogisticExperts(rng.normal(size=(k, 3, d)), rng.normal(size=(k, 3))),
            "neural": lambda: g.NeuralExperts(rng.normal(size=(k, 2, d)), rng.normal(size=(k, 2)), rng.normal(size=(k, 2)), level, size)}[kind]()


def inputs(seed: int = 0, n: int = N) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed + 200).uniform(-1, 1, (n, D)))


def responses(kind: str, x: jax.Array, seed: int = 0) -> np.ndarray:
    """Responses that no mixture made: a bent surface with noise, in the form that the experts take."""
    rng = np.random.default_rng(seed + 300)
    y = np.sin(3 * np.asarray(x)) @ np.array([1.0, 0.5]) + 0.3 * rng.normal(size=len(x))
    return {"linear": np.stack([y, y**2], axis=1), "logistic": np.digitize(y, [-0.3, 0.4])}.get(kind, y)


def as_general(m: moe.Mixture) -> g.GeneralMixture:
    """The same mixture in the general form."""
    return g.GeneralMixture(g.SoftmaxGate(m.gate_intercept, m.gate_coef, selection=m.selection),
                            g.PolynomialExperts(m.expert_matrix, m.variance, degree=1), m.active)
