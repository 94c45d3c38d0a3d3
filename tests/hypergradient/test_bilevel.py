"""Problems from functions: derivatives against dense autodiff and differences, trees, batches, precision, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.hypergradient import cases
from theorylab import hypergradient as hg
from theorylab.errors import ArgumentError, NoClosedFormError, NonFiniteInputError, PrecisionError, ShapeError

VECTORS = tuple(jnp.asarray(np.random.default_rng(7).standard_normal(k)) for k in (4, 4, 3))


@jax.jit
def products(problem, x, y, v, d, u):
    at = problem.at(x, y)
    return {"residual": at.residual, "outer_x": at.outer_x, "outer_y": at.outer_y, "product": at.product(d), "transposed": at.transposed(v),
            "matrix": at.matrix(), "diagonal": at.diagonal(), "pullback": at.cross_pullback(v), "cross": at.cross_product(u), "turn": at.turn(v, d)}


@jax.jit
def dense(problem, x, y, v, d, u):
    """The same from full Jacobians; the third derivatives from those of the Lagrangian."""
    F1, F2 = jax.jacrev(problem.residual, (0, 1))(x, y)
    slopes = lambda x: jax.grad(lambda x, y: problem.outer(x, y) - v @ problem.residual(x, y), (0, 1))(x, y)
    turn = jax.jacfwd(slopes)(x)
    G1, G2 = jax.grad(problem.outer, (0, 1))(x, y)
    return {"residual": problem.residual(x, y), "outer_x": G1, "outer_y": G2, "product": F1 @ d, "transposed": F1.T @ v, "matrix": F1,
            "diagonal": jnp.diagonal(F1), "pullback": F2.T @ v, "cross": F2 @ u, "turn": (turn[0] @ d, turn[1] @ d)}


@pytest.mark.parametrize("case", [cases.generic, cases.root, pytest.param(cases.declared_root, marks=pytest.mark.slow)])
def test_the_products_are_those_of_the_full_jacobians(case):
    problem, y, *_ = case()
    args = (VECTORS[0] / 3, y, *VECTORS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), products(problem, *args), dense(problem, *args))


def test_the_transpose_matters_for_a_root_and_symmetry_is_known():
    problem, y, *_ = cases.root()
    at = products(problem, VECTORS[0], y, VECTORS[0], VECTORS[0], VECTORS[2])
    assert not problem.symmetric and not problem.has_energy
    assert np.abs(at["product"] - at["transposed"]).max() > 0.1
    assert cases.declared_root().problem.symmetric and cases.generic().problem.symmetric


@jax.jit
def implicit(problem, x, y):
    at = problem.at(x, y)
    return at.outer_y - at.cross_pullback(jnp.linalg.solve(at.matrix().T, at.outer_x))


@pytest.mark.parametrize("case", [cases.generic, pytest.param(cases.declared_root, marks=pytest.mark.slow)])
def test_the_generic_problem_has_the_numbers_of_the_specification(case):
    problem, y, d, known = case()
    x = jnp.asarray(known["x"])
    np.testing.assert_allclose(cases.solved(problem, y), x, atol=1e-12)
    x = cases.solved(problem, y)
    assert float(problem.outer(x, y)) == pytest.approx(known["L"], abs=1e-11)
    np.testing.assert_allclose(implicit(problem, x, y), known["gradient"], atol=1e-11)
    turned = jax.jit(jax.jacfwd(implicit, 1))(problem, x, y)
    assert float(jnp.linalg.norm(turned, 2)) == pytest.approx(known["C"], abs=1e-10)
    assert float(jnp.linalg.norm(turned @ d)) == pytest.approx(known["turned"], abs=1e-11)
    at = products(problem, x, y, *VECTORS)
    assert np.linalg.norm(np.eye(4) - at["matrix"] / at["diagonal"][:, None], 2) == pytest.approx(known["jacobi"], abs=1e-11)


def test_the_gradient_of_a_root_problem_is_that_of_differences():
    problem, y, *_ = cases.root()
    h = 1e-5
    value = lambda y: float(problem.outer(cases.solved(problem, y), y))
    slopes = [(value(y + h * e) - value(y - h * e)) / (2 * h) for e in np.eye(3)]
    np.testing.assert_allclose(implicit(problem, cases.solved(problem, y), y), slopes, atol=1e-8)


def test_the_cosh_problem_of_the_specification():
    problem, y, _, known = cases.p1()
    x = jnp.array([known["x"]])
    np.testing.assert_allclose(cases.solved(problem, y), x, atol=1e-12)
    assert float(implicit(problem, x, y)[0]) == pytest.approx(known["gradient"], abs=1e-12)
    assert float(implicit(problem, x + 0.1, y)[0]) == pytest.approx(known["Plain"], abs=1e-12)


def tree_energy(x, y, A):
    return jnp.sum((A @ x["w"] - x["c"]) ** 2) / 2 + jnp.exp(y[0]) * jnp.sum(x["w"] ** 2) + jnp.sum(jnp.exp(y[1]["b"]) * jnp.cosh(x["c"]))


def tree_outer(x, y, A):
    return jnp.sum(x["w"]) * y[0] + jnp.sum(x["c"] ** 3)


def tree_problem(**changes):
    given = {"inner": tree_energy, "outer": tree_outer, "args": (jnp.arange(6.0).reshape(3, 2),), "x": {"w": jnp.ones(2), "c": jnp.zeros(3)},
             "y": (0.5, {"b": jnp.zeros(3)})}
    return hg.Bilevel(**{**given, **changes})


def test_trees_are_packed_in_the_order_of_their_leaves():
    problem = tree_problem()
    assert (problem.n, problem.m, problem.dtype) == (5, 4, jnp.float64)
    x = {"w": jnp.array([1.0, 2.0]), "c": jnp.array([3.0, 4.0, 5.0])}
    flat = problem.pack_x(x)
    assert flat.tolist() == [3, 4, 5, 1, 2] and problem.pack_x(flat) is flat
    jax.tree.map(np.testing.assert_array_equal, problem.unpack_x(flat), x)
    y = problem.unpack_y(problem.pack_y((1, {"b": [1, 2, 3]})))
    assert y[0].shape == () and y[1]["b"].tolist() == [1, 2, 3] and y[1]["b"].dtype == jnp.float64
    A = problem.args[0]
    assert float(problem.energy(flat, problem.pack_y(y))) == pytest.approx(float(tree_energy(x, y, A)))
    assert float(problem.outer(flat, problem.pack_y(y))) == pytest.approx(float(tree_outer(x, y, A)))
    jax.tree.map(np.testing.assert_array_equal, problem.start(jax.random.key(0)), (jnp.asarray(0.5), {"b": jnp.zeros(3)}))
    assert problem.start_x(flat).tolist() == [0, 0, 0, 1, 1]


def test_a_tree_problem_is_solved_where_its_gradient_vanishes():
    problem = tree_problem()
    x = tl.solve(problem.inner(problem.y), tolerance=1e-10).value
    gradient = jax.grad(tree_energy)(problem.unpack_x(x), problem.y, problem.args[0])
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-10


def mean_energy(x, y, rows, scale):
    A, b = rows
    return scale * jnp.mean((A @ x - b) ** 2) + jnp.sum(jnp.exp(y) * x**2)


def mean_outer(x, y, rows, scale):
    return jnp.mean(jnp.cosh(rows @ x)) + y[0]


def sampled():
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.standard_normal((6, 2))), jnp.asarray(rng.standard_normal(6))
    return hg.Bilevel(mean_energy, mean_outer, (jnp.asarray(2.0),), x=jnp.zeros(2), y=jnp.zeros(2), inner_data=data,
                      outer_data=jnp.asarray(rng.standard_normal((4, 2))))


def test_batches_of_equal_size_average_to_the_whole():
    problem, x, y = sampled(), jnp.array([0.3, -0.7]), jnp.array([0.1, 0.2])
    assert problem.samples == (6, 4)
    residual, outer = jax.jit(lambda p: p.residual(x, y)), jax.jit(lambda p: p.outer(x, y))
    parts = [residual(problem.inner_batch(jnp.array(i))) for i in ([0, 3], [1, 2], [4, 5])]
    np.testing.assert_allclose(np.mean(parts, axis=0), residual(problem), rtol=1e-13)
    parts = [outer(problem.outer_batch(jnp.array(i))) for i in ([0, 3], [1, 2])]
    np.testing.assert_allclose(np.mean(parts), outer(problem), rtol=1e-13)
    A, b = problem.inner_data
    last = problem.inner_batch(jnp.array([5]))
    assert float(last.energy(x, y)) == pytest.approx(float(mean_energy(x, y, (A[5:], b[5:]), 2.0)))
    drawn = jax.jit(lambda p, i: p.inner_batch(i).residual(x, y))(problem, jnp.array([5, 5]))
    np.testing.assert_allclose(drawn, residual(last), rtol=1e-13)


TRACES = []


def traced_energy(x, y, a):
    TRACES.append(1)
    return jnp.sum(a * jnp.cosh(x)) - y @ x


def test_new_arrays_do_not_compile_again_and_settings_form_a_batch():
    make = lambda a: hg.Bilevel(traced_energy, tree_like_outer, (jnp.asarray(a),), x=jnp.zeros(2), y=jnp.ones(2))
    residual = jax.jit(lambda p, x, y: p.at(x, y).residual)
    x, y = jnp.array([0.1, 0.2]), jnp.ones(2)
    problems = [make([1.0, 2.0]), make([3.0, 4.0])]
    one = [residual(p, x, y) for p in problems[:1]]
    count = len(TRACES)
    one.append(residual(problems[1], x, y))
    assert len(TRACES) == count
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *problems)
    np.testing.assert_allclose(jax.vmap(lambda p: p.at(x, y).residual)(stacked), one, rtol=1e-14)
    np.testing.assert_allclose(jax.vmap(lambda y: problems[0].residual(x, y))(jnp.stack([y, 2 * y]))[1], one[0] - y, rtol=1e-13)


def tree_like_outer(x, y, a):
    return jnp.sum(x) * y[0]


def test_float32_stays_float32():
    problem, y, *_ = cases.generic(jnp.float32)
    given = tuple(v.astype(jnp.float32) for v in VECTORS)
    assert {a.dtype.name for a in jax.tree.leaves(products(problem, given[0], y, *given))} == {"float32"}
    assert problem.inner(y).start(jax.random.key(0)).dtype == jnp.float32
    assert problem.pack_x([1.0, 2.0, 3.0, 4.0]).dtype == jnp.float32


def test_a_copy_with_other_arguments():
    problem = tree_problem()
    other = problem.replace(args=(jnp.ones((3, 2)),))
    assert other.args[0].shape == (3, 2) and float(other.args[0][0, 1]) == 1 and other.inner_function is tree_energy


def test_the_outer_problem_and_the_inner_problem_state_what_they_measure():
    problem, y, *_ = cases.root()
    assert problem.metrics(y) == {} and problem.exact(y) is None and problem.goal(1e-3).name == "gradient_norm"
    assert set(problem.inner(y).metrics(VECTORS[0])) == {"residual"}
    generic = cases.generic().problem
    measured = generic.inner(y).metrics(VECTORS[0])
    assert float(measured["objective"]) == pytest.approx(float(generic.energy(VECTORS[0], y)))
    assert float(measured["residual"]) == pytest.approx(float(jnp.linalg.norm(jax.grad(generic.energy)(VECTORS[0], y))))


class Handmade(hg.BilevelProblem):
    """The least that a subclass defines."""

    a: jax.Array

    @property
    def x_structure(self):
        return jax.ShapeDtypeStruct((2,), self.a.dtype)

    y_structure = x_structure

    def energy(self, x, y):
        return jnp.sum(self.a * jnp.cosh(x)) - x @ jnp.sin(y)

    def outer(self, x, y):
        return x @ y


def test_a_subclass_with_three_definitions_has_all_products():
    problem = Handmade(jnp.array([1.0, 2.0]))
    x, y, v = (jnp.array([0.1 * k, 0.3]) for k in (1, 2, 3))
    np.testing.assert_allclose(problem.at(x, y).cross_pullback(v), -jnp.cos(y) * v, rtol=1e-14)
    np.testing.assert_allclose(problem.at(x, y).diagonal(), problem.a * jnp.cosh(x), rtol=1e-14)


ENERGY, OUTER = (lambda x, y: jnp.sum(x * x) + jnp.sum(y)), (lambda x, y: jnp.sum(x))
GENERIC = cases.generic().problem


def _split_energy(x, y):
    return jnp.sum(jnp.cosh(x) - y * x)


def _first_entry(x, y):
    return x[0]


def test_without_examples_the_shapes_come_from_what_is_passed():
    problem, x, y = hg.Bilevel(_split_energy, _first_entry), jnp.array([0.98137358702]), jnp.array([1.0])
    known = {how: hg.hypergradient(problem, x, y, how()).value for how in (hg.Plain, hg.OnePoint)}
    np.testing.assert_allclose(known[hg.Plain], [0.657264595340], rtol=1e-9)
    np.testing.assert_allclose(known[hg.OnePoint], [0.705014394652], rtol=1e-9)
    np.testing.assert_allclose(jax.jit(lambda x, y: hg.hypergradient(problem, x, y).value)(x, y), known[hg.OnePoint], rtol=1e-12)
    solution = tl.solve(problem.inner(y), jnp.zeros(1), tolerance=1e-12).value
    np.testing.assert_allclose(solution, [np.arcsinh(1.0)], rtol=1e-12)
    np.testing.assert_allclose(hg.reference(problem, y, jnp.zeros(1)), solution, rtol=1e-12)
    constant = hg.efficiency_constant(problem, solution, y)
    assert float(constant) == pytest.approx(0.5, rel=1e-12) and problem.x is None
    tree = hg.Bilevel(lambda x, y: jnp.sum((x["a"] - y["b"]) ** 2), lambda x, y: jnp.sum(x["a"] ** 2))
    np.testing.assert_allclose(hg.hypergradient(tree, {"a": jnp.ones(2)}, {"b": jnp.ones(2)}).value["b"], [2.0, 2.0])


def test_without_an_example_of_x_what_cannot_be_known_is_named():
    problem = hg.Bilevel(_split_energy, _first_entry)
    for call, words in ((lambda: tl.iterate(problem, hg.OuterDescent(0.1), jnp.ones(1), steps=1), r"x has no known shape: pass x= \(an example"),
                        (lambda: tl.iterate(problem.inner(jnp.ones(1)), hg.Newton(), steps=1), "x has no known shape"),
                        (lambda: problem.start(jax.random.key(0)), "y has no known shape")):
        with pytest.raises(ArgumentError, match=words):
            call()
    with pytest.raises(ShapeError, match="x must be a vector, got shape"):
        tl.iterate(problem.inner(jnp.ones(1)), hg.Newton(), 0.5, steps=1)
    with pytest.raises(ShapeError, match="must be a scalar"):
        hg.hypergradient(hg.Bilevel(lambda x, y: x, _first_entry), jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: hg.Bilevel(ENERGY, OUTER, x=0.0, y=0.0, residual=ENERGY), ArgumentError, "either inner .* both"),
    (lambda: hg.Bilevel(None, OUTER, x=0.0, y=0.0), ArgumentError, "either inner .* neither"),
    (lambda: hg.Bilevel(ENERGY, x=0.0, y=0.0), ArgumentError, "outer must be a function"),
    (lambda: hg.Bilevel(3.0, OUTER, x=0.0, y=0.0), ArgumentError, "inner must be a function"),
    (lambda: hg.Bilevel(ENERGY, OUTER, [1.0], x=0.0, y=0.0), ArgumentError, "args must be a tuple"),
    (lambda: hg.Bilevel(ENERGY, OUTER, x=0.0, y=0.0, symmetric=True), ArgumentError, "symmetric is for residual"),
    (lambda: hg.Bilevel(lambda x, y: x, OUTER, x=jnp.ones(2), y=0.0), ShapeError, r"inner\(x, y, \*args\) must be a scalar, got float64\[2\]"),
    (lambda: hg.Bilevel(ENERGY, lambda x, y: (x[0], y), x=jnp.ones(2), y=0.0), ShapeError, "outer.* must be a scalar"),
    (lambda: hg.Bilevel(None, OUTER, x=jnp.ones(2), y=0.0, residual=lambda x, y: x[:1]), ShapeError, "residual.* a tree like x"),
    (lambda: hg.Bilevel(ENERGY, OUTER, x={}, y=0.0), ShapeError, "x must hold at least one array"),
    (lambda: hg.Bilevel(ENERGY, OUTER, x=jnp.array([jnp.nan]), y=0.0), NonFiniteInputError, "x must be finite"),
    (lambda: hg.Bilevel(ENERGY, OUTER, (jnp.array([jnp.inf]),), x=0.0, y=0.0), NonFiniteInputError, "args"),
    (lambda: hg.Bilevel(ENERGY, OUTER, x=jnp.ones(2, complex), y=0.0), PrecisionError, "x must hold real numbers"),
    (lambda: hg.Bilevel(ENERGY, OUTER, x=jnp.ones(2, jnp.float32), y=jnp.zeros(1)), PrecisionError, "y must have the dtype float32"),
    (lambda: hg.Bilevel(lambda x, y: jnp.float64(1.0), OUTER, x=jnp.ones(2, jnp.float32), y=0.0), PrecisionError, "inner.* dtype float32"),
    (lambda: hg.Bilevel(ENERGY, OUTER, x=0.0, y=0.0, inner_data=(jnp.ones(2), jnp.ones(3))), ShapeError, "inner_data must hold arrays with one"),
    (lambda: tree_problem().pack_x({"w": jnp.ones(2)}), ShapeError, "x must be a tree like"),
    (lambda: tree_problem().pack_x({"w": jnp.ones(2), "c": jnp.ones(2)}), ShapeError, r"x\['c'\] must have shape \(3,\)"),
    (lambda: GENERIC.pack_x(jnp.ones(3)), ShapeError, r"x must have shape \(4,\), got \(3,\)"),
    (lambda: GENERIC.pack_y(jnp.ones(3, jnp.float32)), PrecisionError, "y must have the dtype float64"),
    (lambda: GENERIC.pack_y(jnp.ones(3, complex)), PrecisionError, "y must hold real numbers"),
    (lambda: GENERIC.inner(jnp.array([0.0, jnp.inf, 0.0])), NonFiniteInputError, "y must be finite"),
    (lambda: GENERIC.samples, ArgumentError, "is not a mean over samples"),
    (lambda: GENERIC.inner_batch(jnp.array([0])), ArgumentError, "inner_data and outer_data"),
    (lambda: GENERIC.outer_batch(jnp.array([0])), ArgumentError, "has no batches"),
    (lambda: hg.BilevelProblem().inner_batch(jnp.array([0])), ArgumentError, "has no batches"),
    (lambda: hg.BilevelProblem().outer_batch(jnp.array([0])), ArgumentError, "has no batches"),
    (lambda: GENERIC.curvature(jnp.ones(3)), NoClosedFormError, "knows no constants of curvature"),
    (lambda: cases.root().problem.energy(jnp.ones(4), jnp.ones(3)), NoClosedFormError, "root problem without an energy")])
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
