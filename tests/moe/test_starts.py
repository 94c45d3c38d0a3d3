"""Starting points: laws of the published ones, and sense of those from the data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.moe import cases
from theorylab import errors, moe
from theorylab.moe.starts import _thinned

S0, S1 = moe.example("S0"), moe.example("S1")
MANY = 400


def starts(variant: str, experts: int = 4) -> moe.Mixture:
    """A batch of starts near S1."""
    keys = jax.random.split(jax.random.key(0), MANY)
    return jax.jit(jax.vmap(lambda key: moe.near(S1, experts, key=key, rows=1000, variant=variant)))(keys)


def atoms(batch: moe.Mixture) -> np.ndarray:
    """The true expert that each fitted one lies at."""
    return np.argmin(np.abs(np.asarray(batch.expert_coef)[:, :, 0, None] - np.asarray(S1.expert_coef)[:, 0]), axis=2)


def test_the_script_variant_covers_every_atom_with_the_published_noise():
    batch = starts("script")
    cells = atoms(batch)
    assert all(set(row) == {0, 1, 2} for row in cells)
    doubled = np.array([np.bincount(row, minlength=3).argmax() for row in cells])
    np.testing.assert_allclose(np.bincount(doubled, minlength=3) / MANY, 1 / 3, atol=0.1)
    size = 0.005 * 1000**-0.083
    for fitted, true in ((batch.gate_matrix, S1.gate_matrix), (batch.expert_matrix, S1.expert_matrix)):
        noise = np.asarray(fitted) - np.asarray(true)[cells]
        np.testing.assert_allclose(noise.std(axis=(0, 1)), size, rtol=0.1)
        assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.1
    extra = np.asarray(batch.variance) - np.asarray(S1.variance)[cells]
    assert (extra > 0).all()
    np.testing.assert_allclose(np.sqrt(np.mean(extra**2)), 0.0005 * 1000**-0.25, rtol=0.1)


def test_the_r_variant_shares_its_noise_and_keeps_the_last_expert_last():
    batch = starts("r")
    cells = atoms(batch)
    assert all(set(row) == {0, 1, 2} for row in cells) and (cells[:, -1] == 2).all()
    for fitted, true, size in ((batch.gate_matrix, S1.gate_matrix, 0.005), (batch.expert_matrix, S1.expert_matrix, 0.05)):
        noise = np.asarray(fitted) - np.asarray(true)[cells]
        np.testing.assert_allclose(noise[..., 0], noise[..., 1], atol=1e-14)
        np.testing.assert_allclose(noise.std(), size * 1000**-0.083, rtol=0.1)
    extra = np.asarray(batch.variance) - np.sqrt(np.asarray(S1.variance))[cells]
    np.testing.assert_allclose(np.sqrt(np.mean(extra**2)), 0.005 * 1000**-0.25, rtol=0.1)


@pytest.mark.parametrize("variant", ["script", "r"])
def test_equal_numbers_of_experts_are_matched_one_to_one(variant):
    cells = atoms(starts(variant, 3))
    assert (np.sort(cells, axis=1) == np.arange(3)).all()


def test_a_start_may_keep_another_number_of_experts():
    start = moe.near(S0, 3, key=0, active=2)
    assert (start.experts, start.active, start.selection) == (3, 2, "logit")


def two_clouds() -> moe.Likelihood:
    """Two lines far apart, in x and in y."""
    x = np.concatenate([np.linspace(-2, -1, 200), np.linspace(1, 2, 200)])
    y = np.where(x < 0, 10 + x, -10 - 2 * x) + 0.1 * np.cos(40 * x)
    return moe.Likelihood(x, y, 2, 2)


def test_kmeans_finds_separated_clusters_and_their_lines():
    likelihood = two_clouds()
    start = moe.kmeans(likelihood, key=0)
    left = int(np.argmax(np.asarray(start.gate([[-1.5]]))[0]))
    x, y = np.asarray(likelihood.x[:, 0]), np.asarray(likelihood.y)
    for expert, rows in ((left, x < 0), (1 - left, x > 0)):
        slope, intercept = np.polyfit(x[rows], y[rows], 1)
        np.testing.assert_allclose(start.expert_matrix[expert], [intercept, slope], rtol=1e-8)
        assert (np.asarray(start.gate(likelihood.x[rows]))[:, expert] > 0.9).all()


def test_rows_of_weight_zero_do_not_move_a_start():
    likelihood = two_clouds()
    x, y, w = (np.array(a) for a in (likelihood.x, likelihood.y, likelihood.weight))
    x[::4], y[::4], w[::4] = 1e3, -1e5, 0
    start = moe.kmeans(moe.Likelihood(x, y, 2, 2, weight=w), key=0)
    assert np.abs(np.sort(np.asarray(start.expert_matrix), axis=0) - [[-10, -2], [10, 1]]).max() < 0.1


def test_random_responsibilities_give_every_expert_about_the_same_line():
    likelihood = two_clouds()
    start = moe.random_responsibilities(likelihood, key=0)
    slope, intercept = np.polyfit(np.asarray(likelihood.x[:, 0]), np.asarray(likelihood.y), 1)
    np.testing.assert_allclose(start.expert_matrix, [[intercept, slope]] * 2, atol=1.0)
    np.testing.assert_allclose(start.gate([[0.0]]), 0.5, atol=0.15)


def test_the_best_start_avoids_a_poor_local_maximum():
    likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S2"), 400), 2, 2)
    best = moe.best_start(likelihood, key=0)
    assert float(likelihood.log_likelihood(best)) > float(likelihood.log_likelihood(moe.kmeans(likelihood, key=0)))
    assert float(likelihood.log_likelihood(best)) > -432  # there is a local maximum at -432.49


def test_of_many_rows_the_short_fits_see_an_even_sample_of_those_that_count():
    n = 5000
    at = np.arange(n, dtype=float)
    weight = (at % 5 == 0) * (at < 2500)                              # 500 rows of positive weight among 5000
    problem = moe.Likelihood(at, np.sin(at), 2, 2, weight=weight)
    rows = np.asarray(_thinned(problem, jax.random.key(0)).x[:, 0])
    assert len(rows) == 2048 and set(rows) == set(at[weight > 0])
    assert set(np.unique(rows, return_counts=True)[1]) <= {3, 4, 5, 6}
    even = np.asarray(_thinned(moe.Likelihood(at, np.sin(at), 2, 2), jax.random.key(0)).x[:, 0])
    assert len(np.unique(even)) > 0.9 * 2048 and np.diff(even).min() >= 0 and np.diff(even).max() <= 2 * n / 2048 + 1


@pytest.mark.slow
def test_the_best_start_of_many_rows_leads_to_the_maximum():
    truth = S0.replace(active=2, selection="slope")
    likelihood = moe.Likelihood(*truth.sample(6000, key=1), 2, 2)
    fits = [tl.iterate(likelihood, moe.EM(), start, steps=200, stop=tl.Below("gain", 1e-10), throw=False).history["log_likelihood"][-1]
            for start in (moe.best_start(likelihood, key=0), truth)]
    assert abs(fits[0] - fits[1]) < 1e-3


@pytest.mark.slow
def test_the_dense_fit_of_two_lines_reaches_the_published_maximum():
    truth = S0.replace(active=2)
    likelihood = moe.Likelihood(*truth.sample(1000, key=0), 2, 2)
    reference = float(likelihood.log_likelihood(moe.dense_first(likelihood, key=1)))
    from_truth = float(likelihood.log_likelihood(truth))
    assert reference > from_truth


@pytest.mark.slow
def test_dense_first_keeps_the_dense_gate_and_truncates_it():
    likelihood = cases.s1_likelihood()
    start = moe.dense_first(likelihood, key=0, steps=50)
    assert (start.active, start.selection) == (2, "slope")
    dense = likelihood.replace(active=3)
    again = start.replace(active=3)
    assert float(dense.log_likelihood(again)) > float(dense.log_likelihood(moe.kmeans(dense, key=0)))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: moe.near(S1, 2, key=0), errors.ArgumentError, "experts must be a whole number at least 3, got 2"),
    (lambda: moe.near(S1, 4, key=0, variant="python"), errors.UnknownNameError, "variant"),
    (lambda: moe.near(S1, 4, key=0, active=5), errors.ArgumentError, "active"),
    (lambda: moe.kmeans(S1, key=0), errors.ArgumentError, "likelihood must be a Likelihood"),
    (lambda: moe.random_responsibilities(3, key=0), errors.ArgumentError, "likelihood must be"),
    (lambda: moe.dense_first(None, key=0), errors.ArgumentError, "likelihood must be"),
    (lambda: moe.best_start(cases.s1_likelihood(per_pass=2), key=0), errors.ArgumentError, "a streamed one"),
    (lambda: moe.best_start(two_clouds(), key=0, starts=0), errors.ArgumentError, "starts"),
    (lambda: moe.kmeans(two_clouds(), key="seed"), errors.ArgumentError, "key must be"),
])
def test_wrong_arguments_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_batch_of_starts_is_made_by_vmap():
    likelihood = two_clouds()
    batch = jax.vmap(lambda key: moe.kmeans(likelihood, key=key))(jax.random.split(jax.random.key(0), 3))
    assert batch.variance.shape == (3, 2) and bool(jnp.all(jnp.isfinite(batch.variance)))
