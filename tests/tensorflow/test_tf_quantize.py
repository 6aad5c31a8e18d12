"""`FakeQuantize` on TensorFlow's variables: the bits of NumPy's, in every way to run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import fusebn
from conftest import Array
from fusebn.quantize import FakeQuantize as Expected
from fusebn.tensorflow import FakeQuantize

v1 = tf.compat.v1

PLAIN = [[0, -0.0, 1, -1, 0.5, -0.5, 2.5, 3.75], [0.1, 0.2, 0.3, -0.4, 0.55, -0.66, 1e-30, 9]]
NOT_FINITE = [[np.nan, 2, -np.inf, 1], [-1, 2, 3, np.inf]]
TINY = [[1e-38, -3e-38, 9e-37, 1e-40], [-1e-44, 2e-38, 4e-37, -5e-37]]
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in fusebn._spec.ELEMENT_TYPES}
SETTINGS: dict[str, dict[str, Any]] = {
    "affine": {},
    "symmetric": {"symmetric": True, "axis": 0},
    "moving": {"limits": "moving", "decay": 0.5, "axis": -1},
    "moving, symmetric, delayed": {
        "limits": "moving", "decay": 0.75, "symmetric": True, "delay": 1,
    },
    "moving, of 9 parts in 10": {"limits": "moving", "decay": 0.9, "axis": 1},
    "fixed": {"limits": (-0.3, 0.7)},
    "fixed, delayed": {"limits": (0.1, 3.0), "symmetric": True, "delay": 2},
}  # fmt: skip
COMPILED = {"eagerly": None, "tf.function": False, "XLA": True}


def bits(array: Array) -> Array:
    """Return the bits, with one NaN for all."""
    array = np.where(array == array, array, np.array(np.nan, array.dtype))
    return array.view(f"u{array.itemsize}")


def compiled(quantize: FakeQuantize, x: Array, jit: bool | None) -> Callable[..., Any]:
    def call(x: Any, training: Any) -> Any:
        return quantize(x, training=training)

    if jit is None:
        return call
    signature = [tf.TensorSpec(x.shape, x.dtype), tf.TensorSpec([], tf.bool)]
    function: Callable[..., Any] = tf.function(call, signature, jit_compile=jit)
    return function


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("values", [PLAIN, NOT_FINITE, TINY], ids=["plain", "not finite", "tiny"])
def test_the_bits_of_numpy(values: Any, name: str, how: str) -> None:
    if values is TINY and name.startswith("moving"):
        values = PLAIN  # their averages would be subnormal, which TensorFlow takes for 0
    cases = [(DTYPES["float32"], width) for width in range(2, 17)]
    cases += [(dtype, width) for dtype in DTYPES.values() for width in (2, 5, 16)]
    if how != "eagerly":  # to compile takes longer than to run
        cases = cases[list(SETTINGS).index(name) :: 14]
    for dtype, width in cases:
        with np.errstate(over="ignore"):
            x = np.array(values).astype(dtype)
        options = {"bits": width, **SETTINGS[name]}
        expected, quantize = Expected(**options), FakeQuantize(**options)
        call = compiled(quantize, x, COMPILED[how])
        for scale, training in ((1, True), (1.7, True), (1, False)):
            given = x * np.array(scale, dtype)
            with np.errstate(all="ignore"):
                want = expected(given, training=training)
            got = call(tf.constant(given), tf.constant(training)).numpy()
            np.testing.assert_array_equal(bits(got), bits(want), str((dtype, options)))
        if expected.low is not None:
            np.testing.assert_array_equal(quantize.low.numpy(), expected.low)
            np.testing.assert_array_equal(quantize.high.numpy(), expected.high)
        assert (0 if quantize.steps is None else int(quantize.steps)) == expected.steps


def test_without_a_state_the_one_of_all_frameworks() -> None:
    x = np.array(PLAIN, "float32")
    expected = Expected(5, axis=1)(x)
    np.testing.assert_array_equal(Expected(5, axis=1)(tf.constant(x)).numpy(), expected)
    graph = tf.function(Expected(5, axis=1))
    np.testing.assert_array_equal(graph(tf.constant(x)).numpy(), expected)


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("options", [{"limits": (-1.0, 3.0)}, {"symmetric": True, "delay": 1}])
def test_gradient_passes_straight_through(options: Any, how: str) -> None:
    x, dy = np.linspace(-5, 5, 101, dtype="float32"), np.arange(101, dtype="float32")
    expected, quantize = Expected(3, **options), FakeQuantize(3, **options)

    def gradient(x: Any, training: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = quantize(x, training=training)
        return tape.gradient(y, x, output_gradients=tf.constant(dy))

    function = gradient
    if COMPILED[how] is not None:
        function = tf.function(gradient, jit_compile=COMPILED[how])
    for _ in range(3):  # one of them in the delay
        expected(x, training=True)
        got = function(tf.constant(x), tf.constant(True)).numpy()
        np.testing.assert_array_equal(got, expected.gradient(x, dy))


def test_a_graph_of_v1_observes_when_it_runs() -> None:
    x = np.array(PLAIN, "float32")
    expected = Expected(4, limits="moving", decay=0.5)
    with tf.Graph().as_default(), v1.Session() as session:
        quantize = FakeQuantize(4, limits="moving", decay=0.5, name="weights")
        flag = v1.placeholder_with_default(False, [])
        given = v1.placeholder(tf.float32, x.shape)
        y = quantize(given, training=flag)
        names = {variable.op.name for variable in v1.global_variables()}
        assert names == {"weights/low", "weights/high", "weights/steps"}
        session.run(v1.global_variables_initializer())
        for scale, training in ((1, False), (1, True), (2, True), (3, False)):
            want = expected(x * scale, training=training)
            got = session.run(y, {given: x * scale, flag: training})
            np.testing.assert_array_equal(got, want)
        assert session.run(quantize.steps) == 2


def test_checkpoints_restore_before_the_variables_are_made(tmp_path: Path) -> None:
    x = tf.constant(PLAIN, tf.float32)
    quantize = FakeQuantize(4, limits="moving", axis=0)
    quantize(x, training=True)
    path = tf.train.Checkpoint(quantize).save(str(tmp_path / "state"))
    other = FakeQuantize(**quantize.get_config())
    tf.train.Checkpoint(other).restore(path)
    np.testing.assert_array_equal(other(2 * x).numpy(), quantize(2 * x).numpy())
    assert int(other.steps) == 1


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"FakeQuantize: `bits` must lie in \[2, 16\]"):
        FakeQuantize(1)
    quantize = FakeQuantize(limits="moving", axis=0)
    quantize(tf.zeros([3, 2]))
    with pytest.raises(ValueError, match=r"of shape \(3, 1\); got \(2, 2\)"):
        quantize(tf.zeros([2, 2]))
    with pytest.raises(TypeError, match="`x` must be an array of float16"):
        quantize(tf.constant([1, 2]))
    with pytest.raises(TypeError, match="`training` must be a bool"):
        quantize(tf.zeros([3, 2]), training=3)

    @tf.function
    def unknown(x: Any) -> Any:
        return FakeQuantize(limits="moving", axis=0)(x)

    with pytest.raises(ValueError, match="`x` must have a known rank"):
        unknown.get_concrete_function(tf.TensorSpec(None, tf.float32))
    with pytest.raises(ValueError, match="a known length on its axis 0"):
        unknown.get_concrete_function(tf.TensorSpec([None], tf.float32))
