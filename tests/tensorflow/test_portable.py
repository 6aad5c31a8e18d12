"""The composite: the answers of the op, under XLA, in exports, and wherever one asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import cases
import fusebn
from conftest import (
    Array,
    assert_close,
    assert_forward,
    assert_gradients,
    assert_moments,
    away_from_kinks,
    frozen,
    parameters,
    stat,
)
from fusebn import _reference as reference
from fusebn import tensorflow as fbt
from fusebn.tensorflow import _ops, nn


def numpy_of(results: Any) -> tuple[Array, ...]:
    return tuple(result.numpy() for result in results)


def op_types(function: Any, *arguments: Any) -> set[str]:
    graph = function.get_concrete_function(*arguments).graph
    return {op.type for op in graph.get_operations()}


@pytest.mark.parametrize("is_training", [True, False, None], ids=["True", "False", "tensor"])
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "residual_and_weights"])
def test_the_composite_answers_as_the_op_does(
    rng: np.random.Generator,
    dtype: np.dtype[Any],
    is_training: bool | None,
    activation: str | None,
    extras: bool,
) -> None:
    shape = (6, 5, 7)
    x, dy, residual = (frozen(rng.standard_normal(shape), dtype) for _ in range(3))
    scale, offset = parameters(rng, 5, dtype)
    mean = frozen(rng.standard_normal(5), stat(dtype))
    variance = frozen(rng.uniform(0.5, 2, 5), stat(dtype))
    options: dict[str, Any] = {"axis": 1, "activation": activation}
    if extras:
        options["residual"] = residual
        options["weights"] = frozen(rng.integers(0, 3, (6, 7)), stat(dtype))
    for training in [True, False] if is_training is None else [is_training]:
        flag = tf.constant(training) if is_training is None else training
        with fbt.portable(), tf.GradientTape() as tape:
            sources = [tf.constant(v) for v in (x, scale, offset)]
            tape.watch(sources)
            result = nn.fused_batch_norm(*sources, mean, variance, is_training=flag, **options)
        assert_forward(
            numpy_of(result), x, scale, offset, mean, variance, 1e-3, training, **options
        )
        used = reference.fused_batch_norm(
            x, mean=mean, variance=variance, is_training=training, axis=1,
            weights=options.get("weights"), correction=0,
        )  # fmt: skip
        cotangent = away_from_kinks(
            dy, x, scale, offset, *used[1:], axis=1, residual=options.get("residual")
        )
        got = numpy_of(tape.gradient(result.y, sources, output_gradients=tf.constant(cotangent)))
        want = reference.fused_batch_norm_grad(
            cotangent, x, scale, offset, *used[1:], is_training=training, **options
        )
        # TensorFlow rounds each step of the derivative to the type it computes in.
        for ours, oracle in zip(got, want, strict=False):
            size = np.max(np.abs(oracle))
            assert_close(ours, oracle, dtype=ours.dtype, magnitude=size, ulps=128)


@pytest.mark.parametrize("name", ["ten_thousand", "million", "constant", "exact_pairs", "one_nan"])
@pytest.mark.parametrize("jit", [False, True], ids=["portable", "xla"])
def test_hard_data(name: str, jit: bool) -> None:
    """Where TensorFlow under XLA returns a negative variance and NaN."""
    x = cases.make(name, (50, 4, 3), cases.FLOAT32)

    @tf.function(jit_compile=jit)
    def apply(x: Any) -> Any:
        with fbt.portable():
            return nn.fused_batch_norm(x, None, None, axis=1)

    assert_forward(numpy_of(apply(tf.constant(x))), x, None, None, axis=1)


@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=lambda shape: shape.why)
def test_an_empty_batch(shape: cases.Shape) -> None:
    x = np.zeros(shape.block, np.float32)
    old = np.full(x.shape[1], 2, np.float32)
    with fbt.portable():
        y, mean, variance = numpy_of(nn.fused_batch_norm(x, None, None, axis=1))
        kept = nn.fused_batch_norm(x, None, None, old, old, exponential_avg_factor=0.1, axis=1)
    assert y.shape == x.shape
    assert np.isnan(mean).all()
    assert np.isnan(variance).all()
    np.testing.assert_array_equal(kept[1], old)
    np.testing.assert_array_equal(kept[2], old)


def test_a_batch_of_weight_zero() -> None:
    x = tf.constant([[np.nan, 1.0], [3.0, 4.0]])
    offset = tf.constant([-1.0, 2.0])
    with fbt.portable(), tf.GradientTape() as tape:
        tape.watch([x, offset])
        y, mean, _ = nn.fused_batch_norm(x, None, offset, axis=1, weights=[0, 0], activation="relu")
    np.testing.assert_array_equal(y, [[0, 2], [0, 2]])
    assert np.isnan(mean).all()
    dx, doffset = tape.gradient(y, [x, offset])
    np.testing.assert_array_equal(dx, np.zeros((2, 2)))
    np.testing.assert_array_equal(doffset, [0, 2])


def test_zero_variance_and_zero_epsilon() -> None:
    x = tf.fill([4, 2], 542.37)
    with fbt.portable(), tf.GradientTape() as tape:
        tape.watch(x)
        y = nn.fused_batch_norm(x, None, [1.0, -1.0], epsilon=0, axis=1).y
    np.testing.assert_array_equal(y, np.tile([1, -1], (4, 1)))
    np.testing.assert_array_equal(tape.gradient(y, x), np.zeros((4, 2)))


# ---- chosen automatically ----


def test_xla_gets_the_composite(rng: np.random.Generator) -> None:
    x, dy = (frozen(rng.standard_normal((3, 4, 5)), cases.FLOAT32) for _ in range(2))
    scale, offset = parameters(rng, 5, cases.FLOAT32)

    @tf.function(jit_compile=True)
    def step(x: Any, scale: Any, offset: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            result = nn.fused_batch_norm(x, scale, offset, axis=-1)
        return result, tape.gradient(result.y, [x, scale, offset], output_gradients=dy)

    arguments = [tf.constant(v) for v in (x, scale, offset)]
    result, gradients = step(*arguments)
    assert_forward(numpy_of(result), x, scale, offset)
    batch = reference.moments(x, (0, 1))
    statistics = batch.mean.squeeze(), batch.variance().squeeze()
    assert_gradients((*numpy_of(gradients), None), dy, x, scale, offset, *statistics)
    assert not any("Fusebn" in op for op in op_types(step, *arguments))


def test_xla_with_a_tensor_flag(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((6, 5)), cases.FLOAT32)
    mean, variance = np.zeros(5, "f"), np.full(5, 2, "f")

    @tf.function(jit_compile=True)
    def apply(x: Any, flag: Any) -> Any:
        return nn.fused_batch_norm(x, None, None, mean, variance, is_training=flag, axis=-1)

    for flag in (True, False):
        result = numpy_of(apply(tf.constant(x), tf.constant(flag)))
        assert_forward(result, x, None, None, mean, variance, 1e-3, flag)


def test_moments_under_xla(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((6, 5, 4)) + 1e4, cases.FLOAT32)

    @tf.function(jit_compile=True)
    def apply(x: Any) -> Any:
        return nn.moments(x, [0, 2])

    assert_moments(numpy_of(apply(tf.constant(x))), x, (0, 2))


def test_the_choice_is_made_anew_for_each_trace() -> None:
    @tf.function
    def apply(x: Any) -> Any:
        return nn.fused_batch_norm(x, None, None, axis=-1).y

    x = tf.ones([2, 3])
    assert "FusebnBatchNorm" in op_types(apply, x)

    @tf.function
    def portably(x: Any) -> Any:
        with fbt.portable(), fbt.portable():
            pass
        with fbt.portable():
            y = nn.fused_batch_norm(x, None, None, axis=-1).y
        return nn.batch_normalization(y, *nn.moments(y, 0), None, None, 0)

    types = op_types(portably, x)
    assert {"FusebnBatchNorm", "FusebnMoments"} <= types  # after the with
    assert "Rsqrt" in types  # inside it


def test_portable_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), fbt.portable():
        _ = 1 / 0
    assert fusebn.info()["frameworks"]["tensorflow"]["support"].startswith("native op")


def test_info_says_which_and_why() -> None:
    def support() -> str:
        return fusebn.info()["frameworks"]["tensorflow"]["support"]

    assert support().startswith("native op")
    with fbt.portable():
        assert support() == "composite of TensorFlow's own ops: inside portable()"
    assert support().startswith("native op")


def test_where_there_is_a_gpu_the_op_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "_gpus", lambda: True)
    x = tf.ones([2, 3])
    assert _ops.why_portable(x) == ""  # an eager tensor says that it lies on the CPU
    with tf.Graph().as_default():
        anywhere = tf.compat.v1.placeholder(tf.float32, [2, 3])
        assert _ops.why_portable(anywhere) == "the op has no kernel for a GPU"
        with tf.device("/CPU:0"):
            assert _ops.why_portable(tf.identity(anywhere)) == ""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_its_library_the_package_works_and_says_so(tmp_path: Path) -> None:
    program = """
import tensorflow as tf
load = tf.load_op_library
def fail(path):
    raise tf.errors.NotFoundError(None, None, "no such file")
tf.load_op_library = fail
import fusebn, fusebn.tensorflow as fbt
y, mean, variance = fbt.nn.fused_batch_norm([[1.0], [3.0]], None, None, axis=-1)
print(mean.numpy(), variance.numpy(), fusebn.info()["frameworks"]["tensorflow"]["support"])
"""
    assert run(program).strip() == (
        "[2.] [2.] composite of TensorFlow's own ops: "
        "libfusebn_tensorflow.so cannot be loaded: no such file"
    )


def test_without_tensorflow_it_says_what_to_install() -> None:
    program = """
import sys
sys.modules["tensorflow"] = None
import fusebn
assert "tells which" in fusebn.info()["frameworks"]["tensorflow"]["support"]
try:
    import fusebn.tensorflow
except ImportError as error:
    print(error)
"""
    assert run(program).strip() == (
        "fusebn.tensorflow needs tensorflow, which is not installed. "
        "Install it by: pip install 'fusebn[tensorflow]'"
    )


def test_an_export_runs_where_fusebn_is_not_installed(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    x = frozen(rng.standard_normal((4, 3, 5)), cases.FLOAT32)
    scale, offset = parameters(rng, 5, cases.FLOAT32)

    class Model(tf.Module):
        def __init__(self) -> None:
            self.scale = tf.Variable(scale)
            self.mean, self.variance = tf.Variable(tf.zeros(5)), tf.Variable(tf.ones(5))

        @tf.function(input_signature=[tf.TensorSpec([None, 3, 5]), tf.TensorSpec([], tf.bool)])
        def serve(self, x: Any, is_training: Any) -> Any:
            with fbt.portable():
                return nn.fused_batch_norm(
                    x, self.scale, offset, self.mean, self.variance, axis=-1,
                    is_training=is_training, activation="relu",
                ).y  # fmt: skip

    model = Model()
    tf.saved_model.save(model, str(tmp_path / "model"))
    np.save(tmp_path / "x.npy", x)
    program = f"""
import sys
sys.modules["fusebn"] = None  # importing it raises
import numpy as np, tensorflow as tf
model = tf.saved_model.load({str(tmp_path / "model")!r})
x = np.load({str(tmp_path / "x.npy")!r})
for flag in (True, False):
    np.save({str(tmp_path)!r} + f"/{{flag}}.npy", model.serve(x, tf.constant(flag)))
assert not any(name.partition(".")[0] == "fusebn" for name, m in sys.modules.items() if m)
"""
    run(program)
    for flag in (True, False):
        y = np.load(tmp_path / f"{flag}.npy")
        want = model.serve(x, tf.constant(flag)).numpy()
        assert_close(y, want, dtype=cases.FLOAT32, magnitude=1, ulps=8)
        native = nn.fused_batch_norm(
            x, scale, offset, np.zeros(5, "f"), np.ones(5, "f"), axis=-1, is_training=flag,
            activation="relu",
        ).y  # fmt: skip
        assert_close(y, native.numpy(), dtype=cases.FLOAT32, magnitude=4, ulps=8)


def test_a_model_with_the_op_loads_where_fusebn_is(tmp_path: Path) -> None:
    model = tf.Module()
    model.serve = tf.function(
        lambda x: nn.fused_batch_norm(x, None, None, axis=-1, activation="relu").y,
        input_signature=[tf.TensorSpec([None, 3])],
    )
    tf.saved_model.save(model, str(tmp_path))
    program = f"""
import tensorflow as tf
import fusebn.tensorflow
print(tf.saved_model.load({str(tmp_path)!r}).serve(tf.constant([[0., 1., 2.], [2., 1., 0.]])))
"""
    assert "[[0." in run(program)
