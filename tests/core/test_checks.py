"""Checks of arguments: what passes, what is refused, and in which words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab.core import checks
from theorylab.errors import ArgumentError, MatrixError, NonFiniteInputError, PrecisionError, ShapeError, ToleranceError, UnknownNameError

SPD = np.array([[2.0, 1.0], [1.0, 2.0]])


def test_arrays_of_numbers_become_jax_arrays_of_a_real_dtype():
    for value in ([1, 2], (1.0, 2.0), np.array([1, 2]), np.array([True, False]), jnp.array([1, 2])):
        assert checks.array("x", value).dtype == jnp.float64
    assert checks.array("x", np.ones(2, np.float32)).dtype == jnp.float32
    assert isinstance(checks.array("x", [1.0]), jax.Array)
    assert checks.array("x", np.ones((5, 3, 2)), (3, None), batched=True).shape == (5, 3, 2)
    assert np.isnan(checks.array("x", [np.nan], finite=False)).all()


def test_matrices_within_round_off_of_their_property_pass():
    noisy = SPD + 1e-14 * np.array([[0, 1], [0, 0]])
    assert checks.symmetric("A", noisy).shape == (2, 2)
    assert checks.semidefinite("A", np.diag([1.0, -1e-15])).shape == (2, 2)
    assert checks.semidefinite("A", np.zeros((2, 2))).shape == (2, 2)
    assert checks.definite("A", np.stack([SPD, 1e-20 * SPD]), batched=True).shape == (2, 2, 2)
    assert checks.definite("A", SPD.astype(np.float32)).dtype == jnp.float32


def test_values_of_tracers_pass_but_their_shapes_are_checked():
    jax.jit(lambda a: checks.definite("A", a))(-SPD)
    jax.jit(lambda t: checks.real("t", t, above=0.0))(-1.0)
    jax.jit(lambda t: checks.tolerance("t", t, jnp.float64))(1e-30)
    with pytest.raises(ShapeError, match="A must be a square matrix"):
        jax.jit(lambda a: checks.definite("A", a))(np.ones((2, 3)))


def test_numbers_and_names_within_bounds_are_returned():
    assert checks.real("t", 0.5, above=0.0, below=1.0) == 0.5
    assert checks.whole("n", np.int64(3), low=3, high=3) == 3
    assert checks.among("kind", "lu", ("lu", "eigh")) == "lu"
    assert checks.tolerance("tolerance", 1e-14, jnp.float64) == 1e-14
    assert checks.same_length(x=np.ones((3, 2)), y=[1, 2, 3]) == 3
    assert checks.broadcastable(1, a=np.ones((4, 1, 2)), b=np.ones((3, 2)), c=None) == (4, 3)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: checks.array("x", [[1, 2], [3]]), ShapeError, "x must be an array, got nested sequences of unequal lengths"),
    (lambda: checks.array("x", "text"), PrecisionError, "x must hold real numbers of float32 or float64, got dtype <U4"),
    (lambda: checks.array("x", np.ones(2, np.float16)), PrecisionError, "got dtype float16"),
    (lambda: checks.array("x", jnp.ones(2, jnp.bfloat16)), PrecisionError, "got dtype bfloat16"),
    (lambda: checks.array("x", np.ones(2, np.longdouble)), PrecisionError, "got dtype float128"),
    (lambda: checks.array("x", 1j * np.ones(2)), PrecisionError, "got dtype complex128"),
    (lambda: checks.array("x", jax.random.key(0)), PrecisionError, "got dtype key"),
    (lambda: checks.array("x", np.ones((2, 3)), (None, 2)), ShapeError, r"x must have shape \(any, 2\), got \(2, 3\)"),
    (lambda: checks.array("x", np.ones(3), (None, 2), batched=True), ShapeError, r"x must have shape \(any, 2\) after leading axes, got \(3,\)"),
    (lambda: checks.array("x", np.ones((0, 2))), ShapeError, r"x must not be empty, got shape \(0, 2\)"),
    (lambda: checks.array("x", [1.0, np.inf]), NonFiniteInputError, r"x must be finite, got inf at index \(1,\)"),
    (lambda: checks.square("A", np.ones(3)), ShapeError, r"A must be a square matrix, got shape \(3,\)"),
    (lambda: checks.square("A", np.ones((2, 2, 2))), ShapeError, r"A must be a square matrix, got shape \(2, 2, 2\)"),
    (lambda: checks.square("A", SPD, 3), ShapeError, "A must be 3 x 3 to match the other arguments, got 2 x 2"),
    (lambda: checks.symmetric("A", [[1.0, 2.0], [3.0, 1.0]]), MatrixError, r"A must be symmetric, got 2 at \(0, 1\) and 3 at \(1, 0\)"),
    (lambda: checks.symmetric("A", np.stack([SPD, np.triu(SPD)]), batched=True), MatrixError, r"got 1 at \(1, 0, 1\) and 0 at \(1, 1, 0\)"),
    (lambda: checks.definite("B", np.diag([1.0, -2.0])), MatrixError, "positive definite, its smallest eigenvalue is -2 and its largest 1"),
    (lambda: checks.definite("B", np.diag([1.0, 0.0])), MatrixError, "positive definite, its smallest eigenvalue is 0"),
    (lambda: checks.definite("B", np.stack([SPD, -SPD]), batched=True), MatrixError, r"eigenvalue is -3 and its largest -1 \(matrix \(1,\)\)"),
    (lambda: checks.semidefinite("B", [[0.0, 1.0], [1.0, 0.0]]), MatrixError, "B must be positive semidefinite, its smallest eigenvalue is -1"),
    (lambda: checks.same_dtype(a=np.ones(2), b=np.ones(2, np.float32)), PrecisionError, "a and b must have one dtype, got a float64, b float32"),
    (lambda: checks.broadcastable(2, a=np.ones((3, 2, 2)), b=np.ones((2, 2, 2))), ShapeError,
     r"leading axes of a and b must broadcast, got a \(3,\), b \(2,\)"),
    (lambda: checks.same_length(x=np.ones(3), y=np.ones(2)), ShapeError, "x and y must have the same length along axis 0, got x 3, y 2"),
    (lambda: checks.real("t", 2.0, low=0.0, high=1.0), ArgumentError, "t must be a number at least 0 and at most 1, got 2"),
    (lambda: checks.real("t", "much"), ArgumentError, "t must be a number, got 'much'"),
    (lambda: checks.real("t", np.nan), ArgumentError, "t must be a number, got nan"),
    (lambda: checks.whole("n", 2.5), ArgumentError, "n must be a whole number, got 2.5"),
    (lambda: checks.whole("n", True), ArgumentError, "n must be a whole number, got True"),
    (lambda: checks.whole("n", 0, low=1), ArgumentError, "n must be a whole number at least 1, got 0"),
    (lambda: jax.jit(lambda n: checks.whole("n", n))(3), ArgumentError, "known before compilation, got a traced value"),
    (lambda: checks.among("kind", "choleski", ("cholesky", "lu")), UnknownNameError, "kind 'choleski' is not known; did you mean 'cholesky'"),
    (lambda: checks.tolerance("tolerance", 1e-9, jnp.float32), ToleranceError, "tolerance must be at least 1.2e-06 for float32 data, got 1e-09"),
    (lambda: checks.tolerance("tolerance", 0.0, jnp.float64), ArgumentError, "tolerance must be a number above 0, got 0"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
