"""Differentiable solutions: closed forms of perturbation theory, finite differences, eigenvalues that coincide."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from theorylab import stiefel
from theorylab.errors import NoClosedFormError

N, P = 6, 3
RNG = np.random.default_rng(0)


def sym(a):
    return (a + a.T) / 2


DA, DB = sym(RNG.normal(size=(N, N))), sym(RNG.normal(size=(N, N)))
B = np.eye(N) + 0.1 * sym(RNG.normal(size=(N, N)))
V = np.linalg.inv(np.linalg.cholesky(B)).T @ np.linalg.qr(RNG.normal(size=(N, N)))[0]
SPECTRA = {"simple": [3.0, 2.5, 2.0, 1.0, 0.5, 0.1], "double inside": [3.0, 3.0, 2.0, 1.0, 1.0, 0.5], "one value": [2.0, 2.0, 2.0, 1.0, 1.0, 1.0]}


def pencil(spectrum):
    back = np.linalg.inv(V)
    return back.T @ np.diag(SPECTRA[spectrum]) @ back


@jax.jit
def solved(t, a):
    return stiefel.solution_map(stiefel.GEVP(a + t * DA, B + t * DB, p=P, reference="none"))


def by_scipy(t, a):
    values, vectors = scipy.linalg.eigh(a + t * DA, B + t * DB)
    x = vectors[:, -P:]
    return values[-P:].sum(), x @ x.T, x @ x.T @ (B + t * DB)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_derivatives_are_those_of_finite_differences_also_where_eigenvalues_coincide(spectrum):
    a, step = pencil(spectrum), 1e-5
    found, change = jax.jvp(lambda t: solved(t, a), (0.0,), (1.0,))
    plus, minus = by_scipy(step, a), by_scipy(-step, a)
    slopes = [(one - other) / (2 * step) for one, other in zip(plus, minus, strict=True)]
    for slope, seen in zip(slopes, (change.values.sum(), change.outer, change.projector), strict=True):
        assert np.abs(slope - seen).max() < 1e-7 * np.abs(seen).max()
    assert np.abs(found.projector @ found.projector - found.projector).max() < 1e-13
    assert np.abs(found.values - np.array(SPECTRA[spectrum][:P])).max() < 1e-13
    pulled = jax.grad(lambda t: jnp.sum(solved(t, a).outer * DA) + jnp.sum(solved(t, a).values))(0.0)
    assert abs(pulled - jnp.sum(change.outer * DA) - change.values.sum()) < 1e-12


def test_derivatives_are_those_of_perturbation_theory():
    a, values = pencil("simple"), np.array(SPECTRA["simple"])
    _, change = jax.jvp(lambda t: solved(t, a), (0.0,), (1.0,))
    push = V.T @ DA @ V - (V.T @ DB @ V) * values
    assert np.abs(change.values - np.diag(push)[:P]).max() < 1e-12
    turn = push[P:, :P] / (values[:P] - values[P:, None])
    x, y = V[:, :P], V[:, P:]
    expected = y @ turn @ x.T + x @ turn.T @ y.T - x @ (x.T @ DB @ x) @ x.T
    assert np.abs(change.outer - expected).max() < 1e-12


@pytest.mark.slow
def test_second_derivatives_of_simple_eigenvalues_are_those_of_perturbation_theory():
    values, identity = np.array(SPECTRA["simple"]), np.eye(N)
    second = jax.hessian(lambda t: stiefel.solution_map(stiefel.GEVP(np.diag(values) + t * DA, identity, p=P, reference="none")).values[0])(0.0)
    assert abs(second - 2 * sum(DA[0, k] ** 2 / (values[0] - values[k]) for k in range(1, N))) < 1e-10


@pytest.mark.slow
def test_correlations_are_differentiable_in_the_rows_of_data():
    x = RNG.normal(size=(40, 4))
    y, move, step = x[:, :3] + RNG.normal(size=(40, 3)), RNG.normal(size=(40, 4)), 1e-5

    @jax.jit
    def of(t):
        return stiefel.solution_map(stiefel.CCA(x + t * move, y, p=2, ridge=0.1, reference="none"))

    found, change = jax.jvp(of, (0.0,), (1.0,))
    exact = stiefel.closed_form(stiefel.CCA(x, y, p=2, ridge=0.1))
    assert np.abs(found.values - exact.values).max() < 1e-14
    assert np.abs(found.cross - exact.point[0] @ exact.point[1].T).max() < 1e-13
    assert np.abs(found.projector[0] @ found.projector[0] - found.projector[0]).max() < 1e-13
    ends = [stiefel.closed_form(stiefel.CCA(x + t * move, y, p=2, ridge=0.1)) for t in (step, -step)]
    slopes = [(np.asarray(f(ends[0])) - f(ends[1])) / (2 * step) for f in (lambda e: e.values, lambda e: e.point[0] @ e.point[1].T,
                                                                              lambda e: e.point[1] @ e.point[1].T)]
    for slope, seen in zip(slopes, (change.values, change.cross, change.outer[1]), strict=True):
        assert np.abs(slope - seen).max() < 1e-7


def test_other_problems_are_refused():
    with pytest.raises(NoClosedFormError, match="known for GEVP, LDA and CCA, got ICA"):
        stiefel.solution_map(stiefel.ICA(RNG.normal(size=(20, 3)), p=2))
