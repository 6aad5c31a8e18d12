"""`moving_averages.assign_moving_average`: TensorFlow's results, names and ways to run it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.training import moving_averages as theirs

from fusebn.tensorflow import moving_averages as ours

v1 = tf.compat.v1


def trajectory(assign: Any, zero_debias: bool, dtype: Any) -> tuple[list[Any], list[str]]:
    """Return an average after each of five updates, and the names of all variables."""
    values = np.random.default_rng(0).normal(3, 2, (5, 4))
    with tf.Graph().as_default(), v1.Session() as session:
        value = v1.placeholder(dtype, [4])
        with v1.variable_scope("net"), v1.variable_scope("norm"):
            zeros = v1.zeros_initializer()
            average = v1.get_variable("average", [4], dtype, zeros, trainable=False)
            update = assign(average, value, 0.75, zero_debias=zero_debias)
        session.run(v1.global_variables_initializer())
        # 0.75 is exact in any type: there the two may differ by no more than the last bits.
        steps = [session.run(update, {value: step}) for step in values]
        assert np.array_equal(session.run(average), steps[-1])
        return steps, [variable.name for variable in v1.global_variables()]


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
@pytest.mark.parametrize("zero_debias", [False, True])
def test_it_is_tensorflows(zero_debias: bool, dtype: Any) -> None:
    steps, names = trajectory(ours.assign_moving_average, zero_debias, dtype)
    their_steps, their_names = trajectory(theirs.assign_moving_average, zero_debias, dtype)
    assert names == their_names
    eps = float(ml_dtypes.finfo(dtype.as_numpy_dtype).eps)
    for step, their_step in zip(steps, their_steps, strict=True):
        assert step.astype(np.float64) == pytest.approx(their_step.astype(np.float64), rel=4 * eps)


def test_names_of_a_second_debiased_average_of_the_same_variable() -> None:
    names = []
    for assign in (ours.assign_moving_average, theirs.assign_moving_average):
        with tf.Graph().as_default():
            average = v1.get_variable("average", [], initializer=v1.zeros_initializer())
            assign(average, 1.0, 0.5)
            assign(average, 2.0, 0.5)
            names.append([variable.name for variable in v1.global_variables()])
    assert names[0] == names[1]
    assert "average/biased_1:0" in names[0]


def test_debiased_average_of_constants_is_the_constant() -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        average = v1.get_variable("average", [2], tf.float64, v1.zeros_initializer())
        update = ours.assign_moving_average(average, [3.0, -7.0], 0.9)
        session.run(v1.global_variables_initializer())
        for _ in range(4):
            assert session.run(update) == pytest.approx([3, -7], rel=1e-15)


def test_float64_keeps_its_digits() -> None:
    average = tf.Variable(tf.ones([1], tf.float64))
    ours.assign_moving_average(average, 0.0, 0.9, zero_debias=False)
    assert average.numpy() == pytest.approx([0.9], rel=1e-15)  # 0.1 by way of float32: 1.5e-9 off


def test_under_control_dependencies() -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        average = v1.get_variable("average", [], initializer=v1.zeros_initializer())
        with tf.control_dependencies([ours.assign_moving_average(average, 4.0, 0.5, False)]):
            done = tf.constant("done")
        session.run(v1.global_variables_initializer())
        assert session.run(done) == b"done"
        assert session.run(average) == 2


def test_in_update_ops() -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        average = v1.get_variable("average", [], initializer=v1.zeros_initializer())
        update = ours.assign_moving_average(average, 4.0, 0.5, False, name="smooth")
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, update)
        session.run(v1.global_variables_initializer())
        assert session.run(average) == 0
        session.run(v1.get_collection(v1.GraphKeys.UPDATE_OPS))
        assert session.run(average) == 2
        assert any(op.name.startswith("smooth/") for op in session.graph.get_operations())


def test_eagerly_and_in_a_function() -> None:
    average = tf.Variable([0.0, 8.0])
    ours.assign_moving_average(average, [4.0, 4.0], 0.5, zero_debias=False)
    assert average.numpy().tolist() == [2, 6]

    @tf.function
    def step(value: Any, decay: Any) -> None:
        ours.assign_moving_average(average, value, decay, zero_debias=False)

    step(tf.constant([4.0, 4.0]), tf.constant(0.5))
    assert average.numpy().tolist() == [3, 5]
    smooth = v1.make_template(
        "smooth", lambda: ours.assign_moving_average(average, [1.0, 2.0], 0.5, zero_debias=True)
    )
    smooth()
    smooth()
    assert average.numpy().tolist() == [1, 2]
    assert {v.name for v in smooth.variables} == {
        "smooth/Variable/biased:0",
        "smooth/Variable/local_step:0",
    }


def test_reference_variables() -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        for zero_debias in (False, True):
            with v1.variable_scope(f"debias_{zero_debias}", use_resource=False):
                average = v1.get_variable("average", [2], initializer=v1.zeros_initializer())
                update = ours.assign_moving_average(average, [4.0, 8.0], 0.5, zero_debias)
            session.run(v1.global_variables_initializer())
            assert session.run(update).tolist() == ([4, 8] if zero_debias else [2, 4])


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((np.zeros(2), 1.0, 0.5), TypeError, "`variable` must be a tf.Variable; got ndarray"),
        ((tf.Variable([1, 2]), 1, 0.5), TypeError, "`variable` must be an array of float16, "),
        (
            (tf.Variable([1.0]), [1.0, 2.0], 0.5),
            ValueError,
            r"`value` must broadcast .*\(1,\); got",
        ),
        ((tf.Variable([1.0]), 1.0, 1.5), ValueError, r"`decay` must lie in \[0, 1\]; got 1.5"),
        (
            (tf.Variable([1.0]), 1.0, 1.0),
            ValueError,
            "`decay` must be less than 1 with zero_debias",
        ),
        ((tf.Variable([1.0]), 1.0, 0.5, "yes"), TypeError, "`zero_debias` must be a bool"),
        ((tf.Variable([1.0]), 1.0, 0.5), RuntimeError, "make_template"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_errors(arguments: Any, kind: type[Exception], text: str) -> None:
    before = [v.numpy().tobytes() for v in arguments if isinstance(v, tf.Variable)]
    with pytest.raises(kind, match=rf"^assign_moving_average: .*{text}"):
        ours.assign_moving_average(*arguments)
    assert before == [v.numpy().tobytes() for v in arguments if isinstance(v, tf.Variable)]
