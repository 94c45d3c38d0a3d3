"""Data and numbers that several tests of the family share: the golden cases of the companion's appendix A."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from theorylab import moe

# A1: one point, four experts in two dimensions, all K and both rules.
A1_POINT = (np.array([[0.7, -0.4]]), np.array([0.3]))
A1_LOG_DENSITY = {("slope", 1): -0.545791352644727, ("slope", 2): -0.559470229091025, ("slope", 3): -0.723501234162861,
                  ("slope", 4): -0.801646868826787, ("logit", 1): -0.545791352644727, ("logit", 2): -0.730650320289477,
                  ("logit", 3): -0.723501234162861, ("logit", 4): -0.801646868826787}
A1_GATE = {("slope", 2): [0.876532952435, 0.123467047565, 0, 0], ("slope", 3): [0.72074389628, 0.101522847118, 0, 0.177733256602],
           ("slope", 4): [0.66229033465, 0.09328917073, 0.0811017088477, 0.163318785773], ("logit", 2): [0.802183888559, 0, 0, 0.197816111441]}


def a1(active: int, selection: str) -> moe.Mixture:
    return moe.Mixture([0.5, -1.0, 0.2, 0.0], [[1.0, -0.5], [0.8, 0.3], [-0.6, 1.2], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.3, -0.7]],
                       [0.0, 1.0, -1.0, 2.0], [0.25, 0.5, 1.0, 2.0], active, selection)


# A2: one step of EM on ten rows.
A2_X = -1 + (2 * np.arange(10) + 1) / 10
A2_Y = np.array([-2.6, -2.9, 0.9, 1.9, 0.1, 0.4, 2.1, -0.3, 2.4, -0.9])
A2_START = moe.Mixture([0.0, 0.0, 0.0], [[-3.0], [-1.0], [0.0]], [[1.5], [-1.0], [0.5]], [-0.8, 0.4, 1.8], [0.5, 0.5, 0.5], 2, "slope")
A2_LOG_LIKELIHOOD = -15.8177998762369
A2_RESPONSIBILITIES = {0: [0.999999949813, 5.01874897142e-8, 0], 3: [0.000377146362091, 0.999622853638, 0], 6: [0, 0.0136873681572, 0.986312631843]}
A2_EXPERTS = np.array([[0.0307638662063874, 3.38246853271432], [0.54927706133358, -1.61378523555127], [1.43642283752591, 1.46483808766743]])
A2_VARIANCE = np.array([0.252587263314923, 0.228849199252899, 0.12526228778233])
A2_COUNT = np.array([2.32951096853343, 5.55759254842267, 2.1128964830439])
A2_ARGMAX = np.array([[-3.64280616227763, -6.48062593697951], [0.0810212666390549, 0.465022562464294], [0.0, 0.0]])
A2_ARGMAX_LIKELIHOOD = -13.1008510905403
A2_NEWTON = np.array([[-2.72070671631257, -4.56689404285395], [0.0235313970518889, 0.728499672415315], [0.0, 0.0]])
A2_NEWTON_LIKELIHOOD = -12.8002996331936

# A3: a fit of four experts to S1, for the losses.
A3_FIT = moe.Mixture([0.3, -0.9, -0.8, 0.0], [[-3.9], [-1.6], [-1.35], [0.0]], [[2.1], [-1.4], [-1.7], [0.95]], [-1.05, 0.7, 0.25, 2.1],
                     [0.12, 0.16, 0.17, 0.15], 2, "slope")

# A4: a neighbour of S1, for the distances.
A4_OTHER = moe.Mixture([0.5, -0.1, 0.0], [[-3.8], [-1.6], [0.0]], [[2.05], [-1.45], [1.0]], [-1.0, 0.55, 1.95], [0.12, 0.2, 0.15], 2, "slope")

# A5: the maximum likelihood estimate on 400 rows of Weyl data of S1.
A5_TRUTH_LIKELIHOOD = -360.66473306765783
A5_LIKELIHOOD = -360.019850321
A5_FIT = np.array([0.40567742, -0.22899485, -3.90454756, -1.47312864, 1.97323873, -1.45524054, 1.01664706, -1.0192731, 0.52281925, 1.97170521,
                   0.09919757, 0.19228501, 0.15713951])
A5_ERRORS = np.array([0.4684, 0.3125, 0.9615, 0.5822, 0.08564, 0.10387, 0.12174, 0.05168, 0.05097, 0.07490, 0.01090, 0.03134, 0.01925])


def a2_likelihood() -> moe.Likelihood:
    """A2 padded to the shape of the other tests, so that they share compiled programs."""
    pad = lambda a: np.append(a, np.zeros(390))
    return moe.Likelihood(pad(A2_X), pad(A2_Y), 3, 2, weight=pad(np.ones(10)))


def s1_data(n: int = 400) -> moe.Draw:
    return moe.weyl_sample(moe.example("S1"), n, -1.0, 1.0)


def s1_likelihood(n: int = 400, dtype: object = jnp.float64, **options: object) -> moe.Likelihood:
    x, y = s1_data(n)
    return moe.Likelihood(x.astype(dtype), y.astype(dtype), 3, 2, **options)


def perturbed(truth: moe.Mixture, seed: int, size: float = 0.5) -> moe.Mixture:
    rng = np.random.default_rng(seed)
    shape = truth.gate_matrix.shape
    return moe.Mixture.from_matrices(truth.gate_matrix + size * rng.normal(size=shape), truth.expert_matrix + size * rng.normal(size=shape),
                                     truth.variance, truth.active, truth.selection)
