"""`nn` beside TensorFlow's own functions: equal where these are right, right where they are not."""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import cases
import fusebn
from conftest import (
    assert_close,
    assert_gradients,
    assert_moments,
    frozen,
    parameters,
    stat,
)
from fusebn import _reference as reference
from fusebn.tensorflow import nn

v1 = tf.compat.v1
THEIR_FORMATS = ["NHWC", "NCHW", "NDHWC", "NCDHW"]


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    return tf.constant(frozen(rng.standard_normal(shape), np.dtype(dtype)))


def assert_equal(ours: Any, theirs: Any, ulps: float = 16) -> None:
    """Equal to rounding, in units of the largest element; the same dtype and shape."""
    assert ours.dtype == theirs.dtype
    theirs = theirs.numpy()
    size = np.max(np.abs(theirs.astype(np.float64)), initial=0)
    assert_close(ours.numpy(), theirs, dtype=theirs.dtype, magnitude=size, ulps=ulps)


# ---- fused_batch_norm ----


@pytest.mark.parametrize("data_format", THEIR_FORMATS)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16], ids=lambda d: d.name)
def test_fused_batch_norm(
    rng: np.random.Generator, data_format: str, is_training: bool, dtype: Any
) -> None:
    shape = cases.FORMATS[data_format]
    x, dy = (tf.cast(normal(rng, shape), dtype) for _ in range(2))
    scale, offset = (tf.constant(p) for p in parameters(rng, 5, cases.FLOAT32))
    mean, variance = normal(rng, (5,)), tf.constant(rng.uniform(0.5, 2, 5), tf.float32)
    results = []
    for function in (nn.fused_batch_norm, v1.nn.fused_batch_norm):
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            given = () if is_training else (mean, variance)
            forward = function(
                x, scale, offset, *given, epsilon=0.01, data_format=data_format,
                is_training=is_training,
            )  # fmt: skip
        gradients = tape.gradient(forward[0], [x, scale, offset], output_gradients=dy)
        results.append([*forward, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("data_format", THEIR_FORMATS)
def test_mixing_as_tensorflow_does(rng: np.random.Generator, data_format: str) -> None:
    x = normal(rng, cases.FORMATS[data_format])
    one, mean, variance = tf.ones(5), normal(rng, (5,)), tf.fill([5], 0.7)
    arguments = (x, one, one, mean, variance, 0.001, data_format, True, "name", 0.3)
    ours, theirs = (f(*arguments) for f in (nn.fused_batch_norm, v1.nn.fused_batch_norm))
    for a, b in zip(ours, theirs, strict=True):
        assert_equal(a, b)


def test_float64_works(rng: np.random.Generator) -> None:
    x = normal(rng, (3, 4, 5, 6), np.float64)
    one = tf.ones(6, tf.float64)
    with pytest.raises(tf.errors.InvalidArgumentError):
        v1.nn.fused_batch_norm(x, one, one)
    y, mean, variance = nn.fused_batch_norm(x, one, one)
    assert y.dtype == mean.dtype == variance.dtype == tf.float64
    assert_moments((mean.numpy(), variance.numpy()), x.numpy(), (0, 1, 2), correction=1)


def test_the_gradient_of_the_variance_is_not_silently_zero(rng: np.random.Generator) -> None:
    x = normal(rng, (7, 1, 1, 3))
    one = tf.ones(3)
    gradients = []
    for function in (nn.fused_batch_norm, v1.nn.fused_batch_norm):
        with tf.GradientTape() as tape:
            tape.watch(x)
            variance = function(x, one, one)[2]
        gradients.append(tape.gradient(variance, x))
    batch = reference.moments(x.numpy(), (0, 1, 2))
    want = 2 * (reference.wide(x) - batch.mean) / 6
    assert_close(gradients[0].numpy(), want, dtype=cases.FLOAT32, magnitude=1, ulps=4)
    assert gradients[1] is None or not np.any(gradients[1])


def test_xla_at_an_offset(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((64, 1, 1, 3)) + 1e4, cases.FLOAT32)

    @tf.function(jit_compile=True)
    def ours(x: Any) -> Any:
        return nn.fused_batch_norm(x, tf.ones(3), tf.zeros(3))

    @tf.function(jit_compile=True)
    def theirs(x: Any) -> Any:
        return v1.nn.fused_batch_norm(x, tf.ones(3), tf.zeros(3))

    _, mean, variance = ours(tf.constant(x))
    assert_moments((mean.numpy(), variance.numpy()), x, (0, 1, 2), correction=1)
    wrong = theirs(tf.constant(x))[2].numpy()
    right = reference.moments(x, (0, 1, 2)).variance(1).squeeze()
    assert np.max(np.abs(wrong - right)) > 0.1, "TensorFlow has repaired it: say so in the docs"


def test_a_tensor_flag_in_a_session(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 2, 2, 3)).astype(np.float32)
    one = np.ones(3, np.float32)
    with tf.Graph().as_default(), v1.Session() as session:
        flag = v1.placeholder(tf.bool, [])
        ours = nn.fused_batch_norm(x, one, one, one, one, is_training=flag)
        results = [session.run(list(ours), {flag: value}) for value in (True, False)]
    training = v1.nn.fused_batch_norm(x, one, one)
    inference = v1.nn.fused_batch_norm(x, one, one, one, one, is_training=False)
    for got, want in zip(results, (training, inference), strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_variables_of_either_kind_are_tensors(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 3)).astype(np.float32)
    y, *_ = nn.fused_batch_norm(x, tf.Variable(tf.ones(3)), None, axis=-1)
    with tf.Graph().as_default(), v1.Session() as session:
        for use_resource in (True, False):
            scale = v1.get_variable(
                f"scale{use_resource}", [3], initializer=tf.ones_initializer(),
                use_resource=use_resource,
            )  # fmt: skip
            result = nn.fused_batch_norm(x, scale, None, axis=-1).y
            gradient = tf.gradients(result, scale)[0]
            session.run(scale.initializer)
            got, dscale = session.run([result, gradient])
            np.testing.assert_array_equal(got, y)
            assert dscale.shape == (3,)


# ---- moments ----


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(
    "axes", [[0, 1, 2], [0, 2, 3], [1, 2], [0], [1], [3], [0, 2], [-1, 0], None]
)
@pytest.mark.parametrize("keepdims", [False, True])
def test_moments(rng: np.random.Generator, dtype: np.dtype[Any], axes: Any, keepdims: bool) -> None:
    x = frozen(rng.standard_normal((3, 4, 5, 6)), dtype)
    ours = nn.moments(x, axes, keepdims=keepdims)
    all_axes = tuple(range(4)) if axes is None else tuple(axes)
    theirs = tf.nn.moments(tf.constant(x, tf.float64), all_axes, keepdims=keepdims)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert_close(a.numpy(), b.numpy(), dtype=dtype, magnitude=1 + abs(b.numpy()), ulps=2)


def test_moments_are_exact_where_tensorflows_are_not() -> None:
    x = tf.cast(tf.fill([1000], 100.0), tf.bfloat16) + tf.constant([0.5], tf.bfloat16)
    data = x.numpy().astype(np.float64)
    mean, _ = nn.moments(tf.concat([x, x[:37] * 0], 0), 0)
    want = np.concatenate([data, np.zeros(37)]).mean()
    assert mean.numpy() == ml_dtypes.bfloat16(want)

    wide = tf.constant([-6e4, 6e4], tf.float16)
    assert np.isinf(tf.nn.moments(wide, 0)[1])
    assert fusebn.moments(wide, 0)[1].numpy() == np.float32(float(wide[1]) ** 2)


@pytest.mark.parametrize("axes", [[0, 2], [1], [0, 1, 2]])
def test_gradients_of_moments(rng: np.random.Generator, axes: list[int]) -> None:
    x = normal(rng, (3, 4, 5), np.float64)
    weights = tf.constant(rng.uniform(0.5, 2, [n for i, n in enumerate(x.shape) if i in axes]))

    def first(x: Any, w: Any) -> Any:
        mean, variance = nn.moments(x, axes, weights=w)
        return tf.reduce_sum(tf.sin(mean) + tf.cos(3 * variance))

    def second(x: Any, w: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            value = first(x, w)
        return sum(tf.reduce_sum(tf.sin(g)) for g in tape.gradient(value, [x, w]))

    for function in (first, second):
        theory, practice = tf.test.compute_gradient(function, [x, weights], delta=1e-5)
        for ours, differences in zip(theory, practice, strict=True):
            np.testing.assert_allclose(ours, differences, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_moments_at_a_large_mean() -> None:
    """The mean does not fit a float32: its low part must not be lost in x - mean."""
    x = cases.make("million", (64, 3, 1), cases.FLOAT32)[..., 0]
    with tf.GradientTape() as tape:
        source = tf.constant(x)
        tape.watch(source)
        variance = nn.moments(source, 0)[1]
    want = 2 * (reference.wide(x) - reference.moments(x, 0).mean) / 64
    got = tape.gradient(variance, source).numpy()
    assert_close(got, want, dtype=cases.FLOAT32, magnitude=2 / 64, ulps=8)


def test_moments_of_nothing() -> None:
    for result in (nn.moments(tf.zeros([0, 3]), 0), nn.moments(tf.ones([2, 3]), 0, weights=[0, 0])):
        assert np.isnan(result).all()
        assert result[0].shape == (3,)


def test_moments_of_unknown_lengths(rng: np.random.Generator) -> None:
    @tf.function(input_signature=[tf.TensorSpec([None, None, 3])])
    def apply(x: Any) -> Any:
        return nn.moments(x, [0, 1])

    x = rng.standard_normal((4, 5, 3)).astype(np.float32)
    assert_moments(tuple(v.numpy() for v in apply(x)), x, (0, 1))
    assert np.isnan(apply(x[:0])[0]).all()


def test_both_orders_of_the_arguments() -> None:
    x = tf.reshape(tf.range(6.0), [2, 3])
    for call in (
        lambda f: f.moments(x, [0], None, True),  # TensorFlow 2
        lambda f: f.moments(x, [0], None, keepdims=True, name="n"),
    ):
        np.testing.assert_array_equal(call(nn)[0], call(tf.nn)[0])
    for call in (
        lambda f: f.moments(x, [0], None, "name", True),  # TensorFlow 1
        lambda f: f.moments(x, [0], None, None, True),
        lambda f: f.moments(x, [0], keep_dims=True),
        lambda f: f.moments(x, axes=[0], name="n", keepdims=False),
        lambda f: f.weighted_moments(x, [0], tf.ones([2, 1]), "name", True),
        lambda f: f.sufficient_statistics(x, [0], None, True, "name")[1:],
    ):
        for ours, theirs in zip(call(nn), call(v1.nn), strict=True):
            if theirs is not None:
                np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="`keep_dims` must be left out"):
        nn.moments(x, 0, keepdims=True, keep_dims=True)


@pytest.mark.parametrize("shape", [(3, 4, 5, 1), (3, 1, 1, 1), (4, 5, 1), (3, 4, 5, 6), (6,), ()])
def test_weighted_moments(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x = normal(rng, (3, 4, 5, 6))
    weights = tf.constant(rng.uniform(0, 2, shape), tf.float32)
    ours = nn.weighted_moments(x, [0, 1, 2], weights)
    theirs = tf.nn.weighted_moments(x, [0, 1, 2], weights)
    for a, b in zip(ours, theirs, strict=True):
        assert_equal(a, b)


def test_weighted_moments_of_weight_zero() -> None:
    x, weights = tf.ones([2, 3]), tf.zeros([2, 1])
    for function in (nn, tf.nn):
        mean, variance = function.weighted_moments(x, [0], weights)
        np.testing.assert_array_equal(mean, np.zeros(3))
        np.testing.assert_array_equal(variance, np.zeros(3))
    assert np.isnan(fusebn.weighted_moments(x, 0, weights)[0]).all()


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("shift", [None, 0.25])
def test_sufficient_statistics(rng: np.random.Generator, keepdims: bool, shift: Any) -> None:
    x = normal(rng, (3, 4, 5))
    shift = None if shift is None else tf.constant(shift)
    ours = nn.sufficient_statistics(x, [0, 1], shift, keepdims)
    theirs = tf.nn.sufficient_statistics(x, [0, 1], shift, keepdims)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_equal(a, b)
    for a, b in zip(nn.normalize_moments(*ours), tf.nn.normalize_moments(*theirs), strict=True):
        assert_equal(a, b)


def test_normalize_moments_is_never_negative() -> None:
    ours = nn.normalize_moments(2.0, tf.constant([2e4]), tf.constant([2e8]) - 64, None)
    assert ours[1].numpy() == 0
    assert tf.nn.normalize_moments(2.0, tf.constant([2e4]), tf.constant([2e8]) - 64, None)[1] < 0


# ---- batch_normalization ----

BROADCASTS = [
    [(6,)] * 4,
    [(1, 1, 1, 6)] * 4,
    [(1, 4, 1, 1)] * 4,
    [(3, 1, 1, 6)] * 4,
    [(6,), (1, 6), (), (1, 1, 1, 1)],
    [(3, 4, 5, 6)] * 4,
    [()] * 4,
    [(6,), (6,), None, (6,)],
    [(6,), (6,), (6,), None],
    [(4, 1, 1), (4, 1, 1), None, None],
]


@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64], ids=lambda d: d.name)
def test_batch_normalization(rng: np.random.Generator, shapes: Any, dtype: Any) -> None:
    x = tf.constant(rng.standard_normal((3, 4, 5, 6)), dtype)
    given = [None if s is None else tf.constant(rng.uniform(0.5, 2, s), dtype) for s in shapes]
    sources = [x, *(v for v in given if v is not None)]
    results = []
    for function in (nn.batch_normalization, tf.nn.batch_normalization):
        with tf.GradientTape() as tape:
            tape.watch(sources)
            y = function(x, *given, 0.01)
        results.append([y, *tape.gradient(y, sources, output_gradients=tf.sin(5 * x))])
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs, ulps=256)


def test_batch_normalization_of_unknown_shapes(rng: np.random.Generator) -> None:
    @tf.function(input_signature=[tf.TensorSpec(None)] * 3)
    def apply(x: Any, mean: Any, variance: Any) -> Any:
        return nn.batch_normalization(x, mean, variance, None, None, tf.constant(0.01))

    x = rng.standard_normal((3, 4)).astype(np.float32)
    for shape in [(4,), (3, 1), ()]:
        mean, variance = np.full(shape, 2, "f"), np.full(shape, 3, "f")
        want = tf.nn.batch_normalization(x, mean, variance, None, None, 0.01)
        assert_equal(apply(x, mean, variance), want)


def test_one_op_where_the_parameters_vary_along_one_axis() -> None:
    def ops(*shapes: tuple[int, ...]) -> list[str]:
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.float32, [None, 4, None, 6])
            nn.batch_normalization(x, *(tf.ones(shape) for shape in shapes), 0.1)
            return [op.type for op in graph.get_operations() if op.type.startswith("Fusebn")]

    assert ops((6,), (6,), (6,), (6,)) == ["FusebnBatchNorm"]
    assert ops((4, 1, 1), (1, 4, 1, 1), (), (4, 1, 1)) == ["FusebnBatchNorm"]
    assert ops((4, 1, 6), (6,), (), ()) == []


def test_batch_normalization_does_not_cancel() -> None:
    x = cases.make("ten_thousand", (64, 3, 1), cases.FLOAT32)[..., 0]
    batch = reference.moments(x, 0)
    mean, variance = batch.mean[0].astype("f"), batch.variance()[0].astype("f")
    y = nn.batch_normalization(x, mean, variance, None, None, 0.0)
    want = reference.normalize(x, mean, variance, None, None, 0.0)
    assert_close(y.numpy(), want, dtype=cases.FLOAT32, magnitude=np.abs(want) + 1, ulps=8)
    theirs = tf.nn.batch_normalization(x, mean, variance, None, None, 0.0).numpy()
    assert np.max(np.abs(theirs - want)) > 1e-3


@pytest.mark.parametrize("scaled", [True, False])
def test_global_normalization(rng: np.random.Generator, scaled: bool) -> None:
    x, m, b, g = normal(rng, (2, 3, 4, 5)), *(normal(rng, (5,)) for _ in range(3))
    v = tf.fill([5], 0.5)
    name = "batch_norm_with_global_normalization"
    theirs = getattr(tf.nn, name)(x, m, v, b, g, 0.01, scaled)
    assert_equal(getattr(nn, name)(x, m, v, b, g, 0.01, scaled), theirs, ulps=64)
    aliases = getattr(nn, name)(
        t=x, m=m, v=v, beta=b, gamma=g, variance_epsilon=0.01, scale_after_normalization=scaled
    )
    assert_equal(aliases, theirs, ulps=64)
    with pytest.raises(ValueError, match="`t` must be left out, since `input` is given"):
        getattr(nn, name)(x, m, v, b, g, 0.01, scaled, t=x)


# ---- signatures, and the public functions ----


@pytest.mark.parametrize("name", nn.__all__)
def test_names_order_and_defaults_are_tensorflows(name: str) -> None:
    """Of version 2 in position; of version 1 by name."""
    ours = inspect.signature(getattr(nn, name)).parameters
    theirs = getattr(tf.nn, name, None) or getattr(v1.nn, name)
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(inspect.signature(theirs).parameters)
    for parameter, default in inspect.signature(theirs).parameters.items():
        if default.default is not default.empty:
            assert ours[parameter].default == default.default, parameter
    assert set(inspect.signature(getattr(v1.nn, name)).parameters) <= set(ours)


def test_the_public_functions_take_tensors(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((6, 3)), cases.FLOAT16)
    tensor, one = tf.constant(x), np.ones(3, "f")
    weights = np.arange(6, dtype="f")
    calls: list[Any] = [
        lambda x: fusebn.moments(x, 0, weights=weights, keepdims=True),
        lambda x: fusebn.weighted_moments(x, 0, weights[:, None]),
        lambda x: fusebn.sufficient_statistics(x, 0, shift=np.float32(0.5))[:3],
        lambda x: fusebn.normalize_moments(4, x[:1], x[:1] ** 2, None),
        lambda x: [fusebn.batch_normalization(x, one, one, None, None, 0.1)],
        lambda x: [fusebn.batch_norm_with_global_normalization(x, one, one, one, one, 0.1, True)],
        lambda x: fusebn.fused_batch_norm(x, one, one, data_format="NC", activation="relu"),
        lambda x: fusebn.fused_batch_norm_grad(x, x, one, one, one, one, axis=-1, dmean=one),
    ]
    for call in calls:
        ours, numpys = call(tensor), call(x)
        assert type(ours) is type(numpys)
        for a, b in zip(ours, numpys, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert tf.is_tensor(a)
                assert_close(a.numpy(), b, dtype=b.dtype, magnitude=np.abs(b) + 1, ulps=2)
    variable = tf.Variable([0.0, 10.0])
    fusebn.assign_moving_average(variable, tf.constant([1.0, 20.0]), 0.5)
    np.testing.assert_array_equal(variable, [0.5, 15.0])


@pytest.mark.parametrize("is_training", [True, False, None])
@pytest.mark.parametrize("portable", [False, True])
def test_fused_batch_norm_grad(
    rng: np.random.Generator, dtype: np.dtype[Any], is_training: bool | None, portable: bool
) -> None:
    x, dy, residual = (frozen(rng.standard_normal((6, 4)), dtype) for _ in range(3))
    scale, offset = parameters(rng, 4, dtype)
    batch = reference.moments(x, 0)
    mean, variance = (v[0].astype(np.float64) for v in (batch.mean, batch.variance()))
    for training in [True, False] if is_training is None else [is_training]:
        flag = tf.constant(training) if is_training is None else training
        into = {"dmean": offset, "dvariance": scale} if training and is_training else {}
        with fusebn.tensorflow.portable() if portable else tf.name_scope("native"):
            got = fusebn.fused_batch_norm_grad(
                dy, tf.constant(x), scale, offset, mean, variance, is_training=flag, axis=-1,
                residual=residual, activation="leaky_relu", **into,
            )  # fmt: skip
        if portable and dtype.itemsize == 2:
            continue  # TensorFlow rounds the steps of the derivative
        assert_gradients(
            tuple(v.numpy() for v in got), dy, x, scale, offset, mean, variance, 0.001, training,
            residual=residual, activation="leaky_relu", **into,
        )  # fmt: skip


def test_no_function_is_rewritten_by_autograph() -> None:
    """A switch that Python decides stays one: no graph holds both ways."""

    @tf.function
    def apply(x: Any) -> Any:
        y = nn.fused_batch_norm(x, None, None, axis=-1, weights=tf.ones([4])).y
        return fusebn.fused_batch_norm(y, None, None, axis=-1).y

    graph = apply.get_concrete_function(tf.ones([4, 3])).graph
    assert [op.type for op in graph.get_operations()].count("FusebnBatchNorm") == 2
    assert not {op.type for op in graph.get_operations()} & {"If", "StatelessIf", "While"}


# ---- bad input, when the graph is built ----

X = tf.ones([2, 4, 4, 3])
C = tf.ones(3)

ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: nn.fused_batch_norm("x", C, C), TypeError, "`x` must be an array of"),
    (lambda: nn.fused_batch_norm(object(), C, C), TypeError, "`x` must be a tensor; got object"),
    (lambda: nn.fused_batch_norm(tf.ones([2, 3], tf.int32), C, C), TypeError, "dtype int32"),
    (lambda: nn.fused_batch_norm(X[0], C, C), ValueError, "`x` must have 4 axes"),
    (lambda: nn.fused_batch_norm(X, tf.ones(4), C), ValueError, r"`scale` must have shape \(3,\)"),
    (lambda: nn.fused_batch_norm(X, C, tf.ones([1, 3])), ValueError, "Reshape it by"),
    (lambda: nn.fused_batch_norm(X, C, tf.ones(3, tf.int32)), TypeError, "`offset` must be"),
    (lambda: nn.fused_batch_norm(X, C, C, is_training=False), ValueError, "`mean` must be given"),
    (
        lambda: nn.fused_batch_norm(X, C, C, is_training=tf.constant(True)),
        ValueError,
        "`mean` must be given, and `variance`, where is_training is a tensor",
    ),
    (lambda: nn.fused_batch_norm(X, C, C, C, is_training=False), ValueError, "since `mean` is"),
    (
        lambda: nn.fused_batch_norm(X, C, C, exponential_avg_factor=0.5),
        ValueError,
        "with exponential_avg_factor != 1",
    ),
    (
        lambda: nn.fused_batch_norm(X, C, C, is_training=1),
        TypeError,
        "`is_training` must be a bool",
    ),
    (
        lambda: nn.fused_batch_norm(X, C, C, C, C, is_training=tf.constant([True])),
        TypeError,
        r"`is_training` must be a bool, or a boolean scalar; got bool of shape \(1,\)",
    ),
    (
        lambda: nn.fused_batch_norm(X, C, C, C, C, is_training=tf.constant(1)),
        TypeError,
        "got int32 of shape",
    ),
    (lambda: nn.fused_batch_norm(X, C, C, epsilon=-1), ValueError, "`epsilon` must be finite"),
    (lambda: nn.fused_batch_norm(X, C, C, data_format="HWCN"), ValueError, "`data_format` must be"),
    (lambda: nn.fused_batch_norm(X, C, C, axis=4), ValueError, "`axis` must lie in"),
    (lambda: nn.fused_batch_norm(X, C, C, activation="tanh"), ValueError, "`activation` must be"),
    (lambda: nn.fused_batch_norm(X, C, C, correction=-1), ValueError, "`correction` must be"),
    (lambda: nn.fused_batch_norm(X, C, C, residual=X[:1]), ValueError, "`residual` must have"),
    (
        lambda: nn.fused_batch_norm(X, C, C, residual=tf.cast(X, tf.float64)),
        TypeError,
        "`residual` must have the dtype of x, float32; got dtype float64",
    ),
    (
        lambda: nn.fused_batch_norm(X, C, C, weights=tf.ones([3, 4, 4])),
        ValueError,
        r"`weights` must broadcast to \(2, 4, 4\)",
    ),
    (lambda: nn.moments(X, 4), ValueError, "`axes` must lie in"),
    (lambda: nn.moments(X, [0, 0]), ValueError, "`axes` must name each axis once"),
    (
        lambda: nn.moments(X, 0, weights=tf.ones(3)),
        ValueError,
        r"`weights` must broadcast to \(2,\)",
    ),
    (
        lambda: nn.weighted_moments(X, 0, tf.ones([5, 1])),
        ValueError,
        "`frequency_weights` must broadcast to",
    ),
    (
        lambda: nn.sufficient_statistics(X, 0, shift=tf.ones(2)),
        ValueError,
        "`shift` must broadcast",
    ),
    (lambda: nn.normalize_moments(-1, C, C, None), ValueError, "`counts` must not be negative"),
    (lambda: nn.normalize_moments(1, C, tf.ones(2), None), ValueError, "the shape of mean_ss"),
    (lambda: nn.batch_normalization(X, None, C, C, C, 0), TypeError, "`mean` must be a tensor"),
    (
        lambda: nn.batch_normalization(X, C, tf.ones(5), C, C, 0),
        ValueError,
        "`variance` must broadcast against x",
    ),
    (lambda: nn.batch_normalization(X, C, C, C, C, -1), ValueError, "`variance_epsilon` must be"),
    (lambda: fusebn.fused_batch_norm(X, C, C, out=X), TypeError, "`out` must be None"),
    (
        lambda: fusebn.fused_batch_norm_grad(X, X, C, C, None, C),
        ValueError,
        "`mean` must be given: the one that normalized x",
    ),
    (
        lambda: fusebn.fused_batch_norm_grad(X, X, C, C, C, C, is_training=False, dmean=C),
        ValueError,
        "`dmean` must be None with is_training=False",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[row[2] for row in ERRORS])
@pytest.mark.parametrize("where", ["eager", "graph"])
def test_errors(call: Any, kind: type[Exception], message: str, where: str) -> None:
    if where == "eager":
        with pytest.raises(kind, match=message):
            call()
    else:
        with pytest.raises(kind, match=message):
            tf.function(call).get_concrete_function()


def test_what_is_known_of_a_shape_is_checked() -> None:
    with tf.Graph().as_default():
        x = v1.placeholder(tf.float32, [None, None, 3])
        with pytest.raises(ValueError, match=r"`scale` must have shape \(3,\)"):
            nn.fused_batch_norm(x, tf.ones(4), None, axis=-1)
        with pytest.raises(ValueError, match="`residual` must have the shape of x"):
            nn.fused_batch_norm(
                x, None, None, axis=-1, residual=v1.placeholder("float", [None, 2, 4])
            )
        with pytest.raises(ValueError, match="`residual` must have the shape of x"):
            nn.fused_batch_norm(x, None, None, axis=-1, residual=v1.placeholder("float", [2, 3]))
        with pytest.raises(ValueError, match="`x` must have a known rank"):
            nn.moments(v1.placeholder(tf.float32), 0)
        unknown = v1.placeholder(tf.float32, [None, None])
        y, mean, _ = nn.fused_batch_norm(unknown, v1.placeholder("float", [None]), None, axis=-1)
        assert y.shape.as_list() == [None, None]
        assert mean.shape.as_list() == [None]


def test_a_negative_variance_is_an_error_when_the_op_runs() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="`variance` must not be negative"):
        nn.batch_normalization(X, C, -C, None, None, 0.1)


def test_stat_is_the_type_of_the_statistics(dtype: np.dtype[Any]) -> None:
    result = nn.fused_batch_norm(tf.ones([2, 3], dtype), None, None, axis=-1)
    assert [r.dtype.as_numpy_dtype for r in result] == [dtype, stat(dtype), stat(dtype)]
